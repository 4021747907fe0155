//! In which order the samples of a source are visited.

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
#[derive(Clone, Debug)]
pub struct Order {
    shuffled: Option<Vec<u32>>,
}

impl Order {
    /// The order of `epoch` over `samples` samples (below 2^32).
    pub fn new(samples: usize, shuffle: Option<u64>, epoch: u64) -> Self {
        let shuffled = shuffle.map(|seed| {
            let mut order: Vec<u32> = (0..samples as u32).collect();
            let mut stream = Stream::new(seed, epoch, 0, Purpose::Shuffle);
            for i in (1..samples).rev() {
                order.swap(i, below(&mut stream, i as u32 + 1) as usize);
            }
            order
        });
        Self { shuffled }
    }

    /// The sample at `position`.
    pub fn sample(&self, position: usize) -> usize {
        self.shuffled.as_ref().map_or(position, |order| order[position] as usize)
    }
}
