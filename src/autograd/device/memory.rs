//! Where the tensors of a graph are on a device.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;

use super::super::graph::{Extent, Graph, Kind, Tensor};
use super::gathered::Gathered;
use super::layout::{ArenaPlan, Element, ROW_UNIT};
use super::params::DeviceParams;
use super::shape::BatchShape;
use super::site::{Live, Matrix};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};

/// Everything that a step reads and writes, made once.
pub(super) struct Memory {
    pub device: Device,
    /// Of the images.
    pub shape: BatchShape,
    /// Of the texts.
    pub texts: Option<BatchShape>,
    pub layout: ArenaPlan,
    pub activations: Buffer<u8>,
    pub params: ParamMemory,
    /// Whether each parameter has been read in bf16, and in f32.
    pub asked: Mutex<Vec<[bool; 2]>>,
}

/// Where parameters and their gradients are.
pub(super) enum ParamMemory {
    /// All in one arena each; gradients are empty for a forward pass alone.
    Whole(Arc<DeviceParams>, Buffer<f32>),
    /// With the ranks of the data axis.
    Gathered(Box<Gathered>),
}

impl ParamMemory {
    /// What the data axis shares out, where it does.
    pub fn gathered(&self) -> Option<&Gathered> {
        match self {
            Self::Whole(..) => None,
            Self::Gathered(gathered) => Some(gathered),
        }
    }
}

impl Memory {
    /// A parameter as node `at` reads it.
    fn param<T: Pod>(
        &self,
        p: usize,
        at: usize,
        element: Element,
        arena: impl Fn(&DeviceParams) -> &Buffer<T>,
    ) -> Result<Buffer<T>> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() <= p {
            asked.resize(p + 1, [false; 2]);
        }
        asked[p][usize::from(element == Element::F32)] = true;
        match &self.params {
            ParamMemory::Whole(params, _) => in_arena(params, arena(params), p),
            ParamMemory::Gathered(gathered) => gathered.param(p, at, element),
        }
    }

    /// Rows and columns of parameter `p`.
    fn param_shape(&self, p: usize) -> [usize; 2] {
        match &self.params {
            ParamMemory::Whole(params, _) => params.layout().shape(p),
            ParamMemory::Gathered(gathered) => gathered.shape(p),
        }
    }

    /// A tensor in bf16 as node `at` sees it: an activation, or the copy of a parameter.
    pub fn matrix(&self, graph: &Graph, tensor: Tensor, at: usize) -> Result<Matrix> {
        let info = graph.info(tensor);
        let (buffer, [rows, cols]) = match (info.kind, &self.layout.slots[tensor.0]) {
            (Kind::Parameter(p), _) => {
                (self.param(p, at, Element::Bf16, DeviceParams::weights)?, self.param_shape(p))
            }
            (Kind::Activation, Some(slot)) if self.layout.elements[tensor.0] == Element::Bf16 => {
                (self.activations.view(slot.clone())?, [info.rows, info.cols.next_multiple_of(ROW_UNIT)])
            }
            _ => return Err(elsewhere(&info.name, "bf16")),
        };
        let live = match info.extent {
            Extent::Tokens => Live::Tokens,
            Extent::Images => Live::Images,
            Extent::Fixed => Live::All,
            Extent::Shard(_) => Live::Shard,
        };
        Ok(Matrix { buffer, rows, cols, live })
    }

    /// A tensor in f32: a parameter, its gradient, or statistics.
    pub fn vector(&self, graph: &Graph, tensor: Tensor, at: usize) -> Result<Buffer<f32>> {
        let info = graph.info(tensor);
        match (info.kind, &self.layout.slots[tensor.0]) {
            (Kind::Parameter(p), _) => self.param(p, at, Element::F32, DeviceParams::master),
            (Kind::Gradient(p), _) => match &self.params {
                ParamMemory::Whole(params, grads) => in_arena(params, grads, p),
                ParamMemory::Gathered(gathered) => gathered.grad(p),
            },
            (Kind::Activation, Some(slot)) if self.layout.elements[tensor.0] == Element::F32 => {
                self.activations.view(slot.clone())
            }
            _ => Err(elsewhere(&info.name, "f32")),
        }
    }
}

fn in_arena<T: Pod>(params: &DeviceParams, arena: &Buffer<T>, p: usize) -> Result<Buffer<T>> {
    let range = &params.layout().arena().ranges()[p];
    arena.view(range.start * size_of::<T>()..range.end * size_of::<T>())
}

fn elsewhere(name: &str, element: &str) -> Error {
    Error::failure(format!("{name} is not in device memory as {element}; use --device cpu for this model"))
}
