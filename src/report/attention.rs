//! Entropy and largest logits of attention by block: a panel of each for every run that has logged them.

use super::log::{Attention, RunLog};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};

/// A figure for each run that has logged attention.
pub fn figures(runs: &[RunLog]) -> Vec<Figure> {
    let logged = runs.iter().filter(|run| !run.attention.is_empty());
    // All runs on the same scales, so that they compare.
    let lines = || runs.iter().flat_map(|run| &run.attention);
    let right = lines().map(|line| line.step as f64).fold(0.0, f64::max);
    let entropies =
        lines().flat_map(|line| line.entropy.iter().flatten().copied().chain([line.uniform_entropy]));
    let entropy = Scale::around(entropies.chain([0.0]), (0.0, f64::INFINITY));
    let logits = || lines().flat_map(|line| line.max_logit.iter().flatten().copied());
    // Scores are positive in all but strange models.
    let logit = match logits().all(|logit| logit > 0.0) {
        true => Scale::log_around(logits()),
        false => Scale::around(logits(), (f64::NEG_INFINITY, f64::INFINITY)),
    };
    let figure = |run: &RunLog| {
        let panel = |title: &str, label: &str, scale: &Scale| {
            let x = Axis::new("step", Scale::linear(0.0, right));
            Panel::new(&format!("{title}: {}", run.name), x, Axis::new(label, scale.clone()))
        };
        let mut entropies = panel("Attention entropy", "nats, mean over heads", &entropy);
        let points = run.attention.iter().map(|line| (line.step as f64, line.uniform_entropy)).collect();
        entropies.marks.push(Mark::Line { points, colour: FAINT, dashed: true });
        let mut logits = panel("Largest attention logit", "scaled score", &logit);
        blocks(&mut entropies, &run.attention, |line| &line.entropy);
        blocks(&mut logits, &run.attention, |line| &line.max_logit);
        entropies.legend.push(("uniform attention".into(), FAINT));
        Figure { panels: vec![entropies, logits] }
    };
    logged.map(figure).collect()
}

/// A line for each block, or for as many as there are colours, from the first to the last.
fn blocks(panel: &mut Panel, lines: &[Attention], values: impl Fn(&Attention) -> &[Option<f64>]) {
    let depth = lines.iter().map(|line| values(line).len()).max().unwrap_or(0);
    let shown = depth.min(COLOURS.len());
    for (place, colour) in COLOURS.iter().copied().enumerate().take(shown) {
        let block = if shown == 1 { 0 } else { place * (depth - 1) / (shown - 1) };
        let point = |line: &Attention| Some((line.step as f64, (*values(line).get(block)?)?));
        panel.series(&format!("block {block}"), lines.iter().filter_map(point).collect(), colour);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(depth: usize) -> RunLog {
        let line = |step: u64| Attention {
            step,
            entropy: (0..depth).map(|block| Some(1.0 + block as f64)).collect(),
            max_logit: vec![None; depth],
            uniform_entropy: 4.0,
        };
        RunLog {
            name: "a".into(),
            recipe: Default::default(),
            steps: Vec::new(),
            evaluations: Vec::new(),
            attention: if depth == 0 { Vec::new() } else { vec![line(10), line(20)] },
            suites: Default::default(),
            tables: Default::default(),
        }
    }

    #[test]
    fn deep_models_show_some_blocks_and_others_none() {
        assert!(figures(&[run(0)]).is_empty());
        let names = |depth: usize| -> Vec<String> {
            let figures = figures(&[run(0), run(depth)]);
            figures[0].panels[0].legend.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(1), ["block 0", "uniform attention"]);
        let deep = names(48);
        assert_eq!((deep.len(), &deep[0][..], &deep[6][..]), (8, "block 0", "block 47"));
        // What was not finite has no point.
        let figures = figures(&[run(2)]);
        let drawn = |panel: usize| {
            let marks = figures[0].panels[panel].marks.iter();
            marks.filter(|mark| matches!(mark, Mark::Dots { points, .. } if !points.is_empty())).count()
        };
        assert_eq!((drawn(0), drawn(1)), (2, 0));
    }
}
