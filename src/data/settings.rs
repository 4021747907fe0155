//! What planning follows: the parts of a recipe that decide sizes and packing, checked.

use crate::data::draw::Draw;
use crate::data::dropping::{Standing, TokenDrop};
use crate::data::estimate;
use crate::data::frame::Framing;
use crate::data::packing::PlannedImage;
use crate::data::positions::longest_axis;
use crate::data::resolution::{self, Limits};
use crate::error::Result;
use crate::recipe::{
    DropConfig, DropKind, FitKind, PackingConfig, PackingKind, PositionBasis, PositionCombination,
    PositionConfig, PositionCoordinate, Recipe, ResolutionConfig, ResolutionKind,
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
    /// Token dropping; `images` is derived where the recipe leaves it 0.
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
            drop: DropConfig { images: estimate::images(recipe), ..recipe.drop.clone() },
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
        settings.packing.fit = FitKind::None;
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

    /// Decides grid and token count of a draw whose image has the given `size` (height, width).
    pub fn plan(&self, draw: Draw, size: (usize, usize)) -> PlannedImage {
        self.plan_at(&self.token_drop(draw), draw, size, self.resolution_of(draw))
    }

    /// The same at `resolution` pixels, whatever was drawn.
    pub(crate) fn plan_at(
        &self,
        drop: &TokenDrop,
        draw: Draw,
        size: (usize, usize),
        resolution: f64,
    ) -> PlannedImage {
        let rate = |size| drop.rate(&self.drop, self.standing(size, resolution, draw.seen));
        let Draw { epoch, sample, seen } = draw;
        let crop = Stream::new(self.seed, epoch, sample, Purpose::Crop);
        let aim = |size| {
            let room = rate(size).longest(self.capacity() - self.prefix);
            let limits = Limits { patches: room.min(self.limits.patches), ..self.limits };
            resolution::target(&self.resolution, self.patch, limits, size, resolution)
        };
        let (frame, target) = self.framing.frame(crop, size, aim);
        let kept = rate(frame.aimed(size)).kept(target.grid.patches());
        let tokens = kept + self.prefix;
        PlannedImage { sample, epoch, seen, size, frame, target, kept, tokens, fitted: false }
    }

    /// An image of `size` (height, width) in the place of `image`: framed as in that epoch, at the target of `image`.
    pub fn in_place(&self, image: &PlannedImage, sample: u64, size: (usize, usize)) -> PlannedImage {
        let crop = Stream::new(self.seed, image.epoch, sample, Purpose::Crop);
        let (frame, _) = self.framing.frame(crop, size, |_| image.target);
        PlannedImage { sample, size, frame, ..image.clone() }
    }

    /// The drawn resolution in pixels.
    pub(crate) fn resolution_of(&self, draw: Draw) -> f64 {
        let mut stream = Stream::new(self.seed, draw.epoch, draw.sample, Purpose::Resolution);
        resolution::draw(&self.resolution, &mut stream)
    }

    pub(crate) fn token_drop(&self, draw: Draw) -> TokenDrop {
        TokenDrop::new(&self.drop, self.seed, draw.epoch, draw.sample)
    }

    /// Where an image of `size` (height, width) stands at `resolution` pixels, so many draws into the run. Its length is
    /// that before rounding to a grid and before any limit, so that its rate does not depend on where it is packed.
    pub(crate) fn standing(&self, size: (usize, usize), resolution: f64, seen: u64) -> Standing {
        let patches = |(height, width): (f64, f64)| height * width / (self.patch * self.patch) as f64;
        let square = |side: usize| patches((side as f64, side as f64));
        let length = patches(resolution::ideal(&self.resolution, size, resolution));
        let (shortest, longest) = (square(self.resolution.min), square(self.resolution.max));
        Standing {
            length: estimate::share_of_length(length, shortest, longest),
            seen: seen as f64 / self.drop.images.max(1) as f64,
        }
    }

    /// Raster indices of the patches that are kept of a planned image.
    pub fn kept(&self, image: &PlannedImage) -> Vec<u32> {
        self.token_drop(image.draw()).indices(image.target.grid.patches(), image.kept)
    }
}

/// Image slots N of a batch: `packing.images`, or derived from the token budget.
///
/// The derived number never exceeds what the shortest image at `resolution.min` allows, and stays
/// near what is to be expected (the mean count where most is dropped, a quarter more, and six times its root: above six
/// standard deviations), because every slot costs a row of the head. A batch that runs out of
/// slots all the same is closed early; nothing is lost. With `native` the mean is unknown and only
/// the first bound holds.
pub fn slots(recipe: &Recipe) -> usize {
    let packing = &recipe.packing;
    if packing.images > 0 {
        return packing.images;
    }
    let tokens = packing.tokens as f64;
    let bound = (tokens / estimate::shortest(recipe)).floor();
    let count = if recipe.resolution.kind == ResolutionKind::Native {
        bound
    } else {
        let count = tokens / estimate::fewest_tokens(recipe);
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
