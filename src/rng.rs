//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
//! counter-based generator behind every random decision of a run.
//!
//! A stream is addressed by what the number is *for*, (seed, epoch, sample, purpose), and never
//! by a slot, a row or the order of calls, so that an image gets the same crop, the same dropped
//! tokens and the same stochastic depth whatever it is packed with and however many workers
//! prepare it. The kernels repeat the same 25 lines on the device.

use rand::rand_core::{TryRng, utils};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One Philox4x32-10 block: 128 random bits for a 128-bit counter and a 64-bit key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
    }
    counter
}

/// What a stream of random numbers decides. The value is part of the counter, so that two
/// purposes never share numbers; new purposes are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Order of the samples within an epoch.
    Shuffle = 0,
    /// Resolution an image is resized to.
    Resolution = 1,
    /// Token dropping: the rate, then which tokens.
    TokenDrop = 2,
    /// Flips.
    Augment = 3,
    /// Initial weights; the sample is a hash of the parameter's name.
    Init = 4,
    /// The train/validation split.
    Split = 5,
    /// Stochastic rounding of parameters; the sample is the step, block `i` rounds elements 8i to 8i + 7.
    Rounding = 6,
    /// Mixup and CutMix: whether, with which other image, how much of each.
    Mix = 16,
    /// Which part of an image is seen.
    Crop = 32,
    /// 3-Augment: which of its operations, and how strong.
    ThreeAugment = 33,
    /// Colour jitter: factors, then their order.
    ColorJitter = 34,
    /// RandAugment: operations with their magnitudes.
    RandAugment = 35,
    /// Images of a few-shot evaluation; the epoch is its seed.
    FewShot = 64,
    /// A linear probe: which images are held out of it, then in which order an epoch takes the others.
    Probe = 65,
    /// Stochastic depth (drop-path); residual branch `l` uses `DropPath as u32 + l`.
    DropPath = 0x1000,
}

/// A stream of random numbers for one (seed, epoch, sample, purpose).
///
/// Counter layout: `[block, purpose, sample low, sample high ^ epoch]`; key: the seed.
/// Implements [`rand::Rng`], so that every distribution of `rand` and `rand_distr` applies.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Stream {
    /// Opens the stream. `epoch` must stay below 2^32.
    pub fn new(seed: u64, epoch: u64, sample: u64, purpose: Purpose) -> Self {
        Self::with_purpose(seed, epoch, sample, purpose as u32)
    }

    /// Opens the drop-path stream of residual branch `branch`.
    pub fn drop_path(seed: u64, epoch: u64, sample: u64, branch: u32) -> Self {
        Self::with_purpose(seed, epoch, sample, Purpose::DropPath as u32 + branch)
    }

    fn with_purpose(seed: u64, epoch: u64, sample: u64, purpose: u32) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, purpose, sample as u32, (sample >> 32) as u32 ^ epoch as u32],
            block: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// A number in [0, 1) with 24 random bits, the same on host and device.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }
}

impl TryRng for Stream {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        Ok(self.bits())
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        utils::next_u64_via_u32(self)
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        utils::fill_bytes_via_next_word(bytes, || self.try_next_u32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn streams_differ_by_every_part_of_their_address() {
        let first = |mut s: Stream| s.bits();
        let base = first(Stream::new(1, 2, 3, Purpose::Shuffle));
        assert_ne!(base, first(Stream::new(2, 2, 3, Purpose::Shuffle)));
        assert_ne!(base, first(Stream::new(1, 3, 3, Purpose::Shuffle)));
        assert_ne!(base, first(Stream::new(1, 2, 4, Purpose::Shuffle)));
        assert_ne!(base, first(Stream::new(1, 2, 3, Purpose::TokenDrop)));
    }
}
