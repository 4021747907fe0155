//! The kernels of patches against the CPU device.

use half::bf16;

use trencadis::cpu::patch as oracle;
use trencadis::data::batch::{PREFIX, Patches};
use trencadis::device::Device;
use trencadis::kernels::Rows;
use trencadis::kernels::patch::{Normalise, Pixels, Prefix, factors, row_stride};
use trencadis::kernels::tolerance as to;

use crate::support::devices::devices;
use crate::support::numbers::alike;
use crate::support::numbers::random;
use crate::support::rounded::{FOREIGN, dense, rows, starts, wide};

const LIVE: usize = 133;
const TOKENS: usize = 150;
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// What is in a batch beside pixels: two prefix tokens at the beginning of each of three images.
fn positions() -> Vec<[u16; 2]> {
    (0..TOKENS)
        .map(|t| if [0, 1, 50, 51, 51 + 60, 52 + 60].contains(&t) { PREFIX } else { [t as u16 % 9, 3] })
        .collect()
}

fn normalise(device: &Device, channels: usize, side: usize, mean: &[f32], std: &[f32], pixels: &Patches) {
    let width = channels * side * side;
    let (sizes, stride) =
        (Normalise { tokens: TOKENS, images: 4, channels, plane: side * side }, row_stride(width));
    let stream = device.stream().unwrap();
    let host = [0, 50, 51 + 60, LIVE as i32, LIVE as i32];
    let cu_seqlens = device.upload(&host).unwrap();
    let places: Vec<u16> = positions().into_iter().flatten().collect();
    let places = device.upload(&places).unwrap();
    let out = device.upload(&vec![bf16::NAN; TOKENS * stride]).unwrap();
    let rows = Rows::dense(&out, stride);
    match pixels {
        Patches::U8(pixels) => {
            let pixels = device.upload(pixels).unwrap();
            let factors = device.upload(&factors(mean, std, channels).unwrap()).unwrap();
            let pixels = Pixels::U8(&pixels, &factors);
            sizes.launch(&stream, rows, pixels, &places, &cu_seqlens, &host).unwrap();
        }
        Patches::F32(values) => {
            let values = device.upload(values).unwrap();
            let values = Pixels::F32(&values);
            sizes.launch(&stream, rows, values, &places, &cu_seqlens, &host).unwrap();
        }
        Patches::Pictures(_) => panic!("tests/view is about pictures"),
    }
    stream.synchronize().unwrap();
    let got = out.download().unwrap();
    let mut want = vec![0f32; LIVE * width];
    oracle::normalise(&mut want, pixels, &positions()[..LIVE], mean, std, width);
    for (t, row) in got.chunks_exact(stride).enumerate() {
        let (row, padding) = row.split_at(width);
        assert!(padding.iter().all(|x| x.to_bits() == 0), "columns after the patch");
        match want.chunks_exact(width).nth(t) {
            Some(want) => {
                let want: Vec<bf16> = want.iter().map(|&x| bf16::from_f32(x)).collect();
                assert_eq!(row, want, "row {t} of {channels}x{side}x{side}");
            }
            None => assert!(row.iter().all(|x| x.to_bits() == 0), "row {t} holds no token"),
        }
    }
}

#[test]
fn patches_of_every_width_are_those_of_the_cpu() {
    for device in devices() {
        for (channels, side) in [(3, 16), (3, 14), (1, 14), (3, 7), (3, 1), (4, 2)] {
            let width = channels * side * side;
            let pixels: Vec<u8> = (0..TOKENS * width).map(|i| (i * 37 % 256) as u8).collect();
            let (mean, std): (&[f32], &[f32]) = if channels == 3 { (&MEAN, &STD) } else { (&[0.5], &[0.25]) };
            normalise(&device, channels, side, mean, std, &Patches::U8(pixels));
            let mut values: Vec<f32> = random(TOKENS * width, 3);
            values[LIVE * width..].fill(f32::NAN);
            for t in (0..TOKENS).filter(|&t| positions()[t] == PREFIX) {
                values[t * width..][..width].fill(f32::NAN);
            }
            normalise(&device, channels, side, &[0.5], &[0.5], &Patches::F32(values));
        }
    }
}

/// Images of these tokens: some have no room for all prefix tokens; more than one block adds up.
fn lengths() -> Vec<usize> {
    let mut lengths = vec![7, 0, 1, 30, 2, 3, 0];
    lengths.extend([4; 150]);
    lengths.push(0);
    lengths
}

