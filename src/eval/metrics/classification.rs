//! Loss and accuracy from logits.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::parallel::MeshGroups;
use crate::recipe::LossKind;

/// Running counts over batches.
#[derive(Clone, Debug, PartialEq)]
pub struct Classification {
    loss: LossKind,
    loss_sum: f64,
    top1: u64,
    top5: u64,
    correct: Vec<u64>,
    total: Vec<u64>,
}

/// What [`Classification`] amounts to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassificationReport {
    /// Number of images.
    pub images: u64,
    /// Mean loss, without label smoothing.
    pub loss: f64,
    /// Share of images whose class has the largest logit.
    pub top1: f64,
    /// Share of images whose class is among the five largest logits.
    pub top5: f64,
    /// Mean of the accuracies of the classes that occur.
    pub balanced: f64,
    /// Top-1 accuracy and number of images of each class; `None` for a class without images.
    pub per_class: Vec<(Option<f64>, u64)>,
}

impl Classification {
    /// No images yet.
    pub fn new(classes: usize, loss: LossKind) -> Self {
        Self { loss, loss_sum: 0.0, top1: 0, top5: 0, correct: vec![0; classes], total: vec![0; classes] }
    }

    /// Counts a batch: `logits` `[N, K]`, `labels` `[N]`. Slots of weight 0 are ignored, all
    /// others count once. Which logits are the largest, [`rank`] decides.
    ///
    /// # Panics
    /// If the sizes disagree or the label of a counted slot is no class: a bug of the caller.
    pub fn add(&mut self, logits: &[f32], labels: &[i32], weights: &[f32]) {
        let classes = self.total.len();
        assert_eq!(logits.len(), labels.len() * classes, "logits are [N, K]");
        assert_eq!(labels.len(), weights.len(), "labels and weights are [N]");
        for ((logits, &label), _) in
            logits.chunks_exact(classes.max(1)).zip(labels).zip(weights).filter(|(_, w)| **w != 0.0)
        {
            let label = usize::try_from(label).expect("a label is a class index");
            let rank = rank(logits, label);
            self.loss_sum += image_loss(self.loss, logits, label, 1.0);
            self.top1 += u64::from(rank == 0);
            self.top5 += u64::from(rank < 5);
            self.correct[label] += u64::from(rank == 0);
            self.total[label] += 1;
        }
    }

    /// The counts of all data ranks, the same on every rank bit for bit.
    ///
    /// # Errors
    /// A rank that has failed.
    pub fn reduce(&mut self, ranks: &MeshGroups) -> Result<()> {
        let mut counts = vec![self.top1, self.top5];
        counts.extend(self.correct.iter().chain(&self.total));
        ranks.sum_over_data(&mut counts)?;
        (self.top1, self.top5) = (counts[0], counts[1]);
        let (correct, total) = counts[2..].split_at(self.total.len());
        self.correct.copy_from_slice(correct);
        self.total.copy_from_slice(total);
        let mut loss = [self.loss_sum];
        ranks.sum_over_data(&mut loss)?;
        self.loss_sum = loss[0];
        Ok(())
    }

    /// Means so far; all zero without images.
    pub fn report(&self) -> ClassificationReport {
        let images: u64 = self.total.iter().sum();
        let share = |count: f64| if images == 0 { 0.0 } else { count / images as f64 };
        let per_class: Vec<_> = self
            .correct
            .iter()
            .zip(&self.total)
            .map(|(&c, &n)| ((n > 0).then(|| c as f64 / n as f64), n))
            .collect();
        let occurring: Vec<_> = per_class.iter().filter_map(|c| c.0).collect();
        ClassificationReport {
            images,
            loss: share(self.loss_sum),
            top1: share(self.top1 as f64),
            top5: share(self.top5 as f64),
            balanced: occurring.iter().sum::<f64>() / occurring.len().max(1) as f64,
            per_class,
        }
    }
}

/// How many classes come before `label` in the order of the logits, 0 for the prediction.
///
/// Equal logits rank by class index, so that the result never depends on a sort; NaN ranks above everything, so that it
/// never makes an image correct.
pub fn rank(logits: &[f32], label: usize) -> usize {
    let own = logits[label];
    if own.is_nan() {
        return logits.len().max(5);
    }
    // Written as "not smaller", so that a comparison with NaN counts against the label.
    let ahead = |(i, &x): (usize, &f32)| {
        i != label
            && !matches!(x.partial_cmp(&own), Some(std::cmp::Ordering::Less))
            && !(x == own && i > label)
    };
    logits.iter().enumerate().filter(|&entry| ahead(entry)).count()
}

/// The training loss of an image's `logits / temperature`, without label smoothing, in f64.
pub(super) fn image_loss(loss: LossKind, logits: &[f32], label: usize, temperature: f64) -> f64 {
    match loss {
        LossKind::Softmax => softmax_loss(logits, label, temperature),
        LossKind::Sigmoid => sigmoid_loss(logits, label, temperature),
        LossKind::Bce => sigmoid_loss(logits, label, temperature) / logits.len() as f64,
    }
}

/// −log softmax(logits / temperature)\[label\].
fn softmax_loss(logits: &[f32], label: usize, temperature: f64) -> f64 {
    let scaled = |x: f32| f64::from(x) / temperature;
    let max = scaled(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (scaled(x) - max).exp()).sum();
    // The logits may be so large that the logarithm would vanish beside them.
    sum.ln() + (max - scaled(logits[label]))
}

