//! Memory of a rank on the CPU device: what [`CpuEngine`](crate::train::engine::CpuEngine) allocates, followed node
//! by node.
//!
//! All is f32. With P the elements of the rank's parts of all parameters and D ranks of the data axis:
//!
//! | kind | elements | source |
//! |---|---|---|
//! | weights, gradients | P/D each | a rank's slices, [`Units`](crate::parallel::zero::Units) |
//! | moments | 2P/D (AdamW, LAMB), P/D (SGD), P/2D and those of all rows and columns (Adafactor) | `train::optimizer` |
//! | moving average | P/D where it is kept | |
//! | activations, evaluation | all buffers that the two executors' pools have come to hold | `autograd::exec` |
//! | gathered weights | the unit that is visited | [`PiecedStore`](crate::parallel::zero::PiecedStore) |
//! | gradients of blocks | those of the units that are written and not reduced | |
//! | messages | (D − 1)/D of the next unit's weights and of the gradients that were posted last | posted to in-process ranks, taken when these need them |
//! | workspace | pieces being joined or summed, and [`Op::scratch`](crate::autograd::Op::scratch) | |
//! | packed operands, counted as activations | with `train.matmul = "bf16"`, 2 bytes for each token and column of the widest activation, which the gradient of a weight is made from | `cpu::gemm::bf16` |
//! | input | 3 batches wait or are being made; those of a step are held until it ends | `data::loader`, `CpuEngine` |
//!
//! What comes and goes is that of the moment at which most is held, in steps after the first. Ranks are taken to be in
//! step. What threads of the pool need for themselves (packed tiles, sums of a part of the rows) is left out, and so is
//! the unit that rank 0 gathers at a time for a checkpoint.

use half::bf16;

use super::memory::{RankMemory, batch_bytes, target_bytes, text_bytes};
use super::rank::Pieces;
use crate::autograd::Plan;
use crate::autograd::exec::serves;
use crate::autograd::graph::{Extent, Graph, Kind};
use crate::cpu::gemm::bf16::Units;
use crate::cpu::optim::adafactor::Factoring;
use crate::parallel::zero::Action;
use crate::recipe::{MatmulKind, OptimizerKind, Recipe};
use crate::train::step::TrainStep;

/// Runs after which pools have come to hold what they will: buffers that fit other tensors are handed on.
const RUNS: usize = 3;

/// Memory of the first rank on a data axis of `data` ranks, each with `batches` batches a step. The step is that of the
/// first rank of a tensor axis.
pub fn memory(recipe: &Recipe, step: &TrainStep, slots: usize, data: usize, batches: usize) -> RankMemory {
    let pieces = Pieces::new(step.graph(), step.plan(), data);
    let (mut most, activations) = run(step.graph(), step.plan(), &pieces);
    let mut evaluation = 0;
    for evaluated in step.evaluation() {
        let forward = Plan::new(&evaluated);
        let (passing, elements) = run(&evaluated, &forward, &Pieces::new(&evaluated, &forward, data));
        evaluation = evaluation.max(elements);
        most = if most.total() >= passing.total() { most } else { passing };
    }
    let kept = size_of::<f32>() * pieces.kept();
    // A step of several batches keeps copies of all, and its last batch is there besides.
    let held = if batches > 1 { batches + 1 } else { 1 };
    let [loaded, given, _] = target_bytes(recipe, step.classes());
    let texts = text_bytes(recipe, slots);
    let batch = |target| texts + batch_bytes(recipe.packing.tokens, slots, recipe.model.patch_dim(), target);
    RankMemory {
        weights: kept,
        moments: moments(recipe, step, pieces.kept()),
        average: if recipe.train.ema > 0.0 { kept } else { 0 },
        gradients: kept,
        gathered: size_of::<f32>() * most.gathered,
        unit_gradients: size_of::<f32>() * most.gradients,
        activations: size_of::<f32>() * activations + packed(recipe, step.graph()),
        input: 3 * batch(loaded) + held * batch(given),
        workspace: size_of::<f32>() * most.workspace,
        messages: size_of::<f32>() * most.messages,
        evaluation: size_of::<f32>() * evaluation,
    }
}

/// Bytes of the largest operand that is packed for products of bf16; of both operands where they are rounded and
/// multiplied in f32.
fn packed(recipe: &Recipe, graph: &Graph) -> usize {
    let each = match (recipe.train.matmul, Units::best()) {
        (MatmulKind::F32, _) => 0,
        (MatmulKind::Bf16, Units::Portable) => 2 * size_of::<f32>(),
        (MatmulKind::Bf16, _) => size_of::<bf16>(),
    };
    let tokens = graph.nodes().iter().flat_map(|node| node.inputs.iter().flatten());
    let tokens = tokens.map(|tensor| graph.info(*tensor)).filter(|info| info.extent != Extent::Fixed);
    each * tokens.map(|info| info.len()).max().unwrap_or(0)
}

/// Bytes of what an optimiser keeps of the gradients of so many elements.
fn moments(recipe: &Recipe, step: &TrainStep, elements: usize) -> usize {
    let kind = recipe.train.optimizer;
    let of_element = match kind {
        OptimizerKind::AdamW | OptimizerKind::Lamb => 2 * size_of::<f32>(),
        OptimizerKind::Sgd => size_of::<f32>(),
        OptimizerKind::Adafactor => size_of::<bf16>(),
    };
    let statistics: usize = kind.factorings(step.params()).into_iter().map(Factoring::len).sum();
    of_element * elements + size_of::<f32>() * statistics
}

/// Elements that come and go.
#[derive(Clone, Copy, Default)]
struct Passing {
    gathered: usize,
    gradients: usize,
    messages: usize,
    workspace: usize,
}

