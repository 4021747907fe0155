//! Sums and GELU of whole tensors that no other kernel takes along.
//!
//! | op of the graph | kernel |
//! |---|---|
//! | add: gradients of one activation meet | [`Add`] with [`Addend::Rows`] |
//! | add row: a parameter added to every row | [`Add`] with [`Addend::Row`] |
//! | its gradient | [`BiasGrad`](super::gemm::BiasGrad) |
//! | accumulate: the gradient of an activation that is a parameter | [`accumulate`] |
//! | the same where it is a sum in f32, such as that of a scale | [`accumulate_f32`] |
//! | gelu: a hidden activation made again from the pre-activation | [`Gelu`] |

use half::bf16;

use crate::device::{Buffer, Kernels, Launch, Ptr, RawStream, Stream};
use crate::error::{Error, Result};
use crate::kernels::gemm::gelu_code;
use crate::kernels::operand::{check_extents, check_len, check_some, check_wide, check_width, grid};

pub use super::registry::elementwise as instances;
use crate::ops::GeluKind;
use instances::THREADS;

/// Elements of a block of the sums and of GELU.
const BLOCK_ELEMENTS: usize = 4 * 8 * THREADS as usize;
/// Elements of a block of [`accumulate`].
const ACCUMULATE_ELEMENTS: usize = 8 * THREADS as usize;

/// Arguments of the sums, mirror of `ElementwiseAdd`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AddParams {
    /// `[rows, width]`, all written; may be `a`.
    pub out: Ptr<bf16>,
    /// `[rows, width]`.
    pub a: Ptr<bf16>,
    /// `[rows, width]`; null where `row` is added.
    pub b: Ptr<bf16>,
    /// `[width]`; not read where `b` is given.
    pub row: Ptr<f32>,
    /// The number of rows that hold anything, the others become zeros; null: all.
    pub live: Ptr<i32>,
    /// Rows.
    pub rows: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
}

/// Arguments of [`launch_accumulate`], mirror of `ElementwiseAccumulate`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AccumulateParams {
    /// `[size]`.
    pub out: Ptr<f32>,
    /// `[size]`.
    pub x: Ptr<bf16>,
    /// Not 0: `out` is added to. 0, or null: it is written.
    pub accumulate: Ptr<i32>,
    /// Elements, a multiple of 8.
    pub size: i64,
}

/// Arguments of [`launch_accumulate_f32`], mirror of `ElementwiseAccumulateSingle`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AccumulateF32Params {
    /// `[size]`.
    pub out: Ptr<f32>,
    /// `[size]`.
    pub x: Ptr<f32>,
    /// Not 0: `out` is added to. 0, or null: it is written.
    pub accumulate: Ptr<i32>,
    /// Elements.
    pub size: i64,
}

/// Arguments of [`launch_gelu`], mirror of `ElementwiseGelu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GeluParams {
    /// `[rows, width]`, all written.
    pub out: Ptr<bf16>,
    /// `[rows, width]`.
    pub x: Ptr<bf16>,
    /// The number of rows that hold anything, the others become zeros; null: all.
    pub live: Ptr<i32>,
    /// Rows.
    pub rows: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
    /// 1: exact (erf), 2: its approximation by tanh.
    pub gelu: i32,
}

/// What is added.
#[derive(Clone, Copy)]
pub enum Addend<'a> {
    /// `[rows, width]`.
    Rows(&'a Buffer<bf16>),
    /// `[width]`, to every row.
    Row(&'a Buffer<f32>),
}

/// `out = a + b`, dense rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Add {
    /// Rows.
    pub rows: usize,
    /// Columns, a multiple of 8.
    pub width: usize,
}

impl Add {
    /// Queues `out[rows, width] = a + b`; rows from `live[at]` on become zeros. `out` is another buffer than `a`,
    /// or none: then the sum takes the place of `a`.
    ///
    /// # Errors
    /// Sizes that do not fit together, an entry of `live` that is not there, a launch that the device refuses.
    pub fn launch(
        &self,
        stream: &Stream,
        out: Option<&Buffer<bf16>>,
        a: &Buffer<bf16>,
        b: Addend<'_>,
        live: Option<(&Buffer<i32>, usize)>,
    ) -> Result<()> {
        let Self { rows, width } = *self;
        check_extents("sum", &[rows])?;
        check_width("sum", width, 8)?;
        let live = live_entry(live)?;
        let (b, row) = match b {
            Addend::Rows(b) => (check_wide("b", b, &[rows, width])?, Ptr::null()),
            Addend::Row(row) => (Ptr::null(), check_wide("row", row, &[width])?),
        };
        let params = AddParams {
            out: check_wide("out", out.unwrap_or(a), &[rows, width])?,
            a: check_wide("a", a, &[rows, width])?,
            b,
            row,
            live,
            rows: rows as i32,
            width: width as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_add(stream.device().kernels(), stream.raw(), &params) }
    }
}

/// `y = gelu(x)`, dense rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gelu {
    /// Rows.
    pub rows: usize,
    /// Columns, a multiple of 8.
    pub width: usize,
    /// Which formula.
    pub kind: GeluKind,
}

