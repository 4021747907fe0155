//! Memory of a GPU, and host memory that it can reach.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUmemPool_attribute, CUmemoryPool, CUstream};

use super::context::Context;
use super::driver::{self, attribute, failed};
use super::foreign;
use super::stream::Stream;
use crate::device::{RawStream, backend};
use crate::{Error, Result};

/// The allocator of a GPU. It has a stream of its own and waits for it after each step, so that memory
/// may be used on every stream from the moment it is there.
pub(super) struct Memory {
    context: Arc<Context>,
    device: CUdevice,
    /// In a context that somebody else owns it is made when it is first needed.
    source: OnceLock<Source>,
    allocations: Mutex<Allocations>,
}

/// Where memory comes from.
#[derive(Clone, Copy)]
struct Source {
    stream: CUstream,
    /// Where the driver keeps freed memory for the next allocation; none where it does not.
    pool: Option<CUmemoryPool>,
}

/// Addresses, each with when it was made, as [`Graphs::now`](super::context::Graphs::now) tells it.
#[derive(Default)]
struct Allocations {
    live: HashMap<u64, u64>,
    /// What is to be freed after the captures under way and the graphs that may use it.
    later: Vec<(u64, u64)>,
}

// SAFETY: streams and pools of the driver may be used from any thread.
unsafe impl Send for Source {}
// SAFETY: as above.
unsafe impl Sync for Source {}

impl Source {
    fn new(context: &Context, device: CUdevice) -> Result<Self> {
        context.bind()?;
        let pooled = attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0;
        // SAFETY: the default pool lives as long as the device, and this attribute is a u64.
        let keep = || unsafe {
            let (pool, mut keep) = (result::device::get_default_mem_pool(device)?, u64::MAX);
            // How much the pool keeps is for the owner to say.
            if context.is_lent() {
                return Ok(pool);
            }
            let which = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, which, (&raw mut keep).cast::<c_void>())?;
            Ok(pool)
        };
        let pool = pooled.then(keep).transpose();
        let pool = pool.map_err(failed("the memory pool of the GPU cannot be set up"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("no stream can be made on the GPU"))?;
        Ok(Self { stream, pool })
    }
}

impl Memory {
    pub(super) fn new(context: Arc<Context>, device: CUdevice) -> Result<Self> {
        let source = OnceLock::from(Source::new(&context, device)?);
        Ok(Self { context, device, source, allocations: Mutex::default() })
    }

    /// Of a context that somebody else owns.
    pub(super) fn lent(context: Arc<Context>, device: CUdevice) -> Self {
        Self { context, device, source: OnceLock::new(), allocations: Mutex::default() }
    }

    fn source(&self) -> Result<Source> {
        // One thread makes it.
        let _alone = self.allocations();
        if let Some(source) = self.source.get() {
            return Ok(*source);
        }
        let source = Source::new(&self.context, self.device)?;
        Ok(*self.source.get_or_init(|| source))
    }

    fn allocations(&self) -> MutexGuard<'_, Allocations> {
        self.allocations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free_later(&self) {
        if self.context.captures.load(Ordering::SeqCst) > 0 {
            return;
        }
        let Some(&Source { stream, pool }) = self.source.get() else { return };
        let later = &mut self.allocations().later;
        let graphs = self.context.graphs();
        if !later.iter().any(|&(_, birth)| graphs.spare(birth)) {
            return;
        }
        self.context.within(|| {
            // Without having waited nothing may be freed. It is tried again with the next allocation: another
            // engine may be capturing. The memory of a failed device ends with the process.
            if result::ctx::synchronize().is_err() {
                return;
            }
            for (address, _) in later.extract_if(.., |&mut (_, birth)| graphs.spare(birth)) {
                // SAFETY: `free` was promised that it is memory of this allocator which nobody uses.
                let _ = unsafe {
                    if pool.is_some() {
                        result::free_async(address, stream)
                    } else {
                        result::free_sync(address)
                    }
                };
            }
        });
    }

    /// Bytes that the driver keeps in the pool for the next allocations.
    fn kept(pool: Option<CUmemoryPool>) -> std::result::Result<usize, DriverError> {
        use CUmemPool_attribute::{
            CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT as RESERVED, CU_MEMPOOL_ATTR_USED_MEM_CURRENT as USED,
        };
        let Some(pool) = pool else { return Ok(0) };
        let count = |which| {
            let mut bytes = 0u64;
            // SAFETY: the pool lives as long as the device, and both attributes are a u64.
            unsafe { result::mem_pool::get_attribute(pool, which, (&raw mut bytes).cast::<c_void>()) }?;
            Ok(bytes)
        };
        Ok(count(RESERVED)?.saturating_sub(count(USED)?) as usize)
    }

    fn settle(stream: CUstream) -> Result<()> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(stream) }.map_err(failed("the GPU has failed"))
    }
}

impl backend::Backend for Memory {
    fn bind(&self) -> Result<()> {
        self.context.bind()
    }

