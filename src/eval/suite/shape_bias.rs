//! Cue-conflict images, `<shape><n>-<texture><m>.png`: whether the model goes by shape or by texture, and whether it errs
//! on the same images as another model or as people do. Definitions as in the toolbox model-vs-human: the probability of
//! a category is the mean over its classes, and being right means to name the shape.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::json;

use super::csv::Table;
use super::label_map::{LabelMap, Resolved, check};
use super::names::{ImageNames, base_name};
use super::{Observer, Options, Outcome, Session, Setting, Suite, preamble, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};
use crate::eval::metrics::agreement::{Agreement, agreement};
use crate::eval::metrics::probability::{largest, probabilities};
use crate::eval::metrics::shape_bias::{CATEGORIES, Cues, Trial, category_probabilities};

/// One observer's decisions, by the index of the image.
struct Watched {
    name: String,
    trials: BTreeMap<usize, Trial>,
}

impl Watched {
    fn correct(&self) -> impl Iterator<Item = bool> {
        self.trials.values().map(|trial| trial.decision == Some(trial.shape))
    }
}

pub(super) fn run(session: &mut Session, options: &mut Options) -> Result<Outcome> {
    let setting = options.setting(Suite::ShapeBias)?;
    let cues = (0..session.images.len())
        .map(|sample| cues_of(&session.images.name(sample)))
        .collect::<Result<Vec<(usize, usize)>>>()?;
    let map = options.label_map.as_deref().map(LabelMap::read).transpose()?;
    let own = watch(session, setting, map.as_ref(), &cues)?;
    let mut observers = vec![own];
    match &mut options.against {
        None => {}
        Some(Observer::Model(other)) => observers.push(watch(other, setting, map.as_ref(), &cues)?),
        Some(Observer::Decisions(path)) => observers.extend(decisions(path, session, &cues)?),
    }
    let agreements: Vec<(String, Agreement, usize)> = observers[1..]
        .iter()
        .filter_map(|other| {
            let both = || {
                observers[0].trials.iter().filter_map(|(image, own)| Some((own, other.trials.get(image)?)))
            };
            let right = |trial: &Trial| trial.decision == Some(trial.shape);
            let (first, second): (Vec<bool>, Vec<bool>) = both().map(|(a, b)| (right(a), right(b))).unzip();
            Some((other.name.clone(), agreement(&first, &second)?, first.len()))
        })
        .collect();
    if observers.len() > 1 && agreements.is_empty() {
        return Err(Error::usage(
            "--against shares no image with the model's decisions; give decisions on the same images",
        ));
    }

    let scores = session.scores(setting)?;
    let mut table = preamble(session, &scores, setting.size);
    let left_out = scores.images() - observers[0].trials.len();
    if left_out > 0 {
        table +=
            &format!("left out          {left_out} images of categories that the model has no class for\n");
    }
    table += "\n";
    let optional = |share: Option<f64>| share.map_or("-".into(), text::percent);
    let line = |watched: &Watched| {
        let cues = Cues::count(watched.trials.values());
        let right = watched.correct().filter(|right| *right).count();
        vec![
            watched.name.clone(),
            watched.trials.len().to_string(),
            text::percent(right as f64 / watched.trials.len() as f64),
            cues.conflicts.to_string(),
            cues.shape.to_string(),
            cues.texture.to_string(),
            optional(cues.either()),
            optional(cues.shape_bias()),
        ]
    };
    let header =
        ["observer", "images", "shape right %", "conflicts", "shape", "texture", "either %", "shape bias %"];
    table += &text::table(&header, &observers.iter().map(line).collect::<Vec<_>>());
    if !agreements.is_empty() {
        let mut lines: Vec<Vec<String>> =
            agreements.iter().map(|(name, a, n)| consistency(name, a, *n)).collect();
        if agreements.len() > 1 {
            let mean = |of: fn(&Agreement) -> f64| {
                let sum: f64 = agreements.iter().map(|(_, a, _)| of(a)).sum();
                format!("{:.4}", sum / agreements.len() as f64)
            };
            lines.push(vec![
                "mean".into(),
                String::new(),
                mean(|a| a.accuracy_difference),
                mean(|a| a.observed_consistency),
                mean(|a| a.error_consistency),
            ]);
        }
        let header =
            ["model and", "images", "accuracy difference", "observed consistency", "error consistency"];
        table += &format!("\n{}", text::table(&header, &lines));
    }

    let mut json = session.header();
    json["suite"] = json!("shape-bias");
    json["size"] = json!(setting.size.to_string());
    json["left_out"] = json!(left_out);
    json["unreadable"] = json!(scores.unreadable);
    let of_observer = |watched: &Watched| {
        let cues = Cues::count(watched.trials.values());
        let by_category: BTreeMap<&str, Cues> = by_category(watched);
        json!({
            "observer": watched.name, "images": watched.trials.len(),
            "accuracy": watched.correct().filter(|right| *right).count() as f64 / watched.trials.len() as f64,
            "cues": cues, "either": cues.either(), "shape_bias": cues.shape_bias(), "categories": by_category,
        })
    };
    json["observers"] = json!(observers.iter().map(of_observer).collect::<Vec<_>>());
    let of_agreement = |(name, agreement, images): &(String, Agreement, usize)| json!({ "with": name, "images": images, "agreement": agreement });
    json["agreements"] = json!(agreements.iter().map(of_agreement).collect::<Vec<_>>());
    let files = vec![("-decisions.csv", written(session, &observers[0])?)];
    Ok(Outcome { json, table, figure: figure(&observers), files })
}

