//! The loss kernels against the CPU device in f64, on logits rounded to bf16.

use half::bf16;

use trencadis::cpu::loss as oracle;
use trencadis::data::batch::Targets as HostTargets;
use trencadis::device::Device;
use trencadis::eval::metrics::Classification;
use trencadis::kernels::Rows;
use trencadis::kernels::loss::{CrossEntropy, Logits, MAX_CLASSES, Operands, Targets, fault};
use trencadis::kernels::tolerance as to;
use trencadis::ops::ClassificationLoss;
use trencadis::ops::LossKind::{self, Bce, Sigmoid, Softmax};

use crate::support::devices::devices;
use crate::support::numbers::{distance, random};

/// Columns that follow every row and belong to somebody else.
const FOREIGN: usize = 8;

#[derive(Clone)]
struct Case {
    loss: CrossEntropy,
    f32: bool,
    scale: Option<f32>,
    ranked: bool,
    targets: HostTargets,
    weights: Vec<f32>,
    /// `[N][classes rounded up to 8 | foreign]`, NaN where nothing must be read.
    logits: Vec<f32>,
}

#[derive(Clone, Debug)]
struct Answer {
    loss: Vec<f32>,
    dlogits: Vec<bf16>,
    rank: Vec<i32>,
    error: i32,
}

fn stride(classes: usize) -> usize {
    classes.next_multiple_of(8) + FOREIGN
}

fn case(kind: LossKind, images: usize, classes: usize, soft: bool, smoothing: f64) -> Case {
    // Every fourth slot is unused; what lies there may be anything.
    let weights: Vec<f32> = (0..images).map(|i| [1.0, 0.5, 2.0, 0.0][i % 4]).collect();
    let values: Vec<f64> = random(images * classes, classes as u64);
    let mut logits = vec![f32::NAN; images * stride(classes)];
    for (image, row) in logits.chunks_exact_mut(stride(classes)).enumerate() {
        if weights[image] != 0.0 {
            for (z, x) in row.iter_mut().zip(&values[image * classes..][..classes]) {
                *z = bf16::from_f64(4.0 * x - 2.0 * image as f64).to_f32();
            }
        }
    }
    let targets = if soft {
        let x: Vec<f32> = random(images * classes, 5);
        HostTargets::Soft(x.iter().map(|x| x.abs() / classes as f32).collect())
    } else {
        let class = |i: usize| if weights[i] == 0.0 { -7 } else { (i * 7 % classes) as i32 };
        HostTargets::Classes((0..images).map(class).collect())
    };
    let loss = CrossEntropy { of: ClassificationLoss { smoothing, ..kind.into() }, images, classes };
    Case { loss, f32: false, scale: Some(0.125), ranked: true, targets, weights, logits }
}

impl Case {
    fn run(&self, device: &Device) -> Answer {
        let CrossEntropy { images, classes, .. } = self.loss;
        let stream = device.stream().unwrap();
        let narrow: Vec<bf16> = self.logits.iter().copied().map(bf16::from_f32).collect();
        let (narrow, full) = (device.upload(&narrow).unwrap(), device.upload(&self.logits).unwrap());
        let (labels, soft) = match &self.targets {
            HostTargets::Classes(labels) => (device.upload(labels).unwrap(), device.alloc(0).unwrap()),
            HostTargets::Soft(soft) => (device.alloc(0).unwrap(), device.upload(soft).unwrap()),
            HostTargets::Mixed(_) => unreachable!("the kernels know none"),
        };
        let weights = device.upload(&self.weights).unwrap();
        let scale = device.upload(&[self.scale.unwrap_or_default()]).unwrap();
        let loss = device.alloc::<f32>(images).unwrap();
        let dlogits = device.upload(&vec![bf16::MAX; self.logits.len()]).unwrap();
        let rank = device.upload(&vec![99i32; images]).unwrap();
        let error = device.zeros::<i32>(1).unwrap();
        let stride = stride(classes);
        let operands = Operands {
            logits: match self.f32 {
                true => Logits::F32(Rows { buffer: &full, offset: 0, stride }),
                false => Logits::Bf16(Rows { buffer: &narrow, offset: 0, stride }),
            },
            targets: if labels.is_empty() { Targets::Soft(&soft) } else { Targets::Classes(&labels) },
            weights: &weights,
            scale: self.scale.is_some().then_some(&scale),
            loss: &loss,
            dlogits: Rows { buffer: &dlogits, offset: 0, stride },
            rank: self.ranked.then_some(&rank),
            error: Some(&error),
        };
        self.loss.launch(&stream, &operands).unwrap();
        stream.synchronize().unwrap();
        Answer {
            loss: loss.download().unwrap(),
            dlogits: dlogits.download().unwrap(),
            rank: rank.download().unwrap(),
            error: error.download().unwrap()[0],
        }
    }

    fn row(&self, image: usize) -> &[f32] {
        &self.logits[image * stride(self.loss.classes)..][..self.loss.classes]
    }

