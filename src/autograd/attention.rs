//! Packed block-diagonal attention with QK-norm.
//!
//! `P = softmax(scale · q̂ k̂ᵀ)` within each image, `out = P v`. Rule, with `D_i = Σ dout_i ⊙ out_i`:
//! `dv = Pᵀ dout`, `dS = P ⊙ (dout vᵀ − D) · scale`, `dq̂ = dS k̂`, `dk̂ = dSᵀ q̂`, then through the
//! norms of q and k. Only the log-sum-exp is kept; P is made again.

use super::graph::{Graph, Node, Tensor};
use super::op::{Args, Io, Op, Workload, on_cpu};
use crate::cpu;
use crate::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad};
use crate::cpu::real::Real;

/// Gains and biases of QK-norm; absent gains are 1, absent biases 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct QkParams {
    /// γq.
    pub q_gain: Option<Tensor>,
    /// γk.
    pub k_gain: Option<Tensor>,
    /// βq.
    pub q_bias: Option<Tensor>,
    /// βk.
    pub k_bias: Option<Tensor>,
}

impl QkParams {
    pub(super) fn operands(&self) -> [Option<Tensor>; 4] {
        [self.q_gain, self.k_gain, self.q_bias, self.k_bias]
    }
}

/// Operands `first..first + 4` as gains and biases.
pub(super) fn affine<'a, R: Real>(args: &Args<'a, R>, first: usize) -> QkAffine<'a, R> {
    QkAffine {
        q_gain: args.input_opt(first),
        k_gain: args.input_opt(first + 1),
        q_bias: args.input_opt(first + 2),
        k_bias: args.input_opt(first + 3),
    }
}

/// Results `first..first + 4` as their gradients.
pub(super) fn affine_grad<'a, R: Real>(args: &mut Args<'a, R>, first: usize) -> QkAffineGrad<'a, R> {
    QkAffineGrad {
        q_gain: args.output_opt(first),
        k_gain: args.output_opt(first + 1),
        q_bias: args.output_opt(first + 2),
        k_bias: args.output_opt(first + 3),
    }
}

/// Accumulators of the gains' and biases' gradients among `operands`.
pub(super) fn affine_accumulators(graph: &mut Graph, operands: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
    operands.iter().map(|t| t.and_then(|t| graph.gradient_of(t))).collect()
}

/// `out[T, heads·head_dim]` from `qkv[T, 3·heads·head_dim]`, rows `[q | k | v]`.
pub fn attention(graph: &mut Graph, qkv: Tensor, params: QkParams, config: AttentionConfig) -> Tensor {
    let width = config.heads * config.head_dim;
    let info = graph.info(qkv);
    assert_eq!(info.cols, 3 * width, "attention: rows are [q | k | v] of {width} each");
    let (rows, extent) = (info.rows, info.extent);
    let out = graph.activation(rows, width, extent);
    let lse = graph.activation(rows, config.heads, extent);
    let mut inputs = vec![Some(qkv)];
    inputs.extend(params.operands());
    graph.record(Attention(config), inputs, vec![Some(out), Some(lse)]);
    out
}

#[derive(Debug)]
struct Attention(AttentionConfig);

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            let (out, lse) = (a.output(0), a.output(1));
            cpu::attention::forward(&self.0, out, lse, a.input(0), affine(&a, 1), cu_seqlens);
        });
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None; 5] };
        let qkv = node.input(0);
        let dqkv = graph.activation_like(qkv);
        let mut inputs = vec![Some(dout), node.outputs[0], node.outputs[1], Some(qkv)];
        inputs.extend(&node.inputs[1..]);
        let mut outputs = vec![Some(dqkv)];
        outputs.extend(affine_accumulators(graph, &node.inputs[1..]));
        graph.record(AttentionGrad(self.0), inputs, outputs);
        vec![Some(dqkv), None, None, None, None]
    }

    fn flops(&self, _: &Graph, _: &Node, work: &Workload) -> f64 {
        4.0 * work.sum_squared * (self.0.heads * self.0.head_dim) as f64
    }
}

#[derive(Debug)]
struct AttentionGrad(AttentionConfig);

impl Op for AttentionGrad {
    fn name(&self) -> &'static str {
        "d attention"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            let dqkv = a.output(0);
            let daffine = affine_grad(&mut a, 1);
            cpu::attention::backward(
                &self.0,
                dqkv,
                daffine,
                a.input(0),
                a.input(1),
                a.input(2),
                a.input(3),
                affine(&a, 4),
                cu_seqlens,
            );
        });
    }

    fn flops(&self, _: &Graph, _: &Node, work: &Workload) -> f64 {
        // The gradient's four products; the scores that are made again do not count as model FLOPs.
        8.0 * work.sum_squared * (self.0.heads * self.0.head_dim) as f64
    }
}