impl Passing {
    fn total(&self) -> usize {
        self.gathered + self.gradients + self.messages + self.workspace
    }
}

/// Most of what comes and goes in a run, and the elements of the pool after it.
fn run(graph: &Graph, plan: &Plan, pieces: &Pieces) -> (Passing, usize) {
    let mut pool = Pool::default();
    let mut store = Store {
        pieces,
        written: vec![false; graph.params().len()],
        now: Passing::default(),
        most: Passing::default(),
        reducing: None,
    };
    for _ in 0..RUNS {
        pool.begin(graph);
        for (at, &index) in plan.order.iter().enumerate() {
            store.act(pieces.schedule.before(at));
            let node = &graph.nodes()[index];
            for tensor in node.outputs.iter().zip(&plan.read[at]).filter_map(|(t, read)| t.filter(|_| *read))
            {
                if let Kind::Gradient(p) = graph.info(tensor).kind {
                    store.write(p);
                }
            }
            pool.node(graph, plan, at);
            store.holds(node.op.scratch(graph, node, &plan.read[at]));
            store.act(pieces.schedule.after(at));
        }
        store.finish();
    }
    (store.most, pool.elements)
}

/// Capacities of the buffers of an executor.
#[derive(Default)]
struct Pool {
    /// That of each tensor.
    values: Vec<Option<usize>>,
    free: Vec<usize>,
    /// Of all buffers.
    elements: usize,
}

impl Pool {
    fn begin(&mut self, graph: &Graph) {
        self.free.extend(self.values.drain(..).flatten());
        self.values.resize(graph.tensors.len(), None);
    }

    fn take(&mut self, len: usize) -> usize {
        let fit = (0..self.free.len()).filter(|&i| serves(self.free[i], len)).min_by_key(|&i| self.free[i]);
        fit.map(|i| self.free.swap_remove(i)).unwrap_or_else(|| {
            self.elements += len;
            len
        })
    }

    fn node(&mut self, graph: &Graph, plan: &Plan, at: usize) {
        let node = &graph.nodes()[plan.order[at]];
        let moved = node.op.in_place() && plan.last_use_of_first[at];
        for (i, tensor) in node.outputs.iter().enumerate() {
            let Some(tensor) = tensor.filter(|_| plan.read[at][i]) else { continue };
            if graph.info(tensor).kind != Kind::Activation {
                continue;
            }
            let first = if i == 0 && moved { self.values[node.input(0).0].take() } else { None };
            self.values[tensor.0] = Some(first.unwrap_or_else(|| self.take(graph.info(tensor).len())));
        }
        let freed = plan.free_after[at].iter().filter_map(|tensor| self.values[tensor.0].take());
        self.free.extend(freed);
    }
}

/// What a `PiecedStore` holds beside its pieces; nothing on a data axis of one.
struct Store<'a> {
    pieces: &'a Pieces,
    /// Whether there is an accumulator of each parameter's gradient.
    written: Vec<bool>,
    now: Passing,
    most: Passing,
    /// The unit whose gradients are on their way.
    reducing: Option<usize>,
}

impl Store<'_> {
    /// Counts so much workspace for a moment.
    fn holds(&mut self, workspace: usize) {
        self.now.workspace += workspace;
        if self.now.total() > self.most.total() {
            self.most = self.now;
        }
        self.now.workspace -= workspace;
    }

    fn write(&mut self, param: usize) {
        if self.pieces.data() > 1 && !std::mem::replace(&mut self.written[param], true) {
            self.now.gradients += self.pieces.units.param_len(param);
        }
    }

    fn act(&mut self, actions: &[Action]) {
        if self.pieces.data() == 1 {
            return;
        }
        let pieces = self.pieces;
        let unit_of = |visit: usize| pieces.schedule.visits()[visit].unit;
        for action in actions {
            match *action {
                Action::Post(visit) => self.post(unit_of(visit)),
                Action::Await(visit) => self.gather(unit_of(visit)),
                Action::Release(visit) => self.now.gathered -= pieces.units.units()[unit_of(visit)].len,
                Action::Clear(_) => {}
                Action::Reduce(unit) => self.reduce(unit),
            }
        }
    }

    fn post(&mut self, unit: usize) {
        let own = self.pieces.piece(unit, 0);
        self.now.messages += (self.pieces.data() - 1) * own;
        self.holds(own);
    }

    /// Others take this rank's piece when it takes theirs.
    fn gather(&mut self, unit: usize) {
        self.now.gathered += self.pieces.units.units()[unit].len;
        for rank in 0..self.pieces.data() {
            self.holds(self.pieces.piece(unit, rank));
            if rank > 0 {
                self.now.messages -= self.pieces.piece(unit, 0);
            }
        }
    }

    fn reduce(&mut self, unit: usize) {
        self.finish();
        let (len, own) = (self.pieces.units.units()[unit].len, self.pieces.piece(unit, 0));
        self.now.messages += len - own;
        self.holds(self.pieces.piece(unit, 1));
        self.now.workspace += own;
        self.holds(0);
        for param in self.pieces.units.units()[unit].params.clone() {
            if std::mem::take(&mut self.written[param]) {
                self.now.gradients -= self.pieces.units.param_len(param);
            }
        }
        self.reducing = Some(unit);
    }

    fn finish(&mut self) {
        let Some(unit) = self.reducing.take() else { return };
        let own = self.pieces.piece(unit, 0);
        // A summand and the sum.
        self.holds(2 * own);
        self.now.messages -= self.pieces.units.units()[unit].len - own;
        self.now.workspace -= own;
    }
}
