//! Rings of a tensor axis on devices: chunks of rows that move while one launch multiplies them.
//!
//! A batch of `[T, ..]` rows is shared out evenly, so that the chunk of rank r is rows `r·T/k` to `(r + 1)·T/k`.
//!
//! | | the stream of the product | the stream of the ring |
//! |---|---|---|
//! | gather | one launch, whose tiles wait for the flag of their chunk | own chunk to its place, flag; then chunk after chunk from the rank behind, and its flag |
//! | scatter | one launch, which counts what it has written of each chunk | waits until a chunk is whole, adds the sum that has come from the rank behind, sends it on |
//!
//! The order of the chunks is that of [`ring`](crate::parallel::ring), so each has a step of the ring's to come or to
//! go. A sum is rounded to bf16 on every rank that it passes, in the order of the ring. Launches that wait hold
//! multiprocessors: so each rank has a GPU of its own, and they leave some alone for what moves the chunks.

use half::bf16;

use super::{DeviceGroup, DeviceTransport, Exchange};
use crate::autograd::Shard;
use crate::device::{Buffer, Device, Stream};
use crate::error::Result;
use crate::kernels::elementwise::{Add, Addend};
use crate::kernels::gemm::sharded::{Chunks, Done, Ready};
use crate::parallel::ring::{self, Direction, Step};

/// Most thread blocks that NCCL takes for an operation beside products that wait. Not measured.
pub const BLOCKS: u32 = 6;
/// Multiprocessors that such products leave alone: for an operation of the ring and one of the data axis, so that neither
/// keeps the other from the GPU while ranks wait for both in different orders, and for the sums. Not measured.
const RESERVED: u32 = 2 * BLOCKS + 4;

/// One rank's end of the rings over chunks of a size.
pub struct DeviceRing {
    gather: Chunks,
    scatter: Chunks,
    gather_steps: Vec<Step>,
    scatter_steps: Vec<Step>,
    rank: usize,
    ready: Ready,
    done: Done,
    communication: Stream,
}

/// What a scatter works on.
pub struct Scatter<'a> {
    /// `[T, width]`: this rank's summands, and changed.
    pub summands: &'a Buffer<bf16>,
    /// `[T/k, width]`, for sums that come.
    pub arriving: &'a Buffer<bf16>,
    /// `[T/k, width]`: this rank's rows of the sum.
    pub out: &'a Buffer<bf16>,
    /// Columns.
    pub width: usize,
    /// What the launch counts up to for a chunk, see
    /// [`ShardedPlan::writers`](crate::kernels::gemm::sharded::ShardedPlan::writers).
    pub writers: u32,
}

impl DeviceRing {
    /// Whether the ranks of `group` can overlap: threads that share a device would wait for one another.
    pub fn fits(group: &DeviceGroup) -> bool {
        group.size() > 1 && group.transport() == DeviceTransport::Nccl
    }

    /// For `shard` of a batch, of which every rank has `rows` rows.
    ///
    /// # Errors
    /// More ranks than a launch has flags for; no room on the device.
    pub fn new(device: &Device, shard: Shard, rows: usize) -> Result<Self> {
        let Shard { rank, size } = shard;
        let gather_steps = ring::all_gather(rank, size, Direction::Right);
        let scatter_steps = ring::reduce_scatter(rank, size, Direction::Right);
        let order = |steps: &[Step]| steps.iter().map(|step| step.multiply).collect();
        Ok(Self {
            gather: Chunks::new(rows, order(&gather_steps))?,
            scatter: Chunks::new(rows, order(&scatter_steps))?,
            ready: Ready::new(device, size)?,
            done: Done::new(device, size)?,
            communication: device.stream()?,
            gather_steps,
            scatter_steps,
            rank,
        })
    }

    /// Chunks in the order in which a gather brings them.
    pub fn gathered(&self) -> &Chunks {
        &self.gather
    }

    /// Chunks in the order in which a scatter takes them.
    pub fn scattered(&self) -> &Chunks {
        &self.scatter
    }

    /// Multiprocessors that products leave alone.
    pub fn reserved(&self) -> u32 {
        RESERVED
    }

    /// Brings the rows of all ranks to `all`, `[T, ..]`, from `own`, `[T/k, ..]`, while what `product` queues on
    /// `stream` waits for the flags that it is given.
    ///
    /// # Errors
    /// Those of [`DeviceGroup::exchange`] and of `product`.
    pub fn gather(
        &self,
        group: &DeviceGroup,
        stream: &Stream,
        all: &Buffer<bf16>,
        own: &Buffer<bf16>,
        product: impl FnOnce(&Ready) -> Result<()>,
    ) -> Result<()> {
        let chunk = |chunk: usize| chunk_of(all, own.len(), chunk);
        let ring = &self.communication;
        ring.wait(&stream.record()?)?;
        chunk(self.rank)?.copy_from(ring, own)?;
        self.ready.raise(ring, self.rank)?;
        for step in &self.gather_steps {
            if let (Some(send), Some(receive)) = (step.send, step.receive) {
                let (send, receive_into) = (chunk(send)?, chunk(receive)?);
                let direction = Direction::Right;
                group.exchange(ring, &[Exchange { direction, send: &send, receive: &receive_into }])?;
                self.ready.raise(ring, receive)?;
            }
        }
        product(&self.ready)?;
        stream.wait(&ring.record()?)
    }

    /// Sums over the ranks what `product` writes to the summands, and counts where it is told, on `stream`.
    ///
    /// # Errors
    /// Those of [`DeviceGroup::exchange`] and of `product`.
    pub fn scatter(
        &self,
        group: &DeviceGroup,
        stream: &Stream,
        scatter: &Scatter<'_>,
        product: impl FnOnce(&Done) -> Result<()>,
    ) -> Result<()> {
        let Scatter { summands, arriving, out, width, writers } = *scatter;
        let chunk = |chunk: usize| chunk_of(summands, out.len(), chunk);
        let ring = &self.communication;
        ring.wait(&stream.record()?)?;
        product(&self.done)?;
        let sum = Add { rows: out.len() / width.max(1), width };
        for step in &self.scatter_steps {
            let own = chunk(step.multiply)?;
            self.done.take(ring, step.multiply, writers)?;
            if step.receive.is_some() {
                sum.launch(ring, None, &own, Addend::Rows(arriving), None)?;
            }
            match step.send {
                Some(_) => {
                    let direction = Direction::Right;
                    group.exchange(ring, &[Exchange { direction, send: &own, receive: arriving }])?;
                }
                None => out.copy_from(ring, &own)?,
            }
        }
        stream.wait(&ring.record()?)
    }
}

/// Rows of one chunk of `len` elements.
fn chunk_of(all: &Buffer<bf16>, len: usize, chunk: usize) -> Result<Buffer<bf16>> {
    let bytes = len * size_of::<bf16>();
    all.view(chunk * bytes..(chunk + 1) * bytes)
}
