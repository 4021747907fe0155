//! The GPU through the CUDA driver. cudarc is named in this folder alone.

mod context;
mod driver;
mod foreign;
mod launch;
mod memory;
mod modules;
mod stream;
mod tensor_map;

use std::sync::Arc;

use cudarc::driver::sys::CUdevice;

use context::Context;
use memory::Memory;
use modules::Modules;

use super::backend::Backend;
use super::fatbins::Fatbins;
use super::{DeviceInfo, Kernels};
use crate::kernels::registry::{self, Tier};
use crate::{Error, Result};

/// Opens GPU number `ordinal` with its kernels.
pub(super) fn open(ordinal: usize) -> Result<(Kernels, Box<dyn Backend>)> {
    let version = driver::start()?;
    let device = driver::device(ordinal)?;
    let mut info = driver::describe(device, version)?;
    new_enough(&info)?;
    let fatbins = Fatbins::find()?;
    code_for(&info, &fatbins)?;
    info.hopper = has_hopper(&info, &fatbins);
    let context = Arc::new(Context::primary(device)?);
    let memory = Memory::new(context.clone(), device)?;
    let modules = Modules::new(context, fatbins, info.shared_per_block);
    let kernels = Kernels::new(Box::new(modules), info).with_dependent(is_set(DEPENDENT));
    Ok((kernels, Box::new(memory)))
}

/// The context that is current on this thread, with its kernels.
pub(super) fn current() -> Result<(Kernels, Box<dyn Backend>)> {
    let (kernels, context, device) = kernels_of_current()?;
    Ok((kernels, Box::new(Memory::lent(context, device))))
}

/// What every GPU is that the driver shows, whether or not there are kernels for it.
#[cfg(feature = "train")]
pub(super) fn describe_all() -> Result<Vec<DeviceInfo>> {
    let version = driver::start()?;
    (0..driver::count()?).map(|ordinal| driver::describe(driver::device(ordinal)?, version)).collect()
}

/// Number of GPUs that the driver shows: at least one.
pub(super) fn count() -> Result<usize> {
    driver::start()?;
    driver::count()
}

/// Kernels for the context that is current on this thread.
pub(super) fn for_current_context() -> Result<Kernels> {
    kernels_of_current().map(|(kernels, ..)| kernels)
}

fn kernels_of_current() -> Result<(Kernels, Arc<Context>, CUdevice)> {
    let version = driver::start()?;
    let (context, device) = Context::current()?;
    let mut info = driver::describe(device, version)?;
    new_enough(&info)?;
    let fatbins = Fatbins::find()?;
    code_for(&info, &fatbins)?;
    info.hopper = has_hopper(&info, &fatbins);
    let context = Arc::new(context);
    let modules = Modules::new(context.clone(), fatbins, info.shared_per_block);
    Ok((Kernels::new(Box::new(modules), info), context, device))
}

/// Variable that keeps to the portable kernels where it is set and not 0: to compare, or where the others fail.
const PORTABLE: &str = "TRENCADIS_PORTABLE";

/// Variable that makes launches dependent where it is set and not 0, see [`Launch`](super::Launch): not measured yet, so
/// not the rule. Streams of other engines, where whatever stands before our launches, are left alone.
const DEPENDENT: &str = "TRENCADIS_DEPENDENT";

fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value != "0" && !value.is_empty())
}

/// Whether the kernels of the sm90 tier are there for a GPU, and wanted.
fn has_hopper(info: &DeviceInfo, fatbins: &Fatbins) -> bool {
    let mut own = registry::sources().into_iter().filter(|source| source.tier == Tier::Sm90);
    info.capability == (9, 0)
        && !is_set(PORTABLE)
        && own.all(|source| fatbins.position(source.stem()).is_some())
}

/// Refuses GPUs that no build has kernels for.
pub(super) fn new_enough(info: &DeviceInfo) -> Result<()> {
    let (major, minor) = info.capability;
    if info.capability < (8, 0) {
        return Err(Error::usage(format!(
            "{} has compute capability {major}.{minor} and the kernels need 8.0 (Ampere) or newer",
            info.name
        )));
    }
    Ok(())
}

/// The code that a GPU would run, one of the architectures of `fatbins`.
///
/// # Errors
/// There is none for it.
pub(super) fn code_for<'a>(info: &DeviceInfo, fatbins: &'a Fatbins) -> Result<&'a str> {
    new_enough(info)?;
    let (major, minor) = info.capability;
    fatbins.code_for(info.capability).ok_or_else(|| {
        Error::usage(format!(
            "the kernels of {} are for {} and {} has compute capability {major}.{minor}; build them without \
             CUDA_COMPUTE_CAP, or with CUDA_COMPUTE_CAP={major}.{minor}",
            fatbins.origin(),
            fatbins.architectures().join(", "),
            info.name
        ))
    })
}
