//! Collective operations of a group, over direct messages between all its ranks.
//!
//! Sums are taken in the order of the ranks, element by element, whichever rank takes them: the result is the
//! same on every rank and in every run, bit for bit. Bytes sent by each of k ranks for a vector of n bytes:
//! all-gather (k − 1)·n/k, reduce-scatter (k − 1)·n/k, all-reduce 2(k − 1)·n/k, broadcast (k − 1)·n by the
//! root.

use std::ops::{AddAssign, Range};

use bytemuck::Pod;

use super::group::Group;
use super::transport::Fault;
use crate::error::{Error, Result};

/// What a refusal begins with between ranks.
const USAGE: char = 'u';
/// And a failure.
const FAILURE: char = 'f';

/// Part `part` of `len` elements in `parts` parts, whose lengths differ by at most 1.
pub fn part_of(len: usize, parts: usize, part: usize) -> Range<usize> {
    let at = |part: usize| part * (len / parts) + part.min(len % parts);
    at(part)..at(part + 1)
}

impl Group {
    /// All other ranks, from the next one on, so that no rank is everybody's first.
    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank(), self.size());
        (1..size).map(move |i| (rank + i) % size)
    }

    /// `all = [mine of rank 0 | mine of rank 1 | …]`.
    ///
    /// # Errors
    /// Those of [`receive`](Self::receive).
    ///
    /// # Panics
    /// If `all` has not the length of all parts: a bug of the caller, not of a user.
    pub fn all_gather<T: Pod>(&self, all: &mut [T], mine: &[T]) -> Result<()> {
        assert_eq!(all.len(), self.size() * mine.len(), "all-gather: length of the result");
        let part = |rank| rank * mine.len()..(rank + 1) * mine.len();
        self.others().try_for_each(|to| self.post(to, mine))?;
        all[part(self.rank())].copy_from_slice(mine);
        self.others().try_for_each(|from| self.receive(from, &mut all[part(from)]))
    }

    /// `mine = Σ_ranks all[part of this rank]`.
    ///
    /// # Errors
    /// Those of [`receive`](Self::receive).
    ///
    /// # Panics
    /// If `all` has not the length of all parts: a bug of the caller, not of a user.
    pub fn reduce_scatter<T: Pod + AddAssign>(&self, mine: &mut [T], all: &[T]) -> Result<()> {
        assert_eq!(all.len(), self.size() * mine.len(), "reduce-scatter: length of the operand");
        let len = mine.len();
        self.reduce_parts(mine, all, |rank| rank * len..(rank + 1) * len)
    }

    fn reduce_parts<T: Pod + AddAssign>(
        &self,
        mine: &mut [T],
        all: &[T],
        part: impl Fn(usize) -> Range<usize>,
    ) -> Result<()> {
        self.others().try_for_each(|to| self.post(to, &all[part(to)]))?;
        let mut summand = vec![T::zeroed(); mine.len()];
        for rank in 0..self.size() {
            if rank == self.rank() {
                summand.copy_from_slice(&all[part(rank)]);
            } else {
                self.receive(rank, &mut summand)?;
            }
            if rank == 0 {
                mine.copy_from_slice(&summand);
            } else {
                mine.iter_mut().zip(&summand).for_each(|(sum, &x)| *sum += x);
            }
        }
        Ok(())
    }

    /// `data = Σ_ranks data`; any length.
    ///
    /// # Errors
    /// Those of [`receive`](Self::receive).
    pub fn all_reduce<T: Pod + AddAssign>(&self, data: &mut [T]) -> Result<()> {
        let (len, size) = (data.len(), self.size());
        let part = |rank| part_of(len, size, rank);
        let mut mine = vec![T::zeroed(); part(self.rank()).len()];
        self.reduce_parts(&mut mine, data, part)?;
        self.others().try_for_each(|to| self.post(to, &mine))?;
        data[part(self.rank())].copy_from_slice(&mine);
        self.others().try_for_each(|from| self.receive(from, &mut data[part(from)]))
    }

    /// `data` of rank `root` on every rank.
    ///
    /// # Errors
    /// Those of [`receive`](Self::receive).
    pub fn broadcast<T: Pod>(&self, data: &mut [T], root: usize) -> Result<()> {
        if self.rank() == root {
            self.others().try_for_each(|to| self.post(to, data))
        } else {
            self.receive(root, data)
        }
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// Those of [`receive`](Self::receive).
    pub fn barrier(&self) -> Result<()> {
        self.all_gather::<u8>(&mut [], &[])
    }

    /// The same answer on every rank: `Ok` where it is so everywhere, otherwise the message of the first rank
    /// that refuses, with which all end. For what each rank checks by itself before the work begins.
    ///
    /// # Errors
    /// That message, or those of [`receive`](Self::receive).
    pub fn agree(&self, mine: Result<()>) -> Result<()> {
        let verdict = match mine {
            Ok(()) => String::new(),
            Err(Error::Usage(text)) => format!("{USAGE}{text}"),
            Err(Error::Failure(text)) => format!("{FAILURE}{text}"),
        };
        let refusal = self.gather_text(&verdict)?.into_iter().find(|text| !text.is_empty());
        let fault = |text: String| match text.strip_prefix(USAGE) {
            Some(text) => Fault::usage(text),
            None => Fault::failure(text.strip_prefix(FAILURE).unwrap_or(&text)),
        };
        self.verdict(refusal.map(fault))
    }

    /// Refuses, on every rank with one message, where `value` is not the same on all ranks. `what` is named
    /// in it, such as `recipes`.
    ///
    /// # Errors
    /// That message, or those of [`receive`](Self::receive).
    pub fn check_same(&self, what: &str, value: &str) -> Result<()> {
        let values = self.gather_text(value)?;
        let world: Vec<usize> = (0..self.size()).map(|rank| self.world_rank(rank)).collect();
        self.verdict(difference(what, &world, &values).map(Fault::usage))
    }

    /// Ends the ranks, each of which knows of the same refusal. The first to leave tells it to the others, or
    /// these would learn that a rank has failed instead.
    fn verdict(&self, refusal: Option<Fault>) -> Result<()> {
        refusal.map_or(Ok(()), |fault| Err(self.end(&fault)))
    }

    /// A text of every rank.
    fn gather_text(&self, mine: &str) -> Result<Vec<String>> {
        self.others().try_for_each(|to| self.post(to, mine.as_bytes()))?;
        (0..self.size())
            .map(|rank| match rank == self.rank() {
                true => Ok(mine.to_owned()),
                false => self.receive_bytes(rank).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
            })
            .collect()
    }
}

/// What is said where two of `ranks` have different `values`.
pub(super) fn difference(what: &str, ranks: &[usize], values: &[String]) -> Option<String> {
    let other = values.iter().position(|value| *value != values[0])?;
    Some(format!(
        "{what} differ: rank {} has {}, rank {} has {}; start all ranks alike",
        ranks[0], values[0], ranks[other], values[other]
    ))
}
