//! What is made of the record before it runs.

use trencadis::autograd::Plan;
use trencadis::autograd::device::{ArenaPlan, fused};
use trencadis::autograd::graph::Graph;
use trencadis::autograd::loss;
use trencadis::data::packing;
use trencadis::device::DeviceInfo;
use trencadis::models::vit;
use trencadis::parallel::Place;
use trencadis::recipe::*;
use trencadis::train::engine::{DeviceMemory, largest_tokens};

use crate::case::*;
use crate::support::batch;
use crate::support::numbers::distance;

/// Nodes that are one launch on a device compute the same on the CPU as apart.
#[test]
fn fused_nodes_compute_the_same() {
    for (name, config) in variants() {
        let batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        let mut recorded = record(&config, &batch, LossKind::Softmax);
        let apart = on_cpu(&recorded, &batch);
        let fused = fused(&recorded.graph);
        assert!(fused.nodes().len() < recorded.graph.nodes().len(), "{name}");
        recorded.graph = fused;
        let together = on_cpu(&recorded, &batch);
        for (together, apart) in together.2.iter().zip(&apart.2) {
            assert!(distance(together, apart) < 1e-12, "{name}");
        }
        assert!(distance(&together.1, &apart.1) < 1e-12, "{name}");
    }
}

/// The gradient of a residual connection is part of that of the norm behind it, apart from the second of two branches
/// of one stream, and from a branch that is read and recomputed in between.
#[test]
fn gradients_of_residual_connections_join_those_of_norms() {
    let base = ModelConfig { recompute: Recompute::None, ..variants()[0].1.clone() };
    let named = |config: ModelConfig| {
        let batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        let graph = fused(&record(&config, &batch, LossKind::Softmax).graph);
        ["d residual", "d norm residual", "add d norm residual"]
            .map(|name| graph.nodes().iter().filter(|node| node.op.name() == name).count())
    };
    let scaled = ModelConfig { layer_scale: 0.3, ..base.clone() };
    assert_eq!(named(base.clone()), [0, 0, 0]);
    assert_eq!(named(scaled.clone()), [0, 1, 3]);
    assert_eq!(named(ModelConfig { block: BlockKind::Parallel, ..scaled.clone() }), [2, 1, 1]);
    assert_eq!(named(ModelConfig { recompute: Recompute::Full, ..scaled }), [2, 0, 2]);
    let dropped = ModelConfig { drop_path: 0.4, ..base };
    assert_eq!(named(dropped.clone()), [0, 1, 3]);
    assert_eq!(named(ModelConfig { recompute: Recompute::Full, ..dropped }), [0, 1, 3]);
}

/// The arena of every recipe's training step is within 5 % of what is in use at its peak, and far below what the
/// activations are in all.
#[test]
fn the_arena_is_hardly_larger_than_what_is_in_use() {
    for name in ["digits", "vit-b16", "navit-b16", "navit-l16", "deit3-l16", "vit-22b-l16"] {
        let recipe = Recipe::load(name, &[]).unwrap();
        let mut graph = Graph::new();
        let outputs = vit::record(&mut graph, &recipe, 1000, 4096, 64, true).unwrap();
        let loss = loss::classification(&mut graph, outputs.logits, LossKind::Softmax.into());
        graph.backward(&[(outputs.logits, loss.dlogits)]);
        graph.keep(loss.per_image);
        let graph = fused(&graph);
        let start = std::time::Instant::now();
        let layout = ArenaPlan::new(&graph, &Plan::new(&graph));
        println!("{name}: {} of {} bytes, {:?}", layout.bytes, layout.peak, start.elapsed());
        assert!(layout.bytes as f64 <= 1.05 * layout.peak as f64, "{name}");
        let all: usize = layout.slots.iter().flatten().map(|slot| slot.len()).sum();
        assert!(layout.peak < all, "{name}");
    }
}

/// A recipe of bins keeps its tokens where they fit, and else gets whole bins of as many as do.
#[test]
fn tokens_that_fit() {
    let info = DeviceInfo::h100();
    let recipe = Recipe::load("navit-b16", &[]).unwrap();
    let most = recipe.packing.tokens;
    let total = |tokens: usize| {
        let mut recipe = recipe.clone();
        recipe.packing.tokens = tokens;
        recipe.validate().unwrap();
        DeviceMemory::plan(&info, &recipe, 1000, packing::slots(&recipe), Place::default()).unwrap().total()
    };
    let needed = total(most);
    assert_eq!(largest_tokens(&info, 2 * needed, &recipe, 1000).unwrap(), Some(most));
    let tokens = largest_tokens(&info, needed / 2, &recipe, 1000).unwrap().unwrap();
    assert!(tokens.is_multiple_of(recipe.packing.sequence) && total(tokens) <= needed / 2, "{tokens}");
    assert!(total(tokens + most / 16) > needed * 49 / 100, "{tokens} are far from the most");
    assert_eq!(largest_tokens(&info, 1 << 20, &recipe, 1000).unwrap(), None);
}
