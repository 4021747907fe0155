//! What a data set holds and what a recipe makes of it, before anything is trained.

mod texts;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
pub use texts::TextFigures;

use crate::data::dropping;
use crate::data::packing::{PackingSettings, PackingStats};
use crate::data::planner::Planner;
use crate::data::resolution::Limits;
use crate::data::source::Dataset;
use crate::data::source::chosen::Chosen;
use crate::error::{Error, Result};
use crate::recipe::{DropKind, PackingKind, Recipe};

/// Images whose headers are read; of a larger set, evenly spaced ones.
const MEASURED: usize = 20_000;
/// Unreadable files that a report names.
const EXAMPLES: usize = 10;
/// Length of the longest text bar.
const BAR: usize = 40;
/// Edges of the histogram of width/height between the portrait and the landscape extremes, and how
/// they are printed.
const EDGES: [(f64, &str); 7] = [
    (1.0 / 3.0, "1:3"),
    (1.0 / 2.0, "1:2"),
    (3.0 / 4.0, "3:4"),
    (1.0, "1:1"),
    (4.0 / 3.0, "4:3"),
    (2.0, "2:1"),
    (3.0, "3:1"),
];

/// Smallest, middle and largest value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    /// Smallest.
    pub min: usize,
    /// Median.
    pub median: usize,
    /// Largest.
    pub max: usize,
}

/// Number of images of a class.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassCount {
    /// Name of the class.
    pub class: String,
    /// Training images.
    pub images: usize,
}

/// One bar of the aspect-ratio histogram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AspectBar {
    /// Range of width:height, or `square`.
    pub range: String,
    /// Images in it.
    pub images: usize,
}

/// Tokens per image, prefix tokens included, after dropping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenSpread {
    /// Smallest.
    pub min: usize,
    /// Mean.
    pub mean: f64,
    /// Largest.
    pub max: usize,
}

/// How one epoch packs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PackingFigures {
    /// Share of the tokens that is padding, 0..1.
    pub padding: f64,
    /// Images per `packing.sequence` tokens.
    pub images_per_sequence: f64,
    /// Share of the patches that is dropped, 0..1.
    pub dropped: f64,
    /// Image slots of a batch.
    pub slots: usize,
    /// The counts behind the figures.
    pub counts: PackingStats,
}

/// The expected share of tokens that is dropped of images somewhere on the axis that it follows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RatePoint {
    /// The resolution, or how many images were seen before.
    pub at: String,
    /// Expected rate, 0..1.
    pub rate: f64,
}

/// What a data set holds and what a recipe makes of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// What the path was taken for and how it is divided.
    pub data: String,
    /// Name of the recipe that tokens and packing follow.
    pub recipe: String,
    /// Training images.
    pub train: usize,
    /// Validation images.
    pub validation: usize,
    /// Number of classes.
    pub classes: usize,
    /// The class with most training images.
    pub most: ClassCount,
    /// The class with fewest.
    pub least: ClassCount,
    /// Training images whose headers were read for the figures below.
    pub measured: usize,
    /// Images among them whose header cannot be read.
    pub unreadable: usize,
    /// Names and causes of the first ten of them.
    pub unreadable_examples: Vec<String>,
    /// Heights in pixels.
    pub height: Spread,
    /// Widths in pixels.
    pub width: Spread,
    /// Share of images that are not square, 0..1.
    pub not_square: f64,
    /// Histogram of width:height.
    pub aspect: Vec<AspectBar>,
    /// Tokens per training image under the recipe.
    pub tokens: TokenSpread,
    /// Measured images that are scaled down below the drawn resolution to fit `limit`.
    pub downscaled: usize,
    /// What bounds an image's tokens under the recipe.
    pub limit: String,
    /// Drop rates, where they follow resolution or images seen.
    #[serde(default)]
    pub rates: Vec<RatePoint>,
    /// Texts of the measured images, where they are learned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub texts: Option<TextFigures>,
    /// One epoch packed under the recipe, the first.
    pub packing: PackingFigures,
}

