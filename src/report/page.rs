//! The page: HTML with everything within it, no scripts, no fonts or pictures from elsewhere.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::Value;

use super::attention;
use super::charts;
use super::log::RunLog;
use super::samples::Sample;
use crate::eval::chart::escape;
use crate::eval::predict::Scored;

/// A condition of an evaluation, read from its report.
type Condition = fn(&Value) -> String;

/// What the numbers of a suite depend on.
const CONDITIONS: [(&str, Condition); 6] = [
    ("data", |suite| shown(&suite["data"])),
    ("crop", |suite| shown(&suite["crop"])),
    ("sizes", sizes),
    ("L2", |suite| shown(&suite["l2"][0])),
    ("number of seeds", |suite| shown(&suite["seeds"])),
    ("number of epochs", |suite| shown(&suite["epochs"])),
];

const STYLE: &str = "\
:root { color: #24292f; background: #f6f7f9; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 1400px; margin: 0 auto; padding: 24px 28px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 4px 0 12px; color: #57606a; }
.grid { display: flex; flex-wrap: wrap; gap: 14px; }
.card { background: white; border: 1px solid #dfe3e8; border-radius: 8px; padding: 8px; }
.card svg { display: block; }
table { border-collapse: collapse; background: white; border: 1px solid #dfe3e8; border-radius: 8px; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #edf0f3; font-variant-numeric: tabular-nums; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.run i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
code, pre { font: 13px/1.4 ui-monospace, monospace; } pre { overflow-x: auto; margin: 6px 4px; }
details summary { cursor: pointer; padding: 4px; }
.sample { width: 150px; font-size: 13px; } .sample img { width: 150px; height: 120px; object-fit: contain; background: #edf0f3; border-radius: 5px; }
.small { image-rendering: pixelated; }
.bar { display: flex; justify-content: space-between; padding: 0 4px; border-radius: 3px; margin-top: 2px; white-space: nowrap; overflow: hidden; }
.wrong { border-color: #d55e00; } .truth { color: #57606a; padding: 2px 4px 0; }
";

/// The page of `runs`, with the predictions of each on some images, which may be none.
pub fn page(runs: &[RunLog], samples: &[Vec<Sample>]) -> String {
    let title = match runs {
        [run] => run.name.clone(),
        several => format!("{} runs", several.len()),
    };
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width\">\n<title>{} - trencadis</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{}</h1>\n",
        escape(&title),
        escape(&title)
    );
    summary(&mut out, runs);
    differences(&mut out, runs);
    section(&mut out, "Training", charts::training(runs).iter().map(|figure| card(&figure.to_svg())));
    section(
        &mut out,
        "Attention by block",
        attention::figures(runs).iter().map(|figure| card(&figure.to_svg())),
    );
    other_conditions(&mut out, runs);
    section(&mut out, "Evaluations", charts::evaluations(runs).iter().map(|figure| card(&figure.to_svg())));
    calibration(&mut out, runs);
    linear_probe(&mut out, runs);
    predictions(&mut out, runs, samples);
    tables(&mut out, runs);
    out + "</body>\n</html>\n"
}

/// A heading over cards, or nothing without them.
fn section(out: &mut String, title: &str, cards: impl Iterator<Item = String>) {
    let cards: Vec<String> = cards.collect();
    if !cards.is_empty() {
        let _ = writeln!(out, "<h2>{title}</h2>\n<div class=\"grid\">{}</div>", cards.concat());
    }
}

fn card(content: &str) -> String {
    format!("<div class=\"card\">{content}</div>\n")
}

/// A run's name behind its colour.
fn name(runs: &[RunLog], index: usize) -> String {
    let colour = charts::colour(index);
    format!("<span class=\"run\"><i style=\"background:{colour}\"></i>{}</span>", escape(&runs[index].name))
}

fn summary(out: &mut String, runs: &[RunLog]) {
    let (unit, scale) = charts::compute_unit(runs);
    let header = [
        "run",
        "steps",
        "images seen",
        unit,
        "seconds",
        "images/s",
        "padding %",
        "last training loss",
        "best top-1 %",
        "at step",
    ];
    let rows = runs.iter().enumerate().map(|(index, run)| {
        let (images, flops, seconds) = run.totals().last().copied().unwrap_or_default();
        let (tokens, rows) =
            run.steps.iter().fold((0, 0), |sum, step| (sum.0 + step.tokens, sum.1 + step.token_rows));
        let last = run.steps.last();
        let dash = |value: Option<String>| value.unwrap_or_else(|| "–".into());
        vec![
            name(runs, index),
            dash(last.map(|step| step.step.to_string())),
            format!("{images:.0}"),
            format!("{:.2}", flops / scale),
            format!("{seconds:.0}"),
            dash((seconds > 0.0).then(|| format!("{:.0}", images / seconds))),
            dash((rows > 0).then(|| format!("{:.2}", 100.0 * (1.0 - tokens as f64 / rows as f64)))),
            dash(last.and_then(|step| step.loss).map(|loss| format!("{loss:.4}"))),
            dash(run.best().map(|best| format!("{:.2}", 100.0 * best.top1))),
            dash(run.best().map(|best| best.step.to_string())),
        ]
    });
    table(out, &header, rows);
}

/// Keys of the recipes in which the runs differ.
fn differences(out: &mut String, runs: &[RunLog]) {
    if runs.len() < 2 {
        return;
    }
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.recipe.keys()).collect();
    let differing: Vec<&String> = keys
        .into_iter()
        .filter(|key| key.as_str() != "description")
        .filter(|key| runs.iter().any(|run| run.recipe.get(*key) != runs[0].recipe.get(*key)))
        .collect();
    let _ = writeln!(out, "<h2>What differs</h2>");
    if differing.is_empty() {
        let _ = writeln!(out, "<p>The recipes are the same.</p>");
        return;
    }
    let header: Vec<String> =
        std::iter::once("key".into()).chain((0..runs.len()).map(|index| name(runs, index))).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let rows = differing.into_iter().map(|key| {
        let value = |run: &RunLog| run.recipe.get(key).map_or_else(|| "–".into(), |value| escape(value));
        std::iter::once(format!("<code>{}</code>", escape(key))).chain(runs.iter().map(value)).collect()
    });
    table(out, &header, rows);
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

/// The size, or sizes, of a suite.
fn sizes(suite: &Value) -> String {
    let lists = ["resized", "single", "sizes"].map(|key| suite[key].as_array());
    match lists.into_iter().flatten().next() {
        Some(list) => list.iter().map(|point| shown(&point["size"])).collect::<Vec<_>>().join(", "),
        None => shown(&suite["size"]),
    }
}

/// Where the suites of the runs looked at other data, crops or sizes, so that their numbers do not compare.
fn other_conditions(out: &mut String, runs: &[RunLog]) {
    let suites: BTreeSet<&String> = runs.iter().flat_map(|run| run.suites.keys()).collect();
    for suite in suites {
        let found: Vec<(usize, &Value)> = runs
            .iter()
            .enumerate()
            .filter_map(|(index, run)| Some((index, run.suites.get(suite)?)))
            .collect();
        for (what, of) in CONDITIONS {
            let differ = found.iter().any(|(_, value)| of(value) != of(found[0].1));
            if differ {
                let each = found
                    .iter()
                    .map(|(index, value)| format!("{} {}", name(runs, *index), escape(&of(value))));
                let _ = writeln!(
                    out,
                    "<p>The runs differ in the {what} of {}: {}.</p>",
                    escape(suite),
                    each.collect::<Vec<_>>().join("; ")
                );
            }
        }
    }
}

fn calibration(out: &mut String, runs: &[RunLog]) {
    let row = |(index, run): (usize, &RunLog)| {
        let suite = run.suites.get("calibration")?;
        let percent =
            |part: &str| Some(format!("{:.2}", 100.0 * suite[part]["reliability"]["ece"].as_f64()?));
        Some(vec![
            name(runs, index),
            percent("all")?,
            percent("held_out")?,
            format!("{:.3}", suite["temperature"]["value"].as_f64()?),
            percent("held_out_scaled")?,
        ])
    };
    let rows: Vec<_> = runs.iter().enumerate().filter_map(row).collect();
    if !rows.is_empty() {
        let _ = writeln!(out, "<h2>Calibration</h2>");
        table(
            out,
            &["run", "ECE %", "ECE %, held-out half", "temperature", "ECE % with it"],
            rows.into_iter(),
        );
    }
}

fn linear_probe(out: &mut String, runs: &[RunLog]) {
    let row = |(index, run): (usize, &RunLog)| {
        let suite = run.suites.get("linear-probe")?;
        let percent = |key: &str| Some(format!("{:.2}", 100.0 * suite[key].as_f64()?));
        let cells = [percent("top1")?, percent("top5")?, percent("ece")?, shown(&suite["learning_rate"])];
        Some(std::iter::once(name(runs, index)).chain(cells).collect::<Vec<_>>())
    };
    let rows: Vec<_> = runs.iter().enumerate().filter_map(row).collect();
    if !rows.is_empty() {
        let _ = writeln!(out, "<h2>Linear probe</h2>");
        table(out, &["run", "top-1 %", "top-5 %", "ECE %", "learning rate"], rows.into_iter());
    }
}

/// What the suites printed, folded away.
fn tables(out: &mut String, runs: &[RunLog]) {
    let suites: BTreeSet<&String> = runs.iter().flat_map(|run| run.tables.keys()).collect();
    if !suites.is_empty() {
        let _ = writeln!(out, "<h2>Tables</h2>");
    }
    for suite in suites {
        for (index, run) in runs.iter().enumerate() {
            if let Some(table) = run.tables.get(suite) {
                let _ = writeln!(
                    out,
                    "<details class=\"card\"><summary>{}: {}</summary><pre>{}</pre></details>",
                    escape(suite),
                    name(runs, index),
                    escape(table)
                );
            }
        }
    }
}

fn predictions(out: &mut String, runs: &[RunLog], samples: &[Vec<Sample>]) {
    if samples.iter().all(Vec::is_empty) {
        return;
    }
    let _ = writeln!(
        out,
        "<h2>Predictions</h2>\n<p>Of images that were not trained on; wrong ones have a red frame.</p>"
    );
    for (index, samples) in samples.iter().enumerate().filter(|(_, samples)| !samples.is_empty()) {
        let _ = writeln!(out, "<p>{}</p>\n<div class=\"grid\">", name(runs, index));
        for sample in samples {
            let wrong = if sample.is_right() { "" } else { " wrong" };
            let small = if sample.small { " class=\"small\"" } else { "" };
            let _ = write!(
                out,
                "<div class=\"card sample{wrong}\"><img{small} alt=\"{}\" src=\"{}\">",
                escape(&sample.name),
                sample.picture
            );
            for Scored { class, probability } in &sample.top {
                let percent = 100.0 * probability;
                let _ = write!(
                    out,
                    "<div class=\"bar\" style=\"background:linear-gradient(90deg,#cfe3f3 {percent:.0}%,#edf0f3 \
                     {percent:.0}%)\"><span>{}</span><span>{percent:.0} %</span></div>",
                    escape(class)
                );
            }
            let _ = writeln!(out, "<div class=\"truth\">is {}</div></div>", escape(&sample.label));
        }
        let _ = writeln!(out, "</div>");
    }
}

/// Cells are HTML.
fn table(out: &mut String, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let _ = write!(out, "<table>\n<tr>");
    for cell in header {
        let _ = write!(out, "<th>{cell}</th>");
    }
    let _ = writeln!(out, "</tr>");
    for row in rows {
        let cells: String = row.iter().map(|cell| format!("<td>{cell}</td>")).collect();
        let _ = writeln!(out, "<tr>{cells}</tr>");
    }
    let _ = writeln!(out, "</table>");
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::report::log::{Evaluation, Step};

    fn run(name: &str, lr: &str) -> RunLog {
        let step = |step: u64| Step {
            step,
            loss: Some(1.0 / step as f64),
            accuracy: None,
            learning_rate: Some(0.1),
            grad_norm: None,
            images: 10,
            tokens: 90,
            token_rows: 100,
            flop: 1e12,
            seconds: 0.5,
        };
        let cascade = json!({"suite": "cascade", "cascades": [{"points": [
            {"alpha": 0.0, "top1": 0.5, "gflop_per_image": 1.0}, {"alpha": 1.0, "top1": 0.8, "gflop_per_image": 3.0}]}]});
        RunLog {
            name: name.into(),
            recipe: BTreeMap::from([("train.lr".into(), lr.into()), ("train.seed".into(), "0".into())]),
            steps: (1..=4).map(step).collect(),
            evaluations: vec![Evaluation { step: 4, loss: Some(0.3), top1: 0.875 }],
            attention: Vec::new(),
            suites: BTreeMap::from([("cascade".into(), cascade)]),
            tables: BTreeMap::from([("cascade".into(), "alpha < 1".into())]),
        }
    }

    #[test]
    fn runs_are_compared_on_one_page() {
        let runs = [run("a<b", "0.1"), run("c", "0.2")];
        let sample = Sample {
            name: "x.png".into(),
            label: "cat".into(),
            top: vec![
                Scored { class: "dog".into(), probability: 0.9 },
                Scored { class: "cat".into(), probability: 0.1 },
            ],
            picture: "data:image/png;base64,AAAA".into(),
            small: false,
        };
        let html = page(&runs, &[vec![sample], Vec::new()]);
        for part in [
            "2 runs",
            "a&lt;b",
            "train.lr",
            "0.2",
            "87.50",
            "Cascade by confidence",
            "alpha &lt; 1",
            "Padding",
        ] {
            assert!(html.contains(part), "{part}");
        }
        assert!(!html.contains("train.seed"), "what the runs share is not shown");
        assert!(!html.contains("a<b"), "names are escaped");
        assert!(!html.contains("Gradient norm"), "no data, no panel");
        assert!(html.contains("card sample wrong"));
        assert!(!html.contains("href=") && !html.contains("src=\"http"), "nothing from elsewhere");
        for tag in ["div", "table", "svg", "details", "tr", "td"] {
            let open = html.matches(&format!("<{tag}")).count();
            assert_eq!(open, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn results_of_other_data_are_told() {
        let mut runs = [run("a", "0.1"), run("b", "0.1")];
        assert!(!page(&runs, &[Vec::new(), Vec::new()]).contains("The runs differ"));
        let single = |size: &str| json!([{"size": size}]);
        for (run, (data, size)) in runs.iter_mut().zip([("x<y", "9 tokens"), ("z", "16 tokens")]) {
            let suite = run.suites.get_mut("cascade").unwrap();
            (suite["data"], suite["single"]) = (json!(data), single(size));
            let few_shot = json!({"seeds": size.len(), "epochs": size.len(), "l2": [size.len()]});
            run.suites.insert("few-shot".into(), few_shot);
        }
        let html = page(&runs, &[Vec::new(), Vec::new()]);
        let few_shot = ["L2", "number of seeds", "number of epochs"].map(|what| (what, "few-shot"));
        for (what, suite) in [("data", "cascade"), ("sizes", "cascade")].into_iter().chain(few_shot) {
            assert!(html.contains(&format!("The runs differ in the {what} of {suite}: ")), "{what}");
        }
        assert!(html.contains("x&lt;y") && html.contains("16 tokens") && !html.contains("the crop of"));
    }

    #[test]
    fn a_single_run_without_anything_still_has_a_page() {
        let mut empty = run("a", "1");
        (empty.steps, empty.evaluations) = (Vec::new(), Vec::new());
        empty.suites.clear();
        empty.tables.clear();
        let html = page(&[empty], &[Vec::new()]);
        assert!(html.contains("<title>a - trencadis</title>") && !html.contains("What differs"));
        assert!(!html.contains("<svg") && !html.contains("Predictions"));
    }
}
