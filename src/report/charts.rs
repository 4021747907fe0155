//! The curves of a page: one panel a quantity, one colour a run.

use serde_json::Value;

use super::log::{RunLog, Total};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};

/// Points that a line has at most; more are averaged in groups.
const POINTS: usize = 300;

/// Share of the images below which a bucket of confidence says nothing.
const FEW: f64 = 0.01;

/// Points (x, y) of a run.
type Points = Vec<(f64, f64)>;

/// The colour of run `index`.
pub fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// A unit for the FLOPs of all runs, and how many FLOPs it is.
pub fn compute_unit(runs: &[RunLog]) -> (&'static str, f64) {
    let most = runs.iter().filter_map(|run| run.totals().last().map(|total| total.1)).fold(0.0, f64::max);
    let units = [("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15)];
    units.into_iter().find(|(_, flops)| most >= *flops).unwrap_or(("TFLOP", 1e12))
}

/// What the runs have logged, step by step.
pub fn training(runs: &[RunLog]) -> Vec<Figure> {
    let of_steps = |value: fn(&super::log::Step) -> Option<f64>| -> Vec<Points> {
        let points = |run: &RunLog| {
            run.steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect::<Points>()
        };
        runs.iter().map(|run| thinned(points(run))).collect()
    };
    let (unit, scale) = compute_unit(runs);
    let accuracy = |x: &dyn Fn((f64, f64, f64)) -> f64| -> Vec<Points> {
        runs.iter()
            .map(|run| {
                let totals = run.totals();
                let point =
                    |e: &super::log::Evaluation| Some((x(total_at(run, &totals, e.step)?), 100.0 * e.top1));
                run.evaluations.iter().filter_map(point).collect()
            })
            .collect()
    };
    let by_step = |value: fn(&super::log::Evaluation) -> Option<f64>| -> Vec<Points> {
        let points = |run: &RunLog| {
            run.evaluations.iter().filter_map(|e| Some((e.step as f64, value(e)?))).collect::<Points>()
        };
        runs.iter().map(points).collect()
    };
    [
        panel("Training loss", "step", "loss", of_steps(|s| s.loss), Kind::Positive, false),
        panel("Validation loss", "step", "loss", by_step(|e| e.loss), Kind::Positive, true),
        panel(
            "Validation accuracy",
            "step",
            "top-1 (%)",
            by_step(|e| Some(100.0 * e.top1)),
            Kind::Percent,
            true,
        ),
        panel("Accuracy against compute", unit, "top-1 (%)", accuracy(&|t| t.1 / scale), Kind::Percent, true),
        panel("Accuracy against images seen", "images", "top-1 (%)", accuracy(&|t| t.0), Kind::Percent, true),
        panel(
            "Accuracy against time",
            "seconds of training",
            "top-1 (%)",
            accuracy(&|t| t.2),
            Kind::Percent,
            true,
        ),
        panel("Learning rate", "step", "learning rate", of_steps(|s| s.learning_rate), Kind::Positive, false),
        panel(
            "Gradient norm before clipping",
            "step",
            "norm",
            of_steps(|s| s.grad_norm),
            Kind::Logarithmic,
            false,
        ),
        panel(
            "Throughput",
            "step",
            "tokens a second",
            of_steps(|s| (s.seconds > 0.0).then(|| s.tokens as f64 / s.seconds)),
            Kind::Positive,
            false,
        ),
        panel(
            "Padding",
            "step",
            "share of token rows (%)",
            of_steps(|s| (s.token_rows > 0).then(|| 100.0 * (1.0 - s.tokens as f64 / s.token_rows as f64))),
            Kind::Percent,
            false,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The totals of a run after `step` steps: between two lines in proportion, beyond the last one those of the last.
fn total_at(run: &RunLog, totals: &[Total], step: u64) -> Option<Total> {
    let line = run.steps.partition_point(|line| line.step < step);
    let Some(after) = totals.get(line) else { return totals.last().copied() };
    let (first, before) =
        line.checked_sub(1).map_or((0, Total::default()), |i| (run.steps[i].step, totals[i]));
    let share = (step - first) as f64 / (run.steps[line].step - first).max(1) as f64;
    let between = |from: f64, to: f64| from + share * (to - from);
    Some((between(before.0, after.0), between(before.1, after.1), between(before.2, after.2)))
}

/// What the suites `resolution`, `calibration`, `cascade` and `few-shot` have found.
pub fn evaluations(runs: &[RunLog]) -> Vec<Figure> {
    let resized = |x: &str, y: &str, factor: f64| -> Vec<Points> {
        let points = |run: &RunLog| {
            let found = run.suites.get("resolution").and_then(|suite| suite["resized"].as_array());
            let point = |p: &Value| Some((p[x].as_f64()?, factor * p[y].as_f64()?));
            found.map_or_else(Vec::new, |found| found.iter().filter_map(point).collect())
        };
        runs.iter().map(points).collect()
    };
    let reliability: Vec<Points> = runs
        .iter()
        .map(|run| {
            let suite = run.suites.get("calibration");
            let buckets = suite.and_then(|suite| suite["all"]["reliability"]["buckets"].as_array());
            let images = |b: &Value| b["images"].as_f64().unwrap_or(0.0);
            let point = |b: &Value| Some((b["confidence"].as_f64()?, b["accuracy"].as_f64()?));
            buckets.map_or_else(Vec::new, |buckets| {
                let least = FEW * buckets.iter().map(images).sum::<f64>();
                buckets.iter().filter(|b| images(b) >= least).filter_map(point).collect()
            })
        })
        .collect();
    let cascade: Vec<Points> = runs
        .iter()
        .map(|run| {
            let suite = run.suites.get("cascade");
            // The cheapest pair of sizes, of which there may be several.
            let points = suite.and_then(|suite| suite["cascades"][0]["points"].as_array());
            let point = |p: &Value| Some((p["gflop_per_image"].as_f64()?, 100.0 * p["top1"].as_f64()?));
            points.map_or_else(Vec::new, |points| points.iter().filter_map(point).collect())
        })
        .collect();
    let few_shot: Vec<Points> = runs
        .iter()
        .map(|run| {
            let suite = run.suites.get("few-shot");
            let points = suite.and_then(|suite| suite["few_shot"].as_array());
            let point = |p: &Value| Some((p["shots"].as_f64()?, 100.0 * p["by_l2"][0]["top1"].as_f64()?));
            points.map_or_else(Vec::new, |points| points.iter().filter_map(point).collect())
        })
        .collect();
    let few_shot_title = few_shot_title(runs);
    let mut figures: Vec<Figure> = [
        panel(
            "Accuracy by tokens",
            "tokens an image",
            "top-1 (%)",
            resized("tokens_per_image", "top1", 100.0),
            Kind::Percent,
            true,
        ),
        panel(
            "Accuracy against cost",
            "GFLOP an image",
            "top-1 (%)",
            resized("gflop_per_image", "top1", 100.0),
            Kind::Percent,
            true,
        ),
        panel(
            "Calibration error by tokens",
            "tokens an image",
            "ECE (%)",
            resized("tokens_per_image", "ece", 100.0),
            Kind::Percent,
            true,
        ),
        panel("Cascade by confidence", "GFLOP an image", "top-1 (%)", cascade, Kind::Percent, true),
        panel(&few_shot_title, "training images of a class", "top-1 (%)", few_shot, Kind::Percent, true),
    ]
    .into_iter()
    .flatten()
    .collect();
    figures.extend(diagram(reliability));
    figures
}

/// Names the regularisation that is shown, the first that was given, where it is the same of all runs.
fn few_shot_title(runs: &[RunLog]) -> String {
    let mut shown = runs.iter().filter_map(|run| run.suites.get("few-shot")?["l2"][0].as_f64());
    match shown.next() {
        Some(first) if shown.all(|l2| l2 == first) => format!("Few-shot regression, L2 {first}"),
        _ => "Few-shot regression, the first L2 of each run".into(),
    }
}

/// Accuracy by confidence, and the diagonal on which they are equal.
fn diagram(runs: Vec<Points>) -> Option<Figure> {
    let axis = |label: &str| Axis::new(label, Scale::linear(0.0, 1.0));
    let mut panel = Panel::new("Reliability", axis("confidence"), axis("accuracy"));
    panel.marks.push(Mark::Line { points: vec![(0.0, 0.0), (1.0, 1.0)], colour: FAINT, dashed: true });
    draw(&mut panel, runs, true)
}

/// What values of a quantity look like.
#[derive(Clone, Copy)]
enum Kind {
    /// From 0 to 100.
    Percent,
    /// Not below 0.
    Positive,
    /// Above 0, over several powers of ten.
    Logarithmic,
}

/// None where no run has a point.
fn panel(title: &str, x: &str, y: &str, runs: Vec<Points>, kind: Kind, dots: bool) -> Option<Figure> {
    let runs: Vec<Points> = match kind {
        Kind::Logarithmic => {
            runs.into_iter().map(|points| points.into_iter().filter(|p| p.1 > 0.0).collect()).collect()
        }
        _ => runs,
    };
    let all = || runs.iter().flatten();
    let right = all().map(|p| p.0).fold(0.0, f64::max);
    let scale = match kind {
        Kind::Percent => Scale::around(all().map(|p| p.1), (0.0, 100.0)),
        Kind::Positive => Scale::around(all().map(|p| p.1), (0.0, f64::INFINITY)),
        Kind::Logarithmic => Scale::log_around(all().map(|p| p.1)),
    };
    let mut panel = Panel::new(title, Axis::new(x, Scale::linear(0.0, right)), Axis::new(y, scale));
    draw(&mut panel, runs, dots)
}

fn draw(panel: &mut Panel, runs: Vec<Points>, dots: bool) -> Option<Figure> {
    if runs.iter().all(Vec::is_empty) {
        return None;
    }
    for (index, points) in runs.into_iter().enumerate() {
        let colour = colour(index);
        // A line of one point is not seen.
        if dots || points.len() == 1 {
            panel.marks.push(Mark::Dots { points: points.clone(), colour });
        }
        panel.marks.push(Mark::Line { points, colour, dashed: false });
    }
    Some(Figure { panels: vec![panel.clone()] })
}

/// The means of so many points in a row that at most [`POINTS`] are left.
fn thinned(points: Points) -> Points {
    let group = points.len().div_ceil(POINTS).max(1);
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        let sum = points.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(group).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::log::Step;

    #[test]
    fn a_single_point_has_a_dot() {
        let dots = |points: Points| {
            let drawn = panel("", "", "", vec![points], Kind::Positive, false).unwrap();
            drawn.panels[0].marks.iter().filter(|mark| matches!(mark, Mark::Dots { .. })).count()
        };
        assert_eq!((dots(vec![(1.0, 2.0)]), dots(vec![(1.0, 2.0), (2.0, 2.0)])), (1, 0));
    }

    #[test]
    fn long_lines_are_averaged() {
        let points: Points = (0..1000).map(|i| (f64::from(i), f64::from(2 * i))).collect();
        let thin = thinned(points.clone());
        assert_eq!(thin.len(), 250);
        assert_eq!(thin[0], (1.5, 3.0));
        assert_eq!(thinned(points[..300].to_vec()), points[..300]);
        assert_eq!(thinned(Vec::new()), []);
    }

    #[test]
    fn losses_are_told_apart() {
        let drawn = panel("", "", "", vec![vec![(1.0, 2.3), (2.0, 0.4)]], Kind::Positive, false).unwrap();
        let height = |loss: f64| drawn.panels[0].y.scale.place(loss);
        assert!(height(2.3) > 0.85 && height(0.4) < 0.15, "{} {}", height(2.3), height(0.4));
    }

    #[test]
    fn totals_lie_between_the_lines() {
        let step = |step: u64, images: u64| Step {
            step,
            loss: None,
            accuracy: None,
            learning_rate: None,
            grad_norm: None,
            images,
            tokens: 0,
            token_rows: 0,
            flop: 2.0,
            seconds: 0.5,
        };
        let run = RunLog {
            name: String::new(),
            recipe: Default::default(),
            steps: vec![step(10, 3), step(30, 5)],
            evaluations: Vec::new(),
            attention: Vec::new(),
            suites: Default::default(),
            tables: Default::default(),
        };
        let at = |step: u64| total_at(&run, &run.totals(), step).unwrap();
        assert_eq!(at(0), (0.0, 0.0, 0.0));
        assert_eq!(at(5), (15.0, 10.0, 2.5));
        assert_eq!(at(10), (30.0, 20.0, 5.0));
        assert_eq!(at(15), (55.0, 30.0, 7.5));
        assert_eq!((at(30), at(31)), ((130.0, 60.0, 15.0), (130.0, 60.0, 15.0)));
        assert_eq!(total_at(&run, &[], 3), None);
    }

    #[test]
    fn no_points_no_panel() {
        assert!(panel("", "", "", vec![vec![], vec![]], Kind::Positive, true).is_none());
        let drawn = panel("t", "x", "y", vec![vec![], vec![(1.0, 2.0), (2.0, 0.0)]], Kind::Logarithmic, true)
            .unwrap();
        let marks = &drawn.panels[0].marks;
        assert!(marks.iter().any(
            |mark| matches!(mark, Mark::Dots { points, colour } if points.len() == 1 && *colour == COLOURS[1])
        ));
    }
}
