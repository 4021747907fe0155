//! Where nvcc is, and which one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The toolkit that the kernels are tested with, and whose code drivers from 580 on load.
const PINNED: (u32, u32) = (13, 0);

/// The first that compresses fatbins for size.
const OLDEST: (u32, u32) = (12, 8);

pub struct Nvcc {
    pub path: PathBuf,
    /// Version as it tells it, such as `13.0.88`.
    pub version: String,
}

/// The first of: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, what `tools/install-cuda` has fetched,
/// `/usr/local/cuda`. A variable that points to no nvcc is an error, so that nobody takes one compiler
/// for another.
pub fn nvcc(root: &Path) -> Result<Option<Nvcc>, String> {
    let Some(path) = locate(root)? else { return Ok(None) };
    let shown = path.display();
    // Another version may take its place.
    println!("cargo::rerun-if-changed={shown}");
    let done = Command::new(&path).arg("--version").output();
    let done = done.map_err(|cause| format!("{shown} cannot be run ({cause}); is it an nvcc?"))?;
    let text = String::from_utf8_lossy(&done.stdout);
    let version =
        version(&text).ok_or_else(|| format!("{shown} tells no version of nvcc; is it an nvcc?"))?;
    Ok(Some(Nvcc { version: version.into(), path }))
}

fn locate(root: &Path) -> Result<Option<PathBuf>, String> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set("NVCC") {
        // A bare name is looked up in PATH.
        let found = if path.components().count() == 1 { in_path(&path) } else { Some(path.clone()) };
        return match found.filter(|path| path.is_file()) {
            Some(path) => Ok(Some(path)),
            None => Err(format!("NVCC={}: there is no such file; unset it or correct it", path.display())),
        };
    }
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = set(name) {
            let path = home.join("bin").join(program());
            if path.is_file() {
                return Ok(Some(path));
            }
            return Err(format!(
                "{name}={}: there is no {} in it; unset it or correct it",
                home.display(),
                path.strip_prefix(&home).unwrap_or(&path).display()
            ));
        }
    }
    println!("cargo::rerun-if-env-changed=PATH");
    if let Some(path) = in_path(Path::new(program())) {
        return Ok(Some(path));
    }
    let homes = installed(root).into_iter().chain([PathBuf::from("/usr/local/cuda")]);
    Ok(homes.map(|home| home.join("bin").join(program())).find(|path| path.is_file()))
}

fn program() -> &'static str {
    if cfg!(windows) { "nvcc.exe" } else { "nvcc" }
}

fn in_path(name: &Path) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// The toolkit in the folder that `tools/install-cuda` fills.
fn installed(root: &Path) -> Option<PathBuf> {
    let lib = fs::read_dir(root.join(".cuda/lib")).ok()?;
    let homes = lib.flatten().map(|python| python.path().join("site-packages/nvidia/cu13"));
    homes.filter(|home| home.is_dir()).max()
}

/// `13.0.88` out of `Cuda compilation tools, release 13.0, V13.0.88`.
fn version(text: &str) -> Option<&str> {
    let line = text.lines().find(|line| line.contains("release "))?;
    let version = line.rsplit_once(", V")?.1.trim();
    numbers(version).map(|_| version)
}

fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

impl Nvcc {
    pub fn compresses(&self) -> bool {
        numbers(&self.version) >= Some(OLDEST)
    }

    /// Says which other version than the pinned one compiles.
    pub fn warn(&self) {
        let (path, version) = (self.path.display(), &self.version);
        let (major, minor) = PINNED;
        if !self.compresses() {
            println!(
                "cargo::warning={path} is version {version}, which is too old to compress the kernels and was \
                 never tested; use {major}.{minor}, which `tools/install-cuda` fetches"
            );
        } else if numbers(version) != Some(PINNED) {
            println!(
                "cargo::warning={path} is version {version}; the kernels are tested with {major}.{minor}, which \
                 `tools/install-cuda` fetches"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_of_nvcc() {
        let text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\nBuild x\n";
        assert_eq!(version(text), Some("13.0.88"));
        assert_eq!(version("clang version 19"), None);
        for (text, compresses) in
            [("13.0.88", true), ("12.8.61", true), ("12.6.20", false), ("11.8.89", false)]
        {
            assert_eq!(Nvcc { path: "nvcc".into(), version: text.into() }.compresses(), compresses, "{text}");
        }
    }
}
