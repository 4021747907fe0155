//! The towers of a model of images and texts, each run by itself.

use std::sync::Arc;

use crate::autograd::device::{BatchShape, DeviceParams, ParamLayout, fused};
use crate::autograd::graph::{Graph, Modality, ParamSpec};
use crate::autograd::{CpuExecutor, DeviceExecutor, Plan, StepState, Workload};
use crate::data::batch::PackedBatch;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::models::limits;
use crate::models::two_tower::{self, BIAS, SCALE, Towers};
use crate::recipe::Recipe;

/// How cosines become scores: `factor · cosine + bias`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Learned, as its logarithm.
    pub factor: f32,
    /// Learned with the sigmoid loss, 0 without.
    pub bias: f32,
}

/// A model of images and texts with its weights, ready to run.
pub trait Embed {
    /// Width D of the vectors.
    fn width(&self) -> usize;

    /// Vectors `[N, D]` of the images or of the texts of a batch, as the towers make them; zeros on unused slots.
    ///
    /// # Errors
    /// A batch of another shape; a failed device.
    fn embed(&mut self, modality: Modality, batch: &PackedBatch) -> Result<&[f32]>;

    /// What scores are made with.
    ///
    /// # Errors
    /// A failed device.
    fn score(&self) -> Result<Score>;

    /// FLOPs of the image tower over this workload.
    fn flops(&self, work: &Workload) -> f64;
}

impl<E: Embed + ?Sized> Embed for &mut E {
    fn width(&self) -> usize {
        (**self).width()
    }

    fn embed(&mut self, modality: Modality, batch: &PackedBatch) -> Result<&[f32]> {
        (**self).embed(modality, batch)
    }

    fn score(&self) -> Result<Score> {
        (**self).score()
    }

    fn flops(&self, work: &Workload) -> f64 {
        (**self).flops(work)
    }
}

/// Both towers, of which one is wanted.
fn record(recipe: &Recipe, tokens: usize, slots: usize, modality: Modality) -> Result<(Graph, Towers)> {
    let mut graph = Graph::new();
    let towers = two_tower::record(&mut graph, recipe, tokens, slots, false)?;
    graph.keep(towers.of(modality));
    Ok((graph, towers))
}

fn score_of(params: &[ParamSpec], value: impl Fn(usize) -> Result<f32>) -> Result<Score> {
    let of = |name: &str| params.iter().position(|param| param.name == name).map(&value).transpose();
    let scale = of(SCALE)?.ok_or_else(|| Error::failure(format!("the model has no {SCALE}")))?;
    Ok(Score { factor: scale.exp(), bias: of(BIAS)?.unwrap_or(0.0) })
}

/// The towers on the CPU device.
pub struct CpuTowers {
    graph: Graph,
    towers: Towers,
    plans: [Plan; 2],
    executor: CpuExecutor<f32>,
}

impl CpuTowers {
    /// Records the towers of `recipe` for batches of `tokens` image tokens and `slots` pairs.
    ///
    /// # Errors
    /// If a shape is invalid.
    pub fn new(recipe: &Recipe, tokens: usize, slots: usize) -> Result<Self> {
        let plan = |modality| record(recipe, tokens, slots, modality).map(|(graph, _)| Plan::new(&graph));
        let (graph, towers) = record(recipe, tokens, slots, Modality::Images)?;
        let plans = [plan(Modality::Images)?, plan(Modality::Texts)?];
        Ok(Self { graph, towers, plans, executor: CpuExecutor::with_products(recipe.train.matmul) })
    }

    /// The parameters in order.
    pub fn params(&self) -> &[ParamSpec] {
        self.graph.params()
    }

    /// With weights in the order of the parameters.
    pub fn with_params<P: AsRef<[Vec<f32>]>>(&mut self, params: P) -> CpuEmbed<&mut Self, P> {
        CpuEmbed { towers: self, params }
    }
}

/// [`CpuTowers`] with weights.
pub struct CpuEmbed<T, P> {
    /// The towers.
    pub towers: T,
    /// The weights, in the order of the parameters.
    pub params: P,
}

impl<T: std::borrow::BorrowMut<CpuTowers>, P: AsRef<[Vec<f32>]>> Embed for CpuEmbed<T, P> {
    fn width(&self) -> usize {
        let towers = self.towers.borrow();
        towers.graph.info(towers.towers.images).cols
    }

