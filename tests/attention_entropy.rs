//! Attention of whole models as numbers: entropies, largest logits and maps, against direct computations, alone and packed,
//! on the CPU and on devices.

mod support;

use support::batch;
use support::devices::devices;
use trencadis::autograd::attention::AttentionOperands;
use trencadis::autograd::device::BatchShape;
use trencadis::autograd::pool::PoolOperands;
use trencadis::data::batch::PackedBatch;
use trencadis::eval::attention::{PoolingMap, PoolingMaps, blocks, check_pooling, uniform_entropy};
use trencadis::eval::device::DeviceModel;
use trencadis::eval::model::{Forward, Keep, Model, Observed, WithParams};
use trencadis::nn::init::initialise;
use trencadis::recipe::*;

const GRIDS: [[u16; 2]; 5] = [[4, 3], [1, 1], [7, 2], [1, 9], [5, 5]];
const CLASSES: usize = 5;

fn config() -> ModelConfig {
    ModelConfig {
        shape: String::new(),
        width: 32,
        depth: 2,
        mlp: 32,
        heads: 2,
        patch: 2,
        channels: 3,
        position: PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() },
        ..ModelConfig::default()
    }
}

fn class_token() -> ModelConfig {
    let rope = RopeConfig { kind: Rope::Halves, theta: 20.0, ..RopeConfig::default() };
    ModelConfig {
        pool: PoolKind::Cls,
        class_token: true,
        registers: 2,
        qk_norm: QkNormKind::LayerNormBias,
        rope,
        ..config()
    }
}

fn recipe(model: &ModelConfig) -> Recipe {
    Recipe { model: model.clone(), ..Recipe::default() }
}

fn packed(model: &ModelConfig, grids: &[[u16; 2]], tokens: usize, spare: usize) -> PackedBatch {
    batch(grids, model.prefix(), model.patch_dim(), CLASSES, tokens, spare)
}

/// Ten times the usual scale, so that attention is far from uniform; `change` may do what it wants to them.
fn weights(model: &Model, change: &dyn Fn(&str, &mut [f32])) -> Vec<Vec<f32>> {
    let mut params = initialise(model.params(), 5);
    for (values, spec) in params.iter_mut().zip(model.params()) {
        if spec.decay {
            values.iter_mut().for_each(|value| *value *= 10.0);
        }
        change(&spec.name, values);
    }
    params
}

type OnCpu = WithParams<Model, Vec<Vec<f32>>>;

/// The model after a run over `batch`.
fn ran(config: &ModelConfig, batch: &PackedBatch, keep: Keep, change: &dyn Fn(&str, &mut [f32])) -> OnCpu {
    let model = Model::new(&recipe(config), CLASSES, batch.tokens(), batch.slots(), keep).unwrap();
    let params = weights(&model, change);
    let mut model = WithParams { model, params };
    model.logits(batch).unwrap();
    model
}

fn as_they_are(_: &str, _: &mut [f32]) {}

fn maps(model: &dyn Observed, batch: &PackedBatch) -> Vec<PoolingMap> {
    let maps = PoolingMaps::read(model).unwrap();
    (0..batch.images).map(|slot| maps.of(batch, slot)).collect()
}

#[track_caller]
fn close(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance, "{got} instead of {want}");
}

