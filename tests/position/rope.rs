//! Tables of the rotary position embedding on the CPU device, against their definition and against those of other
//! implementations.

use trencadis::cpu::attention::{AttentionConfig, QkAffine, forward};
use trencadis::cpu::position::rope::table;
use trencadis::data::batch::PREFIX;
use trencadis::device::Device;
use trencadis::kernels::position::{RopeOperands, RopeTable};
use trencadis::kernels::tolerance as to;
use trencadis::recipe::*;
use trencadis::weights::Weights;

use crate::support::batch;
use crate::support::devices::devices;
use crate::support::places::root;

const HEAD_DIM: usize = 16;

fn table_of(config: &RopeConfig, grids: &[[u16; 2]], prefix: usize) -> Vec<f64> {
    let b = batch(grids, prefix, 3, 2, 0, 0);
    let mut out = vec![f64::NAN; b.live_tokens() * HEAD_DIM];
    table(config, HEAD_DIM, &mut out, &b.positions, &b.cu_seqlens, &b.grids);
    out
}

/// What each origin's convention is called here, and its file's name for it.
fn conventions() -> Vec<(&'static str, RopeConfig)> {
    use Rope::{Halves, Interleaved};
    let of = |kind, change: &dyn Fn(&mut RopeConfig)| {
        let mut config = RopeConfig { kind, ..RopeConfig::default() };
        change(&mut config);
        config
    };
    let dinov3 = |coordinate| {
        move |c: &mut RopeConfig| {
            (c.frequencies, c.theta, c.coordinate) = (RopeFrequencies::Turns, 100.0, coordinate);
        }
    };
    let pixel = |frequencies| {
        move |c: &mut RopeConfig| {
            (c.frequencies, c.max_frequency, c.coordinate) = (frequencies, 24.0, RopeCoordinate::Ends);
        }
    };
    vec![
        ("timm_axial", of(Interleaved, &|c| c.theta = 100.0)),
        ("timm_axial_xy", of(Halves, &|c| c.order = RopeOrder::Columns)),
        (
            "timm_reference",
            of(Interleaved, &|c| {
                (c.coordinate, c.rows, c.columns, c.offset) = (RopeCoordinate::Fractional, 3, 4, 1.0);
            }),
        ),
        ("timm_pixel", of(Interleaved, &pixel(RopeFrequencies::Logarithmic))),
        ("timm_pixel_linear", of(Interleaved, &pixel(RopeFrequencies::Linear))),
        ("timm_dinov3_longer", of(Halves, &dinov3(RopeCoordinate::CenteredLonger))),
        ("timm_dinov3_shorter", of(Interleaved, &dinov3(RopeCoordinate::CenteredShorter))),
        ("dinov3", of(Halves, &dinov3(RopeCoordinate::Centered))),
        ("pixtral", of(Halves, &|c| c.frequencies = RopeFrequencies::Alternating)),
        ("qwen2_vl", of(Halves, &|_| ())),
        ("moonvit", of(Halves, &|c| c.order = RopeOrder::ColumnRow)),
    ]
}

/// Table and turned attention as `tools/make_goldens.py` wrote them.
#[test]
fn tables_are_those_of_other_implementations() {
    const GRID: [u16; 2] = [5, 7];
    const HEADS: usize = 2;
    let file = Weights::load(&root().join("tests/golden/rope.safetensors")).unwrap().tensors;
    assert_eq!(file.len(), 1 + 2 * conventions().len());
    let difference = |got: &[f64], name: &str| {
        let want = &file[name].1;
        assert_eq!(got.len(), want.len(), "{name}");
        got.iter().zip(want).map(|(g, w)| (g - f64::from(*w)).abs()).fold(0.0, f64::max)
    };
    let qkv: Vec<f64> = file["qkv"].1.iter().map(|&x| x.into()).collect();
    for (name, rope) in conventions() {
        let table = table_of(&rope, &[GRID], 0);
        let error = difference(&table, &format!("{name}.table"));
        assert!(error < 1e-5, "{name}: table {error:.1e}");
        let config = AttentionConfig {
            heads: HEADS,
            kv_heads: HEADS,
            head_dim: HEAD_DIM,
            scale: 0.25,
            norm: QkNormKind::None,
            eps: 0.0,
            gain_per_head: false,
            rope: rope.kind,
        };
        let tokens = table.len() / HEAD_DIM;
        let (mut out, mut lse) = (vec![0.0; tokens * HEADS * HEAD_DIM], vec![0.0; tokens * HEADS]);
        forward(&config, &mut out, &mut lse, &qkv, QkAffine::default(), Some(&table), &[0, tokens as i32]);
        let error = difference(&out, &format!("{name}.attention"));
        println!("{name:20} {error:.1e}");
        assert!(error < 1e-5, "{name}: attention {error:.1e}");
        // The other pairs are something else.
        let other = if rope.kind == Rope::Halves { Rope::Interleaved } else { Rope::Halves };
        let config = AttentionConfig { rope: other, ..config };
        forward(&config, &mut out, &mut lse, &qkv, QkAffine::default(), Some(&table), &[0, tokens as i32]);
        assert!(difference(&out, &format!("{name}.attention")) > 1e-3, "{name}");
    }
}

