//! The class table and the train/validation split that every source shares.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};

/// Labels above this are taken for a mistake: a head of this many classes would not fit anywhere.
const MAX_CLASSES: usize = 1 << 20;

/// The part of a data set that a folder, shard or file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Train,
    Validation,
    /// Serves as validation where there is no [`Part::Validation`], and is left out otherwise.
    Test,
}

impl Part {
    /// The part that a folder of this name holds.
    pub fn of_folder(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "train" | "training" => Some(Self::Train),
            "val" | "valid" | "validation" => Some(Self::Validation),
            "test" => Some(Self::Test),
            _ => None,
        }
    }

    /// The part that a file says in its name: `train-000.tar`, `caltech101-val.tar`.
    pub fn of_file(name: &str) -> Option<Self> {
        name.split(|c: char| !c.is_ascii_alphanumeric()).find_map(Self::of_folder)
    }
}

/// Whether folders that hold images themselves are the parts of a set: all of them are named as parts, or one to train on
/// and one to validate on are among them. A lone `train` among others may be a class.
pub(super) fn are_parts(folders: impl Iterator<Item = Option<Part>>) -> bool {
    let folders: Vec<Option<Part>> = folders.collect();
    let has = |train: bool| folders.iter().flatten().any(|part| (*part == Part::Train) == train);
    (has(true) && has(false)) || (!folders.is_empty() && folders.iter().all(Option::is_some))
}

/// What a source says about a sample's class.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Number(usize),
    Name(String),
}

/// A sample before classes are numbered and parts are decided.
pub(super) struct Sample<P> {
    pub class: Class,
    pub part: Option<Part>,
    pub place: P,
}

/// Samples with their labels.
pub(super) struct Table<P> {
    pub classes: Vec<String>,
    pub train: Vec<(P, usize)>,
    pub validation: Vec<(P, usize)>,
    /// Where the validation images come from, such as `validation: automatic split of 20 %, seed 0`.
    pub description: String,
}

/// What becomes of a set that has no validation part, and of one that has no other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Split {
    /// For training, which needs training images.
    Train {
        /// Share of each class that is held out, in [0, 1).
        share: f64,
        seed: u64,
    },
    /// For evaluation: without a validation part every image is one to validate on, and there may
    /// be no training images.
    Evaluate,
}

impl<P> Table<P> {
    /// Numbers the classes and divides the samples, keeping their order. `names` are the declared
    /// names of numbered classes; named classes are numbered in byte order of their names.
    pub fn new(
        origin: &str,
        samples: Vec<Sample<P>>,
        names: Option<Vec<String>>,
        split: Split,
    ) -> Result<Self> {
        if samples.is_empty() {
            return Err(Error::usage(format!("{origin}: no image was found")));
        }
        let has = |part: Part| samples.iter().any(|s| s.part == Some(part));
        let held_out = [Part::Validation, Part::Test].into_iter().find(|&part| has(part));
        let no_training = !samples.iter().any(|s| matches!(s.part, Some(Part::Train) | None));
        if no_training && matches!(split, Split::Train { .. }) {
            return Err(Error::usage(format!(
                "{origin}: there are validation images but no training images; add a `train` part, or \
                 point to the folder that holds both"
            )));
        }
        let mut description = match held_out {
            Some(Part::Test) => "validation: the test part".to_string(),
            Some(_) => "validation: the val part".to_string(),
            None => split.to_string(),
        };
        if held_out == Some(Part::Validation) && has(Part::Test) {
            description += "; the test part is left out";
        }
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for Sample { class, part, place } in samples {
            match part {
                Some(Part::Train) | None if held_out.is_none() && matches!(split, Split::Evaluate) => {
                    validation.push((place, class));
                }
                Some(Part::Train) | None => train.push((place, class)),
                Some(_) if part == held_out => validation.push((place, class)),
                Some(_) => {}
            }
        }
        let (classes, numbers) = number(origin, &train, &validation, names, split)?;
        let label =
            |rows: Vec<(P, Class)>| rows.into_iter().map(|(place, class)| (place, numbers[&class])).collect();
        let (train, validation) = (label(train), label(validation));
        let mut table = Self { classes, train, validation, description };
        if let (None, Split::Train { share, seed }) = (held_out, split) {
            let chosen = held_out_samples(table.train.iter().map(|(_, label)| *label), share, seed);
            for (row, out) in std::mem::take(&mut table.train).into_iter().zip(chosen) {
                if out { table.validation.push(row) } else { table.train.push(row) }
            }
        }
        Ok(table)
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Evaluate => write!(f, "validation: every image"),
            Self::Train { share, .. } if *share <= 0.0 => write!(f, "no validation (data.validation = 0)"),
            Self::Train { share, seed } => {
                write!(f, "validation: automatic split of {} %, seed {seed}", (1000.0 * share).round() / 10.0)
            }
        }
    }
}

