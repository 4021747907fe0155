//! What a training on a device hands over to be saved, once everything queued has run.

use std::ops::Range;

use super::DeviceEngine;
use crate::autograd::{ParamSpec, Split};
use crate::error::Result;
use crate::parallel::MeshGroups;
use crate::parallel::zero::Slice;
use crate::train::engine::{StateKind, StateParts};

impl StateParts for DeviceEngine {
    fn ranks(&self) -> &MeshGroups {
        &self.host
    }

    fn params(&self) -> &[ParamSpec] {
        self.step.params()
    }

    fn split(&self, param: usize) -> Split {
        self.step.graph().split(param)
    }

    fn optimizer_step(&self) -> Result<u64> {
        Ok(self.optimizer.state().download()?[0].step)
    }

    fn keeps_average(&self) -> bool {
        self.weights.keeps_average()
    }

    fn keeps_second(&self) -> bool {
        self.optimizer.second().is_some()
    }

    fn statistics(&self) -> Result<Vec<Vec<f32>>> {
        self.optimizer.statistics(self.step.params())
    }

    fn units(&self) -> Vec<Range<usize>> {
        self.units.units().iter().map(|unit| unit.params.clone()).collect()
    }

    fn slices_of(&self, unit: usize, data: usize) -> Vec<Slice> {
        self.weights.slices_of(&self.units, unit, data)
    }

    fn read(
        &self,
        kind: StateKind,
        unit: usize,
        take: &mut dyn FnMut(&Slice, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.weights.read(&self.units, &self.optimizer, (kind, unit), take)
    }
}
