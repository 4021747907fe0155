//! Every backward rule against finite differences in f64 on odd shapes.

mod support;

use std::collections::HashMap;

use support::{batch, gradcheck, param, random};
use trencadis::autograd::attention::{QkParams, attention};
use trencadis::autograd::graph::{Extent, Graph};
use trencadis::autograd::position::rope::rope_table;
use trencadis::autograd::residual::{DropPath, residual};
use trencadis::autograd::{
    CpuExecutor, Plan, StepState, elementwise, gemm, loss, norm, patch, pool, position,
};
use trencadis::cpu::attention::AttentionConfig;
use trencadis::ops::ClassificationLoss;
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

/// Constants for every kind of QK-norm.
fn qk_cases() -> impl Iterator<Item = AttentionConfig> {
    let kinds = [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
    kinds.into_iter().flat_map(|norm| {
        [false, true].map(|gain_per_head| AttentionConfig {
            heads: 2,
            kv_heads: 2,
            head_dim: 5,
            scale: 0.7,
            norm,
            eps: 1e-6,
            gain_per_head,
            rope: Rope::None,
        })
    })
}

fn qk_params(g: &mut Graph, config: &AttentionConfig) -> QkParams {
    let len = |heads| if config.gain_per_head { heads * config.head_dim } else { config.head_dim };
    let (q_len, k_len) = (len(config.heads), len(config.kv_heads));
    let gain = config.norm != QkNormKind::None;
    let bias = config.norm == QkNormKind::LayerNormBias;
    QkParams {
        q_gain: gain.then(|| param(g, "q_gain", &[q_len])),
        k_gain: gain.then(|| param(g, "k_gain", &[k_len])),
        q_bias: bias.then(|| param(g, "q_bias", &[q_len])),
        k_bias: bias.then(|| param(g, "k_bias", &[k_len])),
    }
}

#[test]
fn attention_rules() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    for config in qk_cases() {
        gradcheck(&format!("attention {config:?}"), &b, |g| {
            let qkv = param(g, "qkv", &[TOKENS, 30]);
            let params = qk_params(g, &config);
            attention(g, qkv, params, None, config)
        });
    }
}

/// Query heads that share kv heads, and rotations, with every norm; a prefix token is not turned.
#[test]
fn attention_rules_with_groups_and_rotations() {
    let b = batch(&GRIDS, 1, 3, 2, 0, 0);
    let tokens = TOKENS + GRIDS.len();
    for (kind, kv_heads) in [Rope::None, Rope::Interleaved, Rope::Halves]
        .into_iter()
        .flat_map(|kind| [1, 2, 4].map(|n| (kind, n)))
    {
        let rope = RopeConfig { kind, theta: 3.0, ..RopeConfig::default() };
        for config in qk_cases() {
            let config = AttentionConfig { heads: 4, kv_heads, head_dim: 4, rope: kind, ..config };
            gradcheck(&format!("attention {config:?}"), &b, |g| {
                let qkv = param(g, "qkv", &[tokens, config.qkv_width()]);
                let params = qk_params(g, &config);
                let table = rope_table(g, tokens, config.head_dim, &rope);
                attention(g, qkv, params, table, config)
            });
        }
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
    for resample in [
        PositionResample::Bicubic,
        PositionResample::Bilinear,
        PositionResample::BicubicNoAntialias,
        PositionResample::BicubicOffset,
        PositionResample::LinearAlignCorners,
    ] {
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
    for kind in [LossKind::Softmax, LossKind::Sigmoid, LossKind::Bce] {
        for (smoothing, temperature) in [(0.0, 1.0), (0.1, if kind == LossKind::Softmax { 2.5 } else { 1.0 })]
        {
            let mut graph = Graph::new();
            let logits = graph.input("logits", GRIDS.len(), classes, Extent::Images);
            let loss =
                loss::classification(&mut graph, logits, ClassificationLoss { kind, smoothing, temperature });
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