    fn label(&self, image: usize) -> i32 {
        match &self.targets {
            HostTargets::Classes(labels) => labels[image],
            HostTargets::Mixed(_) => unreachable!("the kernels know none"),
            HostTargets::Soft(soft) => {
                let row = &soft[image * self.loss.classes..][..self.loss.classes];
                (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32
            }
        }
    }

    /// The distance of the gradients, every element to the rounding of bf16, zeros where they must be.
    #[track_caller]
    fn check(&self, got: &Answer) {
        let CrossEntropy { of, images, classes } = self.loss;
        let logits: Vec<f64> = (0..images).flat_map(|i| self.row(i).iter().map(|&z| f64::from(z))).collect();
        let (mut loss, mut dlogits) = (vec![0.0; images], vec![0.0; images * classes]);
        let (targets, scale) = (&self.targets, f64::from(self.scale.unwrap_or(1.0)));
        oracle::cross_entropy(of, &mut loss, &mut dlogits, &logits, targets, &self.weights, classes, scale);
        let mut written = Vec::new();
        assert_eq!(got.error, 0);
        for image in 0..images {
            let (row, rest) = got.dlogits[image * stride(classes)..][..stride(classes)].split_at(classes);
            let (padding, foreign) = rest.split_at(classes.next_multiple_of(8) - classes);
            assert!(padding.iter().all(|x| x.to_bits() == 0), "columns beyond {classes}");
            assert!(foreign.iter().all(|&x| x == bf16::MAX), "foreign columns");
            let error = (f64::from(got.loss[image]) - loss[image]).abs();
            assert!(
                error <= to::LOSS * loss[image].abs().max(1.0),
                "loss {:?} {:?}",
                got.loss[image],
                loss[image]
            );
            let used = self.weights[image] != 0.0;
            for (k, (got, &want)) in row.iter().zip(&dlogits[image * classes..]).enumerate() {
                let x = got.to_f64();
                let unit = f64::from(self.weights[image]) * scale;
                assert!(
                    (x - want).abs() <= 4.1e-3 * want.abs() + 4e-7 * unit,
                    "image {image}, {k}: {x} {want}"
                );
                assert!(used || got.to_bits() == 0);
                written.push(x);
            }
            // What the host's metrics count.
            let mut counts = Classification::new(classes, of.kind);
            if used {
                counts.add(self.row(image), &[self.label(image)], &[1.0]);
            }
            let report = counts.report();
            match (self.ranked, used) {
                (false, _) => assert_eq!(got.rank[image], 99),
                (true, false) => assert_eq!(got.rank[image], -1),
                (true, true) => {
                    assert_eq!(
                        (got.rank[image] == 0, got.rank[image] < 5),
                        (report.top1 == 1.0, report.top5 == 1.0)
                    );
                    assert!((0..=classes.max(5) as i32).contains(&got.rank[image]));
                }
            }
        }
        let apart = distance(&written, &dlogits);
        assert!(apart <= to::LOSS_GRAD, "distance {apart:.1e}");
    }
}

fn bits(answer: &Answer) -> (Vec<u32>, Vec<u16>, &[i32]) {
    let loss = answer.loss.iter().map(|x| x.to_bits()).collect();
    (loss, answer.dlogits.iter().map(|x| x.to_bits()).collect(), &answer.rank)
}

#[test]
fn losses_of_every_width() {
    for device in devices() {
        for (i, classes) in [1, 3, 10, 64, 1000, 1023, 1024, 1025, 4095].into_iter().enumerate() {
            for kind in [Softmax, Sigmoid] {
                for soft in [false, true] {
                    let mut case = case(
                        kind,
                        5,
                        classes,
                        soft,
                        if (i + usize::from(soft)) % 2 == 0 { 0.1 } else { 0.0 },
                    );
                    case.f32 = i % 3 == 1;
                    case.ranked = i % 4 != 3;
                    case.scale = (i % 5 != 2).then_some(0.125);
                    case.check(&case.run(&device));
                }
            }
        }
    }
}

/// A mean over classes, and temperatures above and below 1, in one tile and in several.
#[test]
fn losses_with_factors() {
    for device in devices() {
        for (kind, classes, temperature) in
            [(Bce, 37, 1.0), (Bce, 4104, 1.0), (Softmax, 37, 0.5), (Softmax, 10, 3.0), (Softmax, 4104, 2.5)]
        {
            for soft in [false, true] {
                let mut case = case(kind, 4, classes, soft, 0.1);
                case.loss.of.temperature = temperature;
                case.check(&case.run(&device));
            }
        }
    }
}

/// Rows of several tiles; the last one of the third is full.
#[test]
fn losses_of_thousands_of_classes() {
    for device in devices() {
        for (kind, classes, soft, f32) in [
            (Softmax, 21_843, false, false),
            (Softmax, 4104, true, true),
            (Sigmoid, 32_768, false, true),
            (Sigmoid, 29_593, true, false),
        ] {
            let mut case = case(kind, 2, classes, soft, 0.1);
            case.f32 = f32;
            case.check(&case.run(&device));
        }
    }
}

/// An image's bits depend neither on its slot nor on its neighbours, and are the same again.
#[test]
fn images_do_not_depend_on_their_place() {
    for device in devices() {
        for kind in [Softmax, Sigmoid] {
            let first = case(kind, 6, 37, true, 0.1);
            let answer = first.run(&device);
            let mut moved = first.clone();
            let (HostTargets::Soft(from), HostTargets::Soft(to)) = (&first.targets, &mut moved.targets)
            else {
                unreachable!();
            };
            for image in 0..6 {
                let to_image = 5 - image;
                moved.weights[to_image] = first.weights[image];
                to[to_image * 37..][..37].copy_from_slice(&from[image * 37..][..37]);
                let width = stride(37);
                moved.logits[to_image * width..][..width]
                    .copy_from_slice(&first.logits[image * width..][..width]);
            }
            let mut back = moved.run(&device);
            back.loss.reverse();
            back.rank.reverse();
            back.dlogits = back.dlogits.chunks(stride(37)).rev().flatten().copied().collect();
            assert_eq!(bits(&answer), bits(&back));
            assert_eq!(bits(&answer), bits(&first.run(&device)));
        }
    }
}

#[test]
fn extreme_logits_are_finite() {
    for device in devices() {
        for kind in [Softmax, Sigmoid] {
            let mut case = case(kind, 3, 3, false, 0.0);
            for (image, row) in [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-16.5, -30.0, -90.0]].iter().enumerate()
            {
                for (k, &z) in row.iter().enumerate() {
                    case.logits[image * stride(3) + k] = bf16::from_f64(z).to_f32();
                }
            }
            case.check(&case.run(&device));
        }
    }
}

