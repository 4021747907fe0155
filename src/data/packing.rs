//! What packing decides: which image lies in which batch, how long it is, and how well the
//! batches are filled. No pixels are touched here; [`Planner`](crate::data::planner::Planner) makes the plans.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::data::dropping::TokenDrop;
use crate::data::resolution::{self, Target};
use crate::error::{Error, Result};
use crate::models::recipe::{
    AspectKind, DropConfig, DropKind, PackingConfig, PackingKind, Recipe, RemainderKind, ResolutionConfig,
    ResolutionKind,
};
use crate::rng::{Purpose, Stream};

/// An image with its place decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedImage {
    /// Index in the source.
    pub sample: u64,
    /// Epoch in which it was drawn.
    pub epoch: u64,
    /// Size after resizing, and the full grid.
    pub target: Target,
    /// Patches that are kept; which, [`TokenDrop::indices`] tells.
    pub kept: usize,
    /// Kept patches and prefix tokens.
    pub tokens: usize,
}

/// The images of one batch, in memory order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BatchPlan {
    /// Images, one after another.
    pub images: Vec<PlannedImage>,
    /// Number of images in each bin, in order; a single entry in flat mode.
    pub bins: Vec<usize>,
    /// Samples that were passed over while planning since their size could not be read: name and cause.
    pub skipped: Vec<String>,
    /// Whether the batch was closed because its slots ran out before its tokens.
    pub out_of_slots: bool,
}

/// The parts of a recipe that packing depends on, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct PackingSettings {
    /// Seed of every random decision.
    pub seed: u64,
    /// Patch side in pixels.
    pub patch: usize,
    /// Prefix tokens of every image (cls, registers).
    pub prefix: usize,
    /// Target sizes.
    pub resolution: ResolutionConfig,
    /// Token dropping.
    pub drop: DropConfig,
    /// Bins or flat.
    pub packing: PackingConfig,
    /// Image slots N.
    pub slots: usize,
    /// Whether samples are shuffled and epochs flow into each other; else one pass in order.
    pub training: bool,
}

impl PackingSettings {
    /// Settings of training. Fails, naming the key, on values that cannot be carried out.
    pub fn train(recipe: &Recipe) -> Result<Self> {
        check(recipe)?;
        Ok(Self {
            seed: recipe.train.seed,
            patch: recipe.model.patch,
            prefix: prefix_tokens(recipe),
            resolution: recipe.resolution.clone(),
            drop: recipe.drop.clone(),
            packing: recipe.packing.clone(),
            slots: slots(recipe),
            training: true,
        })
    }

    /// Settings of evaluation at `resolution` pixels (0 takes `eval.resolution`, and then `resolution.max`): every
    /// image once, in order, no token dropping, and flat packing, so that a resolution above
    /// the training bins' length is not scaled down to it. With `resolution.kind = "native"` the resolution bounds
    /// the size and does not enlarge.
    pub fn eval(recipe: &Recipe, resolution: usize) -> Result<Self> {
        let mut settings = Self::train(recipe)?;
        let resolution = [resolution, recipe.eval.resolution, recipe.resolution.max]
            .into_iter()
            .find(|&r| r > 0)
            .unwrap_or(recipe.resolution.max);
        if settings.resolution.kind != ResolutionKind::Native {
            settings.resolution.kind = ResolutionKind::Fixed;
        }
        settings.resolution.max = resolution;
        settings.drop.kind = DropKind::None;
        settings.packing.kind = PackingKind::Flat;
        settings.training = false;
        Ok(settings)
    }

    /// Tokens that one image may have at most: a bin, or the whole budget.
    pub fn capacity(&self) -> usize {
        match self.packing.kind {
            PackingKind::Bins => self.packing.sequence,
            PackingKind::Flat => self.packing.tokens,
        }
    }

    /// Decides grid and token count of `sample` with the given `size` (height, width).
    pub fn plan(&self, epoch: u64, sample: u64, size: (usize, usize)) -> PlannedImage {
        let drop = TokenDrop::new(&self.drop, self.seed, epoch, sample);
        let mut stream = Stream::new(self.seed, epoch, sample, Purpose::Resolution);
        let resolution = resolution::draw(&self.resolution, &mut stream);
        let limit = drop.longest(self.capacity() - self.prefix);
        let target = resolution::target(&self.resolution, self.patch, limit, size, resolution);
        let kept = drop.kept(target.grid.patches());
        PlannedImage { sample, epoch, target, kept, tokens: kept + self.prefix }
    }
}

/// Prefix tokens of every image: cls and registers.
pub fn prefix_tokens(recipe: &Recipe) -> usize {
    usize::from(recipe.model.class_token) + recipe.model.registers
}

