//! A step on the CPU, whose parts are timed where they run.

use std::rc::Rc;
use std::time::Instant;

use rayon::prelude::*;

use super::subject::{Subject, Timed};
use super::{Peaks, Profile, RATE, Span, bytes, shape, update_bytes};
use crate::autograd::{Node, Workload};
use crate::cpu::gemm::{Mat, MatMut, bf16, gemm};
use crate::error::{Error, Result};
use crate::parallel::MeshGroups;
use crate::recipe::{MatmulKind, Recipe};
use crate::train::engine::{CpuEngine, TimedStep};

/// Runs of what is measured for the peaks, of which the best counts.
const RUNS: usize = 5;
/// Elements of the copy, more than caches hold, and the three sizes of the product.
const COPIED: usize = 1 << 25;
const PRODUCT: [usize; 3] = [2048, 1024, 1024];

/// Profiles the fastest of `steps` steps of `recipe` over one batch, after one to warm up.
///
/// # Errors
/// A recipe of texts, or one that is not valid; a step whose loss is not finite.
pub fn profile(name: &str, recipe: &Recipe, device: &str, classes: usize, steps: usize) -> Result<Profile> {
    let Subject { recipe, slots, step, state, batch } = Subject::new(recipe, classes)?;
    let mut engine = CpuEngine::new(&recipe, step, slots, &state, Rc::new(MeshGroups::alone()))?;
    drop(state);
    engine.timed(&batch, RATE)?;
    let seconds = |[begun, ended]: [Instant; 2]| ended.duration_since(begun).as_secs_f64();
    let mut fastest: Option<TimedStep> = None;
    for _ in 0..steps.max(1) {
        let timed = engine.timed(&batch, RATE)?;
        if fastest.as_ref().is_none_or(|known| seconds(timed.step) < seconds(known.step)) {
            fastest = Some(timed);
        }
    }
    let timed = fastest.ok_or_else(|| Error::failure("no step was timed"))?;
    if !timed.outcome.loss.is_finite() {
        return Err(Error::failure(format!("the loss of the step is {}", timed.outcome.loss)));
    }
    let told = Timed {
        device: device.into(),
        steps,
        seconds: seconds(timed.step),
        flops: timed.outcome.flops,
        peaks: Some(peaks(recipe.train.matmul)),
        spans: spans(&engine, &timed, &Workload::of(&batch), update_bytes(&recipe)),
    };
    Ok(told.profile(name, &recipe, &batch))
}

/// The gradients' zeros, the nodes, and the optimiser with all that follows the last of them.
fn spans(engine: &CpuEngine, timed: &TimedStep, work: &Workload, update: [f64; 2]) -> Vec<Span> {
    let (graph, plan) = (engine.step().graph(), engine.step().plan());
    let [begun, ended] = timed.step;
    let span = |operation: &str, shape: String, [from, to]: [Instant; 2], flops, bytes| Span {
        operation: operation.into(),
        shape,
        begin: from.duration_since(begun).as_secs_f64(),
        seconds: to.duration_since(from).as_secs_f64(),
        flops,
        bytes,
        launches: 0,
    };
    let parameters = graph.parameter_count() as f64;
    let [zeros, optimiser] = update.map(|bytes| bytes * parameters);
    let [first, last] =
        [timed.nodes.first().map_or(ended, |n| n[0]), timed.nodes.last().map_or(ended, |n| n[1])];
    let mut spans = vec![span("zero gradients", String::new(), [begun, first], 0.0, zeros)];
    for (at, (&node, &times)) in plan.order.iter().zip(&timed.nodes).enumerate() {
        let node: &Node = &graph.nodes()[node];
        let left_out = |tensor| {
            let place = node.outputs.iter().position(|output| *output == Some(tensor));
            place.is_some_and(|i| !plan.read[at][i])
        };
        let bytes = bytes(graph, node, work, |tensor| if left_out(tensor) { 0 } else { size_of::<f32>() });
        spans.push(span(node.op.name(), shape(graph, node), times, graph.node_flops(node, work), bytes));
    }
    spans.push(span("optimiser", String::new(), [last, ended], 0.0, optimiser));
    spans
}

/// What all threads do together: a product, in the arithmetic of the recipe, and a copy.
fn peaks(matmul: MatmulKind) -> Peaks {
    let _bf16 = (matmul == MatmulKind::Bf16).then(bf16::InUse::begin);
    let best = |run: &mut dyn FnMut()| {
        let times = (0..=RUNS).map(|_| {
            let begun = Instant::now();
            run();
            begun.elapsed().as_secs_f64()
        });
        times.skip(1).fold(f64::INFINITY, f64::min)
    };
    let pattern =
        |len: usize| -> Vec<f32> { (0..len).map(|i| (i * 31 % 251) as f32 / 251.0 - 0.5).collect() };
    let (from, mut to) = (pattern(COPIED), vec![0.0; COPIED]);
    let copied = best(&mut || {
        let chunk = COPIED.div_ceil(4 * rayon::current_num_threads());
        to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
    });
    let [m, n, k] = PRODUCT;
    let (a, b, mut out) = (pattern(m * k), pattern(k * n), vec![0.0; m * n]);
    let multiplied = best(&mut || {
        gemm(
            MatMut::new(&mut out, m, n, n),
            false,
            1.0,
            Mat::new(&a, m, k, k),
            Mat::new(&b, n, k, k).t(),
            true,
        );
    });
    Peaks {
        flops: 2.0 * (m * n * k) as f64 / multiplied,
        sheet: false,
        bytes: (2 * size_of::<f32>() * COPIED) as f64 / copied,
        launch: None,
    }
}
