//! Compiles the kernels: with nvcc for GPUs, and with the C++ compiler for the emulator where the feature
//! asks for it. The parts are in build/.

#[cfg(feature = "emulator")]
#[path = "build/emulator.rs"]
mod emulator;
#[path = "src/hash.rs"]
mod hash;
#[path = "build/nvcc/mod.rs"]
mod nvcc;
#[cfg(feature = "emulator")]
#[path = "build/planted.rs"]
mod planted;
#[allow(dead_code)] // Some of it is for the library alone.
#[path = "src/kernels/registry.rs"]
mod registry;
#[path = "build/reuse.rs"]
mod reuse;
#[path = "build/units.rs"]
mod units;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=src/hash.rs");
    println!("cargo::rerun-if-changed=src/kernels/registry.rs");
    for instances in [
        "attention/instances.rs",
        "collective/instances.rs",
        "elementwise/instances.rs",
        "gemm/tiles.rs",
        "measure/instances.rs",
        "norm/instances.rs",
        "patch/instances.rs",
        "pool/instances.rs",
        "position/instances.rs",
        "residual/instances.rs",
        "view/instances.rs",
    ] {
        println!("cargo::rerun-if-changed=src/kernels/{instances}");
    }
    let sources = registry::sources();
    report(nvcc::build(&sources));
    #[cfg(feature = "emulator")]
    report(emulator::build(&sources));
}

fn report(result: Result<(), String>) {
    if let Err(message) = result {
        for line in message.lines().filter(|line| !line.trim().is_empty()) {
            println!("cargo::error={line}");
        }
    }
}
