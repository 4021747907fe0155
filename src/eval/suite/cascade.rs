//! A cascade of two sizes by confidence (NaViT, appendix D): all images at the smaller size, then the share α of them
//! with the smallest largest probability again at the larger one, whose answers replace the first. It costs t₁ + α t₂.

use serde_json::json;

use super::{Options, Outcome, Pass, Session, Size, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};
use crate::eval::metrics::probability::decision;
use crate::recipe::LossKind;

/// Steps of α between 0 and 1.
const STEPS: usize = 20;

/// What a model says of the images at one size.
struct Stage {
    size: Size,
    confidences: Vec<f64>,
    correct: Vec<bool>,
    tokens: f64,
    flops: f64,
    seconds: f64,
}

/// A cascade at one α.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    alpha: f64,
    top1: f64,
    flops: f64,
    seconds: f64,
}

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    let settings = options.settings();
    if settings.len() < 2 {
        return Err(Error::usage(
            "--suite cascade runs images at a small size and some of them again at a larger one; give --tokens (or \
             --resolution) two values, such as --tokens 64,128",
        ));
    }
    let labels = session.labels()?;
    let mut stages = Vec::new();
    let mut samples = None;
    let mut unreadable = 0;
    for setting in settings {
        let scores = session.scores(setting)?;
        if *samples.get_or_insert_with(|| scores.samples.clone()) != scores.samples {
            return Err(Error::failure(
                "some images could be read at one size and not at another; run it again",
            ));
        }
        unreadable = scores.unreadable;
        stages.push(stage(setting.size, &scores, &labels, session.loss()));
    }
    stages.sort_by(|a, b| a.flops.total_cmp(&b.flops));
    let pairs: Vec<(usize, usize)> = (0..stages.len())
        .flat_map(|first| (first + 1..stages.len()).map(move |second| (first, second)))
        .collect();
    if let Some((first, _)) = pairs.iter().find(|(a, b)| stages[*a].flops >= stages[*b].flops) {
        return Err(Error::usage(format!(
            "--suite cascade: two of the sizes cost the same, {} and {}; give --tokens (or --resolution) two sizes that \
             differ",
            stages[*first].size,
            stages[first + 1].size
        )));
    }
    let curves: Vec<(usize, usize, Vec<Point>)> =
        pairs.into_iter().map(|(a, b)| (a, b, curve(&stages[a], &stages[b]))).collect();

    let images = stages[0].correct.len();
    let accuracy = |stage: &Stage| stage.correct.iter().filter(|c| **c).count() as f64 / images as f64;
    let mut table = format!(
        "model             {}\ndata              {}\nimages            {images}; GFLOP and milliseconds are the mean of an \
         image\n{}\n",
        session.trained.path.display(),
        session.described(),
        text::unreadable(unreadable)
    );
    let line = |name: String, top1: f64, flops: f64, seconds: f64| {
        vec![name, text::gflop(flops), format!("{:.3}", 1e3 * seconds), text::percent(top1)]
    };
    let single = |s: &Stage| line(format!("all at {}", s.size), accuracy(s), s.flops, s.seconds);
    let header = |first| [first, "GFLOP", "ms", "top-1 %"];
    table += &text::table(&header("one size"), &stages.iter().map(single).collect::<Vec<_>>());
    for (first, second, points) in &curves {
        let name = format!("{}, then {}", stages[*first].size, stages[*second].size);
        let shown = points.iter().step_by(2);
        let lines: Vec<_> =
            shown.map(|p| line(format!("alpha {:.1}", p.alpha), p.top1, p.flops, p.seconds)).collect();
        table += &format!("\n{name}\n{}", text::table(&header(""), &lines));
    }

    let costs = || curves.iter().flat_map(|(_, _, points)| points.iter().map(|p| p.flops / 1e9));
    let accuracies = || {
        let of_curves = curves.iter().flat_map(|(_, _, points)| points.iter().map(|p| 100.0 * p.top1));
        of_curves.chain(stages.iter().map(|stage| 100.0 * accuracy(stage)))
    };
    let all_costs = costs().chain(stages.iter().map(|stage| stage.flops / 1e9));
    let x = Axis::new("GFLOP an image", Scale::log_around(all_costs));
    let mut panel = Panel::new(
        "Cascade by confidence",
        x,
        Axis::new("top-1 (%)", Scale::around(accuracies(), (0.0, 100.0))),
    );
    for (index, (first, second, points)) in curves.iter().enumerate() {
        let name = format!("{}, then {}, alpha from 0 to 1", stages[*first].size, stages[*second].size);
        let points = points.iter().map(|p| (p.flops / 1e9, 100.0 * p.top1)).collect();
        panel.series(&name, points, COLOURS[index % COLOURS.len()]);
    }
    let singles: Vec<(f64, f64)> = stages.iter().map(|s| (s.flops / 1e9, 100.0 * accuracy(s))).collect();
    panel.marks.push(Mark::Line { points: singles.clone(), colour: FAINT, dashed: true });
    panel.marks.push(Mark::Dots { points: singles.clone(), colour: FAINT });
    for (stage, at) in stages.iter().zip(singles) {
        panel.marks.push(Mark::Note { at, text: stage.size.to_string() });
    }
    panel.legend.push(("all images at one size".into(), FAINT));

    let mut json = session.header();
    json["suite"] = json!("cascade");
    json["images"] = json!(images);
    json["unreadable"] = json!(unreadable);
    let of_stage = |s: &Stage| {
        json!({
            "size": s.size.to_string(), "top1": accuracy(s), "tokens_per_image": s.tokens,
            "gflop_per_image": s.flops / 1e9, "seconds_per_image": s.seconds,
        })
    };
    json["single"] = json!(stages.iter().map(of_stage).collect::<Vec<_>>());
    let of_point = |p: &Point| {
        json!({
            "alpha": p.alpha, "top1": p.top1, "gflop_per_image": p.flops / 1e9, "seconds_per_image": p.seconds,
        })
    };
    let of_curve = |(a, b, points): &(usize, usize, Vec<Point>)| {
        json!({
            "first": stages[*a].size.to_string(), "second": stages[*b].size.to_string(),
            "points": points.iter().map(of_point).collect::<Vec<_>>(),
        })
    };
    json["cascades"] = json!(curves.iter().map(of_curve).collect::<Vec<_>>());
    Ok(Outcome { json, table, figure: Figure { panels: vec![panel] }, files: Vec::new() })
}

