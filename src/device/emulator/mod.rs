//! The emulator: runs the kernels of `kernels/` on the host, so that they are tested where there is no GPU.
//!
//! The very `.cu` files that nvcc compiles are compiled by the C++ compiler too, over the headers of
//! `kernels/emulator` instead of PTX and with the same names. A launch runs to its end on the thread that
//! calls it; launches on several threads do not disturb one another.
//!
//! # The model
//!
//! Every CUDA thread is a coroutine with a stack of its own. It runs until it meets a *collective* and then
//! gives way to the next; the last lane of a warp to come to a shuffle, vote, `ldmatrix` or `mma` does the
//! work for all 32. A barrier is met by whole warps. Which block, warp and lane goes first follows
//! [`EmulatorOptions::seed`]; at most [`EmulatorOptions::resident_blocks`] blocks are under way at a time. A
//! thread that loads the same address again by `load_coherent` is taken to be spinning and lets the others
//! run first.
//!
//! `cp.async` happens at its issue, at the wait that completes it, or somewhere in between: see
//! [`CopyPolicy`]. Until then its destination may be neither read nor written. Shared memory, new
//! allocations and destinations of copies under way begin as NaN.
//!
//! What other streams have queued goes on [beside](Beside) a launch, by the same policies: copies land and words change
//! between two steps of its warps as soon as they may, when no thread can go on without them, or in between.
//!
//! # Hopper
//!
//! The blocks of a cluster ([`Launch::cluster`]) run together and share one set of clocks. Everything below follows
//! the same policies and orders.
//!
//! * An *mbarrier* has a phase, the arrivals that are missing and the bytes that are. A thread that waits for one is
//!   switched off until the phase ends, and then knows what those knew that arrived.
//! * A *bulk copy* into shared memory lands at its issue, when no thread can go on without it, or in between, and takes
//!   its bytes, those outside the tensor included, off the mbarrier. What it wrote is there for those who have waited
//!   for that mbarrier. A copy out of shared memory reads at its issue; what it wrote shows between then and
//!   `bulk_wait` or the end of its thread.
//! * *wgmma* is met by the four warps of a warpgroup. Its operands count as being read, and its accumulator is NaN or
//!   has the result, until `wgmma_wait`.
//! * The *asynchronous proxy*, that is copies and wgmma, sees what threads wrote if a `fence_proxy_async` lies in
//!   between: of the writer, and then a barrier, or of one who has come after a barrier.
//! * *Registers* that warpgroups shift come out of what the launch bounds leave to a block.
//! * `elect` chooses lane 0 with seed 0 only.
//!
//! # What is reported
//!
//! A [`Fault`] ends the launch:
//!
//! * *bounds and alignment* of every access to shared and global memory, use of freed memory, null pointers;
//! * *reads of shared memory that nobody wrote* in this block;
//! * *races on shared memory*: each warp has a clock that barriers join to those of the other warps, so that
//!   two accesses that no barrier orders are found in whichever order they ran. Lanes of one warp are
//!   ordered by `warp_sync` and barriers alone: shuffles, votes, `ldmatrix` and `mma` meet, but promise
//!   nothing about memory. They may write the same value to the same place. `ldmatrix` reads for the whole warp: what a lane stored before needs a
//!   `warp_sync` even if that lane names the row;
//! * *asynchronous copies* read or overwritten before their wait, read by other threads before a barrier,
//!   or whose source changed under way;
//! * *mbarriers* used before their initialisation is known or shown to copies and peers, with one arrival too many,
//!   left behind by a phase that nobody saw, or written over;
//! * *the asynchronous proxy* reading or overwriting what was written without a fence; shared memory that is
//!   overwritten while a copy or a wgmma reads it; blocks that end before their copies have;
//! * *wgmma* without `wgmma_fence`, accumulators that are written before the wait or not named to it, descriptors that
//!   leave shared memory or begin inside the swizzle's pattern;
//! * *peers* in a cluster that reach into a block which may have ended, or whose writes they have no barrier for;
//! * *divergence*: lanes of a warp at different collectives (by kind and by source line), lanes that ended
//!   while others wait, warps of a warpgroup at different places, barriers with different numbers of threads;
//! * *deadlock*: when nothing can go on, who waits where, which arrivals and bytes an mbarrier is short of, which
//!   flags are polled in vain, by place and value, and what other streams wait for;
//! * *launches in each other's way*: a thread of a [dependent](Launch::dependent) launch that touches global memory, or
//!   ends, before it has waited for the launch before, or has met at a barrier of the block a thread that had. A thread that
//!   learns of it in another way, from its warp or an mbarrier, is reported as well;
//! * *blocks in each other's way*: different values written to the same global memory, or a plain load of
//!   what another block wrote, unless an atomic or a coherent load told the block of it.
//!
//! Results that depend on policy or order are found by comparing launches of different options.
//!
//! # What is not emulated
//!
//! * Operations of streams that another host thread queues beside a launch, or that are queued after it.
//! * Weak memory ordering: memory is sequentially consistent here, a missing fence goes unseen.
//! * Time, caches and bank conflicts, registers and their spills.
//! * Rounding of the tensor cores: a product of 16 k is summed in order in f32 and then added. Approximate
//!   functions are rounded correctly.
//! * A thread that spins without a collective or `load_coherent` hangs the launch.
//! * Shared memory is followed by two bytes: elements of one byte do not compile.
//! * Fences between proxies for global memory; a fragment of a that is overwritten while a wgmma reads it from
//!   registers; an accumulator that is read before the wait, unless the result shows it.
//! * A tensor map whose swizzle is wider than its boxes, base offsets in descriptors, waiting for the mbarrier of a peer.
//!
//! # Reading a fault
//!
//! ```text
//! kernel gemm_nt_bf16, block (0, 2, 0), thread 37, kernels/common/tile.cuh:112: race: writes byte 512 of
//! shared memory, which lanes of warp 0 read with no barrier in between
//! ```
//!
//! names the access that noticed it, by block, thread (its warp is the number divided by 32) and source
//! line. Bytes of shared memory count from `shared_base()`. The line is where the wrapper is called: in a
//! helper, not where the helper is.
//!
//! Set `races` to false in [`EmulatorOptions`] to see what a race does to the result.

