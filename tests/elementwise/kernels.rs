//! The kernels of elementwise sums and GELU against the CPU device in f64, on inputs rounded to bf16.

use half::bf16;

use trencadis::cpu::elementwise as oracle;
use trencadis::cpu::gemm::gelu;
use trencadis::kernels::elementwise::{Add, Addend, Gelu, accumulate, accumulate_f32};
use trencadis::kernels::tolerance as to;
use trencadis::ops::GeluKind;

use crate::support::devices::devices;
use crate::support::numbers::{alike, close, random};
use crate::support::rounded::wide;

const ROWS: usize = 150;
const LIVE: usize = 141;

fn rounded(len: usize, seed: u64) -> Vec<bf16> {
    random::<f64>(len, seed).into_iter().map(bf16::from_f64).collect()
}

fn exact(x: &[bf16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

#[test]
fn sums_of_rows_and_of_a_row() {
    for device in devices() {
        for width in [8, 72, 200] {
            let stream = device.stream().unwrap();
            let sizes = Add { rows: ROWS, width };
            let [mut a, mut b] = [1, 2].map(|seed| rounded(ROWS * width, seed));
            a[LIVE * width..].fill(bf16::NAN);
            b[LIVE * width..].fill(bf16::NAN);
            let row: Vec<f32> = random(width, 3);
            let row_device = device.upload(&row).unwrap();
            let [a_device, b_device] = [&a, &b].map(|x| device.upload(x).unwrap());
            let live = device.upload(&[0, LIVE as i32]).unwrap();
            let out = device.upload(&vec![bf16::NAN; ROWS * width]).unwrap();
            let (rows, one) = (Addend::Rows(&b_device), Addend::Row(&row_device));
            sizes.launch(&stream, Some(&out), &a_device, one, Some((&live, 1))).unwrap();
            sizes.launch(&stream, None, &a_device, rows, Some((&live, 1))).unwrap();
            let all = device.upload(&rounded(ROWS * width, 4)).unwrap();
            sizes.launch(&stream, None, &all, Addend::Rows(&all), None).unwrap();
            stream.synchronize().unwrap();

            let check = |got: Vec<bf16>, add: &dyn Fn(&mut [f64])| {
                let mut want = exact(&a[..LIVE * width]);
                add(&mut want);
                // Sums of two, rounded to f32 and then to bf16.
                let want: Vec<bf16> = want.iter().map(|&x| bf16::from_f32(x as f32)).collect();
                assert_eq!(got[..LIVE * width], want);
                assert!(got[LIVE * width..].iter().all(|x| x.to_bits() == 0), "dead rows");
            };
            check(a_device.download().unwrap(), &|y| oracle::add(y, &exact(&b[..LIVE * width])));
            check(out.download().unwrap(), &|y| oracle::add_row(y, &wide(&row)));
            let twice: Vec<f64> = exact(&rounded(ROWS * width, 4)).iter().map(|x| 2.0 * x).collect();
            assert_eq!(exact(&all.download().unwrap()), twice);
            let missing = sizes.launch(&stream, None, &a_device, rows, Some((&live, 2)));
            assert!(missing.unwrap_err().to_string().contains("no entry 2"));
        }
    }
}

#[test]
fn gelu_of_rows() {
    for device in devices() {
        for (kind, width) in [(GeluKind::Erf, 8), (GeluKind::Tanh, 72), (GeluKind::Erf, 200)] {
            let stream = device.stream().unwrap();
            let sizes = Gelu { rows: ROWS, width, kind };
            // From one tail to the other.
            let mut x: Vec<bf16> =
                random::<f64>(ROWS * width, 7).into_iter().map(|x| bf16::from_f64(3.0 * x)).collect();
            x[..6].copy_from_slice(&[0.0, -0.0, 6.5, -6.5, 20.0, -20.0].map(bf16::from_f64));
            x[LIVE * width..].fill(bf16::NAN);
            let x_device = device.upload(&x).unwrap();
            let live = device.upload(&[0, LIVE as i32]).unwrap();
            let [y, all] = [(), ()].map(|()| device.upload(&vec![bf16::NAN; ROWS * width]).unwrap());
            sizes.launch(&stream, &y, &x_device, Some((&live, 1))).unwrap();
            sizes.launch(&stream, &all, &x_device, None).unwrap();
            stream.synchronize().unwrap();

            let (got, all) = (y.download().unwrap(), all.download().unwrap());
            assert!(got[LIVE * width..].iter().all(|y| y.to_bits() == 0), "dead rows");
            assert!(all[LIVE * width..].iter().all(|y| y.is_nan()), "all rows are live, and NaN stays");
            assert_eq!(got[..LIVE * width], all[..LIVE * width]);
            let mut want = vec![0.0; LIVE * width];
            gelu(&mut want, &exact(&x[..LIVE * width]), kind);
            let got = exact(&got[..LIVE * width]);
            alike("gelu", &got, &want, to::ROUNDED);
            close(&got, &want, to::GEMM_BF16);
            assert_eq!(x_device.download().unwrap()[..LIVE * width], x[..LIVE * width], "the operand stays");

            let missing = sizes.launch(&stream, &y, &x_device, Some((&live, 2)));
            assert!(missing.unwrap_err().to_string().contains("no entry 2"));
            let odd = Gelu { width: width + 1, ..sizes }.launch(&stream, &y, &x_device, None);
            assert!(odd.unwrap_err().to_string().contains("multiple of 8"));
        }
    }
}

#[test]
fn gradients_are_accumulated() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let x = rounded(3 * 72, 5);
        let x_device = device.upload(&x).unwrap();
        for (flag, start) in [(Some(1), 1.0), (Some(0), 0.0), (None, 0.0)] {
            let out = device.upload(&vec![1.0f32; x.len()]).unwrap();
            let flag = flag.map(|flag| device.upload(&[flag]).unwrap());
            accumulate(&stream, &out, &x_device, flag.as_ref()).unwrap();
            stream.synchronize().unwrap();
            let want: Vec<f32> = x.iter().map(|x| x.to_f32() + start).collect();
            assert_eq!(out.download().unwrap(), want);
        }
    }
}

#[test]
fn gradients_in_f32_are_accumulated() {
    for device in devices() {
        let stream = device.stream().unwrap();
        for len in [1, 3, 700] {
            let x: Vec<f32> = random(len, 6);
            let x_device = device.upload(&x).unwrap();
            for (flag, start) in [(Some(1), 1.0), (Some(0), 0.0), (None, 0.0)] {
                let out = device.upload(&vec![1.0f32; len]).unwrap();
                let flag = flag.map(|flag| device.upload(&[flag]).unwrap());
                accumulate_f32(&stream, &out, &x_device, flag.as_ref()).unwrap();
                stream.synchronize().unwrap();
                let want: Vec<f32> = x.iter().map(|x| x + start).collect();
                assert_eq!(out.download().unwrap(), want);
            }
            let short = device.alloc::<f32>(len + 1).unwrap();
            let refused = accumulate_f32(&stream, &short, &x_device, None).unwrap_err().to_string();
            assert!(
                refused.starts_with(&format!("out has {} elements, expected {len}", len + 1)),
                "{refused}"
            );
        }
    }
}
