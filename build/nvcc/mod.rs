//! Fatbins of the kernels, made by nvcc where there is one, and the Rust file that embeds them.

mod architectures;
mod compile;
mod find;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use compile::Compiled;

use crate::registry::Source;
use crate::units;

/// Writes `OUT_DIR/fatbins.rs`, after compiling `sources` if there is an nvcc, and for the tests of the compiled
/// kernels `OUT_DIR/fatbins.tsv`.
///
/// # Errors
/// What a person has to mend.
pub fn build(sources: &[Source]) -> Result<(), String> {
    for name in [
        "TRENCADIS_NO_CUDA",
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_COMPUTE_CAP",
        "NVCC_PREPEND_FLAGS",
        "NVCC_APPEND_FLAGS",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let kernels = root.join("kernels");
    let hash =
        units::hash_of(sources, &kernels).map_err(|cause| format!("kernels/ cannot be read: {cause}"))?;

    let skip = env::var_os("TRENCADIS_NO_CUDA").is_some_and(|value| !value.is_empty() && value != "0");
    let nvcc = if skip { None } else { find::nvcc(&root)? };
    let Some(nvcc) = nvcc else {
        if !skip {
            println!(
                "cargo::warning=no nvcc was found, so this build has no GPU kernels and everything runs on the \
                 CPU; `tools/install-cuda` fetches it (docs/building.md)"
            );
        }
        report(&out, None, &[])?;
        return write(&out, None, &[], &[], &hash);
    };
    nvcc.warn();
    let list = env::var("CUDA_COMPUTE_CAP").ok();
    let mut jobs = Vec::new();
    for source in sources {
        let targets = architectures::of_tier(source.tier, list.as_deref())?;
        if !targets.is_empty() {
            jobs.push((source, targets));
        }
    }
    let fatbins = compile::all(&nvcc, &jobs, &kernels, &out)?;
    // What the build runs on is what its portable kernels run on.
    let targets = architectures::targets(list.as_deref())?;
    let names: Vec<String> = targets.iter().map(|target| target.code.clone()).collect();
    report(&out, Some(&nvcc), &fatbins)?;
    write(&out, Some(&nvcc.version), &names, &fatbins, &hash)
}

/// The compiler, and of every fatbin its file, its architectures and how many seconds of the processor that
/// took, in this build or the one that it is from; nothing in a build without kernels.
fn report(out: &Path, nvcc: Option<&find::Nvcc>, fatbins: &[Compiled]) -> Result<(), String> {
    let mut text = String::new();
    if let Some(nvcc) = nvcc {
        let _ = writeln!(text, "nvcc\t{}", nvcc.path.display());
    }
    for Compiled { stem, fatbin, architectures } in fatbins {
        let seconds = fs::read_to_string(compile::seconds(fatbin)).unwrap_or_default();
        let (file, targets) = (fatbin.display(), architectures.join(","));
        let _ = writeln!(text, "fatbin\t{stem}\t{file}\t{targets}\t{}", seconds.trim());
    }
    let path = out.join("fatbins.tsv");
    fs::write(&path, text).map_err(|cause| format!("{} cannot be written: {cause}", path.display()))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set; build with cargo"))
}

/// The generated file, rewritten only when it differs.
fn write(
    out: &Path,
    compiler: Option<&str>,
    architectures: &[String],
    fatbins: &[Compiled],
    hash: &str,
) -> Result<(), String> {
    let mut text = String::from("// Written by build.rs.\n");
    let _ = writeln!(text, "pub const SOURCES: &str = {hash:?};");
    let _ = writeln!(text, "pub const COMPILER: Option<&str> = {compiler:?};");
    let _ = writeln!(text, "pub const ARCHITECTURES: &[&str] = &{architectures:?};");
    let _ = write!(text, "pub const FATBINS: Option<&[(&str, &[u8])]> = ");
    if compiler.is_some() {
        text += "Some(&[\n";
        for Compiled { stem, fatbin, .. } in fatbins {
            let _ = writeln!(text, "    ({stem:?}, include_bytes!({fatbin:?})),");
        }
        text += "]);\n";
    } else {
        text += "None;\n";
    }
    let path = out.join("fatbins.rs");
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(&path, text).map_err(|cause| format!("{} cannot be written: {cause}", path.display()))
}
