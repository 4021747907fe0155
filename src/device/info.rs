//! What a device is.

/// Properties of a device; heuristics choose tiles by them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block can opt into, in bytes.
    pub shared_per_block: u32,
    /// Shared memory of a multiprocessor, in bytes.
    pub shared_per_multiprocessor: u32,
    /// L2 cache in bytes.
    pub l2_bytes: usize,
    /// Device memory in bytes.
    pub memory_bytes: usize,
    /// Highest clock of the multiprocessors in kHz; 0 where nobody knows.
    pub clock_khz: u32,
    /// The driver; none on the emulator.
    pub driver: Option<Driver>,
}

/// The driver of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA version that it supports, such as (13, 0).
    pub cuda: (u32, u32),
    /// Its release, such as `580.65.06`, where the system tells it.
    pub release: Option<String>,
}
