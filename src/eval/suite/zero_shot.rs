//! Classes by texts: how well a model of images and texts tells the classes of the set from their names alone, in the
//! templates of --prompts, together and each by itself.

use std::path::Path;

use serde_json::json;

use super::{Options, Outcome, Session, Suite, preamble, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, Figure, Mark, Panel, Scale};
use crate::eval::metrics::Classification;
use crate::recipe::Recipe;

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    // Other suites run on the model after this one.
    session.with_classes_kept(|session| evaluate(session, options))
}

fn evaluate(session: &mut Session, options: &Options) -> Result<Outcome> {
    let prompts = match &options.prompts {
        Some(path) => read(path)?,
        None => session.recipe().text.prompts.clone(),
    };
    let setting = options.setting(Suite::ZeroShot)?;
    let classes = session.set.classes.clone();
    if classes.len() < 2 {
        return Err(Error::usage(format!(
            "{}: there are no classes to tell apart; name data that have some with --data",
            session.set.description
        )));
    }
    let mut run = |prompts: &[String]| -> Result<_> {
        session.tell_classes(&classes, prompts)?;
        let (scores, labels) = (session.scores(setting)?, session.labels()?);
        let labels: Vec<i32> = scores.samples.iter().map(|&sample| labels[sample] as i32).collect();
        let mut counts = Classification::new(classes.len(), session.loss());
        counts.add(&scores.values, &labels, &vec![1.0; labels.len()]);
        Ok((counts.report(), scores))
    };
    let mut alone = Vec::new();
    for prompt in prompts.iter().filter(|_| prompts.len() > 1) {
        alone.push((prompt.clone(), run(std::slice::from_ref(prompt))?.0.top1));
    }
    let (report, scores) = run(&prompts)?;
    let mut table = preamble(session, &scores, setting.size);
    table += &format!(
        "prompts           {}\ntop-1             {} %\ntop-5             {} %\nloss              {:.4}\n\n",
        prompts.join("; "),
        text::percent(report.top1),
        text::percent(report.top5),
        report.loss
    );
    let cell = |top1: &Option<f64>| top1.map_or("-".into(), text::percent);
    let rows: Vec<Vec<String>> = classes
        .iter()
        .zip(&report.per_class)
        .map(|(class, (top1, images))| vec![class.clone(), images.to_string(), cell(top1)])
        .collect();
    table += &text::table(&["class", "images", "top-1 %"], &rows);
    if !alone.is_empty() {
        let rows: Vec<Vec<String>> =
            alone.iter().map(|(prompt, top1)| vec![prompt.clone(), text::percent(*top1)]).collect();
        table += &format!("\n{}", text::table(&["prompt alone", "top-1 %"], &rows));
    }
    let mut json = session.header();
    json["suite"] = json!("zero-shot");
    json["size"] = json!(setting.size.to_string());
    json["prompts"] = json!(prompts);
    json["images"] = json!(report.images);
    json["unreadable"] = json!(scores.unreadable);
    json["top1"] = json!(report.top1);
    json["top5"] = json!(report.top5);
    json["balanced"] = json!(report.balanced);
    json["cross_entropy"] = json!(report.loss);
    json["classes"] = json!(
        classes
            .iter()
            .zip(&report.per_class)
            .map(|(class, (top1, images))| json!({ "class": class, "images": images, "top1": top1 }))
            .collect::<Vec<_>>()
    );
    json["alone"] = json!(
        alone.iter().map(|(prompt, top1)| json!({ "prompt": prompt, "top1": top1 })).collect::<Vec<_>>()
    );
    let per_class: Vec<f64> = report.per_class.iter().filter_map(|(top1, _)| *top1).collect();
    Ok(Outcome {
        json,
        table,
        figure: Figure { panels: vec![panel(per_class, report.top1)] },
        files: Vec::new(),
    })
}

/// The classes' accuracies in order, the mean of all images across them.
fn panel(mut per_class: Vec<f64>, top1: f64) -> Panel {
    per_class.sort_by(|a, b| b.total_cmp(a));
    let count = per_class.len() as f64;
    let x = Axis::new("classes, the best first", Scale::linear(0.0, count.max(1.0)));
    let mut panel =
        Panel::new("Zero-shot accuracy by class", x, Axis::new("top-1 (%)", Scale::linear(0.0, 100.0)));
    for (i, share) in per_class.iter().enumerate() {
        let (from, to) = ((i as f64 + 0.1, 0.0), (i as f64 + 0.9, 100.0 * share));
        panel.marks.push(Mark::Bar { from, to, colour: COLOURS[0], opacity: 0.8 });
    }
    let points = vec![(0.0, 100.0 * top1), (count, 100.0 * top1)];
    panel.marks.push(Mark::Line { points, colour: COLOURS[1], dashed: true });
    panel.legend.push(("of a class".into(), COLOURS[0]));
    panel.legend.push(("of all images".into(), COLOURS[1]));
    panel
}

/// Templates, one a line.
fn read(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .map_err(|cause| Error::file(path, format!("the prompts cannot be read ({cause})")))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let prompts: Vec<String> = lines.map(str::to_owned).collect();
    Recipe::check_prompts(&prompts, &path.display().to_string())?;
    Ok(prompts)
}
