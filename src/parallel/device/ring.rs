//! Rings of a tensor axis on devices: chunks of rows that move while one launch multiplies them.
//!
//! A batch of `[T, ..]` rows is shared out evenly, so that the chunk of rank r is rows `r·T/k` to `(r + 1)·T/k`.
//!
//! | | the stream of the product | the stream of the ring |
//! |---|---|---|
//! | gather | one launch, whose tiles wait for the flag of their chunk | own chunk to its place, flag; then chunk after chunk from the rank behind, and its flag |
//! | scatter | one launch, which counts what it has written of each chunk | waits until a chunk is whole, adds the sum that has come from the rank behind, sends it on |
//!
//! With two directions each chunk is two, the upper half of its rows goes right and the lower left. Behind a switch, where
//! a ring in one direction already uses both ways of each link, that gains nothing; where GPUs are wired to their
//! neighbours it halves the time.
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
use crate::parallel::ring::{self, Direction, Rings, Step};

/// Most thread blocks that NCCL takes for an operation beside products that wait, a power of two as its channels are. Not
/// measured.
pub const BLOCKS: u32 = 8;
/// Multiprocessors that such products leave alone: for an operation of the ring and one of the data axis, so that neither
/// keeps the other from the GPU while ranks wait for both in different orders, and for the sums. Not measured.
const RESERVED: u32 = 2 * BLOCKS + 4;

/// One direction.
struct Lane {
    direction: Direction,
    gather: Vec<Step>,
    scatter: Vec<Step>,
}

/// One rank's end of the rings over chunks of a size.
pub struct DeviceRing {
    gather: Chunks,
    scatter: Chunks,
    lanes: Vec<Lane>,
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
    /// The rings in which the ranks of `group` can overlap; none for threads that share a device, which would wait for one
    /// another.
    pub fn of(group: &DeviceGroup) -> Option<Rings> {
        (group.size() > 1 && group.transport() == DeviceTransport::Nccl).then_some(Rings::One)
    }

    /// For `shard` of a batch, of which every rank has `rows` rows.
    ///
    /// # Errors
    /// More ranks than a launch has flags for, an odd number of rows for two directions; no room on the device.
    pub fn new(device: &Device, shard: Shard, rows: usize, rings: Rings) -> Result<Self> {
        let Shard { rank, size } = shard;
        let lane = |(direction, _)| Lane {
            direction,
            gather: ring::all_gather(rank, size, direction),
            scatter: ring::reduce_scatter(rank, size, direction),
        };
        let lanes: Vec<Lane> = rings.parts(rows).into_iter().map(lane).collect();
        let order = |steps: fn(&Lane) -> &Vec<Step>| -> Vec<Vec<usize>> {
            lanes.iter().map(|lane| steps(lane).iter().map(|step| step.multiply).collect()).collect()
        };
        let flags = size * lanes.len();
        Ok(Self {
            gather: Chunks::of_rings(rows, &order(|lane| &lane.gather))?,
            scatter: Chunks::of_rings(rows, &order(|lane| &lane.scatter))?,
            ready: Ready::new(device, flags)?,
            done: Done::new(device, flags)?,
            communication: device.stream()?,
            lanes,
            rank,
        })
    }

    /// The chunk of rank `rank` that goes in direction `way`.
    fn chunk(&self, rank: usize, way: usize) -> usize {
        self.lanes.len() * rank + way
    }

    /// What each direction sends, and where it receives.
    fn exchange(&self, group: &DeviceGroup, legs: &[(Buffer<bf16>, Buffer<bf16>)]) -> Result<()> {
        let exchange =
            |(lane, (send, receive)): (&Lane, _)| Exchange { direction: lane.direction, send, receive };
        let legs = legs.iter().map(|(send, receive)| (send, receive));
        let exchanges: Vec<_> = self.lanes.iter().zip(legs).map(exchange).collect();
        group.exchange(&self.communication, &exchanges)
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
        let len = own.len() / self.lanes.len();
        let ring = &self.communication;
        ring.wait(&stream.record()?)?;
        chunk_of(all, own.len(), self.rank)?.copy_from(ring, own)?;
        (0..self.lanes.len()).try_for_each(|way| self.ready.raise(ring, self.chunk(self.rank, way)))?;
        for step in 0..self.lanes[0].gather.len() {
            let (mut legs, mut come) = (Vec::new(), Vec::new());
            for (way, lane) in self.lanes.iter().enumerate() {
                if let Step { send: Some(send), receive: Some(receive), .. } = lane.gather[step] {
                    let [send, receive] = [send, receive].map(|rank| self.chunk(rank, way));
                    legs.push((chunk_of(all, len, send)?, chunk_of(all, len, receive)?));
                    come.push(receive);
                }
            }
            if !legs.is_empty() {
                self.exchange(group, &legs)?;
                come.into_iter().try_for_each(|chunk| self.ready.raise(ring, chunk))?;
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
        let len = out.len() / self.lanes.len();
        let ring = &self.communication;
        ring.wait(&stream.record()?)?;
        product(&self.done)?;
        let sum = Add { rows: len / width.max(1), width };
        for step in 0..self.lanes[0].scatter.len() {
            let mut legs = Vec::new();
            for (way, lane) in self.lanes.iter().enumerate() {
                let Step { multiply, send, receive } = lane.scatter[step];
                let chunk = self.chunk(multiply, way);
                let (own, arriving) = (chunk_of(summands, len, chunk)?, chunk_of(arriving, len, way)?);
                self.done.take(ring, chunk, writers)?;
                if receive.is_some() {
                    sum.launch(ring, None, &own, Addend::Rows(&arriving), None)?;
                }
                match send {
                    Some(_) => legs.push((own, arriving)),
                    None => chunk_of(out, len, way)?.copy_from(ring, &own)?,
                }
            }
            if !legs.is_empty() {
                self.exchange(group, &legs)?;
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
