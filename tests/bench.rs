//! The room of the GPU benchmarks: shapes are read, and every family measures and writes its lines. Times
//! that a test sees mean nothing.

#[path = "../benches/common/mod.rs"]
mod common;
mod support;

use common::gpu::{Gpu, clocks, table};
use common::shapes::{Images, Shape, parse};
use support::devices::devices;

#[test]
fn own_shapes_are_read() {
    let text = "gemm 128 192 64; # first\n attention 2 72 64*196,577\npool 3 64 7\n\n";
    let lengths = [vec![196; 64], vec![577]].concat();
    let images = |name: &str, lengths: Vec<usize>| Images { name: name.into(), lengths };
    let expected = vec![
        Shape::Gemm { m: 128, n: 192, k: 64 },
        Shape::Attention { heads: 2, head_dim: 72, images: images("64*196,577", lengths) },
        Shape::Pool { heads: 3, head_dim: 64, images: images("7", vec![7]) },
    ];
    assert_eq!(parse(text), Ok(expected));
    for line in
        ["gemm 128 192", "gemm 0 8 8", "attention 2 64 x", "pool 2 64 0", "conv 1 2 3", "gemm 8 8 8 8"]
    {
        let message = parse(line).unwrap_err();
        assert!(message.contains(&format!("\"{line}\" is no shape")), "{message}");
    }
}

#[test]
fn mixes_fill_the_batch() {
    let images = Images::mix(64.0, 512.0, 32_768);
    assert!(images.tokens() <= 32_768 && images.tokens() > 31_000);
    assert_eq!(images.cu_seqlens().len(), images.lengths.len() + 1);
    assert!(images.lengths.iter().all(|&length| (9..=1100).contains(&length)));
}

#[test]
fn readings_of_the_clocks() {
    let reading = clocks::parse("580.65.06, 1980, 2619, 512.33, [N/A]").unwrap();
    assert_eq!((reading.driver.as_str(), reading.sm_mhz), ("580.65.06", Some(1980.0)));
    assert_eq!((reading.watts, reading.celsius), (Some(512.33), None));
    assert!(clocks::parse("no devices were found").is_none());
}

#[test]
fn every_family_gives_lines_of_the_table() {
    let columns = table::HEADER.split(',').count();
    for device in devices().into_iter().take(1) {
        let gpu = Gpu::on(device).unwrap();
        assert!(gpu.peaks.operations > 0.0 && gpu.peaks.bytes > 0.0);
        let mut lines = Vec::new();
        let images = Images { name: "9+30".into(), lengths: vec![9, 30] };
        let mut sink = |case: &common::gpu::Case<'_>| gpu.once(case).map(|line| lines.push(line));
        common::pool::shape_cases(&gpu, 2, 64, &images, &mut sink).unwrap();
        let kernels: Vec<&str> = lines.iter().filter_map(|line| line.split(',').next()).collect();
        assert_eq!(
            kernels,
            ["pool_attention_forward", "pool_attention_backward", "pool_mean_forward", "pool_mean_backward"]
        );
        for line in &lines {
            let cells: Vec<&str> = line.split(',').collect();
            assert_eq!(cells.len(), columns, "{line}");
            assert_eq!(cells[1], "2x64_9+30");
            assert!(cells[2].parse::<f64>().unwrap() > 0.0, "{line}");
            assert!(cells[5].parse::<f64>().unwrap() > 0.0 && cells[3].is_empty(), "{line}");
        }
    }
}
