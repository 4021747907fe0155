//! Which device a person wants.

use clap::ValueEnum;

use crate::error::{Error, Result};

/// What a person asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// The fastest there is.
    #[default]
    Auto,
    /// The CPU device.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

const NOT_YET: &str = "a model on the GPU needs every operation as a kernel, and this version has them for \
    matrix products, attention and pooling alone";

/// Settles the choice and returns a line that says what runs, and why not something faster.
///
/// # Errors
/// An explicit wish that cannot be met.
pub fn select(choice: DeviceChoice) -> Result<String> {
    let threads = rayon::current_num_threads();
    let plural = if threads == 1 { "" } else { "s" };
    match choice {
        DeviceChoice::Cpu => Ok(format!("cpu, {threads} thread{plural}")),
        DeviceChoice::Auto => Ok(format!("cpu, {threads} thread{plural} (models do not run on the GPU yet)")),
        DeviceChoice::Cuda => Err(Error::usage(format!(
            "--device cuda: {NOT_YET}; use --device cpu, or auto to take what there is"
        ))),
    }
}
