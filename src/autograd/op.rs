//! What an operation must tell: how it runs, what its backward rule is, what it costs.

use std::any::Any;
use std::fmt::Debug;

use super::device::{Element, Launch, Site};
use super::graph::{Extent, Graph, Node, Tensor, TensorInfo};
use crate::cpu::real::Real;
use crate::data::batch::{Modality, PackedBatch};
use crate::error::{Error, Result};
use crate::parallel::Group;

/// What changes from step to step. On a GPU it lives in the device-side step buffer.
#[derive(Clone, Copy, Debug)]
pub struct StepState {
    /// Seed of the run, the key of drop-path.
    pub seed: u64,
    /// Factor on the loss: 1 / (sum of the loss weights of all batches of the step).
    pub loss_scale: f64,
}

impl Default for StepState {
    fn default() -> Self {
        Self { seed: 0, loss_scale: 1.0 }
    }
}

/// How much work a batch is, for FLOP counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Live tokens.
    pub tokens: f64,
    /// Used image slots.
    pub images: f64,
    /// Σ S² over the images.
    pub sum_squared: f64,
    /// Live tokens of the texts, one for each image, and Σ S² over them.
    pub texts: [f64; 2],
}

impl Workload {
    /// The workload of a batch.
    pub fn of(batch: &PackedBatch) -> Self {
        Self {
            tokens: batch.live_tokens() as f64,
            images: batch.images as f64,
            sum_squared: batch.sum_squared_lengths(),
            texts: batch
                .texts
                .as_ref()
                .map_or([0.0; 2], |texts| [texts.live_tokens() as f64, texts.sum_squared_lengths()]),
        }
    }

    /// What a node over the images or the texts has of it.
    pub fn of_modality(&self, modality: Modality) -> Self {
        let [tokens, sum_squared] = self.texts;
        match modality {
            Modality::Images => *self,
            Modality::Texts => Self { tokens, sum_squared, ..*self },
        }
    }

    /// Live rows of a tensor under this workload.
    pub fn rows(&self, info: &TensorInfo) -> f64 {
        match info.extent {
            Extent::Fixed => info.rows as f64,
            Extent::Tokens => self.tokens,
            Extent::Images => self.images,
            Extent::Shard(shard) => self.tokens / shard.size as f64,
        }
    }
}

/// Operands and results of one node while it runs on the CPU device.
pub struct Args<'a, R> {
    pub(crate) inputs: Vec<Option<(&'a [R], usize, usize)>>,
    pub(crate) outputs: Vec<Option<(&'a mut [R], usize, usize)>>,
    /// The batch of the step.
    pub batch: &'a PackedBatch,
    /// The step's scalars.
    pub step: &'a StepState,
}

impl<'a, R: Real> Args<'a, R> {
    /// Live rows of operand `i`, row-major.
    pub fn input(&self, i: usize) -> &'a [R] {
        self.inputs[i].expect("operand is present").0
    }

    /// Operand `i` where it is present.
    pub fn input_opt(&self, i: usize) -> Option<&'a [R]> {
        self.inputs[i].map(|(data, ..)| data)
    }

    /// Live rows and columns of operand `i`.
    pub fn input_shape(&self, i: usize) -> (usize, usize) {
        let (_, rows, cols) = self.inputs[i].expect("operand is present");
        (rows, cols)
    }

    /// Takes result `i`: its live rows, to be written (added to, where it is a parameter's gradient).
    pub fn output(&mut self, i: usize) -> &'a mut [R] {
        self.output_opt(i).expect("result is present")
    }

    /// Takes result `i` where it is wanted.
    pub fn output_opt(&mut self, i: usize) -> Option<&'a mut [R]> {
        self.outputs[i].take().map(|(data, ..)| data)
    }

    /// Live rows and columns of result `i`; ask before taking it.
    pub fn output_shape(&self, i: usize) -> (usize, usize) {
        let (_, rows, cols) = self.outputs[i].as_ref().expect("result is present");
        (*rows, *cols)
    }
}

