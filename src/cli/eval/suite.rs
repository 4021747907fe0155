//! `trencadis eval --suite`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::{print, use_data};
use super::Args;
use crate::autograd::device::BatchShape;
use crate::data::source::{self, Dataset};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::model::Keep;
use crate::eval::open::Told;
use crate::eval::suite::{Crop, Observer, Options, Session, Setting, Size, Suite};
use crate::eval::trained::Trained;
use crate::recipe::{AspectKind, Recipe};

/// Options of the suites; each takes what concerns it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Suites")]
pub(super) struct SuiteArgs {
    /// Evaluations to run, in one process; each writes JSON, a table and a picture.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub suite: Vec<Suite>,
    /// Folder that they write to; `eval` in the run's folder where it is not given.
    #[arg(long, value_name = "DIR", requires = "suite")]
    out: Option<PathBuf>,
    /// Sizes by number of patches, such as `64,128`: the largest at which an image has no more.
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "suite", value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Vec<u32>,
    /// Look at the central part only: this share of height and width.
    #[arg(long, value_name = "SHARE", requires = "suite", conflicts_with = "crop_square")]
    crop: Option<f64>,
    /// Look at a central square only: this share of the shorter side.
    #[arg(long, value_name = "SHARE", requires = "suite")]
    crop_square: Option<f64>,
    /// Groups of the images, a table `image,attribute,...` (calibration, fairness).
    #[arg(long, value_name = "CSV", requires = "suite")]
    attributes: Option<PathBuf>,
    /// Which of the model's classes each class of the set is, JSON, CSV or TSV (ood); each of the 16 categories
    /// (shape-bias).
    #[arg(long, value_name = "FILE", requires = "suite")]
    label_map: Option<PathBuf>,
    /// Which of the model's classes are right for each image, JSON, CSV or TSV (ood).
    #[arg(long, value_name = "FILE", requires = "suite")]
    image_labels: Option<PathBuf>,
    /// Compare only the classes that the tables, or the set, name (ood).
    #[arg(long, requires = "suite")]
    restrict: bool,
    /// Another model, or a table `image,decision` (.csv, .tsv), to compare the errors with (shape-bias).
    #[arg(long, value_name = "MODEL|TABLE", requires = "suite")]
    against: Option<PathBuf>,
    /// Class of a decision between yes and no, to which thresholds by group are fitted (fairness).
    #[arg(long, value_name = "CLASS", requires = "suite")]
    positive: Option<String>,
    /// Compare smaller images with dropping tokens of large ones (resolution).
    #[arg(long, requires = "suite")]
    drop: bool,
    /// Measurements of which the median is taken (throughput); 10 where it is not given.
    #[arg(long, value_name = "N", requires = "suite")]
    repetitions: Option<usize>,
    /// Templates for the texts of a class, one a line, such as `a photo of a {}` (zero-shot); the recipe's where it is
    /// not given.
    #[arg(long, value_name = "FILE", requires = "suite")]
    prompts: Option<PathBuf>,
    /// Training images of each class, several numbers (few-shot); 1,5,10,25 where they are not given.
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "suite", value_parser = clap::value_parser!(u32).range(1..))]
    shots: Vec<u32>,
    /// How often they are drawn (few-shot); 3 where it is not given.
    #[arg(long, value_name = "N", requires = "suite", value_parser = clap::value_parser!(u32).range(1..))]
    seeds: Option<u32>,
    /// Regularisations of the regression (few-shot); 1024,32,1 where they are not given. Reports compare the first.
    #[arg(long, value_name = "L2", value_delimiter = ',', requires = "suite")]
    l2: Vec<f64>,
    /// Learning rates to choose from (linear-probe, fairness with --probe); 0.003,0.01,0.03,0.1,0.3,1 where they are not given.
    #[arg(long, value_name = "LR", value_delimiter = ',', requires = "suite")]
    lr: Vec<f64>,
    /// Epochs of a linear probe (linear-probe, fairness with --probe); 10 where it is not given.
    #[arg(long, value_name = "N", requires = "suite", value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
    /// Tell the attributes from the features, at the native and at the square aspect (fairness).
    #[arg(long, requires = "suite")]
    probe: bool,
    /// Crop ratios, as eval.crop (crop); 0.75,0.8,0.875,0.9,0.95,1 where they are not given.
    #[arg(long, value_name = "RATIO", value_delimiter = ',', requires = "suite")]
    ratios: Vec<f64>,
}

