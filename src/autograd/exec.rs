//! Runs a recorded step on the CPU device.
//!
//! Parameters and their gradients are in a [`ParamStore`]: whole vectors for one rank, or what the data axis
//! shares out, which is gathered when it is needed (`crate::parallel::zero`).

use std::collections::HashMap;
use std::time::Instant;

use super::graph::{Extent, Graph, Kind, Tensor, TensorInfo};
use super::op::{Args, Io, StepState, Workload};
use super::plan::Plan;
use crate::cpu::gemm::bf16;
use crate::cpu::real::Real;
use crate::data::batch::PackedBatch;
use crate::error::Result;
use crate::parallel::Group;
use crate::recipe::MatmulKind;

/// Wraps generic arguments into [`Io`].
pub trait Precision: Real {
    /// The variant of this precision.
    fn io(args: Args<'_, Self>) -> Io<'_>;
}

impl Precision for f32 {
    fn io(args: Args<'_, Self>) -> Io<'_> {
        Io::F32(args)
    }
}

impl Precision for f64 {
    fn io(args: Args<'_, Self>) -> Io<'_> {
        Io::F64(args)
    }
}

/// Where a run finds parameters and leaves gradients, both in the order of [`Graph::params`].
pub trait ParamStore<R> {
    /// Called before node `at` of the plan's order.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    fn before(&mut self, at: usize) -> Result<()>;

    /// Elements of parameter `p`.
    fn param(&self, p: usize) -> &[R];

    /// The accumulator of the gradient of parameter `p`, until it is put back.
    fn take_grad(&mut self, p: usize) -> Vec<R>;

    /// Puts it back.
    fn put_grad(&mut self, p: usize, grad: Vec<R>);

    /// Called after node `at` of the plan's order.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    fn after(&mut self, at: usize) -> Result<()>;
}

/// All parameters, and gradients that are added to; none for a forward pass.
pub struct WholeStore<'a, R> {
    /// In the order of [`Graph::params`].
    pub params: &'a [Vec<R>],
    /// The same.
    pub grads: &'a mut [Vec<R>],
}

impl<R> ParamStore<R> for WholeStore<'_, R> {
    fn before(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn param(&self, p: usize) -> &[R] {
        &self.params[p]
    }

    fn take_grad(&mut self, p: usize) -> Vec<R> {
        std::mem::take(&mut self.grads[p])
    }

    fn put_grad(&mut self, p: usize, grad: Vec<R>) {
        self.grads[p] = grad;
    }

    fn after(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
}

/// What a run has beside the batch: parameters, and the ranks that compute with it.
pub struct Rank<'a, R> {
    /// Parameters and gradients.
    pub store: &'a mut dyn ParamStore<R>,
    /// The tensor axis, for a graph of a part of a model.
    pub tensor: Option<&'a Group>,
}

/// Whether a pooled buffer of this capacity may hold `len` elements: it does not waste half of itself.
pub(crate) fn serves(capacity: usize, len: usize) -> bool {
    capacity >= len && capacity <= 2 * len.max(64)
}

/// Values of a graph's tensors on the CPU. Buffers of activations whose last use has passed go to
/// a pool, from which later results and later steps draw.
#[derive(Debug)]
pub struct CpuExecutor<R> {
    values: Vec<Option<Vec<R>>>,
    pool: Vec<Vec<R>>,
    matmul: MatmulKind,
    /// When each node of the newest runs began and ended, where that is recorded.
    times: Option<Vec<[Instant; 2]>>,
}

impl<R: Precision> Default for CpuExecutor<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: Precision> CpuExecutor<R> {
    /// An executor without buffers, whose matrix products are of its own precision.
    pub fn new() -> Self {
        Self::with_products(MatmulKind::F32)
    }

    /// The same with products of f32 in this precision; what else runs in the process meanwhile has it too
    /// ([`bf16::InUse`]).
    pub fn with_products(matmul: MatmulKind) -> Self {
        Self { values: Vec::new(), pool: Vec::new(), matmul, times: None }
    }

    /// Records from now on when nodes begin and end.
    pub fn record_times(&mut self) {
        self.times = Some(Vec::new());
    }

    /// When each node that has run since [`record_times`](Self::record_times) began and ended, in the order of the plan; ends
    /// the recording.
    pub fn take_times(&mut self) -> Vec<[Instant; 2]> {
        self.times.take().unwrap_or_default()
    }

    /// Runs the planned nodes. `params` and `grads` are in the order of [`Graph::params`];
    /// gradients are added to. `feeds` are the values of input tensors.
    ///
    /// # Panics
    /// If a feed is missing or has another size, or the graph is of one of several ranks: a bug of the caller, not
    /// of a user.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &mut self,
        graph: &Graph,
        plan: &Plan,
        params: &[Vec<R>],
        grads: &mut [Vec<R>],
        feeds: &HashMap<Tensor, Vec<R>>,
        batch: &PackedBatch,
        step: &StepState,
    ) {
        let rank = Rank { store: &mut WholeStore { params, grads }, tensor: None };
        self.run_rank(graph, plan, rank, feeds, batch, step).expect("one rank waits for nobody");
    }

