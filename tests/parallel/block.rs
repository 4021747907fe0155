//! Tensor-parallel blocks against the unsharded block of the recorded graph.

use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::Pod;
use trencadis::autograd::exec::Precision;
use trencadis::autograd::graph::{Graph, Tensor};
use trencadis::autograd::{CpuExecutor, ParamSpec, Plan, StepState};
use trencadis::cpu::optim::{AdamW, adamw};
use trencadis::cpu::real::Real;
use trencadis::data::batch::PackedBatch;
use trencadis::nn::block::block;
use trencadis::parallel::block::{Packed, Tensors};
use trencadis::parallel::{Group, Rings, ShardedBlock, run_ranks};
use trencadis::recipe::shapes::Dimensions;
use trencadis::recipe::{BlockKind, ModelConfig, NormKind, QkNormKind, Recipe};
use trencadis::rng::Stream;
use trencadis::{Error, Result};

use crate::support::numbers::random;
use crate::support::{batch, param};
use crate::whole::{near, rows};

const DIMS: Dimensions = Dimensions { width: 20, depth: 2, mlp: 48, heads: 24, head_dim: 4 };
/// Block 1 of 2: its drop-path rate is not 0.
const INDEX: usize = 1;
const SEED: u64 = 11;

/// A serial block with everything that a block may have, one with gains for each head, ViT-22B's, and parallel
/// blocks with all biases and with LayerScale.
fn configs() -> [ModelConfig; 5] {
    let base = Recipe::load("digits", &[]).unwrap().model;
    let full = ModelConfig {
        block: BlockKind::Serial,
        norm: NormKind::LayerNorm,
        norm_bias: true,
        qk_norm: QkNormKind::LayerNormBias,
        qk_norm_per_head: false,
        qkv_bias: true,
        proj_bias: true,
        mlp_bias: true,
        layer_scale: 0.5,
        drop_path: 0.4,
        ..base
    };
    let per_head =
        ModelConfig { qk_norm: QkNormKind::Rms, qk_norm_per_head: true, qkv_bias: false, ..full.clone() };
    let vit_22b = ModelConfig {
        block: BlockKind::Parallel,
        norm: NormKind::Rms,
        norm_bias: false,
        qk_norm: QkNormKind::Rms,
        qkv_bias: false,
        proj_bias: false,
        layer_scale: 0.0,
        ..full.clone()
    };
    let biases = ModelConfig { qkv_bias: true, proj_bias: true, ..vit_22b.clone() };
    let scaled = ModelConfig { layer_scale: 0.5, ..biases.clone() };
    [full, per_head, vit_22b, biases, scaled]
}

/// 24 tokens in three images.
fn images() -> PackedBatch {
    batch(&[[2, 3], [4, 4], [1, 2]], 0, 1, 2, 0, 1)
}

/// The unsharded block: its parameters, and the graph with its backward pass.
struct Whole {
    graph: Graph,
    plan: Plan,
    x: usize,
    out: Tensor,
    dout: Tensor,
    batch: PackedBatch,
}

impl Whole {
    fn new(config: &ModelConfig) -> Self {
        let batch = images();
        let mut graph = Graph::new();
        // A parameter, so that its gradient is made.
        let x = param(&mut graph, "x", &[batch.tokens(), DIMS.width]);
        let out = block(&mut graph, INDEX, x, config, &DIMS, true);
        let info = graph.info(out).clone();
        let dout = graph.input("dout", info.rows, info.cols, info.extent);
        graph.backward(&[(out, dout)]);
        graph.keep(out);
        Self { plan: Plan::new(&graph), graph, x: 0, out, dout, batch }
    }

    /// Values of all parameters, that of x among them.
    fn values<R: Real>(&self) -> Vec<Vec<R>> {
        let scale = |spec: &ParamSpec, x: f64| if spec.name == "x" { x } else { 0.3 * x + 0.1 };
        let specs = self.graph.params().iter().enumerate();
        specs
            .map(|(i, spec)| {
                let values = random::<f32>(spec.len(), 40 + i as u64);
                values.into_iter().map(|x| R::of(f64::from(scale(spec, f64::from(x)) as f32))).collect()
            })
            .collect()
    }

