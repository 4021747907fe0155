//! Communication overlapped with products, on a simulated clock: nothing here depends on the machine's time.

use std::rc::Rc;
use std::sync::Arc;

use trencadis::Result;
use trencadis::autograd::{Shard, Workload};
use trencadis::nn::init::initialise;
use trencadis::parallel::zero::{Schedule, Units};
use trencadis::parallel::{Grads, Group, Mesh, MeshGroups, Operand, Ranks, Rings, Sharding, Simulation};
use trencadis::recipe::{ModelConfig, PositionConfig, Recipe, Recompute};
use trencadis::train::engine::{CpuEngine, TrainState};
use trencadis::train::step::TrainStep;

use crate::support::batch;
use crate::whole::{Whole, kinds};

/// One rank's makespan of the forward and of the backward pass.
fn makespans(
    group: &Group,
    whole: &Whole,
    kind: (Sharding, trencadis::parallel::Layout, Rings),
) -> Result<[f64; 2]> {
    let layer = whole.layer(kind, group.size());
    let [x, weight, _, dy, ..] = whole.part::<f32>(kind.0, kind.1, group.size(), group.rank());
    let mut y = vec![0.0; dy.len()];
    layer.forward(group, &mut y, None, &x, &weight, None)?;
    let forward = group.clock().unwrap();
    // All begin the backward pass at the same time, as messages of no bytes take none here.
    group.barrier()?;
    let begin = group.clock().unwrap();
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
    let grads = Grads { dx: &mut dx, dw: &mut dw, db: None };
    layer.backward(group, grads, &dy, Operand::Local(&x), &weight)?;
    Ok([forward, group.clock().unwrap() - begin])
}

#[test]
fn makespan_is_that_of_the_longer_of_the_two() {
    let whole = Arc::new(Whole::new(48, 48, 96));
    for size in [2, 3, 4, 8] {
        for kind in kinds() {
            // Time of a product over that of a message.
            for ratio in [0.25, 1.0, 4.0] {
                let operands = whole.clone();
                let layer = whole.layer(kind, size);
                let [rows, cols] = layer.chunk_shape(48);
                let flops = 2.0 * (48 * 48 * 96 / size) as f64;
                let message = 1.0;
                let product = ratio * message;
                let simulation = Simulation {
                    latency: 0.0,
                    bandwidth: (rows * cols * 4) as f64 / message,
                    flops: flops / size as f64 / product,
                };
                let all = Ranks::new(size)
                    .simulated(simulation)
                    .run(move |group| makespans(group, &operands, kind));
                let all = all.unwrap();
                let steps = size as f64;
                // Two-directional rings halve the bytes of each link, but between two ranks there is only one.
                let share = if kind.2 == Rings::Two && size > 2 { 0.5 } else { 1.0 };
                let gathers = if kind.0 == Sharding::Row { 2.0 } else { 1.0 };
                for (pass, products, messages) in [(0, 1.0, 1.0), (1, 2.0, gathers)] {
                    let (product, message) = (products * product, messages * message * share);
                    let (compute, communication) = (steps * product, (steps - 1.0) * message);
                    let makespan = all.iter().map(|times| times[pass]).fold(0.0, f64::max);
                    let bound = 1.15 * compute.max(communication) + product.max(message);
                    let what = format!("{kind:?}, {size} ranks, product/message {ratio}, pass {pass}");
                    assert!(makespan <= bound, "{what}: {makespan} is above {bound}");
                    // And no rank has skipped anything.
                    assert!(makespan >= compute.max(communication) - 1e-9, "{what}: {makespan}");
                    if size == 8 && product == message {
                        assert!(bound < 0.8 * (compute + communication), "{what}: the bound shows nothing");
                    }
                }
            }
        }
    }
}

/// What latency there is hides behind products as well.
#[test]
fn latency_is_hidden_too() {
    let whole = Arc::new(Whole::new(48, 48, 96));
    let kind = kinds().next().unwrap();
    let flops = 2.0 * (48 * 48 * 96 / 4 / 4) as f64;
    let simulation = Simulation { latency: 0.9, bandwidth: 1e9, flops };
    let all = Ranks::new(4).simulated(simulation).run(move |group| makespans(group, &whole, kind)).unwrap();
    // Four products of a second.
    assert!(all.iter().all(|times| (times[0] - 4.0).abs() < 0.01), "{all:?}");
}

/// One rank's makespan of a forward and backward pass, seconds of products, and of its messages by the longest link;
/// and those of the largest unit by itself, which comes before all products, and goes behind them.
fn of_the_data_axis(group: &Group, recipe: &Recipe, link: Simulation) -> Result<[f64; 4]> {
    let mesh = Mesh::new(group.size(), 1)?;
    let step = TrainStep::new(recipe, 10, 6)?;
    let data = Shard { rank: group.rank(), size: group.size() };
    let units = Units::new(step.graph(), data);
    let schedule = Schedule::new(step.graph(), step.plan(), &units);
    let batch = batch(&[[6, 6], [3, 4]], recipe.model.prefix(), recipe.model.patch_dim(), 10, 64, 4);
    let work = Workload::of(&batch);
    let state = TrainState::fresh(initialise(step.params(), 3), false);
    let (graph, nodes) = (step.graph(), step.graph().nodes());
    let flops: f64 = step.plan().order.iter().map(|&i| nodes[i].op.flops(graph, &nodes[i], &work)).sum();
    let mut engine = CpuEngine::new(recipe, step, 6, &state, Rc::new(MeshGroups::new(group, mesh)?))?;
    group.barrier()?;
    let begin = group.clock().unwrap();
    engine.gradients(std::slice::from_ref(&batch))?;
    let makespan = group.clock().unwrap() - begin;
    // Links carry in parallel: to each other rank its share of a volume goes.
    let seconds = |elements: u64| elements as f64 * 4.0 / (group.size() - 1) as f64 / link.bandwidth;
    let largest = (0..units.units().len()).map(|unit| units.piece_len(unit)).max().unwrap();
    let alone = 2.0 * largest as f64 * 4.0 / link.bandwidth;
    Ok([makespan, flops / link.flops, seconds(schedule.volume(&units)), alone])
}

/// Weights come while the block before computes, gradients go while the block after does.
#[test]
fn a_data_axis_takes_the_longer_of_products_and_messages() {
    let model = ModelConfig {
        shape: String::new(),
        width: 64,
        depth: 8,
        mlp: 256,
        heads: 4,
        patch: 2,
        channels: 1,
        recompute: Recompute::Full,
        position: PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() },
        ..ModelConfig::default()
    };
    let mut recipe = Recipe { model, ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.packing.tokens = 64;
    for size in [2, 4] {
        for ratio in [0.3, 1.0, 3.0] {
            // Products take `ratio` times as long as messages, about.
            let link = Simulation { latency: 0.0, bandwidth: 1e6, flops: 3.4e7 * size as f64 / ratio };
            let recipe = recipe.clone();
            let all = Ranks::new(size)
                .simulated(link)
                .run(move |group| of_the_data_axis(group, &recipe, link))
                .unwrap();
            for [makespan, products, messages, alone] in all {
                let longer = products.max(messages);
                let bound = 1.15 * longer + alone;
                assert!(
                    makespan <= bound && makespan >= longer && bound < products + messages,
                    "{size} ranks: {makespan:.2} s, products {products:.2}, messages {messages:.2}, one unit {alone:.2}"
                );
            }
        }
    }
}
