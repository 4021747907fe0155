//! From the tokens of an image to one vector, and token gather.
//!
//! | op | result | rule |
//! |---|---|---|
//! | attention pooling | `softmax(scale · q̂ k̂ᵀ) v` over the image's tokens, one shared query | as attention; `dq` sums over the images |
//! | mean pooling | mean over the image's tokens | `dx = dout / n` |
//! | token gather | one row of every image, such as its cls token | scatter-add |
//!
//! Token dropping needs no op: dropped patches are never laid into the batch (`data::dropping`).

use super::attention::{
    QkParams, affine, affine_accumulators, affine_grad, borrowed, device_affine, device_affine_grad,
};
use super::device::{Element, Launch, Matrix, Site, Step};
use super::graph::{Extent, Graph, Node, Tensor};
use super::op::{Io, Op, Workload, downcast, on_cpu};
use crate::cpu;
use crate::cpu::attention::AttentionConfig;
use crate::data::batch::PackedBatch;
use crate::device::Buffer;
use crate::error::Result;
use crate::kernels::pool::{
    AttentionBackward, AttentionForward, AttentionPool as PoolKernel, MeanPool as MeanKernel, PackedSizes,
    Query, TokenGather,
};

/// Masked attention pooling (MAP): `out[N, heads·head_dim]` from one query `q[1, heads·head_dim]`
/// and `kv[T, 2·heads·head_dim]`. The first `skip` tokens of every image are left out. `slots` is N.
pub fn attention_pool(
    graph: &mut Graph,
    q: Tensor,
    kv: Tensor,
    params: QkParams,
    config: AttentionConfig,
    slots: usize,
    skip: usize,
) -> Tensor {
    let out = graph.activation(slots, config.heads * config.head_dim, Extent::Images);
    let lse = graph.activation(slots, config.heads, Extent::Images);
    let mut inputs = vec![Some(q), Some(kv)];
    inputs.extend(params.operands());
    graph.record(AttentionPool { config, skip }, inputs, vec![Some(out), Some(lse)]);
    out
}

/// Mean over each image's tokens after the first `skip`: `[N, D]` from `x[T, D]`.
pub fn mean_pool(graph: &mut Graph, x: Tensor, slots: usize, skip: usize) -> Tensor {
    let width = graph.info(x).cols;
    let out = graph.activation(slots, width, Extent::Images);
    graph.record(MeanPool { skip }, vec![Some(x)], vec![Some(out)]);
    out
}

/// Row `offset` of every image: `[N, D]` from `x[T, D]` (the cls token at offset 0).
pub fn gather_token(graph: &mut Graph, x: Tensor, slots: usize, offset: usize) -> Tensor {
    let width = graph.info(x).cols;
    let out = graph.activation(slots, width, Extent::Images);
    graph.record(Gather { offset }, vec![Some(x)], vec![Some(out)]);
    out
}

/// Sizes of the batch on a device, without the first `skip` tokens of every image.
fn sizes(site: &Site<'_>, skip: usize) -> PackedSizes {
    PackedSizes { tokens: site.shape().tokens, images: site.shape().slots, skip }
}

/// The kernel that pools the tokens of each image by one query.
fn pool_kernel(site: &Site<'_>, config: AttentionConfig, skip: usize) -> PoolKernel {
    PoolKernel { config, sizes: sizes(site, skip), queries: 1 }
}

/// Operands of the forward pass on a device.
fn pool_operands<'a>(
    step: &'a Step<'_>,
    [q, kv, out]: [&'a Matrix; 3],
    lse: &'a Buffer<f32>,
    affine: [Option<&'a Buffer<f32>>; 4],
) -> AttentionForward<'a> {
    let packed = step.packed();
    AttentionForward {
        q: Query::Bf16(&q.buffer),
        k: kv.from(0),
        v: kv.from(out.cols),
        affine,
        cu_seqlens: packed.cu_seqlens,
        cu_seqlens_host: Some(packed.cu_seqlens_host),
        error: None,
        out: &out.buffer,
        lse,
    }
}