    /// The same on one of several ranks, all of which call it.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    ///
    /// # Panics
    /// As [`run`](Self::run); if the graph is of a part of a model and there is no group.
    pub fn run_rank(
        &mut self,
        graph: &Graph,
        plan: &Plan,
        rank: Rank<'_, R>,
        feeds: &HashMap<Tensor, Vec<R>>,
        batch: &PackedBatch,
        step: &StepState,
    ) -> Result<()> {
        let _bf16 = (self.matmul == MatmulKind::Bf16).then(bf16::InUse::begin);
        let Rank { store, tensor } = rank;
        for value in self.values.drain(..).flatten() {
            self.pool.push(value);
        }
        self.values.resize_with(graph.tensors.len(), || None);
        let live_rows = |info: &TensorInfo| match info.extent {
            Extent::Fixed => info.rows,
            Extent::Tokens => batch.of(info.modality).live_tokens(),
            Extent::Images => batch.images,
            Extent::Shard(shard) => shard.live(batch.live_tokens(), info.rows),
        };

        let work = Workload::of(batch);
        for (at, &index) in plan.order.iter().enumerate() {
            let begun = self.times.is_some().then(Instant::now);
            store.before(at)?;
            let node = &graph.nodes[index];
            let together = node.op.communicates();
            // Ranks have other numbers of live rows, and what they exchange is alike.
            let rows_of = |info: &TensorInfo| if together { info.rows } else { live_rows(info) };
            let moved = node.op.in_place() && plan.last_use_of_first[at];

            // Results leave their slots while the node runs, so that operands can be borrowed.
            let mut buffers: Vec<Option<Vec<R>>> = Vec::with_capacity(node.outputs.len());
            for (i, output) in node.outputs.iter().enumerate() {
                buffers.push(output.filter(|_| plan.read[at][i]).map(|tensor| {
                    let info = graph.info(tensor);
                    match info.kind {
                        Kind::Gradient(p) => store.take_grad(p),
                        _ if i == 0 && moved => {
                            self.values[node.input(0).0].take().expect("operand 0 was computed")
                        }
                        _ => self.take_buffer(info.len()),
                    }
                }));
            }
            if node.op.in_place()
                && !moved
                && let Some(Some(buffer)) = buffers.first_mut()
            {
                buffer.copy_from_slice(self.value_or(graph, store, feeds, node.input(0)));
            }

            let inputs = node
                .inputs
                .iter()
                .enumerate()
                .map(|(i, input)| {
                    let tensor = (*input)?;
                    let info = graph.info(tensor);
                    let rows = rows_of(info);
                    if i == 0 && node.op.in_place() {
                        return Some((&[][..], rows, info.cols));
                    }
                    let data = self.value_or(graph, store, feeds, tensor);
                    Some((&data[..rows * info.cols], rows, info.cols))
                })
                .collect();
            let outputs = buffers
                .iter_mut()
                .zip(&node.outputs)
                .map(|(buffer, output)| {
                    let info = graph.info((*output)?);
                    let rows = rows_of(info);
                    let (live, tail) = buffer.as_mut()?.split_at_mut(rows * info.cols);
                    tail.fill(R::ZERO);
                    Some((live, rows, info.cols))
                })
                .collect();
            let batch = batch.of(graph.modality(node));
            let io = R::io(Args { inputs, outputs, batch, step });
            if together {
                node.op
                    .communicate(io, tensor.expect("a part of a model runs with the group of the others"))?;
                for (buffer, output) in buffers.iter_mut().zip(&node.outputs) {
                    if let (Some(buffer), Some(tensor)) = (buffer, output) {
                        let info = graph.info(*tensor);
                        buffer[live_rows(info) * info.cols..].fill(R::ZERO);
                    }
                }
            } else {
                node.op.run(io);
                if let Some(group) = tensor.filter(|group| group.clock().is_some()) {
                    group.work(graph.node_flops(node, &work));
                }
            }

            for (buffer, output) in buffers.into_iter().zip(&node.outputs) {
                if let (Some(buffer), Some(tensor)) = (buffer, output) {
                    match graph.info(*tensor).kind {
                        Kind::Gradient(p) => store.put_grad(p, buffer),
                        _ => self.values[tensor.0] = Some(buffer),
                    }
                }
            }
            for tensor in &plan.free_after[at] {
                if let Some(buffer) = self.values[tensor.0].take() {
                    self.pool.push(buffer);
                }
            }
            store.after(at)?;
            if let (Some(times), Some(begun)) = (&mut self.times, begun) {
                times.push([begun, Instant::now()]);
            }
        }
        Ok(())
    }

    /// Value of a kept tensor after a run, all rows.
    ///
    /// # Panics
    /// If the tensor was not kept.
    pub fn value(&self, tensor: Tensor) -> &[R] {
        self.values[tensor.0].as_deref().expect("the tensor was kept with Graph::keep")
    }

    fn value_or<'a>(
        &'a self,
        graph: &Graph,
        store: &'a dyn ParamStore<R>,
        feeds: &'a HashMap<Tensor, Vec<R>>,
        tensor: Tensor,
    ) -> &'a [R] {
        match graph.info(tensor).kind {
            Kind::Parameter(p) => store.param(p),
            Kind::Input => feeds.get(&tensor).expect("every input tensor is fed"),
            _ => self.values[tensor.0].as_deref().expect("operand was computed"),
        }
    }

    /// The smallest pooled buffer that holds `len` without wasting half of itself, or a new one.
    fn take_buffer(&mut self, len: usize) -> Vec<R> {
        let fit = self
            .pool
            .iter()
            .enumerate()
            .filter(|(_, b)| serves(b.capacity(), len))
            .min_by_key(|(_, b)| b.capacity())
            .map(|(i, _)| i);
        let mut buffer = fit.map(|i| self.pool.swap_remove(i)).unwrap_or_default();
        buffer.resize(len, R::ZERO);
        buffer
    }
}