    fn dout<R: Real>(&self) -> Vec<R> {
        random::<f32>(self.graph.info(self.dout).len(), 9).into_iter().map(|x| R::of(f64::from(x))).collect()
    }

    /// The result, and gradients in the order of the parameters.
    fn run<R: Precision>(&self, values: &[Vec<R>]) -> (Vec<R>, Vec<Vec<R>>) {
        let mut grads: Vec<Vec<R>> = values.iter().map(|value| vec![R::ZERO; value.len()]).collect();
        let feeds = HashMap::from([(self.dout, self.dout())]);
        let step = StepState { seed: SEED, loss_scale: 1.0 };
        let mut executor = CpuExecutor::<R>::new();
        executor.run(&self.graph, &self.plan, values, &mut grads, &feeds, &self.batch, &step);
        (executor.value(self.out).to_vec(), grads)
    }

    /// Parameters but x, by their names within the block.
    fn specs(&self) -> impl Iterator<Item = (usize, &str, &[usize])> {
        let specs = self.graph.params().iter().enumerate().filter(|(i, _)| *i != self.x);
        specs.map(|(i, spec)| (i, spec.name.strip_prefix("blocks.1.").unwrap(), &spec.shape[..]))
    }

    fn parts<R: Real>(&self, block: &ShardedBlock, values: &[Vec<R>], group: &Group) -> Tensors<R> {
        let part = |(i, name, shape): (usize, &str, &[usize])| {
            let part = block.split(name).part(&values[i], shape, group.size(), group.rank());
            (name.to_owned(), part)
        };
        self.specs().map(part).collect()
    }
}

/// Drop-path factors of every token, drawn as the graph draws them.
fn keep<R: Real>(config: &ModelConfig, batch: &PackedBatch) -> [Vec<R>; 2] {
    [0, 1].map(|branch| {
        // A parallel block has one branch, and what is given for a second is not read.
        let branch = if config.block == BlockKind::Parallel { 7 * branch } else { branch };
        let factors = (0..batch.images).flat_map(|image| {
            let (epoch, sample) = (batch.epochs[image], batch.sample_ids[image]);
            let mut stream = Stream::drop_path(SEED, epoch, sample, 2 * INDEX as u32 + branch);
            let kept = f64::from(stream.uniform()) >= config.drop_path;
            let factor = if kept { R::of(1.0 / (1.0 - config.drop_path)) } else { R::ZERO };
            std::iter::repeat_n(factor, batch.range(image).len())
        });
        factors.collect()
    })
}

/// One rank's result, gradient of x, and gradients of its parts.
type Results<R> = (Vec<R>, Vec<R>, Tensors<R>);

fn step<R: Real + Pod>(
    group: &Group,
    whole: &Whole,
    config: &ModelConfig,
    block: &ShardedBlock,
    x: &[R],
    params: &Tensors<R>,
) -> Result<Results<R>> {
    let (size, rank) = (group.size(), group.rank());
    let factors = keep::<R>(config, &whole.batch).map(|keep| rows(&keep, 1, size, rank));
    let [first, second] = &factors;
    let cu_seqlens = &whole.batch.cu_seqlens[..=whole.batch.images];
    let packed = Packed { cu_seqlens, keep: [Some(&first[..]), Some(&second[..])] };
    let x = rows(x, DIMS.width, size, rank);
    let (out, saved) = block.forward(group, &x, params, &packed)?;
    let mut grads = params.iter().map(|(name, data)| (name.clone(), vec![R::ZERO; data.len()])).collect();
    let dout = rows(&whole.dout(), DIMS.width, size, rank);
    let dx = block.backward(group, &dout, &saved, params, &packed, &mut grads)?;
    Ok((out, dx, grads))
}

