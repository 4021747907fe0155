//! The residual kernels against the CPU device in f64, on inputs rounded to bf16, and the factors of stochastic
//! depth against those of the host, bit for bit.

use half::bf16;

use trencadis::cpu::residual as oracle;
use trencadis::device::Device;
use trencadis::kernels::Rows;
use trencadis::kernels::residual::{
    Branch, BranchGrad, DropPath, DropPathKeys, DropPathRate, KeepParams, Packed, Residual, launch_keep,
};
use trencadis::kernels::tolerance as to;
use trencadis::rng::Stream;

use crate::support::devices::devices;
use crate::support::numbers::{alike, random};
use crate::support::rounded::{FOREIGN, dense, rows, starts, untouched, wide};

/// Whether there is a scale, whether a keep, whether gradients are added to.
fn check(
    device: &Device,
    width: usize,
    lengths: &[usize],
    spare: usize,
    [scaled, kept, accumulate]: [bool; 3],
) {
    let host = starts(lengths);
    let live = host[lengths.len()] as usize;
    let tokens = live + spare;
    let residual = Residual { tokens, width };
    let [x, f, dout] = [1, 2, 3].map(|seed| rows(tokens, live, width, 0.1, seed));
    let scale: Vec<f32> = random(width, 4);
    // The second of two branches.
    let mut keep: Vec<f32> = (0..2 * tokens).map(|t| [1.25, 0.0, 1.25][t / 3 % 3]).collect();
    keep[..tokens].fill(f32::NAN);
    keep[tokens + live..].fill(f32::NAN);

    let stream = device.stream().unwrap();
    let up = |x: &[bf16]| device.upload(x).unwrap();
    let room = || up(&vec![bf16::MAX; x.len()]);
    let of = |buffer| Rows { buffer, offset: 0, stride: width + FOREIGN };
    let (x_device, f_device, dout_device) = (up(&x), up(&f), up(&dout));
    let (scale_device, keep_device) = (device.upload(&scale).unwrap(), device.upload(&keep).unwrap());
    let cu_seqlens = device.upload(&host).unwrap();
    let packed = Packed { cu_seqlens: &cu_seqlens, cu_seqlens_host: &host };
    let branch = Branch {
        rows: of(&f_device),
        scale: scaled.then_some(&scale_device),
        keep: kept.then_some((&keep_device, 1)),
    };
    let (out, dbranch) = (room(), room());
    residual.forward(&stream, packed, of(&out), of(&x_device), branch).unwrap();
    // In place as well.
    residual.forward(&stream, packed, of(&x_device), of(&x_device), branch).unwrap();
    let dscale = device.upload(&vec![1.0f32; width]).unwrap();
    let flag = device.upload(&[i32::from(accumulate)]).unwrap();
    let workspace = device.alloc::<u8>(residual.backward_workspace_bytes()).unwrap();
    let grad = BranchGrad { dbranch: of(&dbranch), dscale: scaled.then_some(&dscale) };
    residual.backward(&stream, packed, of(&dout_device), branch, grad, Some(&flag), &workspace).unwrap();

    let of = |x: &[bf16]| dense(x, live, width);
    let (scale, keep) = (scaled.then(|| wide(&scale)), kept.then(|| wide(&keep[tokens..tokens + live])));
    let mut want = of(&x);
    oracle::forward(&mut want, &of(&f), scale.as_deref(), keep.as_deref(), width);
    let out = out.download().unwrap();
    alike("out", &of(&out), &want, to::ROUNDED);
    untouched("out", &out, live, width);
    assert_eq!(of(&x_device.download().unwrap()), of(&out), "in place");

    let start = if accumulate { 1.0 } else { 0.0 };
    let (mut want, mut want_scale) = (vec![0.0; live * width], vec![start; width]);
    let want_dscale = scaled.then_some(&mut want_scale[..]);
    oracle::backward(&mut want, want_dscale, &of(&dout), &of(&f), scale.as_deref(), keep.as_deref(), width);
    let dbranch = dbranch.download().unwrap();
    alike("dbranch", &of(&dbranch), &want, to::ROUNDED);
    untouched("dbranch", &dbranch, live, width);
    let dscale = dscale.download().unwrap();
    match scaled {
        true => alike("dscale", &wide(&dscale), &want_scale, to::SUMMED),
        false => assert!(dscale.iter().all(|&x| x == 1.0), "no gradient of what is not there"),
    }
}

#[test]
fn forward_and_backward() {
    for device in devices() {
        check(&device, 8, &[5, 0, 9], 0, [true, true, false]);
        check(&device, 72, &[100, 0, 0, 300, 57], 60, [true, true, true]);
        check(&device, 192, &[30], 3, [false, true, false]);
        check(&device, 200, &[0, 31], 1, [true, false, false]);
        check(&device, 1280, &[6, 5], 2, [false, false, true]);
        check(&device, 64, &[0], 20, [true, true, false]);
    }
}

/// Factors of all branches as the host draws them.
fn host_keep(rates: &[f64], seed: u64, epochs: &[u64], samples: &[u64], lengths: &[usize]) -> Vec<f32> {
    let mut keep = Vec::new();
    for (branch, &rate) in rates.iter().enumerate() {
        for ((&epoch, &sample), &length) in epochs.iter().zip(samples).zip(lengths) {
            let mut stream = Stream::drop_path(seed, epoch, sample, branch as u32);
            let dropped = f64::from(stream.uniform()) < rate;
            keep.extend(std::iter::repeat_n(if dropped { 0.0 } else { (1.0 / (1.0 - rate)) as f32 }, length));
        }
    }
    keep
}

