//! The record: tensors, nodes, parameters.

mod params;
mod render;

use std::sync::Arc;

use super::op::{Op, Workload};
use super::split::{Shard, Split};
pub use crate::data::batch::Modality;
pub use params::{Init, ParamSpec};

/// What the names of the text tower's parameters begin with.
pub const TEXT_PREFIX: &str = "text.";

/// Handle of a tensor in a [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tensor(pub(crate) usize);

/// What the leading dimension of a tensor counts. Rows beyond the live ones are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A constant; all rows are live.
    Fixed,
    /// Token rows `T`; the batch's `cu_seqlens` says how many are live.
    Tokens,
    /// Image slots `N`; the batch says how many are used.
    Images,
    /// Token rows of one rank of the tensor axis, `T/size` of them.
    Shard(Shard),
}

/// Where a tensor's values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Written by the caller before the step.
    Input,
    /// Parameter `i` of [`Graph::params`].
    Parameter(usize),
    /// Gradient of parameter `i`: every node that writes it adds to it.
    Gradient(usize),
    /// Written by a node.
    Activation,
}

/// Shape and role of a tensor. All tensors are row-major matrices.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// For printing.
    pub name: String,
    /// Leading dimension.
    pub rows: usize,
    /// Trailing dimension.
    pub cols: usize,
    /// What the rows count.
    pub extent: Extent,
    /// Of which batch the rows are, where they are tokens or slots.
    pub modality: Modality,
    /// Where the values come from.
    pub kind: Kind,
    /// Whether a gradient is wanted.
    pub requires_grad: bool,
}

impl TensorInfo {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One recorded operation.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is computed.
    pub op: Arc<dyn Op>,
    /// Operands; `None` where an optional one is absent.
    pub inputs: Vec<Option<Tensor>>,
    /// Results; `None` where an optional one is not wanted.
    pub outputs: Vec<Option<Tensor>>,
    /// To which part of a step it belongs.
    pub pass: Pass,
}

/// The parts of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pass {
    /// What the model computes, and the loss.
    #[default]
    Forward,
    /// Rules of the gradients.
    Backward,
    /// What the forward pass has computed already and the backward pass computes again.
    Again,
}

impl Node {
    /// Operand `i`, which must be present.
    pub fn input(&self, i: usize) -> Tensor {
        self.inputs[i].expect("operand of the op is present")
    }

    /// Result `i`, which must be present.
    pub fn output(&self, i: usize) -> Tensor {
        self.outputs[i].expect("result of the op is present")
    }
}

/// Which part of a model is being recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tower {
    /// Of which batch its tokens are; parameters of the text tower are named `text.…`.
    pub modality: Modality,
    /// Whether its parameters stay as they are: no gradient reaches them, and they do not decay.
    pub frozen: bool,
}

/// A recorded computation.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(crate) tensors: Vec<TensorInfo>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) params: Vec<ParamSpec>,
    pub(crate) param_tensors: Vec<Tensor>,
    pub(crate) grad_tensors: Vec<Option<Tensor>>,
    splits: Vec<Split>,
    shard: Shard,
    /// Node ranges whose activations are all recomputed in the backward pass.
    pub(crate) segments: Vec<std::ops::Range<usize>>,
    /// Whether cheap results are recomputed in the backward pass.
    pub(super) selective: bool,
    /// Tensors that outlive the step.
    pub(crate) kept: Vec<Tensor>,
    /// What is being recorded.
    tower: Tower,
    pub(super) pass: Pass,
    open_segment: Option<usize>,
}

impl Graph {
    /// An empty record.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty record of what `shard` of a tensor axis computes.
    pub fn of_shard(shard: Shard) -> Self {
        Self { shard, ..Self::default() }
    }

    /// What the tensor axis leaves to this rank.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// How parameter `p` is shared out over the tensor axis.
    pub fn split(&self, p: usize) -> Split {
        self.splits[p]
    }

    /// Number of elements of parameter `p` that this rank's part has.
    pub fn local_len(&self, p: usize) -> usize {
        self.info(self.param_tensors[p]).len()
    }

    /// The parameters in order of registration, whole.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// The recorded nodes in execution order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Shape and role of `tensor`.
    pub fn info(&self, tensor: Tensor) -> &TensorInfo {
        &self.tensors[tensor.0]
    }

    /// Number of parameter elements.
    pub fn parameter_count(&self) -> usize {
        self.params.iter().map(ParamSpec::len).sum()
    }

    /// Says which part of a model is recorded from here on.
    pub fn begin_tower(&mut self, tower: Tower) {
        self.tower = tower;
    }

    /// Of which batch the tokens or slots of `node` are; of the images where it has none.
    pub fn modality(&self, node: &Node) -> Modality {
        let counted = |tensor: &&Tensor| self.info(**tensor).extent != Extent::Fixed;
        let first = node.outputs.iter().chain(&node.inputs).flatten().find(counted);
        first.map_or(Modality::Images, |tensor| self.info(*tensor).modality)
    }

    fn push(&mut self, info: TensorInfo) -> Tensor {
        self.tensors.push(info);
        Tensor(self.tensors.len() - 1)
    }

    /// Registers a parameter that every rank has. One-dimensional parameters are one row; further dimensions
    /// fold into columns. A name that exists already returns the existing parameter.
    pub fn param(&mut self, spec: ParamSpec) -> Tensor {
        self.param_split(spec, Split::Whole)
    }

