//! Sharded linear layers: results, gradients and traffic of every sharding.

use std::sync::Arc;

use bytemuck::Pod;
use trencadis::cpu::real::Real;
use trencadis::parallel::{Event, Grads, Group, Layout, Operand, Rings, ShardedLinear, Sharding, run_ranks};
use trencadis::{Error, Result};

use crate::whole::{SIZES, Whole, kinds, near};

type Kind = (Sharding, Layout, Rings);

/// y, dx, dw, db of one rank, with the layer's operand kept or gathered again.
pub fn run<R: Real + Pod>(group: &Group, whole: &Whole, kind: Kind, kept: bool) -> Result<[Vec<R>; 4]> {
    let size = group.size();
    let layer = whole.layer(kind, size);
    let [x, weight, bias, dy, ..] = whole.part::<R>(kind.0, kind.1, size, group.rank());
    let [rows, cols] = layer.output_shape(whole.tokens);
    assert_eq!(layer.weight_shape().iter().product::<usize>(), weight.len());
    let mut y = vec![R::ZERO; rows * cols];
    let mut gathered = vec![R::ZERO; if kept { x.len() * size } else { 0 }];
    layer.forward(group, &mut y, kept.then_some(&mut gathered), &x, &weight, Some(&bias))?;
    let mut dx = vec![R::ZERO; x.len()];
    let mut dw = vec![R::of(0.5); weight.len()];
    let mut db = vec![R::of(0.5); bias.len()];
    let operand = if kept { Operand::Gathered(&gathered) } else { Operand::Local(&x[..]) };
    let grads = Grads { dx: &mut dx, dw: &mut dw, db: Some(&mut db) };
    layer.backward(group, grads, &dy, operand, &weight)?;
    Ok([y, dx, dw, db])
}

fn compare<R: Real + Pod>(tokens: usize, size: usize, kind: Kind, tolerance: f64) {
    for kept in [false, true] {
        if kept && kind.0 == Sharding::Column {
            continue;
        }
        let whole = Arc::new(Whole::new(tokens, 48, 72));
        let operands = whole.clone();
        let results = run_ranks(size, move |group| run::<R>(group, &operands, kind, kept)).unwrap();
        for (rank, got) in results.iter().enumerate() {
            let [.., y, dx, dw, db] = whole.part::<f64>(kind.0, kind.1, size, rank);
            for ((name, got), want) in ["y", "dx", "dw", "db"].into_iter().zip(got).zip([y, dx, dw, db]) {
                near(
                    &format!("{name} of rank {rank} of {size}, {kind:?}, kept {kept}"),
                    got,
                    &want,
                    tolerance,
                );
            }
        }
    }
}

/// 24 tokens are an odd number for 8 ranks that share them: halves differ.
#[test]
fn every_sharding_gives_the_unsharded_result() {
    for size in SIZES {
        for kind in kinds() {
            compare::<f32>(24, size, kind, 1e-5);
            compare::<f64>(24, size, kind, 1e-13);
        }
    }
}

/// Any number of tokens where features are shared out: none, one, and odd ones.
#[test]
fn features_are_shared_for_any_number_of_tokens() {
    for tokens in [0, 1, 5] {
        for kind in kinds().filter(|kind| kind.1 == Layout::Features) {
            compare::<f32>(tokens, 3, kind, 1e-5);
        }
    }
}

/// Bit for bit in every run, and a bias that all ranks have is the same on all.
#[test]
fn results_are_the_same_in_every_run() {
    let whole = Arc::new(Whole::new(24, 48, 72));
    for kind in kinds() {
        let runs = [(); 2].map(|()| {
            let whole = whole.clone();
            run_ranks(4, move |group| run::<f32>(group, &whole, kind, false)).unwrap()
        });
        assert_eq!(runs[0], runs[1], "{kind:?}");
        if (kind.0, kind.1) == (Sharding::Column, Layout::Tokens) {
            assert!(runs[0].iter().all(|rank| rank[3] == runs[0][0][3]), "{kind:?}");
        }
    }
}

/// Counted bytes are those of the formulas, for each neighbour.
#[test]
fn traffic_is_what_the_formulas_say() {
    let tokens = 24;
    for size in SIZES {
        for kind in kinds() {
            for kept in [false, true] {
                if kept && kind.0 == Sharding::Column {
                    continue;
                }
                let whole = Arc::new(Whole::new(tokens, 48, 72));
                run_ranks(size, move |group| {
                    run::<f32>(group, &whole, kind, kept)?;
                    let layer = whole.layer(kind, size);
                    let forward = layer.forward_volume(group.rank(), tokens);
                    let backward = layer.backward_volume(group.rank(), tokens, kept);
                    let bytes: Vec<u64> = forward.iter().zip(&backward).map(|(a, b)| 4 * (a + b)).collect();
                    assert_eq!(group.sent(), bytes, "{kind:?}, kept {kept}");

                    // (k − 1)/k of the operand or of the result, in either layout.
                    let width = if kind.0 == Sharding::Row { 48 } else { 72 };
                    let volume = (size - 1) * width / size * tokens;
                    assert_eq!(forward.iter().sum::<u64>(), volume as u64);
                    assert_eq!(kind.0.volume_per_token(48, 72, size) * tokens, volume);
                    let passes = if kind.0 == Sharding::Row && !kept { 2 } else { 1 };
                    assert_eq!(backward.iter().sum::<u64>(), (passes * volume) as u64);
                    Ok(())
                })
                .unwrap();
            }
        }
    }
}

