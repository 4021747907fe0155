//! The epilogues of the backward pass: the slope of GELU with the gradient of the bias, sums in f32, and
//! column sums.

use half::bf16;

use trencadis::cpu::gemm as oracle;
use trencadis::device::Device;
use trencadis::kernels::gemm::{BiasGrad, Epilogue, GeluGrad, Kind, Layout, Matrix, Plan, Sum, Vector, raw};
use trencadis::recipe::GeluKind;

use crate::product::{
    BF16, F32, FOREIGN, Product, UNTOUCHED, alike, alike_beside, laid_out, optional, rounded, tiles, wide,
    with_tile, written,
};
use crate::support::devices::devices;
use crate::support::numbers::random;

/// A gradient's flag: not there, overwrite, add.
const FLAGS: [Option<i32>; 3] = [None, Some(0), Some(1)];

fn adds(flag: Option<i32>) -> f64 {
    if flag == Some(1) { 1.0 } else { 0.0 }
}

/// Runs and compares with f64; returns bits of the result and of the column sums.
#[track_caller]
pub fn slope(
    device: &Device,
    product: &Product,
    plan: &Plan,
    kind: GeluKind,
    bias: bool,
    flag: Option<i32>,
) -> (Vec<u16>, Vec<u32>) {
    let (m, n) = (product.shape.m, product.shape.n);
    let live = if product.shape.layout == Layout::Tn { m } else { product.live.unwrap_or(m).min(m) };
    let pre = rounded(m * n, 5);
    let mut want = product.value.clone();
    oracle::gelu_grad(&mut want, &wide(&pre), kind);
    want[live * n..].fill(0.0);
    let before: Vec<f32> = random(n, 6);
    let mut want_bias: Vec<f64> = before.iter().map(|&x| f64::from(x) * adds(flag)).collect();
    oracle::bias_grad(&mut want_bias, &want);

    let operands = product.upload(device);
    let out = device.upload(&vec![bf16::from_f32(UNTOUCHED); m * (n + FOREIGN)]).unwrap();
    let pre = device.upload(&laid_out(&pre, [m, n], live, bf16::NAN)).unwrap();
    let db = device.upload(&before).unwrap();
    let accumulate = flag.map(|flag| device.upload(&[flag]).unwrap());
    let epilogue = Epilogue::GeluGrad(GeluGrad {
        out: Matrix::of(&out, 0, n + FOREIGN),
        pre: Matrix::of(&pre, 0, n + FOREIGN),
        gelu: kind,
        bias_grad: if bias { Vector::from(&db) } else { Vector::none() },
        accumulate: optional(&accumulate),
    });
    operands.run(device, &epilogue, plan);

    let name = format!("{:?} {plan:?} {kind:?} {flag:?}", product.shape);
    let (out, db) = (out.download().unwrap(), db.download().unwrap());
    // The slope has an error of its own, which counts where it is nearly 0.
    let largest = product.value.iter().fold(1.0f64, |largest, x| largest.max(x.abs()));
    alike_beside(&name, &written(&out, [m, n]), &want, BF16, 4e-5 * largest);
    if bias {
        let scale = 1.0 + (live as f64).sqrt() * (product.shape.k as f64).sqrt();
        for (got, want) in db.iter().zip(&want_bias) {
            assert!((f64::from(*got) - want).abs() <= 1e-4 * scale, "{name}: bias {got} instead of {want}");
        }
    } else {
        assert_eq!(db, before, "{name}");
    }
    (out.iter().map(|x| x.to_bits()).collect(), db.iter().map(|x| x.to_bits()).collect())
}

