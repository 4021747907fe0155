//! What the parts of a training step take, each by itself: a graph of some repeats of its launches.

use trencadis::Result;
use trencadis::autograd::Node;
use trencadis::train::engine::Part;

use super::super::gpu::{Gpu, table};
use super::training::Training;

/// Launches of a part in one graph.
const REPEATS: usize = 8;
/// Replays of it, of which the median counts.
const REPLAYS: usize = 3;

/// Columns of the table of parts.
pub const HEADER: &str = "recipe,budget,operation,shape,launches,microseconds,share";

/// All parts of one operation and shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Name of the operation.
    pub operation: String,
    /// Sizes of its first result.
    pub shape: String,
    /// Parts of a step.
    pub count: usize,
    /// Seconds of all of them.
    pub seconds: f64,
}

impl Row {
    /// A line of the table, where all parts take `total` seconds.
    pub fn line(&self, recipe: &str, budget: usize, total: f64) -> String {
        table::csv([
            recipe.into(),
            budget.to_string(),
            self.operation.clone(),
            self.shape.clone(),
            self.count.to_string(),
            format!("{:.2}", 1e6 * self.seconds),
            format!("{:.4}", self.seconds / total),
        ])
    }
}

/// Times every part in the order of a step, so that each finds the operands that it would, the slowest first. The
/// training is of no use afterwards.
///
/// # Errors
/// A failed device.
pub fn rows(gpu: &Gpu, training: &Training) -> Result<Vec<Row>> {
    let executor = training.engine().executor();
    let shape = |node: &Node| {
        let result = node.outputs.iter().flatten().next().map(|tensor| executor.graph().info(*tensor));
        result.map_or_else(String::new, |info| format!("{}x{}", info.rows, info.cols))
    };
    let mut parts = vec![
        (Part::Zero, "zero gradients", String::new()),
        (Part::Tables, "work lists and stochastic depth", String::new()),
    ];
    parts.extend(
        executor.launched().enumerate().map(|(at, node)| (Part::Node(at), node.op.name(), shape(node))),
    );
    parts.push((Part::Update, "optimiser", String::new()));
    let mut rows: Vec<Row> = Vec::new();
    for (part, operation, shape) in parts {
        let seconds = seconds(gpu, training, part)?;
        match rows.iter_mut().find(|row| row.operation == operation && row.shape == shape) {
            Some(row) => (row.count, row.seconds) = (row.count + 1, row.seconds + seconds),
            None => rows.push(Row { operation: operation.into(), shape, count: 1, seconds }),
        }
    }
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(rows)
}

fn seconds(gpu: &Gpu, training: &Training, part: Part) -> Result<f64> {
    let engine = training.engine();
    let stream = engine.executor().stream();
    let (repeats, replays) = if gpu.is_real() { (REPEATS, REPLAYS) } else { (1, 1) };
    stream.begin_capture()?;
    let queued = (0..repeats).try_for_each(|_| engine.launch_part(part));
    let graph = stream.end_capture();
    queued?;
    let graph = graph?;
    if gpu.is_real() {
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
    Ok(times[times.len() / 2])
}
