//! A step on a device, whose parts are launches that are timed by themselves: a graph of some repeats of each.

use std::time::Instant;

use half::bf16;
use rand::RngExt;
use rand_distr::StandardNormal;

use super::subject::{Subject, Timed};
use super::{Peaks, Profile, RATE, Span, bytes, shape, update_bytes};
use crate::autograd::device::Element;
use crate::autograd::{Graph, Kind, Node, Tensor, Workload};
use crate::data::batch::PackedBatch;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::measure::rates;
use crate::recipe::Recipe;
use crate::rng::{Purpose, Stream};
use crate::train::engine::{DeviceEngine, DeviceOptions, Engine, Part};
use crate::train::step::StepOutcome;

/// Launches of a part in one graph.
const REPEATS: usize = 8;
/// Replays of it, of which the median counts.
const REPLAYS: usize = 3;
/// Random values that peaks are measured with, a multiple of 8 and no power of two.
const RANDOM: usize = (1 << 20) - 24;

/// Profiles steps of `recipe` on a device, which are queued ahead of one another as in training; `steps` are timed after two to
/// warm up. The step's time is their mean without what the device waited for the host.
///
/// # Errors
/// A recipe of texts, or one that is not valid; a model or batch that the kernels do not take; no room on the device; a
/// loss that is not finite.
pub fn profile(
    name: &str,
    recipe: &Recipe,
    device: &Device,
    classes: usize,
    steps: usize,
) -> Result<Profile> {
    let Subject { recipe, slots, step, state, batch } = Subject::new(recipe, classes)?;
    // While there is room.
    let peaks = peaks(device)?;
    let mut engine = DeviceEngine::new(device, &recipe, step, slots, DeviceOptions::default())?;
    engine.load(&state)?;
    drop(state);
    let (seconds, outcome) = run(&mut engine, &batch, steps.max(1))?;
    let told = Timed {
        device: device.info().name.clone(),
        steps,
        seconds,
        flops: outcome.flops,
        peaks,
        spans: spans(&engine, device, &Workload::of(&batch), update_bytes(&recipe))?,
    };
    Ok(told.profile(name, &recipe, &batch))
}

/// Mean seconds of a step, and what the last one did.
fn run(engine: &mut DeviceEngine, batch: &PackedBatch, steps: usize) -> Result<(f64, StepOutcome)> {
    let batch = std::slice::from_ref(batch);
    for _ in 0..engine.depth() {
        engine.queue(batch, RATE)?;
    }
    for _ in 0..2 {
        engine.collect()?;
        engine.queue(batch, RATE)?;
    }
    let (begun, mut idle, mut last) = (Instant::now(), 0.0, StepOutcome::default());
    for _ in 0..steps {
        last = engine.collect()?;
        idle += last.idle.unwrap_or(0.0);
        engine.queue(batch, RATE)?;
    }
    let seconds = (begun.elapsed().as_secs_f64() - idle) / steps as f64;
    for _ in 0..engine.depth() {
        engine.collect()?;
    }
    match last.loss.is_finite() {
        true => Ok((seconds, last)),
        false => Err(Error::failure(format!("the loss of the step is {}", last.loss))),
    }
}

/// Times every part in the order of a step, so that each finds the operands that it would; one begins where the one before
/// it ends. What is trained is of no use afterwards.
///
/// # Errors
/// No step was queued yet; a failed device.
pub fn spans(engine: &DeviceEngine, device: &Device, work: &Workload, update: [f64; 2]) -> Result<Vec<Span>> {
    let executor = engine.executor();
    let graph = executor.graph();
    let parameters = graph.parameter_count() as f64;
    let [zeros, optimiser] = update.map(|bytes| bytes * parameters);
    let optimiser = optimiser + engine.norm_bytes() as f64;
    let nodes: Vec<&Node> = executor.launched().collect();
    let mut parts = vec![
        (Part::Zero, "zero gradients", String::new(), 0.0, zeros),
        (Part::Tables, "work lists and stochastic depth", String::new(), 0.0, 0.0),
    ];
    for (at, node) in nodes.into_iter().enumerate() {
        let bytes = bytes(graph, node, work, |tensor| element_bytes(engine, graph, tensor));
        let flops = graph.node_flops(node, work);
        parts.push((Part::Node(at), node.op.name(), shape(graph, node), flops, bytes));
    }
    parts.push((Part::Update, "optimiser", String::new(), 0.0, optimiser));
    let mut begin = 0.0;
    parts
        .into_iter()
        .map(|(part, operation, shape, flops, bytes)| {
            let (seconds, launches) = time(engine, device, part)?;
            let span = Span { operation: operation.into(), shape, begin, seconds, flops, bytes, launches };
            begin += seconds;
            Ok(span)
        })
        .collect()
}

/// Bytes of an element of a tensor; 0 where nobody reads it. Parameters are read in bf16.
fn element_bytes(engine: &DeviceEngine, graph: &Graph, tensor: Tensor) -> usize {
    let layout = engine.executor().layout();
    match graph.info(tensor).kind {
        Kind::Gradient(_) => 4,
        Kind::Parameter(_) => 2,
        Kind::Activation if layout.slots[tensor.0].is_none() => 0,
        _ => match layout.elements[tensor.0] {
            Element::Bf16 => 2,
            Element::F32 => 4,
        },
    }
}

/// Seconds of a part and its launches.
fn time(engine: &DeviceEngine, device: &Device, part: Part) -> Result<(f64, usize)> {
    let stream = engine.executor().stream();
    // The emulator's times say nothing.
    let real = device.info().driver.is_some();
    let (repeats, replays) = if real { (REPEATS, REPLAYS) } else { (1, 1) };
    stream.begin_capture()?;
    let queued = (0..repeats).try_for_each(|_| engine.launch_part(part));
    let graph = stream.end_capture();
    queued?;
    let graph = graph?;
    if real {
        graph.launch(stream)?;
    }
    let mut events = vec![stream.record()?];
    for _ in 0..replays {
        graph.launch(stream)?;
        events.push(stream.record()?);
    }
    stream.synchronize()?;
    let mut times = events
        .windows(2)
        .map(|pair| pair[0].elapsed_ms(&pair[1]).map(|ms| f64::from(ms) / 1e3 / repeats as f64))
        .collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], graph.operations()? / repeats))
}

/// What the device does at most: dense bf16 as its data sheet has it, where it is known here, and what is measured now. Times
/// of the emulator say nothing.
fn peaks(device: &Device) -> Result<Option<Peaks>> {
    const SHEETS: [(&str, f64); 4] =
        [("H200", 989e12), ("H100 80GB HBM3", 989e12), ("H100 PCIe", 756e12), ("A100", 312e12)];
    let info = device.info();
    if info.driver.is_none() {
        return Ok(None);
    }
    let mut random = Stream::new(0, 0, 0, Purpose::Init);
    let values: Vec<bf16> =
        (0..RANDOM).map(|_| bf16::from_f32(random.sample::<f32, _>(StandardNormal))).collect();
    let rates = rates(&device.stream()?, &values)?;
    let sheet = SHEETS.iter().find(|(name, _)| info.name.contains(name));
    Ok(Some(Peaks {
        flops: sheet.map_or(rates.operations, |&(_, flops)| flops),
        sheet: sheet.is_some(),
        bytes: rates.bytes,
        launch: Some(rates.launch),
    }))
}
