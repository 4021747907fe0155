//! Steps of a training on a device: queued, launched, collected.

use std::sync::Arc;

use super::super::device_optimizer::Update;
use super::super::device_weights::DeviceRanks;
use super::super::slices::sum_outcome;
use super::super::{Engine, StateParts, other_model};
use super::{Batch, DeviceEngine, Evaluation, PLACES, Partial};
use crate::autograd::{ParamSpec, StepState, Workload};
use crate::data::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::eval::model::Forward;
use crate::eval::towers::Embed;
use crate::kernels::loss;
use crate::parallel::device::DeviceTransport;
use crate::train::step::StepOutcome;

impl DeviceEngine {
    /// Queues one batch, the first of a step or not, and the update where it is the last.
    fn queue_batch(&mut self, batch: &PackedBatch, first: bool, update: Option<Update>) -> Result<()> {
        let at = (self.queued % PLACES as u64) as usize;
        if self.under_way.len() == PLACES {
            self.collect_batch()?;
        }
        // What is there now must have been read before it is overwritten.
        if let Some(ended) = &self.places[at].ended {
            self.copies.wait(ended)?;
        }
        // Losses are not scaled: how many images a step has is known with its last batch alone.
        let state = StepState { seed: self.seed, loss_scale: 1.0 };
        self.executor.write_batch(at, &self.copies, batch, &state)?;
        self.optimizer.write(at, &self.copies, first, update)?;
        let copied = self.copies.record()?;
        self.executor.stream().wait(&copied)?;
        let begun = self.executor.stream().record()?;
        self.run(at)?;
        let (stream, place) = (self.executor.stream(), &mut self.places[at]);
        self.per_image.read_pinned(stream, &mut place.losses)?;
        self.executor.rank().read_pinned(stream, &mut place.rank)?;
        self.executor.label_fault().read_pinned(stream, &mut place.fault)?;
        self.optimizer.state().read_pinned(stream, &mut place.state)?;
        let ended = Arc::new(stream.record()?);
        place.ended = Some(ended.clone());
        self.queued += 1;
        self.under_way.push_back(Batch {
            place: at,
            images: update.map(|update| update.images),
            tokens: batch.live_tokens(),
            budget: batch.tokens(),
            flops: self.step.flops(&Workload::of(batch)),
            begun,
            ended,
        });
        Ok(())
    }

    /// Queues the launches over batch `at`. The first ones are plain: they load the kernels' code, which takes
    /// time and memory that a capture should not wait for.
    fn run(&mut self, at: usize) -> Result<()> {
        let stream = self.executor.stream();
        // Threads that share a device meet at every operation. And a graph does not say that what raises flags comes
        // before the launches that wait for them, as streams do by the order in which they are queued.
        let meet = |ranks: &DeviceRanks| {
            ranks.overlap.is_some() || ranks.world.transport() == DeviceTransport::Local
        };
        if self.options.no_graph || self.queued == 0 || self.ranks.as_ref().is_some_and(meet) {
            return self.launch(at);
        }
        if self.places[at].graph.is_none() {
            stream.begin_capture()?;
            let launched = self.launch(at);
            let graph = stream.end_capture();
            launched?;
            self.places[at].graph = Some(graph?);
        }
        self.places[at].graph.as_ref().map_or(Ok(()), |graph| graph.launch(stream))
    }

    fn launch(&self, at: usize) -> Result<()> {
        self.clear(at)?;
        self.executor.launch(at)?;
        self.update(at)
    }

    /// Queues zero gradients, where batch `at` is the first of its step.
    pub(super) fn clear(&self, at: usize) -> Result<()> {
        let grads = self.weights.arenas(&self.executor).grads;
        self.optimizer.before(at, self.executor.stream(), grads)
    }

    /// Queues the update, where it is the last.
    pub(super) fn update(&self, at: usize) -> Result<()> {
        self.optimizer.after(at, self.executor.stream(), &self.weights.arenas(&self.executor))
    }

