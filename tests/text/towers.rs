//! Both towers as a recorded graph.

use std::collections::HashMap;

use super::support::{batch, gradcheck};
use super::{recipe, settings};
use trencadis::autograd::graph::{Graph, Modality};
use trencadis::autograd::{CpuExecutor, StepState, Workload, elementwise};
use trencadis::data::batch::PackedBatch;
use trencadis::data::loader::Loader;
use trencadis::data::source::of_recipe;
use trencadis::eval::model::Forward;
use trencadis::eval::retrieval::retrieval;
use trencadis::eval::towers::{CpuEmbed, CpuTowers, Embed};
use trencadis::eval::zero_shot::{ZeroShot, normalise};
use trencadis::models::{two_tower, vit};
use trencadis::nn::init::initialise;
use trencadis::recipe::Recipe;
use trencadis::train::plan::cpu::memory;
use trencadis::train::step::TrainStep;

const GRIDS: [[u16; 2]; 4] = [[2, 3], [1, 1], [3, 1], [1, 4]];
const TEXTS: [&[u16]; 4] = [&[3, 1, 4], &[5], &[2, 6, 5, 3, 5], &[8, 9]];

/// Towers small enough for finite differences of every parameter.
fn small(sets: &[&str]) -> Recipe {
    let small = [
        "model.width=8",
        "model.mlp=8",
        "model.heads=2",
        "model.patch=2",
        "resolution.min=4",
        "resolution.max=8",
        "model.position.rows=4",
        "model.position.columns=4",
        "text.vocabulary=10",
        "text.max_tokens=5",
        "text.width=6",
        "text.heads=2",
    ];
    recipe(&[&small[..], sets].concat())
}

/// Pairs `first..last` in a batch with `spare` slots more, the images after `tokens` tokens of budget.
fn pairs(recipe: &Recipe, first: usize, last: usize, spare: usize) -> PackedBatch {
    let mut batch = batch(&GRIDS[first..last], 0, recipe.model.patch_dim(), 2, 64, spare);
    let texts: Vec<Vec<u16>> = TEXTS[first..last].iter().map(|ids| ids.to_vec()).collect();
    batch.texts = Some(Box::new(settings(recipe, batch.slots()).pack(&texts)));
    batch
}

/// Gradients flow through both streams, each over its own tokens: every parameter of both towers.
#[test]
fn gradients_of_both_towers() {
    let recipe = small(&[]);
    let batch = pairs(&recipe, 0, 4, 1);
    gradcheck("two towers", &batch, |graph| {
        let towers = two_tower::record(graph, &recipe, batch.tokens(), batch.slots(), true).unwrap();
        elementwise::add(graph, towers.images, towers.texts)
    });
}

/// Loss and gradients of a training step, by either loss.
#[test]
fn gradients_of_a_step() {
    for (loss, recompute) in [("softmax", "none"), ("sigmoid", "selective")] {
        let recipe = small(&[
            &format!("contrastive.loss={loss}"),
            &format!("model.recompute={recompute}"),
            "contrastive.init_bias=-1",
            "packing.tokens=128",
        ]);
        let mut batch = pairs(&recipe, 0, 4, 1);
        // As many tokens as the step is recorded for.
        batch.positions.resize(128, [0, 0]);
        let patch_dim = recipe.model.patch_dim();
        if let trencadis::data::batch::Patches::U8(values) = &mut batch.patches {
            values.resize(128 * patch_dim, 0);
        }
        batch.weights[2] = 0.0;
        let step = TrainStep::new(&recipe, 2, batch.slots()).unwrap();
        let params: Vec<Vec<f64>> = initialise(step.params(), 4)
            .iter()
            .map(|values| {
                values.iter().enumerate().map(|(i, x)| f64::from(*x) * 3.0 + 0.03 * (i % 5) as f64).collect()
            })
            .collect();
        let mut executor = CpuExecutor::<f64>::new();
        let state = StepState { seed: 1, loss_scale: 1.0 / 3.0 };
        let mut run = |params: &[Vec<f64>]| {
            let mut grads: Vec<Vec<f64>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
            executor.run(step.graph(), step.plan(), params, &mut grads, &HashMap::new(), &batch, &state);
            let loss = executor.value(step.per_image()).iter().sum::<f64>() * state.loss_scale;
            (loss, grads)
        };
        let (_, grads) = run(&params);
        let mut checked = 0;
        for (p, spec) in step.params().iter().enumerate() {
            let i = p * 7 % spec.len();
            let near = |by: f64| {
                let mut params = params.clone();
                params[p][i] += by;
                params
            };
            // The scores bend: a larger step would see it.
            let h = 1e-6;
            let numeric = (run(&near(h)).0 - run(&near(-h)).0) / (2.0 * h);
            let rule = grads[p][i];
            assert!(
                (numeric - rule).abs() <= 1e-6 * (1.0 + numeric.abs()),
                "{loss}: d/d {}[{i}]: finite difference {numeric}, rule {rule}",
                spec.name
            );
            checked += usize::from(numeric.abs() > 1e-6);
        }
        assert!(checked > 20, "only {checked} gradients are not zero");
    }
}

