//! Memory and launches of an executor.

use std::sync::{Arc, Mutex, PoisonError};

use super::super::super::graph::{Graph, Modality, ParamSpec};
use super::super::super::plan::Plan;
use super::super::batch::DeviceBatch;
use super::super::fuse::fused;
use super::super::gathered::{Gathered, MeshAxes};
use super::super::layout::{ArenaPlan, Element};
use super::super::memory::{Memory, ParamMemory};
use super::super::params::{DeviceParams, ParamLayout};
use super::super::shape::BatchShape;
use super::super::site::{Needs, Site};
use super::DeviceExecutor;
use crate::device::{Buffer, Device, DeviceInfo, Stream};
use crate::error::{Error, Result};
use crate::kernels::attention::Schedule;
use crate::kernels::residual::DropPathRate;

/// Where an executor finds parameters and leaves gradients.
enum Source {
    /// Of one rank.
    Whole(Arc<DeviceParams>, Buffer<f32>),
    /// Shared out.
    Axis(MeshAxes),
}

impl DeviceExecutor {
    /// Lays out memory for `graph` and one batch of `shape`, and prepares every op. `decay` is the weight decay of
    /// a parameter. Parameters and gradients are zeros at first.
    ///
    /// # Errors
    /// An op without a kernel, or sizes that its kernel does not take; no room on the device.
    pub fn new(
        device: &Device,
        graph: &Graph,
        shape: BatchShape,
        decay: &dyn Fn(&ParamSpec) -> f64,
    ) -> Result<Self> {
        let params = Arc::new(DeviceParams::new(device, ParamLayout::new(&fused(graph), decay)?)?);
        Self::with_params(device, graph, shape, 1, params)
    }

    /// As [`new`](Self::new), for parameters that are there already and `batches` batches, of which one may be
    /// written while another is read.
    ///
    /// # Errors
    /// As for [`new`](Self::new); parameters of another model.
    pub fn with_params(
        device: &Device,
        graph: &Graph,
        shape: BatchShape,
        batches: usize,
        params: Arc<DeviceParams>,
    ) -> Result<Self> {
        let grads = device.zeros(params.layout().arena().len())?;
        let stream = Arc::new(device.stream()?);
        Self::build(device, graph, shape, batches, Source::Whole(params, grads), stream, None)
    }

    /// As [`with_params`](Self::with_params), for parameters that a mesh shares out. A gradient is whole in
    /// no place; its sums over the ranks are added to the pieces of `axis`.
    ///
    /// # Errors
    /// As for [`with_params`](Self::with_params).
    pub fn with_axes(
        device: &Device,
        graph: &Graph,
        shape: BatchShape,
        batches: usize,
        axis: MeshAxes,
    ) -> Result<Self> {
        let stream = Arc::new(device.stream()?);
        Self::build(device, graph, shape, batches, Source::Axis(axis), stream, None)
    }

    /// A graph without gradients, for parameters that are there already and one batch of `shape`.
    ///
    /// # Errors
    /// As for [`with_params`](Self::with_params).
    pub fn forward(
        device: &Device,
        graph: &Graph,
        shape: BatchShape,
        params: Arc<DeviceParams>,
    ) -> Result<Self> {
        let stream = Arc::new(device.stream()?);
        Self::build(device, graph, shape, 1, Source::Whole(params, device.alloc(0)?), stream, None)
    }

    /// A graph without gradients for batches of `shape`, on the stream of this one: as the two never run at a
    /// time, activations and workspace are those of this one where they are large enough.
    ///
    /// # Errors
    /// As for [`with_params`](Self::with_params).
    pub fn beside(&self, graph: &Graph, shape: BatchShape, params: Arc<DeviceParams>) -> Result<Self> {
        let device = &self.memory.device;
        let source = Source::Whole(params, device.alloc(0)?);
        Self::build(device, graph, shape, 1, source, self.stream.clone(), Some(self))
    }

    /// As [`beside`](Self::beside), for parameters that a mesh shares out.
    ///
    /// # Errors
    /// As for [`with_params`](Self::with_params).
    pub fn beside_axes(&self, graph: &Graph, shape: BatchShape, axis: MeshAxes) -> Result<Self> {
        let source = Source::Axis(axis);
        Self::build(&self.memory.device, graph, shape, 1, source, self.stream.clone(), Some(self))
    }

