//! The rings at work: buffers of chunks, sent and awaited step by step.

use std::ops::Range;

use bytemuck::Pod;

use super::chunks::{Chunks, Part, rows, rows_mut};
use crate::cpu::gemm::{Mat, MatMut};
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::error::Result;
use crate::parallel::group::Group;
use crate::parallel::ring::{self, Direction, Step};

/// One direction of a ring.
struct Lane<R> {
    ahead: usize,
    behind: usize,
    rows: Range<usize>,
    steps: Vec<Step>,
    /// What is multiplied in this step, or its result.
    current: Vec<R>,
    /// What is received.
    next: Vec<R>,
}

impl<R: Real + Pod> Lane<R> {
    fn all(chunks: &Chunks, steps: fn(usize, usize, Direction) -> Vec<Step>) -> Vec<Self> {
        let (rank, size) = (chunks.rank, chunks.size);
        let lane = |(direction, rows): &(Direction, Range<usize>)| Self {
            ahead: direction.ahead(rank, 1, size),
            behind: direction.behind(rank, 1, size),
            rows: rows.clone(),
            steps: steps(rank, size, *direction),
            current: vec![R::ZERO; rows.len() * chunks.cols],
            next: vec![R::ZERO; rows.len() * chunks.cols],
        };
        chunks.directions.iter().map(lane).collect()
    }

    fn part(&self, step: usize) -> Part {
        Part { chunk: self.steps[step].multiply, rows: self.rows.clone() }
    }
}

/// A ring all-gather.
pub(super) struct Gather<'a, R> {
    group: &'a Group,
    cols: usize,
    lanes: Vec<Lane<R>>,
}

impl<'a, R: Real + Pod> Gather<'a, R> {
    pub fn new(group: &'a Group, chunks: &Chunks, mine: &[R]) -> Self {
        let mut lanes = Lane::all(chunks, ring::all_gather);
        for lane in &mut lanes {
            lane.current.copy_from_slice(rows(mine, &lane.rows, chunks.cols).data);
        }
        Self { group, cols: chunks.cols, lanes }
    }

    /// Before the product of `step`: sends on what it will multiply.
    pub fn post(&mut self, step: usize) -> Result<()> {
        let mut sending = self.lanes.iter().filter(|lane| lane.steps[step].send.is_some());
        sending.try_for_each(|lane| self.group.post(lane.ahead, &lane.current))
    }

    /// What `step` multiplies.
    pub fn pieces(&self, step: usize) -> impl Iterator<Item = (Part, Mat<'_, R>)> {
        self.lanes.iter().map(move |lane| {
            (lane.part(step), Mat::new(&lane.current, lane.rows.len(), self.cols, self.cols))
        })
    }

    /// After the product of `step`: waits for what the next one multiplies.
    pub fn advance(&mut self, step: usize) -> Result<()> {
        for lane in self.lanes.iter_mut().filter(|lane| lane.steps[step].receive.is_some()) {
            self.group.receive(lane.behind, &mut lane.next)?;
            std::mem::swap(&mut lane.current, &mut lane.next);
        }
        Ok(())
    }
}

/// A ring reduce-scatter into `out`.
pub(super) struct Reduce<'a, R> {
    group: &'a Group,
    cols: usize,
    lanes: Vec<Lane<R>>,
    out: &'a mut [R],
}

impl<'a, R: Real + Pod> Reduce<'a, R> {
    pub fn new(group: &'a Group, chunks: &Chunks, out: &'a mut [R]) -> Self {
        Self { group, cols: chunks.cols, lanes: Lane::all(chunks, ring::reduce_scatter), out }
    }

    /// Where the products of `step` go.
    pub fn pieces(&mut self, step: usize) -> impl Iterator<Item = (Part, MatMut<'_, R>)> {
        let cols = self.cols;
        self.lanes.iter_mut().map(move |lane| {
            let part = lane.part(step);
            (part, MatMut::new(&mut lane.current, lane.rows.len(), cols, cols))
        })
    }

    /// After the products of `step`: adds the sums that have come, and sends the new ones on or keeps them.
    pub fn advance(&mut self, step: usize) -> Result<()> {
        for lane in &mut self.lanes {
            if lane.steps[step].receive.is_some() {
                self.group.receive(lane.behind, &mut lane.next)?;
                add_assign(&mut lane.current, &lane.next);
            }
            if lane.steps[step].send.is_some() {
                self.group.post(lane.ahead, &lane.current)?;
            } else {
                rows_mut(self.out, &lane.rows, self.cols).data.copy_from_slice(&lane.current);
            }
        }
        Ok(())
    }
}
