//! Evaluations by name, `trencadis eval --suite`: one file each, all of them over the same [`Session`] and the same
//! [`metrics`](super::metrics). Each gives numbers for programs, a table for people and a picture.
//!
//! They run in one process. Random choices (dropped patches, the half that a temperature is fitted on) are keyed by the
//! recipe's seed and the image, so that an evaluation repeats.

mod attributes;
mod calibration;
mod cascade;
mod crop;
mod csv;
mod fairness;
mod few_shot;
mod label_map;
mod linear_probe;
mod names;
mod ood;
mod pass;
mod probed;
mod resolution;
mod session;
mod setting;
mod shape_bias;
mod text;
mod throughput;
mod zero_shot;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;

pub use pass::Pass;
pub use session::Session;
pub use setting::{Crop, Setting, Size};

use super::chart::Figure;
use crate::data::source::Dataset;
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::rng::{Purpose, Stream};

/// What is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Confidence against accuracy: ECE, reliability diagram, temperature scaling; by group with --attributes.
    Calibration,
    /// Accuracy against cost over --resolution or --tokens; with --drop against dropping tokens.
    Resolution,
    /// Small images first, the least confident again at a larger size: two sizes or more.
    Cascade,
    /// Sets of other classes: --label-map, --image-labels, --restrict.
    Ood,
    /// Shape against texture on cue-conflict images; error consistency with --against.
    ShapeBias,
    /// Accuracy and decisions by group of --attributes; with --probe what the features tell of them.
    Fairness,
    /// Linear regression on frozen features from a few training images of each class.
    FewShot,
    /// Linear classifier on frozen features of the training images.
    LinearProbe,
    /// Accuracy by crop ratio, at each size.
    Crop,
    /// Images and tokens a second of the forward pass.
    Throughput,
    /// Classes by their names in texts, of a model of images and texts: --prompts.
    ZeroShot,
}

impl Suite {
    /// As on the command line, and in the names of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calibration => "calibration",
            Self::Resolution => "resolution",
            Self::Cascade => "cascade",
            Self::Ood => "ood",
            Self::ShapeBias => "shape-bias",
            Self::Fairness => "fairness",
            Self::FewShot => "few-shot",
            Self::LinearProbe => "linear-probe",
            Self::Crop => "crop",
            Self::Throughput => "throughput",
            Self::ZeroShot => "zero-shot",
        }
    }

    /// Runs it.
    ///
    /// # Errors
    /// An option that it needs and does not have, a model that knows no classes, tables that do not fit the set, what [`Session::scores`] refuses.
    pub fn run(self, session: &mut Session, options: &mut Options) -> Result<Outcome> {
        // These take the classes of the set.
        if ![Self::ZeroShot, Self::FewShot, Self::LinearProbe].contains(&self) {
            session.trained.require_classes()?;
        }
        match self {
            Self::Calibration => calibration::run(session, options),
            Self::Resolution => resolution::run(session, options),
            Self::Cascade => cascade::run(session, options),
            Self::Ood => ood::run(session, options),
            Self::ShapeBias => shape_bias::run(session, options),
            Self::Fairness => fairness::run(session, options),
            Self::FewShot => few_shot::run(session, options),
            Self::LinearProbe => linear_probe::run(session, options),
            Self::Crop => crop::run(session, options),
            Self::Throughput => throughput::run(session, options),
            Self::ZeroShot => zero_shot::run(session, options),
        }
    }
}