    fn uuid(&self) -> Result<Option<[u8; 16]>> {
        driver::uuid(self.device).map(Some)
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.context.bind()?;
        let Source { stream, pool } = self.source()?;
        self.free_later();
        let what = || format!("{:.1} MiB of GPU memory cannot be had", bytes as f64 / f64::from(1 << 20));
        // SAFETY: `bytes` is not 0; the stream is alive.
        let address = unsafe {
            if pool.is_some() {
                let address = result::malloc_async(stream, bytes).map_err(failed(what()))?;
                Self::settle(stream)?;
                address
            } else {
                result::malloc_sync(bytes).map_err(failed(what()))?
            }
        };
        let birth = self.context.graphs().now();
        self.allocations().live.insert(address, birth);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        let mut allocations = self.allocations();
        if let Some(birth) = allocations.live.remove(&address) {
            allocations.later.push((address, birth));
        }
        drop(allocations);
        self.free_later();
    }

    unsafe fn lend(&self, address: u64, bytes: usize) -> Result<()> {
        self.context.bind()?;
        foreign::check(&self.context, self.device, address, bytes)
    }

    fn free_bytes(&self) -> Result<Option<usize>> {
        self.context.bind()?;
        let Source { stream, pool } = self.source()?;
        self.free_later();
        Self::settle(stream)?;
        let free = result::mem_get_info().and_then(|(free, _)| Ok(free + Self::kept(pool)?));
        free.map(Some).map_err(failed("the free memory of the GPU cannot be read"))
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.context.bind()?;
        let Source { stream, .. } = self.source()?;
        // SAFETY: as the caller promises, here and below.
        unsafe { result::memset_d8_async(address, 0, bytes, stream) }
            .map_err(failed("GPU memory cannot be cleared"))?;
        Self::settle(stream)
    }

    unsafe fn upload(&self, address: u64, host: &[u8]) -> Result<()> {
        let Source { stream, .. } = self.source()?;
        // SAFETY: as the caller promises, and `host` lives until `settle` returns.
        unsafe { self.copy_in(RawStream(stream.cast()), address, host)? };
        Self::settle(stream)
    }

    unsafe fn download(&self, host: &mut [u8], address: u64) -> Result<()> {
        self.context.bind()?;
        if self.context.captures.load(Ordering::SeqCst) > 0 {
            return Err(Error::usage(
                "waiting for the GPU cannot be captured; end all captures before memory is read",
            ));
        }
        result::ctx::synchronize().map_err(failed("the GPU has failed"))?;
        let Source { stream, .. } = self.source()?;
        // SAFETY: as the caller promises, and `host` lives until `settle` returns.
        unsafe { self.copy_out(RawStream(stream.cast()), host, address)? };
        Self::settle(stream)
    }

    unsafe fn copy_in(&self, stream: RawStream, address: u64, host: &[u8]) -> Result<()> {
        self.context.bind()?;
        // SAFETY: as the caller promises.
        unsafe { result::memcpy_htod_async(address, host, stream.0.cast()) }
            .map_err(failed("data cannot be copied to the GPU"))
    }

    unsafe fn copy_out(&self, stream: RawStream, host: &mut [u8], address: u64) -> Result<()> {
        self.context.bind()?;
        // SAFETY: as the caller promises.
        unsafe { result::memcpy_dtoh_async(host, address, stream.0.cast()) }
            .map_err(failed("data cannot be copied from the GPU"))
    }

    unsafe fn copy(&self, stream: RawStream, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.context.bind()?;
        // SAFETY: as the caller promises.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.0.cast()) }
            .map_err(failed("data cannot be copied within the GPU"))
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn backend::HostMemory>> {
        self.context.bind()?;
        let what = || format!("{bytes} bytes of pinned memory cannot be had");
        // Some bytes at least, so that the address is a real one; not write-combined, which the host reads
        // slowly.
        // SAFETY: freed once, in `drop`.
        let memory = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(failed(what()))?;
        let start = NonNull::new(memory.cast::<u8>()).ok_or_else(|| Error::failure(what()))?;
        // SAFETY: `bytes` bytes were just allocated there.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Box::new(PinnedBytes { start, len: bytes, context: self.context.clone() }))
    }

    fn stream(&self) -> Result<Box<dyn backend::Stream>> {
        Ok(Box::new(Stream::new(&self.context)?))
    }

    unsafe fn borrow_stream(&self, raw: RawStream) -> Result<Box<dyn backend::Stream>> {
        // SAFETY: as the caller promises.
        Ok(Box::new(unsafe { Stream::borrow(&self.context, raw.0.cast())? }))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.free_later();
        let Some(source) = self.source.get() else { return };
        self.context.within(|| {
            // SAFETY: made in `Source::new`, and nobody else has it.
            let _ = unsafe { result::stream::destroy(source.stream) };
        });
    }
}

/// Host memory that the GPU can reach.
struct PinnedBytes {
    start: NonNull<u8>,
    len: usize,
    context: Arc<Context>,
}

// SAFETY: plain memory, owned like a Vec.
unsafe impl Send for PinnedBytes {}
// SAFETY: as above.
unsafe impl Sync for PinnedBytes {}

impl backend::HostMemory for PinnedBytes {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for PinnedBytes {
    fn drop(&mut self) {
        self.context.within(|| {
            // SAFETY: allocated by the driver and freed once.
            let _ = unsafe { result::free_host(self.start.as_ptr().cast()) };
        });
    }
}
