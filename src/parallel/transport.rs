//! What a [`Group`](super::Group) needs of whatever carries its messages.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Why the ranks have ended; every rank reports the first one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// One sentence, which names the rank.
    pub message: String,
    /// Whether a person did something wrong; otherwise something failed.
    pub usage: bool,
}

impl Fault {
    /// Something that failed.
    pub fn failure(message: impl Into<String>) -> Self {
        Self { message: message.into(), usage: false }
    }

    /// Bad input or configuration.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), usage: true }
    }

    /// That of a rank that waits for one that has ended.
    pub fn ended(rank: usize) -> Self {
        Self::failure(format!("rank {rank} has ended while others still wait for its messages"))
    }

    /// As a rank returns it.
    pub fn error(&self) -> Error {
        if self.usage { Error::usage(&self.message) } else { Error::failure(&self.message) }
    }
}

/// Messages between the ranks of the world. Those of one channel arrive in the order they were posted.
pub(super) trait Transport: Send + Sync {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// How long a receiver waits for a silent rank.
    fn timeout(&self) -> Duration;
    /// Sends `bytes` to `to` and returns before they have arrived.
    fn post(&self, to: usize, channel: u64, bytes: &[u8]) -> Result<()>;
    /// The next message of `from`.
    fn receive(&self, from: usize, channel: u64) -> Result<Vec<u8>>;
    /// Ends every rank with `fault`, unless an earlier one has done so.
    fn fail(&self, fault: &Fault);
    /// What has ended the ranks, as far as this rank has heard.
    fn fault(&self) -> Option<Fault>;
    /// Takes the time that this rank needs for `flops`, where time is simulated.
    fn work(&self, _flops: f64) {}
    /// Seconds since the start on this rank's simulated clock.
    fn clock(&self) -> Option<f64> {
        None
    }
}

/// When `timeout` from now has passed; as good as never where it is too long for a clock.
pub(super) fn deadline(timeout: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
    Instant::now() + timeout.min(YEAR)
}

/// What a rank is doing, as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    /// It waits for a message of this rank.
    WaitsFor(usize),
    /// It waits for nobody.
    Busy,
    /// It does not answer.
    Mute,
}

/// Why `waiting` has heard nothing from `awaited` for `timeout`: ranks wait for one another in chains, and
/// the one to be named is at the end.
pub(super) fn silence(
    waiting: usize,
    awaited: usize,
    timeout: Duration,
    mut activity: impl FnMut(usize) -> Activity,
) -> String {
    let mut chain = vec![waiting];
    let mut suspect = awaited;
    while !chain.contains(&suspect) {
        chain.push(suspect);
        match activity(suspect) {
            Activity::WaitsFor(next) => suspect = next,
            Activity::Busy => {
                return format!(
                    "rank {suspect} has been silent for {timeout:?}: it runs, but others wait for its messages"
                );
            }
            Activity::Mute => {
                return format!("rank {suspect} has been silent for {timeout:?}: it does not answer");
            }
        }
    }
    let circle: Vec<String> =
        chain.iter().skip_while(|&&rank| rank != suspect).map(usize::to_string).collect();
    format!("ranks {} have waited for one another for {timeout:?}", circle.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_chain_is_named() {
        let second = Duration::from_secs(1);
        let chain = |rank| if rank < 3 { Activity::WaitsFor(rank + 1) } else { Activity::Busy };
        assert!(silence(0, 1, second, chain).starts_with("rank 3 has been silent for 1s: it runs"));
        let mute = |rank| if rank < 2 { Activity::WaitsFor(rank + 1) } else { Activity::Mute };
        assert_eq!(silence(0, 1, second, mute), "rank 2 has been silent for 1s: it does not answer");
    }

    #[test]
    fn a_circle_is_named_without_those_outside() {
        let second = Duration::from_secs(1);
        let circle = |rank| Activity::WaitsFor(if rank == 3 { 1 } else { rank + 1 });
        assert_eq!(silence(0, 1, second, circle), "ranks 1, 2, 3 have waited for one another for 1s");
        assert_eq!(silence(3, 1, second, circle), "ranks 3, 1, 2 have waited for one another for 1s");
    }
}
