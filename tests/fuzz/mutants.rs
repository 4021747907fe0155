//! Seeded damage to files.

use trencadis::rng::{Purpose, Stream};

/// Makes damaged files of good ones; the same seed and number give the same file.
pub struct Mutant {
    stream: Stream,
}

/// Numbers that lengths, offsets and counts are replaced by.
const EXTREMES: [u64; 12] =
    [0, 1, 7, 0x7F, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 62, i64::MAX as u64, u64::MAX];

/// What stands in for a number in a text header.
const NUMBERS: [&str; 8] = [
    "0",
    "-1",
    "1e9",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999",
    "[]",
];

/// Runs of bytes with a meaning to some parser.
const TOKENS: [&[u8]; 10] = [
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"\x93NUMPY",
    b"{",
    b"[[[[[[[[",
    b"\"",
    b"F64",
    b"ustar",
    b"\0\0\0\0",
];

impl Mutant {
    pub fn new(seed: u64, number: u64) -> Self {
        Self { stream: Stream::new(seed, 0, number, Purpose::Init) }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.stream.bits() as usize % bound.max(1)
    }

    /// A place in a file of `len` bytes, mostly near its ends, where the headers are.
    fn place(&mut self, len: usize) -> usize {
        let near = self.below(len.min(600));
        match self.below(4) {
            0 => self.below(len),
            1 => len.saturating_sub(1 + near),
            _ => near,
        }
    }

    /// `bytes` with one to three damages; pieces of `other` may be put into it.
    pub fn of(&mut self, bytes: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + self.below(3) {
            self.damage(&mut bytes, other);
        }
        bytes
    }

    fn damage(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        let at = self.place(bytes.len());
        let rest = bytes.len() - at.min(bytes.len());
        match self.below(9) {
            0 if rest > 0 => bytes[at] ^= 1 << self.below(8),
            1 if rest > 0 => bytes[at] = self.stream.bits() as u8,
            2 => bytes.truncate(at),
            3 => {
                let number = EXTREMES[self.below(EXTREMES.len())];
                let width = [1, 2, 4, 8][self.below(4)].min(rest);
                let (little, big) = (number.to_le_bytes(), number.to_be_bytes());
                let new = if self.below(2) == 0 { &little[..width] } else { &big[8 - width..] };
                bytes[at..at + width].copy_from_slice(new);
            }
            4 => {
                let length = self.below(rest.min(64) + 1);
                bytes.drain(at..at + length);
            }
            5 => {
                let length = self.below(rest.min(700) + 1);
                let copy = bytes[at..at + length].to_vec();
                let to = self.place(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
            6 => {
                let from = self.place(other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from.min(other.len())..]);
            }
            7 => {
                let token = TOKENS[self.below(TOKENS.len())];
                bytes.splice(at..at, token.iter().copied());
            }
            _ => self.number(bytes, at),
        }
    }

    /// Another number in the place of the next one that is written in digits.
    fn number(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let Some(start) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else { return };
        let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
        let new = NUMBERS[self.below(NUMBERS.len())];
        bytes.splice(start..end, new.bytes());
    }
}
