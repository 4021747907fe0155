//! Sets with other classes than the model's: subsets (ImageNet-A, -R), classes that mean several of the model's
//! (ObjectNet), several right answers an image (ReaL), or simply other images (V2, Sketch).

use std::collections::BTreeMap;

use serde_json::json;

use super::label_map::{LabelMap, Resolved, check};
use super::names::{ImageNames, base_name};
use super::{Options, Outcome, Session, Suite, preamble, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};
use crate::eval::metrics::calibration::{BUCKETS, ReliabilityDiagram};
use crate::eval::metrics::probability::decision;
use crate::eval::metrics::rank;
use crate::recipe::shapes::nearest;

/// Classes that are named as the hardest.
const HARDEST: usize = 5;
/// Classes whose bars have names.
const NAMED: usize = 40;

/// Classes of the model that are right for each image of the set; none for one that is left out.
type Truth = Vec<Option<Vec<usize>>>;

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    let setting = options.setting(Suite::Ood)?;
    let truth = truth(session, options)?;
    let mut compared: Vec<usize> = truth.iter().flatten().flatten().copied().collect();
    compared.sort_unstable();
    compared.dedup();
    if !options.restrict {
        compared = (0..session.trained.classes.len()).collect();
    }
    let scores = session.scores(setting)?;
    let loss = session.loss();
    let (mut top1, mut top5, mut images, mut left_out) = (0u64, 0u64, 0u64, 0u64);
    let mut predictions = Vec::new();
    let mut by_class: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
    for (row, &sample) in scores.samples.iter().enumerate() {
        let Some(right) = &truth[sample] else {
            left_out += 1;
            continue;
        };
        let logits: Vec<f32> = compared.iter().map(|&class| scores.row(row)[class]).collect();
        // Every right class stands among those that are compared.
        let places = right.iter().filter_map(|class| compared.binary_search(class).ok());
        let best = places.map(|place| rank(&logits, place)).min().unwrap_or(logits.len());
        let (_, confidence) = decision(&logits, loss, 1.0);
        predictions.push((confidence, best == 0));
        images += 1;
        top1 += u64::from(best == 0);
        top5 += u64::from(best < 5);
        let (right, all) = by_class.entry(session.images.label(sample)).or_default();
        *right += u64::from(best == 0);
        *all += 1;
    }
    if images == 0 {
        return Err(Error::usage(
            "--suite ood: the tables leave out every image of the set; nothing is left to evaluate",
        ));
    }
    let share = |count: u64| count as f64 / images as f64;
    let ece = ReliabilityDiagram::new(predictions, BUCKETS).ece;
    let mut classes: Vec<(f64, u64, String)> = by_class
        .into_iter()
        .map(|(class, (right, all))| (right as f64 / all as f64, all, session.set.classes[class].clone()))
        .collect();
    classes.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.2.cmp(&b.2)));
    let balanced = classes.iter().map(|class| class.0).sum::<f64>() / classes.len() as f64;

    let mut table = preamble(session, &scores, setting.size);
    if left_out > 0 {
        table += &format!("left out          {left_out} images that the table gives no class of the model\n");
    }
    table += &format!(
        "compared          {} of the model's {} classes; {} classes of the set\n\n",
        compared.len(),
        session.trained.classes.len(),
        classes.len()
    );
    let cells = vec![
        images.to_string(),
        text::percent(share(top1)),
        text::percent(share(top5)),
        text::percent(balanced),
        text::percent(ece),
    ];
    table += &text::table(&["images", "top-1 %", "top-5 %", "mean of classes %", "ECE %"], &[cells]);
    let hardest: Vec<String> =
        classes.iter().take(HARDEST).map(|(top1, _, name)| format!("{name} {:.0} %", 100.0 * top1)).collect();
    table += &format!("\nhardest classes   {}\n", hardest.join(", "));

    let mut json = session.header();
    json["suite"] = json!("ood");
    json["size"] = json!(setting.size.to_string());
    json["images"] = json!(images);
    json["left_out"] = json!(left_out);
    json["unreadable"] = json!(scores.unreadable);
    json["compared_classes"] = json!(compared.len());
    json["top1"] = json!(share(top1));
    json["top5"] = json!(share(top5));
    json["balanced"] = json!(balanced);
    json["ece"] = json!(ece);
    let of_class =
        |(top1, images, name): &(f64, u64, String)| json!({ "class": name, "images": images, "top1": top1 });
    json["classes"] = json!(classes.iter().map(of_class).collect::<Vec<_>>());
    Ok(Outcome { json, table, figure: figure(&classes, share(top1)), files: Vec::new() })
}

