//! Prepares batches ahead of training: one thread plans and lays out in order, several decode, two
//! finished batches wait in a queue. Plain threads, so that the operations' pool is left to the
//! operations.
//!
//! Of several data ranks each plans every batch, which is cheap and the same everywhere, and decodes only those that
//! it computes ([`Share`]).

mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

pub use watch::LoaderReport;
use watch::Watch;

use crate::data::assemble::{Assembled, Assembler};
use crate::data::balance::{Cost, Room, check_deals, deal};
use crate::data::batch::PackedBatch;
use crate::data::packing::{BatchPlan, PackingSettings, PackingStats};
use crate::data::planner::{Planner, PlannerState};
use crate::data::source::Source;
use crate::data::texts::TextSettings;
use crate::data::tokenizer::Tokenizer;
use crate::data::view::ViewSettings;
use crate::error::{Error, Result};
use crate::recipe::{MixConfig, Recipe};

/// Batches that wait to be taken.
pub const READY: usize = 2;

/// Where loading stands after a batch, for [`Loader::train`].
pub type LoaderState = PlannerState;

/// Which of the batches a data rank loads: part `part` of `parts`, of every step in training and of every `parts`
/// batches in an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// This rank's, from 0.
    pub part: usize,
    /// Number of data ranks.
    pub parts: usize,
}

impl Share {
    /// All batches.
    pub const ALL: Self = Self { part: 0, parts: 1 };
}

/// A batch with what a loop wants to know about it.
#[derive(Clone, Debug)]
pub struct LoadedBatch {
    /// The batch.
    pub batch: PackedBatch,
    /// Where loading stands after it: a run resumed from here begins with the next batch. Of several ranks, where it
    /// stands after what all of them load at a time, such as a step.
    pub state_after: LoaderState,
    /// How well it is filled. Of several ranks, how well all their batches are, with the last of this one's; the
    /// others have none.
    pub stats: PackingStats,
    /// Samples that could not be read for it, with the cause, which names the file.
    pub unreadable: Vec<(u64, String)>,
    /// Slots whose image was to be mixed with one of these, and is as it is.
    pub unmixed: Vec<usize>,
    /// Names of samples whose text was cut off at `text.max_tokens`.
    pub cut: Vec<String>,
}

/// What travels through the queue.
struct Item {
    loaded: LoadedBatch,
    /// Samples drawn in planning, and to be mixed into others.
    drawn: u64,
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
        Self::train_share(source, recipe, state, Share::ALL)
    }

    /// The same for one of several data ranks, which takes an equal part of the `train.accumulate` batches of every
    /// step: whatever the number of ranks, they are the same in all, but for images that change places to give every
    /// rank as much to do ([`balance`](super::balance)). Fails too where the batches cannot be dealt evenly.
    pub fn train_share(
        source: Arc<dyn Source>,
        recipe: &Recipe,
        state: Option<&LoaderState>,
        share: Share,
    ) -> Result<Self> {
        Self::train_texts(source, recipe, state, share, None)
    }

    /// The same with the tokenizer that the texts are told by; that of the recipe where there is none.
    pub fn train_texts(
        source: Arc<dyn Source>,
        recipe: &Recipe,
        state: Option<&LoaderState>,
        share: Share,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<Self> {
        let settings = PackingSettings::train(recipe)?;
        let texts = texts(recipe, settings.slots, tokenizer)?;
        check_deals(recipe.train.accumulate, share.parts)?;
        let rounds = Rounds {
            share,
            // Alone, each batch is a round of its own, after which a run can be resumed.
            batches: if share.parts == 1 { 1 } else { recipe.train.accumulate },
            cost: Some(Cost::of(recipe)?),
        };
        let pipeline =
            Pipeline::start(source, recipe, settings, ViewSettings::train(recipe), state, rounds, texts)?;
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
        Self::eval_share(source, recipe, resolution, Share::ALL)
    }

    /// The same for one of several data ranks, to which the batches are dealt in turn. All ranks get the same number:
    /// where they do not come out even, the last ones get a batch without images.
    pub fn eval_share(
        source: Arc<dyn Source>,
        recipe: &Recipe,
        resolution: usize,
        share: Share,
    ) -> Result<EvalLoader> {
        Self::eval_as(source, recipe, PackingSettings::eval(recipe, resolution)?, share)
    }

    /// The same with other settings than those of the recipe, such as a bound on the patches of an image.
    pub fn eval_as(
        source: Arc<dyn Source>,
        recipe: &Recipe,
        settings: PackingSettings,
        share: Share,
    ) -> Result<EvalLoader> {
        let rounds = Rounds { share, batches: share.parts, cost: None };
        let view = ViewSettings::eval(recipe);
        Ok(EvalLoader { pipeline: Pipeline::start(source, recipe, settings, view, None, rounds, None)? })
    }

    /// One pass over the images at the recipe's resolution, with their texts.
    pub fn eval_texts(
        source: Arc<dyn Source>,
        recipe: &Recipe,
        tokenizer: Arc<Tokenizer>,
    ) -> Result<EvalLoader> {
        let settings = PackingSettings::eval(recipe, 0)?;
        let texts = texts(recipe, settings.slots, Some(tokenizer))?;
        let (view, rounds) =
            (ViewSettings::eval(recipe), Rounds { share: Share::ALL, batches: 1, cost: None });
        Ok(EvalLoader { pipeline: Pipeline::start(source, recipe, settings, view, None, rounds, texts)? })
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
        &self.pipeline.watch.report
    }
}

