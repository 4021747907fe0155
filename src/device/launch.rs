//! How a kernel is launched.

/// Grid, block and the options of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block; exactly what the registry says.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks of a cluster along x, which divides `grid[0]`; 1 is no cluster.
    pub cluster: u32,
    /// Programmatic dependent launch: the kernel may start before the one before it on the stream has
    /// ended, and waits for its results itself, as `kernels/common/launch.cuh` says. Ignored where its code cannot wait,
    /// which is code made for GPUs before compute capability 9.0. `TRENCADIS_DEPENDENT=1` makes all launches of a
    /// [`Device::cuda`](super::Device::cuda) such, but for those that are [`resident`](Self::resident).
    pub dependent: bool,
    /// All blocks of the grid run at the same time, because they may wait for one another; a grid for which there is no
    /// room is refused.
    pub resident: bool,
}

impl Launch {
    /// A launch without clusters that starts when everything before it on the stream has ended.
    pub const fn new(grid: [u32; 3], threads: u32, shared_bytes: u32) -> Self {
        Self { grid, threads, shared_bytes, cluster: 1, dependent: false, resident: false }
    }
}
