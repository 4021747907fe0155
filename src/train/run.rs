//! The training loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::checkpoint::{self, Best, Header, Progress as Progressed, Snapshot};
use super::interrupt::Interrupt;
use super::metrics::MetricsLog;
use super::optimizer::Optimizer;
use super::plan::RunPlan;
use super::progress::Progress;
use super::report::{EvalReport, StepReport};
use super::run_dir::RunDir;
use super::schedule::learning_rate;
use super::step::{StepOutcome, TrainStep};
use super::tensorboard::EventWriter;
use crate::cpu::optim::moving_average;
use crate::data::batch::PackedBatch;
use crate::data::loader::{Loader, LoaderState};
use crate::data::packing;
use crate::data::source::{self, Dataset};
use crate::error::{Error, Result};
use crate::eval::model::Model;
use crate::eval::run::{check_grids, evaluate};
use crate::models::recipe::Recipe;
use crate::nn::init::initialise;
use crate::weights::{Policy, assign, foreign};

/// What a new run starts from.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Name of the run folder.
    pub name: String,
    /// Everything that decides the run.
    pub recipe: Recipe,
    /// Where run folders are made.
    pub out: PathBuf,
    /// Weights to start from.
    pub init: Option<PathBuf>,
}

/// Starts a run.
///
/// # Errors
/// Bad data, recipe or weights, before anything is written; later failures name the last checkpoint.
pub fn start(options: TrainOptions) -> Result<()> {
    let recipe = options.recipe;
    let dataset = open_data(&recipe)?;
    let classes = dataset.classes.len();
    let slots = packing::slots(&recipe);
    let step = TrainStep::new(&recipe, classes, slots)?;
    let mut notes = Vec::new();
    let params = match &options.init {
        None => initialise(step.params(), recipe.train.seed),
        Some(path) => initial_weights(path, &recipe, &step, &mut notes)?,
    };
    let optimizer = Optimizer::new(step.params(), &recipe.train);
    let loader = Loader::train(dataset.train.clone(), &recipe, None)?;
    let header = Header {
        recipe: recipe.to_toml()?,
        classes: dataset.classes.clone(),
        progress: Progressed::default(),
    };
    let ema = (recipe.train.ema > 0.0).then(|| params.clone());
    let run = RunDir::create(&options.out, &options.name, &header.recipe)?;
    for note in notes {
        eprintln!("{note}");
    }
    Trainer::new(recipe, dataset, step, slots, params, ema, optimizer, loader, header, run)?.train()
}

/// Continues the run in `folder` from its last checkpoint, exactly.
///
/// # Errors
/// If `folder` holds no checkpoint, or its data has changed.
pub fn resume(folder: &Path) -> Result<()> {
    let run = RunDir::resume(folder)?;
    let header = checkpoint::load_header(&run.last())?;
    let recipe = Recipe::from_toml(&header.recipe, &run.last())?;
    let dataset = open_data(&recipe)?;
    if dataset.classes != header.classes {
        return Err(Error::usage(format!(
            "{}: the data now has {} classes and not the {} that the run was started with; restore the data, or start \
             a new run with --init",
            folder.display(),
            dataset.classes.len(),
            header.classes.len()
        )));
    }
    let slots = packing::slots(&recipe);
    let step = TrainStep::new(&recipe, dataset.classes.len(), slots)?;
    let (header, training) = checkpoint::load_training(&run.last(), step.params())?;
    let state: LoaderState = serde_json::from_value(header.progress.loader.clone())
        .map_err(|e| Error::file(&run.last(), format!("the position in the data is damaged ({e})")))?;
    let loader = Loader::train(dataset.train.clone(), &recipe, Some(&state))?;
    let mut optimizer = Optimizer::new(step.params(), &recipe.train);
    (optimizer.m, optimizer.v, optimizer.step) = (training.m, training.v, training.optimizer_step);
    let (weights, ema) = (training.weights, training.ema);
    Trainer::new(recipe, dataset, step, slots, weights, ema, optimizer, loader, header, run)?.train()
}

fn open_data(recipe: &Recipe) -> Result<Dataset> {
    source::open(&recipe.data, recipe.model.channels, recipe.train.seed)
}

fn initial_weights(
    path: &Path,
    recipe: &Recipe,
    step: &TrainStep,
    notes: &mut Vec<String>,
) -> Result<Vec<Vec<f32>>> {
    let (_, weights) = checkpoint::load_model(path)?;
    let mut described = recipe.model.clone();
    let weights = foreign::detect_and_convert(weights, &mut described)?;
    if described != recipe.model {
        notes.push(format!(
            "{}: comes from a model of another description; set the recipe's [model] as `trencadis forward` would \
             to use it unchanged",
            path.display()
        ));
    }
    let policy = Policy::NewHead { seed: recipe.train.seed };
    let (params, report) = assign(path, weights, step.params(), policy)?;
    notes.push(format!("start             {} tensors from {}", report.taken, path.display()));
    if !report.fresh.is_empty() {
        notes.push(format!("fresh             {}", report.fresh.join(", ")));
    }
    Ok(params)
}

