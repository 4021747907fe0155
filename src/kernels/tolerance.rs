//! How far results of the kernels may lie from the same operation in f64 on the same operands: what the tests hold
//! them to, and what the table of `trencadis kernels --matrix` promises.

use std::fmt;

/// How far apart a result x and its reference y may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Most `1 − 2⟨x,y⟩/(⟨x,x⟩+⟨y,y⟩)`.
    pub metric: f64,
    /// Largest difference of two elements, as a part of the largest of y.
    pub largest: f64,
}

impl Tolerance {
    /// The same for elements whose rounding is `by` times as fine, as that of f16 is 8 times that of bf16.
    pub fn finer(self, by: f64) -> Self {
        Self { metric: self.metric / by.powi(2), largest: self.largest / by }
    }
}

impl fmt::Display for Tolerance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:e}, {:e}", self.metric, self.largest)
    }
}

const fn tolerance(metric: f64, largest: f64) -> Tolerance {
    Tolerance { metric, largest }
}

/// One rounding to bf16.
pub const ROUNDED: Tolerance = tolerance(8e-6, 4e-3);
/// A result in f32 that is no sum over rows: statistics, sums over images.
pub const SINGLE: Tolerance = tolerance(1e-12, 1e-6);
/// Sums over rows in f32.
pub const SUMMED: Tolerance = tolerance(1e-11, 2e-6);
/// How much finer f16 is rounded than bf16.
pub const F16_FINER: f64 = 8.0;

/// Attention in bf16: probabilities are rounded to bf16 before they meet v.
pub const ATTENTION: Tolerance = tolerance(2e-5, 1e-2);
/// Its gradients of q, k and v.
pub const ATTENTION_GRAD: Tolerance = tolerance(2e-5, 2e-2);
/// Its gradients of the gains and biases of QK-norm.
pub const ATTENTION_AFFINE_GRAD: Tolerance = tolerance(5e-5, 2e-2);
/// Attention pooling: gradients in f32, made of results that were rounded to bf16.
pub const POOL_GRAD: Tolerance = tolerance(1e-8, 2e-5);
/// The same with a bias of k, whose own gradient is 0 but for that rounding.
pub const POOL_GRAD_BIASED: Tolerance = tolerance(1e-6, 4e-3);
/// Gradients of position tables.
pub const POSITION_GRAD: Tolerance = tolerance(1e-11, 3e-6);
/// Gradient of the Fourier map: a phase of some tens of turns is known to 2^-19 of a turn.
pub const FOURIER_GRAD: Tolerance = tolerance(1e-10, 2e-5);

/// Of each cosine and sine of a rotary position, whatever the number of turns.
pub const ROPE: f64 = 1e-6;
/// Of each element of a GEMM in bf16: half a unit in the last place, with a margin for f32.
pub const GEMM_BF16: f64 = 1.02 / 256.0;
/// Of each element of a GEMM in f32.
pub const GEMM_F32: f64 = 2e-5;
/// What sums in f32 add beside it, where terms cancel.
pub const GEMM_MARGIN: f64 = 2e-5;
/// Of the loss, as a part of the larger of it and 1.
pub const LOSS: f64 = 2e-6;
/// Distance of the gradients of the loss, as [`Tolerance::metric`].
pub const LOSS_GRAD: f64 = 8e-6;
/// Of a contrastive loss, as a part of the larger of it and 1: scores of e^scale are known to its last places in f32.
pub const CONTRASTIVE: f64 = 2e-5;
/// Its gradients: those of scores are rounded to bf16 before they meet the vectors.
pub const CONTRASTIVE_GRAD: Tolerance = tolerance(2e-5, 1e-2);
/// Its gradients of scale and bias, as a part of the sum of the sizes of what they are sums of.
pub const CONTRASTIVE_SUMS: f64 = 2e-6;
/// Of each element that an optimiser step writes.
pub const OPTIMISER: f64 = 4e-7;