fn consistency(name: &str, a: &Agreement, images: usize) -> Vec<String> {
    let number = |x: f64| format!("{x:.4}");
    vec![
        name.to_owned(),
        images.to_string(),
        number(a.accuracy_difference),
        number(a.observed_consistency),
        number(a.error_consistency),
    ]
}

fn category(name: &str) -> Option<usize> {
    CATEGORIES.iter().position(|category| *category == name)
}

/// What of an image's name tells the cues, `cat7-elephant1.png` of `x/0001_cue_cat7-elephant1.png`, as model-vs-human
/// has it.
fn stimulus(name: &str) -> &str {
    let base = base_name(name);
    base.rsplit('_').next().unwrap_or(base)
}

/// Shape and texture of `cat7-elephant1.png`.
fn cues_of(name: &str) -> Result<(usize, usize)> {
    let base = stimulus(name);
    let stem = base.rsplit_once('.').map_or(base, |(stem, _)| stem);
    let cue = |part: &str| category(part.trim_end_matches(|c: char| c.is_ascii_digit()));
    let cues = stem.split_once('-').and_then(|(shape, texture)| Some((cue(shape)?, cue(texture)?)));
    cues.ok_or_else(|| {
        Error::usage(format!(
            "{name}: this is no cue-conflict image; expected a name such as cat7-elephant1.png of the 16 categories {}",
            CATEGORIES.join(", ")
        ))
    })
}

/// The model's classes of each category, by the map or by name.
fn classes_of(session: &Session, map: Option<&LabelMap>) -> Result<Vec<Vec<usize>>> {
    let classes = &session.trained.classes;
    let Some(map) = map else {
        let named =
            |category: &&str| classes.iter().position(|class| class == category).into_iter().collect();
        let own: Vec<Vec<usize>> = CATEGORIES.iter().map(named).collect();
        if own.iter().filter(|own| !own.is_empty()).count() < 2 {
            return Err(Error::usage(format!(
                "the model has no classes by the names of the 16 categories ({}, ...); say which of its classes each of \
                 them is with --label-map FILE",
                CATEGORIES[..3].join(", ")
            )));
        }
        return Ok(own);
    };
    let Resolved::Named(named) = map.resolve(classes)? else {
        return Err(Error::file(
            &map.path,
            "is a list; expected an object from the 16 categories to the model's classes",
        ));
    };
    let unknown: Vec<String> = named.keys().filter(|name| category(name).is_none()).cloned().collect();
    check(&map.path, &unknown, "model-vs-human", CATEGORIES.iter().copied())?;
    Ok(CATEGORIES.iter().map(|category| named.get(*category).cloned().unwrap_or_default()).collect())
}

