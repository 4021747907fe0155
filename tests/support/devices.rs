//! The devices on which the kernels are tested.

use std::sync::OnceLock;

use trencadis::device::Device;
#[cfg(feature = "emulator")]
use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};

/// The emulator, where the feature is on: as late as waits allow on what is like a Hopper GPU, and at
/// random on what has the shared memory of a consumer GPU. Then GPU 0, where there is one; where there is
/// none, the first call of a test binary says why.
pub fn devices() -> Vec<Device> {
    #[allow(unused_mut)]
    let mut devices = Vec::new();
    #[cfg(feature = "emulator")]
    devices.extend([
        Device::emulator(EmulatorOptions::default()),
        Device::emulator(EmulatorOptions {
            seed: 7,
            policy: CopyPolicy::Random,
            shared_per_block: 99 << 10,
            capability: (8, 6),
            ..EmulatorOptions::default()
        }),
    ]);
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    let gpu = GPU
        .get_or_init(|| Device::cuda(0).inspect_err(|reason| eprintln!("skipped: no GPU ({reason})")).ok());
    devices.extend(gpu.clone());
    devices
}
