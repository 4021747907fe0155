//! Collectives on device memory: queued on streams, and never waited for by the host.
//!
//! A [`DeviceGroup`] is one rank's end, made of a host [`Group`] and a [`Device`] by all ranks together. Two things
//! carry it, and it takes the one that fits:
//!
//! | transport | ranks | sums | graphs |
//! |---|---|---|---|
//! | local | threads of one process that share one device: a GPU, or the emulator | by a kernel, in the order of the ranks, bf16 in f32 | no: the threads meet at every operation |
//! | NCCL | one GPU each, in one process or many | by NCCL: the same bits in every run of one version on one topology, bf16 rounded at every rank on the way | yes: nothing of the host happens in a replay |
//!
//! All ranks call the operations in the same order. What an operation reads or writes may be used, changed or dropped
//! as soon as it has returned, by whatever is queued on its stream. [`DeviceGroup::synchronize`] waits for a stream as
//! long as the ranks live, and [`DeviceGroup::check`] tells whether they do.
//!
//! ```no_run
//! use trencadis::device::Device;
//! use trencadis::parallel::{DeviceGroup, run_ranks};
//!
//! let device = Device::cuda(0)?;
//! let sums = run_ranks(4, move |host| {
//!     let group = DeviceGroup::new(host, &device)?;
//!     let stream = device.stream()?;
//!     let data = device.upload(&[host.rank() as f32, 1.0])?;
//!     group.all_reduce(&stream, &data)?;
//!     group.synchronize(&stream)?;
//!     data.download()
//! })?;
//! assert_eq!(sums, [[6.0, 4.0]; 4]);
//! # Ok::<(), trencadis::Error>(())
//! ```

mod board;
mod local;
mod nccl;
mod place;
mod ring;

use std::cell::RefCell;
use std::fmt;

use bytemuck::Pod;

pub use ring::{BLOCKS, DeviceRing, Scatter};

use super::collectives::part_of;
use super::group::Group;
use super::ring::Direction;
use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::kernels::collective::Summed;

/// What carries the operations of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceTransport {
    /// The memory of one device, which all ranks share as threads of one process.
    Local,
    /// NCCL, between GPUs of which each rank has one.
    Nccl,
}

enum Carrier {
    Local(local::Local),
    Nccl(nccl::Connected),
}

/// One rank's end of a group whose members compute on devices.
///
/// Drop graphs that were captured with it first: NCCL waits for their end.
pub struct DeviceGroup {
    carrier: Carrier,
    host: Group,
    device: Device,
    sent: RefCell<Vec<u64>>,
}

impl fmt::Debug for DeviceGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceGroup")
            .field("host", &self.host)
            .field("transport", &self.transport())
            .finish_non_exhaustive()
    }
}

/// One direction of [`DeviceGroup::exchange`].
pub struct Exchange<'a, T: Pod> {
    /// Where memory goes.
    pub direction: Direction,
    /// What the next rank in this direction gets.
    pub send: &'a Buffer<T>,
    /// Where that of the rank before it goes, as long as what that sends.
    pub receive: &'a Buffer<T>,
}

impl<T: Pod> Exchange<'_, T> {
    fn ahead(&self, host: &Group) -> usize {
        self.direction.ahead(host.rank(), 1, host.size())
    }

    fn behind(&self, host: &Group) -> usize {
        self.direction.behind(host.rank(), 1, host.size())
    }
}

impl DeviceGroup {
    /// This rank's end, over whatever connects the devices of all ranks of `host`: their memory where they share it,
    /// else NCCL. All ranks call it together.
    ///
    /// # Errors
    /// On every rank the same: devices that nothing connects, such as one GPU for two processes; an NCCL that is
    /// missing, too old or not the same everywhere; the failure that has ended the ranks.
    pub fn new(host: &Group, device: &Device) -> Result<Self> {
        Self::with_blocks(host, device, None)
    }