struct Trainer {
    recipe: Recipe,
    dataset: Dataset,
    step: TrainStep,
    evaluated: Model,
    params: Vec<Vec<f32>>,
    ema: Option<Vec<Vec<f32>>>,
    optimizer: Optimizer,
    loader: Loader,
    header: Header,
    run: RunDir,
    metrics: MetricsLog,
    events: EventWriter,
    progress: Progress,
    interrupt: Interrupt,
    /// Step of the newest checkpoint on disk.
    saved: Option<u64>,
    padding: (u64, u64),
    unreadable: u64,
}

impl Trainer {
    #[allow(clippy::too_many_arguments)]
    fn new(
        recipe: Recipe,
        dataset: Dataset,
        step: TrainStep,
        slots: usize,
        params: Vec<Vec<f32>>,
        ema: Option<Vec<Vec<f32>>>,
        optimizer: Optimizer,
        loader: Loader,
        header: Header,
        run: RunDir,
    ) -> Result<Self> {
        let done = header.progress.step;
        let config = &recipe.train;
        let evaluated = Model::new(&recipe, dataset.classes.len(), recipe.packing.tokens, slots, false)?;
        let metrics = MetricsLog::open(&run.metrics(), done)?;
        let events = EventWriter::create(run.path(), done)?;
        eprintln!(
            "data              {} training and {} validation images, {} classes",
            dataset.train.len(),
            dataset.validation.len(),
            dataset.classes.len()
        );
        eprintln!("{}", RunPlan::of(&recipe, &step, slots));
        let from = if done > 0 { format!(", from step {done}") } else { String::new() };
        eprintln!("run               {}{from}\n", run.path().display());
        let progress = Progress::new(config.steps, done, config.log_every);
        Ok(Self {
            evaluated,
            metrics,
            events,
            progress,
            interrupt: Interrupt::install()?,
            saved: (done > 0).then_some(done),
            padding: (0, 0),
            unreadable: 0,
            recipe,
            dataset,
            step,
            params,
            ema,
            optimizer,
            loader,
            header,
            run,
        })
    }

    fn train(mut self) -> Result<()> {
        let config = self.recipe.train.clone();
        loop {
            let step = self.header.progress.step;
            let due = |every: u64| every > 0 && step > 0 && step.is_multiple_of(every);
            let last = step >= config.steps;
            let mut improved = None;
            // An evaluation that an interrupt prevented is still owed after a resume.
            if (due(config.eval_every) || last) && self.header.progress.evaluated != Some(step) {
                improved = self.evaluate()?;
            }
            let stop = self.interrupt.requested();
            let keep = due(config.keep_every);
            let unsaved = self.saved != Some(step) && (stop || keep || due(config.save_every));
            if step > 0 && (improved.is_some() || unsaved) {
                self.save(improved == Some(true), keep)?;
            }
            if stop {
                return self.interrupted();
            }
            if last {
                return self.finish();
            }
            self.one_step()?;
        }
    }

    /// Loads the step's batches, runs it and updates the weights.
    fn one_step(&mut self) -> Result<()> {
        let begun = Instant::now();
        let config = &self.recipe.train;
        let mut batches: Vec<PackedBatch> = Vec::with_capacity(config.accumulate);
        for _ in 0..config.accumulate {
            let loaded = self.loader.next_batch()?;
            check_grids(&self.recipe, &loaded.batch)?;
            batches.push(loaded.batch);
            self.header.progress.loader = serde_json::to_value(&loaded.state_after)
                .map_err(|e| Error::failure(format!("the position in the data cannot be saved ({e})")))?;
        }
        let number = self.header.progress.step + 1;
        let outcome = self.step.run(&self.params, &batches, config.seed);
        if !outcome.loss.is_finite() {
            return Err(self.diverged(number, &format!("the loss is {}", outcome.loss)));
        }
        let lr = learning_rate(config, number - 1);
        let grad_norm = match self.optimizer.step(lr, &mut self.params, self.step.grads()) {
            Ok(norm) => norm,
            Err(e) => return Err(self.diverged(number, &e.to_string())),
        };
        if let Some(ema) = &mut self.ema {
            ema.iter_mut().zip(&self.params).for_each(|(e, p)| moving_average(e, p, config.ema));
        }
        self.header.progress.step = number;
        self.warn_of_unreadable();
        self.header.progress.images_seen += outcome.images;
        self.report(&outcome, lr, grad_norm, begun.elapsed().as_secs_f64())
    }

