//! The norm kernels against the CPU device in f64, on inputs rounded to bf16.

use half::bf16;

use trencadis::cpu::{norm as oracle, residual as residual_oracle};
use trencadis::device::{Buffer, Device};
use trencadis::kernels::Rows;
use trencadis::kernels::norm::{Norm, NormBackward, NormForward, backward_variant, partial_rows};
use trencadis::kernels::residual::{Branch, BranchGrad, Packed, Residual};
use trencadis::kernels::tolerance as to;
use trencadis::recipe::NormKind;

use crate::support::devices::devices;
use crate::support::numbers::{alike, random};
use crate::support::rounded::{FOREIGN, dense, rows, starts, untouched, wide};

/// Which operands there are.
#[derive(Clone, Copy)]
struct With {
    branch: bool,
    scale: bool,
    keep: bool,
    gain: bool,
    bias: bool,
    dresidual: bool,
}

const ALL: With = With { branch: true, scale: true, keep: true, gain: true, bias: true, dresidual: true };
const NONE: With =
    With { branch: false, scale: false, keep: false, gain: false, bias: false, dresidual: false };

#[derive(Clone)]
struct Case {
    norm: Norm,
    cu_seqlens: Vec<i32>,
    with: With,
    accumulate: bool,
    x: Vec<bf16>,
    branch: Vec<bf16>,
    dy: Vec<bf16>,
    dresidual: Vec<bf16>,
    keep: Vec<f32>,
    scale: Vec<f32>,
    gain: Vec<f32>,
    bias: Vec<f32>,
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    x_out: Vec<bf16>,
    y: Vec<bf16>,
    stats: Vec<f32>,
    dx: Vec<bf16>,
    dbranch: Vec<bf16>,
    dgain: Vec<f32>,
    dbias: Vec<f32>,
    dscale: Vec<f32>,
}

fn case(width: usize, lengths: &[usize], spare: usize, kind: NormKind, with: With) -> Case {
    let live: usize = lengths.iter().sum();
    let tokens = live + spare;
    let around =
        |mean: f32, seed| -> Vec<f32> { random::<f32>(width, seed).iter().map(|x| mean + 0.3 * x).collect() };
    let mut keep: Vec<f32> = (0..tokens).map(|t| [1.25, 0.0, 1.25][t / 3 % 3]).collect();
    keep[live..].fill(f32::NAN);
    Case {
        norm: Norm { tokens, width, kind, eps: 1e-5 },
        cu_seqlens: starts(lengths),
        with,
        accumulate: false,
        // Around 3, so that a mean that is not subtracted shows.
        x: rows(tokens, live, width, 3.0, 1),
        branch: rows(tokens, live, width, 0.0, 2),
        dy: rows(tokens, live, width, 0.1, 3),
        dresidual: rows(tokens, live, width, 0.0, 4),
        keep,
        scale: around(0.2, 5),
        gain: around(1.0, 6),
        bias: around(0.1, 7),
    }
}

impl Case {
    fn live(&self) -> usize {
        self.cu_seqlens[self.cu_seqlens.len() - 1] as usize
    }

