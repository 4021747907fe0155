//! Collectives of ranks that are threads of one process and share one device: each reads the others' memory.
//!
//! An operation is one meeting of the threads, and none of them with the device. A rank whose memory is read
//! 1. records an event, behind which the memory holds what it should, and leaves it and the memory for each reader;
//! 2. goes on when each reader has left an event, behind which it has read, and lets its stream wait for them.
//!
//! A reader lets its stream wait for the first events, queues its copies or its sum, and leaves the second. So memory
//! that a rank has given to an operation may change, or go, once the operation has returned: the streams, and the
//! allocator, which frees after all that is queued, do the rest. Until then the note that was left keeps it, also
//! where its owner has failed.

use std::sync::Arc;

use bytemuck::Pod;

use super::Exchange;
use super::board::{Board, Note};
use crate::device::{Buffer, Stream};
use crate::error::Result;
use crate::kernels::collective::{Summed, sum_ranks};
use crate::parallel::collectives::part_of;
use crate::parallel::group::Group;
use crate::parallel::transport::Fault;

pub(super) struct Local {
    board: Arc<Board>,
}

/// Elements `range` of `buffer`.
pub(super) fn elements<T: Pod>(buffer: &Buffer<T>, range: std::ops::Range<usize>) -> Result<Buffer<T>> {
    buffer.view(range.start * size_of::<T>()..range.end * size_of::<T>())
}

/// What a rank does in a meeting.
struct Meeting<'a, T: Pod> {
    /// Operation and size, the same on all ranks.
    operation: String,
    /// Memory of this rank.
    mine: &'a Buffer<T>,
    /// Who reads it.
    readers: &'a [usize],
    /// Whose memory this rank reads.
    sources: &'a [usize],
}

impl Local {
    /// For all ranks of `host`.
    pub(super) fn new(host: &Group) -> Result<Self> {
        Ok(Self { board: Board::share(host)? })
    }

    /// Meets the others; `read` queues what is done with the memory of the sources, in their order.
    fn meet<T: Pod>(
        &self,
        host: &Group,
        stream: &Stream,
        meeting: &Meeting<'_, T>,
        read: impl FnOnce(&[Buffer<T>]) -> Result<()>,
    ) -> Result<()> {
        stream.refuse_capture("an operation of ranks that share one device")?;
        let Meeting { operation, mine, readers, sources } = meeting;
        let rank = host.rank();
        let tell = |to: usize, part: Option<Buffer<u8>>, event: &Arc<crate::device::Event>| {
            self.board.leave(to, rank, Note { operation: operation.clone(), part, event: event.clone() });
            host.post::<u8>(to, &[])
        };
        let hear = |from: usize| {
            host.receive::<u8>(from, &mut [])?;
            let note = self.board.take(rank, from)?;
            if note.operation != *operation {
                let (mine, theirs) = (host.world_rank(rank), host.world_rank(from));
                return Err(host.end(&Fault::failure(format!(
                    "rank {mine} is at {operation} where rank {theirs} is at {}: their programs or recipes differ",
                    note.operation
                ))));
            }
            stream.wait(&note.event)?;
            Ok(note)
        };
        let ready = Arc::new(stream.record()?);
        let bytes = mine.len() * size_of::<T>();
        readers.iter().try_for_each(|&to| tell(to, Some(mine.view(0..bytes)?), &ready))?;
        let mut parts = Vec::with_capacity(sources.len());
        for &from in *sources {
            let part = hear(from)?.part.ok_or_else(|| {
                host.end(&Fault::failure(format!(
                    "rank {} has shown no device memory",
                    host.world_rank(from)
                )))
            })?;
            parts.push(part.view(0..part.len())?);
        }
        read(&parts)?;
        let done = Arc::new(stream.record()?);
        sources.iter().try_for_each(|&to| tell(to, None, &done))?;
        readers.iter().try_for_each(|&from| hear(from).map(drop))
    }

