//! Open kernels, by numbers that are never used twice.

use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::ptr::without_provenance_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, PoisonError, RwLock};

use bytemuck::Zeroable;

use super::status::{Refusal, Result, Status, cut, guard};
use super::structs::{give, sized, write};
#[cfg(feature = "emulator")]
use crate::device::emulator::EmulatorOptions;
use crate::device::{Device, RawStream, Stream};

/// Open kernels of a device. A pointer to it is a number and no address: one that is closed, or never was open, is
/// refused. It may be used from any number of threads at once.
pub struct Handle {
    _private: [u8; 0],
}

static OPEN: LazyLock<RwLock<HashMap<usize, Device>>> = LazyLock::new(RwLock::default);
static NEXT: AtomicUsize = AtomicUsize::new(1);

/// Opens kernels under a new number, once it is known where to.
///
/// # Safety
/// As for [`give`].
unsafe fn open(kernels: *mut *mut Handle, device: impl FnOnce() -> Result<Device>) -> Result {
    // SAFETY: as the caller promises, here and below.
    unsafe { give("kernels", kernels, std::ptr::null_mut())? };
    let device = device()?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    OPEN.write().unwrap_or_else(PoisonError::into_inner).insert(number, device);
    // SAFETY: as above.
    unsafe { give("kernels", kernels, without_provenance_mut(number)) }
}

fn not_open(kernels: *const Handle) -> Refusal {
    Refusal::invalid(format!(
        "kernels {} are not open: they were closed, or never opened; take what trencadis_open_current gave",
        kernels.addr()
    ))
}

/// The device of open kernels.
pub(super) fn device(kernels: *const Handle) -> Result<Device> {
    let open = OPEN.read().unwrap_or_else(PoisonError::into_inner);
    open.get(&kernels.addr()).cloned().ok_or_else(|| not_open(kernels))
}

/// The caller's stream.
///
/// # Safety
/// `stream` is a live stream of the device, or null for its default stream.
pub(super) unsafe fn borrow(device: &Device, stream: *mut c_void) -> Result<Stream> {
    // SAFETY: as the caller promises.
    Ok(unsafe { device.borrow_stream(RawStream(stream))? })
}

fn is_emulated(device: &Device) -> bool {
    device.info().driver.is_none()
}

/// Opens the kernels for the CUDA context that is current on this thread: launches go to the caller's streams and
/// memory. Code is loaded when a kernel is first launched. Close them before the context is destroyed.
///
/// # Safety
/// `kernels` is where the handle is written; null where there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_open_current(kernels: *mut *mut Handle) -> Status {
    guard(|| {
        let current = || {
            Device::current()
                .map_err(|error| Refusal { status: Status::NoDevice, message: error.to_string() })
        };
        // SAFETY: as the caller promises.
        unsafe { open(kernels, current) }
    })
}

/// Opens the kernels on an emulated GPU of this compute capability, such as 90 for Hopper; 0 is 90. They run on the
/// calling thread, on memory of the host, on the stream null, and are done when a function returns. For tests: it is
/// slow, and unsupported unless the library was built with it.
///
/// # Safety
/// As for `trencadis_open_current`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_open_emulator(
    compute_capability: u32,
    kernels: *mut *mut Handle,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe { open(kernels, || emulator(compute_capability)) })
}

#[cfg(feature = "emulator")]
fn emulator(compute_capability: u32) -> Result<Device> {
    // Shared memory of a block of each generation (CUDA C++ Programming Guide, compute capabilities).
    let (capability, shared) = match compute_capability {
        0 | 90 => ((9, 0), 227),
        80 | 87 => ((8, compute_capability % 10), 163),
        86 | 89 => ((8, compute_capability % 10), 99),
        other => {
            return Err(Refusal::unsupported(format!(
                "the emulator has no GPU of compute capability {other}; choose 80, 86, 87, 89 or 90"
            )));
        }
    };
    Ok(Device::emulator(EmulatorOptions {
        capability,
        shared_per_block: shared << 10,
        ..EmulatorOptions::default()
    }))
}

#[cfg(not(feature = "emulator"))]
fn emulator(_: u32) -> Result<Device> {
    Err(Refusal::unsupported(
        "this library was built without the emulator; build it with tools/c-library --emulator",
    ))
}

/// Loads the code of every kernel for this device, which the first launch of a kernel otherwise does: not while the
/// stream is being captured, where CUDA's default mode forbids it. It takes time and device memory, and once is enough.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_preload(kernels: *const Handle) -> Status {
    guard(|| Ok(device(kernels)?.kernels().preload(|_| true)?))
}

/// Closes kernels. What another thread is queuing with them is queued; what is queued runs on. Closing twice, or closing
/// null, is refused and harms nothing.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_close(kernels: *mut Handle) -> Status {
    guard(|| {
        let closed = OPEN.write().unwrap_or_else(PoisonError::into_inner).remove(&kernels.addr());
        // Dropped here, after the lock is.
        closed.map(drop).ok_or_else(|| not_open(kernels))
    })
}

/// What a device is.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct DeviceInfo {
    /// sizeof(trencadis_device_info), set by the caller.
    pub size: u64,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// Shared memory that a block can have, in bytes.
    pub shared_bytes_per_block: u64,
    /// Compute capability, such as 90 for 9.0.
    pub compute_capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// 1 where the kernels of Hopper are used, 0 where those of every GPU are.
    pub hopper: u32,
    /// 1 where it is the emulator.
    pub emulated: u32,
    /// Its name in UTF-8, cut where it is too long, with a 0 behind it.
    pub name: [c_char; 64],
}
sized!(DeviceInfo, "trencadis_device_info", 104);

/// Tells what the device of open kernels is.
///
/// # Safety
/// `info` is a struct whose `size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_device(kernels: *const Handle, info: *mut DeviceInfo) -> Status {
    guard(|| {
        let device = device(kernels)?;
        let found = device.info();
        let (major, minor) = found.capability;
        let mut told = DeviceInfo {
            memory_bytes: found.memory_bytes as u64,
            shared_bytes_per_block: u64::from(found.shared_per_block),
            compute_capability: 10 * major + minor,
            multiprocessors: found.multiprocessors,
            hopper: found.hopper.into(),
            emulated: is_emulated(&device).into(),
            ..DeviceInfo::zeroed()
        };
        let cut = cut(&found.name, told.name.len() - 1);
        for (to, from) in told.name.iter_mut().zip(found.name.bytes().take(cut)) {
            *to = from.cast_signed();
        }
        // SAFETY: as the caller promises.
        unsafe { write(info, &told) }
    })
}
