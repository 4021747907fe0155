//! Accuracy by the crop ratio of the evaluation, `eval.crop`, at each size: what is chosen after fine-tuning (DeiT III).

use serde_json::json;

use super::resolution::{Point, point};
use super::{Options, Outcome, Session, Setting, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, Figure, Panel, Scale};
use crate::recipe::AspectKind;

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    if session.is_cropped() {
        return Err(Error::usage(
            "--suite crop tries crop ratios of its own, --ratios, in place of eval.crop; leave --crop and --crop-square out",
        ));
    }
    if session.recipe().resolution.aspect != AspectKind::Square {
        return Err(Error::usage(
            "--suite crop cuts squares, and the model sees whole images of any shape (resolution.aspect = \"native\"); to \
             look at a part of these use --crop, or give --set resolution.aspect=square",
        ));
    }
    let labels = session.labels()?;
    let settings = options.settings();
    let mut ratios = options.ratios.clone();
    ratios.sort_by(f64::total_cmp);
    ratios.dedup();
    // [sizes][ratios]
    let mut found: Vec<Vec<Point>> = Vec::new();
    let (mut images, mut unreadable) = (0, 0);
    for &setting in &settings {
        let mut of_size = Vec::new();
        for &ratio in &ratios {
            let setting = Setting { crop: Some(ratio), ..setting };
            let scores = session.scores(setting)?;
            (images, unreadable) = (scores.images(), scores.unreadable);
            of_size.push(point(session, setting, &scores, &labels));
        }
        found.push(of_size);
    }
    let tried: Vec<(&Point, f64)> =
        found.iter().flat_map(|of_size| of_size.iter().zip(ratios.iter().copied())).collect();
    let accuracies: Vec<(f64, f64)> = tried.iter().map(|(point, ratio)| (point.top1, *ratio)).collect();
    let best = best(&accuracies, session.recipe().eval.crop).map(|index| tried[index]);

    let mut table = format!(
        "model             {}\ndata              {}\nimages            {images}\n{}",
        session.trained.path.display(),
        session.described(),
        text::unreadable(unreadable)
    );
    table += &format!("recipe            eval.crop = {}\n", session.recipe().eval.crop);
    if let Some((point, ratio)) = best {
        table += &format!(
            "best              {} % at ratio {ratio}, {}; chosen by these very images\n\n",
            text::percent(point.top1),
            point.setting.size
        );
    }
    let names: Vec<String> = settings.iter().map(|setting| format!("{}: top-1 %", setting.size)).collect();
    let header: Vec<&str> = ["crop ratio"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let lines: Vec<Vec<String>> = ratios
        .iter()
        .enumerate()
        .map(|(row, ratio)| {
            let name = if *ratio == 0.0 { "0, whole".to_owned() } else { ratio.to_string() };
            [name].into_iter().chain(found.iter().map(|of_size| text::percent(of_size[row].top1))).collect()
        })
        .collect();
    table += &text::table(&header, &lines);
    for (of_size, setting) in found.iter().zip(&settings) {
        // At the ratio at which the most are.
        let most = of_size.iter().map(|point| point.downscaled).max().unwrap_or(0);
        if most > 0 {
            table += &format!(
                "downscaled        {most} at {}: they have no place in packing.tokens or the position tables\n",
                setting.size
            );
        }
    }

    let values = found.iter().flatten().map(|point| 100.0 * point.top1);
    let y = Axis::new("top-1 (%)", Scale::around(values, (0.0, 100.0)));
    let x = Axis::new("crop ratio", Scale::around(ratios.iter().copied(), (0.0, 1.0)));
    let mut panel = Panel::new("Evaluation crop", x, y);
    for (index, (of_size, setting)) in found.iter().zip(&settings).enumerate() {
        let points = ratios.iter().zip(of_size).map(|(ratio, point)| (*ratio, 100.0 * point.top1)).collect();
        panel.series(&setting.size.to_string(), points, COLOURS[index % COLOURS.len()]);
    }

    let numbers = |(point, ratio): &(&Point, f64)| {
        json!({
            "size": point.setting.size.to_string(), "ratio": ratio, "top1": point.top1, "top5": point.top5,
            "loss": point.loss, "ece": point.ece, "tokens_per_image": point.tokens, "downscaled": point.downscaled,
        })
    };
    let points: Vec<_> = tried.iter().map(numbers).collect();
    let mut json = session.header();
    json["suite"] = json!("crop");
    json["images"] = json!(images);
    json["unreadable"] = json!(unreadable);
    json["best"] = best.map_or(json!(null), numbers_of_best);
    json["crops"] = json!(points);
    Ok(Outcome { json, table, figure: Figure { panels: vec![panel] }, files: Vec::new() })
}

/// The most accurate of (top-1, ratio): of equal ones the first with the `recipe`'s ratio, else the first.
fn best(tried: &[(f64, f64)], recipe: f64) -> Option<usize> {
    let better = |a: usize, b: usize| {
        let ((a, a_ratio), (b, b_ratio)) = (tried[a], tried[b]);
        a > b || a == b && a_ratio == recipe && b_ratio != recipe
    };
    (0..tried.len()).reduce(|best, next| if better(next, best) { next } else { best })
}

fn numbers_of_best((point, ratio): (&Point, f64)) -> serde_json::Value {
    json!({ "size": point.setting.size.to_string(), "ratio": ratio, "top1": point.top1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_ratios_the_recipes_is_best() {
        let tried = [(0.5, 0.0), (0.7, 0.75), (0.7, 0.875), (0.7, 1.0), (0.7, 0.875)];
        assert_eq!([best(&tried, 0.875), best(&tried, 0.9), best(&tried, 0.0)], [Some(2), Some(1), Some(1)]);
        assert_eq!(best(&[], 0.5), None);
    }
}
