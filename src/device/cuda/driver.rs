//! Finding the driver and the GPUs, each failure one sentence.

use std::sync::OnceLock;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute, CUresult, CUuuid};

use crate::device::{DeviceInfo, Driver};
use crate::{Error, Result};

/// Driver releases count from here: the first for CUDA 13.0, for which the bindings are made.
const OLDEST: i32 = 13_000;

const NO_GPU: &str = "the NVIDIA driver finds no GPU (CUDA_VISIBLE_DEVICES may hide it)";

/// An error of the driver, after what was attempted.
pub(super) fn failed(what: impl std::fmt::Display) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::failure(format!("{what}: {}", text(error)))
}

/// Name and explanation as the driver gives them.
fn text(error: DriverError) -> String {
    let name = error.error_name().map(|s| s.to_string_lossy()).unwrap_or_default();
    let meaning = error.error_string().map(|s| s.to_string_lossy()).unwrap_or_default();
    if name.is_empty() { format!("CUDA error {}", error.0 as u32) } else { format!("{name} ({meaning})") }
}

/// Release of the driver, such as `580.65.06`, where the system tells it.
pub(super) fn release() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let line = text.lines().find(|line| line.starts_with("NVRM version:"))?;
    line.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit())).map(String::from)
}

/// Finds and starts the driver, once a process; the CUDA version that it supports.
pub(super) fn start() -> Result<(u32, u32)> {
    static STARTED: OnceLock<std::result::Result<(u32, u32), String>> = OnceLock::new();
    STARTED.get_or_init(try_start).clone().map_err(Error::usage)
}

fn try_start() -> std::result::Result<(u32, u32), String> {
    // The bindings panic where the library or a symbol is missing, so both are ruled out first:
    // cuDriverGetVersion is in every driver, and one for CUDA 13.0 has all the rest.
    // SAFETY: opens and closes a library.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver was found (libcuda.so.1 cannot be opened); \
            to use a GPU install driver 580 or newer"
            .into());
    }
    let mut version = 0;
    // SAFETY: writes the version.
    let outcome = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if outcome == CUresult::CUDA_ERROR_STUB_LIBRARY {
        return Err("the libcuda that was found is the stub of a CUDA toolkit and no driver; \
            take its folder out of LD_LIBRARY_PATH"
            .into());
    }
    outcome
        .result()
        .map_err(|error| format!("the NVIDIA driver does not tell its version: {}", text(error)))?;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if version < OLDEST {
        return Err(format!(
            "the NVIDIA driver supports CUDA {major}.{minor} and the kernels need 13.0; \
             update it to 580 or newer"
        ));
    }
    result::init().map_err(|error| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => NO_GPU.into(),
        _ => format!("the NVIDIA driver does not start: {}", text(error)),
    })?;
    Ok((major as u32, minor as u32))
}

/// How many GPUs there are: at least one.
pub(super) fn count() -> Result<usize> {
    match result::device::get_count().map_err(failed("the GPUs cannot be counted"))? {
        ..=0 => Err(Error::usage(NO_GPU)),
        count => Ok(count as usize),
    }
}

pub(super) fn device(ordinal: usize) -> Result<CUdevice> {
    let count = count()?;
    if ordinal >= count {
        let last = count - 1;
        return Err(Error::usage(format!(
            "GPU {ordinal} was asked for and the last one is GPU {last}; choose a number from 0 to {last}"
        )));
    }
    result::device::get(ordinal as i32).map_err(failed(format_args!("GPU {ordinal} cannot be opened")))
}

pub(super) fn attribute(device: CUdevice, attribute: Attribute) -> Result<u32> {
    // SAFETY: `device` comes from the driver.
    let value = unsafe { result::device::get_attribute(device, attribute) };
    Ok(value.map_err(failed("a property of the GPU cannot be read"))?.max(0) as u32)
}

/// What tells the GPU, or the part of one that is shown, from all others on every machine.
pub(super) fn uuid(device: CUdevice) -> Result<[u8; 16]> {
    let mut uuid = CUuuid { bytes: [0; 16] };
    // SAFETY: `device` comes from the driver.
    let outcome = unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) }.result();
    outcome.map_err(failed("the UUID of the GPU cannot be read"))?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

pub(super) fn describe(device: CUdevice, version: (u32, u32)) -> Result<DeviceInfo> {
    let get = |which| attribute(device, which);
    Ok(DeviceInfo {
        name: result::device::get_name(device).map_err(failed("the name of the GPU cannot be read"))?,
        capability: (
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // The kernels decide.
        hopper: false,
        multiprocessors: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_per_multiprocessor: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
        l2_bytes: get(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        // SAFETY: `device` comes from the driver.
        memory_bytes: unsafe { result::device::total_mem(device) }
            .map_err(failed("the memory of the GPU cannot be read"))?,
        clock_khz: get(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        driver: Some(Driver { cuda: version, release: release() }),
    })
}
