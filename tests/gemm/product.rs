//! Products for the kernels to compute, and their values in f64.

use half::bf16;

use trencadis::cpu::gemm::{Mat, MatMut, gemm};
use trencadis::device::{Buffer, Device};
use trencadis::kernels::gemm::{
    Epilogue, Gemm, HOPPER_TILES, Kind, Layout, Matrix, Plan, Shape, TILES, Tile, Vector,
};
use trencadis::kernels::tolerance as to;

use crate::support::numbers::{distance, random};

/// What lies where nobody should write.
pub const UNTOUCHED: f32 = 77.0;

/// Columns that follow every row and belong to somebody else.
pub const FOREIGN: usize = 8;

/// Operands on the host, with what must not be read, and what is not to be seen of them, as NaN.
pub struct Product {
    pub shape: Shape,
    pub live: Option<usize>,
    pub a: Vec<bf16>,
    pub b: Vec<bf16>,
    /// `[m, n]`; rows that are not live are 0.
    pub value: Vec<f64>,
}

/// Rows, columns of a stored operand.
pub fn stored(shape: Shape) -> [[usize; 2]; 2] {
    let Shape { layout, m, n, k } = shape;
    match layout {
        Layout::Nt => [[m, k], [n, k]],
        Layout::Nn => [[m, k], [k, n]],
        Layout::Tn => [[k, m], [k, n]],
    }
}

/// `[rows, cols]` with `FOREIGN` columns of `beside` after each row, and rows from `live` on of it.
pub fn laid_out<T: Copy>(x: &[T], [rows, cols]: [usize; 2], live: usize, beside: T) -> Vec<T> {
    let mut out = vec![beside; rows * (cols + FOREIGN)];
    for row in 0..live.min(rows) {
        out[row * (cols + FOREIGN)..][..cols].copy_from_slice(&x[row * cols..][..cols]);
    }
    out
}

/// What a kernel wrote into `[rows, cols]` laid out as above.
#[track_caller]
pub fn written<T: Copy + Into<f64>>(x: &[T], [rows, cols]: [usize; 2]) -> Vec<f64> {
    let mut out = Vec::with_capacity(rows * cols);
    for row in x.chunks_exact(cols + FOREIGN) {
        assert!(row[cols..].iter().all(|&x| x.into() == f64::from(UNTOUCHED)), "written beside a row");
        out.extend(row[..cols].iter().map(|&x| x.into()));
    }
    assert_eq!(out.len(), rows * cols);
    out
}

pub fn rounded(n: usize, seed: u64) -> Vec<bf16> {
    random::<f64>(n, seed).into_iter().map(bf16::from_f64).collect()
}

pub fn wide<T: Copy + Into<f64>>(x: &[T]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

impl Product {
    pub fn new(layout: Layout, [m, n, k]: [usize; 3], live: Option<usize>) -> Self {
        let shape = Shape { layout, m, n, k };
        let [sa, sb] = stored(shape);
        let (a, b) = (rounded(sa[0] * sa[1], 1), rounded(sb[0] * sb[1], 2));
        let rows = if layout == Layout::Tn { k } else { m };
        let living = live.unwrap_or(rows).min(rows);
        let (wa, wb) = (wide(&a), wide(&b));
        let (ma, mb) = (Mat::new(&wa, sa[0], sa[1], sa[1]), Mat::new(&wb, sb[0], sb[1], sb[1]));
        let (mut ma, mut mb) = match layout {
            Layout::Nt => (ma, mb.t()),
            Layout::Nn => (ma, mb),
            Layout::Tn => (ma.t(), mb),
        };
        let mut value = vec![0.0; m * n];
        if layout == Layout::Tn {
            (ma.cols, mb.rows) = (living, living);
            gemm(MatMut::new(&mut value, m, n, n), false, 1.0, ma, mb, false);
        } else {
            ma.rows = living;
            gemm(MatMut::new(&mut value, living, n, n), false, 1.0, ma, mb, false);
        }
        let live_b = if layout == Layout::Tn { living } else { sb[0] };
        Self {
            shape,
            live,
            a: laid_out(&a, sa, living, bf16::NAN),
            b: laid_out(&b, sb, live_b, bf16::NAN),
            value,
        }
    }

    pub fn upload(&self, device: &Device) -> Operands {
        Operands {
            shape: self.shape,
            a: device.upload(&self.a).unwrap(),
            b: device.upload(&self.b).unwrap(),
            live: self.live.map(|live| device.upload(&[live as i32]).unwrap()),
        }
    }
}

/// Operands on a device.
pub struct Operands {
    pub shape: Shape,
    pub a: Buffer<bf16>,
    pub b: Buffer<bf16>,
    pub live: Option<Buffer<i32>>,
}

impl Operands {
    pub fn gemm(&self) -> Gemm<'_> {
        let [[_, a], [_, b]] = stored(self.shape);
        Gemm {
            shape: self.shape,
            a: Matrix::of(&self.a, 0, a + FOREIGN),
            b: Matrix::of(&self.b, 0, b + FOREIGN),
            live: self.live.as_ref().map_or(Vector::none(), Vector::from),
            dependent: false,
        }
    }

    /// Runs to the end.
    #[track_caller]
    pub fn run(&self, device: &Device, epilogue: &Epilogue<'_>, plan: &Plan) {
        let workspace = device.alloc::<u8>(epilogue.workspace_bytes(self.shape, plan)).unwrap();
        let stream = device.stream().unwrap();
        self.gemm().launch(&stream, epilogue, plan, &Vector::from(&workspace)).unwrap();
        stream.synchronize().unwrap();
    }
}

/// A plan with a tile, as small as it can be.
pub fn with_tile(tile: Tile) -> Plan {
    Plan { tile, stages: 3, splits: 1, group: 1, clusters: u32::from(tile.hopper.is_some()) }
}

/// Every tile that a device has room for and that has a kernel of this kind.
pub fn tiles(device: &Device, kind: Kind) -> Vec<Tile> {
    let hopper = HOPPER_TILES.into_iter().filter(|_| device.info().hopper);
    TILES
        .into_iter()
        .chain(hopper)
        .filter(|tile| tile.has(kind))
        .filter(|&tile| with_tile(tile).shared_bytes() <= device.info().shared_per_block)
        .collect()
}

/// A vector of `Option`s as an operand.
pub fn optional<T: bytemuck::Pod>(buffer: &Option<Buffer<T>>) -> Vector<'_, T> {
    buffer.as_ref().map_or(Vector::none(), Vector::from)
}

/// Values against f64: `unit` of each, and what sums in f32 add.
#[track_caller]
pub fn alike(name: &str, got: &[f64], want: &[f64], unit: f64) {
    alike_beside(name, got, want, unit, to::GEMM_MARGIN);
}

/// The same with `margin` beside the unit.
#[track_caller]
pub fn alike_beside(name: &str, got: &[f64], want: &[f64], unit: f64, margin: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(error <= unit * want.abs() + margin, "{name}: element {i} is {got} instead of {want}");
    }
    let apart = distance(got, want);
    assert!(apart <= unit * unit, "{name}: distance {apart:e}");
}

/// Half a unit in the last place of bf16, with a margin for f32.
pub const BF16: f64 = to::GEMM_BF16;

/// Of f32 sums.
pub const F32: f64 = to::GEMM_F32;
