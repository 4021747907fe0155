//! Weights of a training on a device with what the optimiser keeps beside them: all on one rank, or pieces on each.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::device_optimizer::{Arenas, DeviceOptimizer, Values};
use super::slices::wanted;
use super::state::{Average, StateKind, StateSource, Wanted, portions};
use crate::autograd::device::{DeviceParams, MeshAxes, PieceLayout, PieceParams};
use crate::autograd::{DeviceExecutor, Graph};
use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::parallel::device::{BLOCKS, DeviceRing};
use crate::parallel::zero::{Slice, Unit, Units};
use crate::parallel::{DeviceGroup, MeshGroups, Rings};

/// A rank of a training on devices.
#[derive(Clone)]
pub struct DeviceRanks {
    /// The groups of the host.
    pub host: Rc<MeshGroups>,
    /// All ranks.
    pub world: Rc<DeviceGroup>,
    /// Ranks with the same part of the layers.
    pub data: Rc<DeviceGroup>,
    /// Ranks with the same batch.
    pub tensor: Rc<DeviceGroup>,
    /// The same again: what it sums is queued beside what the data axis does.
    pub sums: Rc<DeviceGroup>,
    /// The rings in which what the tensor axis exchanges moves while products run; none: before and after.
    pub overlap: Option<Rings>,
}

impl DeviceRanks {
    /// Connects `device` with those of the other ranks, all of which call it.
    ///
    /// # Errors
    /// On every rank the same: devices that nothing connects; the failure that has ended the ranks.
    pub fn connect(host: Rc<MeshGroups>, device: &Device) -> Result<Self> {
        host.world.check_same("devices", &device.info().shape())?;
        let blocks = (host.tensor.size() > 1).then_some(BLOCKS);
        let tensor = Rc::new(DeviceGroup::with_blocks(&host.tensor, device, blocks)?);
        Ok(Self {
            world: Rc::new(DeviceGroup::new(&host.world, device)?),
            data: Rc::new(DeviceGroup::with_blocks(&host.data, device, blocks)?),
            sums: Rc::new(DeviceGroup::with_blocks(&host.tensor, device, blocks)?),
            overlap: DeviceRing::of(&tensor),
            tensor,
            host,
        })
    }
}

/// Weights, their moving average where one is kept, and gradients.
pub(super) enum Weights {
    /// Of one rank; the executor has the gradients.
    Whole { params: Arc<DeviceParams>, average: Option<Arc<DeviceParams>> },
    /// Of one of several; the other ranks have theirs.
    Pieces { params: Arc<PieceParams>, average: Option<Arc<PieceParams>>, grads: Buffer<f32> },
}

impl Weights {
    /// Bytes of everything that grows with the model but for the moments.
    pub(super) fn bytes(&self, executor: &DeviceExecutor) -> usize {
        let grads = |grads: &Buffer<f32>| grads.len() * size_of::<f32>();
        match self {
            Self::Whole { params, average } => {
                let average = average.as_ref().map_or(0, |average| average.bytes());
                params.bytes() + average + grads(executor.grads())
            }
            Self::Pieces { params, average, grads: own } => {
                let average = average.as_ref().map_or(0, |average| average.bytes());
                params.bytes() + average + grads(own)
            }
        }
    }

    /// The mesh as an executor sees it: of a training, or of an evaluation, which uses the average where there is
    /// one.
    pub(super) fn axes(&self, ranks: Option<&DeviceRanks>, training: bool) -> Result<MeshAxes> {
        let Self::Pieces { params, average, grads } = self else {
            return Err(Error::failure("one rank has no mesh"));
        };
        let all = 0..grads.len() * size_of::<f32>();
        Ok(MeshAxes {
            group: ranks.map(|ranks| ranks.data.clone()),
            tensor: ranks.map(|ranks| ranks.tensor.clone()),
            sums: ranks.map(|ranks| ranks.sums.clone()),
            overlap: ranks.and_then(|ranks| ranks.overlap),
            params: if training { params } else { average.as_ref().unwrap_or(params) }.clone(),
            grads: training.then(|| grads.view(all)).transpose()?,
        })
    }

