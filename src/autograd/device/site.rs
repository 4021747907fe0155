//! What an op sees of the device: its operands when it is prepared, the batch when it is launched.

use half::bf16;

use super::super::graph::{Graph, Kind, Modality, Node, Tensor};
use super::super::residual::DropPath;
use super::super::split::Shard;
use super::batch::DeviceBatch;
use super::gathered::Gathered;
use super::layout::Element;
use super::memory::Memory;
use super::shape::BatchShape;
use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::kernels::Rows;
use crate::kernels::attention::{Limits, Schedule};
use crate::kernels::gemm;
use crate::kernels::residual::Packed;
use crate::parallel::DeviceGroup;
use crate::parallel::device::DeviceRing;

/// Queues what a prepared op computes.
pub type Launch = Box<dyn Fn(&Step<'_>) -> Result<()> + Send + Sync>;

/// Which rows of a matrix hold anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Live {
    /// Those of the batch's tokens.
    Tokens,
    /// Those of its images.
    Images,
    /// Those of its tokens that the tensor axis leaves to this rank.
    Shard,
    /// All.
    All,
}

/// A row-major matrix in bf16.
pub struct Matrix {
    /// `[rows, cols]`.
    pub buffer: Buffer<bf16>,
    /// Rows.
    pub rows: usize,
    /// Columns, padding included.
    pub cols: usize,
    /// Which rows hold anything.
    pub live: Live,
}

impl Matrix {
    /// All its rows.
    pub fn all(&self) -> Rows<'_, bf16> {
        self.from(0)
    }

    /// All its rows from column `offset` on.
    pub fn from(&self, offset: usize) -> Rows<'_, bf16> {
        Rows { buffer: &self.buffer, offset, stride: self.cols }
    }

    /// As an operand of a product.
    pub fn operand(&self) -> gemm::Matrix<'_, bf16> {
        gemm::Matrix::of(&self.buffer, 0, self.cols)
    }
}

/// [`Live`] with the constant that tells the kernels of all rows.
pub enum LiveRows {
    /// See [`Live::Tokens`].
    Tokens,
    /// See [`Live::Images`].
    Images,
    /// See [`Live::Shard`].
    Shard,
    /// 0 and the number of rows, on the device and on the host.
    Constant(Buffer<i32>, [i32; 2]),
}

/// What the ops of a graph ask for beyond their operands.
#[derive(Default)]
pub(super) struct Needs {
    pub workspace: usize,
    pub schedules: Vec<(Modality, Limits)>,
    /// Of every residual branch.
    pub rates: Vec<f64>,
    /// Parameters whose gradients leave their squares, and how many sums these are in all.
    pub squared: Vec<usize>,
    pub square_sums: usize,
}

/// An op among its operands, to be prepared.
pub struct Site<'a> {
    pub(super) memory: &'a Memory,
    pub(super) graph: &'a Graph,
    pub(super) node: &'a Node,
    /// Its place in the order.
    pub(super) at: usize,
    /// Which results somebody reads.
    pub(super) read: &'a [bool],
    pub(super) needs: &'a mut Needs,
}

