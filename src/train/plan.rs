//! What a run will need, told before anything is allocated.
//!
//! On the CPU the bytes follow from the record; on a device they are those that the engine allocates on a device
//! that only counts ([`Device::planned`](crate::device::Device::planned)).
//!
//! Of several ranks, [`search`] plans a training on every mesh of so many GPUs: [`memory`] of a rank ([`device`];
//! [`cpu`] for ranks on the CPU) and what its [`activations`] are, [`traffic`] and [`time`] of a step. [`rank`] is what they
//! all start from.

pub mod activations;
pub mod cpu;
pub mod device;
pub mod memory;
pub mod rank;
pub mod report;
pub mod search;
pub mod time;
pub mod traffic;

use std::fmt;

use self::memory::{batch_bytes, picture_bytes, target_bytes, text_bytes};
use crate::autograd::Workload;
use crate::cpu::gemm::bf16;
use crate::data::resolution::mean_area;
use crate::recipe::{MatmulKind, Recipe, Recompute, ViewsKind};
use crate::train::engine::DeviceMemory;
use crate::train::step::TrainStep;
use crate::train::terminal::mib;

/// Parameters, arithmetic and memory of a run.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct RunPlan {
    /// Number of parameters.
    pub parameters: usize,
    /// Token budget of a batch.
    pub tokens: usize,
    /// Image slots of a batch.
    pub slots: usize,
    /// Token budget of the texts of a batch, 0 without.
    pub text_tokens: usize,
    /// Batches per step.
    pub accumulate: usize,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Model FLOPs of a full step at the expected image size.
    pub flops_per_step: f64,
    /// Expected tokens per image, before dropping.
    pub tokens_per_image: f64,
    /// Weights, gradients, moments and moving average on the CPU, in bytes.
    pub state_bytes: usize,
    /// Activations of a training batch on the CPU, in bytes.
    pub activation_bytes: usize,
    /// Activations of an evaluation on the CPU, which keeps buffers of its own, in bytes.
    pub evaluation_bytes: usize,
    /// What multiplies matrices of bf16 on the CPU, where the recipe has them.
    pub bf16_units: Option<&'static str>,
    /// Where training images become patches, where the recipe leaves it to a device.
    pub views: Option<&'static str>,
    /// Memory of the device that the run is on.
    pub device: Option<DeviceMemory>,
    /// Batches that wait in the input queue, in bytes.
    pub queue_bytes: usize,
    /// Decoded images that may be kept, in bytes; not part of the total.
    pub cache_bytes: usize,
}

impl RunPlan {
    /// The plan of a recorded step, on the CPU or on a device whose memory it takes.
    pub fn of(recipe: &Recipe, step: &TrainStep, slots: usize, device: Option<DeviceMemory>) -> Self {
        let parameters = step.graph().parameter_count();
        let tokens = recipe.packing.tokens;
        let (tokens_per_image, work) = (expected_tokens(recipe), workload(recipe));
        let accumulate = recipe.train.accumulate.max(1);
        let memory = cpu::memory(recipe, step, slots, 1, accumulate);
        // Two batches wait and one is being made; a device has two in pinned memory, and another is on its way there.
        let [loaded, given, taken] = target_bytes(recipe, step.classes());
        let texts = text_bytes(recipe, slots);
        let batch = |target| match (device, recipe.data.views) {
            (Some(_), ViewsKind::Device) => texts + picture_bytes(recipe, slots, target),
            _ => texts + batch_bytes(tokens, slots, recipe.model.patch_dim(), target),
        };
        let queue_bytes = match device {
            Some(_) => 3 * batch(loaded) + 2 * batch(taken) + batch(given),
            None => memory.input,
        };
        Self {
            parameters,
            tokens,
            slots,
            text_tokens: if recipe.text.is_on() { recipe.text_tokens(slots) } else { 0 },
            accumulate,
            recompute: recipe.model.recompute,
            flops_per_step: step.flops(&work) * accumulate as f64,
            tokens_per_image,
            state_bytes: memory.state(),
            activation_bytes: memory.activations,
            evaluation_bytes: memory.evaluation,
            bf16_units: (device.is_none() && recipe.train.matmul == MatmulKind::Bf16)
                .then(|| bf16::Units::best().name()),
            views: (recipe.data.views == ViewsKind::Device).then_some(match device {
                Some(_) => "made on the device, of images as they are decoded",
                None => "made on the host: data.views = \"device\" is for a GPU",
            }),
            device,
            queue_bytes,
            cache_bytes: if recipe.data.path.is_empty() {
                0
            } else {
                recipe.data.cache_mib.saturating_mul(1 << 20)
            },
        }
    }

