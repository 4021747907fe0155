//! What a file is: its family, the sizes that its shapes agree on, and what is wrong with it.

use std::collections::{BTreeMap, BTreeSet};

use super::axes::{Axis, Sizes};
use super::table::{Family, Side, families, fill, matches};
use crate::recipe::ModelConfig;
use crate::weights::Weights;
use crate::weights::match_params::Problems;
use crate::{Error, Result};

/// What programs that wrap a network put before its names.
const WRAPPERS: &[&str] = &["", "module.", "_orig_mod.", "model."];

/// The tensors of a file as those of a family.
pub(super) struct Reading {
    pub family: &'static Family,
    /// Names in the file by the family's.
    pub names: BTreeMap<String, String>,
    /// Optional groups that are there.
    groups: BTreeSet<String>,
    /// Names of no rule.
    unexpected: Vec<String>,
    /// Names in the file of what is no part of the network.
    pub ignored: BTreeSet<String>,
    /// Number of blocks.
    pub depth: usize,
}

/// Where a tensor has its place in a table.
enum Place {
    Rule(usize, usize, Option<usize>),
    Ignored,
    Refused(usize),
}

fn place(family: &Family, name: &str) -> Option<Place> {
    for (r, rule) in family.rules.iter().enumerate() {
        for (s, side) in rule.theirs.iter().enumerate() {
            if let Some(layer) = matches(&side.pattern, name) {
                return Some(Place::Rule(r, s, layer));
            }
        }
    }
    if family.ignored.iter().any(|pattern| matches(pattern, name).is_some()) {
        return Some(Place::Ignored);
    }
    family.refused.iter().position(|(pattern, _)| matches(pattern, name).is_some()).map(Place::Refused)
}

/// An error about weights of a family.
pub(super) fn error(family: &Family, message: impl std::fmt::Display) -> Error {
    Error::usage(format!("weights of {}: {message}", family.name))
}