impl Site<'_> {
    /// The device.
    pub fn device(&self) -> &Device {
        &self.memory.device
    }

    /// What all batches have in common.
    pub fn shape(&self) -> BatchShape {
        let texts = self.memory.texts.filter(|_| self.modality() == Modality::Texts);
        texts.unwrap_or(self.memory.shape)
    }

    fn modality(&self) -> Modality {
        self.graph.modality(self.node)
    }

    /// What the tensor axis leaves to this rank.
    pub fn shard(&self) -> Shard {
        self.graph.shard()
    }

    /// How what the ranks of the tensor axis exchange moves beside products, where it does.
    pub fn ring(&self) -> Option<&DeviceRing> {
        self.memory.params.gathered().and_then(Gathered::ring)
    }

    /// Number of operands, present or not.
    pub fn inputs(&self) -> usize {
        self.node.inputs.len()
    }

    /// Operand `i` in bf16.
    ///
    /// # Errors
    /// It is missing, or of another type.
    pub fn input(&self, i: usize) -> Result<Matrix> {
        match self.node.inputs[i] {
            Some(tensor) => self.memory.matrix(self.graph, tensor, self.at),
            None => Err(Error::failure(format!("{} misses operand {i}", self.node.op.name()))),
        }
    }

    /// Operand `i` in f32, where it is present.
    ///
    /// # Errors
    /// It is of another type.
    pub fn input_f32(&self, i: usize) -> Result<Option<Buffer<f32>>> {
        self.node.inputs[i].map(|tensor| self.memory.vector(self.graph, tensor, self.at)).transpose()
    }

    /// Type of operand `i`, an activation.
    pub fn input_element(&self, i: usize) -> Element {
        self.node.inputs[i].map_or(Element::Bf16, |tensor| self.memory.layout.elements[tensor.0])
    }

    /// Columns of operand `i` without padding.
    pub fn input_cols(&self, i: usize) -> usize {
        self.node.inputs[i].map_or(0, |tensor| self.graph.info(tensor).cols)
    }

    /// Columns of result `i` without padding.
    pub fn output_cols(&self, i: usize) -> usize {
        self.node.outputs[i].map_or(0, |tensor| self.graph.info(tensor).cols)
    }

    /// Result `i` in bf16.
    ///
    /// # Errors
    /// Nobody reads it, or it is of another type.
    pub fn output(&self, i: usize) -> Result<Matrix> {
        self.output_opt(i)?
            .ok_or_else(|| Error::failure(format!("{} misses result {i}", self.node.op.name())))
    }

    /// Result `i` in bf16, where somebody reads it.
    ///
    /// # Errors
    /// It is of another type.
    pub fn output_opt(&self, i: usize) -> Result<Option<Matrix>> {
        let tensor = self.node.outputs[i].filter(|_| self.read[i]);
        tensor.map(|tensor| self.memory.matrix(self.graph, tensor, self.at)).transpose()
    }

    /// Result `i` in f32, where it is wanted; gradients of parameters are to be added to.
    ///
    /// # Errors
    /// It is of another type.
    pub fn output_f32(&self, i: usize) -> Result<Option<Buffer<f32>>> {
        let tensor = self.node.outputs[i].filter(|_| self.read[i]);
        tensor.map(|tensor| self.memory.vector(self.graph, tensor, self.at)).transpose()
    }

    /// Operand or result that has to be there.
    ///
    /// # Errors
    /// It is not.
    pub fn present<T>(&self, operand: Option<T>) -> Result<T> {
        operand.ok_or_else(|| Error::failure(format!("{} misses an operand", self.node.op.name())))
    }

    /// Whether result 0 has the memory of operand 0, as an op that only works in place needs it.
    ///
    /// # Errors
    /// It has not: somebody else reads the operand later.
    pub fn require_in_place(&self) -> Result<()> {
        let slot = |tensor: &Option<Tensor>| tensor.and_then(|t| self.memory.layout.slots[t.0].clone());
        if slot(&self.node.inputs[0]).is_some_and(|first| slot(&self.node.outputs[0]) == Some(first)) {
            return Ok(());
        }
        Err(Error::failure(format!(
            "{} only works in place on a device, and its operand is needed later; use --device cpu for this model",
            self.node.op.name()
        )))
    }

    /// The live rows of `matrix`, for kernels that want to be told in any case.
    ///
    /// # Errors
    /// The device has no room.
    pub fn live_rows(&self, matrix: &Matrix) -> Result<LiveRows> {
        Ok(match matrix.live {
            Live::Tokens => LiveRows::Tokens,
            Live::Images => LiveRows::Images,
            Live::Shard => LiveRows::Shard,
            Live::All => {
                let rows = [0, matrix.rows as i32];
                LiveRows::Constant(self.device().upload(&rows)?, rows)
            }
        })
    }

    /// The place for `count` sums of the squares of result `i`, a parameter's gradient, from which on [`Step::squares`]
    /// has them: where this node alone writes it, and its norm is taken on this rank.
    pub fn squares(&mut self, i: usize, count: usize) -> Option<usize> {
        let gradient = self.node.outputs[i]?;
        let Kind::Gradient(parameter) = self.graph.info(gradient).kind else { return None };
        let writers = self.graph.nodes().iter().filter(|node| node.outputs.contains(&Some(gradient))).count();
        if writers != 1 || self.memory.params.gathered().is_some() {
            return None;
        }
        let first = self.needs.square_sums;
        self.needs.squared.push(parameter);
        self.needs.square_sums += count;
        Some(first)
    }

    /// Makes the workspace of the step at least `bytes` large.
    pub fn workspace(&mut self, bytes: usize) {
        self.needs.workspace = self.needs.workspace.max(bytes);
    }

    /// The number of the schedule with these limits, made at the beginning of every step.
    pub fn schedule(&mut self, limits: Limits) -> usize {
        let wanted = (self.modality(), limits);
        let schedules = &mut self.needs.schedules;
        schedules.iter().position(|known| *known == wanted).unwrap_or_else(|| {
            schedules.push(wanted);
            schedules.len() - 1
        })
    }

    /// The number of the branch whose factors are drawn at the beginning of every step.
    pub fn drop_path(&mut self, drop_path: DropPath) -> usize {
        let branch = drop_path.branch as usize;
        let rates = &mut self.needs.rates;
        rates.resize(rates.len().max(branch + 1), 0.0);
        rates[branch] = drop_path.rate;
        branch
    }
}

