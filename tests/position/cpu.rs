//! Position embeddings: taps against hand-computed cases and torch, tables and Fourier maps against
//! naive sums and finite differences.

use std::path::Path;

use trencadis::cpu::position::{
    Combine, Taps, fourier_backward, fourier_forward, table_backward, table_forward,
};
use trencadis::data::batch::PREFIX;
use trencadis::data::positions::{
    FilterBank, axis_taps, coordinates, flat_taps, joint_taps, sinusoidal_table,
};
use trencadis::recipe::{PositionConfig, PositionCoordinate, PositionResample};
use trencadis::rng::{Purpose, Stream};
use trencadis::weights::Weights;

fn values(seed: u64, n: usize) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    (0..n).map(|_| f64::from(stream.uniform()) * 2.0 - 1.0).collect()
}

fn config(
    rows: usize,
    columns: usize,
    coordinate: PositionCoordinate,
    resample: PositionResample,
) -> PositionConfig {
    PositionConfig { rows, columns, coordinate, resample, ..PositionConfig::default() }
}

/// Positions and cu_seqlens of images with full grids, each after `prefix` prefix tokens.
fn batch(grids: &[[u16; 2]], prefix: usize) -> (Vec<[u16; 2]>, Vec<i32>) {
    let (mut positions, mut cu_seqlens) = (Vec::new(), vec![0]);
    for &[rows, columns] in grids {
        positions.extend(vec![PREFIX; prefix]);
        positions.extend((0..rows).flat_map(|row| (0..columns).map(move |column| [row, column])));
        cu_seqlens.push(positions.len() as i32);
    }
    (positions, cu_seqlens)
}

/// The rows of table weights that tokens read, dense.
fn dense(taps: &Taps, rows: usize) -> Vec<Vec<f32>> {
    taps.start
        .windows(2)
        .map(|range| {
            let mut weights = vec![0.0; rows];
            for i in range[0] as usize..range[1] as usize {
                weights[taps.index[i] as usize] += taps.weight[i];
            }
            weights
        })
        .collect()
}

fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{name}[{i}]: {got} instead of {want}");
    }
}

#[test]
fn absolute_taps_read_one_row_of_weight_one() {
    let config = config(5, 4, PositionCoordinate::Absolute, PositionResample::Linear);
    let grids = [[2, 3], [5, 1], [0, 0]];
    let (positions, cu_seqlens) = batch(&grids, 1);
    let rows = axis_taps(&positions, &cu_seqlens, &grids, 0, &config).unwrap();
    let columns = axis_taps(&positions, &cu_seqlens, &grids, 1, &config).unwrap();
    // The prefix token of each image (the third has nothing else) reads nothing.
    assert_eq!(rows.start, [0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 11]);
    assert_eq!(rows.index, [0, 0, 0, 1, 1, 1, 0, 1, 2, 3, 4]);
    assert_eq!(columns.index, [0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0]);
    assert_eq!(columns.start, rows.start);
    assert_eq!(rows.weight, [1.0; 11]);
    let joint = joint_taps(&positions, &cu_seqlens, &grids, &config).unwrap();
    assert_eq!(joint.index, [0, 1, 2, 4, 5, 6, 0, 4, 8, 12, 16]);
    assert_eq!(joint.weight, [1.0; 11]);
    let flat = flat_taps(&positions, &cu_seqlens, &grids, &config).unwrap();
    assert_eq!(flat.index, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]);
}

/// Token dropping leaves holes: positions decide, not the order of tokens.
#[test]
fn dropped_tokens_leave_the_others_where_they_are() {
    let config = config(4, 4, PositionCoordinate::Fractional, PositionResample::Linear);
    let (all, cu_seqlens) = batch(&[[6, 4]], 0);
    let full = dense(&axis_taps(&all, &cu_seqlens, &[[6, 4]], 0, &config).unwrap(), 4);
    let kept = [all[3], all[11], all[22]];
    let some = dense(&axis_taps(&kept, &[0, 3], &[[6, 4]], 0, &config).unwrap(), 4);
    assert_eq!(some, [full[3].clone(), full[11].clone(), full[22].clone()]);
}

