//! Whether a run fits a device, told before anything is allocated.

use serde::Serialize;

use super::{DeviceEngine, DeviceOptions};
use crate::data::packing;
use crate::device::{Device, DeviceInfo};
use crate::error::{Error, Result};
use crate::parallel::Place;
use crate::recipe::{PackingKind, Recipe, Recompute, ViewsKind};
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
    /// Of that, the moments.
    pub moments: usize,
    /// Weights that are gathered from other ranks when a block needs them.
    pub gathered: usize,
    /// Gradients that are not summed over the ranks yet.
    pub unit_gradients: usize,
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
    /// What the rank at `place` of a run of `recipe` would take on such a device: exactly what is then allocated.
    ///
    /// # Errors
    /// A model or batch that the kernels do not take, or that cannot be shared out.
    pub fn plan(
        info: &DeviceInfo,
        recipe: &Recipe,
        classes: usize,
        slots: usize,
        place: Place,
    ) -> Result<Self> {
        let device = Device::planned(info.clone());
        let step = TrainStep::of_shard(recipe, classes, slots, place.tensor)?;
        let options = DeviceOptions::default();
        Ok(DeviceEngine::on_mesh(&device, recipe, step, slots, options, (place.data, None))?.memory())
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.fixed() + self.activations + self.input + self.workspace + self.evaluation
    }

    /// What does not depend on the batches.
    pub fn fixed(&self) -> usize {
        self.state + self.gathered + self.unit_gradients
    }
}

/// What a run may take of the free memory.
pub(crate) fn usable(free: usize) -> usize {
    free.saturating_sub(((RESERVED * free as f64) as usize).max(LEAST_RESERVED))
}

/// Checks that the rank at `place` of a run of `recipe` fits `free` bytes of such a device, and returns what it takes.
///
/// # Errors
/// It does not fit: the sentence says what to lower, and by how much. A model that the kernels do not take.
pub fn check_fits(
    info: &DeviceInfo,
    free: usize,
    recipe: &Recipe,
    classes: usize,
    slots: usize,
    place: Place,
) -> Result<DeviceMemory> {
    let memory = DeviceMemory::plan(info, recipe, classes, slots, place)?;
    let usable = usable(free);
    if memory.total() <= usable {
        return Ok(memory);
    }
    let mut remedies = Vec::new();
    if let Some(tokens) = fewer_tokens(info, usable, recipe, (classes, place), &memory)? {
        let accumulate = (recipe.train.accumulate * recipe.packing.tokens).div_ceil(tokens);
        let accumulate = accumulate.next_multiple_of(place.data.size);
        remedies.push(format!(
            "lower packing.tokens from {} to {tokens} (train.accumulate={accumulate} keeps the size of a step)",
            recipe.packing.tokens
        ));
    }
    let needs = |change: &dyn Fn(&mut Recipe)| -> Result<Option<usize>> {
        let mut recipe = recipe.clone();
        change(&mut recipe);
        let total = DeviceMemory::plan(info, &recipe, classes, slots, place)?.total();
        Ok((total <= usable).then_some(total))
    };
    // The cheapest that fits.
    let more =
        Recompute::ALL.into_iter().skip_while(|&recompute| recompute != recipe.model.recompute).skip(1);
    for recompute in more {
        if let Some(total) = needs(&|recipe| recipe.model.recompute = recompute)? {
            remedies.push(format!("set model.recompute={}, which needs {}", recompute.name(), mib(total)));
            break;
        }
    }
    if recipe.data.views == ViewsKind::Device
        && let Some(total) = needs(&|recipe| recipe.data.views = ViewsKind::Host)?
    {
        remedies.push(format!("set data.views=host, which needs {}", mib(total)));
    }
    if remedies.is_empty() {
        remedies
            .push(format!("take a smaller model: weights and optimiser alone are {}", mib(memory.fixed())));
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
    let memory = DeviceMemory::plan(info, recipe, classes, packing::slots(recipe), Place::default())?;
    let usable = usable(free);
    match memory.total() <= usable {
        true => Ok(Some(recipe.packing.tokens)),
        false => fewer_tokens(info, usable, recipe, (classes, Place::default()), &memory),
    }
}

/// About the largest budget of tokens with which the run fits, where there is one that holds the longest image.
fn fewer_tokens(
    info: &DeviceInfo,
    usable: usize,
    recipe: &Recipe,
    (classes, place): (usize, Place),
    memory: &DeviceMemory,
) -> Result<Option<usize>> {
    // Bins fill a batch to the last token.
    let bin = if recipe.packing.kind == PackingKind::Bins { recipe.packing.sequence.max(1) } else { 1 };
    let unit = (1..=bin).map(|n| n * TOKEN_UNIT).find(|unit| unit.is_multiple_of(bin)).unwrap_or(TOKEN_UNIT);
    // Everything else grows with the tokens, nearly in proportion; what the guess misses, a few tries find.
    let share = usable.saturating_sub(memory.fixed()) as f64 / (memory.total() - memory.fixed()) as f64;
    let mut tokens = (share * recipe.packing.tokens as f64) as usize / unit * unit;
    for _ in 0..8 {
        let mut smaller = recipe.clone();
        smaller.packing.tokens = tokens;
        if tokens == 0 || smaller.validate().is_err() {
            return Ok(None);
        }
        let slots = packing::slots(&smaller);
        if DeviceMemory::plan(info, &smaller, classes, slots, place)?.total() <= usable {
            return Ok(Some(tokens));
        }
        tokens = (tokens * 15 / 16 / unit * unit).min(tokens - unit);
    }
    Ok(None)
}
