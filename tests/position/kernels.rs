//! The position kernels against the CPU device in f64, on inputs rounded to bf16.

use half::bf16;

use trencadis::cpu::position::{self as oracle, Combine, Taps};
use trencadis::data::batch::PREFIX;
use trencadis::data::positions::{axis_taps, coordinates, flat_taps, joint_taps, sinusoidal_table};
use trencadis::device::Device;
use trencadis::kernels::Rows;
use trencadis::kernels::position::{Backward, Banks, Forward, Mode, Places, Position};
use trencadis::kernels::tolerance as to;
use trencadis::recipe::{
    PositionBasis, PositionCombination, PositionConfig, PositionCoordinate, PositionResample,
};

use crate::support::devices::devices;
use crate::support::numbers::alike;
use crate::support::numbers::random;
use crate::support::rounded::{FOREIGN, dense, rows, starts, untouched, wide};

/// Grids of the images; no patches at all makes an empty slot.
const GRIDS: [[u16; 2]; 7] = [[5, 9], [0, 0], [1, 1], [11, 3], [9, 12], [2, 7], [0, 0]];
const PREFIX_TOKENS: usize = 2;
/// Rows after the last image.
const DEAD: usize = 70;

#[derive(Clone)]
struct Case {
    grids: Vec<[u16; 2]>,
    config: PositionConfig,
    width: usize,
    positions: Vec<[u16; 2]>,
    cu_seqlens: Vec<i32>,
    tables: Vec<Vec<f32>>,
    x: Vec<bf16>,
    dout: Vec<bf16>,
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    out: Vec<bf16>,
    dtables: Vec<Vec<f32>>,
}

/// The images with two prefix tokens each, and every fifth patch dropped.
fn case(config: PositionConfig, width: usize) -> Case {
    case_of(&GRIDS, config, width)
}

fn case_of(grids: &[[u16; 2]], config: PositionConfig, width: usize) -> Case {
    let (mut positions, mut lengths) = (Vec::new(), Vec::new());
    for &[rows, columns] in grids {
        let before = positions.len();
        if rows > 0 {
            positions.extend([PREFIX; PREFIX_TOKENS]);
        }
        let patches = (0..rows).flat_map(|r| (0..columns).map(move |c| [r, c]));
        positions.extend(patches.enumerate().filter(|(i, _)| i % 5 != 3).map(|(_, at)| at));
        lengths.push(positions.len() - before);
    }
    let live = positions.len();
    positions.extend([[0, 0]; DEAD]);
    let sizes = Position::new(&config, positions.len(), grids.len(), width).unwrap();
    let tables = match config.basis {
        PositionBasis::Sinusoidal => {
            sizes.table_shapes().iter().map(|&[rows, columns]| sinusoidal_table(rows, columns)).collect()
        }
        _ => {
            let shapes = sizes.table_shapes();
            shapes.iter().enumerate().map(|(i, [r, c])| random(r * c, 10 + i as u64)).collect()
        }
    };
    let tokens = positions.len();
    let x = rows(tokens, live, width, 0.0, 1);
    let dout = rows(tokens, live, width, 0.0, 2);
    Case { grids: grids.to_vec(), cu_seqlens: starts(&lengths), config, width, positions, tables, x, dout }
}

impl Case {
    fn live(&self) -> usize {
        self.cu_seqlens[self.grids.len()] as usize
    }

    fn sizes(&self) -> Position {
        Position::new(&self.config, self.positions.len(), self.grids.len(), self.width).unwrap()
    }