#[test]
fn grids_beyond_the_table_are_refused() {
    let config = config(4, 6, PositionCoordinate::Absolute, PositionResample::Linear);
    let (positions, cu_seqlens) = batch(&[[2, 7]], 0);
    let message = |result: trencadis::Result<Taps>| result.unwrap_err().to_string();
    let columns = message(axis_taps(&positions, &cu_seqlens, &[[2, 7]], 1, &config));
    assert!(columns.contains("2×7") && columns.contains("4×6"), "{columns}");
    assert!(columns.contains("model.position.columns to at least 7"), "{columns}");
    assert!(axis_taps(&positions, &cu_seqlens, &[[2, 7]], 0, &config).is_ok());
    assert!(message(joint_taps(&positions, &cu_seqlens, &[[2, 7]], &config)).contains("4×6"));
    assert!(flat_taps(&positions, &cu_seqlens, &[[2, 7]], &config).is_ok());
    let (positions, cu_seqlens) = batch(&[[5, 5]], 0);
    let flat = message(flat_taps(&positions, &cu_seqlens, &[[5, 5]], &config));
    assert!(flat.contains("25") && flat.contains("24") && flat.contains("model.position.rows"), "{flat}");
    let rows = message(joint_taps(&positions, &cu_seqlens, &[[5, 5]], &config));
    assert!(rows.contains("model.position.rows to at least 5"), "{rows}");
    let fractional = PositionConfig { coordinate: PositionCoordinate::Fractional, ..config };
    assert!(message(flat_taps(&positions, &cu_seqlens, &[[5, 5]], &fractional)).contains("flat"));
    assert!(joint_taps(&positions, &cu_seqlens, &[[5, 5]], &fractional).is_ok());
}

