//! Parameters that are gathered from the data axis when they are needed, and gradients that are summed into pieces.
//!
//! What is gathered for a visit of a unit, and the gradients of a unit, have their places in two arenas, laid out as
//! activations are: whatever is not there at one time may share memory. Gathering and summing run on a stream of
//! their own, so that a block computes while the next one's weights come and the last one's gradients go:
//!
//! | at | the stream of the kernels | the stream of the data axis |
//! |---|---|---|
//! | the first node of visit i | waits for the weights of visit i | waits for this node's turn, gathers visit i + 1 |
//! | the first gradient of a unit | clears its gradients | |
//! | the last gradient of a unit | waits for the sums of the unit before | waits for this node, sums, adds to the pieces |
//! | the end | waits for the last sums | |

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use half::bf16;

use super::super::graph::Graph;
use super::super::plan::Plan;
use super::layout::{Element, Interval, place};
use super::pieces::{PieceLayout, PieceParams, Segment};
use crate::device::{Buffer, Device, Event, Stream};
use crate::error::{Error, Result};
use crate::kernels::optim;
use crate::parallel::device::DeviceRing;
use crate::parallel::zero::{Action, Schedule, Units};
use crate::parallel::{DeviceGroup, Rings};

/// What an executor is given of a mesh.
pub struct MeshAxes {
    /// The ranks of the data axis; none where memory is only counted.
    pub group: Option<Rc<DeviceGroup>>,
    /// Those of the tensor axis; the same.
    pub tensor: Option<Rc<DeviceGroup>>,
    /// The same again, for sums beside those of the data axis.
    pub sums: Option<Rc<DeviceGroup>>,
    /// The rings in which what they exchange moves while products run, see [`DeviceRing`]; none: before and after.
    pub overlap: Option<Rings>,
    /// This rank's pieces of the parameters.
    pub params: Arc<PieceParams>,
    /// Its pieces of the gradients, which are added to; none for a forward pass alone.
    pub grads: Option<Buffer<f32>>,
}

/// Bytes of an element.
fn width(element: Element) -> usize {
    match element {
        Element::Bf16 => size_of::<bf16>(),
        Element::F32 => size_of::<f32>(),
    }
}

/// Where gathered parameters and gradients lie, and what is done when.
pub(super) struct Gathered {
    axis: MeshAxes,
    schedule: Schedule,
    /// Bytes of each segment in each visit; none where it is of another unit.
    weight_places: Vec<Vec<Option<Range<usize>>>>,
    weights: Buffer<u8>,
    /// Bytes of each segment's gradients; none where it has none.
    grad_places: Vec<Option<Range<usize>>>,
    grads: Buffer<u8>,
    /// Sums, before they are added to the pieces.
    sums: Option<Buffer<f32>>,
    communication: Stream,
    /// Where what the tensor axis exchanges moves while products run.
    ring: Option<DeviceRing>,
    /// When what was queued last on the other stream has run.
    progress: RefCell<Progress>,
}

/// Events of the stream of the data axis.
#[derive(Default)]
struct Progress {
    /// Of each visit that is on its way.
    gathered: Vec<Option<Event>>,
    /// Of the newest sums.
    summed: Option<Event>,
}

impl Gathered {
    /// The arenas of `graph`. `shared` is memory of one that never runs at the same time.
    pub(super) fn new(
        device: &Device,
        graph: &Graph,
        plan: &Plan,
        tokens: usize,
        axis: MeshAxes,
        shared: Option<&Gathered>,
    ) -> Result<Self> {
        let shard = graph.shard();
        let ring = axis.overlap.filter(|_| shard.is_part());
        let ring =
            ring.map(|rings| DeviceRing::new(device, shard, tokens / shard.size, rings)).transpose()?;
        let layout = axis.params.layout().clone();
        let units = Units::new(graph, layout.rank());
        let schedule = Schedule::new(graph, plan, &units);
        let (weight_places, weight_bytes) = weight_places(&layout, &schedule);
        let (grad_places, grad_bytes) = grad_places(&layout, &schedule, plan.order.len());
        let sums = axis.grads.as_ref().map(|_| {
            let longest = layout.segments().iter().map(|segment| segment.piece.len()).max();
            device.alloc(longest.unwrap_or(0))
        });
        let weights = match shared {
            Some(shared) if shared.weights.len() >= weight_bytes => shared.weights.view(0..weight_bytes)?,
            _ => device.alloc(weight_bytes)?,
        };
        Ok(Self {
            weights,
            grads: device.alloc(grad_bytes)?,
            sums: sums.transpose()?,
            communication: device.stream()?,
            ring,
            progress: RefCell::default(),
            axis,
            schedule,
            weight_places,
            grad_places,
        })
    }

