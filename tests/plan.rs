//! Plans of trainings on many GPUs, against figures worked out by hand and what the parts of the house say themselves.

use trencadis::autograd::{Plan, Split, sharded};
use trencadis::data::packing;
use trencadis::device::DeviceInfo;
use trencadis::parallel::Mesh;
use trencadis::recipe::{OptimizerKind, Recipe, Recompute};
use trencadis::train::engine::DeviceMemory;
use trencadis::train::plan::device::memory;
use trencadis::train::plan::rank::RankStep;
use trencadis::train::plan::search::{Candidate, Request, Search, search};
use trencadis::train::plan::time::{Again, Flops, Rates, StepTime};
use trencadis::train::plan::traffic::Traffic;
use trencadis::train::step::TrainStep;

const GIB: usize = 1 << 30;
const W: usize = 6144;
const MLP: usize = 24576;
const T: usize = 16384;

fn load(name: &str, sets: &[&str]) -> Recipe {
    Recipe::load(name, &sets.iter().map(|&set| set.to_owned()).collect::<Vec<_>>()).unwrap()
}

fn rank(recipe: &Recipe, tensor: usize) -> RankStep {
    RankStep::record(recipe, 1000, packing::slots(recipe), tensor).unwrap()
}

fn request(name: &str, sets: &[&str], gpus: usize, memory: usize) -> Request {
    Request { recipe: load(name, sets), classes: 1000, gpus, memory, rates: Rates::default() }
}

#[track_caller]
fn near(got: f64, want: f64, relative: f64) {
    assert!((got - want).abs() <= relative * want.abs(), "{got}, expected {want}");
}

/// A block of ViT-22B: matrices, norm, gains of queries and keys, biases of the MLP.
const BLOCK: usize = 4 * W * W + 2 * W * MLP + W + 2 * 128 + MLP + W;
/// What comes before the blocks: patches with bias, a table of 16 x 16 positions.
const STEM: usize = 588 * W + W + 256 * W;
/// And after them: norm; query, its projections, QK-norm, and the MLP with its norm; the head.
const TAIL: usize = W + W + 4 * W * W + 2 * 128 + 2 * W * MLP + MLP + W + W + 1000 * W + 1000;

/// Bytes of what Adafactor keeps on every rank.
fn statistics(rank: &RankStep) -> usize {
    let factorings = OptimizerKind::Adafactor.factorings(rank.step.params());
    4 * factorings.into_iter().map(|factoring| factoring.len()).sum::<usize>()
}

#[test]
fn memory_of_vit_22b_on_64_gpus() {
    let recipe = load("vit-22b", &[]);
    let whole = rank(&recipe, 1);
    let parameters = 48 * BLOCK + STEM + TAIL;
    assert_eq!(whole.step.graph().parameter_count(), parameters);
    assert_eq!(48 * (4 * W * W + 2 * W * MLP), 21_743_271_936);

    let of = |data: usize, tensor: usize| {
        let mesh = Mesh::of(data * tensor, data, tensor).unwrap();
        memory(&DeviceInfo::h100(), &recipe, 1000, packing::slots(&recipe), mesh).unwrap()
    };
    let sharded = of(64, 1);
    // 6 bytes of masters and momentum for each of 22.2 billion: 2.1 GB a GPU, but for padding; and on every GPU what is
    // kept of all rows and columns.
    let second = statistics(&whole);
    assert!((10 << 20..40 << 20).contains(&second), "{second}");
    let state = (4 * sharded.weights / 6 + sharded.moments - second) as f64;
    near(state, 6.0 * parameters as f64 / 64.0, 1e-3);
    let mut adamw = recipe.clone();
    adamw.train.optimizer = OptimizerKind::AdamW;
    let adamw =
        memory(&DeviceInfo::h100(), &adamw, 1000, packing::slots(&adamw), Mesh::of(64, 64, 1).unwrap());
    near(adamw.unwrap().moments as f64, 8.0 * parameters as f64 / 64.0, 1e-3);
    near(sharded.gradients as f64, 4.0 * parameters as f64 / 64.0, 1e-3);
    // The last block, what follows, and the block before are there at a time, in bf16; gradients of what follows and of
    // the last block in f32, and the sum of a piece.
    near(sharded.gathered as f64, 2.0 * (2 * BLOCK + TAIL) as f64, 1e-3);
    let gradients = 4.0 * (BLOCK + TAIL) as f64;
    assert!(
        (gradients..1.1 * gradients).contains(&(sharded.unit_gradients as f64)),
        "{}",
        sharded.unit_gradients
    );
    assert_eq!((sharded.average, sharded.messages), (0, 0));
    // 49 inputs of blocks in bf16 are kept whatever else is.
    assert!(sharded.activations > 49 * 2 * T * W && sharded.activations < 2 * 49 * 2 * T * W);
    assert_eq!(sharded.total(), sharded.kinds().iter().map(|(_, bytes)| bytes).sum::<usize>());

    let both = of(8, 8);
    // Matrices of blocks and biases of the first layer are shared out by the tensor axis, the rest by the data axis alone.
    let part = (4 * W * W + 2 * W * MLP + MLP) / 8 + W + 2 * 128 + W;
    let piece = (48 * part + STEM + TAIL) as f64 / 8.0;
    near((both.moments - second) as f64, 2.0 * piece, 1e-3);
    near(both.gathered as f64, 2.0 * (2 * part + TAIL) as f64, 1e-3);
    assert!(both.activations < sharded.activations / 3);
}