impl SuiteArgs {
    fn crop(&self) -> Result<Option<Crop>> {
        for (name, share) in [("--crop", self.crop), ("--crop-square", self.crop_square)] {
            if let Some(share) = share.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
                return Err(Error::usage(format!(
                    "{name} {share}: the share of an image must lie above 0 and be at most 1, such as 0.875"
                )));
            }
        }
        Ok(self.crop.map(Crop::Sides).or(self.crop_square.map(Crop::Square)))
    }

    /// Refuses what none of the suites would look at.
    fn check(&self) -> Result<()> {
        use Suite::{
            Calibration, Crop, Fairness, FewShot, LinearProbe, Ood, Resolution, ShapeBias, Throughput,
            ZeroShot,
        };
        // Fairness fits linear classifiers for its probes alone.
        let fitting: &[Suite] = if self.probe { &[LinearProbe, Fairness] } else { &[LinearProbe] };
        let options: [(&str, bool, &[Suite]); 16] = [
            ("--attributes", self.attributes.is_some(), &[Fairness, Calibration]),
            ("--label-map", self.label_map.is_some(), &[Ood, ShapeBias]),
            ("--image-labels", self.image_labels.is_some(), &[Ood]),
            ("--restrict", self.restrict, &[Ood]),
            ("--against", self.against.is_some(), &[ShapeBias]),
            ("--positive", self.positive.is_some(), &[Fairness]),
            ("--drop", self.drop, &[Resolution]),
            ("--repetitions", self.repetitions.is_some(), &[Throughput]),
            ("--prompts", self.prompts.is_some(), &[ZeroShot]),
            ("--shots", !self.shots.is_empty(), &[FewShot]),
            ("--seeds", self.seeds.is_some(), &[FewShot]),
            ("--l2", !self.l2.is_empty(), &[FewShot]),
            ("--lr", !self.lr.is_empty(), fitting),
            ("--epochs", self.epochs.is_some(), fitting),
            ("--probe", self.probe, &[Fairness]),
            ("--ratios", !self.ratios.is_empty(), &[Crop]),
        ];
        for (option, given, takers) in options {
            if given && !takers.iter().any(|suite| self.suite.contains(suite)) {
                return Err(Error::usage(format!(
                    "{option} says nothing to --suite {}; leave it out, or run --suite {}, which takes it",
                    self.suite.iter().map(|suite| suite.name()).collect::<Vec<_>>().join(","),
                    takers[0].name()
                )));
            }
        }
        let positive = |x: f64| x > 0.0 && x.is_finite();
        for (option, values) in [("--l2", &self.l2), ("--lr", &self.lr)] {
            if let Some(value) = values.iter().find(|value| !positive(**value)) {
                return Err(Error::usage(format!("{option} {value}: expected numbers above 0")));
            }
        }
        if let Some(ratio) = self.ratios.iter().find(|ratio| **ratio != 0.0 && !(0.01..=1.0).contains(*ratio))
        {
            return Err(Error::usage(format!(
                "--ratios {ratio}: a crop ratio is 0, for the whole image, or lies in 0.01..1"
            )));
        }
        Ok(())
    }

    /// From `--resolution` and `--tokens`.
    fn sizes(&self, resolutions: &[usize]) -> Result<Vec<Size>> {
        if resolutions.contains(&0) {
            return Err(Error::usage(
                "--resolution 0: a suite needs a size in pixels; leave it out for the recipe's",
            ));
        }
        let tokens = self.tokens.iter().map(|&patches| Size::Tokens(patches as usize));
        let mut sizes: Vec<Size> = Vec::new();
        for size in resolutions.iter().copied().map(Size::Resolution).chain(tokens) {
            if !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        Ok(sizes)
    }

    /// The set with training images that linear models are fitted to: `set`, which has been opened to evaluate on, or the
    /// same opened as for training.
    fn probed(
        &self,
        recipe: &Recipe,
        data: Option<&str>,
        set: &Arc<Dataset>,
    ) -> Result<Option<Arc<Dataset>>> {
        if data.is_none() || ![Suite::FewShot, Suite::LinearProbe].iter().any(|s| self.suite.contains(s)) {
            return Ok(None);
        }
        if !set.train.is_empty() {
            return Ok(Some(set.clone()));
        }
        let mut recipe = recipe.clone();
        use_data(&mut recipe, data.unwrap_or_default())?;
        source::open(&recipe.data, recipe.model.channels, recipe.train.seed).map(Arc::new).map(Some)
    }

    /// Of a device: at the largest of `sizes`, and at both aspects where both are looked at.
    fn shape(&self, recipe: &Recipe, slots: usize, sizes: &[Size]) -> BatchShape {
        let highest = sizes.iter().map(|size| Setting::whole(*size).highest(recipe)).max().unwrap_or(0);
        let mut shape = BatchShape::of_recipe(recipe, slots, highest);
        if self.probe {
            for aspect in [AspectKind::Native, AspectKind::Square] {
                let setting =
                    Setting { aspect: Some(aspect), crop: Some(0.0), ..Setting::whole(Size::Recipe) };
                let other = BatchShape::of_recipe(&setting.applied(recipe), slots, highest);
                shape.image_rows = shape.image_rows.max(other.image_rows);
            }
        }
        shape
    }
}