    /// Runs forward and backward; `fused`: the residual connection by the norm's kernels, else by its own.
    fn run(&self, device: &Device, fused: bool) -> Answer {
        let Self { norm, with, .. } = self;
        let (tokens, width) = (norm.tokens, norm.width);
        let pitch = width + FOREIGN;
        let stream = device.stream().unwrap();
        let up = |x: &[bf16]| device.upload(x).unwrap();
        let up32 = |x: &[f32]| device.upload(x).unwrap();
        let room = || device.upload(&vec![bf16::MAX; tokens * pitch]).unwrap();
        let ones = || device.upload(&vec![1.0f32; width]).unwrap();
        let of = |buffer| Rows { buffer, offset: 0, stride: pitch };
        let (x, branch_rows, dy, dresidual) =
            (up(&self.x), up(&self.branch), up(&self.dy), up(&self.dresidual));
        let (keep, scale, gain, bias) =
            (up32(&self.keep), up32(&self.scale), up32(&self.gain), up32(&self.bias));
        let cu_seqlens = device.upload(&self.cu_seqlens).unwrap();
        let packed = Packed { cu_seqlens: &cu_seqlens, cu_seqlens_host: &self.cu_seqlens };
        let branch = Branch {
            rows: of(&branch_rows),
            scale: with.scale.then_some(&scale),
            keep: with.keep.then_some((&keep, 0)),
        };
        let (x_out, y, stats) = (room(), room(), device.alloc::<f32>(2 * tokens).unwrap());
        let residual = Residual { tokens, width };
        let mut forward = NormForward {
            x: of(&x),
            residual: (with.branch && fused).then_some((branch, of(&x_out))),
            gain: with.gain.then_some(&gain),
            bias: with.bias.then_some(&bias),
            y: of(&y),
            stats: &stats,
        };
        if with.branch && !fused {
            residual.forward(&stream, packed, of(&x_out), of(&x), branch).unwrap();
            forward.x = of(&x_out);
        }
        norm.forward(&stream, packed, &forward).unwrap();

        let (dx, dbranch) = (room(), room());
        let (dgain, dbias, dscale) = (ones(), ones(), ones());
        let flag = device.upload(&[i32::from(self.accumulate)]).unwrap();
        let grad = BranchGrad { dbranch: of(&dbranch), dscale: with.scale.then_some(&dscale) };
        let backward = NormBackward {
            dy: of(&dy),
            dresidual: with.dresidual.then_some(of(&dresidual)),
            x: if with.branch { of(&x_out) } else { of(&x) },
            stats: &stats,
            gain: with.gain.then_some(&gain),
            residual: (with.branch && fused).then_some((branch, grad)),
            dx: of(&dx),
            dgain: with.gain.then_some(&dgain),
            dbias: with.bias.then_some(&dbias),
            accumulate: Some(&flag),
        };
        let workspace = device.alloc::<u8>(norm.backward_workspace_bytes(device)).unwrap();
        norm.backward(&stream, packed, &backward, &workspace).unwrap();
        if with.branch && !fused {
            let workspace = device.alloc::<u8>(residual.backward_workspace_bytes()).unwrap();
            residual.backward(&stream, packed, of(&dx), branch, grad, Some(&flag), &workspace).unwrap();
        }
        Answer {
            x_out: x_out.download().unwrap(),
            y: y.download().unwrap(),
            stats: stats.download().unwrap(),
            dx: dx.download().unwrap(),
            dbranch: dbranch.download().unwrap(),
            dgain: dgain.download().unwrap(),
            dbias: dbias.download().unwrap(),
            dscale: dscale.download().unwrap(),
        }
    }

