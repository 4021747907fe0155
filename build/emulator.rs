//! Compiles the kernels for the host: the same `.cu` files, as C++17 over `kernels/emulator`.
//!
//! An object is kept under a hash of the command and of all that goes into it, and another build's is taken where there
//! is one. With `TRENCADIS_COVERAGE=1` objects count which lines run (gcov).

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, thread};

use crate::hash::fnv1a;
use crate::registry::Source;
use crate::{planted, reuse, units};

/// Files of the emulator itself, below `kernels/emulator`.
const RUNTIME: [&str; 10] = [
    "machine.cpp",
    "launch.cpp",
    "shared.cpp",
    "global.cpp",
    "collectives.cpp",
    "mbarrier.cpp",
    "proxy.cpp",
    "bulk.cpp",
    "wgmma.cpp",
    "cluster.cpp",
];

/// C++ that instantiates a source's kernels and lists them in a table.
fn translation_unit(source: &Source) -> String {
    let mut text = units::unit(source);
    let _ = write!(text, "\nextern \"C\" const emulator::Kernel {}[] = {{\n", table(source));
    for kernel in &source.kernels {
        let _ = writeln!(text, "    emulator_kernel_{},", kernel.name);
    }
    text + "};\n"
}

fn table(source: &Source) -> String {
    format!("trencadis_emulator_{}", source.stem())
}

/// Rust that names the tables.
fn tables(sources: &[Source]) -> String {
    let mut text = String::from("unsafe extern \"C\" {\n");
    for source in sources {
        let _ = writeln!(text, "    static {}: [machine::Kernel; {}];", table(source), source.kernels.len());
    }
    let _ = write!(text, "}}\n\nfn tables() -> Vec<&'static [machine::Kernel]> {{\n    vec![\n");
    for source in sources {
        let _ = writeln!(text, "        // SAFETY: constant data, of this length by the same build.");
        let _ = writeln!(text, "        unsafe {{ &{} }},", table(source));
    }
    text + "    ]\n}\n"
}

/// Writes `text` unless the file says so already, so that its time tells when it changed.
fn write_if_changed(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// Compiles all sources and links them into the crate.
///
/// # Errors
/// What the compiler says, or why there is none.
pub fn build(sources: &[Source]) -> Result<(), String> {
    println!("cargo::rerun-if-changed=tests/kernels");
    println!("cargo::rerun-if-env-changed=TRENCADIS_COVERAGE");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let (kernels, folder) = (root.join("kernels"), out.join("emulator"));
    fs::create_dir_all(&folder).map_err(|e| format!("cannot make {}: {e}", folder.display()))?;

    let mut sources: Vec<Source> = sources.to_vec();
    sources.extend(planted::sources());
    sources.retain(|source| !source.kernels.is_empty());
    write_if_changed(&out.join("emulator.rs"), &tables(&sources))?;
    let mut texts: Vec<(String, String)> = RUNTIME
        .iter()
        .map(|name| (name.trim_end_matches(".cpp").into(), format!("#include \"emulator/{name}\"\n")))
        .collect();
    texts.extend(sources.iter().map(|source| (source.stem().into(), translation_unit(source))));

    let coverage = env::var_os("TRENCADIS_COVERAGE").is_some_and(|value| value == "1");
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .warnings(true)
        .define("TRENCADIS_EMULATOR", None)
        .include(&kernels)
        // Faults name `kernels/...`, wherever the checkout stands.
        .flag(format!("-fmacro-prefix-map={}/=", root.display()))
        .flag("-fno-exceptions")
        .flag("-ffp-contract=off")
        .flag("-Wno-unused-parameter");
    if coverage {
        // Counters come after early inlining, which would take whole functions out of the count.
        compiler.flag("--coverage").flag("-fno-early-inlining");
    }
    let no_compiler = |e| format!("the emulator needs a C++17 compiler (CXX names it): {e}");
    let tool = compiler.try_get_compiler().map_err(no_compiler)?;
    // Objects are the same wherever the checkout stands.
    let command = format!("{:?}", tool.to_command()).replace(&root.display().to_string(), "");
    let mut units = Vec::new();
    for (stem, text) in texts {
        let unit = folder.join(&stem).with_extension("cpp");
        write_if_changed(&unit, &text)?;
        let all = units::emulated_contents(&text, &kernels)
            .map_err(|e| format!("what {stem} is made from cannot be read: {e}"))?;
        let key = fnv1a(format!("{command}\n{all}").as_bytes());
        units.push((unit, folder.join(format!("{stem}-{key:016x}.o"))));
    }
    clean(&folder, &units);
    let borrowed = |object: &Path| {
        // Counters name the folder that they were compiled in.
        let name = object.strip_prefix(&out).unwrap_or(object);
        let part = object.with_extension("part");
        let take = |path: PathBuf| fs::copy(path, &part).and_then(|_| fs::rename(&part, object)).is_ok();
        !coverage && reuse::elsewhere(&out, name).into_iter().any(take)
    };
    let stale: Vec<_> = units.iter().filter(|(_, object)| !object.is_file() && !borrowed(object)).collect();

    let queue = Mutex::new(stale);
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let work = || -> Result<(), String> {
        while let Some((source, object)) = queue.lock().ok().and_then(|mut queue| queue.pop()) {
            compile(tool.to_command(), source, object)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let died = |_| Err("a thread of the emulator build died".to_owned());
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(died))
    })?;

    let mut archive = cc::Build::new();
    archive.cpp(true);
    for (_, object) in &units {
        archive.object(object);
    }
    let failed = |e| format!("the emulator's objects cannot be put together: {e}");
    archive.try_compile("trencadis_emulator").map_err(failed)?;
    if coverage {
        println!("cargo::rustc-link-lib=gcov");
    }
    Ok(())
}

/// Deletes objects that no source makes any more.
fn clean(folder: &Path, units: &[(PathBuf, PathBuf)]) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_object = path.extension().is_some_and(|extension| extension == "o");
        if is_object && !units.iter().any(|(_, object)| *object == path) {
            // What cannot be deleted only takes room.
            let _ = fs::remove_file(path);
        }
    }
}

fn compile(mut command: Command, source: &Path, object: &Path) -> Result<(), String> {
    let part = object.with_extension("part");
    command.arg("-c").arg(source).arg("-o").arg(&part);
    let program = command.get_program().to_owned();
    let output = command.output().map_err(|e| {
        format!("the emulator needs a C++17 compiler, but {} cannot be run: {e}", program.display())
    })?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{} does not compile for the emulator:\n{text}", source.display()));
    }
    for line in text.lines() {
        println!("cargo::warning={line}");
    }
    // Under its own name once it is whole.
    fs::rename(&part, object).map_err(|e| format!("{} cannot be kept: {e}", object.display()))
}
