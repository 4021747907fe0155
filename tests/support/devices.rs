//! The devices on which the kernels are tested.

use std::io::Write;
use std::sync::OnceLock;

use trencadis::device::Device;
#[cfg(feature = "emulator")]
use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};

/// The emulator, where the feature is on: as late as waits allow on what is like a Hopper GPU, and at
/// random on what has the shared memory of a consumer GPU; launches are dependent, so that every kernel is seen to wait
/// for the one before. Then GPU 0, where there is one; where there is
/// none, the first call of a test binary says why.
pub fn devices() -> Vec<Device> {
    #[allow(unused_mut)]
    let mut devices = Vec::new();
    #[cfg(feature = "emulator")]
    devices.extend([
        Device::emulator(EmulatorOptions { dependent: true, ..EmulatorOptions::default() }),
        Device::emulator(EmulatorOptions {
            seed: 7,
            policy: CopyPolicy::Random,
            shared_per_block: 99 << 10,
            capability: (8, 6),
            dependent: true,
            ..EmulatorOptions::default()
        }),
    ]);
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| {
        // Past the harness, which shows what a test prints only if it fails.
        let skipped = |reason: &_| writeln!(std::io::stderr(), "skipped: no GPU ({reason})").unwrap_or(());
        Device::cuda(0).inspect_err(skipped).ok()
    });
    devices.extend(gpu.clone());
    devices
}