    fn check(&self, got: &Answer) {
        let Self { norm: Norm { width, kind, eps, .. }, with, .. } = *self;
        let live = self.live();
        let rows = |x: &[bf16]| dense(x, live, width);
        let keep = with.keep.then(|| wide(&self.keep[..live]));
        let [scale, gain, bias] =
            [(with.scale, &self.scale), (with.gain, &self.gain), (with.bias, &self.bias)]
                .map(|(given, x)| given.then(|| wide(x)));
        let mut x = rows(&self.x);
        let branch = rows(&self.branch);
        if with.branch {
            residual_oracle::forward(&mut x, &branch, scale.as_deref(), keep.as_deref(), width);
            alike("x_out", &rows(&got.x_out), &x, to::ROUNDED);
            untouched("x_out", &got.x_out, live, width);
            // What the norm read: the rounded sum.
            x = rows(&got.x_out);
        }
        let (mut y, mut stats) = (vec![0.0; x.len()], vec![0.0; 2 * live]);
        oracle::forward(&mut y, &mut stats, &x, gain.as_deref(), bias.as_deref(), width, kind, eps);
        alike("y", &rows(&got.y), &y, to::ROUNDED);
        untouched("y", &got.y, live, width);
        alike("stats", &wide(&got.stats[..2 * live]), &stats, to::SINGLE);
        assert!(got.stats[2 * live..].iter().all(|x| x.to_bits() == 0), "stats of dead rows");

        let stats = wide(&got.stats[..2 * live]);
        let start = if self.accumulate { 1.0 } else { 0.0 };
        let (mut dgain, mut dbias) = (vec![start; width], vec![start; width]);
        let mut dx = vec![0.0; x.len()];
        oracle::backward(
            &mut dx,
            Some(&mut dgain),
            Some(&mut dbias),
            &rows(&self.dy),
            &x,
            &stats,
            gain.as_deref(),
            width,
            kind,
        );
        if with.dresidual {
            dx.iter_mut().zip(rows(&self.dresidual)).for_each(|(dx, d)| *dx += d);
        }
        alike("dx", &rows(&got.dx), &dx, to::ROUNDED);
        untouched("dx", &got.dx, live, width);
        let mut dscale = vec![start; width];
        if with.branch {
            let mut dbranch = vec![0.0; x.len()];
            let (dx, dscale) = (rows(&got.dx), Some(&mut dscale[..]));
            let (scale, keep) = (scale.as_deref(), keep.as_deref());
            residual_oracle::backward(&mut dbranch, dscale, &dx, &branch, scale, keep, width);
            alike("dbranch", &rows(&got.dbranch), &dbranch, to::ROUNDED);
            untouched("dbranch", &got.dbranch, live, width);
        }
        for (name, got, want, wanted) in [
            ("dgain", &got.dgain, dgain, with.gain),
            ("dbias", &got.dbias, dbias, with.bias),
            ("dscale", &got.dscale, dscale, with.branch && with.scale),
        ] {
            match wanted {
                true => alike(name, &wide(got), &want, to::SUMMED),
                false => assert!(got.iter().all(|&x| x == 1.0), "{name}: no gradient of what is not there"),
            }
        }
    }
}

/// Every kernel, at its widest row and at one that fills it badly, alone and fused.
#[test]
fn every_width_and_kind() {
    let narrow = [8, 72, 192, 256, 264, 384, 520, 768, 1024, 1152, 1288, 1408, 1664, 2048];
    let wide = [2056, 4096, 4104, 6144, 6152, 8192];
    for device in devices() {
        for (i, &width) in narrow.iter().chain(&wide).enumerate() {
            let kinds = [NormKind::LayerNorm, NormKind::Rms];
            for (j, with) in [ALL, With { bias: i % 3 == 0, dresidual: true, ..NONE }].into_iter().enumerate()
            {
                let lengths: &[usize] = if width <= 2048 { &[5, 0, 9, 1, 0] } else { &[2, 0, 1] };
                let mut case = case(width, lengths, 3 + i % 2, kinds[(i + j) % 2], with);
                case.accumulate = j == 0;
                case.check(&case.run(&device, true));
            }
        }
    }
}

/// More rows than the grid of the backward pass takes in one turn, of a block with several groups and with one.
#[test]
fn blocks_take_turns() {
    for device in devices() {
        for (width, lengths) in [(64, [1500, 0, 2800]), (4104, [100, 0, 37])] {
            let case = case(width, &lengths, 5, NormKind::LayerNorm, ALL);
            let rows = partial_rows(case.norm.tokens, width, device.info().multiprocessors);
            assert!(rows * backward_variant(width).rows_of_block() < case.live());
            case.check(&case.run(&device, true));
        }
    }
}

/// Operands one by one.
#[test]
fn every_operand_may_be_missing() {
    let missing: [&dyn Fn(&mut With); 6] = [
        &|with| with.scale = false,
        &|with| with.keep = false,
        &|with| with.gain = false,
        &|with| with.bias = false,
        &|with| with.dresidual = false,
        &|with| *with = NONE,
    ];
    for device in devices() {
        for (i, remove) in missing.iter().enumerate() {
            let mut with = ALL;
            remove(&mut with);
            let kind = if i % 2 == 0 { NormKind::Rms } else { NormKind::LayerNorm };
            let case = case([64, 200, 776][i % 3], &[40, 0, 90, 70], [0, 1, 37][i % 3], kind, with);
            case.check(&case.run(&device, true));
        }
    }
}

