//! Products whose rows come from other ranks, or go to them, while they are computed: one launch for all chunks.
//!
//! The batch `[T, ..]` is shared out by rows, as between the layers of a tensor-parallel block. Where the first operand
//! is gathered, chunks of its rows are copied into their places on another stream, and [`Ready`] has a flag for each;
//! where the result is scattered, [`Done`] counts what is written of each chunk, and another stream takes it when it is
//! whole. [`Chunks`] has the order in which a rank meets them, that of the steps of its ring.
//!
//! | layer | forward | backward |
//! |---|---|---|
//! | row-sharded (outputs) | all-gather of x into [`Layout::Nt`] | `dx`: [`Layout::Nn`] into a reduce-scatter |
//! | column-sharded (inputs) | [`Layout::Nt`] into a reduce-scatter | `dx`: all-gather of dy into [`Layout::Nn`] |
//!
//! Flags are words in device memory that streams write and await themselves ([`Stream::write_value32`]): no kernel is
//! needed for that, and a captured graph repeats them. So whoever waits for a flag lowers it: the launch those of
//! [`Ready`], after which all chunks have come; [`Done::take`] its own. What raises a flag again comes after that in
//! some stream's order, as does what overwrites the chunk.
//!
//! The blocks of a launch stay until all chunks have come. They leave as many multiprocessors alone as [`plan`] is told,
//! for transports that copy by kernels, as copies within one GPU may be too; copy engines need none. What raises the flags
//! is queued *before* the launch: CUDA does not see the order that flags make, and where it puts two streams, or two
//! branches of a graph, one after the other, a launch that waits must not be the first. A graph's branches are put in
//! order by the driver; whether that is a good one is yet to be seen on a GPU.
//!
//! Every row is summed as [`Gemm`] sums it with the same tile: results have the same bits.

pub mod raw;

mod chunks;
mod flags;
mod plan;

use crate::device::{DeviceInfo, Kernels, Ptr, RawStream, Stream};
use crate::{Error, Result};

use super::checked::refuse;
use super::tiles::MOST_CHUNKS;
use super::{Epilogue, Gemm, Kind, Layout, Vector};
use raw::GemmShards;

pub use chunks::Chunks;
pub use flags::{Done, Ready};
pub use plan::{ShardedPlan, plan, plans};

/// A product whose rows come or go in chunks.
#[derive(Clone, Copy)]
pub struct ShardedGemm<'a> {
    /// The whole of it, [`Layout::Nt`] or [`Layout::Nn`].
    pub gemm: Gemm<'a>,
    /// Chunks of its rows.
    pub chunks: &'a Chunks,
    /// Flags of chunks of the first operand that are awaited; `None`: all are there. Of chunks without a live row they
    /// are awaited last.
    pub ready: Option<&'a Ready>,
    /// Counts of what is written of the result.
    pub done: Option<&'a Done>,
}

