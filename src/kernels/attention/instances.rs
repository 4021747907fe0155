//! What the attention kernels are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block of the forward kernels.
pub const THREADS: u32 = 128;
/// Warps of such a block.
pub const WARPS: usize = 4;
/// Blocks of a multiprocessor that the forward kernels' registers leave room for.
pub const BLOCKS: u32 = 2;
/// Threads of a block of the backward kernels, of which one fits a multiprocessor.
pub const BACKWARD_THREADS: u32 = 256;
/// Warps of such a block.
pub const BACKWARD_WARPS: usize = 8;
/// Blocks of a multiprocessor of the small kernels beside it.
pub const BACKWARD_SMALL_BLOCKS: u32 = 4;
/// Name of the kernel that sums gradients of gains and biases.
pub const BACKWARD_SUM: &str = "attention_backward_sum_f32";
/// Columns of the partial sums that a block of [`BACKWARD_SUM`] takes.
pub const BACKWARD_SUM_COLUMNS: usize = 8;
/// Its shared memory: a float a warp and column.
pub const BACKWARD_SUM_SHARED: u32 = (BACKWARD_WARPS * BACKWARD_SUM_COLUMNS * 4) as u32;
/// Threads of a block of Hopper's backward kernel: a warpgroup that copies and two that multiply.
pub const HOPPER_BACKWARD_THREADS: u32 = 384;
/// Shared memory of such a block, `SHARED_BYTES` of the kernel: a KiB less than there is.
pub const HOPPER_BACKWARD_SHARED: u32 = 231_424;
/// Rows of a key block of it: of an item of a long image.
pub const HOPPER_BACKWARD_KEYS: usize = 128;
/// Rows of a query stage.
pub const HOPPER_BACKWARD_QUERIES: usize = 64;
/// Shared memory of a block of that: column sums of 8 warps, for a gain and a bias.
pub const HOPPER_BACKWARD_FINISH_SHARED: u32 = 8 * 2 * 128 * 4;
/// Threads of the one block that makes the work lists.
pub const SCHEDULE_THREADS: u32 = 256;
/// Its shared memory: counts of 1,024 bins for each of its 8 warps, and one word a warp.
pub const SCHEDULE_SHARED: u32 = 8 * 1024 * 4 + 8 * 4;
/// Name of the kernel that makes the work lists.
pub const SCHEDULE: &str = "attention_schedule_i32";
/// Threads of a block of it.
pub const PREPARE_THREADS: u32 = 256;
/// Blocks of a multiprocessor of it.
pub const PREPARE_BLOCKS: u32 = 2;
/// Heads that a warp of it works on at a time.
pub const PREPARE_HEADS: usize = 4;
/// Shared memory of a block of Hopper's forward kernel, `SHARED_BYTES` there: all that there is.
pub const HOPPER_SHARED_BYTES: u32 = 232_448;

/// Name of the kernel that prepares long images for Hopper's.
pub fn attention_prepare(element: &str) -> String {
    format!("attention_prepare_{element}")
}

/// Name of the kernel that sums dk and dv over the heads of q that share a head of k and v.
pub fn backward_groups(element: &str) -> String {
    format!("attention_backward_groups_{element}")
}

/// Name of the kernel that writes rows of no image and prepares long images.
pub fn backward_prepare(element: &str) -> String {
    format!("attention_backward_prepare_{element}")
}

/// Name of the kernel that makes dq of long images of its sums.
pub fn hopper_backward_finish(element: &str) -> String {
    format!("attention_backward_finish_{element}")
}

/// How an image is worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// All keys and values of a head in shared memory.
    Short,
    /// Keys and values in steps, a block for each tile of queries.
    Long,
}

/// A kernel of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Columns of a head; a head dim that is none of the widths runs on the next one.
    pub width: usize,
    /// Query rows of a warp: 16 or 32.
    pub rows: usize,
    /// Keys of a step.
    pub keys: usize,
    /// Warpgroups that multiply, of Hopper's own kernel; none for the kernels of every GPU.
    pub hopper: Option<usize>,
}

const fn portable(width: usize, rows: usize, keys: usize) -> Instance {
    Instance { width, rows, keys, hopper: None }
}

const fn hopper(width: usize, warpgroups: usize) -> Instance {
    Instance { width, rows: 16, keys: 64, hopper: Some(warpgroups) }
}

/// The widths, ascending. Rows and keys are as many as results, scores and queries leave registers for.
pub const INSTANCES: [Instance; 8] = [
    portable(64, 32, 64),
    portable(72, 32, 32),
    portable(80, 32, 32),
    portable(88, 16, 64),
    portable(96, 16, 64),
    portable(104, 16, 64),
    portable(112, 16, 64),
    portable(128, 16, 64),
];