/// Σ over the classes of binary cross-entropy of x = logit / temperature: softplus(x) − target·x.
fn sigmoid_loss(logits: &[f32], label: usize, temperature: f64) -> f64 {
    let scaled = |x: f32| f64::from(x) / temperature;
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    logits.iter().map(|&x| softplus(scaled(x))).sum::<f64>() - scaled(logits[label])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::{Mesh, run_ranks};

    #[test]
    fn counts_and_means() {
        let mut m = Classification::new(6, LossKind::Softmax);
        #[rustfmt::skip]
        let logits = [
            3.0, 2.0, 1.0, 0.0, -1.0, -2.0, // class 0: first
            3.0, 2.0, 1.0, 0.0, -1.0, -2.0, // class 4: fifth
            3.0, 2.0, 1.0, 0.0, -1.0, -2.0, // class 5: sixth
            9.0, 9.0, 9.0, 9.0, 9.0, 9.0, // an unused slot
        ];
        m.add(&logits, &[0, 4, 5, 0], &[1.0, 0.5, 1.0, 0.0]);
        let report = m.report();
        assert_eq!((report.images, report.top1, report.top5), (3, 1.0 / 3.0, 2.0 / 3.0));
        assert_eq!(report.balanced, 1.0 / 3.0);
        assert_eq!(report.per_class[0], (Some(1.0), 1));
        assert_eq!(report.per_class[1], (None, 0));
        assert_eq!(report.per_class[5], (Some(0.0), 1));
        let normaliser = (-2..=3).map(|x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((report.loss - (normaliser - (3.0 - 1.0 - 2.0) / 3.0)).abs() < 1e-12);
    }

    #[test]
    fn large_logits_keep_the_logarithm() {
        assert_eq!(softmax_loss(&[1e20, 1e20], 1, 1.0), 2f64.ln());
    }

    #[test]
    fn ties_rank_by_class() {
        let top = |label| {
            let mut m = Classification::new(7, LossKind::Softmax);
            m.add(&[1.0; 7], &[label], &[1.0]);
            let r = m.report();
            (r.top1, r.top5)
        };
        assert_eq!([0, 1, 4, 5].map(top), [(1.0, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 0.0)]);
    }

    #[test]
    fn nan_is_never_correct() {
        for logits in [[f32::NAN; 3], [1.0, f32::NAN, 0.0], [f32::NAN, 1.0, 0.0]] {
            let mut m = Classification::new(3, LossKind::Softmax);
            m.add(&logits, &[0], &[1.0]);
            assert_eq!(m.report().top1, 0.0, "{logits:?}");
        }
        let mut m = Classification::new(3, LossKind::Softmax);
        m.add(&[f32::NAN; 3], &[0], &[1.0]);
        assert_eq!(m.report().top5, 0.0);
    }

    #[test]
    fn sigmoid_loss_sums_over_classes() {
        let logits = [0.5f32, -30.0, 80.0];
        let naive = |x: f64, t: f64| -(t * sigmoid(x).ln() + (1.0 - t) * sigmoid(-x).ln());
        fn sigmoid(x: f64) -> f64 {
            1.0 / (1.0 + (-x).exp())
        }
        let expected = naive(0.5, 1.0) + naive(-30.0, 0.0) + naive(80.0, 0.0);
        let mut m = Classification::new(3, LossKind::Sigmoid);
        m.add(&logits, &[0], &[1.0]);
        assert!((m.report().loss - expected).abs() < 1e-9, "{} {expected}", m.report().loss);
    }

    #[test]
    fn batches_add_up() {
        let logits: Vec<f32> = (0..40).map(|i| ((i * 37) % 11) as f32).collect();
        let labels: Vec<i32> = (0..10).map(|i| i % 4).collect();
        let mut whole = Classification::new(4, LossKind::Softmax);
        whole.add(&logits, &labels, &[1.0; 10]);
        let mut parts = Classification::new(4, LossKind::Softmax);
        parts.add(&logits[..12], &labels[..3], &[1.0; 3]);
        parts.add(&logits[12..], &labels[3..], &[1.0; 7]);
        assert_eq!(whole.report().per_class, parts.report().per_class);
        assert!((whole.report().loss - parts.report().loss).abs() < 1e-12);
        assert_eq!(Classification::new(4, LossKind::Softmax).report().loss, 0.0);
    }

    #[test]
    fn ranks_add_up() {
        let batch = |rank: usize| {
            let logits: Vec<f32> = (0..12).map(|i| ((i * 37 + rank * 5) % 11) as f32).collect();
            (logits, [rank as i32 % 4, 1, 2])
        };
        let reports = run_ranks(4, move |world| {
            let ranks = MeshGroups::new(world, Mesh::new(4, 2)?)?;
            let mut m = Classification::new(4, LossKind::Softmax);
            // Ranks 2·k and 2·k + 1 have the same batch, of which the latter has lost an image.
            let (logits, labels) = batch(world.rank() / 2);
            m.add(&logits, &labels, &[1.0, 1.0, if world.rank() % 2 == 0 { 1.0 } else { 0.0 }]);
            m.reduce(&ranks)?;
            Ok(m.report())
        });
        let mut whole = Classification::new(4, LossKind::Softmax);
        for rank in 0..2 {
            let (logits, labels) = batch(rank);
            whole.add(&logits, &labels, &[1.0; 3]);
        }
        for report in reports.unwrap() {
            assert!((report.loss - whole.report().loss).abs() < 1e-12);
            assert_eq!(report.per_class, whole.report().per_class);
            assert_eq!((report.top1, report.top5, report.images), (whole.report().top1, 1.0, 6));
        }
    }

    #[test]
    fn report_survives_json() {
        let mut m = Classification::new(3, LossKind::Softmax);
        m.add(&[0.1, 0.2, 0.3], &[2], &[1.0]);
        let json = serde_json::to_string(&m.report()).unwrap();
        assert_eq!(serde_json::from_str::<ClassificationReport>(&json).unwrap(), m.report());
    }
}