fn compare<R: Precision + Pod>(config: &ModelConfig, size: usize, rings: Rings, tolerance: f64) {
    let whole = Arc::new(Whole::new(config));
    let (out, grads) = whole.run::<f64>(&whole.values());
    let block = ShardedBlock::new(config, &DIMS, rings, size).unwrap();
    let (theirs, operands, of_ranks) = (config.clone(), whole.clone(), block.clone());
    let ranks = run_ranks(size, move |group| {
        let values = operands.values::<R>();
        let params = operands.parts(&of_ranks, &values, group);
        let result = step(group, &operands, &theirs, &of_ranks, &values[operands.x], &params)?;
        let shared = params.iter().filter(|(name, _)| of_ranks.is_summed(name));
        let shared = shared.map(|(_, data)| data.len()).sum();
        let volume =
            of_ranks.forward_volume(group.rank(), 24) + of_ranks.backward_volume(group.rank(), 24, shared);
        assert_eq!(group.sent().iter().sum::<u64>(), volume * size_of::<R>() as u64);
        Ok(result)
    });
    let ranks = ranks.unwrap();
    let what = format!("{:?} block, {size} ranks, {rings:?}", config.block);
    let all = |of: fn(&Results<R>) -> &Vec<R>| -> Vec<R> {
        ranks.iter().flat_map(|rank| of(rank).clone()).collect()
    };
    near(&format!("{what}: out"), &all(|rank| &rank.0), &out, tolerance);
    near(&format!("{what}: dx"), &all(|rank| &rank.1), &grads[whole.x], tolerance);
    for (i, name, shape) in whole.specs() {
        let parts: Vec<Vec<R>> = ranks.iter().map(|rank| rank.2[name].clone()).collect();
        let merged = block.split(name).merge(&parts, shape);
        assert!(
            grads[i].iter().any(|&g| g.abs() > 1e-3) || name.ends_with("k_norm.bias"),
            "{name} is not used"
        );
        // The bias of the keys has no effect: its gradient is rounding, beside that of the queries.
        let scale = if name.ends_with("k_norm.bias") { 1.0 } else { 0.0 };
        let with = |grad: &[f64]| -> Vec<f64> { grad.iter().copied().chain([scale]).collect() };
        let merged: Vec<f64> = merged.iter().map(|g| g.f64()).collect();
        near(&format!("{what}: d {name}"), &with(&merged), &with(&grads[i]), tolerance);
        if block.is_summed(name) || name == "attn.proj.bias" {
            assert!(parts.iter().all(|part| *part == parts[0]), "{what}: d {name} differs between ranks");
        }
    }
}

#[test]
fn sharded_blocks_are_the_unsharded_ones() {
    for config in configs() {
        let factors = keep::<f64>(&config, &images()).concat();
        assert!(factors.contains(&0.0) && factors.iter().any(|&x| x > 1.0), "some branches are dropped");
        for size in [1, 2, 3, 4, 8] {
            for rings in [Rings::One, Rings::Two] {
                compare::<f32>(&config, size, rings, 1e-5);
                compare::<f64>(&config, size, rings, 1e-12);
            }
        }
    }
}

/// Three steps of AdamW, whose moments never leave their rank.
#[test]
fn three_steps_of_a_sharded_block_are_those_of_the_whole_one() {
    let update = |step: u64, p: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32]| {
        let (beta1, beta2, eps, weight_decay) = (0.9, 0.999, 1e-8, 0.1);
        adamw(&AdamW { lr: 3e-3, beta1, beta2, eps, weight_decay, step, grad_scale: 1.0 }, p, m, v, grad);
    };
    for config in configs() {
        // Without a bias of the keys, whose gradient is rounding alone: AdamW would blow it up.
        let qk_norm =
            if config.qk_norm == QkNormKind::LayerNormBias { QkNormKind::LayerNorm } else { config.qk_norm };
        let config = ModelConfig { qk_norm, qkv_bias: false, ..config };
        let whole = Arc::new(Whole::new(&config));
        let mut values = whole.values::<f32>();
        let zeros: Vec<Vec<f32>> = values.iter().map(|value| vec![0.0; value.len()]).collect();
        let (mut m, mut v) = (zeros.clone(), zeros);
        for step in 1..=3 {
            let (_, grads) = whole.run(&values);
            for (i, ..) in whole.specs() {
                update(step, &mut values[i], &mut m[i], &mut v[i], &grads[i]);
            }
        }
        for size in [1, 2, 3, 4, 8] {
            let block = ShardedBlock::new(&config, &DIMS, Rings::One, size).unwrap();
            let (theirs, operands, of_ranks) = (config.clone(), whole.clone(), block.clone());
            let ranks = run_ranks(size, move |group| {
                let values = operands.values::<f32>();
                let mut params = operands.parts(&of_ranks, &values, group);
                let zeros: Tensors<f32> =
                    params.iter().map(|(name, data)| (name.clone(), vec![0.0; data.len()])).collect();
                let (mut m, mut v) = (zeros.clone(), zeros);
                for number in 1..=3 {
                    let x = &values[operands.x];
                    let (_, _, grads) = step(group, &operands, &theirs, &of_ranks, x, &params)?;
                    for (name, p) in &mut params {
                        let (m, v) = (m.get_mut(name).unwrap(), v.get_mut(name).unwrap());
                        update(number, p, m, v, &grads[name]);
                    }
                }
                Ok(params)
            });
            let ranks = ranks.unwrap();
            for (i, name, shape) in whole.specs() {
                let parts: Vec<Vec<f32>> = ranks.iter().map(|rank| rank[name].clone()).collect();
                let merged = block.split(name).merge(&parts, shape);
                near(&format!("{:?} block, {size} ranks: {name}", config.block), &merged, &values[i], 1e-5);
            }
        }
    }
}