/// The fused kernels against the norm and the residual connection by themselves: the same bits, but for the order
/// in which dscale is summed.
#[test]
fn fusing_changes_no_bit() {
    for device in devices() {
        for (width, kind) in [(200, NormKind::LayerNorm), (768, NormKind::Rms), (2056, NormKind::LayerNorm)] {
            let case = case(width, &[3, 0, 8], 2, kind, ALL);
            let (fused, mut apart) = (case.run(&device, true), case.run(&device, false));
            alike("dscale", &wide(&apart.dscale), &wide(&fused.dscale), to::SUMMED);
            apart.dscale.clone_from(&fused.dscale);
            assert_eq!(fused, apart);
        }
    }
}

/// The bits of an image, whatever it is packed with and wherever it lies, and whatever the order of threads.
#[test]
fn packing_and_order_change_no_bit() {
    let case = case(392, &[4, 0, 7, 30, 9], 5, NormKind::LayerNorm, ALL);
    let pitch = case.norm.width + FOREIGN;
    let mut first: Option<Answer> = None;
    for device in devices() {
        let all = case.run(&device, true);
        if device.info().driver.is_none() {
            let first = first.get_or_insert_with(|| all.clone());
            assert_eq!((&first.y, &first.dx, &first.dbranch), (&all.y, &all.dx, &all.dbranch));
        }
        assert_eq!(case.run(&device, true), all);
        for image in [0, 2, 4] {
            let range = case.cu_seqlens[image] as usize..case.cu_seqlens[image + 1] as usize;
            let mut alone = case.clone();
            alone.norm.tokens = range.len() + 1;
            alone.cu_seqlens = starts(&[1, range.len()]);
            for x in [&mut alone.x, &mut alone.branch, &mut alone.dy, &mut alone.dresidual] {
                *x = [&x[..pitch], &x[range.start * pitch..range.end * pitch]].concat();
            }
            alone.keep = [&case.keep[..1], &case.keep[range.clone()]].concat();
            let alone = alone.run(&device, true);
            for (alone, all) in [
                (&alone.x_out, &all.x_out),
                (&alone.y, &all.y),
                (&alone.dx, &all.dx),
                (&alone.dbranch, &all.dbranch),
            ] {
                assert_eq!(alone[pitch..], all[range.start * pitch..range.end * pitch]);
            }
        }
    }
}

/// Results may take the place of operands.
#[test]
fn in_place() {
    for device in devices() {
        let case = case(264, &[6, 3], 2, NormKind::Rms, ALL);
        let want = case.run(&device, true);
        let Norm { tokens, width, .. } = case.norm;
        fn of(buffer: &Buffer<bf16>) -> Rows<'_, bf16> {
            Rows { buffer, offset: 0, stride: 264 + FOREIGN }
        }
        let stream = device.stream().unwrap();
        let (x, branch) = (device.upload(&case.x).unwrap(), device.upload(&case.branch).unwrap());
        let (keep, scale) = (device.upload(&case.keep).unwrap(), device.upload(&case.scale).unwrap());
        let (gain, y) =
            (device.upload(&case.gain).unwrap(), device.zeros::<bf16>(tokens * (width + FOREIGN)).unwrap());
        let stats = device.alloc::<f32>(2 * tokens).unwrap();
        let cu_seqlens = device.upload(&case.cu_seqlens).unwrap();
        let packed = Packed { cu_seqlens: &cu_seqlens, cu_seqlens_host: &case.cu_seqlens };
        let branch = Branch { rows: of(&branch), scale: Some(&scale), keep: Some((&keep, 0)) };
        let forward = NormForward {
            x: of(&x),
            residual: Some((branch, of(&x))),
            gain: Some(&gain),
            bias: None,
            y: of(&y),
            stats: &stats,
        };
        case.norm.forward(&stream, packed, &forward).unwrap();
        let live = case.live();
        assert_eq!(dense(&x.download().unwrap(), live, width), dense(&want.x_out, live, width));
        let workspace = device.alloc::<u8>(case.norm.backward_workspace_bytes(&device)).unwrap();
        for over_dy in [true, false] {
            let (dy, dresidual) = (device.upload(&case.dy).unwrap(), device.upload(&case.dresidual).unwrap());
            let backward = NormBackward {
                dy: of(&dy),
                dresidual: Some(of(&dresidual)),
                x: of(&x),
                stats: &stats,
                gain: Some(&gain),
                residual: None,
                dx: if over_dy { of(&dy) } else { of(&dresidual) },
                dgain: None,
                dbias: None,
                accumulate: None,
            };
            case.norm.backward(&stream, packed, &backward, &workspace).unwrap();
            let dx = if over_dy { &dy } else { &dresidual }.download().unwrap();
            assert_eq!(dense(&dx, live, width), dense(&want.dx, live, width));
        }
    }
}

