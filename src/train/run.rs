//! The training loop. All ranks run it with the same control flow: whatever decides on it is the same on all, or is
//! agreed on.

mod attention;
mod evaluation;
mod steps;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::checkpoint::{Header, Snapshot, load_header};
use super::distill::Teacher;
use super::engine::Engine;
use super::interrupt::Interrupt;
use super::journal::Journal;
use super::plan::RunPlan;
use super::run_dir::RunDir;
use super::start::mesh_line;
use super::terminal::quoted;
use crate::data::loader::{Loader, LoaderState};
use crate::data::packing::PackingStats;
use crate::data::source::Dataset;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::eval::attention::probe::AttentionProbe;
use crate::parallel::MeshGroups;
use crate::recipe::Recipe;

/// Where the time of a training goes.
#[derive(Clone, Copy, Debug)]
struct Clock {
    steps: f64,
    waiting: f64,
    /// Since when the next step to be collected counts.
    since: Instant,
}

/// What a run is made of.
pub(super) struct Parts {
    pub recipe: Recipe,
    pub dataset: Dataset,
    pub engine: Box<dyn Engine>,
    pub teacher: Option<Teacher>,
    pub loader: Loader,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub header: Header,
    pub run: RunDir,
    pub ranks: Rc<MeshGroups>,
}

/// A step that the engine has and that was not collected.
struct Queued {
    learning_rate: f64,
    packing: PackingStats,
    loader: LoaderState,
    /// Seconds spent waiting for its batches.
    waiting: f64,
}

/// A run with everything that it changes.
pub(super) struct Trainer {
    recipe: Recipe,
    dataset: Dataset,
    engine: Box<dyn Engine>,
    teacher: Option<Teacher>,
    loader: Loader,
    /// Of a run on texts.
    tokenizer: Option<Arc<Tokenizer>>,
    /// Whether it was told that texts are cut off.
    told_cut: bool,
    /// How far the collected steps have come.
    header: Header,
    journal: Journal,
    ranks: Rc<MeshGroups>,
    /// On the first rank of a run that logs attention.
    probe: Option<AttentionProbe>,
    queued: VecDeque<Queued>,
    interrupt: Interrupt,
    /// Whether the ranks have agreed to stop.
    stop: bool,
    /// Step of the newest checkpoint on disk.
    saved: Option<u64>,
    /// Unreadable images that were told, of all ranks.
    unreadable: u64,
    /// Seconds of this process's steps, and of these the ones in which the device waited for batches.
    clock: Clock,
    /// Whether the newest error is one that a save would only make permanent.
    diverged: bool,
    /// Whether the engine has failed: nobody knows then which step its weights are of.
    failed: bool,
    /// Whether the newest error is that of all ranks, which then are where they were before it.
    agreed: bool,
    /// The first failure to write down what has happened, until all ranks are told.
    unsaid: Option<Error>,
}

impl Trainer {
    /// Opens the run's files and tells what is about to be done.
    pub(super) fn new(parts: Parts, plan: &RunPlan, notes: &[String]) -> Result<Self> {
        let Parts { recipe, dataset, engine, teacher, loader, tokenizer, header, run, ranks } = parts;
        let done = header.progress.step;
        let journal = match ranks.is_first() {
            true => Journal::open(run, done, &recipe.train),
            false => Ok(Journal::silent(run)),
        };
        let journal = ranks.agree(journal)??;
        let probe = ranks.agree(attention::probe(&recipe, &dataset, &ranks))??;
        notes.iter().for_each(|note| journal.say(note));
        journal.say(&format!(
            "data              {}\nimages            {} to train on, {} to validate, {} classes",
            dataset.description,
            dataset.train.len(),
            dataset.validation.len(),
            dataset.classes.len()
        ));
        if dataset.validation.is_empty() {
            journal.say("evaluation        none: there are no validation images, and so no best checkpoint");
        }
        if recipe.train.log_attention && ranks.is_first() && probe.is_none() {
            journal.say("attention         not logged: no validation image is there to measure it on, or none can be read");
        }
        if let Some(teacher) = &teacher {
            journal.say(&teacher.to_string());
        }
        journal.say(&plan.to_string());
        if !ranks.is_alone() {
            journal.say(&mesh_line(&recipe, ranks.mesh));
        }
        let from = if done > 0 { format!(", from step {done}") } else { String::new() };
        journal.say(&format!("run               {}{from}\n", journal.path().display()));
        Ok(Self {
            interrupt: ranks.agree(Interrupt::install())??,
            stop: false,
            saved: (done > 0).then_some(done),
            unreadable: 0,
            clock: Clock { steps: 0.0, waiting: 0.0, since: Instant::now() },
            diverged: false,
            failed: false,
            agreed: false,
            unsaid: None,
            probe,
            queued: VecDeque::new(),
            recipe,
            dataset,
            engine,
            teacher,
            loader,
            tokenizer,
            told_cut: false,
            header,
            journal,
            ranks,
        })
    }