/// What the suites are told; each takes what concerns it.
#[derive(Default)]
pub struct Options {
    /// Sizes of the images; the recipe's where there is none.
    pub sizes: Vec<Size>,
    /// Table of attributes by image.
    pub attributes: Option<PathBuf>,
    /// Table from classes of the set to classes of the model.
    pub label_map: Option<PathBuf>,
    /// Table from images to classes of the model.
    pub image_labels: Option<PathBuf>,
    /// Whether classes of the model that stand in no table are left out of the comparison.
    pub restrict: bool,
    /// Another observer of the same images.
    pub against: Option<Observer>,
    /// The class of a decision between yes and no.
    pub positive: Option<String>,
    /// Whether dropping tokens is compared with resizing.
    pub drop: bool,
    /// How often a measurement is repeated.
    pub repetitions: usize,
    /// File of templates for the texts of a class; the recipe's where there is none.
    pub prompts: Option<PathBuf>,
    /// Set with the training images of linear models; that of the session where it is not given.
    pub probed: Option<Arc<Dataset>>,
    /// Numbers of training images of a class, each at least 1.
    pub shots: Vec<usize>,
    /// How often these are drawn, at least once.
    pub seeds: usize,
    /// Regularisations of a regression, each above 0.
    pub l2: Vec<f64>,
    /// Learning rates among which a linear classifier chooses, each above 0; at least one.
    pub lrs: Vec<f64>,
    /// Epochs of a linear classifier, at least 1.
    pub epochs: usize,
    /// Whether attributes are told from features.
    pub probe: bool,
    /// Crop ratios, as `eval.crop`.
    pub ratios: Vec<f64>,
}

/// Somebody else who has looked at the images.
pub enum Observer {
    /// Another model.
    Model(Box<Session>),
    /// A table of decisions.
    Decisions(PathBuf),
}

impl Options {
    /// The sizes, each with all of its patches.
    fn settings(&self) -> Vec<Setting> {
        let sizes = if self.sizes.is_empty() { &[Size::Recipe][..] } else { &self.sizes };
        sizes.iter().copied().map(Setting::whole).collect()
    }

    /// The one size of a suite that looks at one.
    ///
    /// # Errors
    /// Several.
    fn setting(&self, suite: Suite) -> Result<Setting> {
        match self.settings().as_slice() {
            [one] => Ok(*one),
            several => Err(Error::usage(format!(
                "--suite {} looks at one size and {} are given; give --resolution or --tokens one value",
                suite.name(),
                several.len()
            ))),
        }
    }
}

/// What a suite found.
pub struct Outcome {
    /// Numbers, for programs.
    pub json: serde_json::Value,
    /// For people; ends with a line break.
    pub table: String,
    /// The picture.
    pub figure: Figure,
    /// Further files: the end of the name, and the content.
    pub files: Vec<(&'static str, String)>,
}

impl Outcome {
    /// Writes `<suite>.json`, `.txt`, `.svg` and what else there is into `folder`; returns the paths.
    ///
    /// # Errors
    /// A folder that cannot be made or written to.
    pub fn write(&self, folder: &Path, suite: Suite) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
        let json = serde_json::to_string_pretty(&self.json).map_err(Error::failure)? + "\n";
        let svg = self.figure.to_svg();
        let files = [(".json", &json), (".txt", &self.table), (".svg", &svg)].into_iter();
        let write = |(end, content): (&str, &String)| {
            let path = folder.join(format!("{}{end}", suite.name()));
            write_atomic(&path, |out| out.write_all(content.as_bytes()))?;
            Ok(path)
        };
        files.chain(self.files.iter().map(|(end, content)| (*end, content))).map(write).collect()
    }
}

/// Whether each of `images` images, by its index in the set, belongs to the half that something is fitted on; the other
/// half shows how good the fit is. The same images in every evaluation with this seed.
fn fitting_half(seed: u64, samples: &[usize]) -> Vec<bool> {
    // Epoch 0 of this purpose divides training from validation images.
    let draw = |sample: usize| Stream::new(seed, 1, sample as u64, Purpose::Split).bits();
    let mut order: Vec<usize> = (0..samples.len()).collect();
    order.sort_by_key(|&row| (draw(samples[row]), samples[row]));
    let mut half = vec![false; samples.len()];
    order[..samples.len() / 2].iter().for_each(|&row| half[row] = true);
    half
}

/// Lines above a table: what was evaluated.
fn preamble(session: &Session, scores: &Pass, size: Size) -> String {
    let mut out = format!(
        "model             {}\ndata              {}\nimages            {} at {size} ({:.1} tokens, {} GFLOP an image)\n",
        session.trained.path.display(),
        session.described(),
        scores.images(),
        scores.tokens,
        text::gflop(scores.flops)
    );
    out += &text::unreadable(scores.unreadable);
    out + &text::downscaled(scores.downscaled)
}