/// Σx² − nμ² in f32 would lose everything here.
#[test]
fn a_large_mean_does_not_cancel() {
    for device in devices() {
        let with = With { gain: true, ..NONE };
        let mut case = case(192, &[4], 0, NormKind::LayerNorm, with);
        // Spacing of bf16 at 4096 is 32.
        case.x.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(4096.0 + 32.0 * (i % 3) as f32));
        case.check(&case.run(&device, true));
    }
}

#[test]
fn unsupported_shapes_are_told() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let rows = device.zeros::<bf16>(2 * 72).unwrap();
        let stats = device.zeros::<f32>(4).unwrap();
        let cu_seqlens = device.upload(&[0, 2]).unwrap();
        let says = |norm: Norm, host: &[i32], stride: usize| {
            let of = Rows { buffer: &rows, offset: 0, stride };
            let packed = Packed { cu_seqlens: &cu_seqlens, cu_seqlens_host: host };
            let args = NormForward { x: of, residual: None, gain: None, bias: None, y: of, stats: &stats };
            norm.forward(&stream, packed, &args).unwrap_err().to_string()
        };
        let norm = Norm { tokens: 2, width: 64, kind: NormKind::Rms, eps: 1e-6 };
        assert!(says(Norm { width: 60, ..norm }, &[0, 2], 72).contains("multiple of 8 to 8192"));
        assert!(says(Norm { width: 8200, ..norm }, &[0, 2], 72).contains("rows of 8200 elements"));
        assert!(says(Norm { tokens: 0, ..norm }, &[0, 2], 72).contains("0 rows"));
        assert!(says(Norm { tokens: 3, ..norm }, &[0, 2], 72).contains("do not fit"));
        assert!(says(norm, &[0, 3], 72).contains("beyond the 2 token rows"));
        assert!(says(norm, &[], 72).contains("cu_seqlens"));
        assert!(says(norm, &[0, 2], 56).contains("overlap"));

        // A view that begins where a number may lie, and not where 16 bytes are read.
        let room = device.zeros::<f32>(65).unwrap();
        let shifted = room.view::<f32>(4..4 * 65).unwrap();
        let of = Rows { buffer: &rows, offset: 0, stride: 72 };
        let good = NormForward { x: of, residual: None, gain: None, bias: None, y: of, stats: &stats };
        let packed = Packed { cu_seqlens: &cu_seqlens, cu_seqlens_host: &[0, 2] };
        let says = |bad| norm.forward(&stream, packed, &bad).unwrap_err().to_string();
        for (bad, name) in [
            (NormForward { gain: Some(&shifted), ..good }, "gain lies at"),
            (NormForward { bias: Some(&shifted), ..good }, "bias lies at"),
        ] {
            let told = says(bad);
            assert!(told.contains(name) && told.contains("a multiple of 16 bytes"), "{told}");
        }
        let told = says(NormForward { stats: &room.view::<f32>(4..20).unwrap(), ..good });
        assert!(told.contains("stats lies at") && told.contains("a multiple of 8 bytes"), "{told}");
    }
}
