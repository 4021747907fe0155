//! Properties of the recorded graph: recomputed segments, liveness, live rows, stochastic depth.

mod support;

use std::collections::HashMap;

use support::{batch, gradcheck, param, random};
use trencadis::autograd::device::fused;
use trencadis::autograd::graph::{Extent, Graph, Tensor, Tower};
use trencadis::autograd::residual::{DropPath, residual};
use trencadis::autograd::{CpuExecutor, Plan, StepState, gemm, norm, patch, pool};
use trencadis::recipe::{GeluKind, NormKind};

const GRIDS: [[u16; 2]; 4] = [[2, 3], [1, 1], [3, 1], [1, 5]];
/// Tokens of [`GRIDS`].
const TOKENS: usize = 15;

/// A two-layer network whose middle is recomputed, or not.
fn small_net(g: &mut Graph, recomputed: bool) -> Tensor {
    let x = param(g, "x", &[TOKENS, 6]);
    let (w1, w2) = (param(g, "w1", &[8, 6]), param(g, "w2", &[6, 8]));
    if recomputed {
        g.begin_segment();
    }
    let y = norm::norm(g, x, None, None, NormKind::Rms, 1e-6);
    let hidden = gemm::linear_gelu(g, y, w1, None, GeluKind::Erf);
    let branch = gemm::linear(g, hidden, w2, None);
    let out = residual(g, x, branch, None, Some(DropPath { rate: 0.3, branch: 0 }));
    if recomputed {
        g.end_segment();
    }
    norm::norm(g, out, None, None, NormKind::LayerNorm, 1e-6)
}

#[test]
fn a_recomputed_segment_gives_the_same_bits() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    gradcheck("recomputed", &b, |g| small_net(g, true));
    let run = |recomputed| {
        let mut graph = Graph::new();
        let out = small_net(&mut graph, recomputed);
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
    let (again, more_nodes) = run(true);
    assert_eq!(kept, again);
    assert!(more_nodes > nodes, "nothing was recomputed");
}

/// A LayerScale that is not trained, alone and with stochastic depth: its branch is not read backwards, and the
/// device's node computes what the nodes apart do.
#[test]
fn a_frozen_scale_needs_no_branch_backwards() {
    let b = batch(&GRIDS, 0, 3, 2, 0, 0);
    for (drop_path, passed_by) in [(None, true), (Some(DropPath { rate: 0.3, branch: 0 }), false)] {
        let mut graph = Graph::new();
        let x = param(&mut graph, "x", &[TOKENS, 6]);
        let (w, gain) = (param(&mut graph, "w", &[6, 6]), param(&mut graph, "gain", &[6]));
        graph.begin_tower(Tower { frozen: true, ..Tower::default() });
        let scale = param(&mut graph, "scale", &[6]);
        graph.begin_tower(Tower::default());
        let branch = gemm::linear(&mut graph, x, w, None);
        let stream = residual(&mut graph, x, branch, Some(scale), drop_path);
        let mut out = norm::norm(&mut graph, stream, Some(gain), None, NormKind::LayerNorm, 1e-6);
        if passed_by {
            out = residual(&mut graph, stream, out, None, None);
        }
        let info = graph.info(out).clone();
        let seed = graph.input("seed", info.rows, info.cols, info.extent);
        graph.backward(&[(out, seed)]);
        let joined = fused(&graph);
        let name = if passed_by { "add d norm residual" } else { "d norm residual" };
        let node = joined.nodes().iter().find(|node| node.op.name() == name).unwrap();
        assert_eq!((node.inputs[5], node.inputs[6]), (None, Some(scale)));

        let params: Vec<Vec<f64>> =
            graph.params().iter().enumerate().map(|(i, p)| random(p.len(), i as u64)).collect();
        let feeds = HashMap::from([(seed, random(info.len(), 9))]);
        let run = |graph: &Graph| {
            let mut grads: Vec<Vec<f64>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
            let (plan, step) = (Plan::new(graph), StepState { seed: 11, loss_scale: 1.0 });
            CpuExecutor::new().run(graph, &plan, &params, &mut grads, &feeds, &b, &step);
            grads
        };
        let grads = run(&graph);
        assert_eq!(run(&joined), grads);
        assert!(grads[0].iter().any(|x| *x != 0.0) && grads[3].iter().all(|x| *x == 0.0));
    }
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
fn recomputed_segments_save_memory() {
    let peak = |recomputed| {
        let mut graph = Graph::new();
        let mut x = param(&mut graph, "x", &[TOKENS, 6]);
        for i in 0..4 {
            let w1 = param(&mut graph, &format!("{i}.w1"), &[24, 6]);
            let w2 = param(&mut graph, &format!("{i}.w2"), &[6, 24]);
            if recomputed {
                graph.begin_segment();
            }
            let y = norm::norm(&mut graph, x, None, None, NormKind::Rms, 1e-6);
            let hidden = gemm::linear_gelu(&mut graph, y, w1, None, GeluKind::Erf);
            let branch = gemm::linear(&mut graph, hidden, w2, None);
            x = residual(&mut graph, x, branch, None, None);
            if recomputed {
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
