//! Token rows that go from all ranks to one each, and back.

use super::super::device::{Launch, Site};
use super::super::graph::{Graph, Node, Tensor};
use super::super::op::{Io, Op, on_cpu};
use super::super::split::Shard;
use super::{all_rows, device, own_rows};
use crate::error::Result;
use crate::parallel::Group;

#[derive(Debug)]
pub(super) struct OwnRows(pub Shard);

impl Op for OwnRows {
    fn name(&self) -> &'static str {
        "own rows"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let cols = a.input_shape(0).1;
            let first = self.0.rank * (a.batch.tokens() / self.0.size) * cols;
            let out = a.output(0);
            if !out.is_empty() {
                out.copy_from_slice(&a.input(0)[first..first + out.len()]);
            }
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::own_rows(self.0, site)
    }

    fn backward(&self, graph: &mut Graph, _: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        vec![grads[0].map(|dy| all_rows(graph, dy))]
    }
}

#[derive(Debug)]
pub(super) struct AllRows(pub Shard);

impl Op for AllRows {
    fn name(&self) -> &'static str {
        "all rows"
    }

    fn run(&self, _: Io<'_>) {
        unreachable!("ranks gather rows together");
    }

    fn communicates(&self) -> bool {
        true
    }

    fn communicate(&self, io: Io<'_>, group: &Group) -> Result<()> {
        on_cpu!(io, |a| group.all_gather(a.output(0), a.input(0)))
    }

    fn sends(&self, graph: &Graph, node: &Node, _: usize) -> u64 {
        ((self.0.size - 1) * graph.info(node.input(0)).len()) as u64
    }

    /// Messages.
    fn scratch(&self, graph: &Graph, node: &Node, _: &[bool]) -> usize {
        (self.0.size - 1) * graph.info(node.input(0)).len()
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::all_rows(site)
    }

    fn backward(&self, graph: &mut Graph, _: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        vec![grads[0].map(|dy| own_rows(graph, dy))]
    }
}