    /// Bytes of gathered parameters, and of gradients and sums.
    pub(super) fn bytes(&self) -> [usize; 2] {
        let sums = self.sums.as_ref().map_or(0, |sums| sums.len() * size_of::<f32>());
        [self.weights.len(), self.grads.len() + sums]
    }

    /// Rows and columns of parameter `p`.
    pub(super) fn shape(&self, p: usize) -> [usize; 2] {
        self.layout().params().shape(p)
    }

    fn layout(&self) -> &PieceLayout {
        self.axis.params.layout()
    }

    /// Parameter `p` as node `at` reads it.
    pub(super) fn param<T: bytemuck::Pod>(&self, p: usize, at: usize, element: Element) -> Result<Buffer<T>> {
        let (segment, range) = self.layout().place(p);
        let own = &self.layout().segments()[segment];
        if own.element != element {
            return Err(Error::failure(format!(
                "parameter {p} is gathered as {:?} and read as {element:?}",
                own.element
            )));
        }
        let visits = self.schedule.visits();
        let visit = visits
            .iter()
            .position(|visit| visit.unit == own.unit && (visit.first..=visit.last).contains(&at));
        let place = visit.and_then(|visit| self.weight_places[visit][segment].clone());
        let Some(place) = place else {
            return Err(Error::failure(format!("parameter {p} is not there when node {at} runs")));
        };
        let first = place.start + range.start * size_of::<T>();
        self.weights.view(first..first + range.len() * size_of::<T>())
    }

    /// The gradient of parameter `p` before it is summed.
    pub(super) fn grad(&self, p: usize) -> Result<Buffer<f32>> {
        let (segment, range) = self.layout().place(p);
        let Some(place) = &self.grad_places[segment] else {
            return Err(Error::failure(format!("parameter {p} has no gradient")));
        };
        let first = place.start + range.start * size_of::<f32>();
        self.grads.view(first..first + range.len() * size_of::<f32>())
    }

    /// Queues what comes before node `at`.
    pub(super) fn before(&self, at: usize, stream: &Stream) -> Result<()> {
        self.schedule.before(at).iter().try_for_each(|action| self.act(*action, stream))
    }

    /// Queues what comes after node `at`.
    pub(super) fn after(&self, at: usize, stream: &Stream) -> Result<()> {
        self.schedule.after(at).iter().try_for_each(|action| self.act(*action, stream))
    }

    /// Lets `stream` wait for what is still on its way.
    pub(super) fn finish(&self, stream: &Stream) -> Result<()> {
        let summed = self.progress.borrow_mut().summed.take();
        summed.map_or(Ok(()), |event| stream.wait(&event))
    }

    /// The ranks of the tensor axis.
    pub(super) fn tensor(&self) -> Option<&DeviceGroup> {
        self.axis.tensor.as_deref()
    }

    /// Waits until everything on `stream` has run, and no longer than the ranks live.
    pub(super) fn synchronize(&self, stream: &Stream) -> Result<()> {
        // An axis of one rank watches nobody.
        let groups = [&self.axis.group, &self.axis.tensor];
        match groups.into_iter().flatten().find(|group| group.size() > 1) {
            Some(group) => group.synchronize(stream),
            None => stream.synchronize(),
        }
    }

    /// How what they exchange moves beside products, where it does.
    pub(super) fn ring(&self) -> Option<&DeviceRing> {
        self.ring.as_ref()
    }

    fn group(&self) -> Result<&DeviceGroup> {
        self.axis
            .group
            .as_deref()
            .ok_or_else(|| Error::failure("there are no ranks where memory is only counted"))
    }

    fn act(&self, action: Action, stream: &Stream) -> Result<()> {
        match action {
            Action::Post(visit) => self.post(visit, stream),
            Action::Await(visit) => {
                let gathered = self.progress.borrow_mut().gathered.get_mut(visit).and_then(Option::take);
                gathered.map_or(Ok(()), |event| stream.wait(&event))
            }
            Action::Release(_) => Ok(()),
            Action::Clear(unit) => self.clear(unit, stream),
            Action::Reduce(unit) => self.reduce(unit, stream),
        }
    }

    /// Segments of a unit, with their numbers.
    fn segments(&self, unit: usize) -> impl Iterator<Item = (usize, &Segment)> {
        self.layout().segments().iter().enumerate().filter(move |(_, segment)| segment.unit == unit)
    }

