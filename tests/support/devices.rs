//! The devices on which the kernels are tested.

use std::sync::OnceLock;

use trencadis::device::Device;

/// GPU 0 where there is one. Where there is none, the first call of a test binary says why.
pub fn devices() -> Vec<Device> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    let gpu = GPU
        .get_or_init(|| Device::cuda(0).inspect_err(|reason| eprintln!("skipped: no GPU ({reason})")).ok());
    gpu.iter().cloned().collect()
}
