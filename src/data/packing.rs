//! What packing decides: which image lies in which batch, how long it is, and how well the
//! batches are filled. No pixels are touched here; [`Planner`](crate::data::planner::Planner) makes
//! the plans, after [`PackingSettings`].

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::data::draw::Draw;
use crate::data::frame::Frame;
use crate::data::resolution::Target;
pub use crate::data::settings::{PackingSettings, slots};

/// An image with its place decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedImage {
    /// Index in the source.
    pub sample: u64,
    /// With the seed and the sample, the key of its random numbers: the epoch in which it was drawn, or under
    /// repeated augmentation `repeats` times that and the number of the repetition.
    pub epoch: u64,
    /// Draws of the run before it.
    pub seen: u64,
    /// Height and width of the source's image in pixels.
    pub size: (usize, usize),
    /// Which part of it is seen.
    pub frame: Frame,
    /// Size after resizing, and the full grid.
    pub target: Target,
    /// Patches that are kept; which, [`PackingSettings::kept`] tells.
    pub kept: usize,
    /// Kept patches and prefix tokens.
    pub tokens: usize,
    /// Whether its resolution or drop rate was chosen to fill a gap, instead of the drawn one.
    pub fitted: bool,
}

impl PlannedImage {
    /// Whose turn it is.
    pub fn draw(&self) -> Draw {
        Draw { epoch: self.epoch, sample: self.sample, seen: self.seen }
    }
}

/// The images of one batch, in memory order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BatchPlan {
    /// Images, one after another.
    pub images: Vec<PlannedImage>,
    /// Number of images in each bin, in order; a single entry in flat mode.
    pub bins: Vec<usize>,
    /// Samples that were passed over while planning since their size could not be read, with the
    /// cause, which names the file.
    pub skipped: Vec<(u64, String)>,
    /// Samples drawn for this plan, those that wait for a later one and those passed over included.
    pub drawn: u64,
    /// Whether the batch was closed because its slots ran out before its tokens.
    pub out_of_slots: bool,
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
    /// Images scaled down to fit a bin, the budget or the position table.
    pub downscaled: u64,
    /// Images fitted to a gap.
    #[serde(default)]
    pub fitted: u64,
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
            fitted: sum(|i| usize::from(i.fitted)),
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
        self.fitted += other.fitted;
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
            "{:.2} % padding, {:.2} images per {} tokens",
            100.0 * self.padding(),
            self.images_per_sequence(),
            self.sequence
        )?;
        if self.kept < self.patches {
            write!(f, ", {:.1} % of patches dropped", 100.0 * self.dropped())?;
        }
        if self.fitted > 0 {
            write!(f, ", {:.1} % of images fitted to gaps", 100.0 * ratio(self.fitted, self.images))?;
        }
        if self.out_of_slots > 0 {
            write!(f, ", {} of {} batches closed for lack of slots", self.out_of_slots, self.batches)?;
        }
        Ok(())
    }
}
