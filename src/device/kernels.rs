//! The loaded kernels of a device, launched by name.

use super::backend::Loaded;
use super::cuda;
use super::handle::RawStream;
use super::info::DeviceInfo;
use super::launch::Launch;
use super::tensor_map::{TensorBoxes, TensorMap};
use crate::kernels::registry::{self, Source, Tier};
use crate::{Error, Result};

/// Every kernel of the registry, for one device. Code is loaded when a kernel of its file is first
/// launched.
pub struct Kernels {
    loaded: Box<dyn Loaded>,
    info: DeviceInfo,
    dependent: bool,
}

impl Kernels {
    pub(super) fn new(loaded: Box<dyn Loaded>, info: DeviceInfo) -> Self {
        Self { loaded, info, dependent: false }
    }

    /// The same where `dependent` launches are the rule: [`Launch::dependent`] whatever they say, but for those whose
    /// blocks wait for one another. Of use where a stream has one launch after another.
    pub(super) fn with_dependent(self, dependent: bool) -> Self {
        Self { dependent, ..self }
    }

    /// Kernels for the CUDA context that is current on this thread, as another engine has made it:
    /// launches then go to that engine's streams and memory. Drop it before the context is destroyed.
    ///
    /// # Errors
    /// No current context, or any reason for which [`Device::cuda`](super::Device::cuda) fails.
    pub fn for_current_context() -> Result<Self> {
        cuda::for_current_context()
    }

    /// Loads the kernels whose names are `wanted`, of those that are made for this device. A kernel is otherwise loaded
    /// by its first launch, which a capture need not allow: CUDA's default mode forbids it.
    ///
    /// # Errors
    /// Code that is missing or that the driver does not load.
    pub fn preload(&self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let sources = registry::sources();
        let runs = |source: &&Source| source.tier == Tier::Sm80 || self.info.hopper;
        let names = sources.iter().filter(runs).flat_map(|source| &source.kernels).map(|kernel| &kernel.name);
        names.filter(|name| wanted(name)).try_for_each(|name| self.loaded.preload(name))
    }

    /// Queues a kernel on `stream`. `params` are its constant arguments, the mirror of the C++ struct.
    /// Nothing is waited for; what fails while the kernel runs is told by the next synchronisation.
    ///
    /// # Errors
    /// A kernel that is not there, `params` of another size than the kernel's, a launch that the device
    /// refuses.
    ///
    /// # Safety
    /// `P` is the kernel's parameter struct, every address in it is valid for what the kernel reads and
    /// writes, and stays so until the kernel has run, or as long as the graph that a capture of `stream`
    /// becomes. `stream` is a live stream of this device.
    pub unsafe fn launch<P: Copy>(
        &self,
        name: &str,
        launch: Launch,
        stream: RawStream,
        params: &P,
    ) -> Result<()> {
        if launch.grid.contains(&0) {
            return Err(Error::usage(format!(
                "{name} cannot be launched on a grid of {:?} blocks: every side must be at least 1",
                launch.grid
            )));
        }
        if launch.cluster == 0 || !launch.grid[0].is_multiple_of(launch.cluster) {
            return Err(Error::usage(format!(
                "{name} cannot be launched in clusters of {} blocks on a grid of {:?}: the first side must be a \
                 multiple of the cluster",
                launch.cluster, launch.grid
            )));
        }
        let launch = Launch { dependent: (launch.dependent || self.dependent) && !launch.resident, ..launch };
        let bytes = size_of::<P>();
        // SAFETY: the caller answers for addresses and stream.
        unsafe { self.loaded.launch(name, launch, stream, std::ptr::from_ref(params).cast(), bytes) }
    }

    /// A tensor map, for kernels that take one among their constant arguments. It holds the address: a tensor that
    /// moves needs another.
    ///
    /// # Errors
    /// Boxes that the hardware cannot copy.
    pub fn tensor_map(&self, boxes: &TensorBoxes) -> Result<TensorMap> {
        boxes.check()?;
        self.loaded.tensor_map(boxes)
    }

    /// The device they are loaded for.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }
}