/// Entropies and largest logits of a block from its kept rows of q and k in f64, with RMS norm and its gains.
fn direct(model: &OnCpu, batch: &PackedBatch, block: usize) -> (f64, f64, f64) {
    let op = AttentionOperands::of(model.graph())[block];
    let (heads, dim) = (op.config.heads, op.config.head_dim);
    let qkv = model.value(op.qkv).unwrap();
    let gains = [op.params.q_gain, op.params.k_gain].map(|gain| model.value(gain.unwrap()).unwrap().to_vec());
    let row = |token: usize, part: usize, head: usize| -> Vec<f64> {
        let start = token * 3 * heads * dim + (part * heads + head) * dim;
        let x: Vec<f64> = qkv[start..start + dim].iter().map(|x| f64::from(*x)).collect();
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + op.config.eps).sqrt();
        let gain = &gains[part][head * dim..][..dim];
        x.iter().zip(gain).map(|(x, gain)| x / rms * f64::from(*gain)).collect()
    };
    let (mut by_head, mut queries, mut largest) = (vec![0.0; heads], 0.0, f64::NEG_INFINITY);
    for slot in 0..batch.images {
        queries += batch.range(slot).len() as f64;
        for query in batch.range(slot) {
            for (head, sum) in by_head.iter_mut().enumerate() {
                let q = row(query, 0, head);
                let score = |key: usize| -> f64 {
                    let k = row(key, 1, head);
                    op.config.scale * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>()
                };
                let scores: Vec<f64> = batch.range(slot).map(score).collect();
                largest = scores.iter().copied().fold(largest, f64::max);
                let total: f64 = scores.iter().map(|s| s.exp()).sum();
                *sum -= scores.iter().map(|s| s.exp() / total * (s - total.ln())).sum::<f64>();
            }
        }
    }
    let mean = by_head.iter().sum::<f64>() / heads as f64 / queries;
    (mean, by_head.iter().copied().fold(f64::INFINITY, f64::min) / queries, largest)
}

#[test]
fn entropies_are_those_of_a_direct_computation() {
    let config = config();
    let batch = packed(&config, &GRIDS, 128, 2);
    let gains = |name: &str, values: &mut [f32]| {
        if name.ends_with("_norm.gain") {
            values.iter_mut().enumerate().for_each(|(i, gain)| *gain = 1.5 + 0.1 * i as f32);
        }
    };
    let model = ran(&config, &batch, Keep::Blocks, &gains);
    let found = blocks(&model, &batch).unwrap();
    assert_eq!(found.len(), 2);
    for (block, found) in found.iter().enumerate() {
        let (entropy, least, largest) = direct(&model, &batch, block);
        close(found.entropy, entropy, 1e-4);
        close(found.min_head_entropy, least, 1e-4);
        close(found.max_logit, largest, 1e-3);
        assert!(least < entropy && entropy < 0.9 * uniform_entropy(&batch), "{entropy} says little");
    }
}

#[test]
fn queries_of_zeros_attend_to_all_alike_and_large_ones_to_one() {
    let config = ModelConfig { qk_norm: QkNormKind::None, pool_qk_norm: false, ..config() };
    let batch = packed(&config, &GRIDS, 128, 2);
    let scaled = |factor: f32| {
        move |name: &str, values: &mut [f32]| {
            if name.ends_with("attn.qkv.weight") {
                let len = values.len() / 3;
                values[..len].iter_mut().for_each(|value| *value *= factor);
            }
        }
    };
    let uniform = uniform_entropy(&batch);
    let lengths = GRIDS.map(|[rows, cols]| f64::from(rows) * f64::from(cols));
    let tokens: f64 = lengths.iter().sum();
    close(uniform, lengths.iter().map(|n| n * n.ln()).sum::<f64>() / tokens, 1e-12);
    for block in blocks(&ran(&config, &batch, Keep::Blocks, &scaled(0.0)), &batch).unwrap() {
        close(block.entropy, uniform, 1e-5);
        close(block.min_head_entropy, uniform, 1e-5);
        assert_eq!(block.max_logit, 0.0);
    }
    for block in blocks(&ran(&config, &batch, Keep::Blocks, &scaled(1e6)), &batch).unwrap() {
        assert!(block.entropy < 1e-3 && block.max_logit > 1e4, "{block:?}");
    }
}

/// Without QK-norm and positions a probability follows from rows of q and k alone.
fn plain(config: ModelConfig) -> ModelConfig {
    ModelConfig {
        qk_norm: QkNormKind::None,
        pool_qk_norm: false,
        rope: RopeConfig { kind: Rope::None, ..config.rope },
        ..config
    }
}