    /// The same for one that the tensor axis shares out: `spec` is the whole, the tensor this rank's part.
    pub fn param_split(&mut self, mut spec: ParamSpec, split: Split) -> Tensor {
        let Tower { modality, frozen } = self.tower;
        if modality == Modality::Texts {
            spec.name.insert_str(0, TEXT_PREFIX);
        }
        spec.decay &= !frozen;
        if let Some(i) = self.params.iter().position(|p| p.name == spec.name) {
            assert_eq!(self.params[i].shape, spec.shape, "parameter {} has two shapes", spec.name);
            return self.param_tensors[i];
        }
        let (rows, cols) = match spec.shape.as_slice() {
            [n] => (1, *n),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
            [] => (1, 1),
        };
        let [rows, cols] = split.local([rows, cols], self.shard.size);
        let tensor = self.push(TensorInfo {
            name: spec.name.clone(),
            rows,
            cols,
            extent: Extent::Fixed,
            modality,
            kind: Kind::Parameter(self.params.len()),
            requires_grad: !frozen,
        });
        self.params.push(spec);
        self.param_tensors.push(tensor);
        self.grad_tensors.push(None);
        self.splits.push(split);
        tensor
    }

    /// Says that each rank of the tensor axis computes a summand of the gradient of this parameter, which all
    /// have.
    ///
    /// # Panics
    /// If it is no parameter, or shared out.
    pub fn sum_gradient(&mut self, parameter: Tensor) {
        let Kind::Parameter(p) = self.info(parameter).kind else { panic!("only parameters have summands") };
        assert!(self.splits[p].is_replicated(), "{} is shared out", self.params[p].name);
        self.splits[p] = Split::Summed;
    }

    /// A tensor that the caller writes before the step.
    pub fn input(&mut self, name: &str, rows: usize, cols: usize, extent: Extent) -> Tensor {
        self.push(TensorInfo {
            name: name.into(),
            rows,
            cols,
            extent,
            modality: self.tower.modality,
            kind: Kind::Input,
            requires_grad: false,
        })
    }

    /// A result of the node that is recorded next.
    pub fn activation(&mut self, rows: usize, cols: usize, extent: Extent) -> Tensor {
        self.push(TensorInfo {
            name: String::new(),
            rows,
            cols,
            extent,
            modality: self.tower.modality,
            kind: Kind::Activation,
            requires_grad: false,
        })
    }

    /// A result with the shape of `tensor`.
    pub fn activation_like(&mut self, tensor: Tensor) -> Tensor {
        let info = self.info(tensor);
        let (rows, cols, extent, modality) = (info.rows, info.cols, info.extent, info.modality);
        let alike = self.activation(rows, cols, extent);
        self.tensors[alike.0].modality = modality;
        alike
    }

    /// The gradient accumulator of a parameter, or `None` where `tensor` needs no gradient.
    ///
    /// # Panics
    /// If `tensor` needs a gradient and is no parameter: rules that add to accumulators take
    /// their weights, gains and tables as parameters, not as computed tensors.
    pub fn gradient_of(&mut self, tensor: Tensor) -> Option<Tensor> {
        let info = self.info(tensor);
        let Kind::Parameter(index) = info.kind else {
            assert!(!info.requires_grad, "{} is computed, but its gradient would be lost", info.name);
            return None;
        };
        if !info.requires_grad {
            return None;
        }
        if self.grad_tensors[index].is_none() {
            let mut info = self.info(tensor).clone();
            info.name = format!("d {}", info.name);
            info.kind = Kind::Gradient(index);
            info.requires_grad = false;
            self.grad_tensors[index] = Some(self.push(info));
        }
        self.grad_tensors[index]
    }

    /// Appends a node. Its results require a gradient if an operand does.
    pub fn record(
        &mut self,
        op: impl Op + 'static,
        inputs: Vec<Option<Tensor>>,
        outputs: Vec<Option<Tensor>>,
    ) {
        self.record_node(Node { op: Arc::new(op), inputs, outputs, pass: self.pass });
    }

    pub(crate) fn record_node(&mut self, node: Node) {
        let requires = node.inputs.iter().flatten().any(|t| self.info(*t).requires_grad);
        for (i, output) in node.outputs.iter().enumerate() {
            let repeated = output.is_some() && node.outputs[..i].contains(output);
            assert!(!repeated, "{} would write one tensor twice", node.op.name());
        }
        for output in node.outputs.iter().flatten() {
            let info = &mut self.tensors[output.0];
            if info.kind == Kind::Activation {
                info.requires_grad |= requires;
                if info.name.is_empty() {
                    info.name = format!("{}#{}", node.op.name(), output.0);
                }
            }
        }
        self.nodes.push(node);
    }

    /// Keeps `tensor` until the step has ended, so that the caller can read it.
    pub fn keep(&mut self, tensor: Tensor) {
        if !self.kept.contains(&tensor) {
            self.kept.push(tensor);
        }
    }

    /// Says that the backward pass computes cheap results again, such as those of norms: see [`recompute`](super::recompute).
    pub fn recompute_cheap(&mut self) {
        self.selective = true;
    }

    /// Starts a segment of which the backward pass recomputes everything (activation checkpointing, Chen et al. 2016).
    /// Segments do not nest.
    pub fn begin_segment(&mut self) {
        assert!(self.open_segment.is_none(), "recomputed segments do not nest");
        self.open_segment = Some(self.nodes.len());
    }

    /// Ends the segment.
    pub fn end_segment(&mut self) {
        let start = self.open_segment.take().expect("a segment is open");
        self.segments.push(start..self.nodes.len());
    }

    /// Arithmetic of one run in FLOPs (a multiply-add is two), for the given workload.
    pub fn flops(&self, work: &Workload) -> f64 {
        self.nodes.iter().map(|node| self.node_flops(node, work)).sum()
    }

    /// The same of one node.
    pub(crate) fn node_flops(&self, node: &Node, work: &Workload) -> f64 {
        node.op.flops(self, node, &work.of_modality(self.modality(node)))
    }
}
