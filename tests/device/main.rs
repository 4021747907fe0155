//! The device layer: the registry, folders of kernels, finding a GPU, memory, streams, graphs and launches.

#[path = "../support/mod.rs"]
mod support;

mod any_device;
#[cfg(target_os = "linux")]
mod fake;
#[cfg(all(target_os = "linux", feature = "capi", feature = "emulator"))]
mod fake_capi;
#[cfg(target_os = "linux")]
mod fake_driver;
#[cfg(target_os = "linux")]
mod fake_foreign;
#[cfg(target_os = "linux")]
mod fake_nccl;
#[cfg(all(target_os = "linux", feature = "emulator"))]
mod fake_ranks;
#[cfg(all(target_os = "linux", feature = "emulator"))]
mod fake_training;
mod fatbins;
#[cfg(feature = "emulator")]
mod foreign;
mod kernel_registry;
mod planned;
#[cfg(all(target_os = "linux", feature = "emulator"))]
mod timeline;
mod words;
