//! What the features tell of people's attributes, at the images' own shapes and squeezed into squares (as NaViT does):
//! a linear probe of each attribute, fitted on one half of the images and judged by the other.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, FAINT, Mark, Panel, Scale};
use crate::eval::metrics::paired::{mcnemar, wilcoxon};
use crate::eval::metrics::rank;
use crate::eval::suite::attributes::Attribute;
use crate::eval::suite::linear_probe::Probe;
use crate::eval::suite::{Options, Session, Setting, Suite, fitting_half, text};
use crate::recipe::AspectKind;

/// An attribute, and how often its value was told.
struct Told<'a> {
    attribute: &'a Attribute,
    /// At the native aspect and at the square one.
    accuracy: [f64; 2],
    learning_rate: [f64; 2],
    /// Images on which one alone is right.
    alone: [u64; 2],
    p: f64,
}

impl Told<'_> {
    fn difference(&self) -> f64 {
        self.accuracy[0] - self.accuracy[1]
    }
}

/// p over all attributes, each told `alone` so often at either aspect; every attribute is judged by the same images, so that
/// the counts differ as the shares do.
fn over_all(alone: impl Iterator<Item = [u64; 2]>) -> Option<f64> {
    wilcoxon(&alone.map(|[native, square]| native as i64 - square as i64).collect::<Vec<_>>())
}

/// Table, numbers and picture.
pub(super) fn run(
    session: &mut Session,
    options: &Options,
    attributes: &[Attribute],
) -> Result<(String, Value, Panel)> {
    let setting = options.setting(Suite::Fairness)?;
    let mut features = Vec::new();
    for aspect in [AspectKind::Native, AspectKind::Square] {
        // The same pixels at both.
        let setting = Setting { aspect: Some(aspect), crop: Some(0.0), ..setting };
        features.push(session.features(session.set.validation.clone(), setting)?);
    }
    if features[0].samples != features[1].samples {
        return Err(Error::failure(
            "some images could be read at one aspect and not at another; run it again",
        ));
    }
    let samples = features[0].samples.clone();
    let seed = session.recipe().train.seed;
    let half = fitting_half(seed, &samples);
    let rows = |fit: bool| (0..samples.len()).filter(|&row| half[row] == fit).collect::<Vec<_>>();
    let (fit, shown) = (rows(true), rows(false));
    let mut told = Vec::new();
    for attribute in attributes {
        if let [only] = attribute.values.as_slice() {
            return Err(Error::usage(format!(
                "--probe: {} is `{only}` of every image, so that there is nothing to tell; take the column out",
                attribute.name
            )));
        }
        let labels = |rows: &[usize]| -> Vec<usize> {
            rows.iter().map(|&row| attribute.group_of[samples[row]]).collect()
        };
        let (of_fit, of_shown, groups) = (labels(&fit), labels(&shown), attribute.values.len());
        let mut right = Vec::new();
        let mut learning_rate = [0.0; 2];
        for (features, lr) in features.iter().zip(&mut learning_rate) {
            let probe = Probe::fit(features, &fit, &of_fit, groups, seed, options, "--probe")?;
            *lr = probe.lr();
            let logits = probe.logits(features, &shown);
            let is_right = |(logits, label): (&[f32], &usize)| rank(logits, *label) == 0;
            right.push(logits.chunks_exact(groups).zip(&of_shown).map(is_right).collect::<Vec<bool>>());
        }
        let share = |right: &[bool]| right.iter().filter(|right| **right).count() as f64 / shown.len() as f64;
        let alone = |one: usize| {
            let pairs = right[one].iter().zip(&right[1 - one]);
            pairs.filter(|(one, other)| **one && !**other).count() as u64
        };
        let alone = [alone(0), alone(1)];
        told.push(Told {
            attribute,
            accuracy: [share(&right[0]), share(&right[1])],
            learning_rate,
            alone,
            p: mcnemar(alone[0], alone[1]),
        });
    }
    let over_all = over_all(told.iter().map(|told| told.alone));

    let mut table = format!(
        "\nlinear probes of the attributes, fitted on {} images and judged by {} others; {:.1} tokens an image at the native \
         aspect, {:.1} at the square\n\n",
        fit.len(),
        shown.len(),
        features[0].tokens,
        features[1].tokens
    );
    let downscaled = [features[0].downscaled, features[1].downscaled];
    if downscaled.iter().any(|images| *images > 0) {
        table += &format!(
            "downscaled {} images at the native aspect and {} at the square, which have no place in packing.tokens or the \
             position tables: the aspects do not have equal area\n\n",
            downscaled[0], downscaled[1]
        );
    }
    let lines: Vec<Vec<String>> = told
        .iter()
        .map(|told| {
            vec![
                told.attribute.name.clone(),
                text::percent(told.accuracy[0]),
                text::percent(told.accuracy[1]),
                format!("{:+.2}", 100.0 * told.difference()),
                told.alone[0].to_string(),
                told.alone[1].to_string(),
                p_value(told.p),
            ]
        })
        .collect();
    let header = [
        "attribute",
        "native %",
        "square %",
        "difference",
        "only native right",
        "only square right",
        "p, McNemar",
    ];
    table += &text::table(&header, &lines);
    table += &match over_all {
        Some(p) => {
            format!("all attributes    p {} by Wilcoxon's signed-rank test of the differences\n", p_value(p))
        }
        None => "all attributes    no difference\n".to_owned(),
    };
    let numbers = |told: &Told<'_>| {
        json!({
            "attribute": told.attribute.name, "native": told.accuracy[0], "square": told.accuracy[1],
            "difference": told.difference(), "native_alone": told.alone[0], "square_alone": told.alone[1],
            "mcnemar_p": told.p, "learning_rates": told.learning_rate,
        })
    };
    let json = json!({
        "fitted_on": fit.len(), "shown_on": shown.len(), "wilcoxon_p": over_all, "downscaled": downscaled,
        "attributes": told.iter().map(numbers).collect::<Vec<_>>(),
    });
    Ok((table, json, panel(&told)))
}