    /// What the optimiser works on.
    pub(super) fn arenas<'a>(&'a self, executor: &'a DeviceExecutor) -> Arenas<'a> {
        let (master, average) = (self.master(), self.average());
        match self {
            Self::Whole { params, .. } => {
                Arenas { master, weights: params.weights(), grads: executor.grads(), average }
            }
            Self::Pieces { params, grads, .. } => {
                Arenas { master, weights: params.weights(), grads, average }
            }
        }
    }

    /// Queues the copy of the average in bf16, which an evaluation reads.
    pub(super) fn round_average(&self, stream: &Stream) -> Result<()> {
        match self {
            Self::Whole { average: Some(average), .. } => average.round(stream),
            Self::Pieces { average: Some(average), .. } => average.round(stream),
            _ => Ok(()),
        }
    }

    /// Where the tensors of `kind` are; none where none are kept.
    fn arena<'a>(&'a self, optimizer: &'a DeviceOptimizer, kind: StateKind) -> Option<Values<'a>> {
        match kind {
            StateKind::First => Some(optimizer.first()),
            StateKind::Second => optimizer.second(),
            StateKind::Weights => Some(Values::Single(self.master())),
            StateKind::Average => self.average().map(Values::Single),
        }
    }

    fn master(&self) -> &Buffer<f32> {
        match self {
            Self::Whole { params, .. } => params.master(),
            Self::Pieces { params, .. } => params.master(),
        }
    }

    fn average(&self) -> Option<&Buffer<f32>> {
        match self {
            Self::Whole { average, .. } => average.as_ref().map(|average| average.master()),
            Self::Pieces { average, .. } => average.as_ref().map(|average| average.master()),
        }
    }

    /// Whether an average is kept.
    pub(super) fn keeps_average(&self) -> bool {
        self.average().is_some()
    }

    /// Replaces everything by `state`.
    pub(super) fn load(
        &self,
        stream: &Stream,
        graph: &Graph,
        units: &Units,
        optimizer: &DeviceOptimizer,
        state: &dyn StateSource,
    ) -> Result<()> {
        let load = |kind| -> Result<()> {
            let Some(arena) = self.arena(optimizer, kind) else { return Ok(()) };
            let size = |unit: &Unit| unit.params.clone().map(|p| graph.params()[p].len()).sum();
            for portion in portions(units.units().iter().map(size)) {
                let wanted: Vec<Wanted> = portion
                    .clone()
                    .flat_map(|unit| self.slices_of(units, unit, units.rank().rank))
                    .map(|slice| wanted(graph, &slice))
                    .collect();
                let tensors = state.read(kind, &wanted)?;
                self.write(stream, arena, units, portion, tensors)?;
            }
            Ok(())
        };
        load(StateKind::Weights)?;
        match (state.average(), self.keeps_average()) {
            (Average::None, false) => {}
            (Average::Own, true) => load(StateKind::Average)?,
            (Average::Weights, true) => {
                if let Some(average) = self.average() {
                    average.copy_from(stream, self.master())?;
                }
            }
            _ => return Err(Error::failure("a state with a moving average goes with train.ema alone")),
        }
        load(StateKind::First)?;
        load(StateKind::Second)?;
        let lens = optimizer.statistic_lens(graph.params());
        if !lens.is_empty() {
            optimizer.write_statistics(stream, &state.statistics(&lens)?)?;
        }
        optimizer.write_step(stream, state.optimizer_step())?;
        match self {
            Self::Whole { params, .. } => params.round(stream)?,
            Self::Pieces { params, .. } => params.round(stream)?,
        }
        self.round_average(stream)
    }

