//! Weights of a training on a device with what the optimiser keeps beside them: all on one rank, or pieces on each.

use std::rc::Rc;
use std::sync::Arc;

use super::TrainState;
use super::device_optimizer::{Arenas, DeviceOptimizer};
use crate::autograd::device::{DeviceParams, MeshAxes, PieceLayout, PieceParams};
use crate::autograd::{DeviceExecutor, Graph, Shard};
use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::parallel::device::{BLOCKS, DeviceRing};
use crate::parallel::{DeviceGroup, MeshGroups};

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
    /// Whether what the tensor axis exchanges moves while products run.
    pub overlap: bool,
}

impl DeviceRanks {
    /// Connects `device` with those of the other ranks, all of which call it.
    ///
    /// # Errors
    /// On every rank the same: devices that nothing connects; the failure that has ended the ranks.
    pub fn connect(host: Rc<MeshGroups>, device: &Device) -> Result<Self> {
        let info = device.info();
        host.world.check_same(
            "devices",
            &format!(
                "{} with {} multiprocessors and {} bytes of shared memory",
                info.name, info.multiprocessors, info.shared_per_block
            ),
        )?;
        let blocks = (host.tensor.size() > 1).then_some(BLOCKS);
        let tensor = Rc::new(DeviceGroup::with_blocks(&host.tensor, device, blocks)?);
        Ok(Self {
            world: Rc::new(DeviceGroup::new(&host.world, device)?),
            data: Rc::new(DeviceGroup::with_blocks(&host.data, device, blocks)?),
            sums: Rc::new(DeviceGroup::with_blocks(&host.tensor, device, blocks)?),
            overlap: DeviceRing::fits(&tensor),
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
            overlap: ranks.is_some_and(|ranks| ranks.overlap),
            params: if training { params } else { average.as_ref().unwrap_or(params) }.clone(),
            grads: training.then(|| grads.view(all)).transpose()?,
        })
    }

    /// What the optimiser works on.
    pub(super) fn arenas<'a>(&'a self, executor: &'a DeviceExecutor) -> Arenas<'a> {
        match self {
            Self::Whole { params, average } => Arenas {
                master: params.master(),
                weights: params.weights(),
                grads: executor.grads(),
                average: average.as_ref().map(|average| average.master()),
            },
            Self::Pieces { params, average, grads } => Arenas {
                master: params.master(),
                weights: params.weights(),
                grads,
                average: average.as_ref().map(|average| average.master()),
            },
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

    /// Replaces everything by `state`, which is of the whole model.
    pub(super) fn load(
        &self,
        stream: &Stream,
        graph: &Graph,
        optimizer: &mut DeviceOptimizer,
        state: &TrainState<'_>,
    ) -> Result<()> {
        let without = || Error::failure("a state with a moving average goes with train.ema alone");
        match self {
            Self::Whole { params, average } => {
                params.write(stream, &state.weights)?;
                match (average, &state.ema) {
                    (Some(average), Some(values)) => average.write(stream, values)?,
                    (None, None) => {}
                    _ => return Err(without()),
                }
                let layout = params.layout();
                let [m, v] = [layout.pack(&state.m)?, layout.pack(&state.v)?];
                optimizer.load(stream, [&m, &v], state.optimizer_step)
            }
            Self::Pieces { params, average, .. } => {
                params.write(stream, &part(graph, &state.weights)?)?;
                match (average, &state.ema) {
                    (Some(average), Some(values)) => average.write(stream, &part(graph, values)?)?,
                    (None, None) => {}
                    _ => return Err(without()),
                }
                let layout = params.layout();
                let [m, v] = [layout.cut(&part(graph, &state.m)?), layout.cut(&part(graph, &state.v)?)];
                optimizer.load(stream, [&m, &v], state.optimizer_step)
            }
        }
    }

    /// The state of the whole model once everything queued has run; of several ranks, on the first.
    pub(super) fn read(
        &self,
        graph: &Graph,
        optimizer: &DeviceOptimizer,
        ranks: Option<&DeviceRanks>,
    ) -> Result<TrainState<'static>> {
        let [m, v] = optimizer.moments();
        let optimizer_step = optimizer.state().download()?[0].step;
        match self {
            Self::Whole { params, average } => {
                let layout = params.layout();
                let ema = average.as_ref().map(|average| average.read()).transpose()?;
                Ok(TrainState {
                    weights: params.read()?.into(),
                    ema: ema.map(Into::into),
                    m: layout.unpack(&m.download()?).into(),
                    v: layout.unpack(&v.download()?).into(),
                    optimizer_step,
                })
            }
            Self::Pieces { params, average, .. } => {
                let merge = |arena: &Buffer<f32>| {
                    merge(graph, params.layout(), ranks, arena.download()?).map(Into::into)
                };
                Ok(TrainState {
                    weights: merge(params.master())?,
                    ema: average.as_ref().map(|average| merge(average.master())).transpose()?,
                    m: merge(m)?,
                    v: merge(v)?,
                    optimizer_step,
                })
            }
        }
    }
}

/// This rank's parts of whole parameters.
fn part(graph: &Graph, whole: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
    if whole.len() != graph.params().len() {
        return Err(Error::usage(format!(
            "a state of {} parameters does not fit a model of {}",
            whole.len(),
            graph.params().len()
        )));
    }
    let part = |(p, whole): (usize, &Vec<f32>)| {
        let param = &graph.params()[p];
        match whole.len() == param.len() {
            true => Ok(graph.split(p).part(whole, &param.shape, graph.shard())),
            false => Err(Error::usage(format!(
                "{} has {} elements in the state and {} in the model",
                param.name,
                whole.len(),
                param.len()
            ))),
        }
    };
    whole.iter().enumerate().map(part).collect()
}

/// The whole parameters on rank 0 from the pieces of all ranks; nothing on the others.
fn merge(
    graph: &Graph,
    layout: &PieceLayout,
    ranks: Option<&DeviceRanks>,
    own: Vec<f32>,
) -> Result<Vec<Vec<f32>>> {
    let Some(DeviceRanks { host, .. }) = ranks else {
        return Err(Error::failure("there are no ranks where memory is only counted"));
    };
    let (world, mesh) = (&host.world, host.mesh);
    if world.rank() != 0 {
        world.post(0, &own)?;
        return Ok(Vec::new());
    }
    let mut whole: Vec<Vec<f32>> = graph.params().iter().map(|param| vec![0.0; param.len()]).collect();
    for tensor in 0..mesh.tensor() {
        let mut arenas = Vec::new();
        for data in 0..mesh.data() {
            let rank = data * mesh.tensor() + tensor;
            let mut arena = own.clone();
            if rank != 0 {
                world.receive(rank, &mut arena)?;
            }
            arenas.push(arena);
        }
        let shard = Shard { rank: tensor, size: mesh.tensor() };
        for (p, part) in layout.merge(&arenas).iter().enumerate() {
            let split = graph.split(p);
            if tensor == 0 || !split.is_replicated() {
                split.place(&mut whole[p], part, &graph.params()[p].shape, shard);
            }
        }
    }
    Ok(whole)
}

/// A rank's pieces on a device, zeros.
pub(super) fn pieces(device: &Device, layout: Arc<PieceLayout>, keep_average: bool) -> Result<Weights> {
    let grads = device.zeros(layout.arena().len())?;
    let average = keep_average.then(|| PieceParams::new(device, layout.clone()).map(Arc::new)).transpose()?;
    Ok(Weights::Pieces { params: Arc::new(PieceParams::new(device, layout)?), average, grads })
}