/// Reads labels and headers (of at most 20,000 training images) and plans one epoch. Fails on an
/// empty set, on one of which nothing can be read, and on a recipe that cannot be carried out. `name`
/// is what the report calls the recipe.
pub fn report(dataset: &Dataset, recipe: &Recipe, name: &str) -> Result<DataReport> {
    let settings = PackingSettings::train(recipe)?;
    let (limit, rates) = (limit(&settings), rates(&settings));
    let slots = settings.slots;
    let train = dataset.train.len();
    let measured = train.min(MEASURED);
    let indices: Vec<usize> = (0..measured).map(|i| i * train / measured).collect();
    let read: Vec<_> = indices.par_iter().map(|&index| dataset.train.size(index)).collect();
    let unreadable_examples = read.iter().filter_map(|size| size.as_ref().err()).take(EXAMPLES);
    let unreadable_examples = unreadable_examples.map(ToString::to_string).collect();
    let sizes: Vec<_> = read.into_iter().map(|size| size.ok().filter(|&(h, w)| h > 0 && w > 0)).collect();
    let known: Vec<(usize, usize)> = sizes.iter().copied().flatten().collect();

    let texts = texts::figures(dataset.train.as_ref(), recipe, &indices)?;
    let source = Arc::new(Chosen::sized(dataset.train.clone(), indices, sizes));
    let mut planner = Planner::new(source, settings, None)?;
    let mut counts = PackingStats::default();
    let mut tokens = TokenSpread { min: usize::MAX, mean: 0.0, max: 0 };
    let mut downscaled = BTreeSet::new();
    while counts.images < known.len().max(1) as u64 {
        let Some(plan) = planner.next_batch()? else { break };
        counts.add(&PackingStats::of(&plan, planner.settings()));
        for image in &plan.images {
            tokens.min = tokens.min.min(image.tokens);
            tokens.max = tokens.max.max(image.tokens);
            if image.target.downscaled {
                downscaled.insert(image.sample);
            }
        }
    }
    tokens.mean = counts.live as f64 / counts.images.max(1) as f64;

    let (most, least) = class_counts(dataset)?;
    let count = |f: &dyn Fn(&(usize, usize)) -> bool| known.iter().filter(|size| f(size)).count();
    Ok(DataReport {
        data: dataset.description.clone(),
        recipe: name.into(),
        train,
        validation: dataset.validation.len(),
        classes: dataset.classes.len(),
        most,
        least,
        measured,
        unreadable: measured - known.len(),
        unreadable_examples,
        height: spread(known.iter().map(|size| size.0).collect()),
        width: spread(known.iter().map(|size| size.1).collect()),
        not_square: count(&|size| size.0 != size.1) as f64 / known.len().max(1) as f64,
        aspect: aspect(&known),
        tokens,
        downscaled: downscaled.len(),
        limit,
        rates,
        texts,
        packing: PackingFigures {
            padding: counts.padding(),
            images_per_sequence: counts.images_per_sequence(),
            dropped: counts.dropped(),
            slots,
            counts,
        },
    })
}

fn limit(settings: &PackingSettings) -> String {
    let mut limit = match settings.packing.kind {
        PackingKind::Bins => format!("a bin of {} tokens", settings.capacity()),
        PackingKind::Flat => format!("the budget of {} tokens", settings.capacity()),
    };
    let Limits { patches, rows, cols } = settings.limits;
    if patches != Limits::NONE.patches {
        limit += &format!(" and the position table of {patches} patches");
    } else if settings.limits != Limits::NONE {
        limit += &format!(" and the position tables of {rows} x {cols} patches");
    }
    limit
}

/// At five places from one end of the axis to the other.
fn rates(settings: &PackingSettings) -> Vec<RatePoint> {
    let (drop, sizes) = (&settings.drop, &settings.resolution);
    let point = |quarter: u32| {
        let share = f64::from(quarter) / 4.0;
        let (at, standing) = match drop.kind {
            DropKind::Resolution => {
                let resolution = sizes.min as f64 + share * (sizes.max - sizes.min) as f64;
                let side = resolution.round() as usize;
                (format!("{side} pixels"), settings.standing((side, side), resolution, 0))
            }
            DropKind::Schedule => {
                let seen = (share * drop.images as f64).round() as u64;
                (format!("after {seen}"), settings.standing((sizes.max, sizes.max), sizes.max as f64, seen))
            }
            DropKind::None | DropKind::Constant | DropKind::Beta => return None,
        };
        Some(RatePoint { at, rate: dropping::expected(drop, standing) })
    };
    (0..=4).filter_map(point).collect()
}

