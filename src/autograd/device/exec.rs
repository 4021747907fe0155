//! Prepares a recorded graph for a device and runs it step by step.

mod build;

use std::sync::Arc;

use super::super::graph::{Graph, Kind, Modality, Node, Tensor, TensorInfo};
use super::super::op::StepState;
use super::batch::DeviceBatch;
use super::gathered::Gathered;
use super::layout::{ArenaPlan, Element, ROW_UNIT};
use super::memory::{Memory, ParamMemory};
use super::params::DeviceParams;
use super::site::{Launch, Step};
use crate::data::batch::PackedBatch;
use crate::device::{Buffer, Stream};
use crate::error::{Error, Result};
use crate::kernels::attention::Schedule;
use crate::kernels::residual::{DropPath, DropPathKeys, DropPathRate};
use crate::kernels::{loss, optim};

/// A recorded graph on a device: memory, launches, parameters and their gradients.
pub struct DeviceExecutor {
    graph: Graph,
    memory: Memory,
    launches: Vec<Launch>,
    /// The node of each launch.
    order: Vec<usize>,
    batches: Vec<DeviceBatch>,
    workspace: Buffer<u8>,
    /// Whose batch each launch is over.
    modalities: Vec<Modality>,
    schedules: Vec<Schedule>,
    /// Whose batch each schedule is of.
    scheduled: Vec<Modality>,
    rates: Buffer<DropPathRate>,
    /// `[branches, T]` factors of stochastic depth.
    keep: Buffer<f32>,
    /// Those of the tokens that the tensor axis leaves to this rank, where it does.
    own_keep: Option<Buffer<f32>>,
    accumulate: Buffer<i32>,
    /// Sums of squares of the gradients of the parameters `squared`.
    squares: Buffer<f64>,
    squared: Vec<usize>,
    rank: Buffer<i32>,
    label_fault: Buffer<i32>,
    stream: Arc<Stream>,
}

impl DeviceExecutor {
    /// The graph as it runs: what the device does in one launch is one node.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Where activations lie.
    pub fn layout(&self) -> &ArenaPlan {
        &self.memory.layout
    }

    /// The parameters.
    ///
    /// # Panics
    /// If they are with the data axis: a bug of the caller, not of a user.
    pub fn params(&self) -> &Arc<DeviceParams> {
        self.whole().0
    }

    /// The arena of the gradients, laid out as the parameters.
    ///
    /// # Panics
    /// As [`params`](Self::params).
    pub fn grads(&self) -> &Buffer<f32> {
        self.whole().1
    }

    /// The parameters whose gradients come with their squares, and sums of these, written with the gradients: all together
    /// they are the square of the norm of those.
    pub fn squares(&self) -> (&[usize], &Buffer<f64>) {
        (&self.squared, &self.squares)
    }

    fn whole(&self) -> (&Arc<DeviceParams>, &Buffer<f32>) {
        match &self.memory.params {
            ParamMemory::Whole(params, grads) => (params, grads),
            ParamMemory::Gathered(_) => panic!("the data axis shares out the parameters of this executor"),
        }
    }

    /// Bytes of parameters that are gathered and of gradients that are not summed yet; none where one rank has all.
    pub fn gathered_bytes(&self) -> [usize; 2] {
        self.memory.params.gathered().map_or([0; 2], Gathered::bytes)
    }

    /// Bytes of the batches.
    pub fn batch_bytes(&self) -> usize {
        self.batches.iter().map(DeviceBatch::bytes).sum()
    }