#[test]
fn slope_of_gelu_with_the_gradient_of_the_bias() {
    for device in devices() {
        for tile in tiles(&device, Kind::GeluGrad) {
            for (i, layout) in Layout::ALL.into_iter().enumerate() {
                for (j, [m, n, k]) in [[1usize, 8, 8], [200, 136, 72], [129, 72, 40]].into_iter().enumerate()
                {
                    let m = if layout == Layout::Tn { m.next_multiple_of(8) } else { m };
                    let product = Product::new(layout, [m, n, k], (j == 2).then_some(k.min(33)));
                    let kind = if (i + j) % 2 == 0 { GeluKind::Erf } else { GeluKind::Tanh };
                    slope(&device, &product, &with_tile(tile), kind, true, FLAGS[(i + j) % 3]);
                }
                slope(
                    &device,
                    &Product::new(layout, [72, 72, 40], Some(0)),
                    &with_tile(tile),
                    GeluKind::Erf,
                    true,
                    Some(1),
                );
            }
            let product = Product::new(Layout::Nn, [70, 72, 40], None);
            slope(&device, &product, &with_tile(tile), GeluKind::Tanh, false, Some(1));
        }
    }
}

/// Runs and compares with f64, and the sums of squares with the result; returns the bits of both.
#[track_caller]
pub fn sum(device: &Device, product: &Product, plan: &Plan, flag: Option<i32>) -> (Vec<u32>, Vec<u64>) {
    let (m, n) = (product.shape.m, product.shape.n);
    let before: Vec<f32> = random(m * n, 7);
    let want: Vec<f64> =
        product.value.iter().zip(&before).map(|(x, y)| x + f64::from(*y) * adds(flag)).collect();
    let operands = product.upload(device);
    let out = device.upload(&laid_out(&before, [m, n], m, UNTOUCHED)).unwrap();
    let accumulate = flag.map(|flag| device.upload(&[flag]).unwrap());
    let count = raw::square_sums(plan, m, n);
    let squares = device.upload(&[vec![f64::NAN; count], vec![-1.0]].concat()).unwrap();
    let epilogue = Epilogue::Sum(Sum {
        out: Matrix::of(&out, 0, n + FOREIGN),
        accumulate: optional(&accumulate),
        squares: Vector::from(&squares),
    });
    operands.run(device, &epilogue, plan);
    let name = format!("{:?} {plan:?} {flag:?}", product.shape);
    let (out, squares) = (out.download().unwrap(), squares.download().unwrap());
    let result = written(&out, [m, n]);
    alike(&name, &result, &want, F32);
    let (squared, norm): (f64, f64) = (squares[..count].iter().sum(), result.iter().map(|x| x * x).sum());
    assert!((squared - norm).abs() <= 1e-7 * norm, "{name}: {squared} instead of {norm}");
    assert_eq!(squares[count], -1.0, "{name}");
    (out.iter().map(|x| x.to_bits()).collect(), squares.iter().map(|x| x.to_bits()).collect())
}

/// A product that is asked for no squares leaves none.
#[test]
fn squares_are_optional() {
    for device in devices() {
        for splits in [1, 2] {
            let product = Product::new(Layout::Tn, [72, 64, 200], None);
            let out = device.zeros::<f32>(72 * 64).unwrap();
            let (out, accumulate, squares) = (Matrix::of(&out, 0, 64), Vector::none(), Vector::none());
            let plan = Plan { splits, ..with_tile(tiles(&device, Kind::Sum)[0]) };
            product.upload(&device).run(&device, &Epilogue::Sum(Sum { out, accumulate, squares }), &plan);
        }
    }
}

#[test]
fn sums_in_f32_in_any_number_of_slices() {
    for device in devices() {
        for tile in tiles(&device, Kind::Sum) {
            for layout in Layout::ALL {
                for (i, splits) in [1, 2, 3, 7].into_iter().enumerate() {
                    let k = if layout == Layout::Tn { 325 } else { 328 };
                    let product = Product::new(layout, [72, 136, k], None);
                    let plan = Plan { splits, ..with_tile(tile) };
                    sum(&device, &product, &plan, FLAGS[i % 3]);
                    sum(&device, &product, &plan, FLAGS[(i + 1) % 3]);
                }
            }
        }
    }
}