/// softmax of the scaled products of `q` and the keys, which begin at `keys`.
fn softmax(q: &[f32], values: &[f32], keys: impl Iterator<Item = usize>, scale: f64) -> Vec<f64> {
    let score = |start: usize| {
        let products = q.iter().zip(&values[start..]).map(|(q, k)| f64::from(*q) * f64::from(*k));
        scale * products.sum::<f64>()
    };
    let scores: Vec<f64> = keys.map(score).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
    scores.into_iter().map(|score| (score - most).exp() / total).collect()
}

/// On grids that are no squares, so that rows and columns cannot change places.
#[test]
fn maps_are_those_of_a_direct_computation() {
    // Fresh pooling attends to all nearly alike.
    let decided = |name: &str, values: &mut [f32]| {
        if name == "pool.q.weight" {
            values.iter_mut().for_each(|value| *value *= 30.0);
        }
    };
    for config in [plain(config()), plain(class_token())] {
        let batch = packed(&config, &GRIDS, 128, 2);
        let model = ran(&config, &batch, Keep::Pooling, &decided);
        for (slot, map) in maps(&model, &batch).iter().enumerate() {
            let image = batch.range(slot);
            assert_eq!(map.attended, image.len());
            for (head, found) in map.heads.iter().enumerate() {
                let (p, patches) = if config.pool == PoolKind::Map {
                    let op = PoolOperands::of(model.graph()).unwrap();
                    let (dim, width) = (op.config.head_dim, op.config.heads * op.config.head_dim);
                    let (q, kv) = (model.value(op.q).unwrap(), model.value(op.kv).unwrap());
                    let keys = image.clone().map(|token| token * 2 * width + head * dim);
                    (softmax(&q[head * dim..][..dim], &kv, keys, op.config.scale), image.clone())
                } else {
                    let op = *AttentionOperands::of(model.graph()).last().unwrap();
                    let (dim, width) = (op.config.head_dim, op.config.heads * op.config.head_dim);
                    let qkv = model.value(op.qkv).unwrap();
                    let keys = image.clone().map(|token| token * 3 * width + width + head * dim);
                    let q = &qkv[image.start * 3 * width + head * dim..][..dim];
                    (softmax(q, &qkv, keys, op.config.scale), image.start + config.prefix()..image.end)
                };
                let spread = p.iter().copied().fold(0.0, f64::max);
                assert!(image.len() == 1 || spread > 1.05 / p.len() as f64, "{spread} says little");
                for token in patches {
                    let [row, col] = batch.positions[token].map(usize::from);
                    // Scores are large, and those of the model in f32.
                    close(f64::from(found[row * map.cols + col]), p[token - image.start], 1e-3);
                }
            }
        }
    }
}

/// The mark of the pictures: prefix tokens are among those that get the same.
#[test]
fn a_class_token_without_preference_gives_every_token_the_uniform_share() {
    let config = plain(class_token());
    let batch = packed(&config, &GRIDS, 128, 2);
    let no_query = |name: &str, values: &mut [f32]| {
        if name.contains("attn.qkv") {
            let len = values.len() / 3;
            values[..len].fill(0.0);
        }
    };
    for map in maps(&ran(&config, &batch, Keep::Pooling, &no_query), &batch) {
        assert!((map.uniform() - 1.0 / (map.rows * map.cols + 3) as f32).abs() < 1e-7);
        for p in map.heads.iter().flatten() {
            close(f64::from(*p), f64::from(map.uniform()), 1e-6);
        }
    }
}

#[test]
fn what_is_no_number_is_not_left_out() {
    let batch = packed(&config(), &GRIDS, 128, 2);
    let broken = |name: &str, values: &mut [f32]| {
        if name.ends_with("attn.qkv.weight") {
            values.fill(f32::NAN);
        }
    };
    for block in blocks(&ran(&config(), &batch, Keep::Blocks, &broken), &batch).unwrap() {
        assert!(
            block.entropy.is_nan() && block.min_head_entropy.is_nan() && block.max_logit.is_nan(),
            "{block:?}"
        );
    }
}