fn class_counts(dataset: &Dataset) -> Result<(ClassCount, ClassCount)> {
    let mut images = vec![0usize; dataset.classes.len()];
    for index in 0..dataset.train.len() {
        let label = dataset.train.label(index);
        *images.get_mut(label).ok_or_else(|| {
            Error::failure(format!(
                "{} has class {label}, but there are {} classes",
                dataset.train.name(index),
                dataset.classes.len()
            ))
        })? += 1;
    }
    let named = |class: Option<usize>| {
        class.map_or_else(ClassCount::default, |class| ClassCount {
            class: dataset.classes[class].clone(),
            images: images[class],
        })
    };
    let most = (0..images.len()).rev().max_by_key(|&class| images[class]);
    let least = (0..images.len()).min_by_key(|&class| images[class]);
    Ok((named(most), named(least)))
}

fn spread(mut values: Vec<usize>) -> Spread {
    values.sort_unstable();
    match (values.first(), values.last()) {
        (Some(&min), Some(&max)) => Spread { min, median: values[values.len() / 2], max },
        _ => Spread::default(),
    }
}

/// Bars from the tallest to the widest; squares are counted by themselves.
fn aspect(sizes: &[(usize, usize)]) -> Vec<AspectBar> {
    let count = |f: &dyn Fn(f64) -> bool| {
        sizes.iter().filter(|size| size.0 != size.1 && f(size.1 as f64 / size.0 as f64)).count()
    };
    let (first, last) = (EDGES[0], EDGES[EDGES.len() - 1]);
    let mut bars =
        vec![AspectBar { range: format!("up to {}", first.1), images: count(&|ratio| ratio < first.0) }];
    for pair in EDGES.windows(2) {
        if pair[0].1 == "1:1" {
            let images = sizes.iter().filter(|size| size.0 == size.1).count();
            bars.push(AspectBar { range: "square".into(), images });
        }
        let images = count(&|ratio| ratio >= pair[0].0 && ratio < pair[1].0);
        bars.push(AspectBar { range: format!("{} to {}", pair[0].1, pair[1].1), images });
    }
    bars.push(AspectBar { range: format!("from {}", last.1), images: count(&|ratio| ratio >= last.0) });
    bars
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "data        {}", self.data)?;
        writeln!(f, "images      {} to train on, {} to validate", self.train, self.validation)?;
        if self.most.images == self.least.images {
            writeln!(f, "classes     {} classes of {} training images each", self.classes, self.most.images)?;
        } else {
            writeln!(
                f,
                "classes     {}, from {} training images ({}) to {} ({})",
                self.classes, self.least.images, self.least.class, self.most.images, self.most.class
            )?;
        }
        if self.measured < self.train {
            writeln!(f, "measured    {} evenly spaced training images", self.measured)?;
        }
        if self.unreadable > 0 {
            writeln!(f, "unreadable  {} of {}", self.unreadable, self.measured)?;
            for example in &self.unreadable_examples {
                writeln!(f, "  {example}")?;
            }
        }
        for (name, spread) in [("height", self.height), ("width", self.width)] {
            let Spread { min, median, max } = spread;
            writeln!(f, "{name:<12}min {min}, median {median}, max {max} pixels")?;
        }
        writeln!(f, "not square  {:.1} %", 100.0 * self.not_square)?;
        writeln!(f, "width:height")?;
        let longest = self.aspect.iter().map(|bar| bar.images).max().unwrap_or(0).max(1);
        for bar in &self.aspect {
            let length = (bar.images * BAR).div_ceil(longest);
            let share = 100.0 * bar.images as f64 / (self.measured - self.unreadable).max(1) as f64;
            let text = "█".repeat(length);
            writeln!(f, "  {:<12} {text:<BAR$} {:>7} {share:>5.1} %", bar.range, bar.images)?;
        }
        writeln!(f, "recipe      {}", self.recipe)?;
        self.texts.as_ref().map_or(Ok(()), |texts| write!(f, "{texts}"))?;
        writeln!(
            f,
            "tokens      min {}, mean {:.1}, max {} per image",
            self.tokens.min, self.tokens.mean, self.tokens.max
        )?;
        if self.downscaled > 0 {
            writeln!(
                f,
                "downscaled  {} of {} images, to fit {}",
                self.downscaled,
                self.measured - self.unreadable,
                self.limit
            )?;
        }
        if !self.rates.is_empty() {
            writeln!(f, "drop rate")?;
        }
        for point in &self.rates {
            let text = "█".repeat((point.rate * BAR as f64).round() as usize);
            writeln!(f, "  {:<16} {text:<BAR$} {:>5.1} %", point.at, 100.0 * point.rate)?;
        }
        write!(f, "packing     {}, {} slots a batch", self.packing.counts, self.packing.slots)
    }
}
