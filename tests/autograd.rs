//! Every backward rule against finite differences in f64 on odd shapes, and the properties of the
//! recorded graph: checkpointing, liveness, live rows.

mod support;

use std::collections::HashMap;

use support::{batch, gradcheck, param, random};
use trencadis::autograd::attention::{QkParams, attention};
use trencadis::autograd::graph::{Extent, Graph, Tensor};
use trencadis::autograd::residual::{DropPath, residual};
use trencadis::autograd::{
    CpuExecutor, Plan, StepState, elementwise, gemm, loss, norm, patch, pool, position,
};
use trencadis::cpu::attention::AttentionConfig;
use trencadis::recipe::*;

const GRIDS: [[u16; 2]; 4] = [[2, 3], [1, 1], [3, 1], [1, 5]];
/// Tokens of [`GRIDS`] without prefix.
const TOKENS: usize = 15;

#[test]
fn linear() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    for bias in [false, true] {
        gradcheck("linear", &b, |g| {
            let (x, w) = (param(g, "x", &[5, 7]), param(g, "w", &[3, 7]));
            let bias = bias.then(|| param(g, "b", &[3]));
            gemm::linear(g, x, w, bias)
        });
        for kind in [GeluKind::Erf, GeluKind::Tanh] {
            gradcheck("linear+gelu", &b, |g| {
                let (x, w) = (param(g, "x", &[5, 7]), param(g, "w", &[3, 7]));
                let bias = bias.then(|| param(g, "b", &[3]));
                gemm::linear_gelu(g, x, w, bias, kind)
            });
        }
    }
}

#[test]
fn norms() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    for kind in [NormKind::LayerNorm, NormKind::Rms] {
        for (gain, bias) in [(false, false), (true, false), (true, true)] {
            gradcheck("norm", &b, |g| {
                let x = param(g, "x", &[5, 7]);
                let gain = gain.then(|| param(g, "gain", &[7]));
                let bias = bias.then(|| param(g, "bias", &[7]));
                norm::norm(g, x, gain, bias, kind, 1e-6)
            });
        }
    }
}

#[test]
fn residuals() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    for gamma in [false, true] {
        for rate in [0.0, 0.4] {
            gradcheck("residual", &b, |g| {
                let (x, f) = (param(g, "x", &[TOKENS, 3]), param(g, "f", &[TOKENS, 3]));
                let gamma = gamma.then(|| param(g, "gamma", &[3]));
                residual(g, x, f, gamma, Some(DropPath { rate, branch: 1 }))
            });
        }
    }
}

#[test]
fn sums() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    gradcheck("add", &b, |g| {
        let (x, y) = (param(g, "x", &[5, 3]), param(g, "y", &[5, 3]));
        let sum = elementwise::add(g, x, y);
        elementwise::add(g, sum, x)
    });
    gradcheck("add row", &b, |g| {
        let (x, row) = (param(g, "x", &[5, 3]), param(g, "row", &[1, 3]));
        elementwise::add_row(g, x, row)
    });
}

/// Constants and parameters for every kind of QK-norm.
fn qk_cases() -> impl Iterator<Item = AttentionConfig> {
    let kinds = [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
    kinds.into_iter().flat_map(|norm| {
        [false, true].map(|gain_per_head| AttentionConfig {
            heads: 2,
            head_dim: 5,
            scale: 0.7,
            norm,
            eps: 1e-6,
            gain_per_head,
        })
    })
}

fn qk_params(g: &mut Graph, config: &AttentionConfig) -> QkParams {
    let len = if config.gain_per_head { config.heads * config.head_dim } else { config.head_dim };
    let gain = config.norm != QkNormKind::None;
    let bias = config.norm == QkNormKind::LayerNormBias;
    QkParams {
        q_gain: gain.then(|| param(g, "q_gain", &[len])),
        k_gain: gain.then(|| param(g, "k_gain", &[len])),
        q_bias: bias.then(|| param(g, "q_bias", &[len])),
        k_bias: bias.then(|| param(g, "k_bias", &[len])),
    }
}

#[test]
fn attention_rules() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    for config in qk_cases() {
        gradcheck(&format!("attention {config:?}"), &b, |g| {
            let qkv = param(g, "qkv", &[TOKENS, 30]);
            let params = qk_params(g, &config);
            attention(g, qkv, params, config)
        });
    }
}

