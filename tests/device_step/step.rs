//! Loss, logits and gradients of one step, and what is refused.

use half::bf16;
use trencadis::autograd::device::BatchShape;
use trencadis::autograd::graph::Graph;
use trencadis::autograd::{DeviceExecutor, gemm, loss, patch, pool};
use trencadis::data::batch::{Mixture, PackedBatch, Targets};
use trencadis::recipe::*;

use crate::case::*;
use crate::support::devices::devices;
use crate::support::numbers::{distance, random};
use crate::support::{batch, param};

/// The sums that products leave with their gradients, of all parameters but vectors and what several nodes write.
fn squares_are_those_of_the_gradients(executor: &DeviceExecutor, recorded: &Recorded) {
    let (known, sums) = executor.squares();
    let grads = executor.read_grads().unwrap();
    let squares = |grad: &Vec<f32>| grad.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let want: f64 = known.iter().map(|&parameter| squares(&grads[parameter])).sum();
    let got: f64 = sums.download().unwrap().iter().sum();
    assert!((got - want).abs() <= 1e-6 * want, "{got} instead of {want}");
    let name = |parameter: usize| &recorded.graph.params()[parameter].name;
    let of_block = |name: &str| name.starts_with("blocks.") && name.ends_with("weight");
    let matrix = |&parameter: &usize| of_block(name(parameter)) && !name(parameter).contains("norm");
    let matrices = (0..grads.len()).filter(matrix);
    assert!(matrices.into_iter().all(|parameter| known.contains(&parameter)), "{known:?}");
    let largest = grads.iter().map(squares).sum::<f64>();
    assert!(want < largest && !known.is_empty());
}

#[test]
fn a_step_agrees_with_the_cpu() {
    for (name, config) in variants() {
        let mut batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        batch.weights[1] = 0.5;
        let mut kind = LossKind::Softmax;
        if name == "parallel" {
            kind = LossKind::Sigmoid;
            let soft = random::<f32>(batch.slots() * CLASSES, 3).iter().map(|x| x.abs().min(1.0)).collect();
            batch.targets = Targets::Soft(soft);
        }
        let recorded = record(&config, &batch, kind);
        let (loss, logits, grads) = on_cpu(&recorded, &batch);
        for device in devices() {
            let start = std::time::Instant::now();
            let mut executor = executor(&device, &recorded, &batch);
            let got = on_device(&mut executor, &recorded, &batch);
            let mut worst = (distance(&got.0, &loss), "loss".to_string());
            let mut compare = |what: &str, got: &[f64], want: &[f64]| {
                let apart = distance(got, want);
                if apart > worst.0 {
                    worst = (apart, what.into());
                }
                assert!(apart <= 1e-3, "{name} on {}: {what} is {apart:.1e} apart", device.info().name);
            };
            compare("logits", &got.1, &logits);
            let rank = executor.rank().download().unwrap();
            assert!(rank[..GRIDS.len()].iter().all(|rank| (0..CLASSES as i32).contains(rank)), "{rank:?}");
            assert!(rank[GRIDS.len()..].iter().all(|&rank| rank == -1), "{rank:?}");
            for ((param, got), want) in recorded.graph.params().iter().zip(&got.2).zip(&grads) {
                if !cancels(&config, &param.name) {
                    compare(&format!("the gradient of {}", param.name), got, want);
                }
            }
            squares_are_those_of_the_gradients(&executor, &recorded);
            executor.check().unwrap();
            let again = on_device(&mut executor, &recorded, &batch);
            assert_eq!(got, again, "{name} on {}: another run, other bits", device.info().name);
            println!(
                "{name} on {}: at most {:.1e} apart ({}), arena {} bytes for {} in use, {:.1} s",
                device.info().name,
                worst.0,
                worst.1,
                executor.layout().bytes,
                executor.layout().peak,
                start.elapsed().as_secs_f64()
            );
        }
    }
}