#[test]
fn traffic_is_that_of_schedules_and_rings() {
    let recipe = load("vit-22b", &["model.depth=4"]);
    for (data, tensor) in [(1, 1), (8, 1), (1, 8), (4, 2), (3, 4)] {
        let rank = rank(&recipe, tensor);
        let pieces = rank.pieces(data);
        let (graph, order) = (rank.step.graph(), &rank.step.plan().order);
        let traffic = Traffic::of(&rank, &pieces, 3, 4);
        assert_eq!(traffic.weights + traffic.gradients, 12 * pieces.schedule.volume(&pieces.units));
        assert_eq!(traffic.activations, 12 * sharded::volume(graph, order, 0));
        let half = Traffic::of(&rank, &pieces, 3, 2);
        assert_eq!((2 * half.weights, half.gradients), (traffic.weights, traffic.gradients));
        assert_eq!(traffic.total(), traffic.tensor() + traffic.data());
        assert_eq!((traffic.data() == 0, traffic.activations == 0), (data * tensor == 1, tensor == 1));
        if tensor > 1 {
            // Forward, again, and backward a block has 2 + 1 + 3 gathers and reductions; two more are around them.
            assert!(graph.params().iter().enumerate().any(|(p, _)| graph.split(p) == Split::Summed));
            let part = (tensor - 1) * (T / tensor) * W;
            assert_eq!(traffic.activations, 12 * ((4 * 6 + 2) * part) as u64);
        }
        if (data, tensor) == (8, 1) {
            // All but the last block and the tail are gathered again for the backward pass (the stem for its table of
            // positions); everything is reduced once.
            let [block, stem, tail] = [BLOCK, STEM, TAIL].map(|len| 7 * len.div_ceil(8) as u64);
            assert_eq!(traffic.weights, 12 * (7 * block + 2 * stem + tail));
            near(traffic.gradients as f64, 12.0 * (4 * block + stem + tail) as f64, 1e-6);
        }
    }
}

#[test]
fn time_is_what_the_rates_leave() {
    let recipe = load("vit-22b", &["model.depth=4", "train.optimizer=adamw"]);
    let alone = rank(&recipe, 1);
    let rates =
        Rates { peak: 1e15, flops: 5e14, bandwidth: 3e12, gpus_per_node: 8, link: 4e11, network: 5e10 };
    let (flops, pieces) = (Flops::of(&alone), alone.pieces(1));
    let time = StepTime::of(&alone, &pieces, 3, 2, &rates);
    near(time.compute, 3.0 * flops.hardware / 5e14, 1e-9);
    assert_eq!((time.tensor, time.data, time.passes), (0.0, 0.0, 0.0));
    near(time.update, 30.0 * (4 * BLOCK + STEM + TAIL) as f64 / 3e12, 1e-9);
    // Of a block's 12 W², queries, keys, values and the first layer of the MLP are multiplied again, and of 2 W² after
    // the blocks nothing.
    near(flops.hardware / flops.model, (4.0 * (3.0 * 12.0 + 7.0) + 6.0) / (3.0 * (4.0 * 12.0 + 2.0)), 0.01);
    // 6 FLOPs a token for each element of a matrix, and attention.
    let matrices = 6.0 * T as f64 * (4 * (4 * W * W + 2 * W * MLP)) as f64;
    assert!(flops.model > matrices && flops.model < 1.25 * matrices, "{} and {matrices}", flops.model);

    // Over a slow network all is waiting, over a fast one nothing, and between what begins and ends a batch: the first
    // gathering and the last reduction, and what the short stem does not hide of the blocks beside it.
    let pieces = alone.pieces(16);
    let of = |network: f64| StepTime::of(&alone, &pieces, 1, 2, &Rates { network, ..rates });
    let sent = Traffic::of(&alone, &pieces, 1, 2);
    near(of(1e6).total(), (sent.weights + sent.gradients) as f64 / 1e6, 0.01);
    assert!(of(1e15).data < 1e-3);
    let [stem, block] = [STEM, BLOCK].map(|len| 15.0 * 6.0 * (len / 16) as f64 / 3e11);
    let waiting = of(3e11).data;
    assert!(waiting > stem && waiting < stem + block, "{stem}, {waiting}, {block}");
    // Within a node the link counts.
    let within = alone.pieces(8);
    let slow = Rates { network: 1.0, ..rates };
    assert!(StepTime::of(&alone, &within, 1, 2, &slow).total() < 10.0);

    let parts = rank(&recipe, 8);
    let of = |link: f64| StepTime::of(&parts, &parts.pieces(1), 1, 2, &Rates { link, ..rates });
    // What is gathered for itself is never hidden.
    let rows = 2.0 * (2 * 7 * (T / 8) * W) as f64;
    near(of(4e11).tensor, rows / 4e11, 0.01);
    let sent = Traffic::of(&parts, &parts.pieces(1), 1, 2);
    near(
        of(1e6).total(),
        (sent.activations as f64 - rows) * 8.0 / 7.0 / 1e6 + (rows + sent.tensor_sums as f64) / 1e6,
        0.01,
    );
}

