//! Raw launches: constant arguments as the kernels read them, nothing checked, nothing allocated, nothing
//! waited for.

use half::bf16;

use crate::Result;
use crate::device::{Kernels, Launch, Ptr, RawStream, TensorBoxes, TensorElement, TensorMap, TensorSwizzle};

use super::heuristics::Plan;
use super::tiles::{self, Kind, Layout};

/// Constant arguments of a GEMM kernel; `kernels/gemm/params.cuh` says what each means. Addresses and
/// strides of bf16 matrices are multiples of 16 bytes, and so are those of `sum`, `bias`, `gamma` and
/// `workspace`; what is optional may be null.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GemmParams {
    /// NT, NN: `[m, k]`; TN: `[k, m]`.
    pub a: Ptr<bf16>,
    /// NT: `[n, k]`; NN, TN: `[k, n]`.
    pub b: Ptr<bf16>,
    /// `[m, n]`, for results in bf16.
    pub out: Ptr<bf16>,
    /// `[m, n]`, for results in f32.
    pub sum: Ptr<f32>,
    /// Number of live rows of the batch, or null: all.
    pub live: Ptr<i32>,
    /// `[n]` or null.
    pub bias: Ptr<f32>,
    /// `[m, n]` or null: what GELU is taken of is written here.
    pub pre: Ptr<bf16>,
    /// `[m, n]` or null: residual, or what GELU was taken of.
    pub side: Ptr<bf16>,
    /// `[n]` or null: LayerScale.
    pub gamma: Ptr<f32>,
    /// `[m]` or null: drop-path factor of a row.
    pub keep: Ptr<f32>,
    /// Column sums or slices, see [`workspace_bytes`]; or null.
    pub workspace: Ptr<f32>,
    /// [`square_sums`] of `sum`, or null; not written where k is split.
    pub squares: Ptr<f64>,
    /// Whether `sum` is added to (not 0) or overwritten (0, or null).
    pub accumulate: Ptr<i32>,
    /// Elements between rows of `a`.
    pub lda: i64,
    /// Elements between rows of `b`.
    pub ldb: i64,
    /// Elements between rows of the result.
    pub ldc: i64,
    /// Elements between rows of `pre`.
    pub ld_pre: i64,
    /// Elements between rows of `side`.
    pub ld_side: i64,
    /// Rows of the result.
    pub m: i32,
    /// Columns of the result.
    pub n: i32,
    /// Length of the sums.
    pub k: i32,
    /// 0: no GELU, 1: by erf, 2: by tanh.
    pub gelu: i32,
    /// [`Plan::stages`].
    pub stages: i32,
    /// [`Plan::group`].
    pub group: i32,
}

/// Bytes of workspace of a plan: f32 slices `[splits, m, n]` where k is split, f32 column sums
/// `[tiles along m, n]` where `column_sums` are wanted of [`Kind::GeluGrad`], else none.
pub fn workspace_bytes(plan: &Plan, kind: Kind, m: usize, n: usize, column_sums: bool) -> usize {
    let rows = match kind {
        Kind::Store => 0,
        Kind::GeluGrad if column_sums => m.div_ceil(plan.tile.m as usize),
        Kind::GeluGrad => 0,
        Kind::Sum if plan.splits > 1 => plan.splits as usize * m,
        Kind::Sum => 0,
    };
    rows * n * size_of::<f32>()
}

/// How many sums of squares a product of [`Kind::Sum`] leaves of its result: of each warp's part of a tile, or of each
/// block of [`sum_slices`] where k is split.
pub fn square_sums(plan: &Plan, m: usize, n: usize) -> usize {
    if plan.splits > 1 {
        return slice_blocks(m, n);
    }
    let tile = plan.tile;
    let (warps, columns) = match tile.hopper {
        None => (tile.m / tile.warp_m, tile.warp_n),
        Some(_) => (tile.writers(), HOPPER_PART),
    };
    m.div_ceil(tile.m as usize) * warps as usize * n.div_ceil(columns as usize)
}

/// Columns that a warp writes at a time on Hopper, of tiles for sums.
const HOPPER_PART: u32 = 64;