/// Image slots N of a batch: `packing.images`, or derived from the token budget.
///
/// The derived number never exceeds what the shortest image at `resolution.min` allows, and stays near what is
/// to be expected (the mean count, a quarter more, and six times its root: above six standard deviations),
/// because every slot costs a row of the head. A batch that runs out of slots all the same is
/// closed early; nothing is lost. With `native` the mean is unknown and only the first bound holds.
pub fn slots(recipe: &Recipe) -> usize {
    let packing = &recipe.packing;
    if packing.images > 0 {
        return packing.images;
    }
    let resolution = &recipe.resolution;
    let patch = recipe.model.patch.max(1) as f64;
    let prefix = prefix_tokens(recipe) as f64;
    let (mean_drop, max_drop) = match recipe.drop.kind {
        DropKind::None => (0.0, 0.0),
        DropKind::Constant => (recipe.drop.mean, recipe.drop.mean),
        DropKind::Beta => (recipe.drop.mean, recipe.drop.max),
    };
    let smallest = match resolution.kind {
        ResolutionKind::Fixed => resolution.max,
        _ => resolution.min,
    } as f64;
    // Rounding r patches a side to round(r) loses at most a third of each side (r just below 1.5);
    // cutting the remainder off loses at most half (r just below 2).
    let lost = match (resolution.aspect, resolution.remainder) {
        (AspectKind::Square, RemainderKind::Round) => 1.0,
        (_, RemainderKind::Round) => 4.0 / 9.0,
        (_, RemainderKind::Drop) => 1.0 / 4.0,
    };
    let grid = ((smallest / patch).powi(2) * lost).max(1.0);
    let shortest = prefix + ((1.0 - max_drop) * grid).round().max(1.0);
    let tokens = packing.tokens as f64;
    let bound = (tokens / shortest).floor();
    let count = if resolution.kind == ResolutionKind::Native {
        bound
    } else {
        let mean = prefix + ((1.0 - mean_drop) * mean_area(resolution) / (patch * patch)).max(1.0);
        let count = tokens / mean;
        bound.min(1.25 * count + 6.0 * count.sqrt())
    };
    (count.ceil() as usize).max(1).next_multiple_of(8)
}

/// E[R²] in pixels by the midpoint rule over the distribution's own coordinate.
fn mean_area(config: &ResolutionConfig) -> f64 {
    let (min, max) = (config.min as f64, config.max as f64);
    if matches!(config.kind, ResolutionKind::Fixed | ResolutionKind::Native) {
        return max * max;
    }
    let points = 256;
    let (mut sum, mut weights) = (0.0, 0.0);
    for i in 0..points {
        let share = (f64::from(i) + 0.5) / f64::from(points);
        let weight = match config.kind {
            ResolutionKind::TruncatedNormal => {
                (-0.5 * ((2.0 * share - 1.0 - config.mean) / config.std).powi(2)).exp()
            }
            _ => 1.0,
        };
        let area = match config.of {
            crate::models::recipe::ResolutionOf::Side => (min + share * (max - min)).powi(2),
            crate::models::recipe::ResolutionOf::Area => min * min + share * (max * max - min * min),
        };
        sum += weight * area;
        weights += weight;
    }
    if weights > 0.0 { sum / weights } else { max * max }
}

