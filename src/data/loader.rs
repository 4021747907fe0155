//! Prepares batches ahead of training: one thread plans and lays out in order, several decode, two
//! finished batches wait in a queue. Plain threads, so that the operations' pool is left to the
//! operations.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};

use crate::data::assemble::Assembler;
use crate::data::batch::PackedBatch;
use crate::data::packing::{PackingSettings, PackingStats};
use crate::data::planner::{Planner, PlannerState};
use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::models::recipe::Recipe;

/// Batches that wait to be taken.
const QUEUE: usize = 2;
/// Unreadable files that a report names.
const EXAMPLES: usize = 10;
/// Images after which the share of unreadable ones is judged.
const JUDGED: u64 = 100;

/// Where loading stands after a batch, for [`Loader::train`].
pub type LoaderState = PlannerState;

/// A batch with what a loop wants to know about it.
#[derive(Clone, Debug)]
pub struct LoadedBatch {
    /// The batch.
    pub batch: PackedBatch,
    /// Where loading stands after it: a run resumed from here begins with the next batch.
    pub state_after: LoaderState,
    /// How well it is filled.
    pub stats: PackingStats,
    /// "name: cause" of the images that could not be read for it.
    pub unreadable: Vec<String>,
}

/// Images that could not be read since the loader started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderReport {
    /// Images drawn.
    pub drawn: u64,
    /// Images among them that could not be read.
    pub unreadable: u64,
    /// "name: cause" of the first ten.
    pub examples: Vec<String>,
}

impl LoaderReport {
    /// Share of the drawn images that could not be read, 0..1.
    pub fn share(&self) -> f64 {
        self.unreadable as f64 / self.drawn.max(1) as f64
    }

    fn record(&mut self, images: usize, skipped: usize, unreadable: &[String]) {
        self.drawn += (images + skipped) as u64;
        self.unreadable += unreadable.len() as u64;
        let room = EXAMPLES.saturating_sub(self.examples.len());
        self.examples.extend(unreadable.iter().take(room).cloned());
    }

    fn check(&self, limit: f64, judged: u64) -> Result<()> {
        if self.drawn < judged || self.share() <= limit {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{} of {} images ({:.1} %) cannot be read, more than data.max_unreadable = {limit} allows; \
             the first is {}; repair the files or raise data.max_unreadable",
            self.unreadable,
            self.drawn,
            100.0 * self.share(),
            self.examples.first().map_or("unknown", String::as_str)
        )))
    }
}

/// What travels through the queue.
struct Item {
    loaded: LoadedBatch,
    /// Samples passed over in planning; part of `loaded.unreadable`.
    skipped: usize,
}

/// Endless batches of shuffled training images.
pub struct Loader {
    pipeline: Pipeline,
    /// The next batch, where [`Loader::ready`] has waited for it.
    first: Option<LoadedBatch>,
}

/// One pass over the images of a source, in order: an iterator over its batches.
pub struct EvalLoader {
    pipeline: Pipeline,
}

impl Loader {
    /// Starts loading at the beginning, or after the batch whose `state_after` is given. Fails on an
    /// empty source, on a recipe that cannot be carried out, and on a state of another set.
    pub fn train(source: Arc<dyn Source>, recipe: &Recipe, state: Option<&LoaderState>) -> Result<Self> {
        let settings = PackingSettings::train(recipe)?;
        let pipeline = Pipeline::start(source, recipe, settings, recipe.data.flip, state)?;
        Ok(Self { pipeline, first: None })
    }

    /// Waits until the next batch is there, so that a set that cannot be read is told before a run
    /// begins. Fails as [`Loader::next_batch`].
    pub fn ready(&mut self) -> Result<()> {
        if self.first.is_none() {
            self.first = Some(self.next_batch()?);
        }
        Ok(())
    }