/// Blocks of [`sum_slices`]: four columns a thread.
fn slice_blocks(rows: usize, cols: usize) -> usize {
    (rows * cols / 4).div_ceil(SLICE_THREADS as usize)
}

const SLICE_THREADS: u32 = 256;

/// Queues the product alone: column sums and slices are left in the workspace, for [`sum_rows`] and
/// [`sum_slices`]. `dependent`: it may be started before the launch before it has ended.
///
/// # Errors
/// The device refuses the launch.
///
/// # Safety
/// As for [`Kernels::launch`]: every matrix lies in memory of the device as [`GemmParams`] says, the
/// workspace has [`workspace_bytes`], `stages` and `group` are the plan's.
pub unsafe fn gemm(
    kernels: &Kernels,
    stream: RawStream,
    (layout, kind): (Layout, Kind),
    plan: &Plan,
    params: &GemmParams,
    dependent: bool,
) -> Result<()> {
    let name = tiles::name(layout, kind, plan.tile);
    if plan.tile.hopper.is_some() {
        let (params, launch) = hopper(kernels, layout, plan, params)?;
        let launch = Launch { dependent, ..launch };
        // SAFETY: the caller answers for addresses and stream.
        return unsafe { kernels.launch(&name, launch, stream, &params) };
    }
    let tiles = plan.tiles(params.m as usize, params.n as usize);
    let mut launch = Launch::new([tiles as u32, plan.splits, 1], plan.tile.threads(), plan.shared_bytes());
    launch.dependent = dependent;
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch(&name, launch, stream, params) }
}

/// Constant arguments of Hopper's kernel, mirror of `HopperGemmParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct HopperGemmParams {
    a: TensorMap,
    b: TensorMap,
    gemm: GemmParams,
    splits: i32,
    clusters: i32,
}

/// What Hopper's kernel is launched with.
fn hopper(
    kernels: &Kernels,
    layout: Layout,
    plan: &Plan,
    params: &GemmParams,
) -> Result<(HopperGemmParams, Launch)> {
    let tile = plan.tile;
    let own = if tile.shares_a() { tile.m / 2 } else { tile.m };
    let a = tensor_map(kernels, params.a, params.lda, [params.m, params.k], layout == Layout::Tn, own)?;
    hopper_with(kernels, layout, plan, params, a)
}

/// The same with a tensor map of the first operand.
pub(super) fn hopper_with(
    kernels: &Kernels,
    layout: Layout,
    plan: &Plan,
    params: &GemmParams,
    a: TensorMap,
) -> Result<(HopperGemmParams, Launch)> {
    let tile = plan.tile;
    let own = if tile.shares_a() { tile.n } else { tile.n / 2 };
    let params = HopperGemmParams {
        a,
        b: tensor_map(kernels, params.b, params.ldb, [params.n, params.k], layout != Layout::Nt, own)?,
        gemm: *params,
        splits: plan.splits as i32,
        clusters: plan.clusters as i32,
    };
    let launch = Launch::new([2 * plan.clusters, 1, 1], tile.threads(), plan.shared_bytes());
    Ok((params, Launch { cluster: 2, ..launch }))
}

/// The tensor map of an operand of `rows` rows of C and `k` elements, of which a block copies `own` rows at a time.
fn tensor_map(
    kernels: &Kernels,
    address: Ptr<bf16>,
    stride: i64,
    [rows, k]: [i32; 2],
    rows_are_k: bool,
    own: u32,
) -> Result<TensorMap> {
    let (rows, k) = (rows as u32, k as u32);
    let (sizes, side) = if rows_are_k { ([rows, k], 64) } else { ([k, rows], own) };
    kernels.tensor_map(&TensorBoxes {
        element: TensorElement::Bf16,
        address: address.address(),
        sizes: &sizes,
        strides: &[2 * stride as u64],
        tile: &[64, side],
        swizzle: TensorSwizzle::Bytes128,
    })
}

