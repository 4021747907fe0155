//! What could not be read, and when it is too much.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{Item, LoadedBatch};
use crate::error::{Error, Result};

/// Unreadable files that a report names.
const EXAMPLES: usize = 10;
/// Fewer draws than this are judged as if they were so many (or the whole set, where it is smaller): a few
/// damaged files that happen to come first say nothing about the rest.
const JUDGED: u64 = 1000;
/// Images that could not be read since the loader started. Each counts once, however many epochs
/// draw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderReport {
    /// Images drawn.
    pub drawn: u64,
    /// Images among them that could not be read.
    pub unreadable: u64,
    /// Names and causes of the first ten.
    pub examples: Vec<String>,
    /// Name and cause of the one that was found last.
    pub newest: Option<String>,
}

impl LoaderReport {
    /// Share of the drawn images that could not be read, 0..1.
    pub fn share(&self) -> f64 {
        self.unreadable as f64 / self.drawn.max(1) as f64
    }
}

/// Keeps the report, and judges the last draws.
pub(super) struct Watch {
    pub report: LoaderReport,
    drawn: Vec<bool>,
    unreadable: Vec<bool>,
    /// Draws and failures of the latest batches, which reach back over `window` draws; a set that
    /// breaks in the middle of a run is noticed however long it went well before.
    recent: VecDeque<(u64, u64)>,
    window: u64,
    /// Draws that a judgement assumes at least.
    least: u64,
    /// `data.max_unreadable`.
    limit: f64,
}

impl Watch {
    /// For a rank that loads one of `parts` parts, where each of `samples` comes `repeats` times in a row.
    pub fn new(samples: usize, repeats: usize, parts: usize, limit: f64) -> Self {
        let draws = |samples: u64| (samples * repeats as u64 / parts as u64).max(1);
        Self {
            report: LoaderReport::default(),
            drawn: vec![false; samples],
            unreadable: vec![false; samples],
            recent: VecDeque::new(),
            window: draws(JUDGED.max(samples as u64)),
            least: draws(JUDGED.min(samples as u64)),
            limit,
        }
    }

    pub fn record(&mut self, item: &Item) {
        let LoadedBatch { batch, unreadable, .. } = &item.loaded;
        let in_batch = batch.sample_ids[..batch.images].iter().copied();
        for sample in in_batch.chain(unreadable.iter().map(|(sample, _)| *sample)) {
            let seen = &mut self.drawn[sample as usize];
            self.report.drawn += u64::from(!std::mem::replace(seen, true));
        }
        for (sample, cause) in unreadable {
            if std::mem::replace(&mut self.unreadable[*sample as usize], true) {
                continue;
            }
            self.report.unreadable += 1;
            if self.report.examples.len() < EXAMPLES {
                self.report.examples.push(cause.clone());
            }
            self.report.newest = Some(cause.clone());
        }
        self.recent.push_back((item.drawn, unreadable.len() as u64));
        let mut drawn: u64 = self.recent.iter().map(|batch| batch.0).sum();
        while let Some(oldest) = self.recent.front()
            && drawn - oldest.0 >= self.window
        {
            drawn -= oldest.0;
            self.recent.pop_front();
        }
    }

    /// Fails if of the last draws too many were unreadable.
    pub fn check(&self) -> Result<()> {
        let (drawn, failed) =
            self.recent.iter().fold((0, 0), |sum, batch| (sum.0 + batch.0, sum.1 + batch.1));
        let share = failed as f64 / drawn.max(self.least) as f64;
        if share <= self.limit {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{failed} of the last {drawn} images cannot be read, more than data.max_unreadable = {} allows; the newest \
             is {}; repair the files in place, or start again with a larger data.max_unreadable",
            self.limit,
            self.report.newest.as_deref().unwrap_or("unknown")
        )))
    }
}