    /// Trains to the last step, or until it is interrupted.
    pub(super) fn train(mut self) -> Result<()> {
        let Err(error) = self.run() else { return Ok(()) };
        let whole = self.agreed || self.ranks.is_alone();
        let error = if whole { error } else { self.ranks.end(error) };
        let error = self.rescue(error, whole);
        if whole {
            // The first to leave ends the others: by then each has the error that it returns.
            let _ = self.ranks.world.barrier();
        }
        Err(error)
    }

    /// Saves what an error would lose, where the ranks are `whole` and can, and says how to go on.
    fn rescue(&mut self, error: Error, whole: bool) -> Error {
        let sound = |trainer: &Self| whole && !trainer.failed && !trainer.diverged;
        // What is under way belongs to the state that would be saved. Of a device that has failed, nothing comes.
        while sound(self) && !self.queued.is_empty() && self.collect_step().is_ok() {}
        let step = self.header.progress.step;
        if self.diverged {
            return error;
        }
        if step == 0 && matches!(error, Error::Usage(_)) {
            self.journal.discard();
            return error;
        }
        self.journal.finish();
        if step > 0 && self.saved != Some(step) && self.queued.is_empty() && sound(self) {
            // Where this fails too, the former checkpoint stands.
            let _ = self.save(false, false);
        }
        let run = quoted(self.journal.path());
        let mesh = if self.ranks.is_alone() { "" } else { " on any mesh" };
        let message = match self.saved_step() {
            Some(step) => {
                format!("{error}; step {step} is saved, continue{mesh} with: trencadis train --resume {run}")
            }
            None => format!("{error}; nothing is saved that could be resumed"),
        };
        match error {
            Error::Usage(_) => Error::Usage(message),
            Error::Failure(_) => Error::Failure(message),
        }
    }

    /// Step of the newest checkpoint. Where ranks end while one is being saved, none may have learned whether it was: so
    /// all look.
    fn saved_step(&self) -> Option<u64> {
        let there = load_header(&self.journal.run().last()).ok().map(|header| header.progress.step);
        self.saved.max(there)
    }

    fn run(&mut self) -> Result<()> {
        loop {
            if self.queued.is_empty() && self.between_steps()? {
                return Ok(());
            }
            while self.queued.len() < self.engine.depth() && self.goes_on()? {
                self.queue_step()?;
            }
            self.collect_step()?;
        }
    }

    /// Whether to stop, which one rank's interrupt asks of all.
    fn interrupted(&mut self) -> Result<bool> {
        self.stop = self.stop || self.ranks.any(self.interrupt.requested())?;
        Ok(self.stop)
    }

    /// `mine` where all ranks have one; the error of one of them is that of all.
    fn agree<T>(&mut self, mine: Result<T>) -> Result<T> {
        self.ranks.agree(mine)?.inspect_err(|_| self.agreed = true)
    }

    /// A failure to write down what has happened. Of several ranks the first alone writes, so it is kept until all can
    /// be told: the step itself is done everywhere.
    pub(super) fn keep_unsaid(&mut self, told: Result<()>) -> Result<()> {
        match told {
            Err(error) if !self.ranks.is_alone() => _ = self.unsaid.get_or_insert(error),
            told => told?,
        }
        Ok(())
    }

    /// Ends all ranks with the failure that is kept.
    fn tell_unsaid(&mut self) -> Result<()> {
        let unsaid = self.unsaid.take().map_or(Ok(()), Err);
        self.agree(unsaid)
    }

    /// Steps that have been queued, the collected ones among them.
    fn begun(&self) -> u64 {
        self.header.progress.step + self.queued.len() as u64
    }