/// Rows beyond the live ones hold NaN in both operands.
#[test]
fn weight_gradients_see_live_rows_alone() {
    for device in devices() {
        for tile in tiles(&device, Kind::Sum) {
            for (live, splits) in [(0, 1), (0, 3), (1, 2), (64, 3), (131, 1), (131, 3), (200, 5), (999, 2)] {
                let product = Product::new(Layout::Tn, [136, 72, 200], Some(live));
                sum(&device, &product, &Plan { splits, ..with_tile(tile) }, Some(i32::from(live % 2 == 1)));
            }
            let product = Product::new(Layout::Nn, [136, 72, 72], Some(100));
            sum(&device, &product, &with_tile(tile), Some(1));
        }
    }
}

/// Devices that must agree to the bit with each other: each alone with itself, and the emulator in every order
/// of warps and under every policy of copies.
fn agreeing() -> Vec<Vec<Device>> {
    #[allow(unused_mut)]
    let mut groups: Vec<Vec<Device>> =
        devices().into_iter().map(|device| vec![device.clone(), device]).collect();
    #[cfg(feature = "emulator")]
    {
        use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};
        let orders = [
            (0, CopyPolicy::AtIssue, 4),
            (1, CopyPolicy::AtWait, 1),
            (2, CopyPolicy::Random, 3),
            (3, CopyPolicy::Random, 2),
        ];
        let ordered = |(seed, policy, resident_blocks)| {
            let options = EmulatorOptions { seed, policy, resident_blocks, ..EmulatorOptions::default() };
            Device::emulator(options)
        };
        groups.push(orders.map(ordered).into());
    }
    groups
}

#[test]
fn the_same_bits_every_time() {
    for group in agreeing() {
        for tile in tiles(&group[0], Kind::Sum) {
            let gradient = Product::new(Layout::Tn, [136, 136, 300], Some(290));
            let plan = Plan { splits: 3, group: 2, ..with_tile(tile) };
            let hidden = Product::new(Layout::Nn, [200, 72, 72], Some(190));
            let run = |device: &Device| {
                let sums = sum(device, &gradient, &plan, Some(1));
                let slope = tile
                    .has(Kind::GeluGrad)
                    .then(|| slope(device, &hidden, &with_tile(tile), GeluKind::Erf, true, Some(1)));
                (sums, slope)
            };
            let first = run(&group[0]);
            assert!(group[1..].iter().all(|device| run(device) == first), "{tile:?}");
        }
    }
}

#[test]
fn column_sums_of_a_gradient() {
    for device in devices() {
        for (m, n, live) in
            [(1, 8, None), (300, 72, None), (700, 136, Some(511)), (257, 64, Some(0)), (256, 200, Some(9999))]
        {
            for flag in FLAGS {
                let dy = rounded(m * n, 1);
                let living = live.unwrap_or(m).min(m);
                let before: Vec<f32> = random(n, 6);
                let mut want: Vec<f64> = before.iter().map(|&x| f64::from(x) * adds(flag)).collect();
                oracle::bias_grad(&mut want, &wide(&dy[..living * n]));

                let dy = device.upload(&laid_out(&dy, [m, n], living, bf16::NAN)).unwrap();
                let out = device.upload(&before).unwrap();
                let accumulate = flag.map(|flag| device.upload(&[flag]).unwrap());
                let count = live.map(|live: usize| device.upload(&[live as i32]).unwrap());
                let grad = BiasGrad {
                    dy: Matrix::of(&dy, 0, n + FOREIGN),
                    m,
                    n,
                    live: optional(&count),
                    out: Vector::from(&out),
                    accumulate: optional(&accumulate),
                };
                let workspace = device.alloc::<u8>(grad.workspace_bytes()).unwrap();
                let stream = device.stream().unwrap();
                grad.launch(&stream, &Vector::from(&workspace)).unwrap();
                stream.synchronize().unwrap();
                alike(&format!("{m} {n} {live:?} {flag:?}"), &wide(&out.download().unwrap()), &want, F32);
            }
        }
    }
}
