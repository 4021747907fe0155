//! What a run leaves behind and tells: its folder with checkpoints, metric lines and TensorBoard events; progress and
//! what is said on the terminal. Of several ranks the first keeps it, and the journal of the others is silent.

use std::path::Path;

use super::checkpoint::Snapshot;
use super::metrics::MetricsLog;
use super::progress::Progress;
use super::report::{AttentionReport, EvalReport, StepReport};
use super::run_dir::RunDir;
use super::tensorboard::EventWriter;
use super::terminal::{say, tell};
use crate::error::Result;
use crate::recipe::TrainConfig;

/// The journal of a rank.
pub(super) struct Journal {
    run: RunDir,
    kept: Option<Kept>,
}

/// What is written and shown.
struct Kept {
    metrics: MetricsLog,
    events: EventWriter,
    progress: Progress,
}

impl Journal {
    /// Opens the files of a run that has come to step `done`. A new one that cannot be written to is discarded.
    pub fn open(run: RunDir, done: u64, config: &TrainConfig) -> Result<Self> {
        let opened = MetricsLog::open(&run.metrics(), done)
            .and_then(|metrics| Ok((metrics, EventWriter::create(run.path(), done)?)));
        if opened.is_err() && done == 0 {
            run.discard();
        }
        let (metrics, events) = opened?;
        let progress = Progress::new(config.steps, done, config.log_every);
        Ok(Self { run, kept: Some(Kept { metrics, events, progress }) })
    }

    /// That of a rank that is not the first; `run` is what errors name.
    pub fn silent(run: RunDir) -> Self {
        Self { run, kept: None }
    }

    /// Folder of the run.
    pub fn path(&self) -> &Path {
        self.run.path()
    }

    /// The run.
    pub fn run(&self) -> &RunDir {
        &self.run
    }

    /// A line on standard error, before the progress begins or after it has ended.
    pub fn say(&self, line: &str) {
        if self.kept.is_some() {
            say(line);
        }
    }

    /// Lines on standard output.
    pub fn tell(&self, lines: &str) -> Result<()> {
        if self.kept.is_some() { tell(lines) } else { Ok(()) }
    }

    /// A line beside the progress.
    pub fn message(&self, text: &str) {
        if let Some(kept) = &self.kept {
            kept.progress.message(text);
        }
    }

    /// Ends the progress.
    pub fn finish(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.progress.finish();
        }
    }

    /// A step, with a metric line where it is `logged`.
    pub fn step(&mut self, report: &StepReport, logged: bool) -> Result<()> {
        let Some(Kept { metrics, events, progress }) = &mut self.kept else { return Ok(()) };
        progress.step(report);
        if !logged {
            return Ok(());
        }
        metrics.train(report)?;
        events.scalars(
            report.step,
            &[
                ("train/loss", report.loss),
                ("train/accuracy", report.accuracy),
                ("train/learning_rate", report.learning_rate),
                ("train/grad_norm", report.grad_norm),
                ("train/padding", report.padding()),
                ("speed/images_per_second", report.images as f64 / report.seconds),
                ("speed/tokens_per_second", report.tokens as f64 / report.seconds),
            ],
        )
    }

    /// An evaluation.
    pub fn eval(&mut self, report: &EvalReport) -> Result<()> {
        let Some(Kept { metrics, events, progress }) = &mut self.kept else { return Ok(()) };
        progress.eval(report);
        metrics.eval(report)?;
        let scalars = [("eval/loss", report.loss), ("eval/top1", report.top1), ("eval/top5", report.top5)];
        events.scalars(report.step, &scalars)
    }

    /// The attention of an evaluation.
    pub fn attention(&mut self, report: &AttentionReport) -> Result<()> {
        let Some(Kept { metrics, events, .. }) = &mut self.kept else { return Ok(()) };
        metrics.attention(report)?;
        let tags = |what: &str, values: &[f64]| -> Vec<(String, f64)> {
            let of_block =
                |(block, value): (usize, &f64)| (format!("attention_{what}/block_{block:02}"), *value);
            values.iter().enumerate().map(of_block).collect()
        };
        let scalars = [
            tags("entropy", &report.entropy),
            tags("min_head_entropy", &report.min_head_entropy),
            tags("max_logit", &report.max_logit),
        ]
        .concat();
        let scalars: Vec<(&str, f64)> = scalars.iter().map(|(tag, value)| (tag.as_str(), *value)).collect();
        events.scalars(report.step, &scalars)
    }

    /// A checkpoint, after the metric lines that it follows; see [`Snapshot::save`].
    pub fn save(&self, snapshot: &Snapshot<'_>, improved: bool, keep: bool) -> Result<Result<bool>> {
        let synced = self.kept.as_ref().map_or(Ok(()), |kept| kept.metrics.sync());
        match snapshot.state.ranks().agree(synced)? {
            Ok(()) => snapshot.save(&self.run, improved, keep),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Removes the folder of a run that has come to nothing.
    pub fn discard(&self) {
        if self.kept.is_some() {
            self.run.discard();
        }
    }
}