fn check(recipe: &Recipe) -> Result<()> {
    let (packing, resolution, drop) = (&recipe.packing, &recipe.resolution, &recipe.drop);
    let fail = |message: String| Err(Error::usage(message));
    if recipe.model.patch == 0 {
        return fail("model.patch is 0; give the side of a patch in pixels, such as 16".into());
    }
    if !matches!(recipe.model.channels, 1 | 3) {
        return fail(format!("model.channels = {}; images have 1 channel or 3", recipe.model.channels));
    }
    if packing.tokens == 0 || !packing.tokens.is_multiple_of(128) || packing.tokens > i32::MAX as usize {
        return fail(format!("packing.tokens = {}; give a multiple of 128 below 2^31", packing.tokens));
    }
    if packing.kind == PackingKind::Bins {
        if packing.sequence == 0 || !packing.tokens.is_multiple_of(packing.sequence) {
            return fail(format!(
                "packing.sequence = {} does not divide packing.tokens = {}; choose a bin length that does",
                packing.sequence, packing.tokens
            ));
        }
        if packing.open == 0 {
            return fail(
                "packing.open = 0; give the number of bins that are filled at a time, such as 256".into(),
            );
        }
    }
    let (key, capacity) = match packing.kind {
        PackingKind::Bins => ("packing.sequence", packing.sequence),
        PackingKind::Flat => ("packing.tokens", packing.tokens),
    };
    if prefix_tokens(recipe) >= capacity {
        return fail(format!(
            "{key} = {capacity} leaves no room for a patch beside {} prefix tokens; raise it",
            prefix_tokens(recipe)
        ));
    }
    if resolution.max == 0 {
        return fail("resolution.max is 0; give the largest resolution in pixels".into());
    }
    let drawn = matches!(resolution.kind, ResolutionKind::Uniform | ResolutionKind::TruncatedNormal);
    if drawn && (resolution.min == 0 || resolution.min > resolution.max) {
        return fail(format!(
            "resolution.min = {} and resolution.max = {}; give 0 < min <= max",
            resolution.min, resolution.max
        ));
    }
    if resolution.kind == ResolutionKind::TruncatedNormal {
        if !(-1.0..=1.0).contains(&resolution.mean) {
            return fail(format!("resolution.mean = {}; it lies on [-1, 1]", resolution.mean));
        }
        if !(resolution.std > 0.0 && resolution.std <= 10.0) {
            return fail(format!("resolution.std = {}; give a value in (0, 10]", resolution.std));
        }
    }
    match drop.kind {
        DropKind::Constant if !(0.0..1.0).contains(&drop.mean) => {
            fail(format!("drop.mean = {}; a rate lies in [0, 1)", drop.mean))
        }
        DropKind::Beta if !(drop.mean > 0.0 && drop.mean < drop.max && drop.max <= 1.0) => {
            fail(format!("drop.mean = {} and drop.max = {}; give 0 < mean < max <= 1", drop.mean, drop.max))
        }
        _ => Ok(()),
    }
}

/// How well batches are filled. Figures of several batches are joined with [`PackingStats::add`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackingStats {
    /// Batches.
    pub batches: u64,
    /// Images.
    pub images: u64,
    /// Tokens that belong to an image, prefix tokens included.
    pub live: u64,
    /// Tokens of the batches' budgets.
    pub tokens: u64,
    /// Patches of all grids, before dropping.
    pub patches: u64,
    /// Patches kept.
    pub kept: u64,
    /// Images scaled down to fit a bin or the budget.
    pub downscaled: u64,
    /// Batches that were closed because slots ran out.
    pub out_of_slots: u64,
    /// Length of the sequence that [`PackingStats::images_per_sequence`] refers to.
    pub sequence: u64,
}

impl PackingStats {
    /// Figures of one batch.
    pub fn of(plan: &BatchPlan, settings: &PackingSettings) -> Self {
        let sum = |f: fn(&PlannedImage) -> usize| plan.images.iter().map(f).sum::<usize>() as u64;
        Self {
            batches: 1,
            images: plan.images.len() as u64,
            live: sum(|i| i.tokens),
            tokens: settings.packing.tokens as u64,
            patches: sum(|i| i.target.grid.patches()),
            kept: sum(|i| i.kept),
            downscaled: sum(|i| usize::from(i.target.downscaled)),
            out_of_slots: u64::from(plan.out_of_slots),
            sequence: settings.packing.sequence.max(1) as u64,
        }
    }

    /// Joins the figures of further batches.
    pub fn add(&mut self, other: &Self) {
        self.batches += other.batches;
        self.images += other.images;
        self.live += other.live;
        self.tokens += other.tokens;
        self.patches += other.patches;
        self.kept += other.kept;
        self.downscaled += other.downscaled;
        self.out_of_slots += other.out_of_slots;
        self.sequence = other.sequence;
    }

    /// Share of the budget that is padding, 0..1.
    pub fn padding(&self) -> f64 {
        1.0 - ratio(self.live, self.tokens)
    }

    /// Images per `sequence` tokens of budget (NaViT, Table 2).
    pub fn images_per_sequence(&self) -> f64 {
        ratio(self.images * self.sequence, self.tokens)
    }

    /// Share of the patches that was dropped, 0..1.
    pub fn dropped(&self) -> f64 {
        if self.patches == 0 { 0.0 } else { 1.0 - ratio(self.kept, self.patches) }
    }
}

fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

impl fmt::Display for PackingStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2} % padding, {:.2} images per {} tokens, {:.1} % of patches dropped",
            100.0 * self.padding(),
            self.images_per_sequence(),
            self.sequence,
            100.0 * self.dropped()
        )?;
        if self.downscaled > 0 {
            write!(f, ", {} of {} images downscaled to fit", self.downscaled, self.images)?;
        }
        if self.out_of_slots > 0 {
            write!(f, ", {} of {} batches closed for lack of slots", self.out_of_slots, self.batches)?;
        }
        Ok(())
    }
}
