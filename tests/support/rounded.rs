//! Rows of a packed batch rounded to bf16, as the kernels are given them.

use half::bf16;

use super::numbers::random;

/// Columns that follow every row and belong to somebody else.
pub const FOREIGN: usize = 8;

/// Rows of `width` random values around `mean` and of [`FOREIGN`] columns; the rows from `live` on are NaN.
pub fn rows(tokens: usize, live: usize, width: usize, mean: f64, seed: u64) -> Vec<bf16> {
    let mut x: Vec<bf16> =
        random::<f64>(tokens * (width + FOREIGN), seed).iter().map(|x| bf16::from_f64(x + mean)).collect();
    x[live * (width + FOREIGN)..].fill(bf16::NAN);
    x
}

/// The first `live` rows without the foreign columns.
pub fn dense(x: &[bf16], live: usize, width: usize) -> Vec<f64> {
    let rows = x.chunks_exact(width + FOREIGN).take(live);
    rows.flat_map(|row| row[..width].iter().map(|x| x.to_f64())).collect()
}

/// Fails unless the rows from `live` on are zeros and the foreign columns are still `bf16::MAX`.
#[track_caller]
pub fn untouched(name: &str, x: &[bf16], live: usize, width: usize) {
    let rows = || x.chunks_exact(width + FOREIGN);
    assert!(rows().skip(live).all(|row| row[..width].iter().all(|x| x.to_bits() == 0)), "{name}: dead rows");
    assert!(rows().all(|row| row[width..].iter().all(|&x| x == bf16::MAX)), "{name}: foreign columns");
}

/// In f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// `cu_seqlens` of images of these lengths.
pub fn starts(lengths: &[usize]) -> Vec<i32> {
    let mut cu_seqlens = vec![0];
    for length in lengths {
        cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *length as i32);
    }
    cu_seqlens
}
