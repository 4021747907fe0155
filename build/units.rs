//! The translation unit of a source: its file, and one line for each kernel.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::hash::fnv1a;
use crate::registry::Source;

/// Text of the unit, compiled with `kernels/` among the include folders.
pub fn unit(source: &Source) -> String {
    let mut text = format!("#include \"{}\"\n\n", source.file);
    for kernel in &source.kernels {
        let _ = writeln!(
            text,
            "TRENCADIS_KERNEL({}, {}, {}, {}, {})",
            kernel.name, kernel.threads, kernel.min_blocks, kernel.params, kernel.body
        );
    }
    text
}

/// Every file that a unit of `text` includes from below `kernels`, in order of first mention.
///
/// Conditions are not looked at, so this may be more than a compiler reads, never less.
pub fn headers(text: &str, kernels: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> =
        included(text).map(|name| kernels.join(name)).filter(|p| p.exists()).collect();
    let mut next = 0;
    while next < found.len() {
        let text = fs::read_to_string(&found[next])?;
        let folder = found[next].parent().unwrap_or(kernels).to_path_buf();
        for name in included(&text) {
            let path = [folder.join(name), kernels.join(name)].into_iter().find(|path| path.exists());
            let path = path.map(|path| fs::canonicalize(&path).unwrap_or(path));
            found.extend(path.filter(|path| !found.contains(path)));
        }
        next += 1;
    }
    Ok(found)
}

fn included(text: &str) -> impl Iterator<Item = &str> {
    let quoted = |line: &'_ str| -> Option<(usize, usize)> {
        let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?;
        let rest = rest.trim_start().strip_prefix('"')?;
        let start = line.len() - rest.len();
        Some((start, start + rest.find('"')?))
    };
    text.lines().filter_map(move |line| quoted(line).map(|(start, end)| &line[start..end]))
}

/// Hash of everything that the compiled kernels depend on: every unit, and every file that one includes.
/// The emulator's half of a header counts for nothing.
pub fn hash_of(sources: &[Source], kernels: &Path) -> io::Result<String> {
    let mut all = String::new();
    for source in sources {
        all += &contents(&unit(source), kernels)?;
    }
    Ok(format!("{:016x}", fnv1a(all.as_bytes())))
}

/// A unit with the contents of all that it includes, as nvcc sees it.
pub fn contents(unit: &str, kernels: &Path) -> io::Result<String> {
    let emulator = fs::canonicalize(kernels)?.join("emulator");
    joined(unit, headers(unit, kernels)?.into_iter().filter(|path| !path.starts_with(&emulator)))
}

/// The same as the emulator sees it.
#[allow(dead_code)] // For builds with the emulator alone.
pub fn emulated_contents(unit: &str, kernels: &Path) -> io::Result<String> {
    joined(unit, headers(unit, kernels)?.into_iter())
}

fn joined(unit: &str, files: impl Iterator<Item = PathBuf>) -> io::Result<String> {
    let mut all = unit.to_string();
    for path in files {
        all += &fs::read_to_string(path)?;
    }
    Ok(all)
}