impl Gelu {
    /// Queues `y[rows, width] = gelu(x)`; rows from `live[at]` on become zeros. `y` is another buffer than `x`, which is
    /// still needed for the slope.
    ///
    /// # Errors
    /// As for [`Add::launch`].
    pub fn launch(
        &self,
        stream: &Stream,
        y: &Buffer<bf16>,
        x: &Buffer<bf16>,
        live: Option<(&Buffer<i32>, usize)>,
    ) -> Result<()> {
        let Self { rows, width, kind } = *self;
        check_extents("gelu", &[rows])?;
        check_width("gelu", width, 8)?;
        let params = GeluParams {
            out: check_wide("y", y, &[rows, width])?,
            x: check_wide("x", x, &[rows, width])?,
            live: live_entry(live)?,
            rows: rows as i32,
            width: width as i32,
            gelu: gelu_code(kind),
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_gelu(stream.device().kernels(), stream.raw(), &params) }
    }
}

/// The entry of a buffer that holds the number of live rows; null where all are.
fn live_entry(live: Option<(&Buffer<i32>, usize)>) -> Result<Ptr<i32>> {
    match live {
        Some((buffer, at)) if at < buffer.len() => Ok(buffer.ptr().offset(at)),
        Some((buffer, at)) => Err(Error::usage(format!(
            "live: there is no entry {at} in a buffer of {}; name one that holds the number of rows",
            buffer.len()
        ))),
        None => Ok(Ptr::null()),
    }
}

/// Queues `out (+)= x`: added to where `flag` holds a number other than 0, else written.
///
/// # Errors
/// Lengths that differ or are no multiple of 8, a launch that the device refuses.
pub fn accumulate(
    stream: &Stream,
    out: &Buffer<f32>,
    x: &Buffer<bf16>,
    flag: Option<&Buffer<i32>>,
) -> Result<()> {
    if !x.len().is_multiple_of(8) || x.is_empty() {
        return Err(Error::usage(format!(
            "a gradient of {} elements cannot be accumulated, expected a multiple of 8",
            x.len()
        )));
    }
    let params = AccumulateParams {
        out: check_wide("out", out, &[x.len()])?,
        x: check_wide("x", x, &[x.len()])?,
        accumulate: check_some("accumulate", flag, &[1])?,
        size: x.len() as i64,
    };
    // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
    unsafe { launch_accumulate(stream.device().kernels(), stream.raw(), &params) }
}

/// As [`accumulate`] for a gradient in f32 of any number of elements.
///
/// # Errors
/// Lengths that differ, a launch that the device refuses.
pub fn accumulate_f32(
    stream: &Stream,
    out: &Buffer<f32>,
    x: &Buffer<f32>,
    flag: Option<&Buffer<i32>>,
) -> Result<()> {
    let params = AccumulateF32Params {
        out: check_len("out", out, &[x.len()])?,
        x: x.ptr(),
        accumulate: check_some("accumulate", flag, &[1])?,
        size: x.len() as i64,
    };
    // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
    unsafe { launch_accumulate_f32(stream.device().kernels(), stream.raw(), &params) }
}

/// Queues a sum. Allocates nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned (`live` 4-byte), and stays so until the kernel
/// has run.
pub unsafe fn launch_add(kernels: &Kernels, stream: RawStream, params: &AddParams) -> Result<()> {
    let size = params.rows as usize * params.width as usize;
    let name = if params.b.is_null() { "elementwise_add_row_bf16" } else { "elementwise_add_bf16" };
    let launch = Launch::new(grid(size.div_ceil(BLOCK_ELEMENTS))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(name, launch, stream, params) }
}

/// Queues `out = gelu(x)`. Allocates nothing and waits for nothing.
///
/// # Errors
/// As for [`launch_add`].
///
/// # Safety
/// As for [`launch_add`].
pub unsafe fn launch_gelu(kernels: &Kernels, stream: RawStream, params: &GeluParams) -> Result<()> {
    let size = params.rows as usize * params.width as usize;
    let launch = Launch::new(grid(size.div_ceil(BLOCK_ELEMENTS))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("elementwise_gelu_bf16", launch, stream, params) }
}

/// Queues `out (+)= x`. Allocates nothing and waits for nothing.
///
/// # Errors
/// As for [`launch_add`].
///
/// # Safety
/// As for [`launch_add`].
pub unsafe fn launch_accumulate(
    kernels: &Kernels,
    stream: RawStream,
    params: &AccumulateParams,
) -> Result<()> {
    let launch = Launch::new(grid((params.size as usize).div_ceil(ACCUMULATE_ELEMENTS))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("elementwise_accumulate_f32", launch, stream, params) }
}

/// Queues `out (+)= x`, of f32. Allocates nothing and waits for nothing.
///
/// # Errors
/// As for [`launch_add`].
///
/// # Safety
/// Every address is valid for what its field says, 4-byte aligned, and stays so until the kernel has run.
pub unsafe fn launch_accumulate_f32(
    kernels: &Kernels,
    stream: RawStream,
    params: &AccumulateF32Params,
) -> Result<()> {
    let launch = Launch::new(grid((params.size as usize).div_ceil(THREADS as usize))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("elementwise_accumulate_single_f32", launch, stream, params) }
}