/// What a model takes the images for whose two categories it has classes of.
fn watch(
    session: &mut Session,
    setting: Setting,
    map: Option<&LabelMap>,
    cues: &[(usize, usize)],
) -> Result<Watched> {
    let classes = classes_of(session, map)?;
    let scores = session.scores(setting)?;
    let mut trials = BTreeMap::new();
    for (row, &sample) in scores.samples.iter().enumerate() {
        let (shape, texture) = cues[sample];
        if classes[shape].is_empty() || classes[texture].is_empty() {
            continue;
        }
        let probabilities = probabilities(scores.row(row), session.loss());
        let of_category = category_probabilities(&probabilities, &classes);
        let none = f64::NEG_INFINITY;
        let of_category: Vec<f64> = of_category.into_iter().map(|p| p.unwrap_or(none)).collect();
        let decision = largest(&of_category).map(|(category, _)| category);
        trials.insert(sample, Trial { shape, texture, decision });
    }
    if trials.is_empty() {
        return Err(Error::usage(
            "no cue-conflict image has both its categories among the model's; map more of the 16 with --label-map FILE",
        ));
    }
    Ok(Watched { name: session.trained.path.display().to_string(), trials })
}

/// The observers of a table: `imagename` and `object_response` (or `image` and `decision`), and `subj` where there are
/// several.
fn decisions(path: &Path, session: &Session, cues: &[(usize, usize)]) -> Result<Vec<Watched>> {
    let table = Table::read(path)?;
    let column = |names: &[&str]| {
        table.column(names).ok_or_else(|| {
            Error::file(
                path,
                format!("has no column `{}`; its columns are {}", names[0], table.header.join(", ")),
            )
        })
    };
    let image = column(&["imagename", "image"])?;
    let decision = column(&["object_response", "decision"])?;
    let subject = table.column(&["subj", "subject"]);
    let images = ImageNames::new(session.images.as_ref());
    // None where several images are of one stimulus.
    let mut by_stimulus: HashMap<String, Option<usize>> = HashMap::new();
    for sample in 0..cues.len() {
        let name = session.images.name(sample);
        by_stimulus.entry(stimulus(&name).into()).and_modify(|known| *known = None).or_insert(Some(sample));
    }
    let mut observers: BTreeMap<String, BTreeMap<usize, Trial>> = BTreeMap::new();
    for (line, fields) in &table.rows {
        let named = &fields[image];
        let alike = || by_stimulus.get(stimulus(named)).copied().flatten();
        let sample = match images.known(named).or_else(alike) {
            Some(sample) => sample,
            None => images.find(path, named)?,
        };
        let (shape, texture) = cues[sample];
        let name = subject.map_or_else(|| path.display().to_string(), |column| fields[column].clone());
        let trial = Trial { shape, texture, decision: decided(path, *line, &fields[decision])? };
        if observers.entry(name).or_default().insert(sample, trial).is_some() {
            return Err(Error::file(path, format!("line {line}: image `{named}` is named twice")));
        }
    }
    Ok(observers.into_iter().map(|(name, trials)| Watched { name, trials }).collect())
}

/// The category of a decision; none where the observer gave none, `na` or nothing.
fn decided(path: &Path, line: u64, answer: &str) -> Result<Option<usize>> {
    match category(answer) {
        None if !answer.is_empty() && answer != "na" => Err(Error::file(
            path,
            format!(
                "line {line}: `{answer}` is no decision; expected one of the 16 categories ({}), or `na`",
                CATEGORIES.join(", ")
            ),
        )),
        decided => Ok(decided),
    }
}