/// What the attention pooling of a graph reads.
#[derive(Clone, Copy, Debug)]
pub struct PoolOperands {
    /// Its constants.
    pub config: AttentionConfig,
    /// Leading tokens of every image that are left out.
    pub skip: usize,
    /// `[1, heads·head_dim]`.
    pub q: Tensor,
    /// `[T, 2·heads·head_dim]`, rows `[k | v]`.
    pub kv: Tensor,
    /// Gains and biases of QK-norm.
    pub params: QkParams,
}

impl PoolOperands {
    /// Those of the attention pooling of `graph`, where it has one.
    pub fn of(graph: &Graph) -> Option<Self> {
        graph.nodes().iter().find_map(|node| {
            let AttentionPool { config, skip } = *downcast(node)?;
            let params = QkParams::of_operands(&node.inputs[2..6]);
            Some(Self { config, skip, q: node.input(0), kv: node.input(1), params })
        })
    }
}

#[derive(Debug)]
struct AttentionPool {
    config: AttentionConfig,
    skip: usize,
}

impl Op for AttentionPool {
    fn name(&self) -> &'static str {
        "attention pool"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            let (out, lse) = (a.output(0), a.output(1));
            let (q, kv) = (a.input(0), a.input(1));
            cpu::pool::attention_forward(&self.config, out, lse, q, kv, affine(&a, 2), cu_seqlens, self.skip);
        });
    }

    /// The log-sum-exp.
    fn element(&self, i: usize) -> Element {
        if i == 1 { Element::F32 } else { Element::Bf16 }
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (q, kv, out, lse) = (site.input(0)?, site.input(1)?, site.output(0)?, site.output_f32(1)?);
        let (lse, affine) = (site.present(lse)?, device_affine(site, 2)?);
        let pool = pool_kernel(site, self.config, self.skip);
        site.workspace(pool.shape()?.forward_workspace_bytes());
        Ok(Box::new(move |step| {
            let operands = pool_operands(step, [&q, &kv, &out], &lse, borrowed(&affine));
            pool.forward(step.stream, &operands, step.workspace)
        }))
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None; 6] };
        let dq = graph.activation_like(node.input(0));
        let dkv = graph.activation_like(node.input(1));
        let mut inputs = vec![Some(dout), node.outputs[0], node.outputs[1]];
        inputs.extend(&node.inputs);
        let mut outputs = vec![Some(dq), Some(dkv)];
        outputs.extend(affine_accumulators(graph, &node.inputs[2..]));
        graph.record(AttentionPoolGrad { config: self.config, skip: self.skip }, inputs, outputs);
        vec![Some(dq), Some(dkv), None, None, None, None]
    }

    fn flops(&self, _: &Graph, _: &Node, work: &Workload) -> f64 {
        4.0 * work.tokens * (self.config.heads * self.config.head_dim) as f64
    }
}

#[derive(Debug)]
struct AttentionPoolGrad {
    config: AttentionConfig,
    skip: usize,
}

impl Op for AttentionPoolGrad {
    fn name(&self) -> &'static str {
        "d attention pool"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            let (dq, dkv) = (a.output(0), a.output(1));
            let daffine = affine_grad(&mut a, 2);
            cpu::pool::attention_backward(
                &self.config,
                dq,
                dkv,
                daffine,
                a.input(0),
                a.input(1),
                a.input(2),
                a.input(3),
                a.input(4),
                affine(&a, 5),
                cu_seqlens,
                self.skip,
            );
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dout, out, lse) = (site.input(0)?, site.input(1)?, site.input_f32(2)?);
        let (q, kv, dq, dkv) = (site.input(3)?, site.input(4)?, site.output_opt(0)?, site.output(1)?);
        let (lse, affine, daffine) =
            (site.present(lse)?, device_affine(site, 5)?, device_affine_grad(site, 2)?);
        let pool = pool_kernel(site, self.config, self.skip);
        site.workspace(pool.shape()?.backward_workspace_bytes());
        Ok(Box::new(move |step| {
            let forward = pool_operands(step, [&q, &kv, &out], &lse, borrowed(&affine));
            let grads = AttentionBackward {
                dout: &dout.buffer,
                dk: dkv.from(0),
                dv: dkv.from(out.cols),
                dq: dq.as_ref().map(|dq| &dq.buffer),
                dq_f32: None,
                daffine: borrowed(&daffine),
                accumulate: Some(step.accumulate),
            };
            pool.backward(step.stream, &forward, &grads, step.workspace)
        }))
    }

    fn flops(&self, _: &Graph, _: &Node, work: &Workload) -> f64 {
        8.0 * work.tokens * (self.config.heads * self.config.head_dim) as f64
    }
}

