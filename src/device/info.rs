//! What a device is.

/// Properties of a device; heuristics choose tiles by them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Whether the kernels of the sm90 tier are there for it, and not only the portable ones.
    pub hopper: bool,
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
    /// The driver; none where there is no GPU.
    pub driver: Option<Driver>,
}

impl DeviceInfo {
    /// An H100 SXM with 80 GB: what a plan assumes where no GPU is at hand.
    pub fn h100() -> Self {
        Self {
            name: "NVIDIA H100 80GB HBM3".into(),
            capability: (9, 0),
            hopper: true,
            multiprocessors: 132,
            shared_per_block: 227 << 10,
            shared_per_multiprocessor: 228 << 10,
            l2_bytes: 50 << 20,
            memory_bytes: 80 << 30,
            clock_khz: 1_980_000,
            driver: None,
        }
    }

    /// What of the device decides how kernels are launched: ranks that compute together must have the same.
    pub fn shape(&self) -> String {
        let (major, minor) = self.capability;
        format!(
            "a device of capability {major}.{minor} with {} multiprocessors and {} bytes of shared memory for a block",
            self.multiprocessors, self.shared_per_block
        )
    }
}

/// The driver of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA version that it supports, such as (13, 0).
    pub cuda: (u32, u32),
    /// Its release, such as `580.65.06`, where the system tells it.
    pub release: Option<String>,
}
