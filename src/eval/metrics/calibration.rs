//! Whether a model is right as often as it says it is: reliability and expected calibration error (Guo et al. 2017, "On
//! calibration of modern neural networks"; 30 buckets as in NaViT, table 4), temperature scaling.

use rayon::prelude::*;
use serde::Serialize;

use super::classification::image_loss;
use super::probability;
use crate::recipe::LossKind;

/// Buckets of confidence of a [`ReliabilityDiagram`].
pub const BUCKETS: usize = 30;
/// Bounds of a fitted temperature; one that ends up at a bound has no minimum between them.
pub const TEMPERATURES: [f64; 2] = [0.01, 100.0];
/// Images whose losses one thread adds up; fixed, so that the sum does not depend on the threads.
const CHUNK: usize = 256;

/// Images of similar confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bucket {
    /// Number of images.
    pub images: u64,
    /// Their mean confidence; none without images.
    pub confidence: Option<f64>,
    /// The share of them that is right; none without images.
    pub accuracy: Option<f64>,
}

/// Accuracy by confidence, the confidence being the probability of the predicted class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReliabilityDiagram {
    /// Expected calibration error: Σ over buckets of their share of the images times |accuracy − confidence| (l1).
    pub ece: f64,
    /// Mean confidence; 0 without images.
    pub confidence: f64,
    /// Share of images that are right; 0 without images.
    pub accuracy: f64,
    /// Equal parts of 0..1: bucket b of B holds confidences in (b / B, (b + 1) / B], and the first 0 as well.
    pub buckets: Vec<Bucket>,
}

impl ReliabilityDiagram {
    /// From (confidence in 0..1, whether the prediction is right) of each image.
    pub fn new(predictions: impl IntoIterator<Item = (f64, bool)>, buckets: usize) -> Self {
        let mut sums = vec![(0u64, 0.0, 0u64); buckets];
        for (confidence, right) in predictions {
            let bucket = (confidence * buckets as f64).ceil() as usize;
            let (images, confidences, rights) = &mut sums[bucket.saturating_sub(1).min(buckets - 1)];
            *images += 1;
            *confidences += confidence;
            *rights += u64::from(right);
        }
        let images: u64 = sums.iter().map(|sum| sum.0).sum();
        let mean = |total: f64| if images == 0 { 0.0 } else { total / images as f64 };
        // n · |accuracy − confidence| = |right − Σ confidence|.
        let ece =
            mean(sums.iter().map(|(_, confidences, rights)| (*rights as f64 - confidences).abs()).sum());
        let buckets = sums.iter().map(|&(images, confidences, rights)| Bucket {
            images,
            confidence: (images > 0).then(|| confidences / images as f64),
            accuracy: (images > 0).then(|| rights as f64 / images as f64),
        });
        Self {
            ece,
            confidence: mean(sums.iter().map(|sum| sum.1).sum()),
            accuracy: mean(sums.iter().map(|sum| sum.2 as f64).sum()),
            buckets: buckets.collect(),
        }
    }
}

/// Logits of images whose class is known.
#[derive(Clone, Copy, Debug)]
pub struct Labelled<'a> {
    /// `[images, classes]`.
    pub logits: &'a [f32],
    /// `[images]`, a class each.
    pub labels: &'a [usize],
    /// The loss that the model was trained with.
    pub loss: LossKind,
}

