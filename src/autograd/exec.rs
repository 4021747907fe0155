//! Runs a recorded step on the CPU device.

use std::collections::HashMap;

use super::graph::{Extent, Graph, Kind, Tensor, TensorInfo};
use super::op::{Args, Io, StepState};
use super::plan::Plan;
use crate::cpu::real::Real;
use crate::data::batch::PackedBatch;

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

/// Values of a graph's tensors on the CPU. Buffers of activations whose last use has passed go to
/// a pool, from which later results and later steps draw.
#[derive(Debug, Default)]
pub struct CpuExecutor<R> {
    values: Vec<Option<Vec<R>>>,
    pool: Vec<Vec<R>>,
}

impl<R: Precision> CpuExecutor<R> {
    /// An executor without buffers.
    pub fn new() -> Self {
        Self { values: Vec::new(), pool: Vec::new() }
    }

    /// Runs the planned nodes. `params` and `grads` are in the order of [`Graph::params`];
    /// gradients are added to. `feeds` are the values of input tensors.
    ///
    /// # Panics
    /// If a feed is missing or has another size: a bug of the caller, not of a user.
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
        for value in self.values.drain(..).flatten() {
            self.pool.push(value);
        }
        self.values.resize_with(graph.tensors.len(), || None);
        let live_rows = |info: &TensorInfo| match info.extent {
            Extent::Fixed => info.rows,
            Extent::Tokens => batch.live_tokens(),
            Extent::Images => batch.images,
        };

        for (at, &index) in plan.order.iter().enumerate() {
            let node = &graph.nodes[index];
            let moved = node.op.in_place() && plan.last_use_of_first[at];

            // Results leave their slots while the node runs, so that operands can be borrowed.
            let mut buffers: Vec<Option<Vec<R>>> = Vec::with_capacity(node.outputs.len());
            for (i, output) in node.outputs.iter().enumerate() {
                buffers.push(output.filter(|_| plan.read[at][i]).map(|tensor| {
                    let info = graph.info(tensor);
                    match info.kind {
                        Kind::Gradient(p) => std::mem::take(&mut grads[p]),
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
                buffer.copy_from_slice(self.value_or(graph, params, feeds, node.input(0)));
            }

            let inputs = node
                .inputs
                .iter()
                .enumerate()
                .map(|(i, input)| {
                    let tensor = (*input)?;
                    let info = graph.info(tensor);
                    let rows = live_rows(info);
                    if i == 0 && node.op.in_place() {
                        return Some((&[][..], rows, info.cols));
                    }
                    let data = self.value_or(graph, params, feeds, tensor);
                    Some((&data[..rows * info.cols], rows, info.cols))
                })
                .collect();
            let outputs = buffers
                .iter_mut()
                .zip(&node.outputs)
                .map(|(buffer, output)| {
                    let info = graph.info((*output)?);
                    let rows = live_rows(info);
                    let (live, tail) = buffer.as_mut()?.split_at_mut(rows * info.cols);
                    tail.fill(R::ZERO);
                    Some((live, rows, info.cols))
                })
                .collect();
            node.op.run(R::io(Args { inputs, outputs, batch, step }));

            for (buffer, output) in buffers.into_iter().zip(&node.outputs) {
                if let (Some(buffer), Some(tensor)) = (buffer, output) {
                    match graph.info(*tensor).kind {
                        Kind::Gradient(p) => grads[p] = buffer,
                        _ => self.values[tensor.0] = Some(buffer),
                    }
                }
            }
            for tensor in &plan.free_after[at] {
                if let Some(buffer) = self.values[tensor.0].take() {
                    self.pool.push(buffer);
                }
            }
        }
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
        params: &'a [Vec<R>],
        feeds: &'a HashMap<Tensor, Vec<R>>,
        tensor: Tensor,
    ) -> &'a [R] {
        match graph.info(tensor).kind {
            Kind::Parameter(p) => &params[p],
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
            .filter(|(_, b)| b.capacity() >= len && b.capacity() <= 2 * len.max(64))
            .min_by_key(|(_, b)| b.capacity())
            .map(|(i, _)| i);
        let mut buffer = fit.map(|i| self.pool.swap_remove(i)).unwrap_or_default();
        buffer.resize(len, R::ZERO);
        buffer
    }
}
