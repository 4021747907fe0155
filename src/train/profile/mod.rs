//! One step of a training, part by part: what each operation takes, and what its arithmetic and its bytes would.
//!
//! On the CPU the parts are timed where they run ([`cpu`]); on a device each is timed by itself, a launch or a few
//! ([`device`]). Operands are [`batches`] of random pixels, so that a recipe needs no data.

pub mod batches;
pub mod cpu;
pub mod device;
mod input;
mod report;
mod subject;

use std::collections::HashMap;

use serde::Serialize;

use crate::autograd::{Graph, Kind, Node, Tensor, Workload};
use crate::error::{Error, Result};
use crate::recipe::Recipe;

pub use input::Input;
pub use report::trace;

/// Learning rate of every step.
const RATE: f64 = 1e-4;

/// Part of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Span {
    /// Name of the operation.
    pub operation: String,
    /// Rows and columns of its first result.
    pub shape: String,
    /// Seconds from the beginning of the step.
    pub begin: f64,
    /// Seconds that it takes.
    pub seconds: f64,
    /// Operations of its matrix products.
    pub flops: f64,
    /// Bytes of operands and results, each read or written once; of what is added to, both.
    pub bytes: f64,
    /// Operations that a device is given for it, kernels nearly always; 0 on the CPU.
    pub launches: usize,
}

/// What a device can do at most, per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Peaks {
    /// Operations of matrix products.
    pub flops: f64,
    /// Whether that stands in the data sheet, and was not measured now.
    pub sheet: bool,
    /// Bytes of a copy, read and written, measured now.
    pub bytes: f64,
    /// Of a device, seconds of a launch where there is next to nothing to do.
    pub launch: Option<f64>,
}

impl Peaks {
    /// Seconds that arithmetic and bytes take at least, where they overlap wholly.
    pub fn floor(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.flops).max(bytes / self.bytes)
    }
}

/// All parts of one operation and shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Name of the operation.
    pub operation: String,
    /// Rows and columns of its first result.
    pub shape: String,
    /// Parts of a step.
    pub count: usize,
    /// Seconds, operations and bytes of all of them.
    pub seconds: f64,
    /// As of a [`Span`].
    pub flops: f64,
    /// As of a [`Span`].
    pub bytes: f64,
    /// As of a [`Span`].
    pub launches: usize,
}

/// What a step consists of.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// Name of the recipe.
    pub recipe: String,
    /// What it ran on, for people.
    pub device: String,
    /// Tokens that a batch has room for, tokens and images that it held.
    pub budget: usize,
    /// Live tokens.
    pub tokens: usize,
    /// Images.
    pub images: usize,
    /// Steps that were timed.
    pub steps: usize,
    /// Seconds of a step: of the fastest on the CPU, and on a device, where steps are queued ahead of one another, on average.
    pub seconds: f64,
    /// Model FLOPs of the step: recomputation is not counted.
    pub flops: f64,
    /// What the device can do, where that is known.
    pub peaks: Option<Peaks>,
    /// How fast batches are read, where a set was given.
    pub input: Option<Input>,
    /// The parts by operation and shape, the slowest first.
    pub rows: Vec<Row>,
    /// The parts in their order.
    pub spans: Vec<Span>,
}

impl Profile {
    /// Seconds of the step in which none of its parts ran.
    pub fn between(&self) -> f64 {
        self.seconds - self.spans.iter().map(|span| span.seconds).sum::<f64>()
    }

    /// Operations that a device is given for the step.
    pub fn launches(&self) -> usize {
        self.spans.iter().map(|span| span.launches).sum()
    }

    /// Seconds that the parts take at least, one after the other.
    pub fn floor(&self) -> Option<f64> {
        let peaks = self.peaks?;
        Some(self.spans.iter().map(|span| peaks.floor(span.flops, span.bytes)).sum())
    }
}

/// Adds up parts of one operation and shape, the slowest first.
pub fn by_operation(spans: &[Span]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut places = HashMap::new();
    for span in spans {
        let at = *places.entry((&span.operation, &span.shape)).or_insert_with(|| {
            rows.push(Row {
                operation: span.operation.clone(),
                shape: span.shape.clone(),
                count: 0,
                seconds: 0.0,
                flops: 0.0,
                bytes: 0.0,
                launches: 0,
            });
            rows.len() - 1
        });
        let row = &mut rows[at];
        row.count += 1;
        row.seconds += span.seconds;
        row.flops += span.flops;
        row.bytes += span.bytes;
        row.launches += span.launches;
    }
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    rows
}

/// The recipe with one batch a step.
///
/// # Errors
/// A recipe of texts.
pub fn one_batch(recipe: &Recipe) -> Result<Recipe> {
    if recipe.text.is_on() {
        return Err(Error::usage(
            "text.tokenizer is set: a step over images and texts cannot be profiled; choose a recipe of classes",
        ));
    }
    let mut recipe = recipe.clone();
    recipe.train.accumulate = 1;
    Ok(recipe)
}

/// Rows and columns of the first result.
fn shape(graph: &Graph, node: &Node) -> String {
    let result = node.outputs.iter().flatten().next().map(|tensor| graph.info(*tensor));
    result.map_or_else(String::new, |info| format!("{}x{}", info.rows, info.cols))
}

/// Bytes of a node's operands and of its results; `size` is that of an element, 0 for what is left out.
fn bytes(graph: &Graph, node: &Node, work: &Workload, size: impl Fn(Tensor) -> usize) -> f64 {
    let work = work.of_modality(graph.modality(node));
    let moved = |tensor: &Tensor| {
        let info = graph.info(*tensor);
        work.rows(info) * info.cols as f64 * size(*tensor) as f64
    };
    let added = |tensor: &&Tensor| matches!(graph.info(**tensor).kind, Kind::Gradient(_));
    let results = node.outputs.iter().flatten();
    node.inputs.iter().flatten().map(moved).sum::<f64>()
        + results.clone().map(moved).sum::<f64>()
        + results.filter(added).map(moved).sum::<f64>()
}

/// Bytes that zeroing the gradients and the optimiser move for each parameter: the gradient is written; weights, gradient and
/// moments are read, weights and moments written, and an average is read and written. What is read for the norm is not
/// counted: a device tells it.
fn update_bytes(recipe: &Recipe) -> [f64; 2] {
    let moments = 1 + usize::from(recipe.train.optimizer.keeps_second());
    let average = usize::from(recipe.train.ema > 0.0);
    [4.0, 4.0 * (3 + 2 * moments + 2 * average) as f64]
}