/// What rank 1 of 4 does forward and backward.
fn events(kind: Kind, kept: bool) -> [Vec<Event>; 2] {
    let whole = Arc::new(Whole::new(24, 48, 72));
    let logs = run_ranks(4, move |group| {
        let layer = whole.layer(kind, 4);
        let [x, weight, _, dy, ..] = whole.part::<f32>(kind.0, kind.1, 4, group.rank());
        let (mut y, mut gathered) = (vec![0.0; dy.len()], vec![0.0; 4 * x.len()]);
        let keep = kept.then_some(&mut gathered[..]);
        group.log();
        layer.forward(group, &mut y, keep, &x, &weight, None)?;
        let forward = group.take_log();
        group.log();
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
        let operand = if kept { Operand::Gathered(&gathered) } else { Operand::Local(&x[..]) };
        layer.backward(group, Grads { dx: &mut dx, dw: &mut dw, db: None }, &dy, operand, &weight)?;
        let backward = group.take_log();
        assert!(group.take_log().is_empty());
        Ok([forward, backward].map(|log| log.into_iter().map(|logged| logged.event).collect()))
    });
    logs.unwrap().swap_remove(1)
}

fn product(step: usize) -> [Event; 2] {
    [Event::ProductStarted { step }, Event::ProductEnded { step }]
}

fn received(from: usize, bytes: usize) -> [Event; 2] {
    [Event::Awaited { from }, Event::Received { from, bytes }]
}

/// Sent before the product, awaited after it.
#[test]
fn an_all_gather_sends_before_each_product_and_waits_after_it() {
    // Chunks of 6 tokens by 48 features.
    let bytes = 6 * 48 * 4;
    let mut expected = Vec::new();
    for step in 0..3 {
        expected.push(Event::Posted { to: 2, bytes });
        expected.extend(product(step));
        expected.extend(received(0, bytes));
    }
    expected.extend(product(3));
    assert_eq!(events((Sharding::Row, Layout::Tokens, Rings::One), true)[0], expected);

    // Halves of them, both ways.
    let bytes = bytes / 2;
    let mut expected = Vec::new();
    for step in 0..3 {
        expected.extend([2, 0].map(|to| Event::Posted { to, bytes }));
        expected.extend(product(step));
        expected.extend(received(0, bytes));
        expected.extend(received(2, bytes));
    }
    expected.extend(product(3));
    assert_eq!(events((Sharding::Row, Layout::Tokens, Rings::Two), true)[0], expected);
}

/// The sum of a step is awaited after its product, and has left before the next begins.
#[test]
fn a_reduce_scatter_multiplies_while_sums_travel() {
    let bytes = 24 * 18 * 4;
    let mut expected = Vec::new();
    for step in 0..4 {
        expected.extend(product(step));
        if step > 0 {
            expected.extend(received(0, bytes));
        }
        if step < 3 {
            expected.push(Event::Posted { to: 2, bytes });
        }
    }
    assert_eq!(events((Sharding::Column, Layout::Features, Rings::One), false)[0], expected);
}

/// Gathering an operand again beside the sums of the gradient: both products of a step lie between what is sent
/// and what is awaited.
#[test]
fn a_backward_pass_runs_two_rings_at_once() {
    let bytes = 24 * 12 * 4;
    let mut expected = Vec::new();
    for step in 0..4 {
        if step < 3 {
            expected.push(Event::Posted { to: 2, bytes });
        }
        expected.extend(product(step));
        if step > 0 {
            expected.extend(received(0, bytes));
        }
        if step < 3 {
            expected.push(Event::Posted { to: 2, bytes });
        }
        expected.extend(product(step));
        if step < 3 {
            expected.extend(received(0, bytes));
        }
    }
    assert_eq!(events((Sharding::Row, Layout::Features, Rings::One), false)[1], expected);
}

#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::Usage(message)) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn uneven_widths_are_refused_on_every_rank_with_one_message() {
    let layer =
        |sharding, layout, widths| move |size| ShardedLinear::new(sharding, layout, Rings::One, widths, size);
    let both = layer(Sharding::Row, Layout::Features, [50, 70]);
    assert_eq!(
        refusal(run_ranks(4, move |_| both(4))),
        "input width 50, output width 70 cannot be shared evenly by 4 ranks; choose a tensor axis that divides them"
    );
    let rows = layer(Sharding::Row, Layout::Tokens, [50, 70]);
    assert!(rows(7).is_ok());
    assert!(refusal(rows(4)).starts_with("output width 70 cannot be shared evenly by 4 ranks"));
    let columns = layer(Sharding::Column, Layout::Tokens, [50, 70]);
    assert!(columns(5).is_ok());
    assert!(refusal(columns(4)).starts_with("input width 50 cannot be shared evenly by 4 ranks"));
    assert!(refusal(columns(0)).contains("cannot be shared by 0 ranks"));
    assert!(layer(Sharding::Row, Layout::Tokens, [0, 8])(2).is_err());

    // Tokens that the ranks of a reduce-scatter cannot share.
    let uneven = run_ranks(4, move |group| {
        let layer = layer(Sharding::Column, Layout::Tokens, [8, 8])(4)?;
        layer.forward(group, &mut [0f32; 12], None, &[0.0; 12], &[0.0; 16], None)
    });
    assert_eq!(
        refusal(uneven),
        "tokens 6 cannot be shared evenly by 4 ranks; choose a tensor axis that divides it"
    );
}