/// `F.interpolate(torch.eye(from)[None].mT, size=to, mode="linear")[0].T`, and for the others
/// `F.interpolate(torch.eye(from)[None, :, None], size=(1, to), mode=…, antialias=True)[0, :, 0].T`.
#[test]
fn fractional_axis_taps_are_torchs_interpolation() {
    let third = 1.0 / 3.0;
    let linear_up = [
        [1.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
        [0.0, 0.8333333, 0.1666667, 0.0],
        [0.0, 0.1666667, 0.8333333, 0.0],
        [0.0, 0.0, 0.5, 0.5],
        [0.0, 0.0, 0.0, 1.0],
    ];
    let bicubic_up = [
        [1.0657895, -0.0657895, 0.0, 0.0],
        [0.5294118, 0.5294118, -0.0588235, 0.0],
        [-0.0578704, 0.9375, 0.1319444, -0.0115741],
        [-0.0115741, 0.1319444, 0.9375, -0.0578704],
        [0.0, -0.0588235, 0.5294118, 0.5294118],
        [0.0, 0.0, -0.0657895, 1.0657895],
    ];
    let bilinear_down = [
        [0.3571429, 0.4285714, 0.2142857, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0588235, 0.2352941, 0.4117647, 0.2352941, 0.0588235, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.2142857, 0.4285714, 0.3571429],
    ];
    let bicubic_down = [
        [0.3830645, 0.4395161, 0.2137097, 0.0, -0.0322581, -0.0040323, 0.0],
        [-0.030525, 0.045177, 0.2759463, 0.4188034, 0.2759463, 0.045177, -0.030525],
        [0.0, -0.0040323, -0.0322581, 0.0, 0.2137097, 0.4395161, 0.3830645],
    ];
    let linear_down =
        [[2.0 * third, third, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, third, 2.0 * third]];
    check(4, &linear_up, PositionResample::Linear);
    check(5, &linear_down, PositionResample::Linear);
    check(4, &[[0.0, 0.5, 0.5, 0.0]], PositionResample::Linear);
    check(4, &linear_up, PositionResample::Bilinear);
    check(7, &bilinear_down, PositionResample::Bilinear);
    check(4, &bicubic_up, PositionResample::Bicubic);
    check(7, &bicubic_down, PositionResample::Bicubic);

    fn check<const N: usize>(from: usize, want: &[[f64; N]], resample: PositionResample) {
        let to = want.len() as u16;
        for axis in [0, 1] {
            let grid = if axis == 0 { [to, 2] } else { [2, to] };
            let (positions, cu_seqlens) = batch(&[grid], 0);
            let config = config(from, from, PositionCoordinate::Fractional, resample);
            let taps = axis_taps(&positions, &cu_seqlens, &[grid], axis, &config).unwrap();
            for (weights, position) in dense(&taps, from).iter().zip(&positions) {
                let got: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
                assert_close("weights", &got, &want[usize::from(position[axis])], 2e-7);
            }
        }
    }
}

/// `F.interpolate((torch.arange(12.) ** 2).reshape(1, 1, 3, 4), size=(2, 7), mode=…, antialias=True)`.
#[test]
fn joint_fractional_taps_are_torchs_resized_table() {
    let bilinear = [
        [6.0, 7.428571, 9.714286, 13.0, 16.571429, 21.142857, 24.0],
        [46.0, 51.0, 59.0, 68.0, 77.285714, 87.571429, 94.0],
    ];
    let bicubic = [
        [3.396627, 4.514026, 6.825134, 9.640048, 13.13602, 18.057857, 20.700777],
        [46.693948, 51.601413, 61.202687, 70.378411, 80.235193, 92.447196, 98.880182],
    ];
    let table: Vec<f64> = (0..12).map(|i| f64::from(i * i)).collect();
    for (resample, want) in [(PositionResample::Bilinear, bilinear), (PositionResample::Bicubic, bicubic)] {
        let config = config(3, 4, PositionCoordinate::Fractional, resample);
        let (positions, cu_seqlens) = batch(&[[2, 7]], 0);
        let taps = joint_taps(&positions, &cu_seqlens, &[[2, 7]], &config).unwrap();
        let mut out = vec![0.0; 14];
        table_forward(&mut out, &[&table], &[&taps], Combine::Single, 1);
        assert_close("resized", &out, &want.concat(), 2e-5);
    }
}

/// Every filter of a recipe.
const FILTERS: [PositionResample; 6] = [
    PositionResample::Linear,
    PositionResample::LinearAlignCorners,
    PositionResample::Bilinear,
    PositionResample::Bicubic,
    PositionResample::BicubicNoAntialias,
    PositionResample::BicubicOffset,
];

/// `tools/make_resample_goldens.py`: torch, timm and SciPy, each of them over several grids.
#[test]
fn resampled_tables_are_those_of_the_filters_origins() {
    const SIDE: usize = 7;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/position/resample.safetensors");
    let tensors = Weights::load(&file).unwrap().tensors;
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| f64::from(x)).collect() };
    let table = wide(&tensors["table"].1);
    let mut filters = Vec::new();
    for (name, (_, want)) in tensors.iter().filter(|(name, _)| *name != "table" && !name.starts_with("patch"))
    {
        let (filter, grid) = name.rsplit_once(' ').unwrap();
        let filter = filter.split(' ').next().unwrap();
        let resample: PositionResample = serde_json::from_value(filter.into()).unwrap();
        let (rows, columns) = grid.split_once('x').unwrap();
        let grid = [rows.parse().unwrap(), columns.parse().unwrap()];
        let config = config(SIDE, SIDE, PositionCoordinate::Fractional, resample);
        let (positions, cu_seqlens) = batch(&[grid], 0);
        let taps = joint_taps(&positions, &cu_seqlens, &[grid], &config).unwrap();
        let mut out = vec![0.0; want.len()];
        table_forward(&mut out, &[&table], &[&taps], Combine::Single, 2);
        assert_close(name, &out, &wide(want), 2e-6);
        if grid == [7, 7] {
            assert_eq!(out, table, "{name}");
        }
        filters.push(resample);
    }
    assert!(FILTERS.iter().all(|filter| filters.contains(filter)));
}