    /// As [`DeviceGroup::all_gather`](super::DeviceGroup::all_gather), where part r has the elements `part(r)`.
    pub(super) fn all_gather<T: Pod>(
        &self,
        host: &Group,
        stream: &Stream,
        all: &Buffer<T>,
        mine: &Buffer<T>,
        part: impl Fn(usize) -> std::ops::Range<usize>,
    ) -> Result<()> {
        let others: Vec<usize> = host.others().collect();
        let operation = format!("an all-gather of {} bytes", all.len() * size_of::<T>());
        let meeting = Meeting { operation, mine, readers: &others, sources: &others };
        self.meet(host, stream, &meeting, |parts| {
            elements(all, part(host.rank()))?.copy_from(stream, mine)?;
            others
                .iter()
                .zip(parts)
                .try_for_each(|(&rank, theirs)| elements(all, part(rank))?.copy_from(stream, theirs))
        })
    }

    /// As [`DeviceGroup::reduce_scatter`](super::DeviceGroup::reduce_scatter), where part r has the elements `part(r)`.
    pub(super) fn reduce_scatter<T: Summed>(
        &self,
        host: &Group,
        stream: &Stream,
        mine: &Buffer<T>,
        all: &Buffer<T>,
        part: impl Fn(usize) -> std::ops::Range<usize>,
    ) -> Result<()> {
        let others: Vec<usize> = host.others().collect();
        let operation = format!("a reduce-scatter of {} bytes", all.len() * size_of::<T>());
        let meeting = Meeting { operation, mine: all, readers: &others, sources: &others };
        self.meet(host, stream, &meeting, |theirs| {
            let mut parts = vec![(host.rank(), elements(all, part(host.rank()))?)];
            for (&rank, buffer) in others.iter().zip(theirs) {
                parts.push((rank, elements(buffer, part(host.rank()))?));
            }
            parts.sort_by_key(|&(rank, _)| rank);
            sum_ranks(stream, mine, &parts.iter().map(|(_, part)| part).collect::<Vec<_>>())
        })
    }

    /// As [`DeviceGroup::all_reduce`](super::DeviceGroup::all_reduce): every rank sums a part, and all gather the parts.
    pub(super) fn all_reduce<T: Summed>(
        &self,
        host: &Group,
        stream: &Stream,
        data: &Buffer<T>,
    ) -> Result<()> {
        let part = |rank| part_of(data.len(), host.size(), rank);
        // Nobody but this rank reads its part of its vector, until it is summed.
        let mine = elements(data, part(host.rank()))?;
        self.reduce_scatter(host, stream, &mine, data, part)?;
        self.all_gather(host, stream, data, &mine, part)
    }

    /// As [`DeviceGroup::broadcast`](super::DeviceGroup::broadcast).
    pub(super) fn broadcast<T: Pod>(
        &self,
        host: &Group,
        stream: &Stream,
        data: &Buffer<T>,
        root: usize,
    ) -> Result<()> {
        let others: Vec<usize> = host.others().collect();
        let operation = format!("a broadcast of {} bytes by rank {root}", data.len() * size_of::<T>());
        let (readers, sources): (&[usize], &[usize]) =
            if host.rank() == root { (&others, &[]) } else { (&[], &[root]) };
        let meeting = Meeting { operation, mine: data, readers, sources };
        self.meet(host, stream, &meeting, |parts| {
            parts.iter().try_for_each(|theirs| data.copy_from(stream, theirs))
        })
    }

    /// As one [`Exchange`] of [`DeviceGroup::exchange`](super::DeviceGroup::exchange).
    pub(super) fn exchange<T: Pod>(
        &self,
        host: &Group,
        stream: &Stream,
        exchange: &Exchange<'_, T>,
    ) -> Result<()> {
        let Exchange { direction, send, receive } = exchange;
        let (rank, size) = (host.rank(), host.size());
        if size == 1 {
            return receive.copy_from(stream, send);
        }
        let operation = format!("an exchange to the {direction:?}");
        let (ahead, behind) = ([direction.ahead(rank, 1, size)], [direction.behind(rank, 1, size)]);
        let meeting = Meeting { operation, mine: *send, readers: &ahead, sources: &behind };
        self.meet(host, stream, &meeting, |parts| {
            parts.iter().try_for_each(|theirs| receive.copy_from(stream, theirs))
        })
    }
}