    /// As which type kernels read each parameter of `graph`: for [`PieceLayout`](super::super::PieceLayout).
    ///
    /// # Errors
    /// As for [`new`](Self::new); a parameter that is read as two types.
    pub fn elements(info: &DeviceInfo, graph: &Graph, shape: BatchShape) -> Result<Vec<Element>> {
        let executor = Self::new(&Device::planned(info.clone()), graph, shape, &|_| 0.0)?;
        let mut asked = executor.memory.asked.into_inner().unwrap_or_else(PoisonError::into_inner);
        asked.resize(graph.params().len(), [false; 2]);
        let one = |(param, asked): (&ParamSpec, &[bool; 2])| match asked {
            [true, true] => Err(Error::failure(format!(
                "{} is read in bf16 and in f32, which no piece holds; use one rank",
                param.name
            ))),
            [_, true] => Ok(Element::F32),
            _ => Ok(Element::Bf16),
        };
        graph.params().iter().zip(&asked).map(one).collect()
    }

    fn build(
        device: &Device,
        graph: &Graph,
        shape: BatchShape,
        batches: usize,
        source: Source,
        stream: Arc<Stream>,
        beside: Option<&Self>,
    ) -> Result<Self> {
        let graph = fused(graph);
        let plan = Plan::new(&graph);
        let params = match source {
            Source::Whole(params, grads) => {
                params.layout().check(&graph)?;
                ParamMemory::Whole(params, grads)
            }
            Source::Axis(axis) => {
                axis.params.layout().params().check(&graph)?;
                let shared = beside.and_then(|beside| beside.memory.params.gathered());
                ParamMemory::Gathered(Box::new(Gathered::new(
                    device,
                    &graph,
                    &plan,
                    shape.tokens,
                    axis,
                    shared,
                )?))
            }
        };
        let layout = ArenaPlan::new(&graph, &plan);
        let room = |bytes: usize, shared: Option<&Buffer<u8>>| match shared {
            Some(shared) if shared.len() >= bytes => shared.view(0..bytes),
            _ => device.alloc(bytes),
        };
        let memory = Memory {
            activations: room(layout.bytes, beside.map(|beside| &beside.memory.activations))?,
            device: device.clone(),
            shape,
            texts: shape.texts.map(|_| shape.of_modality(Modality::Texts)).transpose()?,
            layout,
            params,
            asked: Mutex::default(),
        };
        let mut needs = Needs::default();
        let modalities: Vec<Modality> =
            plan.order.iter().map(|&index| graph.modality(&graph.nodes[index])).collect();
        if modalities.contains(&Modality::Texts) {
            shape.of_modality(Modality::Texts)?;
        }
        let mut launches = Vec::with_capacity(plan.order.len());
        for (at, (&index, read)) in plan.order.iter().zip(&plan.read).enumerate() {
            let node = &graph.nodes[index];
            let mut site = Site { memory: &memory, graph: &graph, node, at, read, needs: &mut needs };
            launches.push(node.op.prepare(&mut site)?);
        }
        let schedule = |(modality, limits): &_| {
            let shape = shape.of_modality(*modality)?;
            let schedule = Schedule::new(device, *limits, shape.tokens, shape.slots)?;
            Ok(schedule.with_longest(shape.image_rows))
        };
        let rates: Vec<DropPathRate> = needs.rates.iter().map(|rate| DropPathRate::new(*rate)).collect();
        Ok(Self {
            batches: (0..batches)
                .map(|_| DeviceBatch::new(device, shape, graph.shard()))
                .collect::<Result<_>>()?,
            workspace: room(needs.workspace, beside.map(|beside| &beside.workspace))?,
            modalities,
            scheduled: needs.schedules.iter().map(|(modality, _)| *modality).collect(),
            schedules: needs.schedules.iter().map(schedule).collect::<Result<_>>()?,
            keep: device.alloc(rates.len() * shape.tokens)?,
            own_keep: match graph.shard().is_part() {
                true => Some(device.alloc(rates.len() * (shape.tokens / graph.shard().size))?),
                false => None,
            },
            rates: device.upload(&rates)?,
            accumulate: device.upload(&[1])?,
            rank: device.zeros(shape.slots)?,
            label_fault: device.zeros(1)?,
            squares: device.zeros(needs.square_sums)?,
            squared: needs.squared,
            stream,
            launches,
            order: plan.order,
            memory,
            graph,
        })
    }
}