/// Taps come in the order of the table's rows, each row once, and sum to one: what the kernels count on.
#[test]
fn taps_are_ordered_and_sum_to_one() {
    for resample in FILTERS {
        for (from, to) in [(1, 1), (1, 6), (2, 9), (7, 1), (9, 2), (9, 8), (16, 5)] {
            let bank =
                FilterBank::new(&config(from, 3, PositionCoordinate::Fractional, resample), 0, to).unwrap();
            for range in bank.start.windows(2) {
                let taps = &bank.taps[range[0] as usize..range[1] as usize];
                assert!(
                    taps.windows(2).all(|pair| pair[0].0 < pair[1].0),
                    "{resample:?} {from} {to}: {taps:?}"
                );
                assert!(taps.iter().all(|tap| (tap.0 as usize) < from), "{resample:?} {from} {to}: {taps:?}");
                let sum: f64 = taps.iter().map(|tap| f64::from(tap.1)).sum();
                assert!((sum - 1.0).abs() < 1e-6, "{resample:?} {from} {to}: {taps:?}");
            }
        }
    }
}

#[test]
fn a_grid_of_the_tables_size_reads_it_as_it_is() {
    for resample in FILTERS {
        let config = config(3, 4, PositionCoordinate::Fractional, resample);
        let (positions, cu_seqlens) = batch(&[[3, 4]], 0);
        let taps = joint_taps(&positions, &cu_seqlens, &[[3, 4]], &config).unwrap();
        assert_eq!(taps.index, (0..12).collect::<Vec<_>>());
        assert_eq!(taps.weight, [1.0; 12]);
    }
}

/// Both axes are resampled to the longer side, and the grid is its top left part.
#[test]
fn aspect_preserving_taps_resample_to_the_longer_side() {
    let aspect = config(4, 4, PositionCoordinate::FractionalAspect, PositionResample::Linear);
    let square = config(4, 4, PositionCoordinate::Fractional, PositionResample::Linear);
    let (positions, cu_seqlens) = batch(&[[2, 6]], 0);
    for axis in [0, 1] {
        let got = axis_taps(&positions, &cu_seqlens, &[[2, 6]], axis, &aspect).unwrap();
        let want = axis_taps(&positions, &cu_seqlens, &[[6, 6]], axis, &square).unwrap();
        assert_eq!(got, want);
    }
}

/// An image's taps do not depend on the images before it.
#[test]
fn taps_do_not_depend_on_the_batch() {
    let config = config(5, 6, PositionCoordinate::Fractional, PositionResample::Bicubic);
    let grids = [[3, 8], [8, 3], [3, 8]];
    let (positions, cu_seqlens) = batch(&grids, 1);
    let packed = dense(&joint_taps(&positions, &cu_seqlens, &grids, &config).unwrap(), 30);
    for (grid, range) in grids.iter().zip(cu_seqlens.windows(2)) {
        let (positions, cu_seqlens) = batch(&[*grid], 1);
        let alone = dense(&joint_taps(&positions, &cu_seqlens, &[*grid], &config).unwrap(), 30);
        assert_eq!(alone, packed[range[0] as usize..range[1] as usize]);
    }
}