#[derive(Debug)]
struct MeanPool {
    skip: usize,
}

impl Op for MeanPool {
    fn name(&self) -> &'static str {
        "mean pool"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            cpu::pool::mean_forward(a.output(0), a.input(0), cu_seqlens, self.skip, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (x, out) = (site.input(0)?, site.output(0)?);
        let pool = MeanKernel { sizes: sizes(site, self.skip), width: x.cols };
        site.workspace(pool.workspace_bytes());
        Ok(Box::new(move |step| {
            let packed = step.packed();
            pool.forward(
                step.stream,
                &out.buffer,
                x.all(),
                packed.cu_seqlens,
                packed.cu_seqlens_host,
                step.workspace,
            )
        }))
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None] };
        let dx = graph.activation_like(node.input(0));
        graph.record(MeanPoolGrad { skip: self.skip }, vec![Some(dout)], vec![Some(dx)]);
        vec![Some(dx)]
    }
}

#[derive(Debug)]
struct MeanPoolGrad {
    skip: usize,
}

impl Op for MeanPoolGrad {
    fn name(&self) -> &'static str {
        "d mean pool"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            cpu::pool::mean_backward(a.output(0), a.input(0), cu_seqlens, self.skip, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dout, dx) = (site.input(0)?, site.output(0)?);
        let pool = MeanKernel { sizes: sizes(site, self.skip), width: dx.cols };
        Ok(Box::new(move |step| {
            let packed = step.packed();
            pool.backward(step.stream, dx.all(), &dout.buffer, packed.cu_seqlens, packed.cu_seqlens_host)
        }))
    }
}

fn token_rows(batch: &PackedBatch, offset: usize) -> Vec<u32> {
    (0..batch.images).map(|i| (batch.range(i).start + offset) as u32).collect()
}

#[derive(Debug)]
struct Gather {
    offset: usize,
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather token"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let rows = token_rows(a.batch, self.offset);
            cpu::pool::gather(a.output(0), a.input(0), &rows, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (x, out) = (site.input(0)?, site.output(0)?);
        let gather = TokenGather { sizes: sizes(site, self.offset), width: x.cols };
        Ok(Box::new(move |step| {
            let packed = step.packed();
            gather.forward(step.stream, &out.buffer, x.all(), packed.cu_seqlens, packed.cu_seqlens_host)
        }))
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None] };
        let dx = graph.activation_like(node.input(0));
        graph.record(GatherGrad { offset: self.offset }, vec![Some(dout)], vec![Some(dx)]);
        vec![Some(dx)]
    }
}

#[derive(Debug)]
struct GatherGrad {
    offset: usize,
}

impl Op for GatherGrad {
    fn name(&self) -> &'static str {
        "d gather token"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let rows = token_rows(a.batch, self.offset);
            cpu::pool::gather_grad(a.output(0), a.input(0), &rows, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dout, dx) = (site.input(0)?, site.output(0)?);
        let gather = TokenGather { sizes: sizes(site, self.offset), width: dx.cols };
        Ok(Box::new(move |step| {
            let packed = step.packed();
            gather.backward(step.stream, dx.all(), &dout.buffer, packed.cu_seqlens, packed.cu_seqlens_host)
        }))
    }
}