/// Constant arguments of `sum_f32_slices`: `out[r, c] = (out[r, c] if accumulate) + Σ_s slices[s, r, c]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumSlicesParams {
    /// `[count, rows, cols]`.
    pub slices: Ptr<f32>,
    /// `[rows, cols]`.
    pub out: Ptr<f32>,
    /// [`square_sums`] of `out`, or null.
    pub squares: Ptr<f64>,
    /// Whether `out` is added to (not 0) or overwritten (0, or null).
    pub accumulate: Ptr<i32>,
    /// Elements between rows of `out`, a multiple of 4.
    pub ld_out: i64,
    /// Number of slices.
    pub count: i32,
    /// Rows of a slice.
    pub rows: i32,
    /// Columns of a slice, a multiple of 4.
    pub cols: i32,
}

/// Queues `sum_f32_slices`.
///
/// # Errors
/// The device refuses the launch.
///
/// # Safety
/// As for [`Kernels::launch`], with matrices as [`SumSlicesParams`] says, 16-byte aligned, of fewer than 2^34
/// elements.
pub unsafe fn sum_slices(kernels: &Kernels, stream: RawStream, params: &SumSlicesParams) -> Result<()> {
    let blocks = slice_blocks(params.rows as usize, params.cols as usize);
    let launch = Launch::new([blocks as u32, 1, 1], SLICE_THREADS, SLICE_THREADS / 32 * 8);
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch("sum_f32_slices", launch, stream, params) }
}

/// Constant arguments of `sum_f32_rows`: `out[c] = (out[c] if accumulate) + Σ_r rows[r, c]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumRowsParams {
    /// `[count, cols]`.
    pub rows: Ptr<f32>,
    /// `[cols]`.
    pub out: Ptr<f32>,
    /// Whether `out` is added to (not 0) or overwritten (0, or null).
    pub accumulate: Ptr<i32>,
    /// Number of rows.
    pub count: i32,
    /// Number of columns.
    pub cols: i32,
}

/// Queues `sum_f32_rows`.
///
/// # Errors
/// The device refuses the launch.
///
/// # Safety
/// As for [`Kernels::launch`], with arrays as [`SumRowsParams`] says.
pub unsafe fn sum_rows(kernels: &Kernels, stream: RawStream, params: &SumRowsParams) -> Result<()> {
    let launch = Launch::new([(params.cols as u32).div_ceil(32), 1, 1], 256, 8 * 32 * 4);
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch("sum_f32_rows", launch, stream, params) }
}

/// Constant arguments of `bias_grad_bf16`: column sums of `rows` rows at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BiasGradParams {
    /// `[m, n]`, 16-byte aligned.
    pub dy: Ptr<bf16>,
    /// Number of live rows, or null: all.
    pub live: Ptr<i32>,
    /// `[slices, n]`.
    pub partial: Ptr<f32>,
    /// Elements between rows of `dy`, a multiple of 8.
    pub ld: i64,
    /// Rows of `dy`.
    pub m: i32,
    /// Columns of `dy`, a multiple of 8.
    pub n: i32,
    /// Rows of a slice.
    pub rows: i32,
}

/// Rows of a slice of `bias_grad_bf16`, of which each of its 32 groups of lanes takes 8.
pub const BIAS_GRAD_ROWS: usize = 256;

/// Bytes of workspace of [`bias_grad`].
pub fn bias_grad_workspace_bytes(m: usize, n: usize) -> usize {
    m.div_ceil(BIAS_GRAD_ROWS) * n * size_of::<f32>()
}

/// Queues `bias_grad_bf16`, which leaves a row for every slice in `partial`, for [`sum_rows`].
///
/// # Errors
/// The device refuses the launch.
///
/// # Safety
/// As for [`Kernels::launch`], with arrays as [`BiasGradParams`] says.
pub unsafe fn bias_grad(kernels: &Kernels, stream: RawStream, params: &BiasGradParams) -> Result<()> {
    let grid = [(params.n as u32).div_ceil(64), (params.m as u32).div_ceil(params.rows as u32), 1];
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch("bias_grad_bf16", Launch::new(grid, 256, 8 * 64 * 4), stream, params) }
}
