//! The emulator: runs the kernels of `kernels/` on the host, so that they are tested where there is no GPU.

mod fault;
mod kernels;
mod machine;
mod memory;
mod schedule;

pub use fault::Fault;

use machine::{Index, LaunchArguments, Range};

/// When a copy from global to shared memory (`cp.async`) happens between its issue and the wait for it.
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
    /// When asynchronous copies happen.
    pub policy: CopyPolicy,
    /// Blocks that run at a time; the others start when one ends.
    pub resident_blocks: usize,
    /// Most bytes of shared memory that a block may have.
    pub shared_per_block: u32,
    /// Compute capability that the device reports.
    pub capability: (u32, u32),
    /// Whether races on shared memory are looked for.
    pub races: bool,
    /// Whether blocks that write different values to the same global memory, or read there what another one
    /// wrote other than by `load_coherent`, are reported.
    pub global_races: bool,
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

    /// Frees an allocation. An address that is none is ignored.
    pub fn free(&self, address: u64) {
        self.memory.free(address);
    }

    /// Runs the kernel `name` to its end on the calling thread.
    ///
    /// # Safety
    /// `params` holds the kernel's parameter struct. Pointers in it are checked where the kernel uses them;
    /// no other thread may use the memory they point to meanwhile.
    ///
    /// # Errors
    /// A launch that does not fit the kernel or the device, and whatever the kernel does wrong.
    pub unsafe fn launch(
        &self,
        name: &str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: &[u8],
    ) -> Result<(), Fault> {
        let refused = |what: String| Err(Fault::refused(name, what));
        let Some(kernel) = kernels::find(name) else {
            return refused("there is no such kernel in the emulator's build".into());
        };
        if threads != kernel.threads || threads % 32 != 0 || threads == 0 || threads > 1024 {
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

        let snapshot = self.memory.snapshot();
        let range = |allocation: &std::sync::Arc<memory::Allocation>| {
            let (low, high) = allocation.range();
            Range { low, high, writers: std::ptr::null_mut() }
        };
        let mut ranges: Vec<Range> = snapshot.live.iter().map(range).collect();
        let mut aligned = vec![0_u128; params.len().div_ceil(16).max(1)];
        bytemuck::cast_slice_mut::<u128, u8>(&mut aligned)[..params.len()].copy_from_slice(params);
        let arguments = LaunchArguments {
            grid: Index { x, y, z },
            threads,
            shared_bytes,
            policy: self.options.policy,
            seed: self.options.seed,
            races: self.options.races.into(),
            global_races: (self.options.global_races && u64::from(x) * u64::from(y) * u64::from(z) > 1)
                .into(),
            ranges: ranges.as_mut_ptr(),
            range_count: ranges.len(),
            freed: snapshot.freed.as_ptr(),
            freed_count: snapshot.freed.len(),
        };
        // SAFETY: the size of the parameters was checked, the caller vouches for what is in them, and the
        // snapshot keeps all ranges alive.
        unsafe {
            schedule::run(name, kernel, &arguments, aligned.as_ptr().cast(), self.options.resident_blocks)
        }
    }
}
