//! How fast the forward pass is: images and tokens a second at each size, on batches that wait in memory, with the copies
//! to and from the device and without decoding.

use std::time::Instant;

use serde_json::json;

use super::{Options, Outcome, Session, text};
use crate::autograd::Workload;
use crate::data::loader::{Loader, Share};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, Figure, Mark, Panel, Scale};

/// Batches that are run in turn, so that none is measured on the caches that it has left itself.
const BATCHES: usize = 4;

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    if options.repetitions == 0 {
        return Err(Error::usage("--repetitions must be at least 1"));
    }
    let recipe = session.recipe().clone();
    let (mut lines, mut numbers, mut points) = (Vec::new(), Vec::new(), Vec::new());
    for setting in options.settings() {
        let mut loader =
            Loader::eval_as(session.images.clone(), &recipe, setting.packing(&recipe)?, Share::ALL)?;
        let mut batches = Vec::new();
        // One more than is measured: the last of a set is only partly filled.
        while batches.len() <= BATCHES
            && let Some(loaded) = loader.next().transpose()?
        {
            batches.push(loaded.batch);
        }
        batches.retain(|batch| batch.images > 0);
        if batches.len() > 1 {
            batches.pop();
        }
        let Some(first) = batches.first() else {
            return Err(Error::usage(format!("{}: no image can be read", session.set.description)));
        };
        let fill = first.live_tokens() as f64 / first.tokens() as f64;
        let sum = |of: &dyn Fn(usize) -> f64| (0..batches.len()).map(of).sum::<f64>();
        let images = sum(&|i| batches[i].images as f64);
        let tokens = sum(&|i| batches[i].live_tokens() as f64);
        let flops = sum(&|i| session.trained.model.flops(&Workload::of(&batches[i])));
        let mut pass = || -> Result<f64> {
            let start = Instant::now();
            for batch in &batches {
                session.trained.model.logits(batch)?;
            }
            Ok(start.elapsed().as_secs_f64())
        };
        pass()?;
        let mut seconds = (0..options.repetitions).map(|_| pass()).collect::<Result<Vec<_>>>()?;
        seconds.sort_by(f64::total_cmp);
        let middle = seconds.len() / 2;
        let median = if seconds.len() % 2 == 1 {
            seconds[middle]
        } else {
            0.5 * (seconds[middle - 1] + seconds[middle])
        };
        let (fastest, slowest) = (seconds[0], seconds[seconds.len() - 1]);
        let rate = images / median;
        lines.push(vec![
            setting.size.to_string(),
            format!("{:.1}", tokens / images),
            format!("{rate:.1}"),
            format!("{:.1} - {:.1}", images / slowest, images / fastest),
            format!("{:.0}", tokens / median),
            format!("{:.1}", flops / median / 1e9),
            format!("{:.1}", 100.0 * fill),
        ]);
        numbers.push(json!({
            "size": setting.size.to_string(), "batches": batches.len(), "images": images, "tokens_per_image": tokens / images,
            "images_per_second": rate, "tokens_per_second": tokens / median, "gflop_per_second": flops / median / 1e9,
            "gflop_per_image": flops / images / 1e9, "seconds": seconds, "fill": fill,
        }));
        points.push((tokens / images, rate, setting.size.to_string()));
    }
    let mut table = format!(
        "model             {}\ndata              {}\nmeasured          the forward pass over up to {BATCHES} batches of {} tokens, \
         median of {} after a warm-up\n\n",
        session.trained.path.display(),
        session.described(),
        recipe.packing.tokens,
        options.repetitions
    );
    let header = ["size", "tokens", "images/s", "slowest - fastest", "tokens/s", "GFLOP/s", "filled %"];
    table += &text::table(&header, &lines);

    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut panel = Panel::new(
        "Throughput of the forward pass",
        Axis::new("tokens an image", Scale::log_around(points.iter().map(|point| point.0))),
        Axis::new("images/s", Scale::log_around(points.iter().map(|point| point.1))),
    );
    let line = points.iter().map(|(tokens, rate, _)| (*tokens, *rate)).collect();
    panel.series("median", line, COLOURS[0]);
    panel.marks.extend(points.into_iter().map(|(x, y, text)| Mark::Note { at: (x, y), text }));
    let mut json = session.header();
    json["suite"] = json!("throughput");
    json["sizes"] = json!(numbers);
    Ok(Outcome { json, table, figure: Figure { panels: vec![panel] }, files: Vec::new() })
}
