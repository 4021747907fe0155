//! Cases of the GEMM kernels: the products of linear layers, forward and backward, with what is fused to them.

pub mod operands;
pub mod sharded;
pub mod tune;

use trencadis::device::Stream;
use trencadis::kernels::gemm::{BiasGrad, Layout, Matrix, Shape, Vector, plans};
use trencadis::recipe::GeluKind;
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Sink};
use super::shapes::{self, own};
use operands::Operands;

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

/// Tokens of a batch, and those with which all is measured.
const TOKENS: [usize; 4] = [8192, MANY, 32_768, 65_536];
const MANY: usize = 16_384;

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
        for t in TOKENS {
            for (shape, fused) in layers(d, hidden, t) {
                // The products alone with one number of tokens, and other numbers where layers are large.
                if t == MANY || (has_tokens(d, t) && !alone(shape, fused)) {
                    shape_case(gpu, shape, fused, sink)?;
                }
            }
        }
        bias_case(gpu, MANY, 3 * d, sink)?;
    }
    Ok(())
}

/// Whether layers of width `d` are measured over `t` tokens; ViT-22B fills a device with few.
fn has_tokens(d: usize, t: usize) -> bool {
    d >= 768 && (d <= 2048 || t == 8192)
}

/// Whether it is a forward product without what a layer fuses to it.
fn alone(shape: Shape, fused: Fused) -> bool {
    shape.layout == Layout::Nt && fused == Fused::Nothing
}

/// The products of a layer over `t` tokens, forward and backward, with what is fused to them; each forward one alone
/// as well.
pub fn layers(d: usize, hidden: usize, t: usize) -> Vec<(Shape, Fused)> {
    let layers = [
        (d, 3 * d, Fused::Bias, Fused::Nothing),
        (d, d, Fused::Residual, Fused::Nothing),
        (d, hidden, Fused::Gelu(GeluKind::Erf), Fused::Nothing),
        (hidden, d, Fused::Residual, Fused::GeluGrad(GeluKind::Erf)),
    ];
    let products = |(inner, outer, forward, backward)| {
        let shape = |layout, m, n, k| Shape { layout, m, n, k };
        [
            (shape(Layout::Nt, t, outer, inner), Fused::Nothing),
            (shape(Layout::Nt, t, outer, inner), forward),
            (shape(Layout::Nn, t, inner, outer), backward),
            (shape(Layout::Tn, outer, inner, t), Fused::Sum),
        ]
    };
    layers.into_iter().flat_map(products).collect()
}

/// The cases of one product: by the kernel that is chosen, and where that is Hopper's own, by the best of every GPU's.
///
/// # Errors
/// A shape that the kernels do not take, a device that fails.
pub fn shape_case(gpu: &Gpu, shape: Shape, fused: Fused, sink: &mut Sink<'_>) -> Result<()> {
    let operands = Operands::new(gpu, shape, fused)?;
    let plans = plans(shape, operands.epilogue(0).finish(), gpu.device.info());
    let portable = plans.iter().find(|plan| plan.tile.hopper.is_none());
    let chosen = plans.first().ok_or_else(|| Error::failure("no tile fits the device"))?;
    operands.case(gpu, chosen, "", sink)?;
    match portable {
        Some(plan) if plan.tile != chosen.tile => operands.case(gpu, plan, "_portable", sink),
        _ => Ok(()),
    }
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