/// The kernels for Hopper, the first of each width being what is taken without measuring. Three warpgroups multiply where
/// they have registers enough.
pub const HOPPER_INSTANCES: [Instance; 11] = [
    hopper(64, 3),
    hopper(64, 2),
    hopper(72, 3),
    hopper(72, 2),
    hopper(80, 3),
    hopper(80, 2),
    hopper(88, 2),
    hopper(96, 2),
    hopper(104, 2),
    hopper(112, 2),
    hopper(128, 2),
];

/// One width of the backward kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardInstance {
    /// As [`Instance::width`].
    pub width: usize,
    /// Rows whose gradients a warp holds: 16 or 32; a warpgroup on Hopper.
    pub rows: usize,
    /// Rows of the other side that it takes at a time: 16 or 32; 64 on Hopper where registers allow.
    pub step: usize,
    /// Whether it is Hopper's own kernel.
    pub hopper: bool,
}

const fn portable_backward(width: usize, rows: usize, step: usize) -> BackwardInstance {
    BackwardInstance { width, rows, step, hopper: false }
}

/// The same widths. Rows and steps are as many as gradients and scores leave registers for.
pub const BACKWARD_INSTANCES: [BackwardInstance; 8] = [
    portable_backward(64, 32, 32),
    portable_backward(72, 32, 16),
    portable_backward(80, 32, 16),
    portable_backward(88, 32, 16),
    portable_backward(96, 16, 32),
    portable_backward(104, 16, 32),
    portable_backward(112, 16, 32),
    portable_backward(128, 16, 32),
];

const fn hopper_backward(width: usize, step: usize) -> BackwardInstance {
    BackwardInstance { width, rows: 64, step, hopper: true }
}

/// The same widths on Hopper.
pub const HOPPER_BACKWARD_INSTANCES: [BackwardInstance; 8] = [
    hopper_backward(64, 64),
    hopper_backward(72, 64),
    hopper_backward(80, 64),
    hopper_backward(88, 64),
    hopper_backward(96, 64),
    hopper_backward(104, 32),
    hopper_backward(112, 32),
    hopper_backward(128, 32),
];

impl BackwardInstance {
    /// Longest image of the short schedule of Hopper's kernel: one key block, or as many query stages as stay in shared
    /// memory beside their dq.
    pub const fn hopper_short(&self) -> usize {
        match self.width {
            ..=80 => 256,
            81..=96 => 192,
            _ => 128,
        }
    }

    /// The one of every GPU that serves a head dim: a multiple of 8 to 128.
    pub fn of(head_dim: usize) -> Option<Self> {
        let width = Instance::of(head_dim)?.width;
        BACKWARD_INSTANCES.into_iter().find(|instance| instance.width == width)
    }

    /// Name of the kernel of an element.
    pub fn name(&self, element: &str) -> String {
        let hopper = if self.hopper { "hopper_" } else { "" };
        format!("attention_backward_{element}_{hopper}{}", self.width)
    }

    fn kernel(&self, element: &str) -> Kernel {
        let Self { width, rows, step, hopper } = self;
        if *hopper {
            return Kernel {
                name: self.name(element),
                body: format!("hopper_backward::gradients<{width}>"),
                params: "AttentionBackwardHopper",
                threads: HOPPER_BACKWARD_THREADS,
                min_blocks: 1,
                tensor_cores: true,
            };
        }
        let body = format!("gradients<{width}, {}, {}>", rows / 16, step / 16);
        backward(self.name(element), &body, "AttentionBackward", 1)
    }
}

fn backward(name: String, body: &str, params: &'static str, min_blocks: u32) -> Kernel {
    Kernel {
        name,
        body: format!("attention_backward::{body}"),
        params,
        threads: BACKWARD_THREADS,
        min_blocks,
        tensor_cores: min_blocks == 1,
    }
}

