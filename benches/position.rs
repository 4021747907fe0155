//! Position embeddings of the CPU device: taps of a batch, tables, Fourier maps. Throughput counts
//! tokens for the taps and bytes of the embeddings for the rest.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::position::{Combine, fourier_backward, fourier_forward, table_backward, table_forward};
use trencadis::data::positions::{axis_taps, coordinates, joint_taps};
use trencadis::recipe::{PositionConfig, PositionCoordinate, PositionResample};

mod common;
use common::{TOKENS, WIDTHS, random};

fn position(c: &mut Criterion) {
    let mut group = c.benchmark_group("position");
    let (mut grids, mut positions, mut cu_seqlens) = (Vec::new(), Vec::new(), vec![0]);
    for i in 0.. {
        let [rows, columns] = [4 + i * 5 % 13, 4 + i * 7 % 11];
        if positions.len() + rows * columns > TOKENS {
            break;
        }
        grids.push([rows as u16, columns as u16]);
        positions.extend((0..rows * columns).map(|i| [(i / columns) as u16, (i % columns) as u16]));
        cu_seqlens.push(positions.len() as i32);
    }
    let tokens = positions.len();
    let config = PositionConfig {
        rows: 16,
        columns: 16,
        coordinate: PositionCoordinate::Fractional,
        resample: PositionResample::Bicubic,
        ..PositionConfig::default()
    };
    let taps = |axis| axis_taps(&positions, &cu_seqlens, &grids, axis, &config);
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function("axis_taps", |b| b.iter(|| taps(0)));
    group.bench_function("joint_taps", |b| {
        b.iter(|| joint_taps(&positions, &cu_seqlens, &grids, &config));
    });
    let linear = PositionConfig { resample: PositionResample::Linear, ..config.clone() };
    let (Ok(rows), Ok(columns), Ok(joint)) = (
        axis_taps(&positions, &cu_seqlens, &grids, 0, &linear),
        axis_taps(&positions, &cu_seqlens, &grids, 1, &linear),
        joint_taps(&positions, &cu_seqlens, &grids, &config),
    ) else {
        unreachable!("fractional coordinates fit every table")
    };
    let points = coordinates(&positions, &cu_seqlens, &grids, PositionCoordinate::Fractional);

    for width in WIDTHS {
        let dout = random(tokens * width);
        let mut out = vec![0f32; tokens * width];
        let (table, row, column) = (random(256 * width), random(16 * width), random(16 * width));
        let (mut dtable, mut drow, mut dcolumn) = (table.clone(), row.clone(), column.clone());
        group.throughput(Throughput::Bytes(4 * out.len() as u64));
        group.bench_function(BenchmarkId::new("sum_forward", width), |b| {
            let (tables, taps) = ([&row[..], &column[..]], [&rows, &columns]);
            b.iter(|| table_forward(black_box(&mut out), &tables, &taps, Combine::Sum, width));
        });
        group.bench_function(BenchmarkId::new("sum_backward", width), |b| {
            let (tables, taps) = ([&row[..], &column[..]], [&rows, &columns]);
            b.iter(|| {
                let mut grads = [Some(black_box(&mut drow[..])), Some(&mut dcolumn[..])];
                table_backward(&mut grads, &dout, &tables, &taps, Combine::Sum, width);
            });
        });
        group.bench_function(BenchmarkId::new("joint_bicubic_forward", width), |b| {
            b.iter(|| table_forward(black_box(&mut out), &[&table], &[&joint], Combine::Single, width));
        });
        group.bench_function(BenchmarkId::new("joint_bicubic_backward", width), |b| {
            b.iter(|| {
                let mut grads = [Some(black_box(&mut dtable[..]))];
                table_backward(&mut grads, &dout, &[&table], &[&joint], Combine::Single, width);
            });
        });
        let map = random(width);
        let mut dmap = map.clone();
        group.bench_function(BenchmarkId::new("fourier_forward", width), |b| {
            b.iter(|| fourier_forward(black_box(&mut out), &map, &points, width));
        });
        group.bench_function(BenchmarkId::new("fourier_backward", width), |b| {
            b.iter(|| fourier_backward(black_box(&mut dmap), &dout, &map, &points, width));
        });
    }
}

fn position_gpu(c: &mut Criterion) {
    common::gpu::family(c, "position", common::position::cases);
}

criterion_group!(benches, position, position_gpu);
criterion_main!(benches);
