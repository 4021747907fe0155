//! Shared by the integration tests: batches without pixels, and finite differences of a recorded graph.
#![allow(dead_code)]

pub mod devices;
pub mod numbers;
pub mod one;
pub mod places;
pub mod rounded;
pub mod synthetic;

use std::collections::HashMap;

use trencadis::autograd::graph::{Graph, Init, ParamSpec, Tensor};
use trencadis::autograd::{CpuExecutor, Plan, StepState};
use trencadis::data::batch::{PREFIX, PackedBatch, Patches, Targets};
use trencadis::rng::{Purpose, Stream};

/// Numbers in (−1, 1) that depend on `seed` alone.
pub fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    (0..len).map(|_| f64::from(stream.uniform()) * 2.0 - 1.0).collect()
}

/// A batch of images with these patch grids, `prefix` tokens each, in a budget of `tokens`
/// (0: exactly what they need) and `spare` unused slots; u8 patches of `patch_dim` random values.
pub fn batch(
    grids: &[[u16; 2]],
    prefix: usize,
    patch_dim: usize,
    classes: usize,
    tokens: usize,
    spare: usize,
) -> PackedBatch {
    let (mut positions, mut pixels, mut cu_seqlens) = (Vec::new(), Vec::new(), vec![0]);
    for &[rows, columns] in grids {
        positions.extend(std::iter::repeat_n(PREFIX, prefix));
        pixels.resize(pixels.len() + prefix * patch_dim, 0);
        positions.extend((0..rows).flat_map(|r| (0..columns).map(move |c| [r, c])));
        let count = usize::from(rows) * usize::from(columns) * patch_dim;
        // Keyed by the image alone, so that an image looks the same in every batch.
        pixels.extend(
            random(count, 1000 + u64::from(rows) * 64 + u64::from(columns))
                .iter()
                .map(|x| ((x + 1.0) * 127.0) as u8),
        );
        cu_seqlens.push(positions.len() as i32);
    }
    let tokens = if tokens == 0 { positions.len() } else { tokens };
    assert!(tokens >= positions.len());
    positions.resize(tokens, [0, 0]);
    pixels.resize(tokens * patch_dim, 0);
    let (images, slots) = (grids.len(), grids.len() + spare);
    let last = cu_seqlens[images];
    cu_seqlens.resize(slots + 1, last);
    let used =
        |f: &dyn Fn(usize) -> u64| (0..slots).map(|i| if i < images { f(i) } else { 0 }).collect::<Vec<_>>();
    let mut all_grids = grids.to_vec();
    all_grids.resize(slots, [0, 0]);
    PackedBatch {
        patches: Patches::U8(pixels),
        patch_dim,
        cu_seqlens,
        positions,
        grids: all_grids,
        targets: Targets::Classes(used(&|i| (i % classes) as u64).iter().map(|c| *c as i32).collect()),
        weights: (0..slots).map(|i| if i < images { 1.0 } else { 0.0 }).collect(),
        sample_ids: used(&|i| 7 + i as u64),
        epochs: vec![0; slots],
        images,
        texts: None,
    }
}

/// A parameter of this shape; decay and head do not matter here.
pub fn param(graph: &mut Graph, name: &str, shape: &[usize]) -> Tensor {
    graph.param(ParamSpec {
        name: name.into(),
        shape: shape.to_vec(),
        init: Init::Constant(0.0),
        decay: false,
        head: false,
    })
}

/// Compares the recorded backward pass of `build` with central differences in f64, for every
/// element of every parameter. `build` registers its parameters and returns the result whose
/// weighted sum is differentiated.
pub fn gradcheck(what: &str, batch: &PackedBatch, build: impl Fn(&mut Graph) -> Tensor) {
    let mut graph = Graph::new();
    let out = build(&mut graph);
    let info = graph.info(out).clone();
    let seed = graph.input("seed", info.rows, info.cols, info.extent);
    graph.backward(&[(out, seed)]);
    graph.keep(out);
    let plan = Plan::new(&graph);
    let step = StepState { seed: 11, loss_scale: 1.0 };
    let feeds = HashMap::from([(seed, random(info.len(), 99))]);
    let mut params: Vec<Vec<f64>> = graph
        .params()
        .iter()
        .enumerate()
        .map(|(i, p)| random(p.len(), i as u64).iter().map(|x| x * 0.8 + 0.1).collect())
        .collect();
    let mut grads: Vec<Vec<f64>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
    let mut executor = CpuExecutor::<f64>::new();
    executor.run(&graph, &plan, &params, &mut grads, &feeds, batch, &step);

    let mut forward = Graph::new();
    let forward_out = build(&mut forward);
    forward.keep(forward_out);
    let forward_plan = Plan::new(&forward);
    let weights = &feeds[&seed];
    let mut objective = |params: &[Vec<f64>]| -> f64 {
        executor.run(&forward, &forward_plan, params, &mut [], &HashMap::new(), batch, &step);
        executor.value(forward_out).iter().zip(weights).map(|(y, w)| y * w).sum()
    };
    let h = 1e-5;
    let mut moved = false;
    for p in 0..params.len() {
        for i in 0..params[p].len() {
            let x = params[p][i];
            params[p][i] = x + h;
            let above = objective(&params);
            params[p][i] = x - h;
            let below = objective(&params);
            params[p][i] = x;
            let numeric = (above - below) / (2.0 * h);
            let analytic = grads[p][i];
            let name = &graph.params()[p].name;
            assert!(
                (numeric - analytic).abs() <= 2e-7 * (1.0 + numeric.abs().max(analytic.abs())),
                "{what}: d/d {name}[{i}]: finite difference {numeric}, rule {analytic}"
            );
            moved |= numeric.abs() > 1e-6;
        }
    }
    assert!(moved, "{what}: no gradient at all, the check would prove nothing");
}