mod beside;
mod fault;
mod kernels;
mod machine;
mod memory;
mod schedule;
mod tensor_map;

pub use beside::{Beside, Nothing};
pub use fault::Fault;

use bytemuck::{Pod, Zeroable};
use machine::{Index, LaunchArguments, Range};

use super::{Launch, TensorBoxes, TensorMap};

/// What every GPU with clusters takes.
const MOST_BLOCKS_OF_A_CLUSTER: u32 = 8;

/// Of the 8192 numbers that the shadow of shared memory has, the others are for warpgroups and mbarriers.
const MOST_THREADS_OF_A_CLUSTER: u32 = 4096;

/// Parameters lie as they do on a GPU: aligned for tensor maps.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Line([u8; 64]);

/// Bytes of the parameter struct of the kernel `name`, where there is such a kernel.
pub fn parameter_bytes(name: &str) -> Option<usize> {
    kernels::find(name).map(|kernel| kernel.params_bytes)
}

/// When an asynchronous operation (`cp.async`, a bulk copy, `wgmma`) happens between its issue and the wait for it, and
/// what goes on [beside](Beside) a launch.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyPolicy {
    /// As early as the hardware may.
    AtIssue = 0,
    /// As late as it may.
    #[default]
    AtWait = 1,
    /// Now early, now late, drawn from the seed.
    Random = 2,
}

/// What an emulator is like, and in which order it does things.
#[derive(Clone, Debug)]
pub struct EmulatorOptions {
    /// Permutes the order of blocks, warps and lanes, and draws for [`CopyPolicy::Random`]; 0 is the natural
    /// order.
    pub seed: u64,
    /// When asynchronous operations happen.
    pub policy: CopyPolicy,
    /// Blocks that run at a time, or else one cluster; the others start when one ends. All of a launch whose blocks are
    /// to be resident.
    pub resident_blocks: usize,
    /// Most bytes of shared memory that a block may have.
    pub shared_per_block: u32,
    /// Compute capability that the device reports.
    pub capability: (u32, u32),
    /// Whether races on shared memory are looked for. Reads of what nobody wrote and of copies under way are
    /// reported either way.
    pub races: bool,
    /// Whether blocks of a launch that get in each other's way in global memory are reported: that write
    /// different values to the same place, or load what another wrote without having been told of it.
    pub global_races: bool,
    /// Whether the launches of a [`Device`](crate::device::Device) with this emulator are
    /// [dependent](Launch::dependent), as `TRENCADIS_DEPENDENT=1` makes them on a GPU.
    pub dependent: bool,
}

impl Default for EmulatorOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            policy: CopyPolicy::default(),
            resident_blocks: 4,
            shared_per_block: 227 << 10,
            capability: (9, 0),
            races: true,
            global_races: true,
            dependent: false,
        }
    }
}

/// An emulated device: its global memory, and how it runs kernels.
#[derive(Default)]
pub struct Emulator {
    options: EmulatorOptions,
    memory: memory::Memory,
}

impl Emulator {
    /// A device without allocations.
    pub fn new(options: EmulatorOptions) -> Self {
        Self { options, memory: memory::Memory::default() }
    }

    /// What it was made with.
    pub fn options(&self) -> &EmulatorOptions {
        &self.options
    }

    /// Allocates `bytes` bytes of global memory, all ones (NaN), and returns their address, which is valid on
    /// the host too. 256-byte aligned.
    pub fn alloc(&self, bytes: usize) -> u64 {
        self.memory.alloc(bytes)
    }

    /// Bytes of the allocation at `address`; 0 where there is none.
    pub fn bytes_at(&self, address: u64) -> usize {
        self.memory.bytes_at(address)
    }

    /// Frees an allocation. An address that is none is ignored.
    pub fn free(&self, address: u64) {
        self.memory.free(address);
    }