fn stage(size: Size, scores: &Pass, labels: &[usize], loss: LossKind) -> Stage {
    let decisions: Vec<(usize, f64)> =
        (0..scores.images()).map(|row| decision(scores.row(row), loss, 1.0)).collect();
    Stage {
        size,
        confidences: decisions.iter().map(|decision| decision.1).collect(),
        correct: decisions.iter().zip(&scores.samples).map(|(d, &sample)| d.0 == labels[sample]).collect(),
        tokens: scores.tokens,
        flops: scores.flops,
        seconds: scores.seconds,
    }
}

/// The cascade of two stages at every α: the images in the order of their confidence at the first, of equal ones in the
/// order of the set.
fn curve(first: &Stage, second: &Stage) -> Vec<Point> {
    let images = first.correct.len();
    let mut order: Vec<usize> = (0..images).collect();
    order.sort_by(|&a, &b| first.confidences[a].total_cmp(&first.confidences[b]));
    let at = |step: usize| {
        let alpha = step as f64 / STEPS as f64;
        let (again, kept) = order.split_at((alpha * images as f64).round() as usize);
        let right = again.iter().filter(|&&image| second.correct[image]).count()
            + kept.iter().filter(|&&image| first.correct[image]).count();
        // What was run, so that cost and accuracy belong together where α is no whole number of images.
        let share = again.len() as f64 / images as f64;
        Point {
            alpha,
            top1: right as f64 / images as f64,
            flops: first.flops + share * second.flops,
            seconds: first.seconds + share * second.seconds,
        }
    };
    (0..=STEPS).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(confidences: &[f64], correct: &[u8], flops: f64) -> Stage {
        Stage {
            size: Size::Recipe,
            confidences: confidences.to_vec(),
            correct: correct.iter().map(|c| *c == 1).collect(),
            tokens: 0.0,
            flops,
            seconds: 0.5 * flops,
        }
    }

    #[test]
    fn the_least_confident_are_run_again() {
        // The second stage helps the two least confident images and spoils the most confident one.
        let first = stage(&[0.9, 0.2, 0.8, 0.3], &[1, 0, 1, 0], 10.0);
        let second = stage(&[0.0; 4], &[0, 1, 1, 1], 40.0);
        let points = curve(&first, &second);
        let at = |alpha: f64| points.iter().find(|p| (p.alpha - alpha).abs() < 1e-9).unwrap();
        assert_eq!([0.0, 0.25, 0.5, 0.75, 1.0].map(|alpha| at(alpha).top1), [0.5, 0.75, 1.0, 1.0, 0.75]);
        assert_eq!([0.0, 0.5, 1.0].map(|alpha| at(alpha).flops), [10.0, 30.0, 50.0]);
        assert_eq!(at(0.5).seconds, 15.0);
        assert_eq!(at(0.3).flops, 20.0, "one image of four");
    }

    #[test]
    fn of_equal_confidence_the_first() {
        let first = stage(&[0.5; 4], &[0, 0, 0, 0], 1.0);
        let second = stage(&[0.5; 4], &[1, 0, 0, 0], 2.0);
        assert_eq!(curve(&first, &second)[5].top1, 0.25);
    }
}