/// A text has the vector that it has alone, and so has an image; a text's FLOPs are its own.
#[test]
fn packed_is_as_alone() {
    let recipe = small(&[]);
    let vectors = |batch: &PackedBatch, modality| {
        let towers = CpuTowers::new(&recipe, batch.tokens(), batch.slots()).unwrap();
        // Fresh vectors are so small that they would hardly differ.
        let grown = |x: f32| if x.abs() < 0.1 { 20.0 * x } else { x };
        let params: Vec<Vec<f32>> = initialise(towers.params(), 7)
            .into_iter()
            .map(|values| values.into_iter().map(grown).collect())
            .collect();
        let mut model = CpuEmbed { towers, params };
        (model.embed(modality, batch).unwrap().to_vec(), model.width())
    };
    for modality in [Modality::Images, Modality::Texts] {
        let (packed, width) = vectors(&pairs(&recipe, 0, 4, 3), modality);
        assert_eq!(packed[4 * width..], vec![0.0; 3 * width], "unused slots");
        for pair in 0..4 {
            let (alone, _) = vectors(&pairs(&recipe, pair, pair + 1, 0), modality);
            let packed = &packed[pair * width..][..width];
            let far = alone.iter().zip(packed).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 1e-6, "{modality:?} {pair}: {far}");
            assert!(alone.iter().any(|x| x.abs() > 1e-2), "the vector says something");
        }
    }
    let mut graph = Graph::new();
    two_tower::record(&mut graph, &recipe, 64, 4, false).unwrap();
    let of = |texts| graph.flops(&Workload { tokens: 0.0, images: 0.0, sum_squared: 0.0, texts });
    // qkv, proj and the MLP at width 6, K and V of the pooling: 18·6 + 6·6 + 2·8·6 + 12·6 multiply-adds a token; attention
    // 4·6 S², attention pooling 4·6 a token.
    let each = 2.0 * (108.0 + 36.0 + 96.0 + 72.0) + 24.0;
    assert_eq!(of([10.0, 30.0]) - of([0.0; 2]), 10.0 * each + 30.0 * 24.0);
}

/// An evaluation runs the text tower too, and is counted by whichever holds more.
#[test]
fn memory_of_an_evaluation_counts_both_towers() {
    let evaluation = |sets: &[&str]| {
        let recipe = small(sets);
        let step = TrainStep::new(&recipe, 2, 5).unwrap();
        memory(&recipe, &step, 5, 1, 1).evaluation
    };
    let (short, long) = (evaluation(&[]), evaluation(&["text.max_tokens=2000"]));
    // The residual stream of 5 texts alone.
    assert!(long >= short + 4 * 5 * 1900 * 6, "{short}, {long}");
}

