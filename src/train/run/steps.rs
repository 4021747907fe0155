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
    /// Queues the next step, batch by batch as they are loaded; steps that have run by then are counted, unless other
    /// ranks would have to count with this one.
    pub(super) fn queue_step(&mut self) -> Result<()> {
        let batches = self.recipe.train.accumulate / self.ranks.mesh.data();
        let (mut packing, mut weight, mut waiting) = (PackingStats::default(), 0.0, 0.0);
        for number in 1..=batches {
            let begun = Instant::now();
            let loaded = match self.unsaid.take() {
                Some(unsaid) => Err(unsaid),
                None => self.loader.next_batch(),
            };
            waiting += begun.elapsed().as_secs_f64();
            let LoadedBatch { mut batch, state_after, stats, unmixed, cut, .. } = self.agree(loaded)?;
            self.tell_cut(&cut);
            self.ranks.leave_out_unread(&mut batch.weights, &unmixed)?;
            if let Some(teacher) = &mut self.teacher {
                let taught = teacher.teach(&mut batch);
                if let Err(Error::Failure(_)) = &taught {
                    self.failed = true;
                    taught?;
                } else {
                    self.agree(taught)?;
                }
            }
            packing.add(&stats);
            weight += batch.weights.iter().map(|w| f64::from(*w)).sum::<f64>();
            if number < batches {
                self.engine.add(&batch, None).inspect_err(|_| self.failed = true)?;
                while self.ranks.is_alone() && self.engine.is_ready() {
                    self.collect_step()?;
                }
                continue;
            }
            self.check_read(weight)?;
            let learning_rate = learning_rate(&self.recipe.train, self.begun());
            self.engine.add(&batch, Some(learning_rate)).inspect_err(|_| self.failed = true)?;
            self.queued.push_back(Queued { learning_rate, packing, loader: state_after, waiting });
            return Ok(());
        }
        Err(Error::usage("train.accumulate is 0, expected at least 1"))
    }

    /// Tells of the first text that is cut off.
    fn tell_cut(&mut self, cut: &[String]) {
        if let (Some(first), false) = (cut.first(), self.told_cut) {
            self.told_cut = true;
            self.journal.message(&format!(
                "{first}: the text is longer than text.max_tokens = {} and was cut off there, as all longer ones are",
                self.recipe.text.max_tokens
            ));
        }
    }

    /// Tells of images that could not be read, on whatever rank, and fails where the step has no other. `weight` is
    /// that of this rank's images of the step.
    fn check_read(&mut self, weight: f64) -> Result<()> {
        let (mut weight, mut unreadable) = ([weight], [self.loader.report().unreadable]);
        self.ranks.sum_over_data(&mut weight)?;
        self.ranks.sum_over_data(&mut unreadable)?;
        let (weight, unreadable) = (weight[0], unreadable[0]);
        if unreadable == self.unreadable && weight > 0.0 {
            return Ok(());
        }
        let newest = self.ranks.first_text(self.loader.report().newest.as_deref())?.unwrap_or_default();
        if unreadable > self.unreadable {
            self.unreadable = unreadable;
            self.journal
                .message(&format!("skipped {unreadable} unreadable images so far, the newest: {newest}"));
        }
        if weight > 0.0 {
            return Ok(());
        }
        self.agree(Err(Error::failure(format!("no image of the step could be read; the last is {newest}"))))
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
        let every = self.recipe.train.log_every.max(1);
        let logged = report.step.is_multiple_of(every) || report.step == self.recipe.train.steps;
        let told = self.journal.step(&report, logged);
        self.keep_unsaid(told)
    }
}
