//! Builds the kernels.

#[cfg(feature = "emulator")]
#[path = "build/emulator.rs"]
mod emulator;
#[allow(dead_code)]
#[path = "src/kernels/registry.rs"]
mod registry;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=src/kernels/registry.rs");
    #[cfg(feature = "emulator")]
    emulator::build(&registry::sources());
}
