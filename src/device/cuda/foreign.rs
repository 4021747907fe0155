//! Memory that another engine has allocated: whose it is, and how far it goes, as the driver tells.

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUpointer_attribute as Attribute, CUresult};

use super::context::Context;
use super::driver::failed;
use crate::{Error, Result};

/// Refuses what is not all memory of `device` within `context`: plain memory of the host, another context, another GPU,
/// more than was allocated.
pub(super) fn check(context: &Context, device: CUdevice, address: u64, bytes: usize) -> Result<()> {
    let owner = match attribute(address, Attribute::CU_POINTER_ATTRIBUTE_CONTEXT, CUcontext::default()) {
        Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)) => {
            return Err(Error::usage(format!(
                "the address {address:#x} is no memory that the GPU knows: plain memory of the host, or freed; lend \
                 memory that was allocated on the GPU"
            )));
        }
        owner => {
            owner.map_err(failed(format_args!("the memory at {address:#x} does not tell its context")))?
        }
    };
    // Memory that is mapped by address, and that of pools, may belong to a GPU and no context of it.
    if owner.is_null() {
        let there = attribute(address, Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, device);
        let there =
            there.map_err(failed(format_args!("the memory at {address:#x} does not tell its GPU")))?;
        if there != device {
            return Err(Error::usage(format!(
                "the memory at {address:#x} lies on GPU {there} and the device is GPU {device}; lend memory of the \
                 device"
            )));
        }
    } else if !context.is(owner) {
        return Err(Error::usage(format!(
            "the memory at {address:#x} belongs to another CUDA context than the device; lend memory of the context \
             that was current when the device was made"
        )));
    }
    let range =
        attribute(address, Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, 0u64).and_then(|start| {
            Ok((start, attribute(address, Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, 0usize)?))
        });
    // Not all memory tells its range.
    let Ok((start, size @ 1..)) = range else { return Ok(()) };
    let left = (start + size as u64).saturating_sub(address);
    if (bytes as u64) > left {
        return Err(Error::usage(format!(
            "{bytes} bytes at {address:#x} were lent and the allocation has {left} from there on; lend what there is"
        )));
    }
    Ok(())
}

/// A property of the memory at `address`; `value` is of its type.
fn attribute<T>(address: u64, which: Attribute, mut value: T) -> Result<T, DriverError> {
    // SAFETY: writes a value of the type that the caller has chosen for this attribute; an address that is none is told.
    unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), which, address) }.result()?;
    Ok(value)
}