#[test]
fn fourier_coordinates() {
    let (positions, cu_seqlens) = batch(&[[2, 4]], 1);
    let at = |coordinate| coordinates(&positions, &cu_seqlens, &[[2, 4]], coordinate);
    assert!(at(PositionCoordinate::Absolute)[0].iter().all(|x| x.is_nan()));
    assert_eq!(at(PositionCoordinate::Absolute)[8], [1.0, 3.0]);
    assert_eq!(at(PositionCoordinate::Fractional)[8], [0.5, 0.75]);
    assert_eq!(at(PositionCoordinate::FractionalAspect)[8], [0.25, 0.75]);
}

#[test]
fn sinusoidal_table_has_sines_then_cosines() {
    let table = sinusoidal_table(3, 4);
    let want = [0.0, 0.0, 1.0, 1.0, 1f64.sin(), 0.01f64.sin(), 1f64.cos(), 0.01f64.cos()];
    let got: Vec<f64> = table[..8].iter().map(|&x| f64::from(x)).collect();
    assert_close("table", &got, &want, 1e-7);
    assert_eq!(table.len(), 12);
    assert_eq!(sinusoidal_table(2, 3)[5], 0.0);
}

/// Two tables of 4 rows, 130 tokens (several tasks) of which every ninth reads nothing and the others up to two rows.
fn ragged_taps(seed: u64) -> Taps {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    let mut taps = Taps { start: vec![0], ..Taps::default() };
    for token in 0..130 {
        for _ in 0..if token % 9 == 0 { 0 } else { token % 2 + 1 } {
            taps.index.push(stream.bits() % 4);
            taps.weight.push(stream.uniform());
        }
        taps.start.push(taps.index.len() as u32);
    }
    taps
}

#[test]
fn tables_are_combined_as_defined_and_their_gradients_are_right() {
    const WIDTH: usize = 6;
    let taps = [ragged_taps(1), ragged_taps(2)];
    let taps = [&taps[0], &taps[1]];
    let dout = values(3, 130 * WIDTH);
    for combine in [Combine::Single, Combine::Sum, Combine::Stack, Combine::Product] {
        let count = if combine == Combine::Single { 1 } else { 2 };
        let columns = if combine == Combine::Stack { WIDTH / 2 } else { WIDTH };
        let tables: Vec<Vec<f64>> = (0..count).map(|i| values(5 + i, 4 * columns)).collect();
        let taps = &taps[..count as usize];
        let forward = |tables: &[Vec<f64>]| {
            let mut out = vec![f64::NAN; 130 * WIDTH];
            let tables: Vec<&[f64]> = tables.iter().map(Vec::as_slice).collect();
            table_forward(&mut out, &tables, taps, combine, WIDTH);
            out
        };

        let read = |axis: usize, token: usize, column: usize| -> f64 {
            dense(taps[axis], 4)[token]
                .iter()
                .enumerate()
                .map(|(row, &w)| f64::from(w) * tables[axis][row * columns + column])
                .sum()
        };
        let out = forward(&tables);
        for token in [0, 1, 2, 9, 64, 129] {
            for column in 0..WIDTH {
                let want = match combine {
                    Combine::Single => read(0, token, column),
                    Combine::Sum => read(0, token, column) + read(1, token, column),
                    Combine::Product => read(0, token, column) * read(1, token, column),
                    Combine::Stack if column < columns => read(0, token, column),
                    Combine::Stack => read(1, token, column - columns),
                };
                assert_close("out", &[out[token * WIDTH + column]], &[want], 1e-6);
            }
        }

        let views: Vec<&[f64]> = tables.iter().map(Vec::as_slice).collect();
        let mut grads: Vec<Vec<f64>> = tables.iter().map(|t| vec![1.0; t.len()]).collect();
        let mut wanted: Vec<Option<&mut [f64]>> = grads.iter_mut().map(|g| Some(g.as_mut_slice())).collect();
        table_backward(&mut wanted, &dout, &views, taps, combine, WIDTH);
        for (axis, grad) in grads.iter().enumerate() {
            for i in 0..grad.len() {
                let loss = |step: f64| -> f64 {
                    let mut tables = tables.clone();
                    tables[axis][i] += step;
                    forward(&tables).iter().zip(&dout).map(|(a, b)| a * b).sum()
                };
                let want = (loss(1e-5) - loss(-1e-5)) / 2e-5;
                assert_close(&format!("{combine:?} {axis} {i}"), &[grad[i] - 1.0], &[want], 1e-7);
            }
        }
        let mut none: Vec<Option<&mut [f64]>> = tables.iter().map(|_| None).collect();
        table_backward(&mut none, &dout, &views, taps, combine, WIDTH);
    }
}

