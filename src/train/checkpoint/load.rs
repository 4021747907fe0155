//! How checkpoints are read: as a whole model, or the slices of a rank, tensor by tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{FIRST, Header, SECOND, STATISTICS, TRAINING, WEIGHTS, damaged};
use crate::autograd::ParamSpec;
use crate::cpu::optim::adafactor::Factoring;
use crate::recipe::OptimizerKind;
use crate::train::engine::{Average, StateKind, StateSource, Wanted};
use crate::weights::{Tensors, Weights, check_fit, foreign};
use crate::{Error, Result};

/// Reads the model of a checkpoint or another safetensors file and, where trencadis wrote it, its description.
/// Training state is skipped, and what is no part of the network in a file of another program ([`foreign::ignored`])
/// has no values: it may be of any type.
///
/// # Errors
/// [`Error::Usage`] naming the file, if it is absent or damaged.
pub fn load_model(path: &Path) -> Result<(Option<Header>, Weights)> {
    let stored = Tensors::open(path)?;
    let metadata = stored.metadata();
    let header = match metadata.contains_key("trencadis") {
        true => Some(Header::read(stored.path(), &metadata)?),
        false => None,
    };
    let names: Vec<String> = stored.names().into_iter().filter(|name| !name.starts_with(TRAINING)).collect();
    let ignored = match header {
        Some(_) => BTreeSet::new(),
        None => {
            foreign::ignored(names.iter().map(|name| (name.as_str(), stored.shape(name).unwrap_or_default())))
        }
    };
    let mut tensors = BTreeMap::new();
    for name in names {
        let shape = stored.shape(&name).unwrap_or_default().to_vec();
        if ignored.contains(&name) {
            tensors.insert(name, (shape, Vec::new()));
            continue;
        }
        let values = stored.read(&name, std::slice::from_ref(&(0..shape.iter().product())))?;
        tensors.insert(name, (shape, values));
    }
    Ok((header, Weights { tensors, metadata }))
}

/// Reads the description of a checkpoint and none of its tensors.
///
/// # Errors
/// [`Error::Usage`] naming the file, if it is absent, damaged or not written by trencadis.
pub fn load_header(path: &Path) -> Result<Header> {
    Header::read(path, &Tensors::load_metadata(path)?)
}

/// Opens everything that resuming with `optimizer` needs, of which a rank then reads what it keeps.
///
/// # Errors
/// [`Error::Usage`] naming the file, if it is absent, damaged, not written by trencadis, holds no
/// training state, or does not fit `params`.
pub fn open_training(
    path: &Path,
    params: &[ParamSpec],
    optimizer: OptimizerKind,
) -> Result<(Header, SavedTraining)> {
    let tensors = Tensors::open(path)?;
    let path = tensors.path();
    let names = tensors.names();
    names.iter().try_for_each(|name| tensors.check_type(name))?;
    let metadata = tensors.metadata();
    let header = Header::read(path, &metadata)?;
    let Some(optimizer_step) = metadata.get("optimizer_step") else {
        return Err(Error::file(path, "holds a model without training state; resume from last.safetensors"));
    };
    let optimizer_step = optimizer_step.parse().map_err(|_| damaged(path, "optimizer_step"))?;
    let mut found = [WEIGHTS, FIRST, SECOND, STATISTICS, ""].map(|prefix| (prefix, BTreeMap::new()));
    for name in &names {
        let shape = tensors.shape(name).unwrap_or_default();
        for (prefix, found) in &mut found {
            if let Some(name) = name.strip_prefix(*prefix) {
                found.insert(name, shape);
                break;
            }
        }
    }
    let [(_, raw), (_, first), (_, second), (_, statistics), (_, model)] = found;
    let average = !raw.is_empty();
    let second = optimizer.keeps_second().then_some(second);
    for found in [Some(model), average.then_some(raw), Some(first), second].into_iter().flatten() {
        check_fit(path, &found, params.iter())?;
    }
    let factorings = optimizer.factorings(params);
    let summed: Vec<ParamSpec> = params.iter().zip(&factorings).map(statistic).collect();
    if !summed.is_empty() {
        check_fit(path, &statistics, summed.iter())?;
    }
    Ok((header, SavedTraining { params: params.to_vec(), average, optimizer_step, tensors }))
}

/// A parameter as what is kept of its second moments.
fn statistic((param, factoring): (&ParamSpec, &Factoring)) -> ParamSpec {
    ParamSpec { shape: vec![factoring.len()], ..param.clone() }
}

/// An open checkpoint to resume from.
#[derive(Debug)]
pub struct SavedTraining {
    tensors: Tensors,
    params: Vec<ParamSpec>,
    average: bool,
    optimizer_step: u64,
}

impl StateSource for SavedTraining {
    fn optimizer_step(&self) -> u64 {
        self.optimizer_step
    }

    fn average(&self) -> Average {
        if self.average { Average::Own } else { Average::None }
    }

    fn statistics(&self, lens: &[usize]) -> Result<Vec<Vec<f32>>> {
        let read = |(param, &len): (&ParamSpec, &usize)| {
            self.tensors.read(&format!("{STATISTICS}{}", param.name), std::slice::from_ref(&(0..len)))
        };
        self.params.iter().zip(lens).map(read).collect()
    }

    fn read(&self, kind: StateKind, wanted: &[Wanted]) -> Result<Vec<Vec<f32>>> {
        let prefix = match kind {
            StateKind::Weights if self.average => WEIGHTS,
            StateKind::Weights | StateKind::Average => "",
            StateKind::First => FIRST,
            StateKind::Second => SECOND,
        };
        let read = |Wanted { param, runs }: &Wanted| {
            self.tensors.read(&format!("{prefix}{}", self.params[*param].name), runs)
        };
        wanted.iter().map(read).collect()
    }
}
