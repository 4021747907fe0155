//! Accuracy and decisions by group. With --positive a decision between yes and no is looked at: its demographic-parity gap
//! as it is, and with thresholds by group that are fitted on one half of the images and shown on the other. With
//! --probe linear probes tell the attributes from the features.

mod probe;

use serde_json::{Value, json};

use super::attributes::{self, Attribute};
use super::{Options, Outcome, Session, Suite, fitting_half, preamble, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};
use crate::eval::metrics::parity::{Share, Thresholds, gap, shares};
use crate::eval::metrics::probability::{decision, probabilities};
use crate::recipe::shapes::nearest;

/// What the model says of the images that can be read.
struct Answers {
    /// Index in the set.
    samples: Vec<usize>,
    decisions: Vec<usize>,
    correct: Vec<bool>,
}

/// The decision whether an image is of one class.
struct Decision {
    class: usize,
    /// Probability of the class.
    scores: Vec<f64>,
    /// Whether it is of the class.
    truth: Vec<bool>,
    /// Whether its threshold is fitted on it.
    fit: Vec<bool>,
}

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    let setting = options.setting(Suite::Fairness)?;
    let Some(path) = &options.attributes else {
        return Err(Error::usage(
            "--suite fairness needs the groups of the images; give a table `image,attribute,...` with --attributes CSV",
        ));
    };
    let attributes = attributes::read(path, session.images.as_ref())?;
    let mut json = session.header();
    json["suite"] = json!("fairness");
    json["size"] = json!(setting.size.to_string());
    json["positive"] = json!(options.positive);
    let mut out = Outcome { json, table: String::new(), figure: Figure::default(), files: Vec::new() };
    // What the features tell asks for no class.
    match session.labels() {
        Err(cause) if options.probe && options.positive.is_none() => {
            out.table += &format!(
                "model             {}\ndata              {}\ndecisions         left out: {cause}\n",
                session.trained.path.display(),
                session.described()
            );
        }
        labels => decisions(session, options, &labels?, &attributes, &mut out)?,
    }
    if options.probe {
        let (text, numbers, panel) = probe::run(session, options, &attributes)?;
        out.table += &text;
        out.json["probe"] = numbers;
        out.figure.panels.push(panel);
    }
    Ok(out)
}

/// Adds what the model decides, by group.
fn decisions(
    session: &mut Session,
    options: &Options,
    labels: &[usize],
    attributes: &[Attribute],
    out: &mut Outcome,
) -> Result<()> {
    let setting = options.setting(Suite::Fairness)?;
    let positive = options.positive.as_deref().map(|name| class(session, name)).transpose()?;
    let scores = session.scores(setting)?;
    let loss = session.loss();
    let decisions: Vec<usize> =
        (0..scores.images()).map(|row| decision(scores.row(row), loss, 1.0).0).collect();
    let truth: Vec<usize> = scores.samples.iter().map(|&sample| labels[sample]).collect();
    let correct = decisions.iter().zip(&truth).map(|(a, b)| a == b).collect();
    let answers = Answers { samples: scores.samples.clone(), decisions, correct };
    let positive = positive.map(|class| Decision {
        class,
        scores: (0..scores.images()).map(|row| probabilities(scores.row(row), loss)[class]).collect(),
        truth: truth.iter().map(|label| *label == class).collect(),
        fit: fitting_half(session.recipe().train.seed, &scores.samples),
    });

    out.table += &preamble(session, &scores, setting.size);
    let mut of_attributes = Vec::new();
    for attribute in attributes {
        let (text, json, drawn) = of_attribute(session, attribute, &answers, positive.as_ref())?;
        out.table += &text;
        of_attributes.push(json);
        out.figure.panels.extend(drawn);
    }
    out.json["images"] = json!(scores.images());
    out.json["unreadable"] = json!(scores.unreadable);
    out.json["attributes"] = json!(of_attributes);
    Ok(())
}