#[test]
fn packed_equals_alone() {
    for config in [config(), class_token()] {
        let batch = packed(&config, &GRIDS, 128, 3);
        let together = maps(&ran(&config, &batch, Keep::Pooling, &as_they_are), &batch);
        let found = blocks(&ran(&config, &batch, Keep::Blocks, &as_they_are), &batch).unwrap();
        let mut sums = vec![0.0; found.len()];
        for (grid, map) in GRIDS.iter().zip(&together) {
            let one = packed(&config, &[*grid], 0, 0);
            let alone = &maps(&ran(&config, &one, Keep::Pooling, &as_they_are), &one)[0];
            assert_eq!((map.rows, map.cols), (usize::from(grid[0]), usize::from(grid[1])));
            assert_eq!((map.heads.len(), map.mean().len()), (2, map.rows * map.cols));
            for (got, want) in map.heads.iter().flatten().zip(alone.heads.iter().flatten()) {
                close(f64::from(*got), f64::from(*want), 2e-6);
            }
            let total = f64::from(map.mean().iter().sum::<f32>()) + map.prefix;
            close(total, 1.0, 1e-5);
            assert_eq!(map.prefix > 0.0, config.prefix() > 0, "{}", map.prefix);
            let alone = blocks(&ran(&config, &one, Keep::Blocks, &as_they_are), &one).unwrap();
            sums.iter_mut()
                .zip(alone)
                .for_each(|(sum, block)| *sum += block.entropy * one.live_tokens() as f64);
        }
        for (found, sum) in found.iter().zip(sums) {
            close(found.entropy, sum / batch.live_tokens() as f64, 1e-5);
        }
        // An image that could not be read says nothing.
        let mut without = batch.clone();
        without.weights[4] = 0.0;
        let model = ran(&config, &without, Keep::Blocks, &as_they_are);
        assert_ne!(blocks(&model, &without).unwrap()[0].entropy, found[0].entropy);
    }
}

/// The same host code over what a device has kept, whose operands are rounded to bf16.
#[test]
fn devices_follow_the_cpu() {
    for device in devices() {
        for config in [config(), class_token()] {
            let config = ModelConfig { head_dim: 64, ..config };
            let batch = packed(&config, &GRIDS[..3], 128, 1);
            for keep in [Keep::Blocks, Keep::Pooling] {
                let here = ran(&config, &batch, keep, &as_they_are);
                let shape = BatchShape::of(&batch);
                let mut there =
                    DeviceModel::new(&device, &recipe(&config), CLASSES, shape, keep, &here.params).unwrap();
                there.logits(&batch).unwrap();
                if keep == Keep::Blocks {
                    let pairs =
                        blocks(&there, &batch).unwrap().into_iter().zip(blocks(&here, &batch).unwrap());
                    for (got, want) in pairs {
                        close(got.entropy, want.entropy, 0.02);
                        close(got.max_logit, want.max_logit, 0.02 * want.max_logit.abs() + 0.02);
                    }
                    continue;
                }
                for (got, want) in maps(&there, &batch).iter().zip(maps(&here, &batch)) {
                    close(got.prefix, want.prefix, 0.02);
                    for (got, want) in got.heads.iter().flatten().zip(want.heads.iter().flatten()) {
                        close(f64::from(*got), f64::from(*want), 0.02);
                    }
                }
            }
        }
    }
}

#[test]
fn models_without_a_map_say_why() {
    let mean = ModelConfig { pool: PoolKind::Mean, ..config() };
    assert_eq!(
        check_pooling(&mean).unwrap_err().to_string(),
        "this model takes the mean of an image's tokens (model.pool = \"mean\"), in which all patches count alike: there is \
         no attention to draw"
    );
    assert!(check_pooling(&config()).is_ok() && check_pooling(&class_token()).is_ok());
}