    /// Whether nothing has to happen before another step is queued: what is evaluated or saved after a step must not
    /// have seen the next.
    fn goes_on(&mut self) -> Result<bool> {
        let config = &self.recipe.train;
        let begun = self.begun();
        let due = |every: u64| every > 0 && begun.is_multiple_of(every);
        let ends = begun >= config.steps
            || due(config.eval_every)
            || due(config.save_every)
            || due(config.keep_every);
        Ok(self.queued.is_empty() || !(ends || self.interrupted()?))
    }

    /// Evaluates and saves what is due, with nothing under way. Returns whether the training has ended.
    fn between_steps(&mut self) -> Result<bool> {
        let config = self.recipe.train.clone();
        let step = self.header.progress.step;
        let due = |every: u64| every > 0 && step > 0 && step.is_multiple_of(every);
        let last = step >= config.steps;
        let mut improved = None;
        // An evaluation that an interrupt prevented is still owed after a resume.
        let check = due(config.eval_every) || last;
        let nothing_to_evaluate = self.dataset.validation.is_empty();
        if check && !nothing_to_evaluate && self.header.progress.evaluated != Some(step) {
            improved = self.evaluate()?;
        }
        self.tell_unsaid()?;
        let stop = self.interrupted()?;
        if stop && step > 0 {
            self.journal.message("stopping once this step is saved; interrupt again to stop at once");
        }
        let keep = due(config.keep_every);
        let unsaved = self.saved != Some(step)
            && (stop || keep || due(config.save_every) || check && nothing_to_evaluate);
        if step > 0 && (improved.is_some() || unsaved) {
            self.save(improved == Some(true), keep)?;
        }
        if stop {
            self.stopped();
        } else if last {
            self.finish()?;
        }
        self.clock.since = Instant::now();
        Ok(stop || last)
    }

    fn save(&mut self, improved: bool, keep: bool) -> Result<()> {
        let state = self.engine.parts()?;
        let snapshot = Snapshot { header: &self.header, state, kind: self.recipe.train.save_as };
        let saved = self.journal.save(&snapshot, improved, keep)?;
        // A checkpoint that is not finite would replace the last good one.
        if !saved.inspect_err(|_| self.agreed = true)? {
            return Err(self.diverged(self.header.progress.step, "the weights are no longer finite"));
        }
        self.saved = Some(self.header.progress.step);
        Ok(())
    }

    /// The error of a step that is not finite, which all ranks find out.
    fn diverged(&mut self, step: u64, what: &str) -> Error {
        (self.diverged, self.agreed) = (true, true);
        let checkpoint = match self.saved {
            Some(step) => {
                format!("the last good checkpoint is {} of step {step}", self.journal.run().last().display())
            }
            None => "no checkpoint had been saved yet".into(),
        };
        Error::failure(format!(
            "step {step}: {what}; {checkpoint}; lower train.lr, or raise train.warmup, and start again"
        ))
    }

    fn stopped(&mut self) {
        self.journal.finish();
        let (run, step) = (quoted(self.journal.path()), self.header.progress.step);
        if step == 0 {
            self.journal.say("stopped before the first step; nothing is saved");
            self.journal.discard();
        } else {
            self.journal
                .say(&format!("stopped after step {step}; continue with: trencadis train --resume {run}"));
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.journal.finish();
        let run = quoted(self.journal.path());
        let mut lines = String::new();
        lines += &format!("\npacking           {}", self.header.progress.packing);
        if self.clock.steps > 0.0 {
            let waiting = 100.0 * self.clock.waiting / self.clock.steps;
            lines += &format!("\nwaited for data   {waiting:.1} % of the training time");
        }
        let mut kept = "last checkpoint";
        if let Some(best) = self.header.progress.best {
            let (percent, step) = (100.0 * best.metric, best.step);
            lines +=
                &format!("\nbest              {percent:.2} % of the validation images right, at step {step}");
            kept = "best and last checkpoint";
        }
        lines += &format!("\nsaved             {run}: {kept}, metrics.jsonl, TensorBoard events");
        let next = if self.dataset.validation.is_empty() { "predict" } else { "eval" };
        let images = if next == "predict" { " IMAGE..." } else { "" };
        self.journal.tell(&format!("{lines}\nnext              trencadis {next} {run}{images}"))
    }
}
