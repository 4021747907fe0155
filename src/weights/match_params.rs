//! Fits named weights to a model's parameters.

use std::collections::BTreeMap;
use std::path::Path;

use super::Weights;
use crate::autograd::ParamSpec;
use crate::nn::init::initialise;
use crate::recipe::shapes::nearest;
use crate::{Error, Result};

/// What must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Every parameter is present with its shape, and nothing else is (evaluate, resume).
    Exact,
    /// As [`Policy::Exact`], but the classification head is taken only if all of it fits, and
    /// starts afresh otherwise (`--init`).
    NewHead {
        /// Seed of the fresh head.
        seed: u64,
    },
}

/// What [`assign`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AssignReport {
    /// Number of parameters that were taken.
    pub taken: usize,
    /// Parameters that start afresh.
    pub fresh: Vec<String>,
    /// Tensors of the former head that were left out.
    pub dropped: Vec<String>,
}

/// At most this many names of a kind stand in an error.
const NAMES: usize = 8;

/// Values of `params`, in their order, taken out of `weights`. `file` is where the weights came
/// from, for errors.
///
/// # Errors
/// [`Error::Usage`] naming all tensors (of each kind the first eight) that are missing, left over, with the nearest
/// known name, or of another shape, with both shapes; a position table of another length names the recipe key to set.
pub fn assign(
    file: &Path,
    mut weights: Weights,
    params: &[ParamSpec],
    policy: Policy,
) -> Result<(Vec<Vec<f32>>, AssignReport)> {
    let fits =
        |weights: &Weights, p: &ParamSpec| weights.tensors.get(&p.name).is_some_and(|t| t.0 == p.shape);
    let head: Vec<_> = params.iter().filter(|p| p.head).cloned().collect();
    let mut report = AssignReport::default();
    let mut fresh = Vec::new();
    // A new head shares its module's name with the former one, whatever that one is made of.
    let modules: Vec<_> = head.iter().map(|p| module(&p.name)).collect();
    let former: Vec<_> = weights.tensors.keys().filter(|n| modules.contains(&module(n))).cloned().collect();
    if let Policy::NewHead { seed } = policy
        && !(former.len() == head.len() && head.iter().all(|p| fits(&weights, p)))
    {
        report.dropped = former;
        for name in &report.dropped {
            weights.tensors.remove(name);
        }
        report.fresh = head.iter().map(|p| p.name.clone()).collect();
        fresh = initialise(&head, seed);
    }
    let starts_afresh = |p: &ParamSpec| p.head && !report.fresh.is_empty();

    let found = weights.tensors.iter().map(|(name, (shape, _))| (name.as_str(), shape.as_slice())).collect();
    check_fit(file, &found, params.iter().filter(|p| !starts_afresh(p)))?;

    let mut fresh = fresh.into_iter();
    let values = params
        .iter()
        .map(|param| {
            let from = if starts_afresh(param) {
                fresh.next()
            } else {
                report.taken += 1;
                weights.tensors.remove(&param.name).map(|(_, values)| values)
            };
            from.ok_or_else(|| Error::file(file, format_args!("holds no tensor {}", param.name)))
        })
        .collect::<Result<_>>()?;
    Ok((values, report))
}

/// Whether tensors of these names and shapes are exactly those of `params`. `file` is where they came from, for
/// errors.
///
/// # Errors
/// Those of [`assign`].
pub fn check_fit<'a>(
    file: &Path,
    found: &BTreeMap<&str, &[usize]>,
    params: impl Iterator<Item = &'a ParamSpec>,
) -> Result<()> {
    let (mut problems, mut advices, mut surplus) = (Problems::default(), Vec::new(), found.clone());
    for param in params {
        match surplus.remove(param.name.as_str()) {
            None => problems.missing.push(param.name.clone()),
            Some(shape) if *shape != param.shape => match position_advice(param, shape) {
                Some(advice) => advices.push(advice),
                None => {
                    problems.misshapen.push(format!("{} {shape:?} (expected {:?})", param.name, param.shape))
                }
            },
            Some(_) => {}
        }
        problems.known.push(param.name.clone());
    }
    problems.unexpected = surplus.into_keys().map(str::to_owned).collect();
    let advice = advices.join("; ");
    match problems.sentence() {
        None if advices.is_empty() => Ok(()),
        None => Err(Error::file(file, advice)),
        Some(sentence) => {
            let also = if advices.is_empty() { String::new() } else { format!("; {advice}") };
            let told = "does not fit this model, use the recipe it was trained with";
            Err(Error::file(file, format_args!("{told} ({sentence}){also}")))
        }
    }
}

/// What is wrong with a set of tensors, by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Problems {
    /// Names that should be there.
    pub missing: Vec<String>,
    /// Names with the shape that they have and should have.
    pub misshapen: Vec<String>,
    /// Names that should not be there.
    pub unexpected: Vec<String>,
    /// All names that should be there.
    pub known: Vec<String>,
}

impl Problems {
    /// All of them in one sentence, each name of no use with the nearest one of use; none where there are none.
    pub fn sentence(&self) -> Option<String> {
        let near = |name: &str, among: &[String], what: &str| {
            let found = nearest(name, among.iter().map(String::as_str));
            found.map_or_else(|| name.to_owned(), |found| format!("{name} ({what}: {found})"))
        };
        let missing = first(&self.missing, |name| near(name, &self.unexpected, "nearest in the file"));
        let unexpected = first(&self.unexpected, |name| near(name, &self.known, "nearest known"));
        let misshapen = first(&self.misshapen, str::to_owned);
        let told: Vec<String> =
            [("of another shape", misshapen), ("missing", missing), ("unexpected", unexpected)]
                .into_iter()
                .filter(|(_, names)| !names.is_empty())
                .map(|(what, names)| format!("{what}: {names}"))
                .collect();
        (!told.is_empty()).then(|| told.join("; "))
    }
}

/// `head` for `head.weight`.
fn module(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

/// The sentence for a position table that differs in its number of rows alone.
fn position_advice(param: &ParamSpec, found: &[usize]) -> Option<String> {
    let (expected, width) = param.shape.split_at(param.shape.len().checked_sub(1)?);
    let (rows, found_width) = found.split_at(found.len().checked_sub(1)?);
    if width != found_width || rows.len() != expected.len() {
        return None;
    }
    let table = |lengths: &[usize]| lengths.iter().map(ToString::to_string).collect::<Vec<_>>().join("×");
    let (rows, expected) = (table(rows), table(expected));
    let setting = match param.name.as_str() {
        "position.row" => format!("set model.position.rows = {rows}"),
        "position.column" => format!("set model.position.columns = {rows}"),
        "position.table" => {
            format!(
                "set model.position.rows and model.position.columns to its sides, whose product is {rows}"
            )
        }
        _ => return None,
    };
    Some(format!(
        "position table {} has {rows} rows and this recipe asks for {expected}; {setting}",
        param.name
    ))
}

fn first(names: &[String], show: impl Fn(&str) -> String) -> String {
    let shown: Vec<String> = names.iter().take(NAMES).map(|name| show(name)).collect();
    let mut text = shown.join(", ");
    if names.len() > NAMES {
        text += &format!(" and {} more", names.len() - NAMES);
    }
    text
}
