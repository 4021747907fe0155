//! Which tokens of an image are kept during training: a rate per image, then a uniform choice
//! (NaViT, section 3.3 and appendices A.4 and A.5). Prefix tokens are never dropped.

use rand::RngExt;
use rand_distr::{Beta, StandardNormal};

use crate::data::order::below;
use crate::recipe::{DropConfig, DropKind};
use crate::rng::{Purpose, Stream};

/// Standard deviations beyond which the rate of `resolution` is drawn again.
pub const DEVIATIONS: f64 = 2.0;

/// Where an image stands on the axes that rates may follow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Standing {
    /// Its length between the shortest (0) and the longest (1), which bound it.
    pub length: f64,
    /// Images seen before it, as a share of those of the run; may exceed 1.
    pub seen: f64,
}

/// Expected rate of the images that stand there: `mean`; or for `resolution` min + (max − min)·length; or for
/// `schedule` ρ = min + (max − min)·σ((seen − midpoint) / timescale).
pub fn expected(config: &DropConfig, standing: Standing) -> f64 {
    let between = |share: f64| config.min + (config.max - config.min) * share;
    match config.kind {
        DropKind::None => 0.0,
        DropKind::Constant | DropKind::Beta => config.mean,
        DropKind::Resolution => between(standing.length),
        DropKind::Schedule => between(sigmoid((standing.seen - config.midpoint) / config.timescale)),
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The share of an image's tokens that is dropped, in [0, 1).
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Rate(pub f64);

impl Rate {
    /// Tokens kept of `patches`: the rounded share, at least one.
    pub fn kept(self, patches: usize) -> usize {
        (((1.0 - self.0) * patches as f64).round() as usize).max(1)
    }

    /// The largest number of patches of which at most `limit` (≥ 1) are kept.
    pub fn longest(self, limit: usize) -> usize {
        // A rate next to 1 keeps one token of anything; 2^40 patches stand for no limit.
        let bound = ((limit as f64 + 0.5) / (1.0 - self.0)).min((1u64 << 40) as f64);
        let mut patches = bound as usize;
        while patches > 1 && self.kept(patches) > limit {
            patches -= 1;
        }
        patches.max(1)
    }
}

/// What chance decides about the dropping of one image. Depends on (seed, epoch, sample) alone, so that planning and
/// loading agree without sharing anything.
#[derive(Clone, Debug)]
pub struct TokenDrop {
    /// The rate of `beta`; the deviation of `resolution` in standard deviations.
    chance: f64,
    stream: Stream,
}

impl TokenDrop {
    /// Draws for `sample` in `epoch`.
    pub fn new(config: &DropConfig, seed: u64, epoch: u64, sample: u64) -> Self {
        let mut stream = Stream::new(seed, epoch, sample, Purpose::TokenDrop);
        let chance = match config.kind {
            DropKind::Beta => beta(config.mean, config.max, &mut stream),
            DropKind::Resolution => deviation(&mut stream),
            DropKind::None | DropKind::Constant | DropKind::Schedule => 0.0,
        };
        Self { chance, stream }
    }

    /// The rate of the image where it stands there.
    pub fn rate(&self, config: &DropConfig, standing: Standing) -> Rate {
        Rate(match config.kind {
            DropKind::Beta => self.chance,
            DropKind::Resolution => expected(config, standing) + config.std * self.chance,
            DropKind::None | DropKind::Constant | DropKind::Schedule => expected(config, standing),
        })
    }

    /// Indices of `kept` tokens among `patches` in raster order, drawn uniformly without replacement (partial
    /// Fisher–Yates).
    pub fn indices(mut self, patches: usize, kept: usize) -> Vec<u32> {
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

/// z ~ N(0, 1) given that |z| ≤ 2, which 95 % of the draws are.
fn deviation(stream: &mut Stream) -> f64 {
    loop {
        let z = stream.sample::<f64, _>(StandardNormal);
        if z.abs() <= DEVIATIONS {
            return z;
        }
    }
}
