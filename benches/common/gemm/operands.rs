//! Operands of a product with what is fused to it, in as many sets as exceed the cache.

use bytemuck::Pod;
use half::bf16;
use trencadis::Result;
use trencadis::device::{Buffer, Stream};
use trencadis::kernels::gemm::{Epilogue, GeluGrad, Gemm, Layout, Matrix, Plan, Shape, Store, Sum, Vector};

use super::Fused;
use crate::common::gpu::{Case, Gpu, Rotated, Sink};

/// All of it, on the device.
pub struct Operands {
    pub shape: Shape,
    pub fused: Fused,
    pub sets: usize,
    a: Rotated<bf16>,
    b: Rotated<bf16>,
    out: Rotated<bf16>,
    sum: Rotated<f32>,
    side: Rotated<bf16>,
    bias: Buffer<f32>,
    gamma: Buffer<f32>,
    keep: Buffer<f32>,
    bias_grad: Buffer<f32>,
    add: Buffer<i32>,
}

impl Operands {
    /// Random ones, and sums that are added to.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(gpu: &Gpu, shape: Shape, fused: Fused) -> Result<Self> {
        let Shape { m, n, k, .. } = shape;
        let result = if matches!(fused, Fused::Nothing | Fused::Bias) { 2 } else { 4 };
        Self::of(gpu, shape, fused, gpu.sets(2 * (m * k + n * k) + result * m * n), true)
    }

    /// So many sets; sums are overwritten where not `add`.
    ///
    /// # Errors
    /// The device has no room.
    pub fn of(gpu: &Gpu, shape: Shape, fused: Fused, sets: usize, add: bool) -> Result<Self> {
        let Shape { m, n, k, .. } = shape;
        let with_sum = fused == Fused::Sum;
        let with_side = matches!(fused, Fused::Gelu(_) | Fused::Residual | Fused::GeluGrad(_));
        let vector = |len: usize| gpu.device.upload(&vec![0.5f32; len]);
        Ok(Self {
            shape,
            fused,
            sets,
            a: gpu.random(sets, m * k)?,
            b: gpu.random(sets, n * k)?,
            out: gpu.room(sets, if with_sum { 0 } else { m * n })?,
            sum: gpu.room(sets, if with_sum { m * n } else { 0 })?,
            side: gpu.random(sets, if with_side { m * n } else { 0 })?,
            bias: vector(n)?,
            gamma: vector(n)?,
            keep: vector(m)?,
            bias_grad: vector(n)?,
            add: gpu.device.upload(&[i32::from(add)])?,
        })
    }

    /// The product of a set.
    pub fn gemm(&self, set: usize) -> Gemm<'_> {
        let Shape { layout, m, n, k } = self.shape;
        let [a_stride, b_stride] = match layout {
            Layout::Nt => [k, k],
            Layout::Nn => [k, n],
            Layout::Tn => [m, n],
        };
        Gemm {
            shape: self.shape,
            a: matrix(&self.a, set, a_stride, m * k),
            b: matrix(&self.b, set, b_stride, n * k),
            live: Vector::none(),
            dependent: false,
        }
    }

    /// What becomes of it.
    pub fn epilogue(&self, set: usize) -> Epilogue<'_> {
        let Shape { m, n, .. } = self.shape;
        let plain = Store::plain(matrix(&self.out, set, n, m * n));
        let bias = Vector::from(&self.bias);
        match self.fused {
            Fused::Nothing => Epilogue::Store(plain),
            Fused::Bias => Epilogue::Store(Store { bias, ..plain }),
            Fused::Gelu(kind) => Epilogue::Store(Store {
                bias,
                gelu: Some(kind),
                pre: matrix(&self.side, set, n, m * n),
                ..plain
            }),
            Fused::Residual => Epilogue::Store(Store {
                bias,
                residual: matrix(&self.side, set, n, m * n),
                gamma: Vector::from(&self.gamma),
                keep: Vector::from(&self.keep),
                ..plain
            }),
            Fused::GeluGrad(gelu) => Epilogue::GeluGrad(GeluGrad {
                out: matrix(&self.out, set, n, m * n),
                pre: matrix(&self.side, set, n, m * n),
                gelu,
                bias_grad: Vector::from(&self.bias_grad),
                accumulate: Vector::from(&self.add),
            }),
            Fused::Sum => Epilogue::Sum(Sum {
                out: matrix(&self.sum, set, n, m * n),
                accumulate: Vector::from(&self.add),
                squares: Vector::none(),
            }),
        }
    }

    /// Runs one set by a plan.
    ///
    /// # Errors
    /// A plan that the kernels do not take, a device that fails.
    pub fn launch(&self, stream: &Stream, set: usize, plan: &Plan, workspace: &Buffer<u8>) -> Result<()> {
        self.gemm(set).launch(stream, &self.epilogue(set), plan, &Vector::from(workspace))
    }

    /// Workspace that is large enough for each of `plans`.
    ///
    /// # Errors
    /// The device has no room.
    pub fn workspace(&self, gpu: &Gpu, plans: &[Plan]) -> Result<Buffer<u8>> {
        let bytes = plans.iter().map(|plan| self.epilogue(0).workspace_bytes(self.shape, plan)).max();
        gpu.device.alloc(bytes.unwrap_or(0).max(16))
    }

    /// Hands the case of a plan to `sink`; `suffix` ends the kernel's name.
    ///
    /// # Errors
    /// As for [`launch`](Self::launch).
    pub fn case(&self, gpu: &Gpu, plan: &Plan, suffix: &str, sink: &mut Sink<'_>) -> Result<()> {
        let workspace = self.workspace(gpu, std::slice::from_ref(plan))?;
        let Shape { m, n, k, .. } = self.shape;
        sink(&Case {
            kernel: self.name() + suffix,
            shape: format!("{m}x{n}x{k}"),
            operations: self.operations(),
            bytes: 0.0,
            sets: self.sets,
            launch: &|stream: &Stream, set: usize| self.launch(stream, set, plan, &workspace),
        })
    }

    /// What is computed.
    pub fn name(&self) -> String {
        let layout = format!("{:?}", self.shape.layout).to_lowercase();
        format!("gemm_{layout}_{}", self.fused.name())
    }

    /// Additions and multiplications of a set.
    pub fn operations(&self) -> f64 {
        let Shape { m, n, k, .. } = self.shape;
        2.0 * m as f64 * n as f64 * k as f64
    }

    /// All results.
    ///
    /// # Errors
    /// The device has failed.
    pub fn results(&self) -> Result<Vec<f32>> {
        let mut all: Vec<f32> = Vec::new();
        let mut half = |x: &Rotated<bf16>| -> Result<()> {
            all.extend(x.download()?.into_iter().map(f32::from));
            Ok(())
        };
        half(&self.out)?;
        if matches!(self.fused, Fused::Gelu(_)) {
            half(&self.side)?;
        }
        all.extend(self.sum.download()?);
        all.extend(self.bias_grad.download()?);
        Ok(all)
    }
}

fn matrix<T: Pod>(x: &Rotated<T>, set: usize, stride: usize, len: usize) -> Matrix<'_, T> {
    // SAFETY: every part of a rotated buffer holds the matrix that it is made for, and lives as long.
    unsafe { Matrix::raw(x.ptr(set), stride, len) }
}