/// What is made again has the bits that it had, but for GELU: the product makes it before the pre-activation is rounded,
/// the backward pass after that. It reaches the gradients of the weights that it is multiplied by alone.
#[test]
fn selective_recomputation_changes_gelu_alone() {
    for (name, config) in variants() {
        let batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        let [kept, again] = [Recompute::None, Recompute::Selective]
            .map(|recompute| record(&ModelConfig { recompute, ..config.clone() }, &batch, LossKind::Softmax));
        let params = kept.graph.params();
        for device in devices() {
            let [kept, again] = [&kept, &again]
                .map(|recorded| on_device(&mut executor(&device, recorded, &batch), recorded, &batch));
            assert_eq!((&again.0, &again.1), (&kept.0, &kept.1), "{name}: loss and logits");
            let (mut rounded, mut largest) = (0, 0.0f64);
            for (i, param) in params.iter().enumerate() {
                if param.name.ends_with("fc2.weight") {
                    rounded += usize::from(again.2[i] != kept.2[i]);
                    largest = largest.max(distance(&again.2[i], &kept.2[i]));
                } else {
                    assert_eq!(again.2[i], kept.2[i], "{name}: the gradient of {}", param.name);
                }
            }
            println!("{name}: {rounded} gradients of fc2.weight are rounded elsewhere, {largest:.1e} apart");
            assert!(largest < 1e-5 && rounded >= config.depth, "{name}: {rounded}, {largest:.1e} apart");
        }
    }
}

/// A weight that two nodes write the gradient of is not among those whose squares are known: no node sees the whole.
#[test]
fn squares_of_weights_that_are_used_twice_are_not_known() {
    let batch = batch(&GRIDS, 0, 8, CLASSES, TOKENS, 2);
    let mut graph = Graph::new();
    let x = patch::patches(&mut graph, TOKENS, 8, &[0.4], &[0.3]);
    let (once, twice) = (param(&mut graph, "once", &[16, 8]), param(&mut graph, "twice", &[16, 16]));
    let hidden = gemm::linear(&mut graph, x, once, None);
    let hidden = gemm::linear(&mut graph, hidden, twice, None);
    let hidden = gemm::linear(&mut graph, hidden, twice, None);
    let logits = pool::mean_pool(&mut graph, hidden, batch.slots(), 0);
    let loss = loss::classification(&mut graph, logits, LossKind::Softmax.into());
    graph.backward(&[(logits, loss.dlogits)]);
    graph.keep(loss.per_image);
    graph.keep(logits);
    let half = |(i, len): (usize, usize)| {
        random::<f64>(len, i as u64).iter().map(|&x| bf16::from_f64(x / 2.0).to_f32()).collect()
    };
    let params = graph.params().iter().map(|param| param.len()).enumerate().map(half).collect();
    let recorded = Recorded { graph, logits, per_image: loss.per_image, params };
    for device in devices() {
        let mut executor = executor(&device, &recorded, &batch);
        let grads = on_device(&mut executor, &recorded, &batch).2;
        let (known, sums) = executor.squares();
        let (want, got) = (grads[0].iter().map(|x| x * x).sum::<f64>(), sums.download().unwrap());
        assert_eq!(known, [0]);
        assert!((got.iter().sum::<f64>() - want).abs() <= 1e-6 * want && want > 0.0);
    }
}

/// One image that fills the budget, and no image at all.
#[test]
fn full_and_empty_batches() {
    let (name, config) = &variants()[1];
    let full = batch(&[[9, 14]], 2, config.patch_dim(), CLASSES, TOKENS, 0);
    let recorded = record(config, &full, LossKind::Softmax);
    let (loss, logits, grads) = on_cpu(&recorded, &full);
    let mut empty = full.clone();
    (empty.images, empty.cu_seqlens[1], empty.weights[0]) = (0, 0, 0.0);
    for device in devices() {
        let mut executor = executor(&device, &recorded, &full);
        let got = on_device(&mut executor, &recorded, &full);
        assert!(distance(&got.0, &loss) < 1e-3 && distance(&got.1, &logits) < 1e-3, "{name}");
        for ((param, got), want) in recorded.graph.params().iter().zip(&got.2).zip(&grads) {
            let apart = distance(got, want);
            assert!(apart < 1e-3, "{name}: the gradient of {} is {apart:.1e} apart", param.name);
        }
        let nothing = on_device(&mut executor, &recorded, &empty);
        assert!(nothing.0.iter().chain(nothing.2.iter().flatten()).all(|x| *x == 0.0), "{name}");
    }
}

