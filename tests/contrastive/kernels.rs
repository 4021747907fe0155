//! The contrastive kernels against the CPU device in f64, on vectors rounded to bf16.

use half::bf16;

use trencadis::cpu::contrastive::{Results, contrastive, retrieved};
use trencadis::device::{Buffer, Device};
use trencadis::kernels::Rows;
use trencadis::kernels::contrastive::{Contrastive, MAX_WIDTH, Operands};
use trencadis::kernels::tolerance as to;
use trencadis::recipe::ContrastiveKind::{self, Sigmoid, Softmax};

use crate::support::devices::devices;
use crate::support::numbers::{alike, random};
use crate::support::rounded::FOREIGN;

#[derive(Clone)]
struct Case {
    loss: Contrastive,
    images: Vec<bf16>,
    texts: Vec<bf16>,
    weights: Vec<f32>,
    scale: f32,
    bias: Option<f32>,
    loss_scale: Option<f32>,
    ranked: bool,
}

#[derive(Clone, Debug)]
struct Answer {
    per_pair: Vec<f32>,
    dimages: Vec<bf16>,
    dtexts: Vec<bf16>,
    dscale: f32,
    dbias: Option<f32>,
    rank: Vec<i32>,
}

/// Texts that are like their images, of lengths that differ. Pairs from `used` on, and every fifth, do not count, and
/// their vectors are NaN.
fn case(kind: ContrastiveKind, pairs: usize, used: usize, width: usize) -> Case {
    let weights: Vec<f32> =
        (0..pairs).map(|i| if i < used { [1.0, 0.5, 0.0, 2.0, 1.0][i % 5] } else { 0.0 }).collect();
    let (x, noise): (Vec<f64>, Vec<f64>) = (random(pairs * width, 1), random(pairs * width, 2));
    let rows = |value: &dyn Fn(usize) -> f64| -> Vec<bf16> {
        let mut rows = vec![bf16::NAN; pairs * (width + FOREIGN)];
        for (i, row) in rows.chunks_exact_mut(width + FOREIGN).enumerate().filter(|(i, _)| weights[*i] != 0.0)
        {
            let length = 0.25 + (i % 7) as f64;
            for (k, to) in row[..width].iter_mut().enumerate() {
                *to = bf16::from_f64(length * value(i * width + k));
            }
        }
        rows
    };
    Case {
        loss: Contrastive { kind, pairs, width },
        images: rows(&|i| x[i]),
        texts: rows(&|i| 0.5 * x[i] + noise[i]),
        weights,
        scale: 2.5,
        bias: (kind == Sigmoid).then_some(-2.0),
        loss_scale: Some(0.125),
        ranked: true,
    }
}

/// Device memory that the operands of a case lie in.
struct Memory {
    images: Buffer<bf16>,
    texts: Buffer<bf16>,
    weights: Buffer<f32>,
    scale: Buffer<f32>,
    bias: Option<Buffer<f32>>,
    loss_scale: Option<Buffer<f32>>,
    per_pair: Buffer<f32>,
    dimages: Buffer<bf16>,
    dtexts: Buffer<bf16>,
    dscale: Buffer<f32>,
    dbias: Option<Buffer<f32>>,
    rank: Buffer<i32>,
    workspace: Buffer<u8>,
}

impl Memory {
    fn new(case: &Case, device: &Device) -> Self {
        let one = |x: f32| device.upload(&[x]).unwrap();
        let foreign = || device.upload(&vec![bf16::MAX; case.images.len()]).unwrap();
        Self {
            images: device.upload(&case.images).unwrap(),
            texts: device.upload(&case.texts).unwrap(),
            weights: device.upload(&case.weights).unwrap(),
            scale: one(case.scale),
            bias: case.bias.map(one),
            loss_scale: case.loss_scale.map(one),
            per_pair: device.alloc(case.loss.pairs).unwrap(),
            dimages: foreign(),
            dtexts: foreign(),
            dscale: device.alloc(1).unwrap(),
            dbias: case.bias.map(|_| device.alloc(1).unwrap()),
            rank: device.upload(&vec![99; case.loss.pairs]).unwrap(),
            workspace: device.alloc(case.loss.workspace().unwrap().bytes()).unwrap(),
        }
    }

    fn operands(&self, case: &Case) -> Operands<'_> {
        let stride = case.loss.width + FOREIGN;
        let rows = |buffer| Rows { buffer, offset: 0, stride };
        Operands {
            images: rows(&self.images),
            texts: rows(&self.texts),
            weights: &self.weights,
            scale: &self.scale,
            bias: self.bias.as_ref(),
            loss_scale: self.loss_scale.as_ref(),
            per_pair: &self.per_pair,
            dimages: rows(&self.dimages),
            dtexts: rows(&self.dtexts),
            dscale: &self.dscale,
            dbias: self.dbias.as_ref(),
            rank: case.ranked.then_some(&self.rank),
        }
    }
}

