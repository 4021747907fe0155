//! The work lists of a batch: memory for them, and what the device found wrong with `cu_seqlens`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::heuristics::Limits;
use super::raw;
use crate::device::{Buffer, Device, Fault, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{check_cu_seqlens, check_len};

/// Work lists in device memory for batches of one size.
pub struct Schedule {
    words: Buffer<i32>,
    fault: Arc<Fault>,
    /// Address of the cu_seqlens that the lists were made from; 0 before.
    made_from: AtomicU64,
    limits: Limits,
    tokens: usize,
    slots: usize,
    longest: usize,
}

impl Schedule {
    /// Memory for the lists of batches of `tokens` rows and `slots` images.
    ///
    /// # Errors
    /// More rows or slots than 2^30, or no room on the device.
    pub fn new(device: &Device, limits: Limits, tokens: usize, slots: usize) -> Result<Self> {
        if tokens > 1 << 30 || slots > 1 << 30 {
            return Err(Error::usage(format!(
                "attention over {tokens} token rows in {slots} image slots: neither may be above 2^30; use a \
                 smaller token budget"
            )));
        }
        Ok(Self {
            // Lists that were never made are empty.
            words: device.zeros(limits.words(tokens, slots))?,
            fault: device.fault(raw::fault)?,
            made_from: AtomicU64::new(0),
            limits,
            tokens,
            slots,
            longest: tokens,
        })
    }

    /// The same with a promise that no image has more than `longest` rows: where such an image is short,
    /// launches for long ones are left out. A batch that breaks it is refused like a bad `cu_seqlens`.
    pub fn with_longest(self, longest: usize) -> Self {
        Self { longest: longest.min(self.tokens), ..self }
    }

    /// Queues the making of the lists. `host` is the host's copy of `cu_seqlens`, where there is one: it is
    /// checked here, and what only the device sees is told by the next synchronisation of a stream, or by
    /// [`check`](Self::check). Until the lists are made anew, the passes over them take this `cu_seqlens` alone,
    /// with these contents.
    ///
    /// # Errors
    /// A length other than slots + 1; a copy that does not begin at 0, decreases, ends beyond the token rows,
    /// or has an image longer than promised.
    pub fn launch(&self, stream: &Stream, cu_seqlens: &Buffer<i32>, host: Option<&[i32]>) -> Result<()> {
        let address = check_len("cu_seqlens", cu_seqlens, &[self.slots + 1])?;
        if let Some(host) = host {
            check_cu_seqlens(host, self.slots, self.tokens)?;
            let lengths = host.windows(2).map(|pair| pair[1] - pair[0]);
            if let Some((image, length)) = lengths.enumerate().find(|&(_, n)| n as usize > self.longest) {
                return Err(Error::usage(format!(
                    "image {image} of cu_seqlens has {length} rows, but the schedule was promised at most {}; \
                     make one for longer images",
                    self.longest
                )));
            }
        }
        let (words, error) = (self.words.ptr(), self.fault.ptr());
        self.made_from.store(address.address(), Ordering::Release);
        let params = self.limits.params(address, words, error, self.slots, self.tokens, self.longest);
        // SAFETY: the lists have the room that the limits ask for, cu_seqlens was checked.
        unsafe { raw::schedule(stream.device().kernels(), stream.raw(), &params) }
    }

    /// Waits for the device and tells what it found.
    ///
    /// # Errors
    /// A `cu_seqlens` was refused on the device at some time since [`new`](Self::new): the results of its batch
    /// are zeros. It is told from then on, whatever came later.
    /// Whatever else went wrong on the device.
    pub fn check(&self) -> Result<()> {
        self.fault.check()
    }

    /// The address of `cu_seqlens`, once it is known to be what the lists were made from.
    pub(super) fn starts(&self, cu_seqlens: &Buffer<i32>) -> Result<Ptr<i32>> {
        let address = check_len("cu_seqlens", cu_seqlens, &[self.slots + 1])?;
        if self.made_from.load(Ordering::Acquire) == address.address() {
            return Ok(address);
        }
        Err(Error::usage(
            "the schedule was not made from this cu_seqlens; launch it with the buffer that the attention is given",
        ))
    }

    /// The limits that decide what is short.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Token rows and image slots of its batches.
    pub fn sizes(&self) -> (usize, usize) {
        (self.tokens, self.slots)
    }

    /// Most rows of an image.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// The lists.
    pub fn words(&self) -> Ptr<i32> {
        self.words.ptr()
    }
}
