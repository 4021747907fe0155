//! Cases of the GEMM kernels: the products of linear layers, forward and backward, with what is fused to them.

use half::bf16;
use trencadis::device::Stream;
use trencadis::kernels::gemm::{
    BiasGrad, Epilogue, GeluGrad, Gemm, Layout, Matrix, Shape, Store, Sum, Vector,
};
use trencadis::recipe::GeluKind;
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Rotated, Sink};
use super::shapes::{self, own};

/// Width and hidden width of the MLP, ViT-Ti to ViT-22B.
const WIDTHS: [[usize; 2]; 9] = [
    [192, 768],
    [384, 1536],
    [768, 3072],
    [1024, 4096],
    [1152, 4304],
    [1280, 5120],
    [1408, 6144],
    [1664, 8192],
    [6144, 24576],
];

/// What is made of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fused {
    /// The product alone.
    Nothing,
    /// Bias.
    Bias,
    /// Bias and GELU, keeping what GELU is taken of.
    Gelu(GeluKind),
    /// Bias, LayerScale, drop-path, residual.
    Residual,
    /// Times the slope of GELU, with the gradient of the bias.
    GeluGrad(GeluKind),
    /// Added to f32.
    Sum,
}

impl Fused {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "plain",
            Self::Bias => "bias",
            Self::Gelu(GeluKind::Erf) => "gelu_erf",
            Self::Gelu(GeluKind::Tanh) => "gelu_tanh",
            Self::Residual => "residual",
            Self::GeluGrad(GeluKind::Erf) => "gelu_erf_grad",
            Self::GeluGrad(GeluKind::Tanh) => "gelu_tanh_grad",
            Self::Sum => "sum",
        }
    }
}

/// All that is fused to a layout in some layer.
pub fn all_fused(layout: Layout) -> &'static [Fused] {
    use GeluKind::{Erf, Tanh};
    match layout {
        Layout::Nt => &[Fused::Nothing, Fused::Bias, Fused::Gelu(Erf), Fused::Gelu(Tanh), Fused::Residual],
        Layout::Nn => &[Fused::Nothing, Fused::GeluGrad(Erf), Fused::GeluGrad(Tanh)],
        Layout::Tn => &[Fused::Sum],
    }
}

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    if let Some(own) = own().map_err(Error::usage)? {
        for shape in own {
            let shapes::Shape::Gemm { m, n, k } = shape else { continue };
            for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
                for &fused in all_fused(layout) {
                    shape_case(gpu, Shape { layout, m, n, k }, fused, sink)?;
                }
            }
            bias_case(gpu, m, n, sink)?;
        }
        return Ok(());
    }
    for [d, hidden] in WIDTHS {
        let t = if d > 2048 { 8192 } else { 16_384 };
        let layers = [
            (d, 3 * d, Fused::Bias, Fused::Nothing),
            (d, d, Fused::Residual, Fused::Nothing),
            (d, hidden, Fused::Gelu(GeluKind::Erf), Fused::Nothing),
            (hidden, d, Fused::Residual, Fused::GeluGrad(GeluKind::Erf)),
        ];
        for (inner, outer, forward, backward) in layers {
            let shape = |layout, m, n, k| Shape { layout, m, n, k };
            let [nt, nn, tn] = [
                shape(Layout::Nt, t, outer, inner),
                shape(Layout::Nn, t, inner, outer),
                shape(Layout::Tn, outer, inner, t),
            ];
            shape_case(gpu, nt, Fused::Nothing, sink)?;
            shape_case(gpu, nt, forward, sink)?;
            shape_case(gpu, nn, backward, sink)?;
            shape_case(gpu, tn, Fused::Sum, sink)?;
        }
        bias_case(gpu, t, 3 * d, sink)?;
    }
    Ok(())
}

