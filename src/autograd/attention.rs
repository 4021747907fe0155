//! Packed block-diagonal attention with QK-norm, rotary positions and grouped kv heads.
//!
//! `P = softmax(scale · q̂ k̂ᵀ)` within each image, `out = P v`. Rule, with `D_i = Σ dout_i ⊙ out_i`:
//! `dv = Pᵀ dout`, `dS = P ⊙ (dout vᵀ − D) · scale`, `dq̂ = dS k̂`, `dk̂ = dSᵀ q̂`, then through the
//! turns and the norms of q and k; a kv head takes the sum over its query heads. Only the log-sum-exp is kept; P is made
//! again.

use super::device::{Element, Launch, Site};
use super::graph::{Graph, Node, Tensor};
use super::op::{Args, Io, Op, Workload, downcast, on_cpu};
use crate::cpu;
use crate::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad};
use crate::cpu::real::Real;
use crate::device::Buffer;
use crate::error::Result;
use crate::kernels::attention::{Attention as AttentionKernel, Backward, Forward};

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

    pub(super) fn of_operands(operands: &[Option<Tensor>]) -> Self {
        Self { q_gain: operands[0], k_gain: operands[1], q_bias: operands[2], k_bias: operands[3] }
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

/// Four operands or results on a device, in the order of the kernels: γq, βq, γk, βk.
pub(super) type DeviceAffine = [Option<Buffer<f32>>; 4];

/// Operands `first..first + 4` on a device.
pub(super) fn device_affine(site: &Site<'_>, first: usize) -> Result<DeviceAffine> {
    let [q_gain, k_gain, q_bias, k_bias] = [0, 1, 2, 3].map(|i| site.input_f32(first + i));
    Ok([q_gain?, q_bias?, k_gain?, k_bias?])
}

/// Results `first..first + 4` on a device.
pub(super) fn device_affine_grad(site: &Site<'_>, first: usize) -> Result<DeviceAffine> {
    let [q_gain, k_gain, q_bias, k_bias] = [0, 1, 2, 3].map(|i| site.output_f32(first + i));
    Ok([q_gain?, q_bias?, k_gain?, k_bias?])
}

/// As a checked launch takes them.
pub(super) fn borrowed(affine: &DeviceAffine) -> [Option<&Buffer<f32>>; 4] {
    affine.each_ref().map(Option::as_ref)
}

/// Accumulators of the gains' and biases' gradients among `operands`.
pub(super) fn affine_accumulators(graph: &mut Graph, operands: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
    operands.iter().map(|t| t.and_then(|t| graph.gradient_of(t))).collect()
}

/// `out[T, heads·head_dim]` from `qkv[T, (heads + 2·kv_heads)·head_dim]`, rows `[q | k | v]`. `rope` is the table of
/// [`rope_table`](super::position::rope::rope_table), there just if the config has a rotation.
pub fn attention(
    graph: &mut Graph,
    qkv: Tensor,
    params: QkParams,
    rope: Option<Tensor>,
    config: AttentionConfig,
) -> Tensor {
    let width = config.heads * config.head_dim;
    let info = graph.info(qkv);
    assert_eq!(info.cols, config.qkv_width(), "attention: columns of a row [q | k | v]");
    let (rows, extent) = (info.rows, info.extent);
    let out = graph.activation(rows, width, extent);
    let lse = graph.activation(rows, config.heads, extent);
    let mut inputs = vec![Some(qkv)];
    inputs.extend(params.operands());
    inputs.push(rope);
    graph.record(Attention(config), inputs, vec![Some(out), Some(lse)]);
    out
}

/// What an attention op of a graph reads.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOperands {
    /// Its constants.
    pub config: AttentionConfig,
    /// `[T, (heads + 2·kv_heads)·head_dim]`, rows `[q | k | v]`.
    pub qkv: Tensor,
    /// Gains and biases of QK-norm.
    pub params: QkParams,
    /// The table of rotary positions.
    pub rope: Option<Tensor>,
}

