//! Words in device memory by which streams and a launch tell each other of chunks.

use super::super::checked::refuse;
use crate::Result;
use crate::device::{Buffer, Device, Ptr, Stream};

/// A flag for each chunk that comes. It is raised by whoever has brought the chunk, and lowered by the launch that has
/// waited for it, at whose end all are low.
pub struct Ready {
    /// Flags, and the number of blocks of the launch that have ended.
    words: Buffer<i32>,
}

impl Ready {
    /// All low.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(device: &Device, chunks: usize) -> Result<Self> {
        Ok(Self { words: device.zeros(chunks + 1)? })
    }

    /// How many chunks there are flags for.
    pub fn chunks(&self) -> usize {
        self.words.len() - 1
    }

    /// Raises the flag of a chunk once everything queued on `stream` so far has run. After the launch before it with
    /// these flags has ended, in the order of streams and events.
    ///
    /// # Errors
    /// No such chunk, a stream of another device, a device that has failed.
    pub fn raise(&self, stream: &Stream, chunk: usize) -> Result<()> {
        if chunk >= self.chunks() {
            return refuse(format_args!(
                "there is no chunk {chunk}, they are {}; raise the flag of one",
                self.chunks()
            ));
        }
        stream.write_value32(&self.words, chunk, 1)
    }

    /// The flags.
    pub fn ptr(&self) -> Ptr<i32> {
        self.words.ptr()
    }

    /// Where the launch counts blocks that have ended.
    pub fn ended(&self) -> Ptr<i32> {
        self.words.ptr().offset(self.chunks())
    }
}

/// What is written of each chunk that goes: how many warps have written their part of a tile.
pub struct Done {
    counts: Buffer<i32>,
}

impl Done {
    /// Nothing yet.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(device: &Device, chunks: usize) -> Result<Self> {
        Ok(Self { counts: device.zeros(chunks)? })
    }

    /// How many chunks it counts for.
    pub fn chunks(&self) -> usize {
        self.counts.len()
    }

    /// Lets what is queued on `stream` from now on wait until a chunk is whole, that is `writers` have counted
    /// ([`ShardedPlan::writers`](super::ShardedPlan::writers)), and then begins anew. Before the next launch that counts
    /// here, in the order of streams and events.
    ///
    /// # Errors
    /// No such chunk, a stream of another device, a device that has failed.
    pub fn take(&self, stream: &Stream, chunk: usize, writers: u32) -> Result<()> {
        stream.wait_value32(&self.counts, chunk, writers as i32)?;
        stream.write_value32(&self.counts, chunk, 0)
    }

    /// The counts.
    pub fn ptr(&self) -> Ptr<i32> {
        self.counts.ptr()
    }
}
