//! Raw launches: constant arguments as the kernels read them, nothing checked, nothing allocated, nothing waited
//! for.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::instances::{GRAD_THREADS, Mode, ROPE_TABLE, ROPE_THREADS, THREADS, forward_name, grad_name};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;
use crate::kernels::gemm::raw::{SumRowsParams, SumSlicesParams, sum_rows, sum_slices};
use crate::kernels::operand::grid;

/// Columns of a block of the forward kernels.
const COLUMNS: usize = 64;
/// Table rows of a block of the gradients.
const GRAD_ROWS: usize = 64;
/// Columns of a block of the gradients.
const GRAD_COLUMNS: usize = 128;

/// A table row and its weight, mirror of `PositionTap`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Tap {
    /// Table row.
    pub row: u32,
    /// Its weight.
    pub weight: f32,
}

/// The filters of one axis, mirror of `PositionBank`: those of
/// [`FilterBank`](crate::ops::FilterBank), or null where coordinates are absolute.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BankParams {
    /// `[longest·(longest + 1)/2 + 1]`.
    pub start: Ptr<u32>,
    /// Table rows and weights.
    pub taps: Ptr<Tap>,
}

/// Where the tokens stand, mirror of `PositionPlaces`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PlacesParams {
    /// `[tokens, 2]`, 4-byte aligned.
    pub positions: Ptr<u16>,
    /// `[images, 2]`, 4-byte aligned.
    pub grids: Ptr<u16>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// Filters of the rows and of the columns: both, or none.
    pub bank: [BankParams; 2],
    /// Token rows.
    pub tokens: i32,
    /// Image slots, at least 1.
    pub images: i32,
    /// Rows of the table, or of the row axis.
    pub rows: i32,
    /// Its columns.
    pub columns: i32,
    /// Longest axis that the filters are made for; longer ones read as if they were so long.
    pub longest: i32,
    /// 1: both axes are resampled, or divided, by the longer side.
    pub aspect: i32,
    /// 1: one table, numbered in the order of the image's own grid.
    pub flat: i32,
}

/// Arguments of the forward kernels, mirror of `PositionForward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardParams {
    /// Token rows, all written.
    pub out: Ptr<bf16>,
    /// Token rows that the embedding is added to; null: zeros. May be `out`.
    pub x: Ptr<bf16>,
    /// The table and null; those of rows and columns; the Fourier map `[width / 2, 2]` and null.
    pub table: [Ptr<f32>; 2],
    /// A multiple of 8.
    pub out_stride: i64,
    /// A multiple of 8.
    pub x_stride: i64,
    /// The tokens.
    pub places: PlacesParams,
    /// Columns: a multiple of 8, of 16 for [`Mode::Stack`] and [`Mode::Fourier`].
    pub width: i32,
    /// For [`Mode::Fourier`]: 1 where coordinates are divided by the image's sides.
    pub fractional: i32,
}

/// Arguments of the gradient of one table, mirror of `PositionGrad`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GradParams {
    /// `[slices, table_rows, columns]`, written.
    pub partial: Ptr<f32>,
    /// Token rows, [`dout_stride`](Self::dout_stride) elements apart, from the first column of this table's part
    /// on.
    pub dout: Ptr<bf16>,
    /// The other table of a product, else null.
    pub other: Ptr<f32>,
    /// A multiple of 8.
    pub dout_stride: i64,
    /// The tokens.
    pub places: PlacesParams,
    /// Axis of the table, 2 for the one table of both.
    pub axis: i32,
    /// Rows of the table.
    pub table_rows: i32,
    /// Its columns, a multiple of 8.
    pub columns: i32,
    /// Tokens of a slice, a multiple of 32.
    pub slice: i32,
}

/// Arguments of the gradient of a Fourier map, mirror of `PositionFourierGrad`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FourierGradParams {
    /// `[slices, width / 2, 2]`, written.
    pub partial: Ptr<f32>,
    /// Token rows.
    pub dout: Ptr<bf16>,
    /// `[width / 2, 2]`.
    pub map: Ptr<f32>,
    /// A multiple of 8.
    pub dout_stride: i64,
    /// The tokens.
    pub places: PlacesParams,
    /// Columns of `dout`, a multiple of 16.
    pub width: i32,
    /// 1 where coordinates are divided by the image's sides.
    pub fractional: i32,
    /// Tokens of a slice, a multiple of 32.
    pub slice: i32,
}

/// How a pair of columns turns, mirror of `RopePair`.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct RopePair {
    /// Turns of 2π at coordinate 1, rounded.
    pub turns: f32,
    /// What rounding took off them.
    pub rest: f32,
    /// 0: with rows; 1: with columns.
    pub axis: i32,
    /// Fills 16 bytes.
    pub unused: i32,
}

