//! Where fixtures and the program stand. Cargo tells when it runs a test, and so does `run` of tools/bundle,
//! whose tests run on another machine than the one that compiled them.
#![allow(dead_code)]

use std::path::PathBuf;

/// The folder that holds `tests`.
pub fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// A fixture of another implementation, `tests/golden/{path}`.
pub fn golden(path: &str) -> PathBuf {
    root().join("tests/golden").join(path)
}

/// The program `trencadis`.
pub fn program() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_trencadis").map(Into::into);
    let program = std::env::var_os("CARGO_BIN_EXE_trencadis").or(built);
    program.expect("the program is built with the feature `train`").into()
}