#[test]
fn prefix_tokens_are_written_and_their_gradient_is_summed() {
    let host = starts(&lengths());
    let images = host.len() - 1;
    let live = host[images] as usize;
    let tokens = live + 9;
    for device in devices() {
        for (prefix, width, accumulate) in [(1, 72, false), (3, 200, true)] {
            let stream = device.stream().unwrap();
            let sizes = Prefix { rows: tokens, images, prefix, width };
            let pitch = width + FOREIGN;
            let learned: Vec<f32> = random(prefix * width, 1);
            let x = rows(tokens, live, width, 0.0, 2);
            let cu_seqlens = device.upload(&host).unwrap();
            let written = device.upload(&x).unwrap();
            let learned_device = device.upload(&learned).unwrap();
            let at = |buffer| Rows { buffer, offset: 0, stride: pitch };
            sizes.write(&stream, at(&written), &learned_device, &cu_seqlens, &host).unwrap();
            let dx = device.upload(&x).unwrap();
            let dtokens = device.upload(&vec![2.0f32; prefix * width]).unwrap();
            let flag = device.upload(&[i32::from(accumulate)]).unwrap();
            let workspace = device.alloc::<u8>(sizes.workspace_bytes()).unwrap();
            sizes
                .grad(&stream, at(&dx), Some(&dtokens), Some(&flag), &cu_seqlens, &host, &workspace)
                .unwrap();
            let zeroed = device.upload(&x).unwrap();
            let none = device.alloc::<u8>(0).unwrap();
            sizes.grad(&stream, at(&zeroed), None, None, &cu_seqlens, &host, &none).unwrap();
            stream.synchronize().unwrap();

            let mut want = dense(&x, live, width);
            let rounded: Vec<f64> = learned.iter().map(|&x| bf16::from_f32(x).to_f64()).collect();
            oracle::write_prefix(&mut want, &rounded, &host, prefix, width);
            let written = written.download().unwrap();
            assert_eq!(dense(&written, live, width), want);
            // Nothing else is touched.
            let rest = |x: &[bf16]| x.iter().skip(live * pitch).map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(rest(&written), rest(&x));
            let foreign =
                |x: &[bf16]| x.chunks_exact(pitch).flat_map(|r| r[width..].to_vec()).collect::<Vec<_>>();
            assert_eq!(foreign(&written)[..live * FOREIGN], foreign(&x)[..live * FOREIGN]);

            let mut want_dx = dense(&x, live, width);
            let mut want = vec![if accumulate { 2.0 } else { 0.0 }; prefix * width];
            oracle::write_prefix_grad(&mut want_dx, Some(&mut want), &host, prefix, width);
            let dx = dx.download().unwrap();
            assert_eq!(dense(&dx, live, width), want_dx);
            assert_eq!(dense(&zeroed.download().unwrap(), live, width), want_dx);
            assert_eq!(rest(&dx), rest(&x));
            alike("dtokens", &wide(&dtokens.download().unwrap()), &want, to::SINGLE);
        }
    }
}

#[test]
fn bad_operands_are_told() {
    let Some(device) = devices().into_iter().next() else { return };
    let stream = device.stream().unwrap();
    let sizes = Normalise { tokens: 4, images: 1, channels: 3, plane: 196 };
    let (out, pixels) = (device.zeros::<bf16>(4 * 592).unwrap(), device.zeros::<u8>(4 * 588).unwrap());
    let (factors, places) = (device.zeros::<f32>(6).unwrap(), device.zeros::<u16>(8).unwrap());
    let cu_seqlens = device.upload(&[0, 4]).unwrap();
    let launch = |stride, host: &[i32]| {
        let rows = Rows { buffer: &out, offset: 0, stride };
        let pixels = Pixels::U8(&pixels, &factors);
        sizes.launch(&stream, rows, pixels, &places, &cu_seqlens, host).map_err(|e| e.to_string())
    };
    assert_eq!(launch(592, &[0, 4]), Ok(()));
    stream.synchronize().unwrap();
    assert!(launch(588, &[0, 4]).unwrap_err().contains("multiples of 8"));
    assert!(launch(584, &[0, 4]).unwrap_err().contains("overlap"));
    assert!(launch(600, &[0, 4]).unwrap_err().contains("do not fit"));
    assert!(launch(592, &[0, 5]).unwrap_err().contains("beyond the 4 token rows"));
}