fn class(session: &Session, name: &str) -> Result<usize> {
    let classes = &session.trained.classes;
    classes.iter().position(|class| class == name).ok_or_else(|| {
        let near = nearest(name, classes.iter().map(String::as_str))
            .map_or(String::new(), |near| format!(", did you mean `{near}`?"));
        Error::usage(format!("--positive {name}: the model has no class of this name{near}"))
    })
}

fn of_attribute(
    session: &Session,
    attribute: &Attribute,
    answers: &Answers,
    positive: Option<&Decision>,
) -> Result<(String, Value, Vec<Panel>)> {
    let classes = &session.trained.classes;
    let groups = attribute.values.len();
    let group_of: Vec<usize> = answers.samples.iter().map(|&sample| attribute.group_of[sample]).collect();
    let accuracy = shares(groups, &group_of, |row| answers.correct[row]);
    let decided = |class: usize| shares(groups, &group_of, |row| answers.decisions[row] == class);
    // Of equal gaps the first class.
    let (worst, parity) = (0..classes.len())
        .map(|class| (class, gap(&decided(class))))
        .fold((0, -1.0), |most, next| if next.1 > most.1 { next } else { most });
    let shown = positive.map_or(worst, |positive| positive.class);
    let decided = decided(shown);

    let cell = |share: &Share| share.share().map_or("-".into(), text::percent);
    let lines: Vec<_> = (0..groups)
        .map(|g| {
            let images = accuracy[g].images.to_string();
            vec![attribute.values[g].clone(), images, cell(&accuracy[g]), cell(&decided[g])]
        })
        .collect();
    let taken_for = format!("taken for {} %", classes[shown]);
    let mut table = format!("\n{}", text::table(&[&attribute.name, "images", "top-1 %", &taken_for], &lines));
    table += &format!("accuracy gap      {} points\n", text::percent(gap(&accuracy)));
    table += &format!(
        "parity gap        {} points, the largest over the classes: {}\n",
        text::percent(parity),
        classes[worst]
    );
    let rates = |shares: &[Share]| shares.iter().map(Share::share).collect::<Vec<_>>();
    let mut json = json!({
        "attribute": attribute.name, "groups": attribute.values,
        "images": accuracy.iter().map(|share| share.images).collect::<Vec<_>>(),
        "accuracy": rates(&accuracy), "accuracy_gap": gap(&accuracy),
        "parity_gap": parity, "parity_gap_class": classes[worst],
    });
    let mut panels = vec![dots(
        attribute,
        &format!("Accuracy by {}", attribute.name),
        "top-1 (%)",
        &[("of a group", &accuracy, COLOURS[0])],
    )];
    if let Some(positive) = positive {
        let fitted = Fitted::new(session, attribute, &group_of, answers, positive)?;
        table += &fitted.text;
        json["post_processing"] = fitted.json;
        panels.push(dots(
            attribute,
            &format!("Taken for {}", classes[positive.class]),
            "share of a group (%)",
            &[
                ("as the model says", &fitted.before, COLOURS[1]),
                ("with thresholds by group", &fitted.after, COLOURS[2]),
            ],
        ));
    }
    Ok((table, json, panels))
}

/// Thresholds by group, shown on the half that they are not fitted on.
struct Fitted {
    before: Vec<Share>,
    after: Vec<Share>,
    text: String,
    json: Value,
}

