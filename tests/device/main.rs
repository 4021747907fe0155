//! The device layer: the registry, folders of kernels, finding a GPU, memory, streams, graphs and launches.

#[path = "../support/mod.rs"]
mod support;

mod any_device;
#[cfg(target_os = "linux")]
mod fake_driver;
mod fatbins;
mod kernel_registry;
mod planned;