impl AttentionOperands {
    /// Those of all attention ops of `graph`, in the order in which they run.
    pub fn of(graph: &Graph) -> Vec<Self> {
        let of_node = |node: &Node| {
            let Attention(config) = *downcast(node)?;
            let params = QkParams::of_operands(&node.inputs[1..5]);
            Some(Self { config, qkv: node.input(0), params, rope: node.inputs[5] })
        };
        graph.nodes().iter().filter_map(of_node).collect()
    }
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
            cpu::attention::forward(&self.0, out, lse, a.input(0), affine(&a, 1), a.input_opt(5), cu_seqlens);
        });
    }

    /// The log-sum-exp.
    fn element(&self, i: usize) -> Element {
        if i == 1 { Element::F32 } else { Element::Bf16 }
    }

    fn result(&self, i: usize) -> &'static str {
        ["attention", "statistics"][i]
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (qkv, out, lse) = (site.input(0)?, site.output(0)?, site.output_f32(1)?);
        let (lse, affine, rope) = (site.present(lse)?, device_affine(site, 1)?, site.input_f32(5)?);
        let attention = AttentionKernel { config: self.0, tokens: qkv.rows, slots: site.shape().slots };
        let plan = attention.plan(site.device().info())?;
        let schedule = site.schedule(plan.limits);
        site.workspace(attention.forward_workspace_bytes(&plan, site.shape().image_rows));
        let (width, kv_width) = (self.0.heads * self.0.head_dim, self.0.kv_width());
        Ok(Box::new(move |step| {
            let operands = Forward {
                q: qkv.from(0),
                k: qkv.from(width),
                v: qkv.from(width + kv_width),
                affine: borrowed(&affine),
                rope: rope.as_ref(),
                cu_seqlens: &step.batch.cu_seqlens,
                schedule: step.schedule(schedule),
                out: out.all(),
                lse: &lse,
                statistics: None,
                workspace: Some(step.workspace),
            };
            attention.forward(step.stream, &plan, &operands)
        }))
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None; node.inputs.len()] };
        let qkv = node.input(0);
        let dqkv = graph.activation_like(qkv);
        let mut inputs = vec![Some(dout), node.outputs[0], node.outputs[1], Some(qkv)];
        inputs.extend(&node.inputs[1..]);
        let mut outputs = vec![Some(dqkv)];
        outputs.extend(affine_accumulators(graph, &node.inputs[1..5]));
        graph.record(AttentionGrad(self.0), inputs, outputs);
        let mut answer = vec![None; node.inputs.len()];
        answer[0] = Some(dqkv);
        answer
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
                a.input_opt(8),
                cu_seqlens,
            );
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dout, out, qkv, dqkv) = (site.input(0)?, site.input(1)?, site.input(3)?, site.output(0)?);
        let (lse, affine, daffine) =
            (site.input_f32(2)?, device_affine(site, 4)?, device_affine_grad(site, 1)?);
        let (lse, rope) = (site.present(lse)?, site.input_f32(8)?);
        let attention = AttentionKernel { config: self.0, tokens: qkv.rows, slots: site.shape().slots };
        let plan = attention.backward_plan(site.device().info())?;
        let schedule = site.schedule(plan.limits);
        let wanted = daffine.iter().any(Option::is_some);
        site.workspace(attention.backward_workspace_bytes(&plan, site.shape().image_rows, wanted));
        let (width, kv_width) = (self.0.heads * self.0.head_dim, self.0.kv_width());
        Ok(Box::new(move |step| {
            let operands = Backward {
                q: qkv.from(0),
                k: qkv.from(width),
                v: qkv.from(width + kv_width),
                out: out.all(),
                lse: &lse,
                dout: dout.all(),
                affine: borrowed(&affine),
                rope: rope.as_ref(),
                cu_seqlens: &step.batch.cu_seqlens,
                schedule: step.schedule(schedule),
                dq: dqkv.from(0),
                dk: dqkv.from(width),
                dv: dqkv.from(width + kv_width),
                daffine: borrowed(&daffine),
                accumulate: Some(step.accumulate),
                workspace: step.workspace,
            };
            attention.backward(step.stream, &plan, &operands)
        }))
    }

    fn flops(&self, _: &Graph, _: &Node, work: &Workload) -> f64 {
        // The gradient's four products; the scores that are made again do not count as model FLOPs.
        8.0 * work.sum_squared * (self.0.heads * self.0.head_dim) as f64
    }
}
