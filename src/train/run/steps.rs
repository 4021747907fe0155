//! Steps of a run: queued, counted, told.

use std::time::Instant;

use super::{Queued, Trainer};
use crate::data::loader::LoadedBatch;
use crate::data::packing::PackingStats;
use crate::error::{Error, Result};
use crate::train::report::StepReport;
use crate::train::schedule::learning_rate;
use crate::train::step::StepOutcome;

impl Trainer {
    /// Queues the next step, batch by batch as they are loaded; steps that have run by then are counted.
    pub(super) fn queue_step(&mut self) -> Result<()> {
        let accumulate = self.recipe.train.accumulate;
        let (mut packing, mut weight, mut waiting) = (PackingStats::default(), 0.0, 0.0);
        for number in 1..=accumulate {
            let begun = Instant::now();
            let LoadedBatch { batch, state_after, stats, .. } = self.loader.next_batch()?;
            waiting += begun.elapsed().as_secs_f64();
            packing.add(&stats);
            weight += batch.weights.iter().sum::<f32>();
            if number < accumulate {
                self.engine.add(&batch, None).inspect_err(|_| self.failed = true)?;
                while self.engine.is_ready() {
                    self.collect_step()?;
                }
                continue;
            }
            if weight == 0.0 {
                let example = self.loader.report().newest.clone().unwrap_or_default();
                return Err(Error::failure(format!(
                    "no image of the step could be read; the last is {example}"
                )));
            }
            let learning_rate = learning_rate(&self.recipe.train, self.begun());
            self.engine.add(&batch, Some(learning_rate)).inspect_err(|_| self.failed = true)?;
            self.queued.push_back(Queued { learning_rate, packing, loader: state_after, waiting });
            return Ok(());
        }
        Err(Error::usage("train.accumulate is 0, expected at least 1"))
    }

    /// Waits for the oldest step under way and counts it.
    pub(super) fn collect_step(&mut self) -> Result<()> {
        let outcome = self.engine.collect().inspect_err(|_| self.failed = true)?;
        let Some(queued) = self.queued.pop_front() else {
            return Err(Error::failure("a step was collected that was not queued"));
        };
        let number = self.header.progress.step + 1;
        if !outcome.loss.is_finite() {
            return Err(self.diverged(number, &format!("the loss is {}", outcome.loss)));
        }
        if !outcome.grad_norm.is_finite() {
            return Err(self.diverged(number, &format!("the gradient norm is {}", outcome.grad_norm)));
        }
        let progress = &mut self.header.progress;
        progress.loader = serde_json::to_value(&queued.loader)
            .map_err(|e| Error::failure(format!("the position in the data cannot be saved ({e})")))?;
        progress.step = number;
        progress.images_seen += outcome.images;
        progress.packing.add(&queued.packing);
        self.warn_of_unreadable();
        let now = Instant::now();
        let seconds = (now - self.clock.since).as_secs_f64();
        self.clock.since = now;
        self.clock.steps += seconds;
        self.clock.waiting += outcome.idle.unwrap_or(queued.waiting);
        self.report(&outcome, queued.learning_rate, seconds)
    }

    fn report(&mut self, outcome: &StepOutcome, lr: f64, seconds: f64) -> Result<()> {
        let report = StepReport {
            step: self.header.progress.step,
            loss: outcome.loss,
            accuracy: outcome.accuracy,
            learning_rate: lr,
            grad_norm: outcome.grad_norm,
            images: outcome.images,
            tokens: outcome.tokens as u64,
            token_rows: outcome.budget as u64,
            flop: outcome.flops,
            seconds,
        };
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
                    ("train/grad_norm", report.grad_norm),
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
            let newest = report.newest.as_deref().unwrap_or_default();
            self.progress.message(&format!(
                "skipped {} unreadable images so far, the newest: {newest}",
                report.unreadable
            ));
        }
    }
}
