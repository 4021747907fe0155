//! Where fixtures and the program stand. Cargo tells when it runs a test, and so does `run` of tools/bundle,
//! whose tests run on another machine than the one that compiled them.
#![allow(dead_code)]

use std::path::PathBuf;

/// The folder that holds `tests`.
pub fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// The program `trencadis`.
pub fn program() -> PathBuf {
    std::env::var_os("CARGO_BIN_EXE_trencadis")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_trencadis").into())
        .into()
}
