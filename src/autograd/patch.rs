//! From pixels to tokens.
//!
//! | op | result | rule |
//! |---|---|---|
//! | patches | `[T, C·P²]`, normalised by channel | none: pixels need no gradient |
//! | prefix | learned tokens written over each image's first rows | `dtokens +=` those rows summed over images; `dx` = 0 there |

use super::device::batch::{PictureFields, Pixels};
use super::device::{Launch, Site};
use super::graph::{Extent, Graph, Node, Tensor};
use super::op::{Io, Op, on_cpu};
use crate::cpu;
use crate::error::{Error, Result};
use crate::kernels::patch::{Normalise as NormaliseKernel, Pixels as Source, Prefix, factors};
use crate::kernels::view::{Operands, Views};

/// The batch's patches, normalised: `(x/255 − mean[c]) / std[c]` for u8 pixels, f32 values as they
/// are; zero at prefix tokens. `mean` and `std` have one entry, or one a channel.
pub fn patches(graph: &mut Graph, tokens: usize, patch_dim: usize, mean: &[f32], std: &[f32]) -> Tensor {
    let out = graph.activation(tokens, patch_dim, Extent::Tokens);
    graph.record(Normalise { mean: mean.into(), std: std.into() }, vec![], vec![Some(out)]);
    out
}

/// `x[T, D]` with `tokens[prefix, D]` (cls, registers) as the first rows of every image.
pub fn write_prefix(graph: &mut Graph, x: Tensor, tokens: Tensor) -> Tensor {
    let out = graph.activation_like(x);
    let prefix = graph.info(tokens).rows;
    graph.record(WritePrefix { prefix }, vec![Some(x), Some(tokens)], vec![Some(out)]);
    out
}

#[derive(Debug)]
struct Normalise {
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl Op for Normalise {
    fn name(&self) -> &'static str {
        "patches"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (live, width) = a.output_shape(0);
            let positions = &a.batch.positions[..live];
            cpu::patch::normalise(a.output(0), &a.batch.patches, positions, &self.mean, &self.std, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (out, width, shape) = (site.output(0)?, site.output_cols(0), site.shape());
        if width != shape.patch_dim {
            return Err(Error::usage(format!(
                "the batch has patches of {} values, the model takes {width}; use the batch's recipe",
                shape.patch_dim
            )));
        }
        if let Some(views) = shape.views {
            return self.prepare_views(site, views);
        }
        let channels = self.mean.len().max(self.std.len()).max(1);
        let factors = site.device().upload(&factors(&self.mean, &self.std, channels)?)?;
        let normalise =
            NormaliseKernel { tokens: out.rows, images: shape.slots, channels, plane: width / channels };
        Ok(Box::new(move |step| {
            let pixels = match &step.batch.patches {
                Pixels::U8(pixels) => Source::U8(pixels, &factors),
                Pixels::F32(values) => Source::F32(values),
                Pixels::Pictures(_) => return Err(other_patches()),
            };
            let (packed, positions) = (step.packed(), &step.batch.positions);
            normalise.launch(
                step.stream,
                out.all(),
                pixels,
                positions,
                packed.cu_seqlens,
                packed.cu_seqlens_host,
            )
        }))
    }
}

impl Normalise {
    /// The device makes the patches.
    fn prepare_views(&self, site: &mut Site<'_>, views: Views) -> Result<Launch> {
        views.supported()?;
        let out = site.output(0)?;
        let factors = site.device().upload(&factors(&self.mean, &self.std, views.channels)?)?;
        site.workspace(views.workspace_bytes());
        Ok(Box::new(move |step| {
            let Pixels::Pictures(PictureFields { records, counts, rows, data }) = &step.batch.patches else {
                return Err(other_patches());
            };
            let of = Operands { records, counts, rows, data, factors: &factors };
            views.launch(step.stream, out.all(), of, step.workspace)
        }))
    }
}

fn other_patches() -> Error {
    Error::failure("patches changed their type between batches")
}

#[derive(Debug)]
struct WritePrefix {
    prefix: usize,
}

impl Op for WritePrefix {
    fn name(&self) -> &'static str {
        "prefix"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(1).1;
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            cpu::patch::write_prefix(a.output(0), a.input(1), cu_seqlens, self.prefix, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        site.require_in_place()?;
        let (x, tokens) = (site.output(0)?, site.input_f32(1)?);
        let tokens = site.present(tokens)?;
        let images = site.shape().slots;
        let prefix = Prefix { rows: x.rows, images, prefix: self.prefix, width: x.cols };
        Ok(Box::new(move |step| {
            let packed = step.packed();
            prefix.write(step.stream, x.all(), &tokens, packed.cu_seqlens, packed.cu_seqlens_host)
        }))
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None; 2] };
        let dx = graph.activation_like(dout);
        let dtokens = graph.gradient_of(node.input(1));
        graph.record(WritePrefixGrad { prefix: self.prefix }, vec![Some(dout)], vec![Some(dx), dtokens]);
        vec![Some(dx), None]
    }
}

#[derive(Debug)]
struct WritePrefixGrad {
    prefix: usize,
}

impl Op for WritePrefixGrad {
    fn name(&self) -> &'static str {
        "d prefix"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.output_shape(0).1;
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            let (dx, dtokens) = (a.output(0), a.output_opt(1));
            cpu::patch::write_prefix_grad(dx, dtokens, cu_seqlens, self.prefix, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        site.require_in_place()?;
        let (dx, dtokens) = (site.output(0)?, site.output_f32(1)?);
        let images = site.shape().slots;
        let prefix = Prefix { rows: dx.rows, images, prefix: self.prefix, width: dx.cols };
        site.workspace(prefix.workspace_bytes());
        Ok(Box::new(move |step| {
            let packed = step.packed();
            prefix.grad(
                step.stream,
                dx.all(),
                dtokens.as_ref(),
                Some(step.accumulate),
                packed.cu_seqlens,
                packed.cu_seqlens_host,
                step.workspace,
            )
        }))
    }
}