/// Where blocks are recomputed, the gradient of the residual connection at a block's end is a launch of its own, and
/// elsewhere a part of that of the norm behind it: the same bits, but for the order in which the gradient of its
/// LayerScale is summed.
#[test]
fn residual_gradients_within_those_of_norms_have_the_same_bits() {
    let joined = ModelConfig { layer_scale: 0.3, drop_path: 0.4, ..variants()[0].1.clone() };
    let apart = ModelConfig { recompute: Recompute::Full, ..joined.clone() };
    let batch = batch(&GRIDS, 0, joined.patch_dim(), CLASSES, TOKENS, 2);
    let recorded = [&joined, &apart].map(|config| record(config, &batch, LossKind::Softmax));
    for device in devices() {
        let run = |recorded| on_device(&mut executor(&device, recorded, &batch), recorded, &batch);
        let [joined, apart] = [run(&recorded[0]), run(&recorded[1])];
        for ((param, joined), apart) in recorded[0].graph.params().iter().zip(&joined.2).zip(&apart.2) {
            match param.name.ends_with("scale2") {
                true => assert!(joined != apart && distance(joined, apart) < 1e-9, "{}", param.name),
                false => assert_eq!(joined, apart, "{}", param.name),
            }
        }
    }
}

/// What a batch puts beside an image changes no bit of its logits and of its loss, wherever it lies.
#[test]
fn neighbours_change_nothing() {
    let config = &variants()[0].1;
    let alone = batch(&GRIDS[2..3], 0, config.patch_dim(), CLASSES, TOKENS, 4);
    let mut among = batch(&GRIDS, 0, config.patch_dim(), CLASSES, TOKENS, 0);
    among.sample_ids[2] = alone.sample_ids[0];
    let (Targets::Classes(to), Targets::Classes(from)) = (&mut among.targets, &alone.targets) else {
        unreachable!("both have classes")
    };
    to[2] = from[0];
    let recorded = record(config, &among, LossKind::Softmax);
    let shape = BatchShape { image_rows: TOKENS, longest: 9, ..BatchShape::of(&among) };
    for device in devices() {
        let mut executor = DeviceExecutor::new(&device, &recorded.graph, shape, &|_| 0.0).unwrap();
        executor.params().write(executor.stream(), &recorded.params).unwrap();
        let here = on_device(&mut executor, &recorded, &alone);
        let there = on_device(&mut executor, &recorded, &among);
        assert_eq!(here.0[0], there.0[2]);
        assert_eq!(here.1[..CLASSES], there.1[2 * CLASSES..3 * CLASSES]);
    }
}

/// Mixtures reach the device as the soft targets that they stand for, where there is room for these.
#[test]
fn mixtures_are_soft_targets() {
    let config = &variants()[0].1;
    let mut mixed = batch(&GRIDS, 0, config.patch_dim(), CLASSES, TOKENS, 2);
    let classes = CLASSES as i32;
    let mixture = |slot: i32| Mixture::new(slot % classes, (slot * slot) % classes, 0.1 * slot as f32);
    let mixtures: Vec<Mixture> = (0..mixed.slots() as i32).map(mixture).collect();
    let mut soft = mixed.clone();
    let mut values = vec![0.0; mixtures.len() * CLASSES];
    for (row, Mixture { classes, shares }) in values.chunks_exact_mut(CLASSES).zip(&mixtures) {
        classes.iter().zip(shares).for_each(|(&class, share)| row[class as usize] += share);
    }
    mixed.targets = Targets::Mixed(mixtures);
    soft.targets = Targets::Soft(values);
    let recorded = record(config, &soft, LossKind::Softmax);
    for device in devices() {
        let mut executor = executor(&device, &recorded, &soft);
        let want = on_device(&mut executor, &recorded, &soft);
        assert_eq!(on_device(&mut executor, &recorded, &mixed), want);
        let wrong = PackedBatch {
            targets: Targets::Mixed(vec![Mixture::one(classes); mixed.slots()]),
            ..mixed.clone()
        };
        let said = executor.write(&wrong, &STEP).unwrap_err().to_string();
        assert!(said.contains("is no class of"), "{said}");
    }
}