/// Decisions as [`decisions`] reads them.
fn written(session: &Session, watched: &Watched) -> Result<String> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record(["imagename", "object_response", "category", "texture"]).map_err(Error::failure)?;
    for (&sample, trial) in &watched.trials {
        let name = session.images.name(sample);
        let name = base_name(&name);
        let decision = trial.decision.map_or("na", |category| CATEGORIES[category]);
        let record = [name, decision, CATEGORIES[trial.shape], CATEGORIES[trial.texture]];
        out.write_record(record).map_err(Error::failure)?;
    }
    let bytes = out.into_inner().map_err(Error::failure)?;
    String::from_utf8(bytes).map_err(Error::failure)
}

/// Decisions by what the shape shows.
fn by_category(watched: &Watched) -> BTreeMap<&'static str, Cues> {
    let of = |category: usize| watched.trials.values().filter(move |trial| trial.shape == category);
    let counted = (0..CATEGORIES.len()).map(|category| (CATEGORIES[category], Cues::count(of(category))));
    counted.filter(|(_, cues)| cues.conflicts > 0).collect()
}

/// Shape bias by category, a line where it is over all.
fn figure(observers: &[Watched]) -> Figure {
    let shown = &observers[..observers.len().min(COLOURS.len())];
    let mut names: Vec<&str> = shown.iter().flat_map(|watched| by_category(watched).into_keys()).collect();
    names.sort_unstable_by(|a, b| b.cmp(a));
    names.dedup();
    let mut panel = Panel::new(
        "Shape or texture",
        Axis::new("shape / (shape + texture) decisions: 0 texture, 1 shape", Scale::linear(0.0, 1.0)),
        Axis::new("", Scale::Names(names.iter().map(|name| (*name).to_owned()).collect())),
    );
    panel.marks.push(Mark::Line {
        points: vec![(0.5, -0.5), (0.5, names.len() as f64 - 0.5)],
        colour: FAINT,
        dashed: true,
    });
    for (watched, colour) in shown.iter().zip(COLOURS) {
        let by_category = by_category(watched);
        let point = |(row, name): (usize, &&str)| Some((by_category.get(name)?.shape_bias()?, row as f64));
        let points = names.iter().enumerate().filter_map(point).collect();
        let all = Cues::count(watched.trials.values()).shape_bias();
        if let Some(bias) = all {
            let points = vec![(bias, -0.5), (bias, names.len() as f64 - 0.5)];
            panel.marks.push(Mark::Line { points, colour, dashed: false });
        }
        panel.marks.push(Mark::Dots { points, colour });
        let bias =
            all.map_or("no decision by either".into(), |bias| format!("shape bias {:.1} %", 100.0 * bias));
        panel.legend.push((format!("{}: {bias}", watched.name), colour));
    }
    Figure { panels: vec![panel] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_cues() {
        let index = |name| category(name).unwrap();
        assert_eq!(cues_of("x/cat7-elephant1.png").unwrap(), (index("cat"), index("elephant")));
        assert_eq!(cues_of("t.tar member c/car/car10-car2.png").unwrap(), (index("car"), index("car")));
        for name in ["val-000.tar member cat0-dog0.png", "XXX_cat10-dog2.png", "x_y/0001_cue_cat0-dog0.png"] {
            assert_eq!(cues_of(name).unwrap(), (index("cat"), index("dog")), "{name}");
        }
        for bad in ["cat7.png", "cat7-zebra1.png", "7-8.png", "a/b"] {
            let error = cues_of(bad).unwrap_err().to_string();
            assert!(error.starts_with(bad) && error.contains("cat7-elephant1.png"), "{error}");
        }
    }
}