/// What a launch sees of the step.
pub struct Step<'a> {
    /// The stream to queue on.
    pub stream: &'a Stream,
    /// The batch.
    pub batch: &'a DeviceBatch,
    /// At least what every op has asked for; shared, so nothing in it outlives a launch.
    pub workspace: &'a Buffer<u8>,
    /// One flag that is not 0: gradients of parameters are added to.
    pub accumulate: &'a Buffer<i32>,
    /// Sums of squares of gradients, see [`Site::squares`].
    pub squares: &'a Buffer<f64>,
    /// `[N]`: how many classes, or texts, are ahead of the image's own, −1 at weight 0.
    pub rank: &'a Buffer<i32>,
    /// One word, set where a label is no class.
    pub label_fault: &'a Buffer<i32>,
    /// The ranks that share out layers; none on one.
    pub tensor: Option<&'a DeviceGroup>,
    /// How what they exchange moves beside products, where it does.
    pub ring: Option<&'a DeviceRing>,
    pub(super) schedules: &'a [Schedule],
    pub(super) keep: &'a Buffer<f32>,
}

impl Step<'_> {
    /// Schedule `number`, see [`Site::schedule`].
    pub fn schedule(&self, number: usize) -> &Schedule {
        &self.schedules[number]
    }

    /// `[branches, T]` factors of stochastic depth, of this rank's tokens, see [`Site::drop_path`].
    pub fn keep(&self) -> &Buffer<f32> {
        self.keep
    }

    /// Where the images of the batch lie.
    pub fn packed(&self) -> Packed<'_> {
        let batch = self.batch;
        Packed { cu_seqlens: &batch.cu_seqlens, cu_seqlens_host: &batch.host_cu_seqlens }
    }

    /// The rows of a matrix that hold anything, told as a batch whose last image ends with them.
    pub fn rows<'s>(&'s self, rows: &'s LiveRows) -> Packed<'s> {
        match rows {
            LiveRows::Tokens => self.packed(),
            LiveRows::Images => {
                Packed { cu_seqlens: &self.batch.images, cu_seqlens_host: &self.batch.host_images }
            }
            LiveRows::Shard => {
                Packed { cu_seqlens: &self.batch.shard, cu_seqlens_host: &self.batch.host_shard }
            }
            LiveRows::Constant(buffer, host) => Packed { cu_seqlens: buffer, cu_seqlens_host: host },
        }
    }

    /// A buffer and the place in it that holds the number of live rows; none where all are.
    pub fn live(&self, matrix: &Matrix) -> Option<(&Buffer<i32>, usize)> {
        match matrix.live {
            Live::Tokens => Some((&self.batch.cu_seqlens, self.batch.shape().slots)),
            Live::Images => Some((&self.batch.images, 1)),
            Live::Shard => Some((&self.batch.shard, 1)),
            Live::All => None,
        }
    }

    /// The same as an operand of a product.
    pub fn live_rows(&self, matrix: &Matrix) -> gemm::Vector<'_, i32> {
        self.live(matrix).map_or(gemm::Vector::none(), |(buffer, at)| gemm::Vector::of(buffer, at))
    }
}