fn p_value(p: f64) -> String {
    if p < 1e-4 { format!("{p:.1e}") } else { format!("{p:.4}") }
}

/// A row an attribute, a dot an aspect.
fn panel(told: &[Told<'_>]) -> Panel {
    let percent = |told: &Told<'_>| told.accuracy.map(|share| 100.0 * share);
    let names = told.iter().map(|told| told.attribute.name.clone()).collect();
    let mut panel = Panel::new(
        "Attributes told by linear probes",
        Axis::new("accuracy (%)", Scale::around(told.iter().flat_map(percent), (0.0, 100.0))),
        Axis::new("", Scale::Names(names)),
    );
    for (row, told) in told.iter().enumerate() {
        let points = percent(told).map(|x| (x, row as f64)).to_vec();
        panel.marks.push(Mark::Line { points, colour: FAINT, dashed: false });
    }
    for (aspect, (name, colour)) in
        [("native aspect", COLOURS[0]), ("square", COLOURS[1])].into_iter().enumerate()
    {
        let points = told.iter().enumerate().map(|(row, told)| (percent(told)[aspect], row as f64)).collect();
        panel.marks.push(Mark::Dots { points, colour });
        panel.legend.push((name.into(), colour));
    }
    panel
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_differences_share_their_rank() {
        // Of ten images: 4 and 3 right, 2 and 3, 9 and 7. The first two differ by as much, and in f64 do not.
        assert_ne!(4.0 / 10.0 - 3.0 / 10.0, 3.0 / 10.0 - 2.0 / 10.0);
        let p = over_all([[4, 3], [2, 3], [9, 7]].into_iter()).unwrap();
        // Ranks 1.5, 1.5 and 3: sums 0 (1) and 1.5 (2) of 8.
        assert!((p - 2.0 * 3.0 / 8.0).abs() < 1e-12, "{p}");
    }
}
