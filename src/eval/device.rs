//! A model that only runs forward, on a device.

use std::borrow::Cow;
use std::sync::Arc;

use super::model::{Features, Forward, Keep, Observed, record, whole};
use crate::autograd::device::{BatchShape, DeviceParams, MeshAxes, ParamLayout, fused};
use crate::autograd::graph::{Graph, Kind, Tensor};
use crate::autograd::{DeviceExecutor, Shard, StepState, Workload};
use crate::data::batch::PackedBatch;
use crate::device::Device;
use crate::error::Result;
use crate::models::limits;
use crate::models::vit::Outputs;
use crate::recipe::Recipe;

/// A recorded forward pass with its weights in device memory.
pub struct DeviceModel {
    /// For FLOPs.
    graph: Graph,
    executor: DeviceExecutor,
    outputs: Outputs,
    classes: usize,
    logits: Vec<f32>,
}

impl DeviceModel {
    /// Records the model of `recipe` for batches of `shape` and copies its weights, which are in the order of its
    /// parameters.
    ///
    /// # Errors
    /// A model that the kernels do not take; weights of another one; no room on the device.
    pub fn new(
        device: &Device,
        recipe: &Recipe,
        classes: usize,
        shape: BatchShape,
        keep: Keep,
        weights: &[Vec<f32>],
    ) -> Result<Self> {
        limits::check(&recipe.model)?;
        let (graph, outputs) = record(recipe, classes, shape.tokens, shape.slots, keep, Shard::WHOLE)?;
        let params = Arc::new(DeviceParams::new(device, ParamLayout::new(&fused(&graph), &|_| 0.0)?)?);
        let executor = DeviceExecutor::forward(device, &graph, shape, params.clone())?;
        params.write(executor.stream(), weights)?;
        Ok(Self { graph, executor, outputs, classes, logits: Vec::new() })
    }

    /// The model beside a training of it, whose memory it uses while that waits.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn beside(
        training: &DeviceExecutor,
        recipe: &Recipe,
        classes: usize,
        shape: BatchShape,
        params: Arc<DeviceParams>,
    ) -> Result<Self> {
        let (graph, outputs) =
            record(recipe, classes, shape.tokens, shape.slots, Keep::Logits, Shard::WHOLE)?;
        let executor = training.beside(&graph, shape, params)?;
        Ok(Self { graph, executor, outputs, classes, logits: Vec::new() })
    }

    /// The same on a rank of a mesh, `shard` of its tensor axis.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn beside_axes(
        training: &DeviceExecutor,
        recipe: &Recipe,
        classes: usize,
        shape: BatchShape,
        axis: MeshAxes,
        shard: Shard,
    ) -> Result<Self> {
        let (graph, outputs) = record(recipe, classes, shape.tokens, shape.slots, Keep::Logits, shard)?;
        let executor = training.beside_axes(&graph, shape, axis)?;
        let graph = whole(recipe, classes, shape.tokens, shape.slots, shard)?.unwrap_or(graph);
        Ok(Self { graph, executor, outputs, classes, logits: Vec::new() })
    }

    /// Tokens `[T, D]` of the last run.
    ///
    /// # Errors
    /// The model was recorded without [`Keep::Features`]; a failed device.
    pub fn tokens(&self) -> Result<Vec<f32>> {
        self.executor.value(self.outputs.tokens)
    }

    /// Pooled vectors `[N, D]` of the last run.
    ///
    /// # Errors
    /// As for [`tokens`](Self::tokens).
    pub fn features(&self) -> Result<Vec<f32>> {
        self.executor.value(self.outputs.features)
    }
}

impl Forward for DeviceModel {
    fn classes(&self) -> usize {
        self.classes
    }

    fn flops(&self, work: &Workload) -> f64 {
        self.graph.flops(work)
    }

    fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]> {
        self.executor.write(batch, &StepState::default())?;
        self.executor.launch(0)?;
        self.logits = self.executor.value(self.outputs.logits)?;
        Ok(&self.logits)
    }
}

impl Features for DeviceModel {
    /// # Errors
    /// Also where the model was recorded without [`Keep::Features`].
    fn pooled(&mut self, batch: &PackedBatch) -> Result<Vec<f32>> {
        self.executor.write(batch, &StepState::default())?;
        self.executor.launch(0)?;
        self.features()
    }

    fn observed(&self) -> Result<&dyn Observed> {
        Ok(self)
    }
}

impl Observed for DeviceModel {
    fn graph(&self) -> &Graph {
        &self.graph
    }

    fn value(&self, tensor: Tensor) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Owned(match self.graph.info(tensor).kind {
            Kind::Parameter(p) => self.executor.params().read_one(p)?,
            _ => self.executor.value(tensor)?,
        }))
    }
}
