//! The table of the rotary position embedding: what turns queries and keys in every block.

use crate::autograd::device::{Element, Launch, Site};
use crate::autograd::graph::{Extent, Graph, Tensor};
use crate::autograd::op::{Io, Op, on_cpu};
use crate::cpu;
use crate::error::Result;
use crate::kernels::position::{RopeOperands, RopeTable as RopeKernel};
use crate::recipe::{Rope, RopeConfig};

/// `[tokens, head_dim]`: cos and sin of the angle of each pair of columns of a head, one after another; of prefix
/// tokens 1 and 0. It has no gradient. `None` without a rotary embedding.
pub fn rope_table(graph: &mut Graph, tokens: usize, head_dim: usize, config: &RopeConfig) -> Option<Tensor> {
    if config.kind == Rope::None {
        return None;
    }
    let out = graph.activation(tokens, head_dim, Extent::Tokens);
    graph.record(RopeTable(config.clone()), vec![], vec![Some(out)]);
    Some(out)
}

#[derive(Debug)]
struct RopeTable(RopeConfig);

impl Op for RopeTable {
    fn name(&self) -> &'static str {
        "rope table"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let head_dim = a.output_shape(0).1;
            let (positions, grids) = (&a.batch.positions, &a.batch.grids);
            let cu_seqlens = &a.batch.cu_seqlens[..=a.batch.images];
            cpu::position::rope::table(&self.0, head_dim, a.output(0), positions, cu_seqlens, grids);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let out = site.output_f32(0)?;
        let out = site.present(out)?;
        let (tokens, slots) = (site.shape().tokens, site.shape().slots);
        let table = RopeKernel::new(&self.0, tokens, slots, site.output_cols(0))?;
        let pairs = site.device().upload(&table.pairs())?;
        Ok(Box::new(move |step| {
            let packed = step.packed();
            let operands = RopeOperands {
                positions: &step.batch.positions,
                grids: &step.batch.grids,
                cu_seqlens: packed.cu_seqlens,
                cu_seqlens_host: packed.cu_seqlens_host,
                pairs: &pairs,
                out: &out,
            };
            table.launch(step.stream, &operands)
        }))
    }

    /// Angles are as exact as single precision allows.
    fn element(&self, _: usize) -> Element {
        Element::F32
    }
}
