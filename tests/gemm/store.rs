//! The forward epilogue.

use half::bf16;

use trencadis::cpu::gemm as oracle;
use trencadis::device::Device;
use trencadis::kernels::gemm::{Epilogue, Kind, Layout, Matrix, Plan, Store, Vector};
use trencadis::recipe::GeluKind;

use crate::product::{
    BF16, FOREIGN, Product, UNTOUCHED, alike, laid_out, optional, rounded, tiles, wide, with_tile, written,
};
use crate::support::devices::devices;
use crate::support::numbers::random;

/// What is asked of the epilogue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask {
    pub bias: bool,
    pub gelu: Option<GeluKind>,
    pub pre: bool,
    pub residual: bool,
    pub gamma: bool,
    pub keep: bool,
}

/// Bits of the result and of what lies before GELU.
pub type Bits = (Vec<u16>, Option<Vec<u16>>);

fn bits(x: &[bf16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Runs and compares with f64; returns the result's bits.
#[track_caller]
pub fn check(device: &Device, product: &Product, plan: &Plan, ask: Ask) -> Bits {
    let shape = product.shape;
    let (m, n) = (shape.m, shape.n);
    let live = match shape.layout {
        Layout::Tn => m,
        _ => product.live.unwrap_or(m).min(m),
    };
    let bias: Vec<f32> = random(n, 3);
    let gamma: Vec<f32> = random(n, 4);
    let keep: Vec<f32> = (0..m).map(|row| if row % 3 == 1 { 0.0 } else { 1.25 }).collect();
    let residual = rounded(m * n, 5);

    let mut v = product.value.clone();
    if ask.bias {
        v.chunks_mut(n).for_each(|row| row.iter_mut().zip(&bias).for_each(|(v, b)| *v += f64::from(*b)));
    }
    v[live * n..].fill(0.0);
    let pre = v.clone();
    if let Some(kind) = ask.gelu {
        oracle::gelu(&mut v, &pre, kind);
    }
    for (row, v) in v.chunks_mut(n).enumerate().take(live) {
        for (column, v) in v.iter_mut().enumerate() {
            *v *= if ask.gamma { f64::from(gamma[column]) } else { 1.0 };
            *v *= if ask.keep { f64::from(keep[row]) } else { 1.0 };
            *v += if ask.residual { residual[row * n + column].to_f64() } else { 0.0 };
        }
    }

    let operands = product.upload(device);
    let untouched = vec![bf16::from_f32(UNTOUCHED); m * (n + FOREIGN)];
    let out = device.upload(&untouched).unwrap();
    let before = ask.pre.then(|| device.upload(&untouched).unwrap());
    let mut beside = laid_out(&residual, [m, n], live, bf16::NAN);
    beside.truncate((m - 1) * (n + FOREIGN) + n); // The last row ends where the memory ends.
    let beside = ask.residual.then(|| device.upload(&beside).unwrap());
    let bias = ask.bias.then(|| device.upload(&bias).unwrap());
    let gamma = ask.gamma.then(|| device.upload(&gamma).unwrap());
    let mut factors = keep;
    factors[live..].fill(f32::NAN);
    let keep = ask.keep.then(|| device.upload(&factors).unwrap());
    let epilogue = Epilogue::Store(Store {
        out: Matrix::of(&out, 0, n + FOREIGN),
        bias: optional(&bias),
        gelu: ask.gelu,
        pre: before.as_ref().map_or(Matrix::none(), |b| Matrix::of(b, 0, n + FOREIGN)),
        residual: beside.as_ref().map_or(Matrix::none(), |b| Matrix::of(b, 0, n + FOREIGN)),
        gamma: optional(&gamma),
        keep: optional(&keep),
    });
    operands.run(device, &epilogue, plan);

    let name = format!("{shape:?} {plan:?} {ask:?}");
    let out = out.download().unwrap();
    alike(&name, &written(&out, [m, n]), &v, BF16);
    let before = before.map(|before| before.download().unwrap());
    if let Some(before) = &before {
        alike(&format!("pre of {name}"), &written(before, [m, n]), &pre, BF16);
    }
    (bits(&out), before.as_deref().map(bits))
}

#[test]
fn every_layout_and_tile_at_odd_sizes() {
    for device in devices() {
        for tile in tiles(&device, Kind::Store) {
            for layout in Layout::ALL {
                for [m, n, k] in [[1usize, 8, 8], [7, 72, 72], [129, 136, 200], [200, 8, 40]] {
                    let size =
                        if layout == Layout::Tn { [m.next_multiple_of(8), n, k + 3] } else { [m, n, k] };
                    let product = Product::new(layout, size, None);
                    check(&device, &product, &with_tile(tile), Ask::default());
                }
            }
        }
    }
}

#[test]
fn every_combination_of_steps() {
    let kinds = [None, Some(GeluKind::Erf), Some(GeluKind::Tanh)];
    for device in devices() {
        let tiles = tiles(&device, Kind::Store);
        for number in 0..32 {
            let asked = |bit: usize| number >> bit & 1 == 1;
            for (i, gelu) in kinds.into_iter().enumerate() {
                let ask = Ask {
                    bias: asked(0),
                    gelu,
                    pre: asked(1),
                    residual: asked(2),
                    gamma: asked(3),
                    keep: asked(4),
                };
                let tile = tiles[(number + i) % tiles.len()];
                let layout = Layout::ALL[(number + i) % 3];
                check(&device, &Product::new(layout, [40, 72, 32], Some(27)), &with_tile(tile), ask);
            }
        }
    }
}

#[test]
fn every_epilogue_of_every_tile_and_layout() {
    let ask =
        Ask { bias: true, gelu: Some(GeluKind::Erf), pre: true, residual: true, gamma: true, keep: true };
    for device in devices() {
        for tile in tiles(&device, Kind::Store) {
            for layout in Layout::ALL {
                let product = Product::new(layout, [136, 264, 72], None);
                check(&device, &product, &with_tile(tile), ask);
            }
        }
    }
}

/// Operands, residual and factors hold NaN beyond the live rows; `check` expects zeros there.
#[test]
fn rows_that_are_not_live_are_zeros() {
    let ask = Ask { bias: true, gelu: Some(GeluKind::Tanh), pre: true, residual: true, ..Ask::default() };
    for device in devices() {
        for tile in tiles(&device, Kind::Store) {
            for layout in [Layout::Nt, Layout::Nn] {
                for live in [0, 1, 64, 129, 200, 1000] {
                    let product = Product::new(layout, [200, 72, 72], Some(live));
                    check(&device, &product, &with_tile(tile), ask);
                }
            }
            for live in [0, 1, 64, 97, 200] {
                let product = Product::new(Layout::Tn, [72, 72, 200], Some(live));
                check(&device, &product, &with_tile(tile), Ask::default());
            }
        }
    }
}

#[test]
fn deep_rings_and_groups_of_columns() {
    for device in devices() {
        let tile = tiles(&device, Kind::Store).into_iter().min_by_key(|tile| tile.m * tile.n).unwrap();
        for layout in Layout::ALL {
            let product = Product::new(layout, [192, 320, 328], None);
            let plain = check(&device, &product, &with_tile(tile), Ask::default());
            for (stages, group) in [(3, 2), (4, 3), (5, 4), (6, 5), (6, 9)] {
                let plan = Plan { stages, group, ..with_tile(tile) };
                if plan.shared_bytes() <= device.info().shared_per_block {
                    assert_eq!(check(&device, &product, &plan, Ask::default()), plain, "{plan:?}");
                }
            }
        }
    }
}

/// A row's bits depend on that row and the weights alone: not on the tile (of one tier: their matrix instructions round
/// as they like), not on how many rows there are.
#[test]
fn the_bits_of_a_row_are_its_own() {
    let ask = Ask { bias: true, gelu: Some(GeluKind::Erf), ..Ask::default() };
    for device in devices() {
        for layout in [Layout::Nt, Layout::Nn] {
            let large = Product::new(layout, [130, 72, 200], None);
            let mut first = [None, None];
            for tile in tiles(&device, Kind::Store) {
                let (out, _) = check(&device, &large, &with_tile(tile), ask);
                let alone = check(&device, &Product::new(layout, [3, 72, 200], None), &with_tile(tile), ask);
                assert_eq!(alone.0, out[..alone.0.len()], "{tile:?}");
                let first = &mut first[usize::from(tile.hopper.is_some())];
                assert_eq!(*first.get_or_insert_with(|| out.clone()), out, "{tile:?}");
            }
        }
    }
}

/// Exact inputs through a unit matrix: GELU alone, over all that bf16 can tell from 0 and x.
#[test]
fn gelu_is_good_to_bf16() {
    let mut inputs: Vec<bf16> = (-1600..=1600).map(|i| bf16::from_f32(i as f32 / 200.0)).collect();
    inputs.extend([-1e30f32, -300.0, -20.0, -12.5, 12.5, 300.0, 1e30, 1e-20, -1e-20].map(bf16::from_f32));
    inputs.resize(inputs.len().next_multiple_of(8), bf16::ZERO);
    let m = inputs.len() / 8;
    let unit: Vec<bf16> = (0..64).map(|i| bf16::from_f32(f32::from(u8::from(i % 9 == 0)))).collect();
    let x = wide(&inputs);
    for device in devices() {
        for kind in [GeluKind::Erf, GeluKind::Tanh] {
            let (a, b) = (device.upload(&inputs).unwrap(), device.upload(&unit).unwrap());
            let out = device.alloc::<bf16>(m * 8).unwrap();
            let shape = trencadis::kernels::gemm::Shape { layout: Layout::Nt, m, n: 8, k: 8 };
            let gemm = trencadis::kernels::gemm::Gemm {
                shape,
                a: Matrix::of(&a, 0, 8),
                b: Matrix::of(&b, 0, 8),
                live: Vector::none(),
                dependent: true,
            };
            let mut store = Store::plain(Matrix::of(&out, 0, 8));
            store.gelu = Some(kind);
            let epilogue = Epilogue::Store(store);
            let plan = gemm.plan(&epilogue, device.info()).unwrap();
            assert_eq!(epilogue.kind(), Kind::Store);
            let stream = device.stream().unwrap();
            gemm.launch(&stream, &epilogue, &plan, &Vector::none()).unwrap();
            stream.synchronize().unwrap();
            let got = wide(&out.download().unwrap());
            let mut want = vec![0.0; x.len()];
            oracle::gelu(&mut want, &x, kind);
            for ((got, want), x) in got.iter().zip(&want).zip(&x) {
                let error = (got - want).abs();
                assert!(error <= 0.6 / 128.0 * want.abs() + 1e-7, "{kind:?}({x}) = {got} instead of {want}");
            }
        }
    }
}