    /// Lets launches use `bytes` bytes at `address` that somebody else owns, until they are
    /// [given back](Self::give_back).
    ///
    /// # Safety
    /// They stay there until then.
    pub unsafe fn lend(&self, address: u64, bytes: usize) {
        self.memory.lend(address, bytes);
    }

    /// Ends what [`lend`](Self::lend) began, once for each. Gives the parts of the range that nothing else covers: first
    /// and one past the last address of each.
    pub fn give_back(&self, address: u64, bytes: usize) -> Vec<(u64, u64)> {
        self.memory.give_back(address, bytes)
    }

    /// The tensor map of boxes, which are taken to be such as the hardware copies
    /// ([`Kernels::tensor_map`](super::Kernels::tensor_map) refuses others).
    pub fn tensor_map(&self, boxes: &TensorBoxes) -> TensorMap {
        tensor_map::encode(boxes)
    }

    /// Runs the kernel `name` to its end on the calling thread.
    ///
    /// # Safety
    /// `params` holds the kernel's parameter struct. Pointers in it are checked where the kernel uses them;
    /// no other thread may use the memory they point to meanwhile.
    ///
    /// # Errors
    /// A launch that does not fit the kernel or the device, and whatever the kernel does wrong.
    pub unsafe fn launch(&self, name: &str, launch: Launch, params: &[u8]) -> Result<(), Fault> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_beside(name, launch, params, &mut Nothing) }
    }

    /// The same while `beside` goes on.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch), but that `beside` may use the memory.
    ///
    /// # Errors
    /// As for [`launch`](Self::launch).
    pub unsafe fn launch_beside(
        &self,
        name: &str,
        launch: Launch,
        params: &[u8],
        beside: &mut dyn Beside,
    ) -> Result<(), Fault> {
        let Launch { grid, threads, shared_bytes, cluster, dependent, resident } = launch;
        let refused = |what: String| Err(Fault::refused(name, what));
        let Some(kernel) = kernels::find(name) else {
            return refused("there is no such kernel in the emulator's build".into());
        };
        if threads != kernel.threads || !threads.is_multiple_of(32) || threads == 0 || threads > 1024 {
            return refused(format!(
                "launched with {threads} threads a block, but made for {} (a multiple of 32, at most 1024)",
                kernel.threads
            ));
        }
        if params.len() != kernel.params_bytes {
            return refused(format!(
                "its parameters are {} bytes here and {} bytes in the kernel",
                params.len(),
                kernel.params_bytes
            ));
        }
        let limit = self.options.shared_per_block;
        if shared_bytes > limit {
            return refused(format!(
                "wants {shared_bytes} bytes of shared memory a block, but the device has {limit}"
            ));
        }
        let [x, y, z] = grid;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65_535 || z > 65_535 {
            return refused(format!(
                "the grid ({x}, {y}, {z}) is out of range: at least 1, at most (2147483647, 65535, 65535)"
            ));
        }
        if cluster == 0 || cluster > MOST_BLOCKS_OF_A_CLUSTER || !x.is_multiple_of(cluster) {
            return refused(format!(
                "the clusters of {cluster} blocks are out of range: at least 1, at most {MOST_BLOCKS_OF_A_CLUSTER}, and \
                 a divisor of the grid's {x}"
            ));
        }
        if cluster * threads > MOST_THREADS_OF_A_CLUSTER {
            return refused(format!(
                "clusters of {cluster} blocks of {threads} threads: the emulator follows {MOST_THREADS_OF_A_CLUSTER}"
            ));
        }

        let snapshot = self.memory.snapshot();
        let range = |&(low, high): &(u64, u64)| Range { low, high, writers: std::ptr::null_mut() };
        let mut ranges: Vec<Range> = snapshot.live.iter().map(range).collect();
        let mut aligned = vec![Line::zeroed(); params.len().div_ceil(size_of::<Line>()).max(1)];
        bytemuck::cast_slice_mut::<Line, u8>(&mut aligned)[..params.len()].copy_from_slice(params);
        let arguments = LaunchArguments {
            grid: Index { x, y, z },
            threads,
            shared_bytes,
            policy: self.options.policy,
            seed: self.options.seed,
            races: self.options.races.into(),
            cluster,
            registers: kernel.registers,
            dependent: dependent.into(),
            global_races: (self.options.global_races && u64::from(x) * u64::from(y) * u64::from(z) > 1)
                .into(),
            ranges: ranges.as_mut_ptr(),
            range_count: ranges.len(),
            freed: snapshot.freed.as_ptr(),
            freed_count: snapshot.freed.len(),
        };
        let most = if resident { (x * y * z) as usize } else { 0 };
        let resident_blocks = self.options.resident_blocks.max(most);
        // SAFETY: the size of the parameters was checked, the caller vouches for what is in them, and the
        // snapshot keeps all ranges alive.
        unsafe { schedule::run(name, kernel, &arguments, aligned.as_ptr().cast(), resident_blocks, beside) }
    }
}
