//! In which order the samples of a source are visited.

use crate::data::draw::Draw;
use crate::rng::{Purpose, Stream};

/// An unbiased integer in `0..n` (Lemire, "Fast random integer generation in an interval", 2019).
pub(crate) fn below(stream: &mut Stream, n: u32) -> u32 {
    let mut product = u64::from(stream.bits()) * u64::from(n);
    if (product as u32) < n {
        let threshold = n.wrapping_neg() % n;
        while (product as u32) < threshold {
            product = u64::from(stream.bits()) * u64::from(n);
        }
    }
    (product >> 32) as u32
}

/// The order of one epoch: a Philox shuffle of `(seed, epoch)`, or the source's own order.
///
/// Under repeated augmentation each sample comes `repeats` times in a row, and the epoch ends after as many draws as
/// there are samples: of those that come late in the order it has none (DeiT's `RASampler`).
#[derive(Clone, Debug)]
pub struct Order {
    shuffled: Option<Vec<u32>>,
    epoch: u64,
    repeats: usize,
}

impl Order {
    /// The order of `epoch` over `samples` samples (below 2^32), each `repeats` (≥ 1) times in a row.
    pub fn new(samples: usize, shuffle: Option<u64>, epoch: u64, repeats: usize) -> Self {
        let shuffled = shuffle.map(|seed| {
            let mut order: Vec<u32> = (0..samples as u32).collect();
            let mut stream = Stream::new(seed, epoch, 0, Purpose::Shuffle);
            for i in (1..samples).rev() {
                order.swap(i, below(&mut stream, i as u32 + 1) as usize);
            }
            order
        });
        Self { shuffled, epoch, repeats }
    }

    /// The draw at `position`, before which the run has had `seen`. Its epoch is that of the keys of its random numbers,
    /// which no other draw of the sample shares.
    pub fn draw(&self, position: usize, seen: u64) -> Draw {
        let (place, repeat) = (position / self.repeats, position % self.repeats);
        let sample = self.shuffled.as_ref().map_or(place as u64, |order| u64::from(order[place]));
        Draw { epoch: self.epoch * self.repeats as u64 + repeat as u64, sample, seen }
    }
}