    fn report(&mut self, outcome: &StepOutcome, lr: f64, grad_norm: f64, seconds: f64) -> Result<()> {
        let report = StepReport {
            step: self.header.progress.step,
            loss: outcome.loss,
            accuracy: outcome.accuracy,
            learning_rate: lr,
            grad_norm,
            images: outcome.images,
            tokens: outcome.tokens as u64,
            token_rows: outcome.budget as u64,
            flop: outcome.flops,
            seconds,
        };
        self.padding.0 += report.token_rows - report.tokens;
        self.padding.1 += report.token_rows;
        self.progress.step(&report);
        let every = self.recipe.train.log_every.max(1);
        if report.step.is_multiple_of(every) || report.step == self.recipe.train.steps {
            self.metrics.train(&report)?;
            self.events.scalars(
                report.step,
                &[
                    ("train/loss", report.loss),
                    ("train/accuracy", report.accuracy),
                    ("train/learning_rate", lr),
                    ("train/grad_norm", grad_norm),
                    ("train/padding", report.padding()),
                    ("speed/images_per_second", report.images as f64 / seconds),
                    ("speed/tokens_per_second", report.tokens as f64 / seconds),
                ],
            )?;
        }
        Ok(())
    }

    fn warn_of_unreadable(&mut self) {
        let report = self.loader.report();
        if report.unreadable > self.unreadable {
            self.unreadable = report.unreadable;
            let newest = report.examples.last().map_or("", String::as_str);
            self.progress
                .message(&format!("skipped {} unreadable images so far; {newest}", report.unreadable));
        }
    }

    /// Evaluates the weights that will be used, the moving average where there is one. Returns
    /// whether they are the best so far; `None` if it was interrupted.
    fn evaluate(&mut self) -> Result<Option<bool>> {
        let begun = Instant::now();
        let params = self.ema.as_ref().unwrap_or(&self.params);
        let interrupt = self.interrupt.clone();
        let stop = || interrupt.requested();
        let source = self.dataset.validation.clone();
        let Some(done) = evaluate(&mut self.evaluated, params, source, &self.recipe, 0, &stop)? else {
            return Ok(None);
        };
        let step = self.header.progress.step;
        self.header.progress.evaluated = Some(step);
        let metric = done.metrics.top1;
        let best = self.header.progress.best.is_none_or(|b| metric > b.metric);
        if best {
            self.header.progress.best = Some(Best { step, metric });
        }
        let report = EvalReport {
            step,
            loss: done.metrics.loss,
            top1: metric,
            top5: done.metrics.top5,
            images: done.metrics.images,
            best,
            seconds: begun.elapsed().as_secs_f64(),
        };
        self.progress.eval(&report);
        self.metrics.eval(&report)?;
        let scalars = [("eval/loss", report.loss), ("eval/top1", report.top1), ("eval/top5", report.top5)];
        self.events.scalars(step, &scalars)?;
        Ok(Some(best))
    }

    fn save(&mut self, improved: bool, keep: bool) -> Result<()> {
        self.metrics.sync()?;
        let snapshot = Snapshot {
            header: &self.header,
            params: self.step.params(),
            weights: &self.params,
            ema: self.ema.as_deref(),
            optimizer: &self.optimizer,
        };
        snapshot.save(&self.run, improved, keep)?;
        self.saved = Some(self.header.progress.step);
        Ok(())
    }

    /// The error of a step that is not finite.
    fn diverged(&self, step: u64, what: &str) -> Error {
        let checkpoint = match self.saved {
            Some(step) => format!("the last good checkpoint is {} of step {step}", self.run.last().display()),
            None => "no checkpoint had been saved yet".into(),
        };
        Error::failure(format!(
            "step {step}: {what}; {checkpoint}; lower train.lr, or raise train.warmup, and start again"
        ))
    }

    fn interrupted(mut self) -> Result<()> {
        self.progress.finish();
        let run = self.run.path().display();
        eprintln!(
            "stopped after step {}; continue with: trencadis train --resume {run}",
            self.header.progress.step
        );
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.progress.finish();
        let run = self.run.path().display();
        let padding = 100.0 * self.padding.0 as f64 / self.padding.1.max(1) as f64;
        println!("\npadding           {padding:.2} % of the tokens trained on");
        if let Some(best) = self.header.progress.best {
            let (percent, step) = (100.0 * best.metric, best.step);
            println!("best              {percent:.2} % of the validation images right, at step {step}");
        }
        println!("saved             {run}: best and last checkpoint, metrics.jsonl, TensorBoard events");
        println!("next              trencadis eval {run}");
        Ok(())
    }
}