/// Kinds add up to what an engine at that place allocates, to the byte.
#[test]
fn a_gpu_takes_what_an_engine_on_it_allocates() {
    let info = DeviceInfo::h100();
    for name in ["vit-b16", "navit-b16", "vit-22b-l16", "deit3-h14"] {
        for sets in [&["model.recompute=none"][..], &["model.recompute=full", "train.ema=0.99"]] {
            let recipe = load(name, sets);
            let slots = packing::slots(&recipe);
            for [data, tensor] in [[1, 1], [4, 1], [1, 2], [2, 4]] {
                let mesh = Mesh::of(data * tensor, data, tensor).unwrap();
                let engine = DeviceMemory::plan(&info, &recipe, 1000, slots, mesh.place(0)).unwrap();
                let plan = memory(&info, &recipe, 1000, slots, mesh).unwrap();
                assert_eq!(
                    (plan.total(), plan.state()),
                    (engine.total(), engine.state),
                    "{name} {data} x {tensor}"
                );
                let kept = rank(&recipe, tensor).pieces(data).kept();
                let moments = match recipe.train.optimizer {
                    OptimizerKind::Adafactor => 2 * kept + statistics(&rank(&recipe, tensor)),
                    _ => 8 * kept,
                };
                near(plan.moments as f64, moments as f64, 0.01);
                assert_eq!(plan.gathered > 0, data * tensor > 1);
            }
        }
    }
}

fn by_mesh(search: &Search, data: usize, tensor: usize, recompute: Recompute) -> &Candidate {
    let is = |c: &&Candidate| (c.data, c.tensor, c.recompute) == (data, tensor, recompute);
    search.candidates.iter().find(is).unwrap()
}

#[test]
fn the_fastest_mesh_that_fits_is_taken() {
    let found = search(&request("vit-22b", &[], 64, 80 * GIB)).unwrap();
    // 48 heads are shared out by up to 16 of 64 ranks.
    assert_eq!((found.candidates.len(), found.left_out.len()), (15, 2));
    assert!(found.left_out[0].starts_with("model.heads 48 cannot be shared evenly by 32 ranks"));
    let chosen = found.chosen();
    assert!(chosen.fits && chosen.memory.total() < 80 * GIB);
    for other in found.candidates.iter().filter(|other| other.fits) {
        assert!(other.speed() <= chosen.speed());
        near(other.mfu * 64.0 * 989e12 * other.time.total(), 1024.0 * other.flops.model, 1e-9);
    }
    let [kept, cheap, again] = Recompute::ALL.map(|recompute| by_mesh(&found, 8, 8, recompute));
    assert!(kept.memory.activations > 2 * again.memory.activations && kept.mfu > again.mfu);
    assert!(kept.memory.activations > cheap.memory.activations && cheap.mfu > again.mfu);
    assert!(kept.mfu > cheap.mfu && cheap.memory.activations > again.memory.activations);
    let names: Vec<_> = found.on_chosen_mesh().map(|candidate| candidate.recompute).collect();
    assert_eq!(names, Recompute::ALL);
    // A small model needs no tensor axis.
    let small = search(&request("vit-b16", &[], 8, 80 * GIB)).unwrap();
    assert_eq!((small.chosen().tensor, small.chosen().recompute), (1, Recompute::None));
    assert!(!small.candidates.iter().any(|candidate| candidate.tensor == 8), "12 heads on 8 ranks");
}

