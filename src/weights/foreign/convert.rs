//! Values from one set of names to the other, as a table says: forwards and backwards.

use std::collections::BTreeMap;

use super::axes::{Sizes, cut, paste, reorder};
use super::reading::{Reading, error};
use super::table::{Family, Rule, Side, fill};
use crate::weights::Weights;
use crate::{Error, Result};

/// Shape and row-major values.
pub(super) type Tensor = (Vec<usize>, Vec<f32>);
type Tensors = BTreeMap<String, Tensor>;

/// The tensors of a checked file under our names.
///
/// # Errors
/// A buffer that must be zero and is not.
pub(super) fn forwards(reading: &Reading, mut weights: Weights, sizes: &Sizes) -> Result<Weights> {
    let family = reading.family;
    let mut theirs: Tensors = BTreeMap::new();
    for (name, in_file) in &reading.names {
        theirs.extend(weights.tensors.remove(in_file).map(|tensor| (name.clone(), tensor)));
    }
    let mut ours: Tensors = BTreeMap::new();
    let mut not_zero = Vec::new();
    for (rule, layer) in instances(family, reading.depth) {
        let names: Vec<String> = rule.theirs.iter().map(|side| fill(&side.pattern, layer)).collect();
        if !names.iter().any(|name| theirs.contains_key(name)) {
            continue;
        }
        let given: Vec<Vec<f32>> = names
            .iter()
            .map(|name| theirs.remove(name).map(|(_, values)| values).unwrap_or_default())
            .collect();
        if rule.ours.is_empty() {
            not_zero.extend(names.into_iter().zip(given).filter(|(_, v)| v.iter().any(|x| *x != 0.0)));
            continue;
        }
        let made = exchange(&rule.theirs, &rule.ours, rule.copies, given, sizes)
            .ok_or_else(|| error(family, format_args!("{} has not the elements of its shape", names[0])))?;
        for (side, tensor) in rule.ours.iter().zip(made).filter(|(_, (shape, _))| !shape.contains(&0)) {
            ours.insert(fill(&side.pattern, layer), tensor);
        }
    }
    if let Some((name, _)) = not_zero.first() {
        let others = match not_zero.len() {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        return Err(error(
            family,
            format_args!("{name}{others} is not zero, which the class cannot have produced"),
        ));
    }
    Ok(Weights { tensors: ours, metadata: weights.metadata })
}

/// Our tensors under a family's names.
///
/// # Errors
/// Names of those that have no place there, or copies that have become different.
pub(super) fn backwards(family: &Family, weights: &Weights, depth: usize, sizes: &Sizes) -> Result<Tensors> {
    let mut ours: BTreeMap<&str, &Tensor> =
        weights.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut theirs: Tensors = BTreeMap::new();
    let mut different = Vec::new();
    for (rule, layer) in instances(family, depth) {
        let names: Vec<String> = rule.ours.iter().map(|side| fill(&side.pattern, layer)).collect();
        let empty = |side: &Side| side.axes.shape(sizes).is_some_and(|shape| shape.contains(&0));
        let there = |(name, side): (&String, &Side)| ours.contains_key(name.as_str()) || empty(side);
        let any = names.iter().any(|name| ours.contains_key(name.as_str()));
        if !any || !names.iter().zip(&rule.ours).all(there) {
            continue;
        }
        let given: Vec<Vec<f32>> = names
            .iter()
            .map(|name| ours.remove(name.as_str()).map(|(_, values)| values.clone()).unwrap_or_default())
            .collect();
        if rule.copies && given.windows(2).any(|pair| bits(&pair[0]).ne(bits(&pair[1]))) {
            different.push(names.join(" and "));
            continue;
        }
        let made = if rule.copies {
            exchange(&rule.ours[..1], &rule.theirs, false, given[..1].to_vec(), sizes)
        } else {
            exchange(&rule.ours, &rule.theirs, false, given, sizes)
        };
        let made = made.ok_or_else(|| Error::usage(format!("{} is not of the model's shape", names[0])))?;
        for (side, tensor) in rule.theirs.iter().zip(made).filter(|(_, (shape, _))| !shape.contains(&0)) {
            theirs.insert(fill(&side.pattern, layer), tensor);
        }
    }
    if let Some(names) = different.first() {
        return Err(Error::usage(format!(
            "{} has one tensor for {names}, and these differ since they were trained{}",
            family.name,
            others(different.len())
        )));
    }
    // A bias that is nothing but zeros changes nothing.
    ours.retain(|name, (_, values)| !(name.ends_with(".bias") && values.iter().all(|x| x.to_bits() == 0)));
    match ours.keys().next() {
        None => Ok(theirs),
        Some(name) => {
            Err(Error::usage(format!("{} has no place for {name}{}", family.name, others(ours.len()))))
        }
    }
}

fn others(count: usize) -> String {
    if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() }
}

fn bits(values: &[f32]) -> impl Iterator<Item = u32> {
    values.iter().map(|value| value.to_bits())
}

/// Every rule with every number that it has.
fn instances(family: &Family, depth: usize) -> impl Iterator<Item = (&Rule, Option<usize>)> {
    family.rules.iter().flat_map(move |rule| {
        let numbered = rule.theirs.iter().any(|side| side.pattern.contains("{n}"));
        let layers: Vec<Option<usize>> = if numbered { (0..depth).map(Some).collect() } else { vec![None] };
        layers.into_iter().map(move |layer| (rule, layer))
    })
}

/// The tensors `to` that `from` are; none where values and sizes do not fit.
fn exchange(
    from: &[Side],
    to: &[Side],
    copies: bool,
    given: Vec<Vec<f32>>,
    sizes: &Sizes,
) -> Option<Vec<Tensor>> {
    let shaped = |side: &Side, values: Vec<f32>| {
        let shape = side.axes.shape(sizes)?;
        (shape.iter().product::<usize>() == values.len()).then_some((shape, values))
    };
    if copies {
        return to.iter().map(|side| shaped(side, given[0].clone())).collect();
    }
    if let ([from], [to]) = (from, to)
        && from.axes == to.axes
    {
        return Some(vec![shaped(to, given.into_iter().next()?)?]);
    }
    if let [whole] = from
        && let Some((at, _)) = whole.axes.sum()
    {
        let part = |(term, side): (usize, &Side)| {
            let values = cut(&given[0], &whole.axes, at, term, sizes)?;
            shaped(side, reorder(values, &whole.axes.part(term), &side.axes, sizes)?)
        };
        return to.iter().enumerate().map(part).collect();
    }
    if let [whole] = to
        && let Some((at, _)) = whole.axes.sum()
    {
        let mut values = vec![0.0; whole.axes.shape(sizes)?.iter().product()];
        for (term, (side, part)) in from.iter().zip(given).enumerate() {
            let part = reorder(part, &side.axes, &whole.axes.part(term), sizes)?;
            paste(&mut values, &part, &whole.axes, at, term, sizes)?;
        }
        return Some(vec![shaped(whole, values)?]);
    }
    let ([from], [to]) = (from, to) else { return None };
    let values = given.into_iter().next()?;
    Some(vec![shaped(to, reorder(values, &from.axes, &to.axes, sizes)?)?])
}
