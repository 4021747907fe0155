//! Prepares a recorded graph for a device and runs it step by step.

use half::bf16;

use super::super::graph::{Graph, Kind, ParamSpec, Tensor};
use super::super::op::StepState;
use super::super::plan::Plan;
use super::batch::{BatchShape, DeviceBatch};
use super::fuse::fused;
use super::layout::{ArenaPlan, Element, ROW_UNIT};
use super::params::ParamLayout;
use super::site::{Launch, Memory, Needs, Site, Step};
use crate::data::batch::PackedBatch;
use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::kernels::attention::Schedule;
use crate::kernels::residual::{DropPath, DropPathKeys, DropPathRate};
use crate::kernels::{loss, optim};

/// A recorded graph on a device: memory, launches, parameters and their gradients.
pub struct DeviceExecutor {
    graph: Graph,
    memory: Memory,
    launches: Vec<Launch>,
    batch: DeviceBatch,
    workspace: Buffer<u8>,
    schedules: Vec<Schedule>,
    rates: Buffer<DropPathRate>,
    keep: Buffer<f32>,
    accumulate: Buffer<i32>,
    rank: Buffer<i32>,
    label_fault: Buffer<i32>,
    stream: Stream,
}

impl DeviceExecutor {
    /// Lays out memory for `graph` and batches of `shape`, and prepares every op. `decay` is the weight decay of
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
        let graph = fused(graph);
        let plan = Plan::new(&graph);
        let layout = ArenaPlan::new(&graph, &plan);
        let params = ParamLayout::new(&graph, decay)?;
        let len = params.arena().len();
        let memory = Memory {
            activations: device.alloc(layout.bytes)?,
            master: device.zeros(len)?,
            weights: device.zeros::<bf16>(len)?,
            grads: device.zeros(len)?,
            device: device.clone(),
            shape,
            layout,
            params,
        };
        let mut needs = Needs::default();
        let mut launches = Vec::with_capacity(plan.order.len());
        for (&index, read) in plan.order.iter().zip(&plan.read) {
            let node = &graph.nodes[index];
            let mut site = Site { memory: &memory, graph: &graph, node, read, needs: &mut needs };
            launches.push(node.op.prepare(&mut site)?);
        }
        let schedule = |limits: &_| Schedule::new(device, *limits, shape.tokens, shape.slots);
        let rates: Vec<DropPathRate> = needs.rates.iter().map(|rate| DropPathRate::new(*rate)).collect();
        Ok(Self {
            batch: DeviceBatch::new(device, shape)?,
            workspace: device.alloc(needs.workspace)?,
            schedules: needs.schedules.iter().map(schedule).collect::<Result<_>>()?,
            keep: device.alloc(rates.len() * shape.tokens)?,
            rates: device.upload(&rates)?,
            accumulate: device.upload(&[1])?,
            rank: device.zeros(shape.slots)?,
            label_fault: device.zeros(1)?,
            stream: device.stream()?,
            launches,
            memory,
            graph,
        })
    }

    /// The graph as it runs: what the device does in one launch is one node.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Where activations lie.
    pub fn layout(&self) -> &ArenaPlan {
        &self.memory.layout
    }

    /// How parameters and gradients lie.
    pub fn params(&self) -> &ParamLayout {
        &self.memory.params
    }

    /// The arena of the parameters.
    pub fn master(&self) -> &Buffer<f32> {
        &self.memory.master
    }

    /// The arena of their copies in bf16, which the products read: whoever changes [`master`](Self::master) by
    /// other means than [`write_params`](Self::write_params) keeps it up to date.
    pub fn weights(&self) -> &Buffer<bf16> {
        &self.memory.weights
    }

    /// The arena of the gradients.
    pub fn grads(&self) -> &Buffer<f32> {
        &self.memory.grads
    }

    /// Bytes that all launches share.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.len()
    }

    /// The stream that everything is queued on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Replaces the parameters by dense values, in the order of [`Graph::params`].
    ///
    /// # Errors
    /// Other numbers of elements; a failed device.
    pub fn write_params(&mut self, params: &[Vec<f32>]) -> Result<()> {
        self.memory.master.write(&self.stream, &self.memory.params.pack(params)?)?;
        optim::cast(&self.stream, &self.memory.weights, &self.memory.master, None)
    }

    /// The parameters, dense, in the order of [`Graph::params`], once everything queued has run.
    ///
    /// # Errors
    /// A failed device.
    pub fn read_params(&self) -> Result<Vec<Vec<f32>>> {
        self.stream.synchronize()?;
        Ok(self.memory.params.unpack(&self.memory.master.download()?))
    }

    /// The gradients, dense, in the order of [`Graph::params`], once everything queued has run.
    ///
    /// # Errors
    /// A failed device.
    pub fn read_grads(&self) -> Result<Vec<Vec<f32>>> {
        self.stream.synchronize()?;
        Ok(self.memory.params.unpack(&self.memory.grads.download()?))
    }

    /// Queues the copy of a batch to the device.
    ///
    /// # Errors
    /// A batch of another shape; a failed device.
    pub fn write_batch(&mut self, batch: &PackedBatch, step: &StepState) -> Result<()> {
        self.batch.write(&self.stream, batch, step)
    }

    /// Queues zeros for all gradients: before the first batch of a step.
    ///
    /// # Errors
    /// A failed device.
    pub fn zero_grads(&self) -> Result<()> {
        optim::zero(&self.stream, &self.memory.grads)
    }

    /// Queues the recorded nodes over the batch that was written last; gradients are added to. It only launches
    /// kernels, so it can be captured.
    ///
    /// # Errors
    /// What a launch refuses; a failed device.
    pub fn launch(&self) -> Result<()> {
        let step = Step {
            stream: &self.stream,
            batch: &self.batch,
            workspace: &self.workspace,
            accumulate: &self.accumulate,
            rank: &self.rank,
            label_fault: &self.label_fault,
            schedules: &self.schedules,
            keep: &self.keep,
        };
        for schedule in &self.schedules {
            let host = Some(&self.batch.host_cu_seqlens[..]);
            schedule.launch(&self.stream, &self.batch.cu_seqlens, host)?;
        }
        let branches = self.rates.len();
        if branches > 0 {
            let keys = DropPathKeys {
                seed: &self.batch.seed,
                epochs: &self.batch.epochs,
                sample_ids: &self.batch.sample_ids,
            };
            DropPath { tokens: self.memory.shape.tokens, branches }.keep(
                &self.stream,
                step.packed(),
                &self.keep,
                &self.rates,
                keys,
            )?;
        }
        self.launches.iter().try_for_each(|launch| launch(&step))
    }

    /// `[N]`, written by the loss: how many classes are ahead of the target's (0: recognised), −1 at weight 0.
    pub fn rank(&self) -> &Buffer<i32> {
        &self.rank
    }

    /// Waits for everything queued, and tells what the kernels found wrong with the batches so far.
    ///
    /// # Errors
    /// A label that is no class, a `cu_seqlens` that is none; a failed device.
    pub fn check(&self) -> Result<()> {
        self.stream.synchronize()?;
        loss::fault(self.label_fault.download()?.first().copied().unwrap_or(0))?;
        self.schedules.iter().try_for_each(Schedule::check)
    }

    /// Value of a kept tensor after a run, all rows, without padding.
    ///
    /// # Errors
    /// The tensor was not kept; a failed device.
    pub fn value(&self, tensor: Tensor) -> Result<Vec<f32>> {
        self.stream.synchronize()?;
        let info = self.graph.info(tensor);
        if info.kind != Kind::Activation || !self.graph.kept.contains(&tensor) {
            return Err(Error::failure(format!("{} was not kept, so its value is gone", info.name)));
        }
        if self.memory.layout.elements[tensor.0] == Element::F32 {
            return self.memory.vector(&self.graph, tensor)?.download();
        }
        let values = self.memory.matrix(&self.graph, tensor)?.buffer.download()?;
        let rows = values.chunks_exact(info.cols.next_multiple_of(ROW_UNIT));
        Ok(rows.flat_map(|row| row[..info.cols].iter().map(|x| x.to_f32())).collect())
    }
}