    fn run(&self, device: &Device, accumulate: bool) -> Answer {
        let (sizes, stream) = (self.sizes(), device.stream().unwrap());
        let positions: Vec<u16> = self.positions.iter().flatten().copied().collect();
        let positions = device.upload(&positions).unwrap();
        let grids: Vec<u16> = self.grids.iter().flatten().copied().collect();
        let grids = device.upload(&grids).unwrap();
        let cu_seqlens = device.upload(&self.cu_seqlens).unwrap();
        let banks = Banks::new(device, &self.config, 12).unwrap();
        let places = Places {
            positions: &positions,
            grids: &grids,
            cu_seqlens: &cu_seqlens,
            cu_seqlens_host: &self.cu_seqlens,
            banks: &banks,
        };
        let tables: Vec<_> = self.tables.iter().map(|t| device.upload(t).unwrap()).collect();
        let dtables: Vec<_> =
            self.tables.iter().map(|t| device.upload(&vec![1.0f32; t.len()]).unwrap()).collect();
        let x = device.upload(&self.x).unwrap();
        let dout = device.upload(&self.dout).unwrap();
        let out = device.upload(&vec![bf16::MAX; self.x.len()]).unwrap();
        let at = |buffer| Rows { buffer, offset: 0, stride: self.width + FOREIGN };
        let forward =
            Forward { places, tables: [tables.first(), tables.get(1)], x: Some(at(&x)), out: at(&out) };
        sizes.forward(&stream, &forward).unwrap();
        let flag = device.upload(&[i32::from(accumulate)]).unwrap();
        let workspace = device.alloc::<u8>(sizes.workspace_bytes(device.info())).unwrap();
        let backward = Backward {
            places,
            tables: forward.tables,
            dout: at(&dout),
            dtables: [dtables.first(), dtables.get(1)],
            accumulate: Some(&flag),
            workspace: &workspace,
        };
        sizes.backward(&stream, &backward).unwrap();
        stream.synchronize().unwrap();
        Answer {
            out: out.download().unwrap(),
            dtables: dtables.iter().map(|t| t.download().unwrap()).collect(),
        }
    }

    fn taps(&self) -> Vec<Taps> {
        let (positions, cu, config) = (&self.positions[..], &self.cu_seqlens[..], &self.config);
        let grids = &self.grids[..];
        match config.combination {
            PositionCombination::Flat => vec![flat_taps(positions, cu, grids, config).unwrap()],
            PositionCombination::Joint => vec![joint_taps(positions, cu, grids, config).unwrap()],
            _ => vec![
                axis_taps(positions, cu, grids, 0, config).unwrap(),
                axis_taps(positions, cu, grids, 1, config).unwrap(),
            ],
        }
    }

    fn check(&self, got: &Answer, accumulate: bool) {
        let (width, live, name) = (self.width, self.live(), format!("{:?}", self.config));
        let tables: Vec<Vec<f64>> = self.tables.iter().map(|t| wide(t)).collect();
        let dout = dense(&self.dout, live, width);
        let mut out = vec![0.0; live * width];
        let start = if accumulate { 1.0 } else { 0.0 };
        let mut dtables: Vec<Vec<f64>> = tables.iter().map(|t| vec![start; t.len()]).collect();
        let mode = self.sizes().mode();
        if mode == Mode::Fourier {
            let points = coordinates(&self.positions, &self.cu_seqlens, &self.grids, self.config.coordinate);
            oracle::fourier_forward(&mut out, &tables[0], &points, width);
            oracle::fourier_backward(&mut dtables[0], &dout, &tables[0], &points, width);
        } else {
            let combine = match mode {
                Mode::Single => Combine::Single,
                Mode::Sum => Combine::Sum,
                Mode::Stack => Combine::Stack,
                _ => Combine::Product,
            };
            let taps = self.taps();
            let taps: Vec<&Taps> = taps.iter().collect();
            let of_tables: Vec<&[f64]> = tables.iter().map(Vec::as_slice).collect();
            oracle::table_forward(&mut out, &of_tables, &taps, combine, width);
            let mut grads: Vec<_> = dtables.iter_mut().map(|t| Some(t.as_mut_slice())).collect();
            oracle::table_backward(&mut grads, &dout, &of_tables, &taps, combine, width);
        }
        for (out, x) in out.iter_mut().zip(dense(&self.x, live, width)) {
            *out += x;
        }
        alike(&name, &dense(&got.out, live, width), &out, to::ROUNDED);
        untouched(&name, &got.out, live, width);
        // A phase of some tens of turns is known to 2^-19 of a turn.
        let within = if mode == Mode::Fourier { to::FOURIER_GRAD } else { to::POSITION_GRAD };
        for (got, want) in got.dtables.iter().zip(&dtables) {
            alike(&name, &wide(got), want, within);
        }
    }
}