#[test]
fn fourier_features_and_their_gradient() {
    const WIDTH: usize = 140;
    let map = values(1, WIDTH);
    let points: Vec<[f32; 2]> = (0..150)
        .map(|i| if i % 50 == 7 { [f32::NAN; 2] } else { [i as f32 / 150.0, (i * 7 % 13) as f32] })
        .collect();
    let dout = values(2, points.len() * WIDTH);
    let forward = |map: &[f64]| {
        let mut out = vec![f64::NAN; points.len() * WIDTH];
        fourier_forward(&mut out, map, &points, WIDTH);
        out
    };
    let out = forward(&map);
    for (point, out) in points.iter().zip(out.chunks(WIDTH)) {
        for i in 0..WIDTH / 2 {
            let [y, x] = point.map(f64::from);
            let phase = std::f64::consts::TAU * (map[2 * i] * y + map[2 * i + 1] * x);
            let want = if y.is_nan() { [0.0; 2] } else { [phase.sin(), phase.cos()] };
            assert_close("fourier", &[out[i], out[WIDTH / 2 + i]], &want, 1e-12);
        }
    }
    let mut dmap = vec![1.0; WIDTH];
    fourier_backward(&mut dmap, &dout, &map, &points, WIDTH);
    for i in 0..WIDTH {
        let loss = |step: f64| -> f64 {
            let mut map = map.clone();
            map[i] += step;
            forward(&map).iter().zip(&dout).map(|(a, b)| a * b).sum()
        };
        let want = (loss(1e-6) - loss(-1e-6)) / 2e-6;
        assert_close("dmap", &[dmap[i] - 1.0], &[want], 1e-4);
    }

    let narrow: Vec<f32> = map.iter().map(|&x| x as f32).collect();
    let mut single = vec![f32::NAN; out.len()];
    fourier_forward(&mut single, &narrow, &points, WIDTH);
    let single: Vec<f64> = single.iter().map(|&x| f64::from(x)).collect();
    assert_close("f32", &single, &out, 2e-5);
}

#[test]
fn thread_count_changes_no_bit() {
    let taps = [ragged_taps(1), ragged_taps(2)];
    let table: Vec<f32> = values(1, 4 * 512).iter().map(|&x| x as f32).collect();
    let map: Vec<f32> = values(2, 512).iter().map(|&x| x as f32).collect();
    let dout: Vec<f32> = values(3, 130 * 512).iter().map(|&x| x as f32).collect();
    let points: Vec<[f32; 2]> = (0..130).map(|i| [i as f32 * 0.1, i as f32 * 0.3]).collect();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut out, mut features) = (vec![0.0; dout.len()], vec![0.0; dout.len()]);
            let (mut drow, mut dcolumn, mut dmap) = (table.clone(), table.clone(), map.clone());
            let taps = [&taps[0], &taps[1]];
            table_forward(&mut out, &[&table, &table], &taps, Combine::Product, 512);
            let mut grads = [Some(drow.as_mut_slice()), Some(dcolumn.as_mut_slice())];
            table_backward(&mut grads, &dout, &[&table, &table], &taps, Combine::Product, 512);
            fourier_forward(&mut features, &map, &points, 512);
            fourier_backward(&mut dmap, &dout, &map, &points, 512);
            (out, features, drow, dcolumn, dmap)
        })
    };
    assert_eq!(on(1), on(3));
}
