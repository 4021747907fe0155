//! Parameters on a device: padded where a product asks for it, in the flat arena that the optimiser works on.

use half::bf16;

use super::super::graph::{Graph, Kind, ParamSpec};
use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::kernels::optim::{self, Arena, TensorSpec};

/// The parameters of a model in device memory, for everything there that runs the model.
pub struct DeviceParams {
    layout: ParamLayout,
    master: Buffer<f32>,
    weights: Buffer<bf16>,
}

impl DeviceParams {
    /// Zeros.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(device: &Device, layout: ParamLayout) -> Result<Self> {
        let len = layout.arena().len();
        Ok(Self { master: device.zeros(len)?, weights: device.zeros(len)?, layout })
    }

    /// Bytes of both arenas.
    pub fn bytes(&self) -> usize {
        self.master.len() * size_of::<f32>() + self.weights.len() * size_of::<bf16>()
    }

    /// How they lie.
    pub fn layout(&self) -> &ParamLayout {
        &self.layout
    }

    /// Their arena.
    pub fn master(&self) -> &Buffer<f32> {
        &self.master
    }

    /// The arena of their copies in bf16, which the products read: whoever changes [`master`](Self::master) by
    /// other means than [`write`](Self::write) keeps it up to date.
    pub fn weights(&self) -> &Buffer<bf16> {
        &self.weights
    }

    /// Replaces them by dense values, in the order of [`Graph::params`].
    ///
    /// # Errors
    /// Other numbers of elements; a failed device.
    pub fn write(&self, stream: &Stream, values: &[Vec<f32>]) -> Result<()> {
        self.master.write(stream, &self.layout.pack(values)?)?;
        self.round(stream)
    }

    /// Queues the copy in bf16, rounded to nearest.
    ///
    /// # Errors
    /// A failed device.
    pub fn round(&self, stream: &Stream) -> Result<()> {
        optim::cast(stream, &self.weights, &self.master, None)
    }

    /// Dense values, in the order of [`Graph::params`], once everything queued has run.
    ///
    /// # Errors
    /// A failed device.
    pub fn read(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.layout.unpack(&self.master.download()?))
    }

    /// The same of parameter `p` alone.
    ///
    /// # Errors
    /// A failed device.
    pub fn read_one(&self, p: usize) -> Result<Vec<f32>> {
        let range = &self.layout.arena().ranges()[p];
        let padded = self.master.view::<f32>(range.start * size_of::<f32>()..range.end * size_of::<f32>())?;
        Ok(self.layout.unpack_one(p, &padded.download()?))
    }
}

/// How parameters, gradients and everything of their shape lie on a device.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamLayout {
    arena: Arena,
    /// Rows and columns as in checkpoints.
    dense: Vec<[usize; 2]>,
    /// The same on the device; what lies beyond the dense ones is 0.
    padded: Vec<[usize; 2]>,
}

impl ParamLayout {
    /// The layout of `graph`'s parameters; `decay` is the weight decay of each.
    ///
    /// # Errors
    /// No parameters, or more than the kernels count.
    pub fn new(graph: &Graph, decay: &dyn Fn(&ParamSpec) -> f64) -> Result<Self> {
        let dense: Vec<[usize; 2]> = graph
            .param_tensors
            .iter()
            .map(|&tensor| [graph.info(tensor).rows, graph.info(tensor).cols])
            .collect();
        let mut padded = dense.clone();
        for node in graph.nodes() {
            for (i, tensor) in node.inputs.iter().enumerate() {
                let Some(tensor) = tensor else { continue };
                if let Kind::Parameter(p) = graph.info(*tensor).kind {
                    let [rows, cols] = node.op.multiples(i);
                    padded[p] = [padded[p][0].next_multiple_of(rows), padded[p][1].next_multiple_of(cols)];
                }
            }
        }
        let specs: Vec<TensorSpec> = graph
            .params()
            .iter()
            .zip(&padded)
            .map(|(param, [rows, cols])| {
                let weight_decay = decay(param);
                TensorSpec { len: rows * cols, weight_decay, adapts: weight_decay != 0.0 }
            })
            .collect();
        Ok(Self { arena: Arena::new(&specs)?, dense, padded })
    }

    /// The flat layout.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Rows and columns of parameter `p` without padding.
    pub fn dense(&self, p: usize) -> [usize; 2] {
        self.dense[p]
    }

    /// Rows and columns of parameter `p` on the device.
    pub fn shape(&self, p: usize) -> [usize; 2] {
        self.padded[p]
    }