/// Gradients of several batches add up, and a captured graph repeats the step over whatever batch was written.
#[test]
fn batches_accumulate_and_replay() {
    let config = &variants()[0].1;
    let one = batch(&GRIDS[..3], 0, config.patch_dim(), CLASSES, TOKENS, 3);
    let two = batch(&GRIDS[2..], 0, config.patch_dim(), CLASSES, TOKENS, 3);
    let recorded = record(config, &one, LossKind::Softmax);
    let shape = BatchShape { image_rows: TOKENS, longest: 9, ..BatchShape::of(&one) };
    for device in devices() {
        let mut executor = DeviceExecutor::new(&device, &recorded.graph, shape, &|_| 0.0).unwrap();
        executor.params().write(executor.stream(), &recorded.params).unwrap();
        let plain = on_device(&mut executor, &recorded, &one);
        executor.write(&two, &STEP).unwrap();
        executor.launch(0).unwrap();
        let both = executor.read_grads().unwrap();
        squares_are_those_of_the_gradients(&executor, &recorded);
        let second = on_device(&mut executor, &recorded, &two);
        for (both, (one, two)) in both.iter().zip(plain.2.iter().zip(&second.2)) {
            let sum: Vec<f64> = one.iter().zip(two).map(|(one, two)| one + two).collect();
            let both: Vec<f64> = both.iter().map(|&x| f64::from(x)).collect();
            assert!(distance(&both, &sum) < 1e-9);
        }

        let stream = executor.stream();
        stream.begin_capture().unwrap();
        executor.launch(0).unwrap();
        let graph = stream.end_capture().unwrap();
        executor.write(&one, &STEP).unwrap();
        executor.zero_grads().unwrap();
        graph.launch(executor.stream()).unwrap();
        assert_eq!(executor.value(recorded.logits).unwrap(), narrow(&plain.1));
        let replayed = executor.read_grads().unwrap();
        assert!(replayed.iter().zip(&plain.2).all(|(replayed, plain)| *replayed == narrow(plain)));
    }
}

/// What no kernel takes is said when the memory is laid out, not in the middle of a step.
#[test]
fn what_has_no_kernel_is_said_before_the_first_step() {
    let Some(device) = devices().into_iter().next() else { return };
    let base = variants()[0].1.clone();
    let says = |config: &ModelConfig| {
        let batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        let recorded = record(config, &batch, LossKind::Softmax);
        let made = DeviceExecutor::new(&device, &recorded.graph, BatchShape::of(&batch), &|_| 0.0);
        made.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let said = says(&ModelConfig { head_dim: 12, ..base.clone() });
    assert!(said.contains("head dim of 12, expected a multiple of 8"), "{said}");
    let said = says(&ModelConfig { width: 36, ..base.clone() });
    assert!(said.contains("rows have 36 columns, expected a multiple of 8"), "{said}");
    let said = says(&ModelConfig { patch_norm_in: true, ..base });
    assert!(said.contains("rows of 4 elements"), "{said}");

    let config = &variants()[0].1;
    let small = batch(&GRIDS[..1], 0, config.patch_dim(), CLASSES, TOKENS, 4);
    let large = batch(&GRIDS, 0, config.patch_dim(), CLASSES, TOKENS, 0);
    let recorded = record(config, &small, LossKind::Softmax);
    let mut executor = executor(&device, &recorded, &small);
    let said = executor.write(&large, &STEP).unwrap_err().to_string();
    assert!(said.contains("9 patches along an axis, and positions are prepared for 4"), "{said}");
    let shape = BatchShape { longest: 9, ..BatchShape::of(&small) };
    let mut short = DeviceExecutor::new(&device, &recorded.graph, shape, &|_| 0.0).unwrap();
    let said = short.write(&large, &STEP).unwrap_err().to_string();
    assert!(said.contains("tokens, and attention is prepared for"), "{said}");
    let said = executor.params().write(executor.stream(), &recorded.params[1..]).unwrap_err().to_string();
    assert!(said.contains("give those of this recipe"), "{said}");
    let other = recorded.graph.nodes()[0].outputs[0].unwrap();
    assert!(executor.value(other).unwrap_err().to_string().contains("was not kept"));
}