impl EvalLoader {
    /// Images that could not be read so far.
    pub fn report(&self) -> &LoaderReport {
        &self.pipeline.watch.report
    }
}

impl Iterator for EvalLoader {
    type Item = Result<LoadedBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.pipeline.next().transpose()
    }
}

/// How the texts of a recipe that has any become tokens.
fn texts(recipe: &Recipe, slots: usize, tokenizer: Option<Arc<Tokenizer>>) -> Result<Option<TextSettings>> {
    if !recipe.text.is_on() {
        return Ok(None);
    }
    let tokenizer = match tokenizer {
        Some(tokenizer) => tokenizer,
        None => Arc::new(Tokenizer::open(&recipe.text.tokenizer)?),
    };
    Ok(Some(TextSettings::new(recipe, slots, tokenizer)))
}

/// How batches are shared out: so many at a time, of which this rank takes its part.
#[derive(Clone, Copy)]
struct Rounds {
    share: Share,
    batches: usize,
    /// By cost; without one, in turn.
    cost: Option<Cost>,
}

impl Rounds {
    /// This rank's batches of a round, as many as the others have.
    fn take(&self, mut plans: Vec<BatchPlan>, settings: &PackingSettings) -> Vec<BatchPlan> {
        let Share { part, parts } = self.share;
        plans.resize_with(self.batches, BatchPlan::default);
        match self.cost {
            Some(cost) => {
                let room = Room { tokens: settings.packing.tokens, slots: settings.slots };
                deal(plans, parts, cost, room).swap_remove(part)
            }
            None => plans.into_iter().skip(part).step_by(parts).collect(),
        }
    }
}

/// The preparing thread and what it has delivered.
struct Pipeline {
    queue: Option<Receiver<Result<Item>>>,
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    watch: Watch,
}

impl Pipeline {
    fn start(
        source: Arc<dyn Source>,
        recipe: &Recipe,
        settings: PackingSettings,
        view: ViewSettings,
        state: Option<&LoaderState>,
        rounds: Rounds,
        texts: Option<TextSettings>,
    ) -> Result<Self> {
        let limit = recipe.data.max_unreadable;
        let watch = Watch::new(source.len(), settings.repeats, rounds.share.parts, limit);
        let planner = Planner::new(source.clone(), settings, state)?;
        let (send, queue) = bounded(READY);
        let stop = Arc::new(AtomicBool::new(false));
        let mix = if planner.settings().training { recipe.mix.clone() } else { MixConfig::default() };
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || {
                let settings = planner.settings().clone();
                let threads = settings.workers;
                let assembler =
                    Assembler::new(source.as_ref(), settings, view, mix, threads).with_texts(texts);
                prepare(planner, assembler, rounds, &send, &stopped);
            })
            .map_err(|e| Error::failure(format!("cannot start the loading thread: {e}")))?;
        Ok(Self { queue: Some(queue), thread: Some(thread), stop, watch })
    }

    fn next(&mut self) -> Result<Option<LoadedBatch>> {
        let Some(queue) = &self.queue else { return Ok(None) };
        let Ok(item) = queue.recv() else {
            self.queue = None;
            let ended = self.thread.take().map(JoinHandle::join);
            if let Some(Err(_)) = ended {
                return Err(Error::failure("the loading thread panicked"));
            }
            self.watch.check()?;
            return Ok(None);
        };
        let item = item?;
        self.watch.record(&item);
        self.watch.check()?;
        Ok(Some(item.loaded))
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

/// Plans, shares out and assembles round after round, until the pass or the receiver ends.
fn prepare(
    mut planner: Planner,
    mut assembler: Assembler<'_>,
    rounds: Rounds,
    queue: &Sender<Result<Item>>,
    stop: &AtomicBool,
) {
    loop {
        let (mut plans, mut stats) = (Vec::with_capacity(rounds.batches), PackingStats::default());
        while plans.len() < rounds.batches {
            match planner.next_batch() {
                Ok(Some(plan)) => {
                    stats.add(&PackingStats::of(&plan, planner.settings()));
                    plans.push(plan);
                }
                Ok(None) => break,
                Err(error) => {
                    let _ = queue.send(Err(error));
                    return;
                }
            }
        }
        if plans.is_empty() {
            return;
        }
        let state_after = planner.state();
        let plans = rounds.take(plans, planner.settings());
        let last = plans.len() - 1;
        for (i, plan) in plans.into_iter().enumerate() {
            let Assembled { batch, unreadable: failed, unmixed, partners, cut } =
                assembler.assemble(&plan, stop);
            let cut = cut.into_iter().map(|sample| assembler.name(sample)).collect();
            let stats = if i == last { std::mem::take(&mut stats) } else { PackingStats::default() };
            let drawn = plan.drawn + partners as u64;
            let mut unreadable = plan.skipped;
            unreadable.extend(failed);
            let loaded =
                LoadedBatch { batch, state_after: state_after.clone(), stats, unreadable, unmixed, cut };
            if stop.load(Ordering::Relaxed) || queue.send(Ok(Item { loaded, drawn })).is_err() {
                return;
            }
        }
    }
}