impl Reading {
    /// Finds the family that explains most of the tensors.
    ///
    /// # Errors
    /// Tensors that no family explains, or of a variant that is not supported.
    pub fn new(weights: &Weights) -> Result<Self> {
        let names: Vec<&str> = weights.tensors.keys().map(String::as_str).collect();
        let mut best: Option<(usize, &'static Family, String)> = None;
        for family in families()? {
            let within = std::iter::once("").chain(family.within.iter().map(String::as_str));
            for prefix in within.flat_map(|inner| WRAPPERS.iter().map(move |outer| format!("{outer}{inner}")))
            {
                if !prefix.is_empty() && !names.iter().any(|name| name.starts_with(&prefix)) {
                    continue;
                }
                let score = weights
                    .tensors
                    .iter()
                    .map(|(name, (shape, _))| score(family, &prefix, name, shape))
                    .sum();
                if best.as_ref().is_none_or(|(most, _, _)| score > *most) {
                    best = Some((score, family, prefix));
                }
            }
        }
        match best {
            Some((score, family, prefix)) if score >= names.len() && score > 0 => {
                Self::of(family, &prefix, &names)
            }
            _ => Err(unknown(&names)),
        }
    }

    fn of(family: &'static Family, prefix: &str, names: &[&str]) -> Result<Self> {
        let mut reading = Self {
            family,
            names: BTreeMap::new(),
            groups: BTreeSet::new(),
            unexpected: vec![],
            ignored: BTreeSet::new(),
            depth: 0,
        };
        for &name in names {
            let own = name.strip_prefix(prefix).unwrap_or(name);
            match place(family, own) {
                Some(Place::Rule(rule, side, layer)) => {
                    reading.groups.extend(family.rules[rule].theirs[side].group.clone());
                    reading.depth = reading.depth.max(layer.map_or(0, |n| n.saturating_add(1)));
                    reading.names.insert(own.into(), name.into());
                }
                Some(Place::Ignored) => {
                    reading.ignored.insert(name.into());
                }
                Some(Place::Refused(at)) => {
                    return Err(error(family, format_args!("{name}: {}", family.refused[at].1)));
                }
                None => reading.unexpected.push(name.into()),
            }
        }
        // A number that no network has would ask for as many blocks.
        reading.depth = reading.depth.min(names.len());
        Ok(reading)
    }

    /// A tensor by the family's name.
    pub fn tensor<'a>(&self, weights: &'a Weights, name: &str) -> Option<&'a (Vec<usize>, Vec<f32>)> {
        weights.tensors.get(self.names.get(name)?)
    }

    /// Every place of a table that this file should fill: name, side, and the name in the file where it is.
    fn places(&self) -> impl Iterator<Item = (String, &'static Side)> {
        let expected = |side: &Side| side.group.as_ref().is_none_or(|group| self.groups.contains(group));
        self.family.rules.iter().flat_map(|rule| &rule.theirs).filter(move |side| expected(side)).flat_map(
            |side| {
                let layers = side.pattern.contains("{n}").then_some(self.depth.max(1));
                let numbers: Vec<Option<usize>> =
                    layers.map_or(vec![None], |depth| (0..depth).map(Some).collect());
                numbers.into_iter().map(move |n| (fill(&side.pattern, n), side))
            },
        )
    }

    /// Sizes of the letters, each as most tensors have it, and why a grid of positions is not known.
    pub fn sizes(&self, weights: &Weights, model: &ModelConfig) -> (Sizes, Option<String>) {
        let mut axes: Vec<(&Axis, usize)> = Vec::new();
        for (name, side) in self.places() {
            if let Some((shape, _)) = self.tensor(weights, &name) {
                axes.extend(side.axes.align(shape).unwrap_or_default());
            }
        }
        let mut sizes = Sizes::default();
        vote(&axes, &mut sizes);
        if sizes.get('p').is_none() {
            let patch =
                |axis: &Axis| axis.len() == 1 && axis[0].letters.len() == 3 && axis[0].letters.contains(&'p');
            if let Some((side, channels)) = axes
                .iter()
                .filter(|(axis, _)| patch(axis))
                .find_map(|(_, len)| square_patch(*len, model.channels))
            {
                sizes.set('p', side);
                sizes.set('c', channels);
            }
        }
        if sizes.get('i').is_none()
            && let Some(width) = sizes.get('d')
        {
            // Heads are as wide together as the model unless the file says otherwise.
            sizes.set('i', width);
            vote(&axes, &mut sizes);
        }
        let grid = self.grid(weights, model, &mut sizes);
        (sizes, grid.err())
    }

    /// Rows and columns of a flat table, and how many rows before them are positions of prefix tokens.
    fn grid(&self, weights: &Weights, model: &ModelConfig, sizes: &mut Sizes) -> Result<(), String> {
        for (name, side) in self.places() {
            let Some((shape, _)) = self.tensor(weights, &name) else { continue };
            let holds = |axis: &Axis, letter| axis.iter().any(|term| term.letters == [letter]);
            let aligned = side.axes.align(shape).unwrap_or_default();
            let Some((axis, total)) = aligned.into_iter().find(|(axis, _)| holds(axis, 'n')) else {
                continue;
            };
            let own = [sizes.get('z').unwrap_or(0), sizes.get('r').unwrap_or(0)];
            let flat = self.family.set.iter().any(|set| set == "model.position.combination=flat");
            let prefixes = match (holds(axis, 't'), flat) {
                (false, _) => vec![0],
                (true, true) => vec![own[0]],
                (true, false) => vec![0, own[0], own[0] + own[1]],
            };
            let configured = (model.position.rows, model.position.columns);
            let grid = |count: usize| {
                let side = count.isqrt();
                if configured.0.checked_mul(configured.1) == Some(count) {
                    Some(configured)
                } else if side * side == count {
                    Some((side, side))
                } else {
                    flat.then_some((count, 1))
                }
            };
            for prefix in prefixes {
                if let Some((rows, columns)) =
                    total.checked_sub(prefix).filter(|count| *count > 0).and_then(grid)
                {
                    sizes.set('t', prefix);
                    sizes.set('y', rows);
                    sizes.set('x', columns);
                    sizes.0.remove(&'n');
                    return Ok(());
                }
            }
            let tokens = own[0] + own[1];
            let with =
                if tokens > 0 { format!(", with {tokens} prefix tokens or without") } else { String::new() };
            return Err(format!(
                "{} has {total} rows, which is no square grid{with}; set model.position.rows and \
                 model.position.columns",
                self.names[&name]
            ));
        }
        Ok(())
    }

    /// Everything that is missing, of another shape, or of no place.
    ///
    /// # Errors
    /// One sentence that lists them.
    pub fn check(&self, weights: &Weights, sizes: &Sizes) -> Result<()> {
        let mut problems = Problems::default();
        for (name, side) in self.places() {
            let expected = side.axes.shape(sizes);
            match (self.tensor(weights, &name), &expected) {
                (None, Some(shape)) if shape.contains(&0) => {}
                (None, _) => problems.missing.push(name.clone()),
                (Some((shape, _)), _) => {
                    let fits = |aligned: Vec<(&Axis, usize)>| {
                        aligned.iter().all(|(axis, size)| sizes.axis(axis).is_none_or(|known| known == *size))
                    };
                    if !side.axes.align(shape).is_some_and(fits) {
                        let expected = expected.map_or_else(
                            || format!("{} dimensions", side.axes.0.len()),
                            |shape| format!("{shape:?}"),
                        );
                        let name = &self.names[&name];
                        problems.misshapen.push(format!("{name} {shape:?} (expected {expected})"));
                    }
                }
            }
            problems.known.push(name);
        }
        problems.unexpected.clone_from(&self.unexpected);
        match problems.sentence() {
            None => Ok(()),
            Some(sentence) => {
                let variant = match problems.unexpected.is_empty() {
                    true => "",
                    false => {
                        "; what is unexpected may belong to a variant of the network that is not supported here"
                    }
                };
                Err(error(self.family, format_args!("{sentence}{variant}")))
            }
        }
    }
}