/// What selective recomputation moves, saves and takes, worked out for blocks of ViT-22B; and a plan that needs it.
#[test]
fn selective_recomputation_has_its_price() {
    let of = |depth: usize, recompute: &str| {
        let depth = format!("model.depth={depth}");
        rank(&load("vit-22b", &[&depth, &format!("model.recompute={recompute}")]), 1)
    };
    let [four, five] = [4, 5].map(|depth| Again::of(&of(depth, "selective")));
    assert_eq!((four.flops, Again::of(&of(4, "none"))), (0.0, Again::default()));
    // Of a parallel block a norm is read and written with its statistics, and GELU.
    near(five.bytes - four.bytes, (T * (2 * 2 * W + 8 + 2 * 2 * MLP)) as f64, 1e-9);
    let blocks = of(4, "full");
    let full = Again::of(&blocks);
    assert!(full.flops > 0.0 && full.bytes > 0.0);

    let alone = of(4, "selective");
    let rates = Rates { bandwidth: 1e12, ..Rates::default() };
    let time = StepTime::of(&alone, &alone.pieces(1), 3, 2, &rates);
    near(time.passes, 3.0 * four.bytes / 1e12, 1e-9);
    let kept = of(4, "none");
    let without = StepTime::of(&kept, &kept.pieces(1), 3, 2, &rates);
    near(time.total() - without.total(), time.passes, 1e-6);
    assert_eq!(StepTime::of(&blocks, &blocks.pieces(1), 3, 2, &rates).passes, 0.0);

    // Between the memory that nothing and that blocks recomputed need, norms and GELU are the way.
    let all = search(&request("vit-l16", &[], 1, 400 * GIB)).unwrap();
    let [none, selective, _] = Recompute::ALL.map(|recompute| by_mesh(&all, 1, 1, recompute).memory.total());
    let room = (selective + none) / 2 * 100 / 97;
    let found = search(&request("vit-l16", &[], 1, room)).unwrap();
    assert_eq!(found.chosen().recompute, Recompute::Selective);
    let held: usize = found.activations.iter().map(|held| held.kept + held.passing).sum();
    let arena = found.chosen().memory.activations;
    assert!(held <= arena && held * 100 > arena * 97, "{held} of {arena}");
    let kind = |what: &str| found.activations.iter().find(|held| held.what == what).unwrap();
    let (tokens, width, blocks) = (load("vit-l16", &[]).packing.tokens, 1024, 24);
    assert_eq!(kind("attn.qkv").kept, blocks * tokens * 3 * width * 2);
    assert_eq!(kind("pre-activations").kept, blocks * tokens * 4 * width * 2);
    assert_eq!(kind("GELU").again, blocks * tokens * 4 * width * 2);
    assert!(kind("norms").again >= 2 * blocks * tokens * width * 2 && kind("norms").kept == 0);
}

#[test]
fn batches_are_raised_to_the_data_axis() {
    let found = search(&request("vit-b16", &["train.accumulate=3"], 8, 80 * GIB)).unwrap();
    assert_eq!(by_mesh(&found, 8, 1, Recompute::None).accumulate, 8);
    assert_eq!(by_mesh(&found, 4, 2, Recompute::None).accumulate, 4);
    assert_eq!(by_mesh(&found, 2, 4, Recompute::None).accumulate, 4);
}

#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let refused = |request: &Request| {
        let error = search(request).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let message = refused(&request("vit-22b", &["train.optimizer=adamw"], 4, 80 * GIB));
    assert!(message.starts_with("no mesh of 4 GPUs fits 80.0 GiB a GPU"), "{message}");
    for part in ["the least is", "(data x tensor)", "GPUs, on which it fits"] {
        assert!(message.contains(part), "{message}");
    }
    let gpus: usize = message.split("take ").nth(2).unwrap().split(' ').next().unwrap().parse().unwrap();
    search(&request("vit-22b", &["train.optimizer=adamw"], gpus, 80 * GIB)).unwrap();
    let message = refused(&request("vit-l16", &[], 1, 7 * GIB));
    assert!(
        message.contains("no mesh of 1 GPU fits") && message.contains("lower packing.tokens"),
        "{message}"
    );
    assert!(refused(&request("vit-b16", &["model.heads=2"], 1, GIB)).contains("model.heads"), "a kernel");
}

/// Recorded steps are those that trainings record.
#[test]
fn a_rank_records_what_it_trains() {
    let recipe = load("vit-22b-l16", &[]);
    let (rank, slots) = (rank(&recipe, 2), packing::slots(&recipe));
    let shard = trencadis::autograd::Shard { rank: 0, size: 2 };
    let step = TrainStep::of_shard(&recipe, 1000, slots, shard).unwrap();
    assert_eq!(rank.step.graph().render(), step.graph().render());
    assert_eq!(Plan::new(step.graph()).order, rank.step.plan().order);
}