impl Case {
    fn run(&self, device: &Device) -> Answer {
        let stream = device.stream().unwrap();
        let memory = Memory::new(self, device);
        self.loss.launch(&stream, &memory.operands(self), &memory.workspace).unwrap();
        stream.synchronize().unwrap();
        Answer {
            per_pair: memory.per_pair.download().unwrap(),
            dimages: memory.dimages.download().unwrap(),
            dtexts: memory.dtexts.download().unwrap(),
            dscale: memory.dscale.download().unwrap()[0],
            dbias: memory.dbias.map(|dbias| dbias.download().unwrap()[0]),
            rank: memory.rank.download().unwrap(),
        }
    }

    fn dense(&self, rows: &[bf16]) -> Vec<f64> {
        let width = self.loss.width;
        rows.chunks_exact(width + FOREIGN).flat_map(|row| row[..width].iter().map(|x| x.to_f64())).collect()
    }

    #[track_caller]
    fn check(&self, got: &Answer) {
        let Contrastive { kind, pairs, width } = self.loss;
        let (images, texts) = (self.dense(&self.images), self.dense(&self.texts));
        let (mut per_pair, mut dscale, mut dbias) = (vec![0.0; pairs], 0.0, 0.0);
        let (mut dimages, mut dtexts) = (vec![0.0; images.len()], vec![0.0; images.len()]);
        let results = Results {
            per_pair: &mut per_pair,
            dimages: &mut dimages,
            dtexts: &mut dtexts,
            dscale: &mut dscale,
            dbias: Some(&mut dbias),
        };
        let loss_scale = f64::from(self.loss_scale.unwrap_or(1.0));
        let (scale, bias) = (f64::from(self.scale), self.bias.map(f64::from));
        contrastive(results, &images, &texts, scale, bias, &self.weights, kind, loss_scale);
        for (i, (&got, &want)) in got.per_pair.iter().zip(&per_pair).enumerate() {
            let error = (f64::from(got) - want).abs();
            assert!(error <= to::CONTRASTIVE * want.abs().max(1.0), "pair {i}: {got} instead of {want}");
        }
        for (name, got, want) in [("dimages", &got.dimages, &dimages), ("dtexts", &got.dtexts, &dtexts)] {
            alike(name, &self.dense(got), want, to::CONTRASTIVE_GRAD);
            for (i, row) in got.chunks_exact(width + FOREIGN).enumerate() {
                assert!(row[width..].iter().all(|&x| x == bf16::MAX), "{name}: foreign columns");
                let zeros = row[..width].iter().all(|x| x.to_bits() == 0);
                assert!(self.weights[i] != 0.0 || zeros, "{name}: pair {i} does not count");
            }
        }
        // A score has a gradient of at most its weight, which the sums of all may cancel to much less.
        let weights: f64 = self.weights.iter().map(|w| f64::from(*w)).sum::<f64>() * loss_scale;
        let size = match kind {
            Softmax => 2.0 * weights,
            Sigmoid => weights * self.weights.iter().filter(|w| **w != 0.0).count() as f64,
        };
        let close = |name: &str, got: f32, want: f64, unit: f64| {
            let error = (f64::from(got) - want).abs();
            assert!(error <= to::CONTRASTIVE_SUMS * size * unit, "{name}: {got} instead of {want} of {size}");
        };
        close("dscale", got.dscale, dscale, scale.exp());
        if let Some(got) = got.dbias {
            close("dbias", got, dbias, 1.0);
        }
        let ranks = retrieved(&images, &texts, &self.weights, width);
        assert_eq!(got.rank, if self.ranked { ranks } else { vec![99; pairs] });
    }
}

fn bits(answer: &Answer) -> (Vec<u32>, Vec<u16>, &[i32]) {
    let sums = [answer.dscale, answer.dbias.unwrap_or_default()];
    let single = answer.per_pair.iter().chain(&sums).map(|x| x.to_bits()).collect();
    let half = answer.dimages.iter().chain(&answer.dtexts).map(|x| x.to_bits()).collect();
    (single, half, &answer.rank)
}

#[test]
fn losses_of_every_size() {
    for device in devices() {
        // One pair; less and more than a tile; several tiles and splits of either side, with tails that nobody uses.
        for (pairs, used, width) in [
            (1, 1, 8),
            (6, 6, 64),
            (63, 63, 72),
            (64, 64, 16),
            (65, 65, 128),
            (130, 130, 24),
            (300, 150, 40),
            (530, 530, 8),
        ] {
            for kind in [Softmax, Sigmoid] {
                let mut case = case(kind, pairs, used, width);
                case.loss_scale = (pairs % 2 == 0).then_some(0.125);
                case.ranked = pairs != 6;
                case.check(&case.run(&device));
            }
        }
    }
}