fn config(
    combination: PositionCombination,
    coordinate: PositionCoordinate,
    resample: PositionResample,
) -> PositionConfig {
    PositionConfig { combination, coordinate, resample, rows: 12, columns: 14, ..PositionConfig::default() }
}

fn verify(device: &Device, case: &Case, accumulate: bool) {
    let answer = case.run(device, accumulate);
    case.check(&answer, accumulate);
}

#[test]
fn tables_of_absolute_coordinates() {
    use PositionCombination::{Flat, Joint, Product, Stack, Sum};
    for device in devices() {
        for (i, combination) in [Flat, Joint, Sum, Stack, Product].into_iter().enumerate() {
            let config = config(combination, PositionCoordinate::Absolute, PositionResample::Linear);
            verify(&device, &case(config, [64, 144, 208][i % 3]), i % 2 == 0);
        }
    }
}

#[test]
fn tables_resampled_to_every_grid() {
    use PositionCombination::{Joint, Product, Stack, Sum};
    use PositionCoordinate::{Fractional, FractionalAspect};
    use PositionResample::{
        Bicubic, BicubicNoAntialias, BicubicOffset, Bilinear, Linear, LinearAlignCorners,
    };
    for device in devices() {
        for (combination, coordinate, resample) in [
            (Joint, Fractional, BicubicNoAntialias),
            (Stack, FractionalAspect, LinearAlignCorners),
            (Joint, Fractional, Bicubic),
            (Joint, FractionalAspect, Bilinear),
            (Sum, Fractional, Linear),
            (Sum, FractionalAspect, Bicubic),
            (Stack, Fractional, Bilinear),
            (Product, Fractional, Linear),
            (Product, FractionalAspect, Bicubic),
        ] {
            verify(&device, &case(config(combination, coordinate, resample), 144), true);
        }
        // One of the images has the table's grid, and others one of its sides.
        for (combination, coordinate, [rows, columns]) in [
            (Joint, Fractional, [9, 12]),
            (Joint, FractionalAspect, [11, 11]),
            (Sum, Fractional, [5, 9]),
            (Product, FractionalAspect, [9, 9]),
        ] {
            let offset = PositionConfig { rows, columns, ..config(combination, coordinate, BicubicOffset) };
            verify(&device, &case(offset, 144), false);
        }
    }
}

/// More table rows than a block has, and more columns.
#[test]
fn large_tables_and_wide_rows() {
    for device in devices() {
        let wide = config(PositionCombination::Sum, PositionCoordinate::Absolute, PositionResample::Linear);
        verify(&device, &case(PositionConfig { rows: 130, columns: 65, ..wide }, 264), false);
    }
}

#[test]
fn fourier_features_and_sinusoids() {
    use PositionCoordinate::{Absolute, Fractional, FractionalAspect};
    for device in devices() {
        for (coordinate, width) in [(Absolute, 16), (Fractional, 144), (FractionalAspect, 272)] {
            let base = config(PositionCombination::Sum, coordinate, PositionResample::Linear);
            let fourier = PositionConfig { basis: PositionBasis::Fourier, ..base.clone() };
            verify(&device, &case(fourier, width), width == 16);
            let fixed = PositionConfig { basis: PositionBasis::Sinusoidal, ..base };
            verify(&device, &case(fixed, width), false);
        }
    }
}

/// Whatever the order of threads, and whatever an image is packed with.
#[test]
fn the_same_bits_every_time() {
    let config = config(PositionCombination::Sum, PositionCoordinate::Fractional, PositionResample::Bicubic);
    let (all, pitch) = (case(config.clone(), 64), 64 + FOREIGN);
    let mut first: Option<Answer> = None;
    for device in devices() {
        let answer = all.run(&device, false);
        match device.info().driver {
            // Gradients are cut into slices by the number of multiprocessors, which is that of the device.
            None => assert_eq!(first.get_or_insert_with(|| answer.clone()), &answer),
            Some(_) => assert_eq!(all.run(&device, false), answer),
        }
        for image in [0, 3, 4] {
            let mut alone = case_of(&[[3, 1], [0, 0], GRIDS[image]], config.clone(), 64);
            let from = all.cu_seqlens[image] as usize..all.cu_seqlens[image + 1] as usize;
            let at = alone.cu_seqlens[2] as usize;
            alone.x[at * pitch..][..from.len() * pitch]
                .copy_from_slice(&all.x[from.start * pitch..from.end * pitch]);
            let alone = alone.run(&device, false);
            let got = &alone.out[at * pitch..][..from.len() * pitch];
            assert_eq!(got, &answer.out[from.start * pitch..from.end * pitch]);
        }
    }
}

