//! What planning follows: the parts of a recipe that decide sizes and packing, checked.

use crate::data::dropping::TokenDrop;
use crate::data::frame::Framing;
use crate::data::packing::PlannedImage;
use crate::data::positions::longest_axis;
use crate::data::resolution::{self, Limits};
use crate::error::Result;
use crate::recipe::{
    AspectKind, DropConfig, DropKind, PackingConfig, PackingKind, PositionBasis, PositionCombination,
    PositionConfig, PositionCoordinate, Recipe, RemainderKind, ResolutionConfig, ResolutionKind,
};
use crate::rng::{Purpose, Stream};

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
    /// Which part of an image is seen.
    pub framing: Framing,
    /// How often in a row an epoch draws each sample.
    pub repeats: usize,
    /// Token dropping.
    pub drop: DropConfig,
    /// Bins or flat.
    pub packing: PackingConfig,
    /// Largest grid that the position embedding has entries for.
    pub limits: Limits,
    /// Image slots N.
    pub slots: usize,
    /// Whether samples are shuffled and epochs flow into each other; else one pass in order.
    pub training: bool,
    /// Threads that read headers and decode, at least 1.
    pub workers: usize,
}

impl PackingSettings {
    /// Settings of training. Fails as [`Recipe::validate`] does.
    pub fn train(recipe: &Recipe) -> Result<Self> {
        recipe.validate()?;
        Ok(Self {
            seed: recipe.train.seed,
            patch: recipe.model.patch,
            prefix: recipe.model.prefix(),
            resolution: recipe.resolution.clone(),
            framing: Framing::train(&recipe.augment),
            repeats: recipe.augment.repeats,
            drop: recipe.drop.clone(),
            packing: recipe.packing.clone(),
            limits: position_limits(&recipe.model.position, recipe.resolution.max, recipe.model.patch),
            slots: slots(recipe),
            training: true,
            workers: match recipe.data.workers {
                0 => std::thread::available_parallelism().map_or(1, usize::from),
                workers => workers,
            },
        })
    }

    /// Settings of evaluation at `resolution` pixels (0 takes `eval.resolution`, and then
    /// `resolution.max`): every image once, in order, no token dropping, and flat packing, so that
    /// a resolution above the training bins' length is not scaled down to it. With
    /// `resolution.kind = "native"` the resolution bounds the size and does not enlarge.
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
        settings.limits = position_limits(&recipe.model.position, resolution, recipe.model.patch);
        (settings.framing, settings.repeats) = (Framing::eval(&recipe.eval), 1);
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

    /// Tokens that no image exceeds.
    pub fn longest(&self) -> usize {
        let resolution = self.resolution.max as f64;
        let patches = resolution::most_patches(&self.resolution, self.patch, self.limits, resolution);
        self.prefix.saturating_add(patches).min(self.capacity())
    }

    /// Decides grid and token count of `sample` with the given `size` (height, width).
    pub fn plan(&self, epoch: u64, sample: u64, size: (usize, usize)) -> PlannedImage {
        let drop = TokenDrop::new(&self.drop, self.seed, epoch, sample);
        let mut stream = Stream::new(self.seed, epoch, sample, Purpose::Resolution);
        let resolution = resolution::draw(&self.resolution, &mut stream);
        let room = drop.longest(self.capacity() - self.prefix);
        let limits = Limits { patches: room.min(self.limits.patches), ..self.limits };
        let crop = Stream::new(self.seed, epoch, sample, Purpose::Crop);
        let aim = |size| resolution::target(&self.resolution, self.patch, limits, size, resolution);
        let (frame, target) = self.framing.frame(crop, size, aim);
        let kept = drop.kept(target.grid.patches());
        PlannedImage { sample, epoch, frame, target, kept, tokens: kept + self.prefix }
    }

    /// `sample`, of `size` (height, width), in the place of `image`: framed as in that epoch, at the target of `image`.
    pub fn in_place(&self, image: &PlannedImage, sample: u64, size: (usize, usize)) -> PlannedImage {
        let crop = Stream::new(self.seed, image.epoch, sample, Purpose::Crop);
        let (frame, _) = self.framing.frame(crop, size, |_| image.target);
        PlannedImage { sample, frame, ..image.clone() }
    }

    /// Raster indices of the patches that are kept of a planned image.
    pub fn kept(&self, image: &PlannedImage) -> Vec<u32> {
        TokenDrop::new(&self.drop, self.seed, image.epoch, image.sample).indices(image.target.grid.patches())
    }
}

/// Image slots N of a batch: `packing.images`, or derived from the token budget.
///
/// The derived number never exceeds what the shortest image at `resolution.min` allows, and stays
/// near what is to be expected (the mean count, a quarter more, and six times its root: above six
/// standard deviations), because every slot costs a row of the head. A batch that runs out of
/// slots all the same is closed early; nothing is lost. With `native` the mean is unknown and only
/// the first bound holds.
pub fn slots(recipe: &Recipe) -> usize {
    let packing = &recipe.packing;
    if packing.images > 0 {
        return packing.images;
    }
    let sizes = &recipe.resolution;
    let patch = recipe.model.patch.max(1) as f64;
    let prefix = recipe.model.prefix() as f64;
    let (mean_drop, max_drop) = match recipe.drop.kind {
        DropKind::None => (0.0, 0.0),
        DropKind::Constant => (recipe.drop.mean, recipe.drop.mean),
        DropKind::Beta => (recipe.drop.mean, recipe.drop.max),
    };
    let smallest = match sizes.kind {
        ResolutionKind::Fixed => sizes.max,
        _ => sizes.min,
    } as f64;
    // Rounding r patches a side to round(r) loses at most a third of each side (r just below 1.5);
    // cutting the remainder off loses at most half (r just below 2).
    let lost = match (sizes.aspect, sizes.remainder) {
        (AspectKind::Square, RemainderKind::Round) => 1.0,
        (_, RemainderKind::Round) => 4.0 / 9.0,
        (_, RemainderKind::Drop) => 1.0 / 4.0,
    };
    let grid = ((smallest / patch).powi(2) * lost).max(1.0);
    let shortest = prefix + ((1.0 - max_drop) * grid).round().max(1.0);
    let tokens = packing.tokens as f64;
    let bound = (tokens / shortest).floor();
    let count = if sizes.kind == ResolutionKind::Native {
        bound
    } else {
        let mean = prefix + ((1.0 - mean_drop) * resolution::mean_area(sizes) / (patch * patch)).max(1.0);
        let count = tokens / mean;
        bound.min(1.25 * count + 6.0 * count.sqrt())
    };
    (count.ceil() as usize).max(1).next_multiple_of(8)
}

/// Under absolute coordinates a table bounds the grid: a longer image has to be scaled down, or it
/// would have no position. Under fractional ones only the filters that resample it do.
pub(crate) fn position_limits(position: &PositionConfig, resolution: usize, patch: usize) -> Limits {
    let longest = longest_axis(position, resolution, patch);
    let any = Limits { rows: longest, cols: longest, ..Limits::NONE };
    if !has_absolute_table(position) {
        return any;
    }
    match position.combination {
        PositionCombination::Flat => Limits { patches: position.rows * position.columns, ..any },
        _ => Limits { rows: position.rows, cols: position.columns, ..any },
    }
}

/// Whether positions are those of a table that is read as it is.
pub(crate) fn has_absolute_table(position: &PositionConfig) -> bool {
    let has_table = matches!(position.basis, PositionBasis::Learned | PositionBasis::Sinusoidal);
    has_table && position.coordinate == PositionCoordinate::Absolute
}
