//! Which device a person wants, and which one it becomes.

use clap::ValueEnum;

use super::Device;
#[cfg(feature = "emulator")]
use super::emulator::EmulatorOptions;
use crate::error::{Error, Result};

/// What a person asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// GPU 0 where there is one that the kernels run on, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// GPU 0 of those that CUDA_VISIBLE_DEVICES shows; of several ranks, each the next.
    Cuda,
    /// The GPU kernels on the CPU, very slowly: for tests.
    #[cfg(feature = "emulator")]
    Emulator,
}

/// Where models run.
#[derive(Clone)]
pub struct Selected {
    /// What the kernels run on; none on the CPU device.
    pub device: Option<Device>,
    /// A line that says what runs, and why not something faster.
    pub description: String,
}

/// Opens the device of `choice`.
///
/// # Errors
/// An explicit wish that cannot be met.
pub fn select(choice: DeviceChoice) -> Result<Selected> {
    select_for_rank(choice, 0)
}

/// Opens the device of `choice` for rank `local` of those on this machine: of GPUs the one of that number, from the
/// first again where there are more ranks than GPUs. Whether ranks can share one,
/// [`DeviceGroup`](crate::parallel::DeviceGroup) says: threads of one process do by clones of one device.
///
/// # Errors
/// An explicit wish that cannot be met.
pub fn select_for_rank(choice: DeviceChoice, local: usize) -> Result<Selected> {
    let own_gpu = || Device::cuda(local % Device::cuda_count()?);
    match choice {
        DeviceChoice::Auto => Ok(own_gpu().map_or_else(|error| cpu_instead(&error), gpu)),
        DeviceChoice::Cpu => Ok(cpu("")),
        DeviceChoice::Cuda => own_gpu().map(gpu).map_err(not_there),
        #[cfg(feature = "emulator")]
        DeviceChoice::Emulator => Ok(Selected {
            device: Some(Device::emulator(EmulatorOptions::default())),
            description: "emulator, for tests".into(),
        }),
    }
}

/// Opens the devices of `size` ranks that are threads of this process: of GPUs one each, or one that all share.
///
/// # Errors
/// An explicit wish that cannot be met; several GPUs, but fewer than ranks.
pub fn select_for_ranks(choice: DeviceChoice, size: usize) -> Result<Vec<Selected>> {
    let first = select(choice)?;
    let gpus = match (&first.device, choice) {
        (Some(_), DeviceChoice::Auto | DeviceChoice::Cuda) => Device::cuda_count()?,
        _ => 1,
    };
    if gpus == 1 {
        return Ok(vec![first; size]);
    }
    if size > gpus {
        return Err(Error::usage(format!(
            "{size} ranks cannot share {gpus} GPUs: each takes one, or all take the same; start at most {gpus}, or choose one \
             GPU with CUDA_VISIBLE_DEVICES"
        )));
    }
    std::iter::once(Ok(first)).chain((1..size).map(|rank| select_for_rank(choice, rank))).collect()
}

fn gpu(device: Device) -> Selected {
    let info = device.info();
    let gib = info.memory_bytes as f64 / f64::from(1 << 30);
    Selected { description: format!("{}, {gib:.1} GiB", info.name), device: Some(device) }
}

fn cpu(note: &str) -> Selected {
    let threads = rayon::current_num_threads();
    let plural = if threads == 1 { "" } else { "s" };
    Selected { device: None, description: format!("cpu, {threads} thread{plural}{note}") }
}

/// The CPU, with as much of the reason as makes a short line: `trencadis inspect device` tells all of it.
fn cpu_instead(error: &Error) -> Selected {
    let reason = error.to_string();
    let end = [" (", ";"].iter().filter_map(|mark| reason.find(mark)).min().unwrap_or(reason.len());
    cpu(&format!(" (no GPU: {})", &reason[..end]))
}

fn not_there(error: Error) -> Error {
    let say = |reason| format!("--device cuda: {reason}; use --device cpu, or auto to take what there is");
    match error {
        Error::Usage(reason) => Error::Usage(say(reason)),
        Error::Failure(reason) => Error::Failure(say(reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceInfo;

    #[test]
    fn a_gpu_in_one_line() {
        let selected = gpu(Device::planned(DeviceInfo::h100()));
        assert_eq!(selected.description, "NVIDIA H100 80GB HBM3, 80.0 GiB");
        assert!(selected.device.is_some());
    }

    #[test]
    fn the_cpu_and_why() {
        let description = |reason: &str| cpu_instead(&Error::usage(reason)).description;
        let threads = match rayon::current_num_threads() {
            1 => "cpu, 1 thread".into(),
            n => format!("cpu, {n} threads"),
        };
        let cpu = select(DeviceChoice::Cpu).unwrap();
        assert!(cpu.device.is_none() && cpu.description == threads);
        for (reason, short) in [
            ("no driver was found (libcuda cannot be opened); install one", "no driver was found"),
            ("it is too old; update it (to 580)", "it is too old"),
            ("nothing works", "nothing works"),
        ] {
            assert_eq!(description(reason), format!("{threads} (no GPU: {short})"));
        }
    }

    #[test]
    fn a_wish_that_cannot_be_met() {
        for (error, code) in [(Error::usage("it is not there"), 2), (Error::failure("it is not there"), 1)] {
            let error = not_there(error);
            assert_eq!(
                error.to_string(),
                "--device cuda: it is not there; use --device cpu, or auto to take what there is"
            );
            assert_eq!(error.exit_code(), code);
        }
    }

    #[cfg(feature = "emulator")]
    #[test]
    fn the_emulator_is_a_choice() {
        let selected = select(DeviceChoice::Emulator).unwrap();
        assert_eq!(selected.description, "emulator, for tests");
        assert_eq!(selected.device.unwrap().info().name, "emulator");
    }
}