    /// Whether a model of `graph` finds its parameters in this layout: of the same sizes, padded alike.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self, graph: &Graph) -> Result<()> {
        let own = Self::new(graph, &|_| 0.0)?;
        if own.dense == self.dense && own.padded == self.padded {
            return Ok(());
        }
        Err(Error::failure("a model was recorded with other parameters than those in device memory"))
    }

    /// Dense values, in the order of the parameters, as an arena.
    ///
    /// # Errors
    /// Another number of parameters, or of elements of one.
    pub fn pack(&self, values: &[Vec<f32>]) -> Result<Vec<f32>> {
        let expected: Vec<usize> = self.dense.iter().map(|[rows, cols]| rows * cols).collect();
        if !values.iter().map(Vec::len).eq(expected.iter().copied()) {
            return Err(Error::usage(format!(
                "{} parameters cannot be laid out for a model of {}: numbers of elements differ; give those of \
                 this recipe",
                values.len(),
                expected.len()
            )));
        }
        let mut arena = vec![0.0; self.arena.len()];
        for (p, values) in values.iter().enumerate() {
            self.pad(p, &mut arena[self.arena.ranges()[p].clone()], values);
        }
        Ok(arena)
    }

    /// Lays dense values of parameter `p` out in its range of an arena, which holds zeros.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn pack_one(&self, p: usize, to: &mut [f32], values: &[f32]) -> Result<()> {
        let [rows, cols] = self.dense[p];
        if values.len() != rows * cols {
            return Err(Error::usage(format!(
                "parameter {p} has {} elements in the state and {} in the model: give one of this recipe",
                values.len(),
                rows * cols
            )));
        }
        self.pad(p, to, values);
        Ok(())
    }

    fn pad(&self, p: usize, to: &mut [f32], values: &[f32]) {
        let (cols, stride) = (self.dense[p][1], self.padded[p][1]);
        for (to, from) in to.chunks_mut(stride.max(1)).zip(values.chunks(cols.max(1))) {
            to[..cols].copy_from_slice(from);
        }
    }

    /// The dense values of an arena of this layout.
    pub fn unpack(&self, arena: &[f32]) -> Vec<Vec<f32>> {
        let ranges = self.arena.ranges().iter().enumerate();
        ranges.map(|(p, range)| self.unpack_one(p, &arena[range.clone()])).collect()
    }

    /// The dense values of parameter `p` in its range of an arena.
    pub fn unpack_one(&self, p: usize, padded: &[f32]) -> Vec<f32> {
        let [rows, cols] = self.dense[p];
        let from = padded.chunks(self.padded[p][1].max(1)).take(rows);
        from.flat_map(|row| row[..cols].iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gemm;
    use crate::autograd::graph::{Extent, Init};

    #[test]
    fn weights_are_padded_and_come_back_dense() {
        let mut graph = Graph::new();
        let mut param = |name: &str, shape: &[usize]| {
            let (name, shape) = (name.into(), shape.to_vec());
            graph.param(ParamSpec { name, shape, init: Init::Constant(0.0), decay: true, head: false })
        };
        let (weight, bias, table) = (param("w", &[10, 12]), param("b", &[10]), param("t", &[3, 5]));
        let x = graph.activation(4, 12, Extent::Fixed);
        gemm::linear(&mut graph, x, weight, Some(bias));
        let layout = ParamLayout::new(&graph, &|_| 0.1).unwrap();
        assert_eq!([0, 1, 2].map(|p| layout.shape(p)), [[16, 16], [1, 16], [3, 5]]);
        let values: Vec<Vec<f32>> =
            [120, 10, 15].map(|len| (0..len).map(|i| 1.0 + i as f32).collect()).into();
        let arena = layout.pack(&values).unwrap();
        assert_eq!((arena.len(), arena[16], arena[12..16].iter().sum::<f32>()), (384, 13.0, 0.0));
        assert_eq!(layout.unpack(&arena), values);
        for (p, values) in values.iter().enumerate() {
            let padded = &arena[layout.arena().ranges()[p].clone()];
            let mut again = vec![0.0; padded.len()];
            layout.pack_one(p, &mut again, values).unwrap();
            assert_eq!(again, padded);
            assert_eq!(layout.unpack_one(p, padded), *values);
            assert!(layout.pack_one(p, &mut again, &values[1..]).is_err());
        }
        assert!(layout.pack(&values[1..]).is_err());
        let _ = table;
    }
}