/// Operands and results of a node on whatever runs it.
pub enum Io<'a> {
    /// CPU device.
    F32(Args<'a, f32>),
    /// Oracle precision, for finite differences.
    F64(Args<'a, f64>),
}

/// Runs the same generic expression for both precisions of the CPU device.
macro_rules! on_cpu {
    ($io:expr, |$args:ident| $body:expr) => {
        match $io {
            $crate::autograd::Io::F32(mut $args) => $body,
            $crate::autograd::Io::F64(mut $args) => $body,
        }
    };
}
pub(crate) use on_cpu;

/// An operation of the graph.
pub trait Op: Any + Debug + Send + Sync {
    /// Name for printing.
    fn name(&self) -> &'static str;

    /// Computes the results. Only live rows are passed; the executor writes zeros to the others.
    fn run(&self, io: Io<'_>);

    /// Whether ranks of the tensor axis compute this together: then it runs by [`communicate`](Self::communicate),
    /// and sees all rows.
    fn communicates(&self) -> bool {
        false
    }

    /// Computes the results together with the other ranks of `group`. Rows that are not live are zeros in the
    /// operands; what is written to those of the results is cleared afterwards.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    fn communicate(&self, io: Io<'_>, group: &Group) -> Result<()> {
        let _ = group;
        self.run(io);
        Ok(())
    }

    /// Elements that `rank` of the tensor axis sends when this runs.
    fn sends(&self, graph: &Graph, node: &Node, rank: usize) -> u64 {
        let _ = (graph, node, rank);
        0
    }

    /// Elements that this holds on the CPU while it runs, beside operands and results: for ops that hold much.
    /// `read` tells of each result whether somebody reads it.
    fn scratch(&self, graph: &Graph, node: &Node, read: &[bool]) -> usize {
        let _ = (graph, node, read);
        0
    }

    /// Verifies the operands on a device, asks for what else is needed there, and tells what every step queues.
    ///
    /// # Errors
    /// Sizes that the kernels do not take; by default that there is no kernel.
    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let _ = site;
        Err(Error::failure(format!(
            "{} has no kernel by itself; use --device cpu for this model",
            self.name()
        )))
    }

    /// Type of result `i` on a device.
    fn element(&self, i: usize) -> Element {
        let _ = i;
        Element::Bf16
    }

    /// What rows and columns of a parameter are rounded up to on a device where it is operand `i`; the
    /// padding is zeros.
    fn multiples(&self, i: usize) -> [usize; 2] {
        let _ = i;
        [1, 1]
    }

    /// Result 0 starts as operand 0 (moved where this is its last use, copied otherwise).
    fn in_place(&self) -> bool {
        false
    }

    /// Whether result `i` may be left out where nobody reads it.
    fn optional(&self, i: usize) -> bool {
        let _ = i;
        false
    }

    /// What makes result `i` of `node` again in a pass over memory, from operands and results that the backward pass keeps
    /// in any case: a node with the same result, see [`recompute`](super::recompute). None where it is kept itself.
    fn recompute(&self, node: &Node, i: usize) -> Option<Node> {
        let _ = (node, i);
        None
    }

    /// What result `i` is, for a table of what is held.
    fn result(&self, i: usize) -> &'static str {
        let _ = i;
        self.name()
    }

    /// Records the backward rule. `grads` are the gradients of the results (`None` where nothing
    /// flows back); the answer holds the gradient of each operand. Gradients of parameters that
    /// the rule accumulates itself, through [`Graph::gradient_of`], are `None` in the answer.
    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let _ = (graph, grads);
        vec![None; node.inputs.len()]
    }

    /// Arithmetic in FLOPs; matrix products only, as is usual for model FLOPs.
    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        let _ = (graph, node, work);
        0.0
    }
}

/// The op of a node, where it is a `T`.
pub(super) fn downcast<T: Op>(node: &Node) -> Option<&T> {
    let op: &dyn Any = node.op.as_ref();
    op.downcast_ref()
}