#[test]
fn drop_path_is_that_of_the_host() {
    let lengths: Vec<usize> = (0..60).map(|i| [1, 0, 3, 2, 150][i % 5]).collect();
    let images = lengths.len();
    let live: usize = lengths.iter().sum();
    let rates = [0.0, 0.5, 0.1, 1.0 / 3.0, 0.9];
    let epochs: Vec<u64> = (0..images as u64).map(|i| i % 3 + (i % 2) * 0xffff_0000).collect();
    let samples: Vec<u64> = (0..images as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    let host = starts(&lengths);
    for device in devices() {
        for (seed, spare) in [(7, 0), (0xdead_beef_0123_4567, 9)] {
            let drop_path = DropPath { tokens: live + spare, branches: rates.len() };
            let stream = device.stream().unwrap();
            let cu_seqlens = device.upload(&host).unwrap();
            let packed = Packed { cu_seqlens: &cu_seqlens, cu_seqlens_host: &host };
            let keep = device.alloc::<f32>(rates.len() * (live + spare)).unwrap();
            let of_kernel = device.upload(&rates.map(DropPathRate::new)).unwrap();
            let keys = DropPathKeys {
                seed: &device.upload(&[seed]).unwrap(),
                epochs: &device.upload(&epochs).unwrap(),
                sample_ids: &device.upload(&samples).unwrap(),
            };
            drop_path.keep(&stream, packed, &keep, &of_kernel, keys).unwrap();
            let want = host_keep(&rates, seed, &epochs, &samples, &lengths);
            for (got, want) in keep.download().unwrap().chunks(live + spare).zip(want.chunks(live)) {
                assert_eq!(&got[..live], want);
                assert!(got[live..].iter().all(|x| x.to_bits() == 0));
            }
        }
    }
}

/// With the threshold at the host's number an image stays, one above it goes: all 24 bits are the same.
#[test]
fn numbers_of_the_device_are_those_of_the_host() {
    const BRANCHES: usize = 48;
    for device in devices() {
        let (seed, epoch, sample, first) = (0x0123_4567_89ab_cdef_u64, 3, 1_u64 << 40 | 12_345, 100);
        let numbers: Vec<u32> = (0..BRANCHES as u32)
            .map(|branch| Stream::drop_path(seed, epoch, sample, first + branch).bits() >> 8)
            .collect();
        for above in [0, 1] {
            let rates: Vec<DropPathRate> =
                numbers.iter().map(|m| DropPathRate { threshold: m + above, kept: 2.0 }).collect();
            let stream = device.stream().unwrap();
            let keep = device.alloc::<f32>(BRANCHES).unwrap();
            let rates = device.upload(&rates).unwrap();
            let keys = [seed, epoch, sample].map(|key| device.upload(&[key]).unwrap());
            let cu_seqlens = device.upload(&[0, 1]).unwrap();
            let params = KeepParams {
                keep: keep.ptr(),
                rates: rates.ptr(),
                seed: keys[0].ptr(),
                epochs: keys[1].ptr(),
                sample_ids: keys[2].ptr(),
                cu_seqlens: cu_seqlens.ptr(),
                tokens: 1,
                images: 1,
                first_branch: first as i32,
            };
            unsafe { launch_keep(device.kernels(), stream.raw(), &params, BRANCHES as u32).unwrap() };
            let want = if above == 0 { 2.0 } else { 0.0 };
            assert_eq!(keep.download().unwrap(), [want; BRANCHES]);
        }
    }
}

#[test]
fn unsupported_shapes_are_told() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let rows = device.zeros::<bf16>(64).unwrap();
        let keep = device.zeros::<f32>(4).unwrap();
        let host = [0, 4];
        let cu_seqlens = device.upload(&host).unwrap();
        let packed = Packed { cu_seqlens: &cu_seqlens, cu_seqlens_host: &host };
        let of = Rows::dense(&rows, 16);
        let says = |residual: Residual, branch| {
            let branch = Branch { rows: of, scale: None, keep: Some((&keep, branch)) };
            residual.forward(&stream, packed, of, of, branch).unwrap_err().to_string()
        };
        assert!(says(Residual { tokens: 4, width: 12 }, 0).contains("multiple of 8"));
        assert!(says(Residual { tokens: 0, width: 16 }, 0).contains("0 rows"));
        assert!(says(Residual { tokens: 1 << 24, width: 16 }, 0).contains("rows of 16 elements"));
        assert!(says(Residual { tokens: 4, width: 16 }, 1).contains("too few for branch 1 of 4 tokens"));
        assert!(says(Residual { tokens: 5, width: 16 }, 0).contains("too few for branch 0"));
        assert!(says(Residual { tokens: 3, width: 16 }, 0).contains("beyond the 3 token rows"));
        let rates = device.upload(&[DropPathRate::new(0.5)]).unwrap();
        let key = device.zeros::<u64>(1).unwrap();
        let keys = DropPathKeys { seed: &key, epochs: &key, sample_ids: &key };
        let says = |tokens, branches| {
            let drop_path = DropPath { tokens, branches };
            drop_path.keep(&stream, packed, &keep, &rates, keys).unwrap_err().to_string()
        };
        assert!(says(4, 0).contains("0 branches"));
        assert!(says(4, 2).contains("keep has 4 elements, expected 8"));
    }
}