/// Every order of pairs, by the definition.
#[test]
fn pairs_turn_by_rows_and_columns() {
    let axes = |order| -> Vec<usize> {
        let config = RopeConfig { kind: Rope::Halves, order, ..RopeConfig::default() };
        config.pairs(HEAD_DIM).iter().map(|pair| pair.axis).collect()
    };
    assert_eq!(axes(RopeOrder::Rows), [0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(axes(RopeOrder::Columns), [1, 1, 1, 1, 0, 0, 0, 0]);
    assert_eq!(axes(RopeOrder::RowColumn), [0, 1, 0, 1, 0, 1, 0, 1]);
    assert_eq!(axes(RopeOrder::ColumnRow), [1, 0, 1, 0, 1, 0, 1, 0]);
    let config = RopeConfig { kind: Rope::Halves, order: RopeOrder::RowColumn, ..RopeConfig::default() };
    let (grid, prefix) = ([3, 5], 2);
    let table = table_of(&config, &[grid], prefix);
    for (token, row) in table.chunks(HEAD_DIM).enumerate() {
        for (p, pair) in row.as_chunks::<2>().0.iter().enumerate() {
            let Some(patch) = token.checked_sub(prefix) else {
                assert_eq!(*pair, [1.0, 0.0], "prefix tokens are not turned");
                continue;
            };
            let at = if p % 2 == 0 { patch / 5 } else { patch % 5 };
            let angle = at as f64 * 10_000f64.powf(-((p / 2) as f64) / 4.0);
            assert!((pair[0] - angle.cos()).abs() < 1e-14 && (pair[1] - angle.sin()).abs() < 1e-14);
        }
    }
}

#[test]
fn coordinates_are_as_defined() {
    let of = |coordinate, offset| {
        let config = RopeConfig { coordinate, offset, ..RopeConfig::default() };
        move |axis: usize, index: u16, grid: [u16; 2]| {
            let [numerator, denominator] = config.coordinate_of(axis, index, grid);
            numerator / denominator
        }
    };
    assert_eq!(of(RopeCoordinate::Absolute, 0.5)(1, 3, [2, 4]), 3.5);
    assert_eq!(of(RopeCoordinate::Fractional, 1.0)(1, 3, [2, 4]), 1.0);
    assert_eq!(of(RopeCoordinate::Centered, 0.0)(0, 0, [2, 4]), -0.5);
    assert_eq!(of(RopeCoordinate::CenteredLonger, 0.0)(0, 1, [2, 4]), -0.25);
    assert_eq!(of(RopeCoordinate::CenteredShorter, 0.0)(1, 3, [2, 4]), 2.5);
    let ends = of(RopeCoordinate::Ends, 0.0);
    assert_eq!([0, 1, 2].map(|i| ends(0, i, [3, 1])), [-1.0, 0.0, 1.0]);
    assert_eq!(ends(1, 0, [3, 1]), -1.0, "as torch.linspace of one step");
}

/// What an image is packed with, and dropped tokens, change nothing.
#[test]
fn tables_do_not_depend_on_the_batch() {
    let grids = [[4, 3], [1, 1], [7, 2], [1, 9]];
    for (name, config) in conventions() {
        let packed = table_of(&config, &grids, 1);
        let alone: Vec<f64> = grids.iter().flat_map(|grid| table_of(&config, &[*grid], 1)).collect();
        assert_eq!(packed, alone, "{name}");
    }
    let (config, grid) = (&conventions()[0].1, [4, 3]);
    let whole = table_of(config, &[grid], 0);
    let mut kept = vec![f64::NAN; 3 * HEAD_DIM];
    table(config, HEAD_DIM, &mut kept, &[PREFIX, [3, 1], [0, 2]], &[0, 3], &[grid]);
    assert_eq!(kept[HEAD_DIM..2 * HEAD_DIM], whole[10 * HEAD_DIM..11 * HEAD_DIM]);
    assert_eq!(kept[2 * HEAD_DIM..], whole[2 * HEAD_DIM..3 * HEAD_DIM]);
}

/// What the kernel makes for heads of `head_dim` columns, with 70 rows after the last image.
fn on_device(device: &Device, config: &RopeConfig, head_dim: usize, grids: &[[u16; 2]]) {
    const DEAD: usize = 70;
    let mut b = batch(grids, 2, 3, 2, 0, 2);
    b.positions.truncate(b.live_tokens());
    let live = b.positions.len();
    b.positions.extend([[7, 7]; DEAD]);
    let (tokens, slots) = (b.positions.len(), b.grids.len());
    let stream = device.stream().unwrap();
    let kernel = RopeTable::new(config, tokens, slots, head_dim).unwrap();
    let flat = |x: &[[u16; 2]]| device.upload(&x.concat()).unwrap();
    let (positions, grids) = (flat(&b.positions), flat(&b.grids));
    let cu_seqlens = device.upload(&b.cu_seqlens).unwrap();
    let pairs = device.upload(&kernel.pairs()).unwrap();
    let out = device.upload(&vec![f32::NAN; tokens * head_dim]).unwrap();
    let operands = RopeOperands {
        positions: &positions,
        grids: &grids,
        cu_seqlens: &cu_seqlens,
        cu_seqlens_host: &b.cu_seqlens,
        pairs: &pairs,
        out: &out,
    };
    kernel.launch(&stream, &operands).unwrap();
    stream.synchronize().unwrap();
    let got = out.download().unwrap();
    let mut want = vec![f64::NAN; live * head_dim];
    let starts = &b.cu_seqlens[..=b.images];
    table(config, head_dim, &mut want, &b.positions, starts, &b.grids);
    want.extend([1.0, 0.0].repeat(DEAD * head_dim / 2));
    let error = got.iter().zip(&want).map(|(got, want)| (f64::from(*got) - want).abs()).fold(0.0, f64::max);
    assert!(error <= to::ROPE, "{config:?}, head dim {head_dim}: {error:.1e}");
}

#[test]
fn kernels_make_the_tables_of_every_convention() {
    for device in devices() {
        for (_, config) in conventions() {
            for head_dim in [4, 64, 72] {
                on_device(&device, &config, head_dim, &[[4, 3], [1, 1], [7, 2], [1, 9]]);
            }
        }
    }
}

/// Angles of many turns, which a product in f32 would not know to 1e-6.
#[test]
fn kernels_are_exact_after_many_turns() {
    let config = RopeConfig { kind: Rope::Halves, offset: 1.0, ..RopeConfig::default() };
    let fractional = RopeConfig {
        coordinate: RopeCoordinate::Fractional,
        rows: 700,
        columns: 650,
        order: RopeOrder::ColumnRow,
        ..config.clone()
    };
    let pixel = RopeConfig {
        frequencies: RopeFrequencies::Linear,
        max_frequency: 448.0,
        coordinate: RopeCoordinate::Ends,
        ..config.clone()
    };
    for device in devices() {
        for config in [&config, &fractional, &pixel] {
            on_device(&device, config, 16, &[[3, 401], [613, 2]]);
        }
    }
}

#[test]
fn bad_sizes_are_told() {
    let config = RopeConfig { kind: Rope::Halves, ..RopeConfig::default() };
    let error = RopeTable::new(&config, 128, 2, 6).unwrap_err();
    assert_eq!(error.to_string(), "the rotary table has a head dim of 6, expected a multiple of 4");
    assert!(RopeTable::new(&config, 1 << 31, 2, 64).is_err());
}