    /// Waits for the oldest batch and reads what it did.
    fn collect_batch(&mut self) -> Result<()> {
        let Some(batch) = self.under_way.pop_front() else {
            return Err(Error::failure("no step is queued that could be collected"));
        };
        if let Some(ranks) = &self.ranks {
            ranks.world.watched(|| batch.ended.synchronize())?;
        }
        let place = &mut self.places[batch.place];
        let losses = place.losses.read()?;
        let loss: f64 = losses.iter().map(|x| f64::from(*x)).sum();
        loss::fault(place.fault.read()?[0])?;
        let Partial { outcome, recognised, idle } = &mut self.partial;
        outcome.loss += loss;
        outcome.tokens += batch.tokens;
        outcome.budget += batch.budget;
        outcome.flops += batch.flops;
        // -1 where an image has no weight.
        for rank in place.rank.read()?.iter().filter(|rank| **rank >= 0) {
            outcome.images += 1;
            *recognised += u64::from(*rank == 0);
        }
        if let Some(before) = self.ended.replace(batch.ended.clone()) {
            let seconds = f64::from(before.elapsed_ms(&batch.begun)?.max(0.0)) / 1e3;
            *idle = Some(idle.unwrap_or(0.0) + seconds);
        }
        if let Some(images) = batch.images {
            let Partial { mut outcome, recognised, idle } = std::mem::take(&mut self.partial);
            // Of several ranks each has its images' part of the sum.
            outcome.loss /= images;
            outcome.accuracy = recognised as f64 / outcome.images.max(1) as f64;
            outcome.grad_norm = place.state.read()?[0].norm;
            // Of the first step nobody knows how long the device had waited.
            outcome.idle = Some(idle.unwrap_or(0.0));
            if let Some(ranks) = &self.ranks {
                outcome = sum_outcome(&ranks.host.data, outcome)?;
            }
            self.finished.push_back(outcome);
        }
        Ok(())
    }

    /// Waits for everything that is queued, so that something else can run. A step that is not whole is forgotten.
    pub(super) fn settle(&mut self) -> Result<()> {
        while !self.under_way.is_empty() {
            self.collect_batch()?;
        }
        (self.ended, self.weight, self.partial) = (None, None, Partial::default());
        self.executor.check()
    }
}

impl Engine for DeviceEngine {
    fn params(&self) -> &[ParamSpec] {
        self.step.params()
    }

    fn depth(&self) -> usize {
        PLACES
    }

    fn add(&mut self, batch: &PackedBatch, last: Option<f64>) -> Result<()> {
        let first = self.weight.is_none();
        let weight = self.weight.unwrap_or(0.0) + batch.weights.iter().map(|w| f64::from(*w)).sum::<f64>();
        self.weight = last.is_none().then_some(weight);
        let mut weight = [weight];
        if let (Some(ranks), true) = (&self.ranks, last.is_some()) {
            ranks.host.data.all_reduce(&mut weight)?;
        }
        let [weight] = weight;
        let update = last.map(|lr| Update { lr, images: weight.max(1.0) });
        self.queue_batch(batch, first, update)
    }

    fn is_ready(&self) -> bool {
        !self.finished.is_empty()
    }

    fn collect(&mut self) -> Result<StepOutcome> {
        loop {
            if let Some(outcome) = self.finished.pop_front() {
                return Ok(outcome);
            }
            self.collect_batch()?;
        }
    }

    fn parts(&mut self) -> Result<&dyn StateParts> {
        self.settle()?;
        Ok(self)
    }

    fn model(&mut self) -> Result<Box<dyn Forward + '_>> {
        self.settle()?;
        self.weights.round_average(self.executor.stream())?;
        match &mut self.evaluated {
            Evaluation::Classes(model) => Ok(Box::new(model.as_mut())),
            Evaluation::Towers(_) => Err(other_model()),
        }
    }

    fn towers(&mut self) -> Result<Box<dyn Embed + '_>> {
        self.settle()?;
        self.weights.round_average(self.executor.stream())?;
        match &mut self.evaluated {
            Evaluation::Towers(towers) => Ok(Box::new(towers.as_mut())),
            Evaluation::Classes(_) => Err(other_model()),
        }
    }
}
