//! What `trencadis inspect device` says.

use std::fmt::Write as _;

use super::fatbins::Fatbins;
use super::{DeviceChoice, DeviceInfo, cuda, select};
use crate::Result;
use crate::kernels::registry;

/// What was found, which kernels would be used, and why not, where not: one line each.
///
/// # Errors
/// None but those of [`select`].
pub fn report() -> Result<String> {
    let fatbins = Fatbins::find();
    let mut text = String::new();
    match cuda::describe_all() {
        Ok(gpus) => {
            gpus.iter().enumerate().for_each(|(n, info)| gpu(&mut text, n, info, fatbins.as_ref().ok()))
        }
        Err(reason) => line(&mut text, "GPU", format_args!("none: {reason}")),
    }
    match &fatbins {
        Ok(fatbins) => kernels(&mut text, fatbins),
        Err(reason) => line(&mut text, "kernels", format_args!("none: {reason}")),
    }
    line(&mut text, "models run on", select(DeviceChoice::Auto)?.description);
    Ok(text)
}

fn line(text: &mut String, label: &str, value: impl std::fmt::Display) {
    let _ = writeln!(text, "{label:<18}{value}");
}

fn gpu(text: &mut String, number: usize, info: &DeviceInfo, fatbins: Option<&Fatbins>) {
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let (major, minor) = info.capability;
    line(text, &format!("GPU {number}"), format_args!("{}, compute capability {major}.{minor}", info.name));
    line(
        text,
        "  memory",
        format_args!("{:.1} GiB, L2 cache {:.1} MiB", gib(info.memory_bytes), gib(info.l2_bytes) * 1024.0),
    );
    let clock = match info.clock_khz {
        0 => String::new(),
        khz => format!(" at up to {:.0} MHz", f64::from(khz) / 1000.0),
    };
    line(text, "  multiprocessors", format_args!("{}{clock}", info.multiprocessors));
    line(
        text,
        "  shared memory",
        format_args!(
            "{} KiB a block, {} KiB a multiprocessor",
            info.shared_per_block / 1024,
            info.shared_per_multiprocessor / 1024
        ),
    );
    if let Some(driver) = &info.driver {
        let release = driver.release.as_ref().map_or_else(String::new, |release| format!("{release}, "));
        line(text, "  driver", format_args!("{release}CUDA {}.{}", driver.cuda.0, driver.cuda.1));
    }
    let code = cuda::new_enough(info).and_then(|()| fatbins.map(|f| cuda::code_for(info, f)).transpose());
    match code {
        Ok(None) => {}
        Ok(Some(code)) if code.starts_with("sm_") => {
            line(text, "  kernels", format_args!("machine code for {code}"))
        }
        Ok(Some(code)) => line(
            text,
            "  kernels",
            format_args!("PTX of {code}, which the driver compiles when a kernel is first launched"),
        ),
        Err(reason) => line(text, "  kernels", format_args!("none: {reason}")),
    }
}

fn kernels(text: &mut String, fatbins: &Fatbins) {
    let count: usize = registry::sources().iter().map(|source| source.kernels.len()).sum();
    line(
        text,
        "kernels",
        format_args!(
            "{count} in {} fatbins ({:.1} MiB) of {}, by nvcc {} for {}",
            fatbins.len(),
            fatbins.bytes_in_all() as f64 / f64::from(1 << 20),
            fatbins.origin(),
            fatbins.compiler(),
            fatbins.architectures().join(", ")
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Driver;

    #[test]
    fn a_gpu_in_words() {
        let driver = Some(Driver { cuda: (13, 0), release: Some("580.65.06".into()) });
        let info = DeviceInfo { driver, ..DeviceInfo::h100() };
        let said = |info: &DeviceInfo| {
            let mut text = String::new();
            gpu(&mut text, 0, info, None);
            text
        };
        assert!(said(&DeviceInfo { clock_khz: 0, ..info.clone() }).contains("multiprocessors 132\n"));
        assert_eq!(
            said(&info).lines().collect::<Vec<_>>(),
            [
                "GPU 0             NVIDIA H100 80GB HBM3, compute capability 9.0",
                "  memory          80.0 GiB, L2 cache 50.0 MiB",
                "  multiprocessors 132 at up to 1980 MHz",
                "  shared memory   227 KiB a block, 228 KiB a multiprocessor",
                "  driver          580.65.06, CUDA 13.0",
            ]
        );
    }
}