/// What was given, or else these.
fn given<T: Clone>(values: &[T], usual: &[T]) -> Vec<T> {
    if values.is_empty() { usual } else { values }.to_vec()
}

pub(super) fn run(args: Args, device: Option<&Device>) -> Result<()> {
    let suites = &args.suites;
    suites.check()?;
    let (sizes, crop) = (suites.sizes(&args.resolution)?, suites.crop()?);
    let folder = match &suites.out {
        Some(folder) => folder.clone(),
        None => beside(&args.model)?,
    };
    let shape = |recipe: &Recipe, slots| suites.shape(recipe, slots, &sizes);
    let trained = Trained::load_for(&args.model, &args.told.told(None)?, device, Keep::Features, shape)?;
    let set: Arc<Dataset> = Arc::new(super::dataset(&trained.recipe, args.data.as_deref())?);
    let probed = suites.probed(&trained.recipe, args.data.as_deref(), &set)?;
    let against = match &suites.against {
        None => None,
        Some(path) if is_table(path) => Some(Observer::Decisions(path.clone())),
        Some(path) => {
            let other = Trained::load_for(path, &Told::default(), device, Keep::Logits, shape)?;
            Some(Observer::Model(Box::new(Session::new(other, set.clone(), crop)?)))
        }
    };
    let mut session = Session::new(trained, set, crop)?;
    let mut options = Options {
        against,
        attributes: suites.attributes.clone(),
        label_map: suites.label_map.clone(),
        image_labels: suites.image_labels.clone(),
        restrict: suites.restrict,
        positive: suites.positive.clone(),
        drop: suites.drop,
        repetitions: suites.repetitions.unwrap_or(10),
        prompts: suites.prompts.clone(),
        probed,
        shots: given(&suites.shots, &[1, 5, 10, 25]).into_iter().map(|shots| shots as usize).collect(),
        seeds: suites.seeds.unwrap_or(3) as usize,
        l2: given(&suites.l2, &[1024.0, 32.0, 1.0]),
        lrs: given(&suites.lr, &[0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
        epochs: suites.epochs.unwrap_or(10) as usize,
        probe: suites.probe,
        ratios: given(&suites.ratios, &[0.75, 0.8, 0.875, 0.9, 0.95, 1.0]),
        sizes,
    };
    for (index, suite) in suites.suite.iter().enumerate() {
        let outcome = suite.run(&mut session, &mut options)?;
        let files = outcome.write(&folder, *suite)?;
        if args.json {
            print(&format!("{}\n", outcome.json))?;
            continue;
        }
        let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
        let gap = if index > 0 { "\n" } else { "" };
        print(&format!("{gap}{}\nwritten           {}\n", outcome.table, names.join(", ")))?;
    }
    Ok(())
}

fn is_table(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    ["csv", "tsv"].iter().any(|table| extension.eq_ignore_ascii_case(table))
}

/// `eval` in the folder of the run that `model` belongs to.
fn beside(model: &Path) -> Result<PathBuf> {
    let run = if model.is_dir() { Some(model) } else { model.parent() };
    match run.filter(|folder| folder.join("recipe.toml").is_file()) {
        Some(run) => Ok(run.join("eval")),
        None => Err(Error::file(
            model,
            "belongs to no run, in whose folder reports could be put; name one with --out DIR",
        )),
    }
}
