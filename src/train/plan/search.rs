//! Which meshes there are of so many GPUs, what a training takes on each, and which to take.
//!
//! Candidates are all data × tensor = GPUs whose tensor axis divides heads, hidden width and tokens, each with every
//! [`Recompute`]. Where `train.accumulate` is no multiple of the data axis it is raised to the next one. The
//! one that trains the most batches a second among those that fit is taken.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use serde::Serialize;

use super::activations::{Held, activations};
use super::device;
use super::memory::RankMemory;
use super::rank::RankStep;
use super::time::{Again, Flops, Rates, StepTime};
use super::traffic::Traffic;
use crate::data::packing;
use crate::device::DeviceInfo;
use crate::error::{Error, Result};
use crate::models::limits;
use crate::nn::shard;
use crate::parallel::Mesh;
use crate::recipe::{Recipe, Recompute};
use crate::train::engine::usable;
use crate::train::terminal::mib;

/// Bytes of an element of activations and weights on their way between GPUs.
const ELEMENT: u64 = 2;
/// How many times as many GPUs are tried to tell how many would do.
const MORE: usize = 256;

/// A training that is to be planned.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is trained.
    pub recipe: Recipe,
    /// Number of classes.
    pub classes: usize,
    /// Number of GPUs.
    pub gpus: usize,
    /// Memory of each in bytes.
    pub memory: usize,
    /// What they are stated to do.
    pub rates: Rates,
}

/// What a training takes on a mesh.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Candidate {
    /// Length of the data axis.
    pub data: usize,
    /// Length of the tensor axis.
    pub tensor: usize,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Batches of a step over all data ranks.
    pub accumulate: usize,
    /// Memory of a GPU.
    pub memory: RankMemory,
    /// What a GPU sends in a step.
    pub traffic: Traffic,
    /// FLOPs of a batch.
    pub flops: Flops,
    /// What a GPU computes again in a step.
    pub again: Again,
    /// Seconds of a step.
    pub time: StepTime,
    /// Model FLOPs over what the GPUs could do at their peak, 0 to 1.
    pub mfu: f64,
    /// Whether it fits.
    pub fits: bool,
}

impl Candidate {
    /// Batches a second.
    pub fn speed(&self) -> f64 {
        self.accumulate as f64 / self.time.total()
    }

    /// As a person reads it.
    pub fn mesh(&self) -> String {
        format!("{} x {}", self.data, self.tensor)
    }
}

/// All candidates, and the one to take.
#[derive(Clone, Debug)]
pub struct Search {
    /// Parameters of the whole model.
    pub parameters: usize,
    /// By the tensor axis, then from no recomputation to full.
    pub candidates: Vec<Candidate>,
    /// Why there are no others: a sentence for each tensor axis that is none.
    pub left_out: Vec<String>,
    /// Place of the one to take.
    pub chosen: usize,
    /// What its activations are.
    pub activations: Vec<Held>,
}

impl Search {
    /// The candidate to take.
    pub fn chosen(&self) -> &Candidate {
        &self.candidates[self.chosen]
    }

    /// The candidates on the mesh of the chosen one, itself among them.
    pub fn on_chosen_mesh(&self) -> impl Iterator<Item = &Candidate> {
        self.candidates.iter().filter(|candidate| candidate.tensor == self.chosen().tensor)
    }
}

/// Recorded steps by tensor axis and recomputation.
struct Recorded<'a> {
    request: &'a Request,
    info: DeviceInfo,
    slots: usize,
    steps: BTreeMap<(usize, &'static str), RankStep>,
}