impl Instance {
    /// The one that serves a head dim: a multiple of 8 to 128.
    pub fn of(head_dim: usize) -> Option<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(8) {
            return None;
        }
        INSTANCES.into_iter().find(|instance| instance.width >= head_dim)
    }

    /// Those of Hopper's kernels that serve a head dim.
    pub fn hopper_of(head_dim: usize) -> impl Iterator<Item = Self> {
        let width = Self::of(head_dim).map(|instance| instance.width);
        HOPPER_INSTANCES.into_iter().filter(move |instance| Some(instance.width) == width)
    }

    /// Name of the forward kernel of an element; Hopper's has one for both schedules.
    pub fn forward(&self, schedule: Schedule, element: &str) -> String {
        match self.hopper {
            None => format!("attention_forward_{element}_{}_{}", schedule.name(), self.width),
            Some(warpgroups) => format!("attention_forward_{element}_hopper_{}_{warpgroups}wg", self.width),
        }
    }

    /// Threads of a block. On Hopper one warpgroup more than multiply: it copies.
    pub fn threads(&self) -> u32 {
        self.hopper.map_or(THREADS, |warpgroups| 128 * (warpgroups as u32 + 1))
    }

    /// Blocks of a multiprocessor.
    pub fn blocks(&self) -> u32 {
        if self.hopper.is_some() { 1 } else { BLOCKS }
    }

    fn kernel(&self, schedule: Schedule, element: &str) -> Kernel {
        let Self { width, rows, keys, .. } = self;
        let body = match self.hopper {
            None => format!("{}_images<{width}, {}, {keys}>", schedule.name(), rows / 16),
            Some(warpgroups) => format!("hopper<{width}, {warpgroups}>"),
        };
        Kernel {
            name: self.forward(schedule, element),
            body: format!("attention_forward::{body}"),
            params: "AttentionForward",
            threads: self.threads(),
            min_blocks: self.blocks(),
            tensor_cores: true,
        }
    }
}

impl Schedule {
    fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Long => "long",
        }
    }
}

/// Names of the elements that there are kernels for.
pub const ELEMENTS: [&str; 2] = ["bf16", "f16"];

/// A file of each of [`ELEMENTS`].
macro_rules! files {
    ($stem:literal) => {
        [concat!("attention/", $stem, ".cu"), concat!("attention/", $stem, "_f16.cu")]
    };
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let schedule = Kernel {
        name: SCHEDULE.into(),
        body: "attention_schedule::run".into(),
        params: "AttentionSchedule",
        threads: SCHEDULE_THREADS,
        min_blocks: 1,
        tensor_cores: false,
    };
    let file = "attention/sm80_attention_schedule.cu";
    let mut sources = vec![Source { file, tier: Tier::Sm80, kernels: vec![schedule] }];
    sources.extend((0..ELEMENTS.len()).flat_map(of_element));
    sources
}

/// The sources of one of [`ELEMENTS`].
fn of_element(which: usize) -> [Source; 6] {
    let element = ELEMENTS[which];
    let forward = INSTANCES.iter().flat_map(|instance| {
        [Schedule::Short, Schedule::Long].map(|schedule| instance.kernel(schedule, element))
    });
    let small = |name, body, params| backward(name, body, params, BACKWARD_SMALL_BLOCKS);
    let mut gradients: Vec<Kernel> =
        BACKWARD_INSTANCES.iter().map(|instance| instance.kernel(element)).collect();
    gradients.push(small(backward_prepare(element), "prepare", "AttentionBackward"));
    gradients.push(small(backward_groups(element), "sum_groups", "AttentionBackwardGroups"));
    if which == 0 {
        // It has no operand of the element.
        gradients.push(small(BACKWARD_SUM.into(), "sum", "AttentionBackwardSum"));
    }
    let prepare = Kernel {
        name: attention_prepare(element),
        body: "attention_prepare::run".into(),
        params: "AttentionPrepare",
        threads: PREPARE_THREADS,
        min_blocks: PREPARE_BLOCKS,
        tensor_cores: false,
    };
    let finish = Kernel {
        name: hopper_backward_finish(element),
        body: "hopper_backward::finish".into(),
        params: "AttentionBackwardHopper",
        threads: BACKWARD_THREADS,
        min_blocks: 1,
        tensor_cores: false,
    };
    let hopper = HOPPER_INSTANCES.iter().map(|instance| instance.kernel(Schedule::Short, element));
    let hopper_gradients = HOPPER_BACKWARD_INSTANCES.iter().map(|instance| instance.kernel(element));
    let source = |tier, files: [&'static str; 2], kernels| Source { file: files[which], tier, kernels };
    [
        source(Tier::Sm80, files!("sm80_attention_forward"), forward.collect()),
        source(Tier::Sm80, files!("sm80_attention_prepare"), vec![prepare]),
        source(Tier::Sm80, files!("sm80_attention_backward"), gradients),
        source(Tier::Sm80, files!("sm80_attention_backward_finish"), vec![finish]),
        source(Tier::Sm90, files!("sm90_attention_forward"), hopper.collect()),
        source(Tier::Sm90, files!("sm90_attention_backward"), hopper_gradients.collect()),
    ]
}
