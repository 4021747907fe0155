//! Whether the model is as often right as it says: ECE and reliability diagram as trained and after temperature scaling,
//! which is fitted on one half of the images and shown on the other; the same by group.
//!
//! Confidence is the probability of the predicted class: its softmax, or its sigmoid after the sigmoid loss.

use serde_json::json;

use super::{Options, Outcome, Session, Suite, attributes, fitting_half, preamble, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};
use crate::eval::metrics::calibration::{BUCKETS, Labelled, ReliabilityDiagram, TEMPERATURES};
use crate::recipe::LossKind;

/// The images of `rows`.
struct Part {
    logits: Vec<f32>,
    labels: Vec<usize>,
    loss: LossKind,
}

impl Part {
    fn labelled(&self) -> Labelled<'_> {
        Labelled { logits: &self.logits, labels: &self.labels, loss: self.loss }
    }
}

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    let setting = options.setting(Suite::Calibration)?;
    let labels = session.labels()?;
    let groups = options.attributes.as_deref().map(|path| attributes::read(path, session.images.as_ref()));
    let groups = groups.transpose()?.unwrap_or_default();
    let scores = session.scores(setting)?;
    if scores.images() < 4 {
        return Err(Error::usage(format!(
            "--suite calibration fits a temperature on half of the images and shows it on the others, and there are {}; \
             give it more with --data",
            scores.images()
        )));
    }
    let loss = session.loss();
    let part = |rows: Vec<usize>| Part {
        logits: scores.rows(&rows).flatten().copied().collect(),
        labels: rows.iter().map(|&row| labels[scores.samples[row]]).collect(),
        loss,
    };
    let half = fitting_half(session.recipe().train.seed, &scores.samples);
    let rows = |wanted: &dyn Fn(usize) -> bool| (0..scores.images()).filter(|&row| wanted(row)).collect();
    let (all, fit, held_out) =
        (part(rows(&|_| true)), part(rows(&|row| half[row])), part(rows(&|row| !half[row])));
    let temperature = fit.labelled().fit_temperature();

    let mut lines = Vec::new();
    let mut figures = |name: &str, part: &Part, temperature: f64| {
        let (diagram, loss) = (part.labelled().reliability(temperature), part.labelled().loss(temperature));
        lines.push(vec![
            name.to_owned(),
            part.labels.len().to_string(),
            format!("{temperature:.3}"),
            text::percent(diagram.accuracy),
            text::percent(diagram.confidence),
            text::percent(diagram.ece),
            format!("{loss:.4}"),
        ]);
        let numbers = json!({
            "images": part.labels.len(), "temperature": temperature, "loss": loss, "reliability": diagram,
        });
        (diagram, numbers)
    };
    let (_, whole) = figures("all images", &all, 1.0);
    let (before, before_json) = figures("held-out half", &held_out, 1.0);
    let (after, after_json) = figures("  scaled", &held_out, temperature);
    let mut table = preamble(session, &scores, setting.size);
    let probability = match loss {
        LossKind::Softmax => "softmax probability",
        LossKind::Sigmoid | LossKind::Bce => "sigmoid probability",
    };
    table += &format!(
        "confidence        {probability} of the predicted class; ECE over {BUCKETS} buckets\n\
         temperature       {temperature:.4}, fitted on {} of the images\n",
        fit.labels.len()
    );
    if TEMPERATURES.iter().any(|bound| (temperature / bound - 1.0).abs() < 1e-3) {
        table += "                  at the bound of the search: these images do not determine it\n";
    }
    table += "\n";
    table += &text::table(&["", "images", "T", "top-1 %", "confidence %", "ECE %", "loss"], &lines);

    let mut group_lines = Vec::new();
    let mut group_json = Vec::new();
    for attribute in &groups {
        for (value, name) in attribute.values.iter().enumerate() {
            let own = |row: usize| !half[row] && attribute.group_of[scores.samples[row]] == value;
            let own = part(rows(&own));
            let [plain, scaled] = [1.0, temperature].map(|t| own.labelled().reliability(t));
            group_lines.push(vec![
                format!("{} = {name}", attribute.name),
                own.labels.len().to_string(),
                text::percent(plain.accuracy),
                text::percent(plain.confidence),
                text::percent(plain.ece),
                text::percent(scaled.ece),
            ]);
            group_json.push(json!({
                "attribute": attribute.name, "value": name, "images": own.labels.len(), "before": plain, "after": scaled,
            }));
        }
    }
    if !group_lines.is_empty() {
        let header = ["held-out half", "images", "top-1 %", "confidence %", "ECE %", "ECE scaled %"];
        table += &format!("\n{}", text::table(&header, &group_lines));
    }

    let panels = vec![
        panel(&format!("As trained: ECE {} %", text::percent(before.ece)), &before, COLOURS[0]),
        panel(&format!("T = {temperature:.2}: ECE {} %", text::percent(after.ece)), &after, COLOURS[2]),
    ];
    let mut json = session.header();
    json["suite"] = json!("calibration");
    json["size"] = json!(setting.size.to_string());
    json["unreadable"] = json!(scores.unreadable);
    json["temperature"] = json!({ "value": temperature, "fitted_on": fit.labels.len() });
    json["all"] = whole;
    json["held_out"] = before_json;
    json["held_out_scaled"] = after_json;
    json["groups"] = json!(group_json);
    Ok(Outcome { json, table, figure: Figure { panels }, files: Vec::new() })
}

/// Accuracy by confidence over the diagonal, and behind them how the images are spread.
fn panel(title: &str, diagram: &ReliabilityDiagram, colour: &'static str) -> Panel {
    let axis = |label: &str| Axis::new(label, Scale::linear(0.0, 1.0));
    let mut panel = Panel::new(title, axis("confidence"), axis("accuracy"));
    let width = 1.0 / diagram.buckets.len() as f64;
    let images: u64 = diagram.buckets.iter().map(|bucket| bucket.images).sum();
    for (index, bucket) in diagram.buckets.iter().enumerate() {
        let (left, right) = ((index as f64 + 0.06) * width, (index as f64 + 0.94) * width);
        let share = bucket.images as f64 / images.max(1) as f64;
        panel.marks.push(Mark::Bar { from: (left, 0.0), to: (right, share), colour: FAINT, opacity: 0.45 });
        if let Some(accuracy) = bucket.accuracy {
            panel.marks.push(Mark::Bar { from: (left, 0.0), to: (right, accuracy), colour, opacity: 0.35 });
            let thin = 0.006;
            let line = Mark::Bar {
                from: (left, accuracy - thin),
                to: (right, accuracy + thin),
                colour,
                opacity: 1.0,
            };
            panel.marks.push(line);
        }
    }
    panel.marks.push(Mark::Line { points: vec![(0.0, 0.0), (1.0, 1.0)], colour: FAINT, dashed: true });
    panel.legend.push(("accuracy of the images of like confidence".into(), colour));
    panel.legend.push(("their share of all images".into(), FAINT));
    panel
}