    /// Starts one pass in order at `resolution` pixels (0 takes the recipe's): no token dropping, no
    /// flips; the last batch is partly filled.
    pub fn eval(source: Arc<dyn Source>, recipe: &Recipe, resolution: usize) -> Result<EvalLoader> {
        let settings = PackingSettings::eval(recipe, resolution)?;
        Ok(EvalLoader { pipeline: Pipeline::start(source, recipe, settings, false, None)? })
    }

    /// The next batch. Fails once the share of unreadable images exceeds `data.max_unreadable`.
    pub fn next_batch(&mut self) -> Result<LoadedBatch> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        self.pipeline.next()?.ok_or_else(|| Error::failure("image loading ended before training did"))
    }

    /// Images that could not be read so far.
    pub fn report(&self) -> &LoaderReport {
        &self.pipeline.report
    }
}

impl EvalLoader {
    /// Images that could not be read so far.
    pub fn report(&self) -> &LoaderReport {
        &self.pipeline.report
    }
}

impl Iterator for EvalLoader {
    type Item = Result<LoadedBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.pipeline.next().transpose()
    }
}

/// The preparing thread and what it has delivered.
struct Pipeline {
    queue: Option<Receiver<Result<Item>>>,
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    report: LoaderReport,
    max_unreadable: f64,
    judged: u64,
}

impl Pipeline {
    fn start(
        source: Arc<dyn Source>,
        recipe: &Recipe,
        settings: PackingSettings,
        flip: bool,
        state: Option<&LoaderState>,
    ) -> Result<Self> {
        let threads = match recipe.data.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let judged = JUDGED.min(source.len() as u64);
        let planner = Planner::new(source.clone(), settings, state)?;
        let (send, queue) = bounded(QUEUE);
        let stop = Arc::new(AtomicBool::new(false));
        let (channels, stopped) = (recipe.model.channels, stop.clone());
        let thread = std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || prepare(source.as_ref(), planner, channels, flip, threads, &send, &stopped))
            .map_err(|e| Error::failure(format!("cannot start the loading thread: {e}")))?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
            stop,
            report: LoaderReport::default(),
            max_unreadable: recipe.data.max_unreadable,
            judged,
        })
    }

    fn next(&mut self) -> Result<Option<LoadedBatch>> {
        let Some(queue) = &self.queue else { return Ok(None) };
        let Ok(item) = queue.recv() else {
            self.queue = None;
            let ended = self.thread.take().map(JoinHandle::join);
            if let Some(Err(_)) = ended {
                return Err(Error::failure("the loading thread panicked"));
            }
            self.report.check(self.max_unreadable, 1)?;
            return Ok(None);
        };
        let Item { loaded, skipped } = item?;
        self.report.record(loaded.batch.images, skipped, &loaded.unreadable);
        self.report.check(self.max_unreadable, self.judged)?;
        Ok(Some(loaded))
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        // Without a receiver a blocked send returns, so the thread ends within one image.
        self.stop.store(true, Ordering::Relaxed);
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn prepare(
    source: &dyn Source,
    mut planner: Planner,
    channels: usize,
    flip: bool,
    threads: usize,
    queue: &Sender<Result<Item>>,
    stop: &AtomicBool,
) {
    let mut assembler = Assembler::new(source, planner.settings().clone(), channels, flip, threads);
    loop {
        let plan = match planner.next_batch() {
            Ok(Some(plan)) => plan,
            Ok(None) => return,
            Err(error) => {
                let _ = queue.send(Err(error));
                return;
            }
        };
        let state_after = planner.state();
        let stats = PackingStats::of(&plan, planner.settings());
        let (batch, failed) = assembler.assemble(&plan, stop);
        let skipped = plan.skipped.len();
        let mut unreadable = plan.skipped;
        unreadable.extend(failed);
        let item = Item { loaded: LoadedBatch { batch, state_after, stats, unreadable }, skipped };
        if stop.load(Ordering::Relaxed) || queue.send(Ok(item)).is_err() {
            return;
        }
    }
}
