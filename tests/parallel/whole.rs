//! Unsharded layers, their parts, and the cases that sharded ones are compared in.

use bytemuck::Pod;
use trencadis::cpu::gemm;
use trencadis::cpu::real::Real;
use trencadis::parallel::collectives::part_of;
use trencadis::parallel::{Layout, Rings, ShardedLinear, Sharding};

use crate::support::numbers;

pub const SIZES: [usize; 5] = [1, 2, 3, 4, 8];

/// Every sharding, layout and number of rings.
pub fn kinds() -> impl Iterator<Item = (Sharding, Layout, Rings)> {
    [Sharding::Row, Sharding::Column].into_iter().flat_map(|sharding| {
        [Layout::Features, Layout::Tokens].into_iter().flat_map(move |layout| {
            [Rings::One, Rings::Two].into_iter().map(move |rings| (sharding, layout, rings))
        })
    })
}

/// Part `part` of `parts` of the columns of a matrix of `width`.
pub fn columns<R: Copy>(data: &[R], width: usize, parts: usize, part: usize) -> Vec<R> {
    data.chunks_exact(width).flat_map(|row| row[part_of(width, parts, part)].to_vec()).collect()
}

/// Part `part` of `parts` of the rows of a matrix of `width`.
pub fn rows<R: Copy>(data: &[R], width: usize, parts: usize, part: usize) -> Vec<R> {
    let range = part_of(data.len() / width, parts, part);
    data[range.start * width..range.end * width].to_vec()
}

/// The inverse of [`columns`].
pub fn join_columns<R: Copy>(parts: &[Vec<R>], width: usize) -> Vec<R> {
    let part = width / parts.len();
    (0..parts[0].len() / part)
        .flat_map(|row| parts.iter().flat_map(move |data| data[row * part..][..part].to_vec()))
        .collect()
}

/// A layer with its operands, its result and its gradients, in f64.
pub struct Whole {
    pub tokens: usize,
    pub inner: usize,
    pub outer: usize,
    pub x: Vec<f64>,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub dy: Vec<f64>,
    pub y: Vec<f64>,
    pub dx: Vec<f64>,
    pub dw: Vec<f64>,
    pub db: Vec<f64>,
}

impl Whole {
    pub fn new(tokens: usize, inner: usize, outer: usize) -> Self {
        // Rounded to f32, so that both precisions compute the same.
        let random = |len, seed| -> Vec<f64> {
            numbers::random::<f32>(len, seed).into_iter().map(f64::from).collect()
        };
        let (x, weight) = (random(tokens * inner, 1), random(outer * inner, 2));
        let (bias, dy) = (random(outer, 3), random(tokens * outer, 4));
        let mut whole = Self {
            y: vec![0.0; tokens * outer],
            dx: vec![0.0; tokens * inner],
            // What gradients are added to.
            dw: vec![0.5; outer * inner],
            db: vec![0.5; outer],
            ..Self {
                tokens,
                inner,
                outer,
                x,
                weight,
                bias,
                dy,
                y: vec![],
                dx: vec![],
                dw: vec![],
                db: vec![],
            }
        };
        gemm::linear(&mut whole.y, &whole.x, &whole.weight, Some(&whole.bias), inner, outer);
        gemm::linear_input_grad(&mut whole.dx, &whole.dy, &whole.weight, inner, outer);
        gemm::linear_weight_grad(&mut whole.dw, &whole.dy, &whole.x, inner, outer);
        gemm::bias_grad(&mut whole.db, &whole.dy);
        whole
    }

    /// `[x, weight, bias, dy, y, dx, dw, db]` of rank `rank`.
    pub fn part<R: Real + Pod>(
        &self,
        sharding: Sharding,
        layout: Layout,
        size: usize,
        rank: usize,
    ) -> [Vec<R>; 8] {
        let (inner, outer) = (self.inner, self.outer);
        let by_columns = |data: &[f64], width| columns(data, width, size, rank);
        let by_rows = |data: &[f64], width| rows(data, width, size, rank);
        let tokens = layout == Layout::Tokens;
        let x = |data: &[f64]| match sharding {
            Sharding::Row if tokens => by_rows(data, inner),
            _ => by_columns(data, inner),
        };
        let y = |data: &[f64]| match sharding {
            Sharding::Column if tokens => by_rows(data, outer),
            _ => by_columns(data, outer),
        };
        let w = |data: &[f64]| match sharding {
            Sharding::Row => by_rows(data, inner),
            Sharding::Column => by_columns(data, inner),
        };
        let b = |data: &[f64]| match sharding {
            Sharding::Column if tokens => data.to_vec(),
            _ => by_columns(data, outer),
        };
        [
            x(&self.x),
            w(&self.weight),
            b(&self.bias),
            y(&self.dy),
            y(&self.y),
            x(&self.dx),
            w(&self.dw),
            b(&self.db),
        ]
        .map(|data| data.into_iter().map(R::of).collect())
    }

    pub fn layer(&self, (sharding, layout, rings): (Sharding, Layout, Rings), size: usize) -> ShardedLinear {
        ShardedLinear::new(sharding, layout, rings, [self.inner, self.outer], size).unwrap()
    }
}

/// Fails where the largest difference is above `tolerance` of the largest value.
#[track_caller]
pub fn near<R: Real, S: Real>(name: &str, got: &[R], want: &[S], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    let scale = want.iter().fold(1e-30, |max: f64, x| max.max(x.f64().abs()));
    let worst = got.iter().zip(want).map(|(a, b)| (a.f64() - b.f64()).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance * scale, "{name}: off by {:.2e} of the largest value", worst / scale);
}
