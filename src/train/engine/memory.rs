//! Whether a run fits a device, told before anything is allocated.

use serde::Serialize;

use super::{DeviceEngine, DeviceOptions};
use crate::data::packing;
use crate::device::{Device, DeviceInfo};
use crate::error::{Error, Result};
use crate::recipe::{PackingKind, Recipe};
use crate::train::step::TrainStep;
use crate::train::terminal::mib;

/// Tokens of a batch are a multiple of this.
const TOKEN_UNIT: usize = 128;
/// What code of the kernels, graphs and the allocator's rounding take besides: a share of what is free, and bytes at
/// least.
const RESERVED: f64 = 0.02;
const LEAST_RESERVED: usize = 256 << 20;

/// Device memory of a training, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// Weights, their copies in bf16, gradients, moments and moving average.
    pub state: usize,
    /// The arena of the activations.
    pub activations: usize,
    /// The batches that have a place on the device.
    pub input: usize,
    /// What the kernels share, and their tables.
    pub workspace: usize,
    /// What an evaluation needs besides.
    pub evaluation: usize,
}

impl DeviceMemory {
    /// What a run of `recipe` would take on such a device: exactly what is then allocated.
    ///
    /// # Errors
    /// A model or batch that the kernels do not take.
    pub fn plan(info: &DeviceInfo, recipe: &Recipe, classes: usize, slots: usize) -> Result<Self> {
        let device = Device::planned(info.clone());
        let step = TrainStep::new(recipe, classes, slots)?;
        Ok(DeviceEngine::new(&device, recipe, step, slots, DeviceOptions::default())?.memory())
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.state + self.activations + self.input + self.workspace + self.evaluation
    }
}

/// What a run may take of the free memory.
pub(crate) fn usable(free: usize) -> usize {
    free.saturating_sub(((RESERVED * free as f64) as usize).max(LEAST_RESERVED))
}

/// Checks that a run of `recipe` fits `free` bytes of such a device, and returns what it takes.
///
/// # Errors
/// It does not fit: the sentence says what to lower, and by how much. A model that the kernels do not take.
pub fn check_fits(
    info: &DeviceInfo,
    free: usize,
    recipe: &Recipe,
    classes: usize,
    slots: usize,
) -> Result<DeviceMemory> {
    let memory = DeviceMemory::plan(info, recipe, classes, slots)?;
    let usable = usable(free);
    if memory.total() <= usable {
        return Ok(memory);
    }
    let mut remedies = Vec::new();
    if let Some(tokens) = fewer_tokens(info, usable, recipe, classes, &memory)? {
        let accumulate = (recipe.train.accumulate * recipe.packing.tokens).div_ceil(tokens);
        remedies.push(format!(
            "lower packing.tokens from {} to {tokens} (train.accumulate={accumulate} keeps the size of a step)",
            recipe.packing.tokens
        ));
    }
    if !recipe.model.checkpoint {
        let mut recipe = recipe.clone();
        recipe.model.checkpoint = true;
        let total = DeviceMemory::plan(info, &recipe, classes, slots)?.total();
        if total <= usable {
            remedies.push(format!("set model.checkpoint=true, which needs {}", mib(total)));
        }
    }
    if remedies.is_empty() {
        remedies.push(format!("take a smaller model: weights and optimiser alone are {}", mib(memory.state)));
    }
    Err(Error::usage(format!(
        "the run needs {} of device memory, and of {} free on {} it may take {}; {}, or use --device cpu",
        mib(memory.total()),
        mib(free),
        info.name,
        mib(usable),
        remedies.join(", or ")
    )))
}

/// The largest budget of tokens, up to that of `recipe`, with which a run fits `free` bytes of such a device; none
/// where not even the longest image fits.
///
/// # Errors
/// A model that the kernels do not take.
pub fn largest_tokens(
    info: &DeviceInfo,
    free: usize,
    recipe: &Recipe,
    classes: usize,
) -> Result<Option<usize>> {
    let memory = DeviceMemory::plan(info, recipe, classes, packing::slots(recipe))?;
    let usable = usable(free);
    match memory.total() <= usable {
        true => Ok(Some(recipe.packing.tokens)),
        false => fewer_tokens(info, usable, recipe, classes, &memory),
    }
}

/// About the largest budget of tokens with which the run fits, where there is one that holds the longest image.
fn fewer_tokens(
    info: &DeviceInfo,
    usable: usize,
    recipe: &Recipe,
    classes: usize,
    memory: &DeviceMemory,
) -> Result<Option<usize>> {
    // Bins fill a batch to the last token.
    let bin = if recipe.packing.kind == PackingKind::Bins { recipe.packing.sequence.max(1) } else { 1 };
    let unit = (1..=bin).map(|n| n * TOKEN_UNIT).find(|unit| unit.is_multiple_of(bin)).unwrap_or(TOKEN_UNIT);
    // Everything but the state grows with the tokens, nearly in proportion; what the guess misses, a few tries find.
    let share = usable.saturating_sub(memory.state) as f64 / (memory.total() - memory.state) as f64;
    let mut tokens = (share * recipe.packing.tokens as f64) as usize / unit * unit;
    for _ in 0..8 {
        let mut smaller = recipe.clone();
        smaller.packing.tokens = tokens;
        if tokens == 0 || smaller.validate().is_err() {
            return Ok(None);
        }
        let slots = packing::slots(&smaller);
        if DeviceMemory::plan(info, &smaller, classes, slots)?.total() <= usable {
            return Ok(Some(tokens));
        }
        tokens = (tokens * 15 / 16 / unit * unit).min(tokens - unit);
    }
    Ok(None)
}
