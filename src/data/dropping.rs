//! Which tokens of an image are kept during training: a rate per image, then a uniform choice
//! (NaViT, section 3.3 and appendix A.4). Prefix tokens are never dropped.

use rand::RngExt;
use rand_distr::Beta;

use crate::data::order::below;
use crate::recipe::{DropConfig, DropKind};
use crate::rng::{Purpose, Stream};

/// The drop rate of one image and the stream that then chooses its tokens. Depends on
/// (seed, epoch, sample) alone, so that planning and loading agree without sharing anything.
#[derive(Clone, Debug)]
pub struct TokenDrop {
    rate: f64,
    stream: Stream,
}

impl TokenDrop {
    /// Draws the rate of `sample` in `epoch`.
    pub fn new(config: &DropConfig, seed: u64, epoch: u64, sample: u64) -> Self {
        let mut stream = Stream::new(seed, epoch, sample, Purpose::TokenDrop);
        let rate = match config.kind {
            DropKind::None => 0.0,
            DropKind::Constant => config.mean,
            DropKind::Beta => beta(config.mean, config.max, &mut stream),
        };
        Self { rate, stream }
    }

    /// The share of tokens to be dropped.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// Tokens kept of `patches`: the rounded share, at least one.
    pub fn kept(&self, patches: usize) -> usize {
        (((1.0 - self.rate) * patches as f64).round() as usize).max(1)
    }

    /// The largest number of patches of which at most `limit` (≥ 1) are kept.
    pub fn longest(&self, limit: usize) -> usize {
        // A rate next to 1 keeps one token of anything; 2^40 patches stand for no limit.
        let bound = ((limit as f64 + 0.5) / (1.0 - self.rate)).min((1u64 << 40) as f64);
        let mut patches = bound as usize;
        while patches > 1 && self.kept(patches) > limit {
            patches -= 1;
        }
        patches.max(1)
    }

    /// Indices of the kept tokens among `patches` in raster order, drawn uniformly without
    /// replacement (partial Fisher–Yates).
    pub fn indices(mut self, patches: usize) -> Vec<u32> {
        let kept = self.kept(patches);
        let mut all: Vec<u32> = (0..patches as u32).collect();
        if kept < patches {
            for i in 0..kept {
                let j = i + below(&mut self.stream, (patches - i) as u32) as usize;
                all.swap(i, j);
            }
            all.truncate(kept);
            all.sort_unstable();
        }
        all
    }
}

/// d = u·max with u ~ Beta(a, b), `E[d]` = mean and `Var[u]` = 0.3·ū(1 − ū), ū = mean/max:
/// a = ū·k and b = (1 − ū)·k with k = 1/0.3 − 1.
fn beta(mean: f64, max: f64, stream: &mut Stream) -> f64 {
    let share = mean / max;
    let k = 1.0 / 0.3 - 1.0;
    match Beta::new(share * k, (1.0 - share) * k) {
        Ok(distribution) => stream.sample(distribution) * max,
        // The limits of the family: a mean of 0, or of `max`.
        Err(_) => mean,
    }
}