#[test]
fn nan_shows_and_bad_labels_are_told() {
    for device in devices() {
        for kind in [Softmax, Sigmoid] {
            let mut nan = case(kind, 2, 20, false, 0.1);
            nan.logits[7] = f32::NAN;
            let got = nan.run(&device);
            assert!(got.loss[0].is_nan() && got.dlogits[7].is_nan() && got.loss[1].is_finite());
            assert!(got.rank[0] > 0);
            nan.logits[..20].fill(f32::NAN);
            assert_eq!(nan.run(&device).rank[0], 20);

            for bad in [-1, 20, i32::MAX] {
                let mut case = case(kind, 2, 20, false, 0.1);
                let HostTargets::Classes(labels) = &mut case.targets else { unreachable!() };
                labels[1] = bad;
                let got = case.run(&device);
                assert!(got.loss[1].is_nan() && got.loss[0].is_finite());
                assert!(got.dlogits[stride(20)..][..20].iter().all(|x| x.is_nan()));
                assert_eq!((got.error, got.rank[1]), (1, 20));
                assert!(fault(got.error).is_err() && fault(0).is_ok());
            }
        }
    }
}

#[test]
fn unsupported_shapes_are_told() {
    for device in devices() {
        let says = |change: &dyn Fn(&mut CrossEntropy), stride: usize| {
            let mut loss = CrossEntropy { of: Softmax.into(), images: 2, classes: 10 };
            change(&mut loss);
            let (rows, stream) = (device.alloc::<bf16>(32).unwrap(), device.stream().unwrap());
            let (labels, numbers) = (device.zeros::<i32>(2).unwrap(), device.zeros::<f32>(2).unwrap());
            let operands = Operands {
                logits: Logits::Bf16(Rows { buffer: &rows, offset: 0, stride }),
                targets: Targets::Classes(&labels),
                weights: &numbers,
                scale: None,
                loss: &numbers,
                dlogits: Rows { buffer: &rows, offset: 0, stride },
                rank: None,
                error: None,
            };
            loss.launch(&stream, &operands).err().map_or(String::new(), |e| e.to_string())
        };
        assert_eq!(says(&|_| {}, 16), "");
        assert!(says(&|_| {}, 10).contains("multiples of 8"));
        assert!(says(&|_| {}, 8).contains("overlap"));
        assert!(says(&|_| {}, 24).contains("do not fit"));
        assert!(says(&|loss| loss.classes = 0, 16).contains("over 0 classes"));
        assert!(says(&|loss| loss.of.temperature = 0.0, 16).contains("temperature of the loss is 0"));
        let warm = says(&|loss| loss.of = ClassificationLoss { temperature: 2.0, ..Sigmoid.into() }, 16);
        assert!(warm.contains("temperature of the loss is 2"), "{warm}");
        assert!(says(&|loss| loss.classes = MAX_CLASSES + 1, 16).contains("1 to 16777216"));
        assert!(says(&|loss| loss.images = 0, 16).contains("0 image slots"));
        assert!(says(&|loss| loss.images = 3, 16).contains("do not fit"));
        assert!(says(&|loss| loss.of.smoothing = 1.5, 16).contains("label smoothing is 1.5"));
    }
}