/// Rows after the last image are zeros in the result, and change nothing for the others, nor for gradients.
#[test]
fn padding_stays_zero_and_changes_nothing() {
    // The gradient of a bias of the keys would be rounding alone.
    let config = ModelConfig { qk_norm: QkNormKind::LayerNorm, ..configs()[0].clone() };
    let whole = Arc::new(Whole::new(&config));
    let results = [24, 32].map(|tokens| {
        let (operands, config) = (whole.clone(), config.clone());
        let ranks = run_ranks(4, move |group| {
            let block = ShardedBlock::new(&config, &DIMS, Rings::Two, 4)?;
            let values = operands.values::<f64>();
            let params = operands.parts(&block, &values, group);
            let cu_seqlens = &operands.batch.cu_seqlens[..=operands.batch.images];
            let packed = Packed { cu_seqlens, keep: [None, None] };
            // What lies in the padding of the operands must not matter.
            let padded = |data: &[f64], filling| {
                let mut data = data.to_vec();
                data.resize(tokens * DIMS.width, filling);
                rows(&data, DIMS.width, 4, group.rank())
            };
            let (out, saved) = block.forward(group, &padded(&values[operands.x], 3.0), &params, &packed)?;
            let mut grads = params.iter().map(|(name, data)| (name.clone(), vec![0.0; data.len()])).collect();
            let dout = padded(&operands.dout::<f64>(), 7.0);
            let dx = block.backward(group, &dout, &saved, &params, &packed, &mut grads)?;
            Ok((out, dx, grads))
        });
        let ranks = ranks.unwrap();
        let out: Vec<f64> = ranks.iter().flat_map(|rank| rank.0.clone()).collect();
        let dx: Vec<f64> = ranks.iter().flat_map(|rank| rank.1.clone()).collect();
        (out, dx, ranks.into_iter().map(|rank| rank.2).collect::<Vec<Tensors<f64>>>())
    });
    let [(out, dx, grads), (padded_out, padded_dx, padded_grads)] = results;
    let (live, rest) = padded_out.split_at(out.len());
    near("out", live, &out, 1e-13);
    near("dx", &padded_dx[..dx.len()], &dx, 1e-13);
    assert!(rest.iter().chain(&padded_dx[dx.len()..]).all(|&x| x == 0.0));
    for (grads, padded) in grads.iter().zip(&padded_grads) {
        grads.iter().for_each(|(name, grad)| near(name, &padded[name], grad, 1e-10));
    }
}

#[test]
fn heads_and_widths_that_do_not_divide_are_refused_with_one_message() {
    let config = configs()[0].clone();
    let refused = run_ranks(5, move |_| ShardedBlock::new(&config, &DIMS, Rings::One, 5).map(drop));
    let message =
        "heads 24, MLP width 48 cannot be shared evenly by 5 ranks; choose a tensor axis that divides them";
    assert!(matches!(&refused, Err(Error::Usage(text)) if text == message), "{refused:?}");
}
