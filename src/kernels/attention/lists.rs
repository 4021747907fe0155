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
    found: Found,
    /// Address of the cu_seqlens that the lists were made from; 0 before.
    made_from: AtomicU64,
    limits: Limits,
    tokens: usize,
    slots: usize,
    longest: usize,
}

/// Where the device tells what is wrong with a `cu_seqlens`.
enum Found {
    /// Every synchronisation of a stream tells it.
    Own(Arc<Fault>),
    /// A word of the caller's.
    Lent(Buffer<i32>),
}

fn check_sizes(tokens: usize, slots: usize) -> Result<()> {
    if tokens > 1 << 30 || slots > 1 << 30 {
        return Err(Error::usage(format!(
            "attention over {tokens} token rows in {slots} image slots: neither may be above 2^30; use a \
             smaller token budget"
        )));
    }
    Ok(())
}

impl Schedule {
    /// Memory for the lists of batches of `tokens` rows and `slots` images.
    ///
    /// # Errors
    /// More rows or slots than 2^30, or no room on the device.
    pub fn new(device: &Device, limits: Limits, tokens: usize, slots: usize) -> Result<Self> {
        check_sizes(tokens, slots)?;
        // Lists that were never made are empty.
        let words = device.zeros(limits.words(tokens, slots))?;
        Ok(Self::of(words, Found::Own(device.fault(raw::fault)?), limits, tokens, slots))
    }

    /// Words of memory that [`in_memory`](Self::in_memory) takes for batches of `tokens` rows and `slots` images.
    ///
    /// # Errors
    /// More rows or slots than 2^30.
    pub fn words_needed(limits: Limits, tokens: usize, slots: usize) -> Result<usize> {
        check_sizes(tokens, slots)?;
        Ok(limits.words(tokens, slots) + 1)
    }

    /// Lists in memory of the caller, of at least [`words_needed`](Self::words_needed): nothing is allocated. The last
    /// of these words is where the device tells of a bad `cu_seqlens` ([`raw::fault`] explains it); it must be 0 before
    /// the lists are first made, the others need not be. Only [`check`](Self::check) reads it.
    ///
    /// # Errors
    /// More rows or slots than 2^30, too little memory.
    pub fn in_memory(words: Buffer<i32>, limits: Limits, tokens: usize, slots: usize) -> Result<Self> {
        let needed = Self::words_needed(limits, tokens, slots)?;
        if words.len() < needed {
            return Err(Error::usage(format!(
                "the schedule of {tokens} token rows in {slots} image slots needs {needed} words and was given {}; ask \
                 words_needed before",
                words.len()
            )));
        }
        let last = (needed - 1) * size_of::<i32>()..needed * size_of::<i32>();
        let found = Found::Lent(words.view(last)?);
        Ok(Self::of(words, found, limits, tokens, slots))
    }

    /// The same lists, made earlier by another value over the same memory: passes follow them as they are.
    ///
    /// # Safety
    /// They were made with the same limits, sizes and [`longest`](Self::with_longest), from this `cu_seqlens`, with the
    /// contents that it has.
    pub unsafe fn already_made(self, cu_seqlens: &Buffer<i32>) -> Self {
        Self { made_from: AtomicU64::new(cu_seqlens.ptr().address()), ..self }
    }

    fn of(words: Buffer<i32>, found: Found, limits: Limits, tokens: usize, slots: usize) -> Self {
        Self { words, found, made_from: AtomicU64::new(0), limits, tokens, slots, longest: tokens }
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
        let error = match &self.found {
            Found::Own(fault) => fault.ptr(),
            Found::Lent(word) => word.ptr(),
        };
        let words = self.words.ptr();
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
        match &self.found {
            Found::Own(fault) => fault.check(),
            Found::Lent(word) => raw::fault(word.download()?.first().copied().unwrap_or(0)),
        }
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
