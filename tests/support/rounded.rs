//! Inputs rounded to bf16, and the comparison of kernels with the CPU device in f64.

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

/// `1 − 2⟨x,y⟩/(⟨x,x⟩+⟨y,y⟩)` and the largest difference, against their limits.
#[track_caller]
pub fn alike(name: &str, got: &[f64], want: &[f64], metric: f64, largest: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms = dot(got, got) + dot(want, want);
    let distance = if norms == 0.0 { 0.0 } else { 1.0 - 2.0 * dot(got, want) / norms };
    let scale = want.iter().fold(1e-30f64, |max, x| max.max(x.abs()));
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / scale;
    assert!(
        distance <= metric && worst <= largest,
        "{name}: distance {distance:.2e} (limit {metric:.0e}), largest difference {worst:.2e} of the largest \
         value (limit {largest:.0e})"
    );
}