    /// What rank `data` of the data axis has of a unit.
    pub(super) fn slices_of(&self, units: &Units, unit: usize, data: usize) -> Vec<Slice> {
        match self {
            Self::Whole { .. } => units.slices_of(unit, data),
            Self::Pieces { params, .. } => {
                let layout = params.layout();
                segments(layout, unit).flat_map(|segment| layout.slices_of(segment, data)).collect()
            }
        }
    }

    /// Replaces what this rank has of some units by `tensors`, which are in the order of its slices.
    fn write(
        &self,
        stream: &Stream,
        arena: Values<'_>,
        units: &Units,
        portion: Range<usize>,
        tensors: Vec<Vec<f32>>,
    ) -> Result<()> {
        match self {
            Self::Whole { params, .. } => {
                let (layout, ranges) = (params.layout(), params.layout().arena().ranges());
                let params =
                    units.units()[portion.start].params.start..units.units()[portion.end - 1].params.end;
                let range = span(ranges, params.clone());
                let mut packed = vec![0.0; range.len()];
                for (p, values) in params.zip(tensors) {
                    let place = ranges[p].start - range.start..ranges[p].end - range.start;
                    layout.pack_one(p, &mut packed[place], &values)?;
                }
                arena.write(stream, range, &packed)
            }
            Self::Pieces { params, .. } => {
                let (layout, mut tensors) = (params.layout(), tensors.into_iter());
                for segment in portion.flat_map(|unit| segments(layout, unit)) {
                    let count = layout.slices_of(segment, layout.rank().rank).len();
                    let slices: Vec<Vec<f32>> = tensors.by_ref().take(count).collect();
                    let piece = layout.segments()[segment].piece.clone();
                    arena.write(stream, piece, &layout.pack(segment, &slices))?;
                }
                Ok(())
            }
        }
    }

    /// Hands over what this rank has of a unit, in the order of its slices, once everything queued has run.
    pub(super) fn read(
        &self,
        units: &Units,
        optimizer: &DeviceOptimizer,
        (kind, unit): (StateKind, usize),
        take: &mut dyn FnMut(&Slice, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let Some(arena) = self.arena(optimizer, kind) else { return Ok(()) };
        match self {
            Self::Whole { params, .. } => {
                let (layout, ranges) = (params.layout(), params.layout().arena().ranges());
                let range = span(ranges, units.units()[unit].params.clone());
                let packed = arena.read(range.clone())?;
                for slice in units.slices_of(unit, 0) {
                    let place = &ranges[slice.param];
                    let padded = &packed[place.start - range.start..place.end - range.start];
                    take(&slice, &layout.unpack_one(slice.param, padded))?;
                }
            }
            Self::Pieces { params, .. } => {
                let layout = params.layout();
                for segment in segments(layout, unit) {
                    let piece = arena.read(layout.segments()[segment].piece.clone())?;
                    let slices = layout.slices_of(segment, layout.rank().rank);
                    for (slice, values) in slices.iter().zip(layout.unpack(segment, &piece)) {
                        take(slice, &values)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// From the first of these parameters to the last.
fn span(ranges: &[Range<usize>], params: Range<usize>) -> Range<usize> {
    ranges[params.start].start..ranges[params.end - 1].end
}

/// The segments of a unit.
fn segments(layout: &PieceLayout, unit: usize) -> impl Iterator<Item = usize> {
    let segments = layout.segments().iter().enumerate();
    segments.filter(move |(_, segment)| segment.unit == unit).map(|(i, _)| i)
}

/// A rank's pieces on a device, zeros.
pub(super) fn pieces(device: &Device, layout: Arc<PieceLayout>, keep_average: bool) -> Result<Weights> {
    let grads = device.zeros(layout.arena().len())?;
    let average = keep_average.then(|| PieceParams::new(device, layout.clone()).map(Arc::new)).transpose()?;
    Ok(Weights::Pieces { params: Arc::new(PieceParams::new(device, layout)?), average, grads })
}