    /// Bytes that all launches share.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.len()
    }

    /// The stream that everything is queued on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Waits until everything queued has run; of several ranks no longer than all live.
    fn synchronize(&self) -> Result<()> {
        match self.memory.params.gathered() {
            Some(gathered) => gathered.synchronize(&self.stream),
            None => self.stream.synchronize(),
        }
    }

    /// The gradients, dense, in the order of [`Graph::params`], once everything queued has run.
    ///
    /// # Errors
    /// A failed device.
    pub fn read_grads(&self) -> Result<Vec<Vec<f32>>> {
        self.synchronize()?;
        let (params, grads) = self.whole();
        Ok(params.layout().unpack(&grads.download()?))
    }

    /// Queues on `stream` the copy of a batch to place `at`. On another stream than that of this executor it runs
    /// beside the other batches; the caller lets each stream wait for the other.
    ///
    /// # Errors
    /// A batch of another shape; a failed device.
    pub fn write_batch(
        &mut self,
        at: usize,
        stream: &Stream,
        batch: &PackedBatch,
        step: &StepState,
    ) -> Result<()> {
        self.batches[at].write(stream, batch, step)
    }

    /// [`write_batch`](Self::write_batch) of the first batch, in the order of everything else.
    ///
    /// # Errors
    /// As for [`write_batch`](Self::write_batch).
    pub fn write(&mut self, batch: &PackedBatch, step: &StepState) -> Result<()> {
        let stream = self.stream.clone();
        self.write_batch(0, &stream, batch, step)
    }

    /// Queues zeros for all gradients: before the first batch of a step.
    ///
    /// # Errors
    /// A failed device.
    pub fn zero_grads(&self) -> Result<()> {
        optim::zero(&self.stream, self.grads(), None)
    }

    /// Queues the recorded nodes over the batch at place `at`; gradients are added to. It only launches kernels,
    /// so it can be captured.
    ///
    /// # Errors
    /// What a launch refuses; a failed device.
    pub fn launch(&self, at: usize) -> Result<()> {
        self.launch_tables(at)?;
        let Some(gathered) = self.memory.params.gathered() else {
            return (0..self.launches.len()).try_for_each(|node| self.launch_node(at, node));
        };
        for node in 0..self.launches.len() {
            gathered.before(node, &self.stream)?;
            self.launch_node(at, node)?;
            gathered.after(node, &self.stream)?;
        }
        gathered.finish(&self.stream)
    }

    /// The first part of [`launch`](Self::launch): what nodes share, the work lists of attention and the factors of
    /// stochastic depth.
    ///
    /// # Errors
    /// As for [`launch`](Self::launch).
    pub fn launch_tables(&self, at: usize) -> Result<()> {
        let (step, batch) = (self.step(at, Modality::Images), &self.batches[at]);
        for (schedule, modality) in self.schedules.iter().zip(&self.scheduled) {
            let batch = batch.of(*modality);
            let host = Some(&batch.host_cu_seqlens[..]);
            schedule.launch(&self.stream, &batch.cu_seqlens, host)?;
        }
        let branches = self.rates.len();
        if branches > 0 {
            let keys =
                DropPathKeys { seed: &batch.seed, epochs: &batch.epochs, sample_ids: &batch.sample_ids };
            DropPath { tokens: self.memory.shape.tokens, branches }.keep(
                &self.stream,
                step.packed(),
                &self.keep,
                &self.rates,
                keys,
            )?;
            if let Some(own_keep) = &self.own_keep {
                let (shard, tokens) = (self.graph.shard(), self.memory.shape.tokens);
                let rows = tokens / shard.size;
                let row_bytes = |row: usize| row * size_of::<f32>();
                for branch in 0..branches {
                    let (from, to) = (branch * tokens + shard.rank * rows, branch * rows);
                    let from = self.keep.view::<f32>(row_bytes(from)..row_bytes(from + rows))?;
                    let to = own_keep.view::<f32>(row_bytes(to)..row_bytes(to + rows))?;
                    to.copy_from(&self.stream, &from)?;
                }
            }
        }
        Ok(())
    }

    /// One node of [`launch`](Self::launch) by itself, by its place in [`launched`](Self::launched): for measuring.
    ///
    /// # Errors
    /// As for [`launch`](Self::launch).
    pub fn launch_node(&self, at: usize, node: usize) -> Result<()> {
        self.launches[node](&self.step(at, self.modalities[node]))
    }

    /// The nodes that [`launch`](Self::launch) queues, in order.
    pub fn launched(&self) -> impl ExactSizeIterator<Item = &Node> {
        self.order.iter().map(|&node| &self.graph.nodes[node])
    }

    fn step(&self, at: usize, modality: Modality) -> Step<'_> {
        Step {
            stream: &self.stream,
            batch: self.batches[at].of(modality),
            workspace: &self.workspace,
            accumulate: &self.accumulate,
            squares: &self.squares,
            rank: &self.rank,
            label_fault: &self.label_fault,
            schedules: &self.schedules,
            tensor: self.memory.params.gathered().and_then(Gathered::tensor),
            ring: self.memory.params.gathered().and_then(Gathered::ring),
            keep: self.own_keep.as_ref().unwrap_or(&self.keep),
        }
    }

    /// `[N]`, written by the loss: how many classes, or texts, are ahead of the image's own (0: recognised), −1 at
    /// weight 0.
    pub fn rank(&self) -> &Buffer<i32> {
        &self.rank
    }

    /// Waits for everything queued, and tells what the kernels found wrong with the batches so far.
    ///
    /// # Errors
    /// A label that is no class, a `cu_seqlens` that is none; a failed device.
    pub fn check(&self) -> Result<()> {
        self.synchronize()?;
        loss::fault(self.label_fault.download()?.first().copied().unwrap_or(0))?;
        self.schedules.iter().try_for_each(Schedule::check)
    }

    /// One word, set where a label is no class; [`loss::fault`] explains it.
    pub fn label_fault(&self) -> &Buffer<i32> {
        &self.label_fault
    }

    fn kept(&self, tensor: Tensor) -> Result<&TensorInfo> {
        let info = self.graph.info(tensor);
        if info.kind != Kind::Activation || !self.graph.kept.contains(&tensor) {
            return Err(Error::failure(format!("{} was not kept, so its value is gone", info.name)));
        }
        Ok(info)
    }

    /// The memory of a kept tensor that is f32 on a device, such as the losses.
    ///
    /// # Errors
    /// It was not kept, or is of another type.
    pub fn kept_f32(&self, tensor: Tensor) -> Result<Buffer<f32>> {
        self.kept(tensor)?;
        self.memory.vector(&self.graph, tensor, 0)
    }

    /// Value of a kept tensor after a run, all rows, without padding.
    ///
    /// # Errors
    /// The tensor was not kept; a failed device.
    pub fn value(&self, tensor: Tensor) -> Result<Vec<f32>> {
        self.synchronize()?;
        let info = self.kept(tensor)?;
        if self.memory.layout.elements[tensor.0] == Element::F32 {
            return self.kept_f32(tensor)?.download();
        }
        let values = self.memory.matrix(&self.graph, tensor, 0)?.buffer.download()?;
        let rows = values.chunks_exact(info.cols.next_multiple_of(ROW_UNIT));
        Ok(rows.flat_map(|row| row[..info.cols].iter().map(|x| x.to_f32())).collect())
    }
}
