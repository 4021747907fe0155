//! Training steps of a sharded MLP against those of the whole one.

use std::sync::Arc;

use trencadis::Result;
use trencadis::cpu::gemm;
use trencadis::cpu::optim::{AdamW, adamw};
use trencadis::parallel::{Grads, Group, Layout, Operand, Rings, ShardedLinear, Sharding, run_ranks};
use trencadis::recipe::GeluKind;

use crate::support::numbers::random;
use crate::whole::{SIZES, columns, join_columns, near, rows};

const TOKENS: usize = 24;
const WIDTH: usize = 24;
const HIDDEN: usize = 48;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Optimiser {
    Sgd,
    AdamW,
}

/// A parameter with its gradient and moments.
struct Param {
    value: Vec<f32>,
    grad: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Param {
    fn new(value: Vec<f32>) -> Self {
        let [grad, m, v] = [(); 3].map(|()| vec![0.0; value.len()]);
        Self { value, grad, m, v }
    }

    fn update(&mut self, optimiser: Optimiser, step: u64) {
        match optimiser {
            Optimiser::Sgd => self.value.iter_mut().zip(&self.grad).for_each(|(p, g)| *p -= 0.01 * g),
            Optimiser::AdamW => {
                let (beta1, beta2, eps) = (0.9, 0.999, 1e-8);
                let config = AdamW { lr: 1e-2, beta1, beta2, eps, weight_decay: 0.1, step, grad_scale: 1.0 };
                adamw(&config, &mut self.value, &mut self.m, &mut self.v, &self.grad);
            }
        }
        self.grad.fill(0.0);
    }
}

/// Weight and bias of both layers, whole.
fn parameters() -> [Vec<f32>; 4] {
    let scaled = |len, seed| -> Vec<f32> { random::<f32>(len, seed).into_iter().map(|x| 0.2 * x).collect() };
    [scaled(HIDDEN * WIDTH, 1), scaled(HIDDEN, 2), scaled(WIDTH * HIDDEN, 3), scaled(WIDTH, 4)]
}

/// Input and target of a step; the loss is half the mean square of the difference for each token.
fn batch(step: u64) -> [Vec<f32>; 2] {
    [random(TOKENS * WIDTH, 100 + step), random(TOKENS * WIDTH, 200 + step)]
}

fn loss_grad(y: &[f32], target: &[f32]) -> Vec<f32> {
    y.iter().zip(target).map(|(y, t)| (y - t) / TOKENS as f32).collect()
}

fn whole(optimiser: Optimiser) -> [Vec<f32>; 4] {
    let mut params = parameters().map(Param::new);
    for step in 1..=3 {
        let [x, target] = batch(step);
        let [w1, b1, w2, b2] = &mut params;
        let mut pre = vec![0.0; TOKENS * HIDDEN];
        gemm::linear(&mut pre, &x, &w1.value, Some(&b1.value), WIDTH, HIDDEN);
        let mut hidden = vec![0.0; pre.len()];
        gemm::gelu(&mut hidden, &pre, GeluKind::Erf);
        let mut y = vec![0.0; x.len()];
        gemm::linear(&mut y, &hidden, &w2.value, Some(&b2.value), HIDDEN, WIDTH);
        let dy = loss_grad(&y, &target);
        let mut dhidden = vec![0.0; hidden.len()];
        gemm::linear_input_grad(&mut dhidden, &dy, &w2.value, HIDDEN, WIDTH);
        gemm::linear_weight_grad(&mut w2.grad, &dy, &hidden, HIDDEN, WIDTH);
        gemm::bias_grad(&mut b2.grad, &dy);
        gemm::gelu_grad(&mut dhidden, &pre, GeluKind::Erf);
        gemm::linear_weight_grad(&mut w1.grad, &dhidden, &x, WIDTH, HIDDEN);
        gemm::bias_grad(&mut b1.grad, &dhidden);
        params.iter_mut().for_each(|param| param.update(optimiser, step));
    }
    params.map(|param| param.value)
}

fn sharded(group: &Group, layout: Layout, rings: Rings, optimiser: Optimiser) -> Result<[Vec<f32>; 4]> {
    let (size, rank) = (group.size(), group.rank());
    let first = ShardedLinear::new(Sharding::Row, layout, rings, [WIDTH, HIDDEN], size)?;
    let second = ShardedLinear::new(Sharding::Column, layout, rings, [HIDDEN, WIDTH], size)?;
    let shared = |data: &[f32]| match layout {
        Layout::Features => columns(data, WIDTH, size, rank),
        Layout::Tokens => rows(data, WIDTH, size, rank),
    };
    let [w1, b1, w2, b2] = parameters();
    let b2 = if layout == Layout::Features { columns(&b2, WIDTH, size, rank) } else { b2 };
    let mut params = [
        rows(&w1, WIDTH, size, rank),
        columns(&b1, HIDDEN, size, rank),
        columns(&w2, HIDDEN, size, rank),
        b2,
    ]
    .map(Param::new);
    for step in 1..=3 {
        let [x, target] = batch(step).map(|data| shared(&data));
        let [w1, b1, w2, b2] = &mut params;
        let mut pre = vec![0.0; TOKENS * HIDDEN / size];
        first.forward(group, &mut pre, None, &x, &w1.value, Some(&b1.value))?;
        let mut hidden = vec![0.0; pre.len()];
        gemm::gelu(&mut hidden, &pre, GeluKind::Erf);
        let mut y = vec![0.0; x.len()];
        second.forward(group, &mut y, None, &hidden, &w2.value, Some(&b2.value))?;
        let dy = loss_grad(&y, &target);
        let (mut dhidden, mut dx) = (vec![0.0; hidden.len()], vec![0.0; x.len()]);
        let grads = Grads { dx: &mut dhidden, dw: &mut w2.grad, db: Some(&mut b2.grad) };
        second.backward(group, grads, &dy, Operand::Local(&hidden), &w2.value)?;
        gemm::gelu_grad(&mut dhidden, &pre, GeluKind::Erf);
        let grads = Grads { dx: &mut dx, dw: &mut w1.grad, db: Some(&mut b1.grad) };
        first.backward(group, grads, &dhidden, Operand::Local(&x), &w1.value)?;
        params.iter_mut().for_each(|param| param.update(optimiser, step));
    }
    Ok(params.map(|param| param.value))
}

#[test]
fn three_steps_of_a_sharded_mlp_are_those_of_the_whole_one() {
    for optimiser in [Optimiser::Sgd, Optimiser::AdamW] {
        let want = Arc::new(whole(optimiser));
        for size in SIZES {
            for layout in [Layout::Features, Layout::Tokens] {
                for rings in [Rings::One, Rings::Two] {
                    let ranks =
                        run_ranks(size, move |group| sharded(group, layout, rings, optimiser)).unwrap();
                    let of =
                        |i: usize| -> Vec<Vec<f32>> { ranks.iter().map(|rank| rank[i].clone()).collect() };
                    let what = format!("{optimiser:?}, {size} ranks, {layout:?}, {rings:?}");
                    near(&format!("{what}: w1"), &of(0).concat(), &want[0], 1e-5);
                    near(&format!("{what}: b1"), &of(1).concat(), &want[1], 1e-5);
                    near(&format!("{what}: w2"), &join_columns(&of(2), HIDDEN), &want[2], 1e-5);
                    match layout {
                        Layout::Features => near(&format!("{what}: b2"), &of(3).concat(), &want[3], 1e-5),
                        Layout::Tokens => {
                            of(3).iter().for_each(|b2| near(&format!("{what}: b2"), b2, &want[3], 1e-5));
                        }
                    }
                }
            }
        }
    }
}
