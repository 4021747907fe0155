//! A CUDA driver that runs nothing (`fake_libcuda.c`), and programs that find it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::{TempDir, tempdir};

use crate::support::places;

/// Compiles a file of this folder to a shared library.
pub fn library(source: &str, library: &Path) {
    let done = Command::new("cc")
        .args(["-shared", "-fPIC", "-pthread", "-o"])
        .arg(library)
        .arg(places::root().join("tests/device").join(source))
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Set in the process that has the fake driver.
pub const INSIDE: &str = "TRENCADIS_TEST_FAKE_DRIVER";

/// A folder with the fake driver and one with kernels for it.
pub struct Fake(TempDir);

impl Fake {
    pub fn new() -> Self {
        let place = tempdir().unwrap();
        library("fake_libcuda.c", &place.path().join("libcuda.so"));
        let kernels = place.path().join("kernels");
        fs::create_dir(&kernels).unwrap();
        crate::fatbins::write(&kernels);
        Self(place)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// `program` where the fake driver is found.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", self.path());
        command.env("TRENCADIS_KERNELS", self.path().join("kernels"));
        command
    }

    /// What `trencadis inspect device` says.
    pub fn inspect(&self, settings: &[(&str, &str)]) -> String {
        let mut command = self.command(places::program());
        let done = command.args(["inspect", "device"]).envs(settings.iter().copied()).output().unwrap();
        assert!(done.status.success() && done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    /// Runs the ignored test `name` of `fake_driver` in a process of its own; the driver's log.
    pub fn runs(&self, name: &str, settings: &[(&str, &str)]) -> Vec<String> {
        self.runs_test(&format!("fake_driver::{name}"), settings)
    }

    /// Runs the ignored test `name`, its module before it, in a process of its own; the driver's log.
    pub fn runs_test(&self, name: &str, settings: &[(&str, &str)]) -> Vec<String> {
        let mut command = self.command(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--ignored", "--nocapture"]);
        command.env(INSIDE, "1").envs(settings.iter().copied());
        let (done, log) = self.output(command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(done.status.success(), "{}\n{}", text(&done.stdout), text(&done.stderr));
        assert!(text(&done.stdout).contains("1 passed"), "{}", text(&done.stdout));
        log
    }

    /// What `command` says, and the lines of the driver's log.
    pub fn output(&self, mut command: Command) -> (Output, Vec<String>) {
        let path = self.path().join("log");
        let _ = fs::remove_file(&path);
        let done = command.env("FAKE_CUDA_LOG", &path).output().unwrap();
        let log = fs::read_to_string(&path).unwrap_or_default();
        (done, log.lines().map(String::from).collect())
    }
}
