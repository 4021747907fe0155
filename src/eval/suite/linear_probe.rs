//! Accuracy of a linear classifier on frozen features: multinomial logistic regression, fitted to the training images by
//! SGD with momentum (ViT-22B: 10 epochs). The learning rate is the one of those given that is best on a tenth of the
//! training images, which are held out; with it the regression is fitted again to all. The validation images judge alone.

use serde_json::json;

use super::pass::Pass;
use super::probed::Probed;
use super::{Options, Outcome, Session, Suite, text};
use crate::error::{Error, Result};
use crate::eval::chart::{Axis, COLOURS, FAINT, Figure, Mark, Panel, Scale};
use crate::eval::metrics::Classification;
use crate::eval::metrics::ClassificationReport;
use crate::eval::metrics::calibration::{BUCKETS, Labelled};
use crate::eval::probe::{Fitted, Images, Sgd, Standard, fit};
use crate::recipe::LossKind;
use crate::rng::{Purpose, Stream};

/// Of so many images one is held out to choose the learning rate.
const HELD_OUT: usize = 10;
/// Images of a step.
const BATCH: usize = 256;

/// A learning rate and what came of it on the images that were held out.
struct Tried {
    lr: f64,
    top1: f64,
    loss: f64,
}

/// A fitted classifier.
pub(super) struct Probe {
    standard: Standard,
    fitted: Fitted<f32>,
    tried: Vec<Tried>,
    chosen: usize,
    held_out: usize,
}

impl Probe {
    /// Fits one to the images `rows` of `features`, whose classes are `labels`, as [`Options`] say.
    ///
    /// # Errors
    /// Fewer than ten images, of which the message names `what`; learning rates that all diverge.
    pub fn fit(
        features: &Pass,
        rows: &[usize],
        labels: &[usize],
        classes: usize,
        seed: u64,
        options: &Options,
        what: &str,
    ) -> Result<Self> {
        if rows.len() < HELD_OUT {
            return Err(Error::usage(format!(
                "{what} needs at least {HELD_OUT} images to fit to, of which some are held out, and there are {}; give it \
                 more with --data",
                rows.len()
            )));
        }
        // By sample, so that the same images are held out wherever features come from.
        let bits = |epoch: usize, place: usize| {
            let sample = features.samples[rows[place]];
            (Stream::new(seed, epoch as u64, sample as u64, Purpose::Probe).bits(), sample)
        };
        let ordered = |mut places: Vec<usize>, epoch: usize| {
            places.sort_by_cached_key(|&place| bits(epoch, place));
            places
        };
        let all: Vec<usize> = (0..rows.len()).collect();
        let order = ordered(all.clone(), 0);
        let (held_out, fitting) = order.split_at(rows.len() / HELD_OUT);
        let rows_of = |places: &[usize]| places.iter().map(|&place| rows[place]).collect::<Vec<_>>();
        let of = |places: &[usize]| places.iter().map(|&place| labels[place]).collect::<Vec<_>>();
        let fit_to = |places: &[usize], lr: f64| {
            let rows = rows_of(places);
            let standard = Standard::of(features.rows(&rows));
            let sgd = Sgd { lr, epochs: options.epochs, batch: BATCH };
            // Epoch 0 is the order that decides what is held out.
            let order = |epoch: usize| {
                let mut order: Vec<usize> = (0..places.len()).collect();
                order.sort_by_cached_key(|&i| bits(epoch + 1, places[i]));
                order
            };
            let images = Images { features: &features.values, standard: &standard, rows: &rows };
            (fit(images, &of(places), classes, sgd, order), standard)
        };
        let mut tried = Vec::new();
        for &lr in &options.lrs {
            let (fitted, standard) = fit_to(fitting, lr);
            let report =
                judge(&fitted.logits(features.rows(&rows_of(held_out)), &standard), &of(held_out), classes);
            tried.push(Tried { lr, top1: report.top1, loss: report.loss });
        }
        let better = |a: &Tried, b: &Tried| a.top1.total_cmp(&b.top1).then(b.loss.total_cmp(&a.loss)).is_gt();
        let best = |best: usize, i: usize| if better(&tried[i], &tried[best]) { i } else { best };
        let chosen = (1..tried.len()).fold(0, best);
        let (fitted, standard) = fit_to(&all, tried[chosen].lr);
        if !fitted.weights.iter().chain(&fitted.bias).all(|x| x.is_finite()) {
            return Err(Error::usage(format!(
                "{what}: every learning rate of --lr diverges; give smaller ones than {}",
                text::number(tried[chosen].lr)
            )));
        }
        Ok(Self { standard, fitted, tried, chosen, held_out: held_out.len() })
    }

    /// Its logits for these images.
    pub fn logits(&self, features: &Pass, rows: &[usize]) -> Vec<f32> {
        self.fitted.logits(features.rows(rows), &self.standard)
    }

    /// The learning rate that was chosen.
    pub fn lr(&self) -> f64 {
        self.tried[self.chosen].lr
    }
}

fn judge(logits: &[f32], labels: &[usize], classes: usize) -> ClassificationReport {
    let mut counts = Classification::new(classes, LossKind::Softmax);
    let labels: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
    counts.add(logits, &labels, &vec![1.0; labels.len()]);
    counts.report()
}

