//! A sample's turn in a run, where planning stands, and the sizes of the images whose turn it is.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Serialize};

use crate::data::source::Source;
use crate::error::{Error, Result};

/// Sizes for which a thread of its own pays.
const MIN_SHARE: usize = 16;

/// One turn of a sample. What is random about it is keyed by `epoch` and `sample`; `seen` is its place in the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "[u64; 3]", try_from = "Vec<u64>")]
pub struct Draw {
    /// Epoch of the keys of its random numbers, `augment.repeats` of them to one pass over the set.
    pub epoch: u64,
    /// Index in the source.
    pub sample: u64,
    /// Draws of the run before it, those without a readable size included: n of the schedules over images seen.
    pub seen: u64,
}

impl From<Draw> for [u64; 3] {
    fn from(draw: Draw) -> Self {
        [draw.epoch, draw.sample, draw.seen]
    }
}

/// Checkpoints from before there were schedules hold (epoch, sample) alone, and a recipe that follows no `seen`.
impl TryFrom<Vec<u64>> for Draw {
    type Error = String;

    fn try_from(values: Vec<u64>) -> std::result::Result<Self, String> {
        match values[..] {
            [epoch, sample] => Ok(Self { epoch, sample, seen: 0 }),
            [epoch, sample, seen] => Ok(Self { epoch, sample, seen }),
            _ => Err(format!("a pending draw holds {} numbers instead of 3", values.len())),
        }
    }
}

/// Where planning stands between two batches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannerState {
    /// Epoch of the next draw.
    pub epoch: u64,
    /// Position in that epoch's order of the next draw.
    pub cursor: u64,
    /// Samples of the source, to notice a set that changed.
    pub samples: u64,
    /// [`fingerprint`](crate::data::source::fingerprint) of the source, to notice one that changed and kept its size.
    pub fingerprint: u64,
    /// Drawn and not yet in a batch: the open bins. Earlier checkpoints have the window here too, as the last.
    pub pending: Vec<Vec<Draw>>,
    /// Drawn and not yet in a bin or a batch.
    #[serde(default)]
    pub window: Vec<Draw>,
}

impl PlannerState {
    /// All draws that wait for a batch.
    pub fn waiting(&self) -> impl Iterator<Item = &Draw> {
        self.pending.iter().flatten().chain(&self.window)
    }
}

/// Height and width of the images in the order of the draws, read by `workers` threads of its own: the operations'
/// pool is busy with training.
pub(crate) fn read_sizes(
    source: &dyn Source,
    draws: Vec<Draw>,
    workers: usize,
) -> Vec<(Draw, Result<(usize, usize)>)> {
    let share = draws.len().div_ceil(workers.max(1)).max(MIN_SHARE);
    let read = |draws: &[Draw]| draws.iter().map(|&draw| (draw, read_size(source, draw))).collect::<Vec<_>>();
    let mut chunks = draws.chunks(share);
    let own = chunks.next().unwrap_or_default();
    std::thread::scope(|scope| {
        let handles: Vec<_> = chunks.map(|draws| scope.spawn(move || read(draws))).collect();
        let mut sized = read(own);
        for handle in handles {
            sized.extend(handle.join().unwrap_or_default());
        }
        sized
    })
}

fn read_size(source: &dyn Source, draw: Draw) -> Result<(usize, usize)> {
    let index = draw.sample as usize;
    // A header reader that panics on a damaged file costs that file, not the run.
    let size = catch_unwind(AssertUnwindSafe(|| source.size(index)))
        .unwrap_or_else(|_| Err(Error::usage(format!("{}: the decoder panicked", source.name(index)))))?;
    if size.0 == 0 || size.1 == 0 {
        let (name, (height, width)) = (source.name(index), size);
        return Err(Error::usage(format!("{name}: an image of {height}x{width} pixels is empty")));
    }
    Ok(size)
}