    fn embed(&mut self, modality: Modality, batch: &PackedBatch) -> Result<&[f32]> {
        let CpuTowers { graph, towers, plans, executor } = self.towers.borrow_mut();
        let plan = &plans[usize::from(modality == Modality::Texts)];
        let step = StepState::default();
        executor.run(graph, plan, self.params.as_ref(), &mut [], &Default::default(), batch, &step);
        Ok(executor.value(towers.of(modality)))
    }

    fn score(&self) -> Result<Score> {
        score_of(self.towers.borrow().params(), |p| Ok(self.params.as_ref()[p][0]))
    }

    fn flops(&self, work: &Workload) -> f64 {
        let towers = self.towers.borrow();
        towers.plans[0].flops(&towers.graph, work)
    }
}

/// The towers on a device, with their weights.
pub struct DeviceTowers {
    /// Of the images, for FLOPs.
    graph: Graph,
    plan: Plan,
    towers: Towers,
    /// Of the images and of the texts.
    executors: [DeviceExecutor; 2],
    vectors: Vec<f32>,
}

impl DeviceTowers {
    /// Records the towers of `recipe` for batches of `shape` and copies their weights, which are in the order of the
    /// parameters.
    ///
    /// # Errors
    /// A model that the kernels do not take; weights of another one; no room on the device.
    pub fn new(device: &Device, recipe: &Recipe, shape: BatchShape, weights: &[Vec<f32>]) -> Result<Self> {
        check(recipe)?;
        let (graph, _) = record(recipe, shape.tokens, shape.slots, Modality::Images)?;
        let params = Arc::new(DeviceParams::new(device, ParamLayout::new(&fused(&graph), &|_| 0.0)?)?);
        let towers = Self::of(recipe, shape, |graph, shape| {
            DeviceExecutor::forward(device, graph, shape, params.clone())
        })?;
        params.write(towers.executors[0].stream(), weights)?;
        Ok(towers)
    }

    /// The towers beside a training of them, whose memory they use while that waits.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn beside(
        training: &DeviceExecutor,
        recipe: &Recipe,
        shape: BatchShape,
        params: Arc<DeviceParams>,
    ) -> Result<Self> {
        Self::of(recipe, shape, |graph, shape| training.beside(graph, shape, params.clone()))
    }

    fn of(
        recipe: &Recipe,
        shape: BatchShape,
        executor: impl Fn(&Graph, BatchShape) -> Result<DeviceExecutor>,
    ) -> Result<Self> {
        let one = |modality| record(recipe, shape.tokens, shape.slots, modality);
        let ((graph, towers), (texts, _)) = (one(Modality::Images)?, one(Modality::Texts)?);
        // Images are classified without texts.
        let alone = BatchShape { texts: None, ..shape };
        let executors = [executor(&graph, alone)?, executor(&texts, shape)?];
        Ok(Self { plan: Plan::new(&graph), graph, towers, executors, vectors: Vec::new() })
    }
}

/// Whether both towers have all their kernels on a device.
///
/// # Errors
/// One sentence that names keys of the recipe.
pub fn check(recipe: &Recipe) -> Result<()> {
    limits::check(&recipe.model)?;
    limits::check(&recipe.text_model()?)
        .map_err(|error| Error::usage(error.to_string().replace("model.", "text.")))
}

impl Embed for DeviceTowers {
    fn width(&self) -> usize {
        self.graph.info(self.towers.images).cols
    }

    fn embed(&mut self, modality: Modality, batch: &PackedBatch) -> Result<&[f32]> {
        let executor = &mut self.executors[usize::from(modality == Modality::Texts)];
        executor.write(batch, &StepState::default())?;
        executor.launch(0)?;
        self.vectors = executor.value(self.towers.of(modality))?;
        Ok(&self.vectors)
    }

    fn score(&self) -> Result<Score> {
        let params = self.executors[0].params();
        score_of(self.graph.params(), |p| {
            let range = &params.layout().arena().ranges()[p];
            let bytes = range.start * size_of::<f32>()..(range.start + 1) * size_of::<f32>();
            Ok(params.master().view::<f32>(bytes)?.download()?[0])
        })
    }

    fn flops(&self, work: &Workload) -> f64 {
        self.plan.flops(&self.graph, work)
    }
}