pub(super) fn run(session: &mut Session, options: &Options) -> Result<Outcome> {
    let probed = Probed::new(session, options, Suite::LinearProbe)?;
    let set = probed.set.clone();
    let classes = set.classes.len();
    let train = probed.train(session, None)?;
    let rows: Vec<usize> = (0..train.images()).collect();
    let labels: Vec<usize> = train.samples.iter().map(|&sample| set.train.label(sample)).collect();
    let seed = session.recipe().train.seed;
    let probe = Probe::fit(&train, &rows, &labels, classes, seed, options, "--suite linear-probe")?;
    let validation = probed.validation(session)?;
    let truth: Vec<usize> = validation.samples.iter().map(|&sample| set.validation.label(sample)).collect();
    let logits = probe.logits(&validation, &(0..validation.images()).collect::<Vec<_>>());
    let report = judge(&logits, &truth, classes);
    let ece = Labelled { logits: &logits, labels: &truth, loss: LossKind::Softmax }.reliability(1.0).ece;

    let mut table = probed.preamble(session, &train, &validation);
    table += &format!(
        "probe             logistic regression of standardised features, SGD with momentum, {} epoch{} in batches of {BATCH}\n\
         learning rate     {}, the best of {} on {} of the images to fit to\n",
        options.epochs,
        if options.epochs == 1 { "" } else { "s" },
        text::number(probe.lr()),
        probe.tried.len(),
        probe.held_out
    );
    let lrs = || probe.tried.iter().map(|tried| tried.lr);
    let ends = [lrs().fold(f64::INFINITY, f64::min), lrs().fold(0.0, f64::max)];
    if probe.tried.len() > 1 && ends.contains(&probe.lr()) {
        table += "                  at the end of those that were tried; give others with --lr\n";
    }
    let tried: Vec<Vec<String>> = probe
        .tried
        .iter()
        .map(|Tried { lr, top1, loss }| vec![text::number(*lr), text::percent(*top1), format!("{loss:.4}")])
        .collect();
    table += &format!("\n{}", text::table(&["learning rate", "held-out top-1 %", "loss"], &tried));
    let cells = vec![
        report.images.to_string(),
        text::percent(report.top1),
        text::percent(report.top5),
        text::percent(report.balanced),
        format!("{:.4}", report.loss),
        text::percent(ece),
    ];
    let header = ["validation images", "top-1 %", "top-5 %", "mean of classes %", "loss", "ECE %"];
    table += &format!("\n{}", text::table(&header, &[cells]));

    let mut json = probed.header(session, Suite::LinearProbe, &train, &validation);
    json["epochs"] = json!(options.epochs);
    json["batch"] = json!(BATCH);
    json["learning_rate"] = json!(probe.lr());
    json["held_out"] = json!(probe.held_out);
    let of = |Tried { lr, top1, loss }: &Tried| json!({ "learning_rate": lr, "top1": top1, "loss": loss });
    json["tried"] = json!(probe.tried.iter().map(of).collect::<Vec<_>>());
    json["train_loss"] = json!(probe.fitted.losses);
    for (key, value) in [
        ("top1", report.top1),
        ("top5", report.top5),
        ("balanced", report.balanced),
        ("loss", report.loss),
        ("ece", ece),
    ] {
        json[key] = json!(value);
    }
    let of_class = |(name, (top1, images)): (&String, &(Option<f64>, u64))| json!({ "class": name, "images": images, "top1": top1 });
    json["classes"] = json!(set.classes.iter().zip(&report.per_class).map(of_class).collect::<Vec<_>>());
    json["ece_buckets"] = json!(BUCKETS);
    Ok(Outcome { json, table, figure: figure(&probe, report.top1), files: Vec::new() })
}

/// The choice of the learning rate, and the loss of the fit with it.
fn figure(probe: &Probe, top1: f64) -> Figure {
    let mut points: Vec<(f64, f64)> =
        probe.tried.iter().map(|tried| (tried.lr, 100.0 * tried.top1)).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let x = Scale::log_around(points.iter().map(|point| point.0));
    let heights = points.iter().map(|point| point.1).chain([100.0 * top1]);
    let y = Scale::around(heights, (0.0, 100.0));
    let mut choice =
        Panel::new("Linear probe", Axis::new("learning rate", x.clone()), Axis::new("top-1 (%)", y));
    if let Scale::Log(low, high) = x {
        let points = vec![(low, 100.0 * top1), (high, 100.0 * top1)];
        choice.marks.push(Mark::Line { points, colour: FAINT, dashed: true });
    }
    choice.series("training images held out to choose the learning rate", points, COLOURS[0]);
    choice.marks.push(Mark::Dots { points: vec![(probe.lr(), 100.0 * top1)], colour: COLOURS[1] });
    choice
        .legend
        .push((format!("validation images with the chosen one: {} %", text::percent(top1)), COLOURS[1]));
    let losses: Vec<(f64, f64)> =
        probe.fitted.losses.iter().enumerate().map(|(epoch, loss)| ((epoch + 1) as f64, *loss)).collect();
    let y = Scale::around(losses.iter().map(|point| point.1), (0.0, f64::INFINITY));
    let x = Scale::linear(1.0, losses.len() as f64);
    let mut fit = Panel::new("Fit to all training images", Axis::new("epoch", x), Axis::new("loss", y));
    fit.series(
        &format!("mean loss of an epoch, learning rate {}", text::number(probe.lr())),
        losses,
        COLOURS[2],
    );
    Figure { panels: vec![choice, fit] }
}