/// Texts are found among all of a batch, also one whose scores are not held at a time.
#[test]
fn texts_are_found_among_all_of_a_batch() {
    let recipe = recipe(&["packing.images=300", "packing.tokens=16384"]);
    let (source, tokenizer) = (of_recipe(&recipe).unwrap().validation, settings(&recipe, 300).tokenizer);
    let towers = CpuTowers::new(&recipe, recipe.packing.tokens, 300).unwrap();
    let params = initialise(towers.params(), 3);
    let mut model = CpuEmbed { towers, params };
    let never = || false;
    let found = retrieval(&mut model, source.clone(), &recipe, tokenizer.clone(), &never).unwrap().unwrap().0;
    let (mut loader, width) = (Loader::eval_texts(source, &recipe, tokenizer).unwrap(), model.width());
    let (score, mut sum, mut images, mut largest) = (model.score().unwrap(), 0.0, 0, 0);
    while let Some(loaded) = loader.next().transpose().unwrap() {
        let mut vectors = |modality| {
            let mut vectors = model.embed(modality, &loaded.batch).unwrap().to_vec();
            normalise(&mut vectors, width);
            vectors
        };
        let (of_images, of_texts) = (vectors(Modality::Images), vectors(Modality::Texts));
        let here = loaded.batch.images;
        for image in of_images.chunks_exact(width).take(here).enumerate() {
            let dot = |text: &[f32]| image.1.iter().zip(text).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let of = |text| f64::from(score.factor) * dot(text) + f64::from(score.bias);
            let scores: Vec<f64> = of_texts.chunks_exact(width).take(here).map(of).collect();
            sum += scores.iter().map(|x| x.exp()).sum::<f64>().ln() - scores[image.0];
        }
        (images, largest) = (images + here, largest.max(here));
    }
    assert!(largest > 256, "{largest}");
    assert_eq!(found.images as usize, images);
    assert!((found.loss - sum / images as f64).abs() < 1e-4, "{} {}", found.loss, sum / images as f64);
}

/// Classes are told through a reference as well.
#[test]
fn classes_are_told_through_references() {
    let recipe = recipe(&[]);
    let towers = CpuTowers::new(&recipe, recipe.packing.tokens, 4).unwrap();
    let params = initialise(towers.params(), 1);
    let texts = settings(&recipe, 4);
    let mut model =
        ZeroShot::new(Box::new(CpuEmbed { towers, params }), &recipe, texts, &[], &recipe.text.prompts)
            .unwrap();
    assert_eq!(model.classes(), 0);
    let tell = |mut model: &mut dyn Forward| {
        Forward::set_classes(&mut model, &["one".into(), "two".into()], &["the digit {}".into()])
    };
    tell(&mut model).unwrap();
    assert_eq!(model.classes(), 2);
}

/// A locked image tower gets no gradient, does not decay, and costs its forward pass alone.
#[test]
fn a_locked_tower_has_no_gradient() {
    let (free, locked) = (small(&[]), small(&["contrastive.lock_image=true"]));
    let step = TrainStep::new(&locked, 2, 5).unwrap();
    let text = |name: &str| name.starts_with("text.") || name.starts_with("contrastive.");
    for (p, spec) in step.params().iter().enumerate() {
        let graph = step.graph();
        let written = graph
            .nodes()
            .iter()
            .flat_map(|node| node.outputs.iter().flatten())
            .any(|tensor| graph.info(*tensor).kind == trencadis::autograd::graph::Kind::Gradient(p));
        assert_eq!(written, text(&spec.name), "{}", spec.name);
        assert!(text(&spec.name) || !spec.decay, "{}", spec.name);
    }
    let names = |step: &TrainStep| step.params().iter().map(|p| p.name.clone()).collect::<Vec<_>>();
    let whole = TrainStep::new(&free, 2, 5).unwrap();
    assert_eq!(names(&whole), names(&step));
    let images = Workload { tokens: 50.0, images: 4.0, sum_squared: 500.0, texts: [0.0; 2] };
    let mut tower = Graph::new();
    vit::tower(&mut tower, &free, free.packing.tokens, 5, false).unwrap();
    assert_eq!(whole.flops(&images) - step.flops(&images), 2.0 * tower.flops(&images));
}