/// Arguments of the rotary table, mirror of `RopeTable`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RopeTableParams {
    /// `[tokens, pairs, 2]`, all rows written: cos and sin.
    pub out: Ptr<f32>,
    /// `[tokens, 2]`, 4-byte aligned.
    pub positions: Ptr<u16>,
    /// `[images, 2]`, 4-byte aligned.
    pub grids: Ptr<u16>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// `[pairs]`.
    pub pair: Ptr<RopePair>,
    /// Token rows; times half the pairs below 2^31.
    pub tokens: i32,
    /// Image slots, at least 1.
    pub images: i32,
    /// Pairs of a head, an even number.
    pub pairs: i32,
    /// 0: index; 1: index over the side; 2 to 4: centred, by the own, longer or shorter side; 5: from end to end.
    pub coordinate: i32,
    /// Added to indices.
    pub offset: f32,
    /// Fills 8 bytes.
    pub unused: i32,
}

/// Blocks of one slice of a table's gradient.
pub fn grad_blocks(table_rows: usize, columns: usize) -> usize {
    table_rows.div_ceil(GRAD_ROWS) * columns.div_ceil(GRAD_COLUMNS)
}

/// Blocks of one slice of a Fourier map's gradient.
pub fn fourier_grad_blocks(width: usize) -> usize {
    (width / 2).div_ceil(GRAD_COLUMNS)
}

/// Queues the forward kernel of a mode.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned where nothing else is said (`cu_seqlens`
/// 4-byte), and stays so until the kernel has run. The taps name rows of the tables.
pub unsafe fn launch_forward(
    kernels: &Kernels,
    stream: RawStream,
    mode: Mode,
    params: &ForwardParams,
) -> Result<()> {
    let tiles = (params.places.tokens as usize).div_ceil(THREADS as usize);
    let blocks = grid(tiles * (params.width as usize).div_ceil(COLUMNS))?;
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(&forward_name(mode), Launch::new(blocks, THREADS, 16 * THREADS), stream, params) }
}

/// Queues the gradient of one table: `dtable[table_rows, columns]` is added to where `accumulate` is not null and
/// leads to a number other than 0, else written.
///
/// # Errors
/// As for [`launch_forward`].
///
/// # Safety
/// As for [`launch_forward`]; `partial` holds every slice of the tokens.
pub unsafe fn launch_grad(
    kernels: &Kernels,
    stream: RawStream,
    params: &GradParams,
    dtable: Ptr<f32>,
    accumulate: Ptr<i32>,
) -> Result<()> {
    let (rows, columns) = (params.table_rows as usize, params.columns as usize);
    let slices = (params.places.tokens as u32).div_ceil(params.slice as u32).max(1);
    let blocks = [grid(grad_blocks(rows, columns))?[0], slices, 1];
    let shared = 4 * (rows.min(GRAD_ROWS) * GRAD_COLUMNS) as u32;
    let sums = SumSlicesParams {
        slices: params.partial,
        out: dtable,
        squares: Ptr::null(),
        accumulate,
        ld_out: columns as i64,
        count: slices as i32,
        rows: params.table_rows,
        cols: params.columns,
    };
    let name = grad_name(!params.other.is_null());
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch(name, Launch::new(blocks, GRAD_THREADS, shared), stream, params)?;
        sum_slices(kernels, stream, &sums)
    }
}

/// Queues the gradient of a Fourier map, `dmap[width / 2, 2]`, as [`launch_grad`] does.
///
/// # Errors
/// As for [`launch_forward`].
///
/// # Safety
/// As for [`launch_grad`].
pub unsafe fn launch_fourier_grad(
    kernels: &Kernels,
    stream: RawStream,
    params: &FourierGradParams,
    dmap: Ptr<f32>,
    accumulate: Ptr<i32>,
) -> Result<()> {
    let slices = (params.places.tokens as u32).div_ceil(params.slice as u32).max(1);
    let blocks = [fourier_grad_blocks(params.width as usize) as u32, slices, 1];
    let sums = SumRowsParams {
        rows: params.partial,
        out: dmap,
        accumulate,
        count: slices as i32,
        cols: params.width,
    };
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch("position_fourier_grad_f32", Launch::new(blocks, GRAD_THREADS, 0), stream, params)?;
        sum_rows(kernels, stream, &sums)
    }
}

/// Queues the rotary table.
///
/// # Errors
/// As for [`launch_forward`].
///
/// # Safety
/// As for [`launch_forward`].
pub unsafe fn launch_rope_table(
    kernels: &Kernels,
    stream: RawStream,
    params: &RopeTableParams,
) -> Result<()> {
    let items = params.tokens as usize * params.pairs as usize / 2;
    let blocks = grid(items.div_ceil(ROPE_THREADS as usize))?;
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(ROPE_TABLE, Launch::new(blocks, ROPE_THREADS, 0), stream, params) }
}