impl Recorded<'_> {
    fn step(&mut self, tensor: usize, recompute: Recompute) -> Result<&RankStep> {
        match self.steps.entry((tensor, recompute.name())) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let mut recipe = self.request.recipe.clone();
                recipe.model.recompute = recompute;
                Ok(entry.insert(RankStep::record(&recipe, self.request.classes, self.slots, tensor)?))
            }
        }
    }

    fn memory(&self, mesh: Mesh, recompute: Recompute) -> Result<RankMemory> {
        let mut recipe = self.request.recipe.clone();
        recipe.model.recompute = recompute;
        device::memory(&self.info, &recipe, self.request.classes, self.slots, mesh)
    }

    fn candidate(&mut self, mesh: Mesh, recompute: Recompute) -> Result<Candidate> {
        let Request { recipe, memory: room, rates, .. } = self.request;
        let (data, tensor) = (mesh.data(), mesh.tensor());
        let accumulate = recipe.train.accumulate.max(1).next_multiple_of(data);
        let batches = accumulate / data;
        let memory = self.memory(mesh, recompute)?;
        let rank = self.step(tensor, recompute)?;
        let pieces = rank.pieces(data);
        let time = StepTime::of(rank, &pieces, batches, ELEMENT, rates);
        let (flops, again) = (Flops::of(rank), Again::of(rank));
        let batches_of = |each: f64| batches as f64 * each;
        let could = time.total() * mesh.world() as f64 * rates.peak;
        Ok(Candidate {
            data,
            tensor,
            recompute,
            accumulate,
            memory,
            traffic: Traffic::of(rank, &pieces, batches, ELEMENT),
            flops,
            again: Again { flops: batches_of(again.flops), bytes: batches_of(again.bytes) },
            time,
            mfu: accumulate as f64 * flops.model / could,
            fits: memory.total() <= usable(*room),
        })
    }

    /// All meshes of so many GPUs, and why there are no others.
    fn meshes(&self, gpus: usize) -> Result<(Vec<Mesh>, Vec<String>)> {
        let (mut meshes, mut left_out) = (Vec::new(), Vec::new());
        let recipe = &self.request.recipe;
        for tensor in (1..=gpus).filter(|tensor| gpus.is_multiple_of(*tensor)) {
            match shard::check(&recipe.model, recipe.packing.tokens, tensor) {
                Ok(()) => meshes.push(Mesh::new(gpus, tensor)?),
                Err(reason) => left_out.push(reason.to_string()),
            }
        }
        Ok((meshes, left_out))
    }
}

/// Plans a training.
///
/// # Errors
/// A model that has no kernels; nothing fits: one sentence that tells the least memory that was found, and what to change.
pub fn search(request: &Request) -> Result<Search> {
    let (recipe, room) = (&request.recipe, request.memory);
    if request.gpus == 0 || request.rates.gpus_per_node == 0 {
        return Err(Error::usage("there must be at least one GPU, and one in a node"));
    }
    limits::check(&recipe.model)?;
    let info = DeviceInfo { memory_bytes: room, ..DeviceInfo::h100() };
    let mut recorded = Recorded { request, info, slots: packing::slots(recipe), steps: BTreeMap::new() };
    let (meshes, left_out) = recorded.meshes(request.gpus)?;
    let mut candidates = Vec::new();
    for mesh in meshes {
        for recompute in Recompute::ALL {
            candidates.push(recorded.candidate(mesh, recompute)?);
        }
    }
    let fastest = |a: &Candidate, b: &Candidate| a.speed().total_cmp(&b.speed());
    let fitting = candidates.iter().enumerate().filter(|(_, candidate)| candidate.fits);
    if let Some((chosen, _)) = fitting.max_by(|(_, a), (_, b)| fastest(a, b)) {
        let parameters = recorded.step(1, Recompute::None)?.step.graph().parameter_count();
        let Candidate { tensor, recompute, .. } = candidates[chosen];
        let activations = activations(recorded.step(tensor, recompute)?);
        return Ok(Search { parameters, candidates, left_out, chosen, activations });
    }
    let Some(least) = candidates.iter().min_by_key(|candidate| candidate.memory.total()) else {
        return Err(Error::failure("a single rank is always a mesh"));
    };
    let mut remedies = Vec::new();
    let fixed = least.memory.total() - least.memory.activations - least.memory.input;
    if fixed < usable(room) {
        remedies.push(format!("lower packing.tokens from {}", recipe.packing.tokens));
    }
    if let Some(gpus) = more(&recorded)? {
        remedies.push(format!("take {gpus} GPUs, on which it fits"));
    }
    if remedies.is_empty() {
        remedies.push("take a smaller model".into());
    }
    Err(Error::usage(format!(
        "no mesh of {} fits {} a GPU, of which a training may take {}; the least is {}, {} (data x tensor){}: {}",
        count(request.gpus),
        mib(room),
        mib(usable(room)),
        mib(least.memory.total()),
        least.mesh(),
        match least.recompute {
            Recompute::None => String::new(),
            recompute => format!(" with model.recompute=\"{}\"", recompute.name()),
        },
        remedies.join(", or ")
    )))
}

/// So many GPUs.
fn count(gpus: usize) -> String {
    if gpus == 1 { "1 GPU".into() } else { format!("{gpus} GPUs") }
}

/// The least number of GPUs that would do with blocks recomputed, doubling.
fn more(recorded: &Recorded<'_>) -> Result<Option<usize>> {
    let (mut gpus, room) = (recorded.request.gpus, usable(recorded.request.memory));
    let most = gpus.saturating_mul(MORE);
    while gpus < most {
        gpus *= 2;
        for mesh in recorded.meshes(gpus)?.0 {
            if recorded.memory(mesh, Recompute::Full)?.total() <= room {
                return Ok(Some(gpus));
            }
        }
    }
    Ok(None)
}