/// The case of one product.
///
/// # Errors
/// A shape that the kernels do not take, a device that fails.
pub fn shape_case(gpu: &Gpu, shape: Shape, fused: Fused, sink: &mut Sink<'_>) -> Result<()> {
    let Shape { layout, m, n, k } = shape;
    let result = match fused {
        Fused::Sum => 4 * m * n,
        Fused::Nothing | Fused::Bias => 2 * m * n,
        Fused::Gelu(_) | Fused::Residual | Fused::GeluGrad(_) => 4 * m * n,
    };
    let sets = gpu.sets(2 * (m * k + n * k) + result);
    let [a_stride, b_stride] = match layout {
        Layout::Nt => [k, k],
        Layout::Nn => [k, n],
        Layout::Tn => [m, n],
    };
    let (a, b) = (gpu.random(sets, m * k)?, gpu.random(sets, n * k)?);
    let sum = matches!(fused, Fused::Sum);
    let out = gpu.room::<bf16>(sets, if sum { 0 } else { m * n })?;
    let out_sum = gpu.room::<f32>(sets, if sum { m * n } else { 0 })?;
    let with_side = matches!(fused, Fused::Gelu(_) | Fused::Residual | Fused::GeluGrad(_));
    let side = gpu.random(sets, if with_side { m * n } else { 0 })?;
    let vector = |len: usize| gpu.device.upload(&vec![0.5f32; len]);
    let (bias, gamma, keep, bias_grad) = (vector(n)?, vector(n)?, vector(m)?, vector(n)?);
    let add = gpu.device.upload(&[1i32])?;
    // SAFETY: every part of a rotated buffer holds the matrix that it is made for, and lives to the end.
    let matrix = |x: &Rotated<bf16>, set: usize, stride: usize, len: usize| unsafe {
        Matrix::raw(x.ptr(set), stride, len)
    };
    let operands = |set: usize| Gemm {
        shape,
        a: matrix(&a, set, a_stride, m * k),
        b: matrix(&b, set, b_stride, n * k),
        live: Vector::none(),
        dependent: false,
    };
    let epilogue = |set: usize| {
        let result = |x: &Rotated<bf16>| matrix(x, set, n, m * n);
        let plain = Store::plain(result(&out));
        let bias = Vector::from(&bias);
        match fused {
            Fused::Nothing => Epilogue::Store(plain),
            Fused::Bias => Epilogue::Store(Store { bias, ..plain }),
            Fused::Gelu(kind) => {
                Epilogue::Store(Store { bias, gelu: Some(kind), pre: result(&side), ..plain })
            }
            Fused::Residual => Epilogue::Store(Store {
                bias,
                residual: result(&side),
                gamma: Vector::from(&gamma),
                keep: Vector::from(&keep),
                ..plain
            }),
            Fused::GeluGrad(gelu) => Epilogue::GeluGrad(GeluGrad {
                out: result(&out),
                pre: result(&side),
                gelu,
                bias_grad: Vector::from(&bias_grad),
                accumulate: Vector::from(&add),
            }),
            Fused::Sum => Epilogue::Sum(Sum {
                // SAFETY: as above.
                out: unsafe { Matrix::raw(out_sum.ptr(set), n, m * n) },
                accumulate: Vector::from(&add),
            }),
        }
    };
    let plan = operands(0).plan(&epilogue(0), gpu.device.info())?;
    let workspace = gpu.device.alloc::<u8>(epilogue(0).workspace_bytes(shape, &plan).max(16))?;
    let launch = |stream: &Stream, set: usize| {
        operands(set).launch(stream, &epilogue(set), &plan, &Vector::from(&workspace))
    };
    let layout = format!("{layout:?}").to_lowercase();
    sink(&Case {
        kernel: format!("gemm_{layout}_{}", fused.name()),
        shape: format!("{m}x{n}x{k}"),
        operations: 2.0 * m as f64 * n as f64 * k as f64,
        bytes: 0.0,
        sets,
        launch: &launch,
    })
}

/// The case of the gradient of a bias that no product makes.
///
/// # Errors
/// A shape that the kernels do not take, a device that fails.
pub fn bias_case(gpu: &Gpu, m: usize, n: usize, sink: &mut Sink<'_>) -> Result<()> {
    let sets = gpu.sets(2 * m * n);
    let (dy, out) = (gpu.random(sets, m * n)?, gpu.device.zeros::<f32>(n)?);
    let sums = |set: usize| BiasGrad {
        // SAFETY: every part of the rotated buffer holds the matrix, and lives to the end.
        dy: unsafe { Matrix::raw(dy.ptr(set), n, m * n) },
        m,
        n,
        live: Vector::none(),
        out: Vector::from(&out),
        accumulate: Vector::none(),
    };
    let workspace = gpu.device.alloc::<u8>(sums(0).workspace_bytes().max(16))?;
    let launch = |stream: &Stream, set: usize| sums(set).launch(stream, &Vector::from(&workspace));
    sink(&Case {
        kernel: "bias_grad".into(),
        shape: format!("{m}x{n}"),
        operations: 0.0,
        bytes: 2.0 * (m * n) as f64,
        sets,
        launch: &launch,
    })
}