    /// All memory of a run on the CPU, in bytes.
    pub fn total_bytes(&self) -> usize {
        self.state_bytes + self.activation_bytes + self.evaluation_bytes + self.queue_bytes
    }

    fn memory(&self) -> String {
        let parts = |parts: &[(&str, usize)]| {
            parts.iter().map(|(what, bytes)| format!("{what} {}", mib(*bytes))).collect::<Vec<_>>().join(", ")
        };
        match self.device {
            Some(memory) => format!(
                "device memory     {} ({})\nhost memory       {}",
                mib(memory.total()),
                parts(&[
                    ("weights and optimiser", memory.fixed()),
                    ("activations", memory.activations),
                    ("input", memory.input),
                    ("workspace", memory.workspace),
                    ("evaluation", memory.evaluation),
                ]),
                parts(&[("input", self.queue_bytes)])
            ),
            None => format!(
                "peak memory       {} ({})",
                mib(self.total_bytes()),
                parts(&[
                    ("weights and optimiser", self.state_bytes),
                    ("activations", self.activation_bytes),
                    ("evaluation", self.evaluation_bytes),
                    ("input", self.queue_bytes),
                ])
            ),
        }
    }
}

/// A full batch of images of the expected size.
fn workload(recipe: &Recipe) -> Workload {
    let (tokens, each) = (recipe.packing.tokens as f64, expected_tokens(recipe));
    let images = (tokens / each).max(1.0);
    // Texts are taken to be as long as they may be: how long they are, nobody knows yet.
    let text = recipe.text.max_tokens as f64;
    let texts = if recipe.text.is_on() { [images * text, images * text * text] } else { [0.0; 2] };
    Workload { tokens, images, sum_squared: tokens * each.min(tokens), texts }
}

/// Mean patches of an image under the recipe's resolutions, plus prefix tokens.
fn expected_tokens(recipe: &Recipe) -> f64 {
    let patch = recipe.model.patch as f64;
    (mean_area(&recipe.resolution) / (patch * patch)).max(1.0) + recipe.model.prefix() as f64
}

impl fmt::Display for RunPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parameters = self.parameters as f64;
        match self.parameters {
            0..100_000 => writeln!(f, "parameters        {:.1} k", parameters / 1e3)?,
            _ => writeln!(f, "parameters        {:.2} M", parameters / 1e6)?,
        }
        writeln!(
            f,
            "step              {} batch{} of {} tokens, up to {} images, about {:.0} tokens an image",
            self.accumulate,
            if self.accumulate == 1 { "" } else { "es" },
            self.tokens,
            self.slots,
            self.tokens_per_image
        )?;
        if self.text_tokens > 0 {
            writeln!(f, "texts             up to {} in {} tokens", self.slots, self.text_tokens)?;
        }
        let digits = if self.flops_per_step < 1e9 { 3 } else { 1 };
        writeln!(f, "model FLOPs       {:.digits$} GFLOP a step", self.flops_per_step / 1e9)?;
        if let Some(units) = self.bf16_units {
            writeln!(f, "products          bf16, multiplied by {units}")?;
        }
        match self.recompute {
            Recompute::None => {}
            Recompute::Selective => writeln!(f, "recompute         selective: norms and GELU")?,
            Recompute::Full => writeln!(f, "recompute         full: blocks")?,
        }
        if let Some(views) = self.views {
            writeln!(f, "patches           {views}")?;
        }
        write!(f, "{}", self.memory())?;
        if self.cache_bytes > 0 {
            write!(f, ", and up to {} of decoded images (data.cache_mib)", mib(self.cache_bytes))?;
        }
        Ok(())
    }
}