#[test]
fn pooling_rules() {
    let b = batch(&GRIDS, 1, 3, 2, 0, 0);
    let tokens = TOKENS + GRIDS.len();
    for config in qk_cases() {
        gradcheck(&format!("attention pool {config:?}"), &b, |g| {
            let (q, kv) = (param(g, "q", &[1, 10]), param(g, "kv", &[tokens, 20]));
            let params = qk_params(g, &config);
            pool::attention_pool(g, q, kv, params, config, GRIDS.len(), 1)
        });
    }
    gradcheck("mean pool", &b, |g| {
        let x = param(g, "x", &[tokens, 3]);
        pool::mean_pool(g, x, GRIDS.len(), 1)
    });
    gradcheck("gather", &b, |g| {
        let x = param(g, "x", &[tokens, 3]);
        pool::gather_token(g, x, GRIDS.len(), 1)
    });
}

#[test]
fn prefix_rule() {
    let b = batch(&GRIDS, 2, 3, 2, 0, 0);
    gradcheck("prefix", &b, |g| {
        let x = param(g, "x", &[TOKENS + 2 * GRIDS.len(), 3]);
        let tokens = param(g, "tokens", &[2, 3]);
        patch::write_prefix(g, x, tokens)
    });
}

/// Every position embedding that has parameters: eight of NaViT's ten, the aspect-preserving
/// variants, and ViT's resized tables.
fn positions() -> Vec<PositionConfig> {
    use PositionCombination as Combine;
    use PositionCoordinate::{Absolute, Fractional, FractionalAspect};
    let base = PositionConfig { rows: 4, columns: 5, ..PositionConfig::default() };
    let learned = |coordinate, combination| PositionConfig { coordinate, combination, ..base.clone() };
    let mut all = vec![learned(Absolute, Combine::Flat), learned(Absolute, Combine::Joint)];
    for coordinate in [Absolute, Fractional, FractionalAspect] {
        for combination in [Combine::Sum, Combine::Stack, Combine::Product] {
            all.push(learned(coordinate, combination));
        }
        all.push(PositionConfig { basis: PositionBasis::Fourier, coordinate, ..base.clone() });
    }
    for resample in [PositionResample::Bicubic, PositionResample::Bilinear] {
        for coordinate in [Fractional, FractionalAspect] {
            all.push(PositionConfig { resample, ..learned(coordinate, Combine::Joint) });
        }
    }
    all
}

#[test]
fn position_rules() {
    let b = batch(&GRIDS, 1, 3, 2, 0, 0);
    let (tokens, width) = (TOKENS + GRIDS.len(), 6);
    for config in positions() {
        gradcheck(&format!("position {config:?}"), &b, |g| {
            let tables = match (config.basis, config.combination) {
                (PositionBasis::Fourier, _) => vec![param(g, "map", &[width / 2, 2])],
                (_, PositionCombination::Flat | PositionCombination::Joint) => {
                    vec![param(g, "table", &[config.rows * config.columns, width])]
                }
                (_, combination) => {
                    let part = if combination == PositionCombination::Stack { width / 2 } else { width };
                    vec![param(g, "row", &[config.rows, part]), param(g, "column", &[config.columns, part])]
                }
            };
            position::position(g, tokens, width, &config, tables)
        });
    }
}

#[test]
fn losses_hand_out_their_gradient() {
    let (classes, scale) = (5, 0.3);
    let b = batch(&GRIDS, 0, 3, classes, 0, 0);
    for kind in [LossKind::Softmax, LossKind::Sigmoid] {
        for smoothing in [0.0, 0.1] {
            let mut graph = Graph::new();
            let logits = graph.input("logits", GRIDS.len(), classes, Extent::Images);
            let loss = loss::classification(&mut graph, logits, kind, smoothing);
            graph.keep(loss.per_image);
            graph.keep(loss.dlogits);
            let plan = Plan::new(&graph);
            let step = StepState { seed: 0, loss_scale: scale };
            let mut executor = CpuExecutor::<f64>::new();
            let mut run = |x: &[f64]| {
                let feeds = HashMap::from([(logits, x.to_vec())]);
                executor.run(&graph, &plan, &[], &mut [], &feeds, &b, &step);
                let total: f64 = executor.value(loss.per_image).iter().sum();
                (total * scale, executor.value(loss.dlogits).to_vec())
            };
            let mut x = random(GRIDS.len() * classes, 3);
            let (_, rule) = run(&x);
            for i in 0..x.len() {
                let (old, h) = (x[i], 1e-5);
                x[i] = old + h;
                let above = run(&x).0;
                x[i] = old - h;
                let below = run(&x).0;
                x[i] = old;
                let numeric = (above - below) / (2.0 * h);
                assert!((numeric - rule[i]).abs() < 1e-9, "{kind:?}: {numeric} against {}", rule[i]);
            }
        }
    }
}

