//! Matrices, and their product: in f32 or f64 by the `gemm` crate, or of bf16 ([`super::bf16`]).

use gemm::Parallelism;

use super::bf16;
use crate::cpu::real::Real;

/// A strided view of a matrix: element (i, j) is `data[i·row_stride + j·col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, R> {
    /// Elements, from (0, 0) on.
    pub data: &'a [R],
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

impl<'a, R> Mat<'a, R> {
    /// A row-major matrix whose rows lie `row_stride` apart.
    pub fn new(data: &'a [R], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The same view of other elements.
    pub(super) fn of<S>(self, data: &'a [S]) -> Mat<'a, S> {
        Mat {
            data,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            col_stride: self.col_stride,
        }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A row-major matrix that is written: element (i, j) is `data[i·row_stride + j]`.
#[derive(Debug)]
pub struct MatMut<'a, R> {
    /// Elements, from (0, 0) on.
    pub data: &'a mut [R],
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Distance between rows, at least `cols`.
    pub row_stride: usize,
}

impl<'a, R> MatMut<'a, R> {
    /// A row-major matrix whose rows lie `row_stride` apart.
    pub fn new(data: &'a mut [R], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
    }
}

/// Whether all elements of a strided matrix lie in a slice of `len` elements, and its strides
/// can be given to pointer arithmetic.
fn fits(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> bool {
    if rows == 0 || cols == 0 {
        return true;
    }
    let last = (rows - 1)
        .checked_mul(row_stride)
        .zip((cols - 1).checked_mul(col_stride))
        .and_then(|(row, col)| row.checked_add(col));
    last.is_some_and(|last| last < len)
        && isize::try_from(row_stride).is_ok()
        && isize::try_from(col_stride).is_ok()
}

/// `out = (out if accumulate else 0) + scale · a · b`; with `parallel` on rayon's threads. The
/// result is the same bit for bit with any number of threads: they share out tiles of `out`, and
/// the order of every sum follows from the shapes alone. Operands of f32 are rounded to bf16 while [`bf16::InUse`] lives.
///
/// # Panics
/// If shapes do not match or a matrix does not lie in its slice: a bug of the caller, not of a user.
pub fn gemm<R: Real>(
    out: MatMut<'_, R>,
    accumulate: bool,
    scale: R,
    a: Mat<'_, R>,
    b: Mat<'_, R>,
    parallel: bool,
) {
    check(&out, &a, &b);
    if bf16::in_use()
        && let (Some(to), Some(a_data), Some(b_data)) =
            (R::single_mut(out.data), R::single(a.data), R::single(b.data))
    {
        let out = MatMut::new(to, out.rows, out.cols, out.row_stride);
        let (units, scale) = (bf16::Units::best(), scale.f64() as f32);
        return bf16::gemm(units, out, accumulate, scale, a.of(a_data), b.of(b_data), parallel);
    }
    product(out, accumulate, scale, a, b, parallel);
}

fn check<R>(out: &MatMut<'_, R>, a: &Mat<'_, R>, b: &Mat<'_, R>) {
    assert!(
        out.rows == a.rows && out.cols == b.cols && a.cols == b.rows,
        "gemm: [{}, {}] is not the shape of [{}, {}] · [{}, {}]",
        out.rows,
        out.cols,
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
    assert!(
        fits(a.data.len(), a.rows, a.cols, a.row_stride, a.col_stride)
            && fits(b.data.len(), b.rows, b.cols, b.row_stride, b.col_stride)
            && fits(out.data.len(), out.rows, out.cols, out.row_stride, 1)
            && (out.row_stride >= out.cols || out.rows <= 1),
        "gemm: a matrix does not lie in its slice"
    );
}

/// [`gemm`] in the precision of the operands.
pub(super) fn product<R: Real>(
    out: MatMut<'_, R>,
    accumulate: bool,
    scale: R,
    a: Mat<'_, R>,
    b: Mat<'_, R>,
    parallel: bool,
) {
    check(&out, &a, &b);
    let parallelism =
        if parallel { Parallelism::Rayon(rayon::current_num_threads()) } else { Parallelism::None };
    // SAFETY: `fits` holds for all three matrices, so every element that is read or written lies in
    // its slice; `out` is borrowed mutably, so it overlaps neither operand, and its rows do not
    // overlap each other. `R` is f32 or f64, the only implementors of `Real`.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            R::ONE,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