fn score(family: &Family, prefix: &str, name: &str, shape: &[usize]) -> usize {
    match place(family, name.strip_prefix(prefix).unwrap_or(name)) {
        None => 0,
        // Two layouts of one name differ in their dimensions.
        Some(Place::Rule(rule, side, _)) => {
            1 + usize::from(family.rules[rule].theirs[side].axes.align(shape).is_some())
        }
        Some(Place::Ignored | Place::Refused(_)) => 2,
    }
}

fn unknown(names: &[&str]) -> Error {
    let known: Vec<&str> = families().unwrap_or_default().iter().map(|family| family.name.as_str()).collect();
    let shown = match names {
        [] => "none".into(),
        _ => format!("{}, ...", names[..names.len().min(3)].join(", ")),
    };
    Error::usage(format!(
        "the tensors ({shown}) have the names of no known implementation; known are {}, and this program's own",
        known.join(", ")
    ))
}

/// Gives each letter the size that most axes have for it, from the axes where it is the only unknown one.
fn vote(axes: &[(&Axis, usize)], sizes: &mut Sizes) {
    loop {
        let mut votes: BTreeMap<char, BTreeMap<usize, usize>> = BTreeMap::new();
        for &(axis, size) in axes {
            if let Some((letter, size)) = only_unknown(axis, size, sizes) {
                *votes.entry(letter).or_default().entry(size).or_default() += 1;
            }
        }
        if votes.is_empty() {
            return;
        }
        for (letter, votes) in votes {
            let most = votes.into_iter().max_by_key(|(_, count)| *count);
            sizes.0.extend(most.map(|(size, _)| (letter, size)));
        }
    }
}

/// The letter of an axis whose size alone is not known, and what it must be.
fn only_unknown(axis: &Axis, size: usize, sizes: &Sizes) -> Option<(char, usize)> {
    // Prefix tokens are none unless something says otherwise, but a sum with positions tells nothing of them.
    let unknown = |letter: char| match letter {
        'z' | 'r' => !sizes.0.contains_key(&letter),
        _ => sizes.get(letter).is_none(),
    };
    let alone = |axis: &Axis| axis.len() == 1 && axis[0].letters.len() == 1;
    let mut found = None;
    let mut rest = size;
    for term in axis {
        let letters: Vec<char> = term.letters.iter().copied().filter(|letter| unknown(*letter)).collect();
        match letters[..] {
            [] => rest = rest.checked_sub(sizes.term(term)?)?,
            [letter]
                if found.is_none()
                    && letter != 't'
                    && (alone(axis) || !matches!(letter, 'z' | 'r' | 'n')) =>
            {
                let known = term.letters.iter().filter(|other| **other != letter);
                let factor = known.map(|other| sizes.get(*other)).product::<Option<usize>>()? * term.factor;
                found = Some((letter, factor));
            }
            _ => return None,
        }
    }
    let (letter, factor) = found?;
    let letter = if letter == 'q' { 'p' } else { letter };
    (factor > 0 && rest.is_multiple_of(factor)).then(|| (letter, rest / factor))
}

/// Patch side and channels from the length of a flattened patch; the configured channels go first.
fn square_patch(len: usize, configured: usize) -> Option<(usize, usize)> {
    [configured, 3, 1].into_iter().filter(|channels| *channels > 0).find_map(|channels| {
        let side = (len / channels).isqrt();
        (side > 0 && channels * side * side == len).then_some((side, channels))
    })
}