/// A two-layer network whose middle is a checkpoint segment, or not.
fn small_net(g: &mut Graph, checkpoint: bool) -> Tensor {
    let x = param(g, "x", &[TOKENS, 6]);
    let (w1, w2) = (param(g, "w1", &[8, 6]), param(g, "w2", &[6, 8]));
    if checkpoint {
        g.begin_segment();
    }
    let y = norm::norm(g, x, None, None, NormKind::Rms, 1e-6);
    let hidden = gemm::linear_gelu(g, y, w1, None, GeluKind::Erf);
    let branch = gemm::linear(g, hidden, w2, None);
    let out = residual(g, x, branch, None, Some(DropPath { rate: 0.3, branch: 0 }));
    if checkpoint {
        g.end_segment();
    }
    norm::norm(g, out, None, None, NormKind::LayerNorm, 1e-6)
}

#[test]
fn checkpointing_gives_the_same_bits() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    gradcheck("checkpoint", &b, |g| small_net(g, true));
    let run = |checkpoint| {
        let mut graph = Graph::new();
        let out = small_net(&mut graph, checkpoint);
        let info = graph.info(out).clone();
        let seed = graph.input("seed", info.rows, info.cols, info.extent);
        graph.backward(&[(out, seed)]);
        let plan = Plan::new(&graph);
        let params: Vec<Vec<f32>> = graph
            .params()
            .iter()
            .enumerate()
            .map(|(i, p)| random(p.len(), i as u64).iter().map(|x| *x as f32).collect())
            .collect();
        let mut grads: Vec<Vec<f32>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
        let feeds = HashMap::from([(seed, vec![0.5; info.len()])]);
        let mut executor = CpuExecutor::new();
        executor.run(&graph, &plan, &params, &mut grads, &feeds, &b, &StepState::default());
        (grads, graph.nodes().len())
    };
    let (kept, nodes) = run(false);
    let (recomputed, more_nodes) = run(true);
    assert_eq!(kept, recomputed);
    assert!(more_nodes > nodes, "nothing was recomputed");
}

/// Buffers are reused from step to step; rows beyond the live ones must be zero all the same.
#[test]
fn rows_beyond_the_live_ones_are_zero() {
    let mut graph = Graph::new();
    let x = patch::patches(&mut graph, 32, 3, &[0.5], &[0.25]);
    let (w, bias) = (param(&mut graph, "w", &[4, 3]), param(&mut graph, "b", &[4]));
    let y = gemm::linear(&mut graph, x, w, Some(bias));
    let pooled = pool::mean_pool(&mut graph, y, 6, 0);
    graph.keep(y);
    graph.keep(pooled);
    let plan = Plan::new(&graph);
    let params = vec![vec![0.5f32; 12], vec![1.0; 4]];
    let mut executor = CpuExecutor::new();
    let mut run = |grids: &[[u16; 2]]| {
        let b = batch(grids, 0, 3, 2, 32, 6 - grids.len());
        executor.run(&graph, &plan, &params, &mut [], &HashMap::new(), &b, &StepState::default());
        let (tokens, images) = (b.live_tokens(), b.images);
        assert!(executor.value(y)[..tokens * 4].iter().all(|v| *v != 0.0));
        assert!(executor.value(y)[tokens * 4..].iter().all(|v| *v == 0.0));
        assert!(executor.value(pooled)[images * 4..].iter().all(|v| *v == 0.0));
    };
    run(&[[4, 4], [2, 4], [2, 2]]);
    run(&[[1, 2]]);
}

#[test]
fn nodes_that_nobody_reads_do_not_run() {
    let mut graph = Graph::new();
    let x = param(&mut graph, "x", &[3, 4]);
    let w = param(&mut graph, "w", &[2, 4]);
    let used = gemm::linear(&mut graph, x, w, None);
    gemm::linear(&mut graph, x, w, None);
    graph.keep(used);
    assert_eq!(Plan::new(&graph).order.len(), 1);
}