#[test]
fn wide_vectors() {
    for device in devices() {
        case(Softmax, 20, 18, 4096).check(&case(Softmax, 20, 18, 4096).run(&device));
        case(Sigmoid, 20, 18, 1160).check(&case(Sigmoid, 20, 18, 1160).run(&device));
    }
}

#[test]
fn nothing_counts() {
    for device in devices() {
        for kind in [Softmax, Sigmoid] {
            let case = case(kind, 70, 0, 16);
            let answer = case.run(&device);
            assert!(answer.per_pair.iter().all(|x| *x == 0.0));
            assert_eq!((answer.dscale, answer.dbias.unwrap_or(0.0)), (0.0, 0.0));
            assert!(answer.rank.iter().all(|rank| *rank == -1));
            case.check(&answer);
        }
    }
}

/// As CLIP's at its highest: scores of ±100.
#[test]
fn far_scores() {
    for device in devices() {
        for kind in [Softmax, Sigmoid] {
            let mut case = case(kind, 80, 80, 16);
            case.scale = 100f32.ln();
            case.check(&case.run(&device));
        }
    }
}

#[test]
fn the_same_bits_whatever_lies_in_the_workspace() {
    for device in devices() {
        for kind in [Softmax, Sigmoid] {
            let case = case(kind, 200, 190, 72);
            let first = case.run(&device);
            let stream = device.stream().unwrap();
            let memory = Memory::new(&case, &device);
            memory.workspace.write(&stream, &vec![0x7f; memory.workspace.len()]).unwrap();
            case.loss.launch(&stream, &memory.operands(&case), &memory.workspace).unwrap();
            stream.synchronize().unwrap();
            let again = Answer {
                per_pair: memory.per_pair.download().unwrap(),
                dimages: memory.dimages.download().unwrap(),
                dtexts: memory.dtexts.download().unwrap(),
                dscale: memory.dscale.download().unwrap()[0],
                dbias: memory.dbias.as_ref().map(|dbias| dbias.download().unwrap()[0]),
                rank: memory.rank.download().unwrap(),
            };
            assert_eq!(bits(&first), bits(&again));
        }
    }
}

/// Texts that several images share rank by their number, and a text of NaN stands above all.
#[test]
fn equal_and_broken_texts() {
    for device in devices() {
        let mut case = case(Softmax, 140, 140, 16);
        let stride = 16 + FOREIGN;
        for i in [4, 68, 138] {
            let text: Vec<bf16> = case.texts[stride..][..16].to_vec();
            case.texts[i * stride..][..16].copy_from_slice(&text);
        }
        case.check(&case.run(&device));
        case.texts[3 * stride] = bf16::NAN;
        let answer = case.run(&device);
        assert!(answer.per_pair[0].is_nan() && answer.dscale.is_nan());
        let want = retrieved(&case.dense(&case.images), &case.dense(&case.texts), &case.weights, 16);
        assert_eq!(answer.rank, want);
        assert_eq!((answer.rank[2], answer.rank[3]), (-1, i32::MAX));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = devices().pop().unwrap();
    let stream = device.stream().unwrap();
    let says = |change: &dyn Fn(&mut Contrastive)| {
        let mut loss = Contrastive { kind: Softmax, pairs: 10, width: 16 };
        change(&mut loss);
        loss.workspace().unwrap_err().to_string()
    };
    assert_eq!(
        says(&|loss| loss.width = 20),
        format!("a contrastive loss has vectors of 20 columns, expected a multiple of 8 to {MAX_WIDTH}")
    );
    assert_eq!(says(&|loss| loss.pairs = 0), "a contrastive loss of 0 pairs is not possible; give 1 to 2^24");
    let case = case(Softmax, 10, 10, 16);
    let memory = Memory::new(&case, &device);
    let refused = |operands: &Operands<'_>, workspace: &Buffer<u8>| {
        case.loss.launch(&stream, operands, workspace).unwrap_err().to_string()
    };
    let mut operands = memory.operands(&case);
    operands.bias = Some(&memory.scale);
    assert_eq!(
        refused(&operands, &memory.workspace),
        "a softmax contrastive loss has a bias, which cancels; leave it out, or use sigmoid"
    );
    let operands = memory.operands(&case);
    let (short, bytes) = (device.alloc::<u8>(64).unwrap(), memory.workspace.len());
    assert_eq!(
        refused(&operands, &short),
        format!("the workspace has 64 bytes, expected at least {bytes}; ask for the size beforehand")
    );
    let mut operands = memory.operands(&case);
    operands.weights = &memory.scale;
    assert!(refused(&operands, &memory.workspace).starts_with("weights has 1 elements, expected 10"));
}