    /// The same, whose operations take at most `blocks` thread blocks where NCCL does them: so that those of several
    /// groups, and launches that wait for them, find room on a GPU together.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_blocks(host: &Group, device: &Device, blocks: Option<u32>) -> Result<Self> {
        let places = place::places(host, device)?;
        let transport = place::choose(&places);
        host.agree(transport.as_ref().map(drop).map_err(Error::usage))?;
        Self::connect(host, device, transport?, blocks)
    }

    /// This rank's end, over `transport`.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn over(host: &Group, device: &Device, transport: DeviceTransport) -> Result<Self> {
        let places = place::places(host, device)?;
        host.agree(match transport {
            DeviceTransport::Local => place::check_local(&places),
            DeviceTransport::Nccl => place::check_nccl(&places),
        })?;
        Self::connect(host, device, transport, None)
    }

    fn connect(
        host: &Group,
        device: &Device,
        transport: DeviceTransport,
        blocks: Option<u32>,
    ) -> Result<Self> {
        let all: Vec<usize> = (0..host.size()).collect();
        let host = host.subgroup("device", &all)?;
        let carrier = match transport {
            DeviceTransport::Local => Carrier::Local(local::Local::new(&host)?),
            DeviceTransport::Nccl => Carrier::Nccl(nccl::Connected::new(&host, device, blocks)?),
        };
        let sent = RefCell::new(vec![0; host.size()]);
        Ok(Self { carrier, host, device: device.clone(), sent })
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> usize {
        self.host.rank()
    }

    /// Number of ranks in the group.
    pub fn size(&self) -> usize {
        self.host.size()
    }

    /// The device of this rank.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What carries the operations.
    pub fn transport(&self) -> DeviceTransport {
        match self.carrier {
            Carrier::Local(_) => DeviceTransport::Local,
            Carrier::Nccl(_) => DeviceTransport::Nccl,
        }
    }

    /// Bytes of device memory sent so far to each rank of this group, counted as the messages of [`Group`] are, when an
    /// operation is called: replays of graphs do not count. NCCL may send more or less, over other ranks.
    pub fn sent(&self) -> Vec<u64> {
        self.sent.borrow().clone()
    }

    fn count(&self, to: usize, elements: usize, of: usize) {
        if to != self.rank() {
            self.sent.borrow_mut()[to] += (elements * of) as u64;
        }
    }

    /// Refuses streams and memory of other devices, and parts that do not make up the whole.
    fn check_operands<T: Pod>(
        &self,
        what: &str,
        stream: &Stream,
        all: &Buffer<T>,
        mine: Option<&Buffer<T>>,
    ) -> Result<()> {
        let elsewhere = |device: &Device| !device.is(&self.device);
        if elsewhere(stream.device())
            || elsewhere(all.device())
            || mine.is_some_and(|m| elsewhere(m.device()))
        {
            return Err(Error::usage(format!(
                "{what}: streams and buffers must be those of the device of the group"
            )));
        }
        match mine {
            Some(mine) if Some(all.len()) != mine.len().checked_mul(self.size()) => {
                Err(Error::usage(format!(
                    "{what}: {} ranks have parts of {} elements, and the whole has {}; it must hold one part of each",
                    self.size(),
                    mine.len(),
                    all.len()
                )))
            }
            _ => Ok(()),
        }
    }

    /// Queues `all = [mine of rank 0 | mine of rank 1 | …]`. `mine` may be this rank's part of `all`.
    ///
    /// # Errors
    /// Lengths that do not fit together, memory that overlaps otherwise, a capture where the transport is local; the
    /// failure that has ended the ranks.
    pub fn all_gather<T: Pod>(&self, stream: &Stream, all: &Buffer<T>, mine: &Buffer<T>) -> Result<()> {
        self.check_operands("all-gather", stream, all, Some(mine))?;
        if self.size() == 1 {
            return all.copy_from(stream, mine);
        }
        match &self.carrier {
            Carrier::Local(local) => {
                let part = |rank| rank * mine.len()..(rank + 1) * mine.len();
                local.all_gather(&self.host, stream, all, mine, part)
            }
            Carrier::Nccl(nccl) => nccl.all_gather(&self.host, stream, all, mine),
        }?;
        (0..self.size()).for_each(|to| self.count(to, mine.len(), size_of::<T>()));
        Ok(())
    }

    /// Queues `mine = Σ_ranks all[part of this rank]`. `mine` may be that part.
    ///
    /// # Errors
    /// As for [`all_gather`](Self::all_gather).
    pub fn reduce_scatter<T: Summed>(
        &self,
        stream: &Stream,
        mine: &Buffer<T>,
        all: &Buffer<T>,
    ) -> Result<()> {
        self.check_operands("reduce-scatter", stream, all, Some(mine))?;
        if self.size() == 1 {
            return mine.copy_from(stream, all);
        }
        match &self.carrier {
            Carrier::Local(local) => {
                let part = |rank| rank * mine.len()..(rank + 1) * mine.len();
                local.reduce_scatter(&self.host, stream, mine, all, part)
            }
            Carrier::Nccl(nccl) => nccl.reduce_scatter(&self.host, stream, mine, all),
        }?;
        (0..self.size()).for_each(|to| self.count(to, mine.len(), size_of::<T>()));
        Ok(())
    }

    /// Queues `data = Σ_ranks data`, of any length, the same bits on every rank.
    ///
    /// # Errors
    /// As for [`all_gather`](Self::all_gather).
    pub fn all_reduce<T: Summed>(&self, stream: &Stream, data: &Buffer<T>) -> Result<()> {
        self.check_operands("all-reduce", stream, data, None)?;
        if self.size() == 1 {
            return Ok(());
        }
        match &self.carrier {
            Carrier::Local(local) => local.all_reduce(&self.host, stream, data),
            Carrier::Nccl(nccl) => nccl.all_reduce(&self.host, stream, data),
        }?;
        let part = |rank| part_of(data.len(), self.size(), rank).len();
        (0..self.size()).for_each(|to| self.count(to, part(to) + part(self.rank()), size_of::<T>()));
        Ok(())
    }

    /// Queues `data` of rank `root` to every rank.
    ///
    /// # Errors
    /// A root that is no rank, and as for [`all_gather`](Self::all_gather).
    pub fn broadcast<T: Pod>(&self, stream: &Stream, data: &Buffer<T>, root: usize) -> Result<()> {
        self.check_operands("broadcast", stream, data, None)?;
        if root >= self.size() {
            return Err(Error::usage(format!(
                "broadcast: there is no rank {root} among {}; name one from 0",
                self.size()
            )));
        }
        if self.size() == 1 {
            return Ok(());
        }
        match &self.carrier {
            Carrier::Local(local) => local.broadcast(&self.host, stream, data, root),
            Carrier::Nccl(nccl) => nccl.broadcast(&self.host, stream, data, root),
        }?;
        if root == self.rank() {
            (0..self.size()).for_each(|to| self.count(to, data.len(), size_of::<T>()));
        }
        Ok(())
    }

    /// Queues what goes from rank to rank around the ring, in one direction or in both at once. All ranks name the same
    /// directions in the same order.
    ///
    /// # Errors
    /// As for [`all_gather`](Self::all_gather); a length other than that of the rank before.
    pub fn exchange<T: Pod>(&self, stream: &Stream, exchanges: &[Exchange<'_, T>]) -> Result<()> {
        for one in exchanges {
            self.check_operands("exchange", stream, one.send, None)?;
            self.check_operands("exchange", stream, one.receive, None)?;
        }
        if self.size() == 1 {
            return exchanges.iter().try_for_each(|one| one.receive.copy_from(stream, one.send));
        }
        match &self.carrier {
            Carrier::Local(local) => {
                exchanges.iter().try_for_each(|one| local.exchange(&self.host, stream, one))
            }
            Carrier::Nccl(nccl) => nccl.exchange(&self.host, stream, exchanges),
        }?;
        for one in exchanges {
            self.count(one.ahead(&self.host), one.send.len(), size_of::<T>());
        }
        Ok(())
    }

    /// Waits until everything on `stream` has run: as [`Stream::synchronize`], but no longer than the ranks live, nor
    /// for a rank that has been silent beyond the timeout of the host group.
    ///
    /// # Errors
    /// The failure that has ended the ranks; those of [`Stream::synchronize`].
    pub fn synchronize(&self, stream: &Stream) -> Result<()> {
        match &self.carrier {
            Carrier::Local(_) => stream.synchronize()?,
            Carrier::Nccl(nccl) => nccl.synchronize(&self.host, stream)?,
        }
        self.check()
    }

    /// Runs `work`, which waits for something that the ranks do together: no longer than they live, nor beyond the
    /// timeout.
    ///
    /// # Errors
    /// The failure that has ended the ranks; those of `work`.
    pub fn watched(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        match &self.carrier {
            Carrier::Local(_) => work()?,
            Carrier::Nccl(nccl) => nccl.watched(&self.host, work)?,
        }
        self.check()
    }

    /// Whether the ranks live, as far as this one has heard.
    ///
    /// # Errors
    /// The failure that has ended them: what was queued since may be undefined.
    pub fn check(&self) -> Result<()> {
        self.host.transport().fault().map_or(Ok(()), |fault| Err(fault.error()))
    }
}