    /// Gathers a visit behind everything that was queued on `stream`.
    fn post(&self, visit: usize, stream: &Stream) -> Result<()> {
        let group = self.group()?;
        self.communication.wait(&stream.record()?)?;
        for (i, segment) in self.segments(self.schedule.visits()[visit].unit) {
            let Some(place) = self.weight_places[visit][i].clone() else { continue };
            match segment.element {
                Element::Bf16 => {
                    let mine = piece(self.axis.params.weights(), segment)?;
                    group.all_gather(&self.communication, &self.weights.view(place)?, &mine)?;
                }
                Element::F32 => {
                    let mine = piece(self.axis.params.master(), segment)?;
                    group.all_gather(&self.communication, &self.weights.view(place)?, &mine)?;
                }
            }
        }
        let event = self.communication.record()?;
        let gathered = &mut self.progress.borrow_mut().gathered;
        gathered.resize_with(self.schedule.visits().len(), || None);
        gathered[visit] = Some(event);
        Ok(())
    }

    fn clear(&self, unit: usize, stream: &Stream) -> Result<()> {
        let places = self.segments(unit).filter_map(|(i, _)| self.grad_places[i].clone());
        for place in places {
            optim::zero(stream, &self.grads.view(place)?, None)?;
        }
        Ok(())
    }

    fn reduce(&self, unit: usize, stream: &Stream) -> Result<()> {
        let (Some(pieces), Some(sums)) = (&self.axis.grads, &self.sums) else {
            return Err(Error::failure("a forward pass has no gradients"));
        };
        let group = self.group()?;
        // Behind this point the memory of the former unit's gradients is used again.
        self.finish(stream)?;
        self.communication.wait(&stream.record()?)?;
        for (i, segment) in self.segments(unit) {
            let Some(place) = self.grad_places[i].clone() else { continue };
            let sum = sums.view(0..segment.piece.len() * size_of::<f32>())?;
            group.reduce_scatter::<f32>(&self.communication, &sum, &self.grads.view(place)?)?;
            if let Some(sums) = self.axis.sums.as_deref().filter(|_| segment.summed) {
                sums.all_reduce::<f32>(&self.communication, &sum)?;
            }
            optim::add(&self.communication, &piece(pieces, segment)?, &sum)?;
        }
        self.progress.borrow_mut().summed = Some(self.communication.record()?);
        Ok(())
    }
}

/// The part of an arena of pieces that is of `segment`.
fn piece<T: bytemuck::Pod>(arena: &Buffer<T>, segment: &Segment) -> Result<Buffer<T>> {
    arena.view(segment.piece.start * size_of::<T>()..segment.piece.end * size_of::<T>())
}

/// A place for each segment of each visit, which is there from the beginning of the visit before.
fn weight_places(layout: &PieceLayout, schedule: &Schedule) -> (Vec<Vec<Option<Range<usize>>>>, usize) {
    let mut intervals = Vec::new();
    let mut owners = Vec::new();
    for (v, visit) in schedule.visits().iter().enumerate() {
        let first = v.checked_sub(1).map_or(0, |before| schedule.visits()[before].first);
        for (s, segment) in layout.segments().iter().enumerate().filter(|(_, s)| s.unit == visit.unit) {
            let bytes = segment.len * width(segment.element);
            intervals.push(Interval { bytes, first, last: visit.last });
            owners.push((v, s));
        }
    }
    let (offsets, bytes) = place(&intervals);
    let mut places = vec![vec![None; layout.segments().len()]; schedule.visits().len()];
    for ((interval, offset), (v, s)) in intervals.iter().zip(offsets).zip(owners) {
        places[v][s] = Some(offset..offset + interval.bytes);
    }
    (places, bytes)
}

/// A place for the gradients of each segment, which are there until those of the next unit are summed.
fn grad_places(
    layout: &PieceLayout,
    schedule: &Schedule,
    nodes: usize,
) -> (Vec<Option<Range<usize>>>, usize) {
    let gradients = schedule.gradients();
    let mut intervals = Vec::new();
    let mut owners = Vec::new();
    for (unit, span) in gradients.iter().enumerate() {
        let Some(span) = span else { continue };
        let later = gradients.iter().flatten().map(|other| other.last).filter(|last| *last > span.last).min();
        for (s, segment) in layout.segments().iter().enumerate().filter(|(_, s)| s.unit == unit) {
            let bytes = segment.len * size_of::<f32>();
            intervals.push(Interval { bytes, first: span.first, last: later.unwrap_or(nodes) });
            owners.push(s);
        }
    }
    let (offsets, bytes) = place(&intervals);
    let mut places = vec![None; layout.segments().len()];
    for ((interval, offset), s) in intervals.iter().zip(offsets).zip(owners) {
        places[s] = Some(offset..offset + interval.bytes);
    }
    (places, bytes)
}