impl Labelled<'_> {
    fn rows(&self) -> impl IndexedParallelIterator<Item = (&[f32], usize)> {
        let classes = (self.logits.len() / self.labels.len().max(1)).max(1);
        self.logits.par_chunks_exact(classes).zip(self.labels.par_iter().copied())
    }

    /// Mean negative log-likelihood of logits divided by `temperature`: the training loss, without label smoothing.
    pub fn loss(&self, temperature: f64) -> f64 {
        let of = |(logits, label): (&[f32], usize)| image_loss(self.loss, logits, label, temperature);
        let sums: Vec<f64> = self.rows().map(of).chunks(CHUNK).map(|losses| losses.iter().sum()).collect();
        sums.iter().sum::<f64>() / self.labels.len().max(1) as f64
    }

    /// Reliability of logits divided by `temperature`.
    pub fn reliability(&self, temperature: f64) -> ReliabilityDiagram {
        let predictions: Vec<(f64, bool)> = self
            .rows()
            .map(|(logits, label)| {
                let (class, confidence) = probability::decision(logits, self.loss, temperature);
                (confidence, class == label)
            })
            .collect();
        ReliabilityDiagram::new(predictions, BUCKETS)
    }

    /// The temperature in [`TEMPERATURES`] that minimises [`loss`](Self::loss), by golden-section search over its
    /// logarithm. The loss is convex in 1 / T, so that it has one valley.
    pub fn fit_temperature(&self) -> f64 {
        let section = (5f64.sqrt() - 1.0) / 2.0;
        let [mut low, mut high] = TEMPERATURES.map(f64::ln);
        let at = |x: f64| self.loss(x.exp());
        let inner = |low: f64, high: f64| [high - section * (high - low), low + section * (high - low)];
        let mut points = inner(low, high);
        let mut losses = points.map(at);
        while high - low > 1e-5 {
            if losses[0] <= losses[1] {
                high = points[1];
                points = [inner(low, high)[0], points[0]];
                losses = [at(points[0]), losses[0]];
            } else {
                low = points[0];
                points = [points[1], inner(low, high)[1]];
                losses = [losses[1], at(points[1])];
            }
        }
        (0.5 * (low + high)).exp()
    }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::rng::{Purpose, Stream};

    #[test]
    fn by_hand() {
        // Two buckets: 0.5 belongs to the lower one, whose mean confidence is 0.4 at accuracy 1/2;
        // the upper one has 0.8 at accuracy 1.
        let diagram = ReliabilityDiagram::new([(0.3, true), (0.5, false), (0.7, true), (0.9, true)], 2);
        assert!((diagram.ece - (0.5 * 0.1 + 0.5 * 0.2)).abs() < 1e-12, "{}", diagram.ece);
        assert_eq!(diagram.buckets.iter().map(|b| b.images).collect::<Vec<_>>(), [2, 2]);
        assert_eq!(diagram.buckets[0].accuracy, Some(0.5));
        assert!((diagram.buckets[1].confidence.unwrap() - 0.8).abs() < 1e-12);
        assert!((diagram.confidence - 0.6).abs() < 1e-12 && diagram.accuracy == 0.75);
        let edges = ReliabilityDiagram::new([(0.0, false), (1.0, true)], 30);
        assert_eq!((edges.ece, edges.buckets[0].images, edges.buckets[29].images), (0.0, 1, 1));
        let none = ReliabilityDiagram::new([], 30);
        assert_eq!((none.ece, none.buckets[7].accuracy), (0.0, None));
    }

    #[test]
    fn ece_is_that_of_the_plain_definition() {
        let mut stream = Stream::new(3, 0, 0, Purpose::Init);
        let predictions: Vec<(f64, bool)> = (0..1000)
            .map(|_| {
                let confidence: f64 = stream.random();
                (confidence, stream.random::<f64>() < confidence * confidence)
            })
            .collect();
        // Bucket by bucket, as the formula is printed.
        let mut expected = 0.0;
        for b in 0..30 {
            let (low, high) = (f64::from(b) / 30.0, f64::from(b + 1) / 30.0);
            let own: Vec<_> = predictions.iter().filter(|(c, _)| *c > low && *c <= high).collect();
            if own.is_empty() {
                continue;
            }
            let n = own.len() as f64;
            let confidence = own.iter().map(|(c, _)| c).sum::<f64>() / n;
            let accuracy = own.iter().filter(|(_, right)| *right).count() as f64 / n;
            expected += n / 1000.0 * (accuracy - confidence).abs();
        }
        let got = ReliabilityDiagram::new(predictions, 30).ece;
        assert!((got - expected).abs() < 1e-12 && got > 0.1, "{got} {expected}");
    }

    /// Logits of which the labels were drawn after division by `temperature`.
    fn synthetic(images: usize, loss: LossKind, temperature: f64) -> (Vec<f32>, Vec<usize>) {
        let (mut logits, mut labels) = (Vec::new(), Vec::new());
        let mut stream = Stream::new(7, 0, 0, Purpose::Init);
        while labels.len() < images {
            let row: Vec<f32> = (0..5).map(|_| 8.0 * stream.random::<f32>() - 4.0).collect();
            let p = probability::tempered(&row, loss, temperature);
            // Of independent sigmoids exactly one must be on, which is drawn by rejection.
            let label = match loss {
                LossKind::Softmax => {
                    let u: f64 = stream.random();
                    let reached = |sum: &mut f64, p: &f64| {
                        *sum += p;
                        Some(*sum)
                    };
                    p.iter().scan(0.0, reached).position(|sum| u < sum)
                }
                LossKind::Sigmoid | LossKind::Bce => {
                    let on: Vec<bool> = p.iter().map(|p| stream.random::<f64>() < *p).collect();
                    let only = on.iter().filter(|on| **on).count() == 1;
                    only.then(|| on.iter().position(|on| *on)).flatten()
                }
            };
            if let Some(label) = label {
                logits.extend(row);
                labels.push(label);
            }
        }
        (logits, labels)
    }

    #[test]
    fn a_known_temperature_is_found_again() {
        for temperature in [0.5, 1.0, 2.5] {
            let (logits, labels) = synthetic(20_000, LossKind::Softmax, temperature);
            let of = Labelled { logits: &logits, labels: &labels, loss: LossKind::Softmax };
            let fitted = of.fit_temperature();
            assert!((fitted / temperature - 1.0).abs() < 0.04, "{fitted} {temperature}");
            assert!(of.reliability(fitted).ece < 0.02, "calibrated: {}", of.reliability(fitted).ece);
            if temperature != 1.0 {
                assert!(of.reliability(1.0).ece > 3.0 * of.reliability(fitted).ece);
            }
        }
    }

    #[test]
    fn the_fit_is_the_lowest_of_a_scan() {
        for loss in [LossKind::Softmax, LossKind::Sigmoid] {
            let (logits, labels) = synthetic(600, loss, 1.7);
            let of = Labelled { logits: &logits, labels: &labels, loss };
            let lowest = of.loss(of.fit_temperature());
            for step in -400..=400 {
                let temperature = (f64::from(step) / 400.0 * 100f64.ln()).exp();
                assert!(lowest <= of.loss(temperature) + 1e-9, "{loss:?} at {temperature}");
            }
        }
    }

    #[test]
    fn one_that_is_always_right_wants_the_lowest_temperature() {
        let of = Labelled { logits: &[2.0, 0.0, 0.0, 1.0], labels: &[0, 1], loss: LossKind::Softmax };
        assert!(of.fit_temperature() < 1.001 * TEMPERATURES[0] * 10.0, "{}", of.fit_temperature());
        let wrong = Labelled { labels: &[1, 0], ..of };
        assert!((wrong.fit_temperature() / TEMPERATURES[1] - 1.0).abs() < 1e-4);
    }
}