impl Fitted {
    fn new(
        session: &Session,
        attribute: &Attribute,
        group_of: &[usize],
        answers: &Answers,
        positive: &Decision,
    ) -> Result<Self> {
        let groups = attribute.values.len();
        let rows =
            |fit: bool| (0..group_of.len()).filter(|&row| positive.fit[row] == fit).collect::<Vec<_>>();
        let (fit, held_out) = (rows(true), rows(false));
        let has = |rows: &[usize], group: usize| rows.iter().any(|&row| group_of[row] == group);
        if let Some(few) = (0..groups).find(|&group| !has(&fit, group) || !has(&held_out, group)) {
            return Err(Error::usage(format!(
                "--positive fits a threshold for `{} = {}` on half of the images and shows it on the others, and the group \
                 has too few to be in both; join it with another or leave --positive out",
                attribute.name, attribute.values[few]
            )));
        }
        fn pick<T: Copy>(rows: &[usize], of: &[T]) -> Vec<T> {
            rows.iter().map(|&row| of[row]).collect()
        }
        let thresholds = Thresholds::fit(
            groups,
            &pick(&fit, group_of),
            &pick(&fit, &positive.scores),
            &pick(&fit, &positive.truth),
        );
        let own: Vec<usize> = pick(&held_out, group_of);
        let says = |i: usize| answers.decisions[held_out[i]] == positive.class;
        let decides = |i: usize| thresholds.decide(own[i], positive.scores[held_out[i]]);
        let right = |decision: &dyn Fn(usize) -> bool| {
            let right = (0..own.len()).filter(|&i| decision(i) == positive.truth[held_out[i]]).count();
            right as f64 / own.len() as f64
        };
        let (before, after) = (shares(groups, &own, says), shares(groups, &own, decides));
        let (accurate, accurate_after) = (right(&says), right(&decides));
        let name = &session.trained.classes[positive.class];
        let line = |what: &str, shares: &[Share], accuracy: f64| {
            let cells = shares.iter().map(|share| share.share().map_or("-".into(), text::percent));
            let first = std::iter::once(what.to_owned()).chain(cells);
            first.chain([text::percent(gap(shares)), text::percent(accuracy)]).collect::<Vec<_>>()
        };
        let title = format!("taken for {name} %, held-out half");
        let header: Vec<&str> = std::iter::once(title.as_str())
            .chain(attribute.values.iter().map(String::as_str))
            .chain(["parity gap", "right %"])
            .collect();
        let lines = [
            line("as the model says", &before, accurate),
            line("thresholds by group", &after, accurate_after),
        ];
        let rates = |shares: &[Share]| shares.iter().map(Share::share).collect::<Vec<_>>();
        let json = json!({
            "class": name, "fitted_on": fit.len(), "shown_on": held_out.len(), "thresholds": thresholds,
            "before": { "rates": rates(&before), "parity_gap": gap(&before), "accuracy": accurate },
            "after": { "rates": rates(&after), "parity_gap": gap(&after), "accuracy": accurate_after },
        });
        Ok(Self { text: format!("\n{}", text::table(&header, &lines)), before, after, json })
    }
}

/// A row a group, a dot a series.
fn dots(attribute: &Attribute, title: &str, label: &str, series: &[(&str, &[Share], &'static str)]) -> Panel {
    let percent = |share: &Share| share.share().map(|share| 100.0 * share);
    let values = series.iter().flat_map(|(_, shares, _)| shares.iter().filter_map(percent));
    let mut panel = Panel::new(
        title,
        Axis::new(label, Scale::around(values, (0.0, 100.0))),
        Axis::new("", Scale::Names(attribute.values.clone())),
    );
    for (name, shares, colour) in series {
        let points: Vec<(f64, f64)> = shares
            .iter()
            .enumerate()
            .filter_map(|(row, share)| Some((percent(share)?, row as f64)))
            .collect();
        let ends = points.iter().map(|point| point.0);
        let (low, high) =
            (ends.clone().fold(f64::INFINITY, f64::min), ends.fold(f64::NEG_INFINITY, f64::max));
        for x in [low, high] {
            let line = vec![(x, -0.5), (x, shares.len() as f64 - 0.5)];
            panel.marks.push(Mark::Line { points: line, colour: FAINT, dashed: true });
        }
        panel.marks.push(Mark::Dots { points, colour });
        panel.legend.push((format!("{name}, gap {:.2} points", high - low), colour));
    }
    panel
}
