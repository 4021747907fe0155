//! Accuracy from a few images of each class: a ridge regression on frozen features, as big_vision's `fewshot_lsr` has it.
//! The images are drawn anew for each seed; fewer of them are the first of the more.

use std::collections::{BTreeSet, HashMap};

use serde_json::json;

use super::probed::Probed;
use super::{Options, Outcome, Session, Suite, text};
use crate::data::source::Dataset;
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, Figure, Mark, Panel, Scale};
use crate::eval::metrics::probability::largest;
use crate::eval::probe::Ridge;
use crate::rng::{Purpose, Stream};

/// Accuracies of all seeds with so many images a class, by regularisation.
struct Shots {
    shots: usize,
    by_l2: Vec<Vec<f64>>,
}

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    let probed = Probed::new(session, options, Suite::FewShot)?;
    let set = probed.set.clone();
    let mut shots = options.shots.clone();
    shots.sort_unstable();
    shots.dedup();
    let most = shots.last().copied().unwrap_or(1);
    let seed = session.recipe().train.seed;
    let draws = |number: usize| {
        draw(&set, most, |image| Stream::new(seed, number as u64, image as u64, Purpose::FewShot).bits())
    };
    let drawn: Vec<Vec<Vec<usize>>> = (0..options.seeds).map(draws).collect::<Result<_>>()?;
    let wanted: Vec<usize> =
        drawn.iter().flatten().flatten().copied().collect::<BTreeSet<_>>().into_iter().collect();
    let train = probed.train(session, Some(wanted.clone()))?;
    let rows: HashMap<usize, usize> =
        train.samples.iter().enumerate().map(|(row, &sample)| (wanted[sample], row)).collect();
    if let Some(unread) = wanted.iter().find(|image| !rows.contains_key(image)) {
        return Err(Error::usage(format!(
            "--suite few-shot: {} of the images drawn to train on cannot be read, such as {}; repair or remove them",
            wanted.len() - rows.len(),
            set.train.name(*unread)
        )));
    }
    let validation = probed.validation(session)?;
    let truth: Vec<usize> = validation.samples.iter().map(|&sample| set.validation.label(sample)).collect();
    let others: Vec<f64> = validation.values.iter().copied().map(f64::from).collect();
    let classes = set.classes.len();
    let mut found = Vec::new();
    for &shots in &shots {
        let mut by_l2 = vec![Vec::new(); options.l2.len()];
        for by_class in &drawn {
            let images: Vec<usize> = by_class.iter().flat_map(|images| &images[..shots]).copied().collect();
            let labels: Vec<usize> = images.iter().map(|&image| set.train.label(image)).collect();
            let rows: Vec<usize> = images.iter().map(|image| rows[image]).collect();
            let ridge = Ridge::new(train.rows(&rows), &labels, classes);
            for (accuracies, &l2) in by_l2.iter_mut().zip(&options.l2) {
                let Some(regression) = ridge.solve(l2) else {
                    return Err(Error::usage(format!(
                        "--l2 {}: so little leaves the regression without a solution; give more, such as --l2 1",
                        text::number(l2)
                    )));
                };
                let scores = regression.scores(&others);
                let right = |(scores, truth): (&[f64], &usize)| {
                    largest(scores).is_some_and(|(class, _)| class == *truth)
                };
                let right = scores.chunks_exact(classes).zip(&truth).filter(|image| right(*image)).count();
                accuracies.push(right as f64 / truth.len() as f64);
            }
        }
        found.push(Shots { shots, by_l2 });
    }

    let mut table = probed.preamble(session, &train, &validation);
    table += &format!(
        "regression        onto 1 for the class and -1 for the others, of standardised features; mean and standard deviation \
         of {} draws\n\n",
        options.seeds
    );
    let names: Vec<String> =
        options.l2.iter().map(|l2| format!("L2 {}: top-1 %", text::number(*l2))).collect();
    let header: Vec<&str> = ["images a class"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let cell = |each: &Vec<f64>| match deviation(each) {
        Some(deviation) => format!("{} ± {}", text::percent(mean(each)), text::percent(deviation)),
        None => text::percent(mean(each)),
    };
    let lines: Vec<Vec<String>> = found
        .iter()
        .map(|Shots { shots, by_l2 }| [shots.to_string()].into_iter().chain(by_l2.iter().map(cell)).collect())
        .collect();
    table += &text::table(&header, &lines);

    let mut json = probed.header(session, Suite::FewShot, &train, &validation);
    json["seeds"] = json!(options.seeds);
    json["l2"] = json!(options.l2);
    let numbers = |Shots { shots, by_l2 }: &Shots| {
        let by_l2 = options.l2.iter().zip(by_l2).map(
            |(l2, each)| json!({ "l2": l2, "top1": mean(each), "deviation": deviation(each), "each": each }),
        );
        json!({ "shots": shots, "by_l2": by_l2.collect::<Vec<_>>() })
    };
    json["few_shot"] = json!(found.iter().map(numbers).collect::<Vec<_>>());
    Ok(Outcome { json, table, figure: figure(&found, &options.l2), files: Vec::new() })
}

/// The first `most` training images of each class in the order that `bits` gives.
fn draw(set: &Dataset, most: usize, bits: impl Fn(usize) -> u32) -> Result<Vec<Vec<usize>>> {
    let mut by_class: Vec<Vec<usize>> = vec![Vec::new(); set.classes.len()];
    (0..set.train.len()).for_each(|image| by_class[set.train.label(image)].push(image));
    for (images, name) in by_class.iter_mut().zip(&set.classes) {
        if images.len() < most {
            return Err(Error::usage(format!(
                "--suite few-shot draws {most} training images of each class, and `{name}` has {}; {}",
                images.len(),
                match images.len() {
                    0 => "add some, or take the class out of the set".to_owned(),
                    few => format!("give no more, such as --shots {few}"),
                }
            )));
        }
        images.sort_by_cached_key(|&image| (bits(image), image));
        images.truncate(most);
    }
    Ok(by_class)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Sample standard deviation; none of a single value.
fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// Accuracy by shots, a line a regularisation with the spread of its draws.
fn figure(found: &[Shots], l2: &[f64]) -> Figure {
    let percent = |x: f64| 100.0 * x;
    let ends = |each: &Vec<f64>| {
        let spread = deviation(each).unwrap_or(0.0);
        [mean(each) - spread, mean(each) + spread].map(percent)
    };
    let shown = found.iter().flat_map(|shots| &shots.by_l2).flat_map(ends);
    let mut panel = Panel::new(
        "Few-shot linear regression",
        Axis::new(
            "training images of a class",
            Scale::log_around(found.iter().map(|shots| shots.shots as f64)),
        ),
        Axis::new("top-1 (%)", Scale::around(shown, (0.0, 100.0))),
    );
    for (index, l2) in l2.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        for Shots { shots, by_l2 } in found {
            let points = ends(&by_l2[index]).map(|y| (*shots as f64, y)).to_vec();
            panel.marks.push(Mark::Line { points, colour, dashed: false });
        }
        let points = found.iter().map(|shots| (shots.shots as f64, percent(mean(&shots.by_l2[index]))));
        panel.series(&format!("L2 {}", text::number(*l2)), points.collect(), colour);
    }
    Figure { panels: vec![panel] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_by_hand() {
        assert_eq!((mean(&[1.0, 2.0, 6.0]), deviation(&[1.0, 2.0, 6.0])), (3.0, Some(7f64.sqrt())));
        assert_eq!(deviation(&[1.0]), None);
    }
}
