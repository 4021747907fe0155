//! Operands as tiles of 16 rows or columns by 32 of the inner dimension, rounded to bf16.

use std::arch::x86_64::*;

use crate::cpu::gemm::Mat;

/// Rows of a left tile, columns of a right one.
pub const SIDE: usize = 16;
/// What a tile spans of the inner dimension.
pub const DEPTH: usize = 32;

/// 512 bf16: of a left operand `[16 rows][32]`, of a right one `[16 pairs of rows][16 columns][2]`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Tile(pub [u16; SIDE * DEPTH]);

impl Default for Tile {
    fn default() -> Self {
        Self([0; SIDE * DEPTH])
    }
}

/// Which operand a tile is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Rows.
    Left,
    /// Columns.
    Right,
}

/// The tile whose first element is row `outer` and column `inner` of a matrix, one of whose strides is 1: of a left operand,
/// or of the transpose of a right one. What lies outside the matrix is 0.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn pack(to: &mut Tile, of: &Mat<'_, f32>, form: Form, outer: usize, inner: usize) {
    let rows = of.rows.saturating_sub(outer).min(SIDE);
    let depth = of.cols.saturating_sub(inner).min(DEPTH);
    let mut lines = [_mm512_setzero_si512(); SIDE];
    if rows == 0 || depth == 0 {
        return store(to, &lines);
    }
    let data = &of.data[outer * of.row_stride + inner * of.col_stride..];
    let has = if of.col_stride == 1 {
        let (low, high) = (mask(depth.min(SIDE)), mask(depth.saturating_sub(SIDE)));
        for (o, line) in lines.iter_mut().enumerate().take(rows) {
            let row = &data[o * of.row_stride..][..depth];
            // SAFETY: the masks leave out what lies after `depth` elements of the row.
            let (a, b) = unsafe {
                let a = _mm512_maskz_loadu_ps(low, row.as_ptr());
                (a, _mm512_maskz_loadu_ps(high, row.as_ptr().wrapping_add(SIDE)))
            };
            *line = joined(a, b);
        }
        Form::Left
    } else {
        assert!(of.row_stride == 1, "one of the strides is 1");
        let mask = mask(rows);
        let interleave = interleave();
        for (p, line) in lines.iter_mut().enumerate().take(depth.div_ceil(2)) {
            let load = |k: usize| {
                if k >= depth {
                    return _mm512_setzero_ps();
                }
                let row = &data[k * of.col_stride..][..rows];
                // SAFETY: the mask leaves out what lies after `rows` elements.
                unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr()) }
            };
            *line = _mm512_permutexvar_epi16(interleave, joined(load(2 * p), load(2 * p + 1)));
        }
        Form::Right
    };
    if has != form {
        transpose(&mut lines);
    }
    store(to, &lines);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn store(to: &mut Tile, lines: &[__m512i; SIDE]) {
    for (to, line) in to.0.as_chunks_mut::<DEPTH>().0.iter_mut().zip(lines) {
        // SAFETY: a line is 32 elements of 16 bits, 512 bits.
        unsafe { _mm512_store_si512(to.as_mut_ptr().cast(), *line) };
    }
}

/// The first `n` of 16 lanes.
fn mask(n: usize) -> u16 {
    ((1u32 << n) - 1) as u16
}

/// Both rounded to bf16, `a` in the lower half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn joined(a: __m512, b: __m512) -> __m512i {
    // SAFETY: both are 512 bits without a meaning of their own.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(b, a)) }
}

/// Lanes of 16 bits 0, 16, 1, 17, and so on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn interleave() -> __m512i {
    const LANES: Tile = {
        let mut lanes = [0; SIDE * DEPTH];
        let mut i = 0;
        while i < DEPTH {
            lanes[i] = (i / 2 + i % 2 * SIDE) as u16;
            i += 1;
        }
        Tile(lanes)
    };
    // SAFETY: the first 512 bits of a tile, which is aligned to as much.
    unsafe { _mm512_load_si512(LANES.0.as_ptr().cast()) }
}

/// Transposes 16 × 16 elements of 32 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn transpose(r: &mut [__m512i; SIDE]) {
    let mut t = [_mm512_setzero_si512(); SIDE];
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for i in 0..4 {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for i in 0..8 {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}