/// Stochastic depth is keyed by seed, epoch, sample and branch: never by the slot.
#[test]
fn stochastic_depth_follows_the_sample() {
    let rate = 0.5;
    let mut graph = Graph::new();
    let x = patch::patches(&mut graph, 64, 3, &[0.0], &[1.0]);
    let out = residual(&mut graph, x, x, None, Some(DropPath { rate, branch: 3 }));
    graph.keep(out);
    graph.keep(x);
    let plan = Plan::new(&graph);
    let grids = vec![[1, 2]; 24];
    let mut executor = CpuExecutor::<f32>::new();
    let mut kept = |ids: &[u64], epoch: u64, seed: u64| -> Vec<bool> {
        let mut b = batch(&grids, 0, 3, 2, 64, 0);
        b.sample_ids = ids.to_vec();
        b.epochs = vec![epoch; ids.len()];
        let step = StepState { seed, loss_scale: 1.0 };
        executor.run(&graph, &plan, &[], &mut [], &HashMap::new(), &b, &step);
        let (x, out) = (executor.value(x), executor.value(out));
        (0..ids.len())
            .map(|i| {
                let rows = b.range(i).start * 3..b.range(i).end * 3;
                let factor = f32::from(u8::from(out[rows.start] != x[rows.start])) / (1.0 - rate) as f32;
                // The whole image is kept, or none of it.
                for j in rows {
                    assert!((out[j] - x[j] * (1.0 + factor)).abs() < 1e-5);
                }
                factor > 0.0
            })
            .collect()
    };
    let ids: Vec<u64> = (100..124).collect();
    let reversed: Vec<u64> = ids.iter().rev().copied().collect();
    let forward = kept(&ids, 1, 5);
    let mut backward = kept(&reversed, 1, 5);
    backward.reverse();
    assert_eq!(forward, backward);
    assert!(forward.contains(&true) && forward.contains(&false));
    assert_ne!(forward, kept(&ids, 2, 5), "another epoch draws anew");
    assert_ne!(forward, kept(&ids, 1, 6), "another seed draws anew");
}

/// Operand 0 twice, on an activation at its last use: the copy that in-place ops otherwise save.
#[test]
fn one_tensor_as_both_operands() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    gradcheck("y + y", &b, |g| {
        let (x, w) = (param(g, "x", &[5, 3]), param(g, "w", &[3, 3]));
        let y = gemm::linear(g, x, w, None);
        elementwise::add(g, y, y)
    });
    gradcheck("y + γ y", &b, |g| {
        let (x, w, gamma) = (param(g, "x", &[TOKENS, 3]), param(g, "w", &[3, 3]), param(g, "gamma", &[3]));
        let y = gemm::linear(g, x, w, None);
        let out = residual(g, y, y, Some(gamma), None);
        norm::norm(g, out, None, None, NormKind::Rms, 1e-6)
    });
}

#[test]
fn memory_at_the_peak() {
    // x [4, 8] → y [4, 16] → z [4, 2]: y and z live together; x is a parameter.
    let mut graph = Graph::new();
    let (x, a, b) =
        (param(&mut graph, "x", &[4, 8]), param(&mut graph, "a", &[16, 8]), param(&mut graph, "b", &[2, 16]));
    let y = gemm::linear_gelu(&mut graph, x, a, None, GeluKind::Erf);
    let z = gemm::linear(&mut graph, y, b, None);
    graph.keep(z);
    // Without a backward pass the pre-activation is not kept.
    assert_eq!(Plan::new(&graph).peak_elements, 4 * 16 + 4 * 2);
    let dz = graph.input("dz", 4, 2, Extent::Fixed);
    graph.backward(&[(z, dz)]);
    // z, the pre-activation, and dy: y is free once the weight gradient that reads it has run.
    assert_eq!(Plan::new(&graph).peak_elements, 4 * 2 + 2 * 4 * 16);
}

#[test]
fn checkpointing_saves_memory() {
    let peak = |checkpoint| {
        let mut graph = Graph::new();
        let mut x = param(&mut graph, "x", &[TOKENS, 6]);
        for i in 0..4 {
            let w1 = param(&mut graph, &format!("{i}.w1"), &[24, 6]);
            let w2 = param(&mut graph, &format!("{i}.w2"), &[6, 24]);
            if checkpoint {
                graph.begin_segment();
            }
            let y = norm::norm(&mut graph, x, None, None, NormKind::Rms, 1e-6);
            let hidden = gemm::linear_gelu(&mut graph, y, w1, None, GeluKind::Erf);
            let branch = gemm::linear(&mut graph, hidden, w2, None);
            x = residual(&mut graph, x, branch, None, None);
            if checkpoint {
                graph.end_segment();
            }
        }
        let info = graph.info(x).clone();
        let seed = graph.input("seed", info.rows, info.cols, info.extent);
        graph.backward(&[(x, seed)]);
        Plan::new(&graph).peak_elements
    };
    assert!(2 * peak(true) < peak(false), "{} against {}", peak(true), peak(false));
}