fn figure(classes: &[(f64, u64, String)], top1: f64) -> Figure {
    let count = classes.len();
    let x = if count <= NAMED {
        Axis::new("", Scale::Names(classes.iter().map(|class| class.2.clone()).collect()))
    } else {
        Axis::new("classes of the set, the hardest first", Scale::linear(-0.5, count as f64 - 0.5))
    };
    let mut panel = Panel::new("Accuracy by class", x, Axis::new("top-1 (%)", Scale::linear(0.0, 100.0)));
    for (index, (accuracy, _, _)) in classes.iter().enumerate() {
        let at = index as f64;
        let (from, to) = ((at - 0.4, 0.0), (at + 0.4, 100.0 * accuracy));
        panel.marks.push(Mark::Bar { from, to, colour: COLOURS[0], opacity: 0.8 });
    }
    let ends = [-0.5, count as f64 - 0.5].map(|x| (x, 100.0 * top1));
    panel.marks.push(Mark::Line { points: ends.to_vec(), colour: FAINT, dashed: true });
    panel.legend.push((format!("all images: {} %", text::percent(top1)), FAINT));
    Figure { panels: vec![panel] }
}

fn truth(session: &Session, options: &Options) -> Result<Truth> {
    let (set, classes) = (&session.set, &session.trained.classes);
    let of_class = |lists: &dyn Fn(usize) -> Option<Vec<usize>>| {
        (0..session.images.len()).map(|sample| lists(session.images.label(sample))).collect()
    };
    match (&options.label_map, &options.image_labels) {
        (Some(_), Some(_)) => Err(Error::usage(
            "--label-map and --image-labels both say which classes are right; give one of them",
        )),
        (None, None) => {
            let numbers: BTreeMap<&str, usize> =
                classes.iter().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
            let used: std::collections::BTreeSet<usize> =
                (0..session.images.len()).map(|sample| session.images.label(sample)).collect();
            if let Some(&class) =
                used.iter().find(|class| !numbers.contains_key(set.classes[**class].as_str()))
            {
                let name = &set.classes[class];
                let near = nearest(name, classes.iter().map(String::as_str))
                    .map_or(String::new(), |near| format!(" (the nearest is `{near}`)"));
                return Err(Error::usage(format!(
                    "the set's class `{name}` is none of the model's{near}; say what its classes mean with --label-map FILE"
                )));
            }
            Ok(of_class(&|class| numbers.get(set.classes[class].as_str()).map(|number| vec![*number])))
        }
        (Some(path), None) => {
            let map = LabelMap::read(path)?;
            let Resolved::Named(named) = map.resolve(classes)? else {
                return Err(Error::file(
                    path,
                    "is a list; --label-map expects an object from classes of the set to classes of the model",
                ));
            };
            let known = || set.classes.iter().map(String::as_str);
            let unknown: Vec<String> =
                named.keys().filter(|name| !known().any(|class| class == *name)).cloned().collect();
            check(path, &unknown, "the set", known())?;
            let right =
                |class: usize| named.get(&set.classes[class]).filter(|right| !right.is_empty()).cloned();
            Ok(of_class(&right))
        }
        (None, Some(path)) => {
            let mut truth: Truth = vec![None; session.images.len()];
            let given = |right: Vec<usize>| (!right.is_empty()).then_some(right);
            match LabelMap::read(path)?.resolve(classes)? {
                Resolved::Named(named) => {
                    let images = ImageNames::new(session.images.as_ref());
                    let mut seen = vec![false; truth.len()];
                    for (name, right) in named {
                        let image = images.find(path, &name)?;
                        if std::mem::replace(&mut seen[image], true) {
                            return Err(Error::file(
                                path,
                                format!("image `{}` is named twice, once as `{name}`", images.name(image)),
                            ));
                        }
                        truth[image] = given(right);
                    }
                    images.require_all(path, "labels", &seen)?;
                }
                Resolved::Ordered(lists) if lists.len() != truth.len() => {
                    return Err(Error::file(
                        path,
                        format!(
                            "has {} lists, and the set {} images; expected one each",
                            lists.len(),
                            truth.len()
                        ),
                    ));
                }
                Resolved::Ordered(lists) => {
                    let names: Vec<String> =
                        (0..truth.len()).map(|sample| session.images.name(sample)).collect();
                    let mut order: Vec<usize> = (0..truth.len()).collect();
                    order.sort_by_key(|sample| in_order(base_name(&names[*sample])));
                    for (sample, right) in order.into_iter().zip(lists) {
                        truth[sample] = given(right);
                    }
                }
            }
            Ok(truth)
        }
    }
}

/// What the order of the names goes by: the text, and by number the rows of a file, `t10k-images image 12`.
fn in_order(name: &str) -> (&str, Option<u64>) {
    let row = name.rsplit_once(" image ").and_then(|(file, row)| Some((file, row.parse().ok()?)));
    row.map_or((name, None), |(file, row)| (file, Some(row)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order_by_number() {
        let mut names =
            ["b image 10", "b image 9", "a image 11", "ILSVRC2012_val_00000002.JPEG", "an image 1.png"];
        names.sort_by_key(|name| in_order(name));
        assert_eq!(
            names,
            ["ILSVRC2012_val_00000002.JPEG", "a image 11", "an image 1.png", "b image 9", "b image 10"]
        );
    }
}