type Rows<P> = [(P, Class)];

fn number<P>(
    origin: &str,
    train: &Rows<P>,
    validation: &Rows<P>,
    names: Option<Vec<String>>,
    split: Split,
) -> Result<(Vec<String>, BTreeMap<Class, usize>)> {
    let mut numbers: BTreeMap<Class, usize> = BTreeMap::new();
    // In training a class without training images is a mistake, which is named below.
    let also = if matches!(split, Split::Evaluate) { validation } else { &[] };
    for (_, class) in train.iter().chain(also) {
        if !numbers.contains_key(class) {
            numbers.insert(class.clone(), 0);
        }
    }
    let largest = numbers.keys().filter_map(|c| if let Class::Number(n) = c { Some(*n) } else { None }).max();
    let classes: Vec<String> = match largest {
        Some(_) if numbers.keys().any(|c| matches!(c, Class::Name(_))) => {
            return Err(Error::usage(format!(
                "{origin}: some labels are numbers and some are names; write them all in one way"
            )));
        }
        Some(largest) if largest >= MAX_CLASSES => {
            return Err(Error::usage(format!(
                "{origin}: label {largest} is beyond the limit of {MAX_CLASSES} classes; is it a \
                 label at all?"
            )));
        }
        Some(largest) => match names {
            Some(names) if names.len() > largest => names,
            Some(names) => {
                return Err(Error::usage(format!(
                    "{origin}: label {largest} has no name, {} names are declared and labels count from 0",
                    names.len()
                )));
            }
            None => (0..=largest).map(|n| n.to_string()).collect(),
        },
        None => {
            let name = |c: &Class| if let Class::Name(name) = c { name.clone() } else { String::new() };
            numbers.keys().map(name).collect()
        }
    };
    classes.iter().try_for_each(|name| check_name(origin, name))?;
    for (position, (class, number)) in numbers.iter_mut().enumerate() {
        *number = if let Class::Number(n) = class { *n } else { position };
    }
    for (_, class) in validation {
        if !numbers.contains_key(class) {
            let name = match class {
                Class::Number(n) => n.to_string(),
                Class::Name(name) => name.clone(),
            };
            return Err(Error::usage(format!(
                "{origin}: the validation images hold class `{name}`, which no training image has; \
                 add training images of it or remove it"
            )));
        }
    }
    Ok((classes, numbers))
}

/// Names go into checkpoints, tables and onto terminals. Sources read them lossily, so that a
/// replacement character stands for what was no UTF-8.
fn check_name(origin: &str, name: &str) -> Result<()> {
    let what = if name.contains(char::REPLACEMENT_CHARACTER) {
        "is not valid UTF-8"
    } else if name.chars().any(char::is_control) {
        "holds control characters"
    } else {
        return Ok(());
    };
    Err(Error::usage(format!("{origin}: the class name `{}` {what}; rename the class", name.escape_debug())))
}

/// Which samples are held out: of each class the rounded share, at least one where the class has
/// two or more, and never all of them. Each class has a stream of its own, so that another class
/// growing does not move it.
fn held_out_samples(labels: impl Iterator<Item = usize>, share: f64, seed: u64) -> Vec<bool> {
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut count = 0;
    for (index, label) in labels.enumerate() {
        members.entry(label).or_default().push(index);
        count += 1;
    }
    let mut out = vec![false; count];
    if share <= 0.0 {
        return out;
    }
    for (label, mut indices) in members {
        let n = indices.len();
        if n < 2 {
            continue;
        }
        let take = ((n as f64 * share).round() as usize).clamp(1, n - 1);
        let mut stream = Stream::new(seed, 0, label as u64, Purpose::Split);
        for position in 0..take {
            // Lemire's multiply-shift; its bias of n / 2^32 is of no consequence to a split.
            let step = (u64::from(stream.bits()) * (n - position) as u64) >> 32;
            indices.swap(position, position + step as usize);
            out[indices[position]] = true;
        }
    }
    out
}

/// The class names in `folder/classes.txt`, one a line, if that file is there.
pub(super) fn class_names(folder: &Path) -> Result<Option<Vec<String>>> {
    names_in(&folder.join("classes.txt"))
}

/// The names in a text file, one a line; `None` if there is no such file.
pub(super) fn names_in(path: &Path) -> Result<Option<Vec<String>>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_string).collect(),
        )),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::file(path, format!("the class names cannot be read ({e})"))),
    }
}