/// In place, and without anything to add to.
#[test]
fn the_sum_may_take_the_place_of_the_tokens() {
    let config = config(PositionCombination::Product, PositionCoordinate::Absolute, PositionResample::Linear);
    let all = case(config, 64);
    let (sizes, live, pitch) = (all.sizes(), all.live(), 64 + FOREIGN);
    for device in devices() {
        let want = all.run(&device, false).out;
        let stream = device.stream().unwrap();
        let positions: Vec<u16> = all.positions.iter().flatten().copied().collect();
        let grids: Vec<u16> = all.grids.iter().flatten().copied().collect();
        let places = Places {
            positions: &device.upload(&positions).unwrap(),
            grids: &device.upload(&grids).unwrap(),
            cu_seqlens: &device.upload(&all.cu_seqlens).unwrap(),
            cu_seqlens_host: &all.cu_seqlens,
            banks: &Banks::new(&device, &all.config, 1).unwrap(),
        };
        let tables = all.tables.iter().map(|t| device.upload(t).unwrap()).collect::<Vec<_>>();
        let tables = [tables.first(), tables.get(1)];
        let x = device.upload(&all.x).unwrap();
        let alone = device.upload(&vec![bf16::MAX; all.x.len()]).unwrap();
        let [x_rows, out] = [&x, &alone].map(|buffer| Rows { buffer, offset: 0, stride: pitch });
        for forward in [
            Forward { places, tables, x: Some(x_rows), out: x_rows },
            Forward { places, tables, x: None, out },
        ] {
            sizes.forward(&stream, &forward).unwrap();
        }
        let missing = Forward { places, tables: [tables[0], None], x: None, out };
        let message = sizes.forward(&stream, &missing).unwrap_err().to_string();
        assert!(message.contains("expected 2 table(s)"), "{message}");
        stream.synchronize().unwrap();
        assert_eq!(dense(&x.download().unwrap(), live, 64), dense(&want, live, 64));
        let got = alone.download().unwrap();
        untouched("alone", &got, live, 64);
        let taps = all.taps();
        let tables: Vec<Vec<f64>> = all.tables.iter().map(|t| wide(t)).collect();
        let mut want = vec![0.0; live * 64];
        let (tables, taps) = ([&tables[0][..], &tables[1]], [&taps[0], &taps[1]]);
        oracle::table_forward(&mut want, &tables, &taps, Combine::Product, 64);
        alike("alone", &dense(&got, live, 64), &want, to::ROUNDED);
    }
}

#[test]
fn bad_recipes_are_told() {
    use PositionCombination::{Flat, Stack, Sum};
    let says = |config: &PositionConfig, width| Position::new(config, 64, 2, width).unwrap_err().to_string();
    let absolute = |combination| config(combination, PositionCoordinate::Absolute, PositionResample::Linear);
    assert!(says(&absolute(Sum), 12).contains("a multiple of 8"));
    assert!(says(&absolute(Stack), 24).contains("a multiple of 16"));
    let none = PositionConfig { basis: PositionBasis::None, ..absolute(Sum) };
    assert!(says(&none, 64).contains("nothing to add"));
    let flat = config(Flat, PositionCoordinate::Fractional, PositionResample::Linear);
    assert!(says(&flat, 64).contains("no fractional coordinates"));
    let Some(device) = devices().into_iter().next() else { return };
    assert!(Banks::new(&device, &absolute(Sum), 0).is_err() && Banks::new(&device, &flat, 5000).is_err());
}
