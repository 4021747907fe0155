//! Accuracy against cost: the same images at several sizes, and with --drop at the largest size with so many of their
//! tokens dropped that the rest costs what a smaller image does (NaViT, figure 17).

use serde_json::json;

use super::{Options, Outcome, Pass, Session, Setting, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, Figure, Mark, Panel, Scale};
use crate::eval::metrics::calibration::Labelled;
use crate::eval::metrics::rank;

/// A size and what came of it.
pub(super) struct Point {
    pub setting: Setting,
    pub top1: f64,
    pub top5: f64,
    pub loss: f64,
    pub ece: f64,
    pub tokens: f64,
    pub flops: f64,
    pub seconds: f64,
    pub downscaled: u64,
}

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    let labels = session.labels()?;
    let settings = options.settings();
    let mut resized = Vec::new();
    for setting in &settings {
        let scores = session.scores(*setting)?;
        resized.push(point(session, *setting, &scores, &labels));
    }
    let by_flops = |a: &Point, b: &Point| a.flops.total_cmp(&b.flops);
    resized.sort_by(by_flops);
    let mut dropped = Vec::new();
    if options.drop {
        let Some((largest, smaller @ [_, ..])) = resized.split_last() else {
            return Err(Error::usage(
                "--drop compares smaller images with the largest size given, of which tokens are dropped; give \
                 --resolution or --tokens two values or more, such as --tokens 64,128",
            ));
        };
        let prefix = session.recipe().model.prefix() as f64;
        for smaller in smaller {
            // What was measured: packing rounds to whole patches and makes images fit.
            let keep = (smaller.tokens - prefix) / (largest.tokens - prefix);
            if keep >= 1.0 {
                return Err(Error::usage(format!(
                    "--drop: an image has as many tokens at {} as at {}, so that there is none to drop; give \
                     --resolution or --tokens sizes that differ",
                    smaller.setting.size, largest.setting.size
                )));
            }
            let setting = Setting { keep, ..Setting::whole(largest.setting.size) };
            let scores = session.scores(setting)?;
            dropped.push(point(session, setting, &scores, &labels));
        }
    }
    let scores = session.scores(settings[0])?;
    let (images, unreadable) = (scores.images(), scores.unreadable);
    let name = |point: &Point| match point.setting.keep {
        keep if keep < 1.0 => format!("{}, {:.0} % dropped", point.setting.size, 100.0 * (1.0 - keep)),
        _ => point.setting.size.to_string(),
    };
    let row = |point: &Point| {
        vec![
            name(point),
            format!("{:.1}", point.tokens),
            text::gflop(point.flops),
            format!("{:.3}", 1e3 * point.seconds),
            text::percent(point.top1),
            text::percent(point.top5),
            format!("{:.4}", point.loss),
            text::percent(point.ece),
            point.downscaled.to_string(),
        ]
    };
    let header = ["size", "tokens", "GFLOP", "ms", "top-1 %", "top-5 %", "loss", "ECE %", "downscaled"];
    let mut table = format!(
        "model             {}\ndata              {}\nimages            {images}; tokens, GFLOP and milliseconds are the mean of \
         an image\n{}\n",
        session.trained.path.display(),
        session.described(),
        text::unreadable(unreadable)
    );
    table += &text::table(&header, &resized.iter().chain(&dropped).map(row).collect::<Vec<_>>());

    let cost = Axis::new(
        "GFLOP an image",
        Scale::log_around(resized.iter().chain(&dropped).map(|point| point.flops / 1e9)),
    );
    let curve = |title: &str, label: &str, bounds, value: fn(&Point) -> f64| {
        let values = resized.iter().chain(&dropped).map(value);
        let mut panel = Panel::new(title, cost.clone(), Axis::new(label, Scale::around(values, bounds)));
        let line = |points: &[Point]| points.iter().map(|p| (p.flops / 1e9, value(p))).collect::<Vec<_>>();
        panel.series("resized", line(&resized), COLOURS[0]);
        if !dropped.is_empty() {
            // Both begin where nothing is dropped.
            let points = line(&dropped).into_iter().chain(line(&resized[resized.len() - 1..])).collect();
            panel.series("tokens dropped from the largest size", points, COLOURS[1]);
        }
        for point in &resized {
            let text = point.setting.size.to_string();
            panel.marks.push(Mark::Note { at: (point.flops / 1e9, value(point)), text });
        }
        panel
    };
    let panels = vec![
        curve("Accuracy against cost", "top-1 (%)", (0.0, 100.0), |p| 100.0 * p.top1),
        curve("Calibration against cost", "ECE (%)", (0.0, 100.0), |p| 100.0 * p.ece),
    ];
    let numbers = |point: &Point| {
        json!({
            "size": point.setting.size.to_string(), "keep": point.setting.keep, "top1": point.top1, "top5": point.top5,
            "loss": point.loss, "ece": point.ece, "tokens_per_image": point.tokens,
            "gflop_per_image": point.flops / 1e9, "seconds_per_image": point.seconds, "downscaled": point.downscaled,
        })
    };
    let mut json = session.header();
    json["suite"] = json!("resolution");
    json["images"] = json!(images);
    json["unreadable"] = json!(unreadable);
    json["resized"] = json!(resized.iter().map(numbers).collect::<Vec<_>>());
    json["dropped"] = json!(dropped.iter().map(numbers).collect::<Vec<_>>());
    Ok(Outcome { json, table, figure: Figure { panels }, files: Vec::new() })
}

/// What the model is worth at `setting`, for which `scores` are.
pub(super) fn point(session: &Session, setting: Setting, scores: &Pass, labels: &[usize]) -> Point {
    let labels: Vec<usize> = scores.samples.iter().map(|&sample| labels[sample]).collect();
    let labelled = Labelled { logits: &scores.values, labels: &labels, loss: session.loss() };
    let ranks: Vec<usize> =
        labels.iter().enumerate().map(|(row, label)| rank(scores.row(row), *label)).collect();
    let within = |most: usize| ranks.iter().filter(|rank| **rank < most).count() as f64 / ranks.len() as f64;
    Point {
        setting,
        top1: within(1),
        top5: within(5),
        loss: labelled.loss(1.0),
        ece: labelled.reliability(1.0).ece,
        tokens: scores.tokens,
        flops: scores.flops,
        seconds: scores.seconds,
        downscaled: scores.downscaled,
    }
}