impl ShardedGemm<'_> {
    /// The plan for this product on a device, `reserve` of whose multiprocessors are left alone.
    ///
    /// # Errors
    /// A device on which no tile fits, or that has no multiprocessor left.
    pub fn plan(&self, epilogue: &Epilogue<'_>, device: &DeviceInfo, reserve: u32) -> Result<ShardedPlan> {
        plan(self.gemm.shape, self.chunks, epilogue.finish(), device, reserve).ok_or_else(|| {
            Error::usage(format!(
                "gemm: {} has {} multiprocessors, of which {reserve} are reserved, and {} bytes of shared memory for a \
                 block; that leaves no room for a product in chunks, so reserve fewer",
                device.name, device.multiprocessors, device.shared_per_block
            ))
        })
    }

    /// Verifies everything that can be verified without reading device memory.
    ///
    /// # Errors
    /// The first thing that is not as the fields say; an epilogue other than [`Epilogue::Store`] and [`Epilogue::Sum`].
    pub fn check(&self, epilogue: &Epilogue<'_>, plan: &ShardedPlan, device: &DeviceInfo) -> Result<()> {
        let (shape, chunks, tile) = (self.gemm.shape, self.chunks, plan.tile);
        if shape.layout == Layout::Tn || epilogue.kind() == Kind::GeluGrad {
            return refuse(format_args!(
                "a product in chunks is NT or NN, and stored or summed; compute {:?} with {:?} from whole operands",
                shape.layout,
                epilogue.kind()
            ));
        }
        if matches!(epilogue, Epilogue::Sum(sum) if !sum.squares.is_none()) {
            return refuse(format_args!("a product in chunks leaves no squares of its sums; leave them out"));
        }
        if !tile.has_sharded(shape.layout, epilogue.kind()) {
            return refuse(format_args!(
                "there is no kernel of tiles of {}x{}x{} for rows in chunks; ask for a plan",
                tile.m, tile.n, tile.k
            ));
        }
        if shape.m != chunks.batch() {
            return refuse(format_args!(
                "m is {} and there are {} chunks of {} rows; it must be their product",
                shape.m,
                chunks.len(),
                chunks.rows()
            ));
        }
        for (name, of) in [("ready", self.ready.map(Ready::chunks)), ("done", self.done.map(Done::chunks))] {
            if of.is_some_and(|of| of != chunks.len()) {
                return refuse(format_args!(
                    "{name} is made for {} chunks and there are {}; make it for these",
                    of.unwrap_or(0),
                    chunks.len()
                ));
            }
        }
        let clustered = tile.hopper.is_some();
        if plan.blocks == 0 || plan.blocks > 65_535 || (clustered && !plan.blocks.is_multiple_of(2)) {
            return refuse(format_args!(
                "the plan has {} blocks; it must have 1 to 65535, and on Hopper an even number",
                plan.blocks
            ));
        }
        if plan.tiles(chunks, shape.n).saturating_mul(chunks.len()) > (i32::MAX / 2) as usize {
            return refuse(format_args!("the result has too many tiles; it may have {}", i32::MAX / 2));
        }
        self.gemm.check(epilogue, &plan.whole(), &Vector::none(), device)
    }

    /// Queues the product on a stream of `kernels`' device that any engine has made.
    ///
    /// # Errors
    /// As for [`check`](Self::check); or the device refuses a launch.
    ///
    /// # Safety
    /// `stream` is a live stream of the device.
    pub unsafe fn launch_on(
        &self,
        kernels: &Kernels,
        stream: RawStream,
        epilogue: &Epilogue<'_>,
        plan: &ShardedPlan,
    ) -> Result<()> {
        self.check(epilogue, plan, kernels.info())?;
        let mut order = [0; MOST_CHUNKS];
        for (place, &chunk) in order.iter_mut().zip(self.chunks.order()) {
            *place = chunk as i32;
        }
        let shards = GemmShards {
            ready: self.ready.map_or(Ptr::null(), Ready::ptr),
            ended: self.ready.map_or(Ptr::null(), Ready::ended),
            done: self.done.map_or(Ptr::null(), Done::ptr),
            rows: self.chunks.rows() as i32,
            chunks: self.chunks.len() as i32,
            order,
        };
        let params = self.gemm.params(epilogue, &plan.whole(), Ptr::null());
        let which = (self.gemm.shape.layout, epilogue.kind());
        // SAFETY: every matrix, vector and flag lies in memory of sufficient length, as `check` has found; whoever made
        // them answers for that memory, the caller for the stream.
        unsafe { raw::gemm_sharded(kernels, stream, which, plan, &params, &shards, self.gemm.dependent) }
    }

    /// Queues the product.
    ///
    /// # Errors
    /// As for [`check`](Self::check); or the device refuses a launch.
    pub fn launch(&self, stream: &Stream, epilogue: &Epilogue<'_>, plan: &ShardedPlan) -> Result<()> {
        // SAFETY: `stream` lives, and the kernels are those of its device.
        unsafe { self.launch_on(stream.device().kernels(), stream.raw(), epilogue, plan) }
    }
}
