//! 32 × 32 elements of a product from two panels.

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::pack::{DEPTH, SIDE, Tile};

/// Rows and columns that are multiplied at a time, two tiles of each operand.
pub const PANEL: usize = 2 * SIDE;

/// What becomes of the results.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Factor of the sums.
    pub scale: f32,
    /// Whether they are added to what is there.
    pub add: bool,
    /// Distance between rows of the result.
    pub row_stride: usize,
    /// Columns of the result.
    pub cols: usize,
}

impl Product {
    /// The results of the first `rows` rows of `out`, at most 32, and of 32 columns from `col` on, from panels of two
    /// tiles for each 32 of the inner dimension; by AVX-512 where no tiles are given.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn square(
        &self,
        tiles: Option<&Tiles>,
        out: &mut [f32],
        rows: usize,
        col: usize,
        left: &[Tile],
        right: &[Tile],
    ) {
        let (rows, cols) = (rows.min(PANEL), (self.cols - col).min(PANEL));
        let out = &mut out[col..];
        if rows == PANEL && cols == PANEL && !self.add && self.scale == 1.0 {
            assert!(out.len() >= (PANEL - 1) * self.row_stride + PANEL);
            let to = Square { data: out.as_mut_ptr(), stride: self.row_stride };
            // SAFETY: `out` has 32 rows of 32 elements, as was asserted.
            return unsafe { multiply(tiles, to, left, right) };
        }
        let mut sums = [0.0; PANEL * PANEL];
        let to = Square { data: sums.as_mut_ptr(), stride: PANEL };
        // SAFETY: `sums` has 32 rows of 32 elements.
        unsafe { multiply(tiles, to, left, right) };
        for (out, sums) in out.chunks_mut(self.row_stride).zip(sums.as_chunks::<PANEL>().0).take(rows) {
            for (out, &sum) in out[..cols].iter_mut().zip(sums) {
                *out = if self.add { *out } else { 0.0 } + self.scale * sum;
            }
        }
    }
}

/// Where 32 × 32 results go, rows `stride` elements apart.
#[derive(Clone, Copy, Debug)]
struct Square {
    data: *mut f32,
    stride: usize,
}

/// # Safety
/// `to` may be written, 32 rows of 32 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply(tiles: Option<&Tiles>, to: Square, left: &[Tile], right: &[Tile]) {
    // SAFETY: the caller's.
    unsafe {
        match tiles {
            Some(tiles) => tiles.multiply(to, left, right),
            None => by_vectors(to, left, right),
        }
    }
}

/// AMX's tiles of this thread, all of 16 rows of 64 bytes, until it is dropped.
#[derive(Debug)]
pub struct Tiles(PhantomData<*mut ()>);

impl Tiles {
    /// Configures the tiles.
    ///
    /// # Safety
    /// The machine has AMX and the process may use it; no other `Tiles` lives on this thread.
    pub unsafe fn new() -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            columns: [u16; 16],
            rows: [u8; 16],
        }
        let (mut columns, mut rows) = ([0; 16], [0; 16]);
        columns[..8].fill(64);
        rows[..8].fill(SIDE as u8);
        let config = Config { palette: 1, start_row: 0, reserved: [0; 14], columns, rows };
        // SAFETY: the configuration is one of palette 1, whose 8 tiles have up to 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self(PhantomData)
    }

    /// `to = left · right` of panels of `left.len() / 2` tiles each.
    ///
    /// # Safety
    /// `to` may be written, 32 rows of 32 elements.
    unsafe fn multiply(&self, to: Square, left: &[Tile], right: &[Tile]) {
        assert!(left.len() == right.len() && left.len().is_multiple_of(2) && !left.is_empty());
        // SAFETY: every pass of the loop reads two tiles of each, of which there are `steps` pairs; the caller
        // answers for `to`. Tiles are configured as long as this lives.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{left} + {line}*1]",
                "tileloadd tmm6, [{right} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {line}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left} + {line}*1 + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "add {right}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{to} + {stride}*1], tmm0",
                "tilestored [{to} + {stride}*1 + 64], tmm1",
                "tilestored [{below} + {stride}*1], tmm2",
                "tilestored [{below} + {stride}*1 + 64], tmm3",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                steps = inout(reg) left.len() / 2 => _,
                line = in(reg) 64usize,
                to = in(reg) to.data,
                below = in(reg) to.data.wrapping_add(SIDE * to.stride),
                stride = in(reg) 4 * to.stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: it frees the tiles that `new` configured.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// `to = left · right`, by AVX-512.
///
/// # Safety
/// `to` may be written, 32 rows of 32 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn by_vectors(to: Square, left: &[Tile], right: &[Tile]) {
    const ROWS: usize = 8;
    for first in (0..PANEL).step_by(ROWS) {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for (left, right) in left.as_chunks::<2>().0.iter().zip(right.as_chunks::<2>().0) {
            let left = &left[first / SIDE].0[first % SIDE * DEPTH..][..ROWS * DEPTH];
            for pair in 0..DEPTH / 2 {
                // SAFETY: 32 elements of 16 bits from a multiple of as many on.
                let b: [__m512bh; 2] = std::array::from_fn(|j| unsafe {
                    std::mem::transmute(_mm512_load_si512(right[j].0.as_ptr().add(pair * DEPTH).cast()))
                });
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: two elements of 16 bits of row `row`.
                    let a: __m512bh = unsafe {
                        let a = left.as_ptr().add(row * DEPTH + 2 * pair).cast::<i32>().read();
                        std::mem::transmute(_mm512_set1_epi32(a))
                    };
                    *sums = std::array::from_fn(|j| _mm512_dpbf16_ps(sums[j], a, b[j]));
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { _mm512_storeu_ps(to.data.add((first + row) * to.stride + j * SIDE), *sum) };
            }
        }
    }
}
