//! Matrix products.

use std::ffi::c_void;

use bytemuck::Zeroable;
use half::bf16;

use super::Dtype;
use super::handle::{Handle, borrow, device};
use super::operands::{Lines, Memory, count, matrix_of};
use super::status::{Refusal, Result, Status, guard};
use super::structs::{give, read, sized};
use crate::device::{Buffer, Device, Stream};
use crate::kernels::gemm::raw::workspace_bytes;
use crate::kernels::gemm::{
    Epilogue as Checked, Finish, GeluGrad, Gemm as Product, Layout as CheckedLayout, Plan, Shape, Store, Sum,
    Vector, plan,
};
use crate::ops::GeluKind;

/// A product of two matrices and what becomes of it. Matrices are row-major, with strides in elements that are multiples
/// of 8 (4 where they are f32), 0 where rows follow one another; vectors are f32. Addresses are those of device memory and
/// multiples of 16 bytes, which stay valid until the kernels have run.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct Gemm {
    /// sizeof(trencadis_gemm).
    pub size: u64,
    /// Rows of the result; a multiple of 8 where the layout is TN.
    pub m: u64,
    /// Columns of the result, a multiple of 8.
    pub n: u64,
    /// Extent that is summed over; a multiple of 8 where the layout is not TN.
    pub k: u64,
    /// How a and b lie: a trencadis_gemm_layout.
    pub layout: u32,
    /// What becomes of the product: a trencadis_gemm_epilogue.
    pub epilogue: u32,
    /// Which GELU: a trencadis_gelu.
    pub gelu: u32,
    /// Elements of all matrices but `out` of a sum: a trencadis_dtype, TRENCADIS_DTYPE_BF16.
    pub dtype: u32,

    /// First operand.
    pub a: *const c_void,
    /// Elements from row to row of a.
    pub a_stride: u64,
    /// Second operand.
    pub b: *const c_void,
    /// Elements from row to row of b.
    pub b_stride: u64,
    /// Starts of packed images and the end of the last one, [slots + 1]: rows of a from that end on (TN: of both operands)
    /// are not read, and the result's are zeros (NT and NN). Null: all rows are used.
    pub cu_seqlens: *const i32,
    /// Images that `cu_seqlens` has room for.
    pub slots: u64,
    /// Result, [m, n]; f32 where the epilogue is a sum.
    pub out: *mut c_void,
    /// Elements from row to row of out.
    pub out_stride: u64,
    /// STORE: `[n]`, or null.
    pub bias: *const f32,
    /// STORE: result before GELU, [m, n], written; may be null. GELU_GRAD: what GELU was taken of, [m, n], read.
    pub pre: *mut c_void,
    /// Elements from row to row of pre.
    pub pre_stride: u64,
    /// STORE: what is added, [m, n]; may be `out`, or null.
    pub residual: *const c_void,
    /// Elements from row to row of residual.
    pub residual_stride: u64,
    /// STORE: factor of each column before the residual is added (LayerScale), `[n]`, or null.
    pub gamma: *const f32,
    /// STORE: factor of each row before the residual is added (drop path), `[m]`, or null.
    pub keep: *const f32,
    /// GELU_GRAD: column sums of the result, `[n]`, or null.
    pub bias_grad: *mut f32,
    /// One number: where it is not 0, `bias_grad`, or `out` of a sum, is added to. Null: it is written.
    pub accumulate: *const i32,
    /// Workspace; may be null where none is needed.
    pub workspace: *mut c_void,
    /// Its bytes.
    pub workspace_bytes: u64,
}
sized!(Gemm, "trencadis_gemm", 200);

/// How the operands of a product lie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmLayout {
    /// a[m, k] b[n, k]^T: a linear layer forward.
    Nt = 0,
    /// a[m, k] b[k, n]: gradient of its input.
    Nn = 1,
    /// a[k, m]^T b[k, n]: gradient of its weight.
    Tn = 2,
}

/// What becomes of a product.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmEpilogue {
    /// v = a b + bias; pre = v; v = gelu(v); out = residual + `keep[row]` * `gamma[column]` * v; steps without an operand are
    /// left out.
    Store = 0,
    /// out = (a b) * gelu'(pre), and its column sums.
    GeluGrad = 1,
    /// out = a b in f32, or out += a b.
    Sum = 2,
}

/// Gaussian error linear unit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// None.
    None = 0,
    /// Exact.
    Erf = 1,
    /// By the hyperbolic tangent.
    Tanh = 2,
}

/// Largest extent that is passed on; the checked launch tells what it takes.
const MOST: u64 = i32::MAX as u64;

/// The caller's numbers, and the memory of its matrices and vectors.
struct Call {
    device: Device,
    given: Gemm,
    shape: Shape,
    gelu: Option<GeluKind>,
}

/// Operands that live as long as a launch.
#[derive(Default)]
struct Operands {
    a: Option<Lines<bf16>>,
    b: Option<Lines<bf16>>,
    out: Option<Lines<bf16>>,
    sum: Option<Lines<f32>>,
    pre: Option<Lines<bf16>>,
    residual: Option<Lines<bf16>>,
    bias: Option<Buffer<f32>>,
    gamma: Option<Buffer<f32>>,
    keep: Option<Buffer<f32>>,
    bias_grad: Option<Buffer<f32>>,
    live: Option<Buffer<i32>>,
    accumulate: Option<Buffer<i32>>,
}

fn vector_of<T: bytemuck::Pod>(buffer: &Option<Buffer<T>>) -> Vector<'_, T> {
    buffer.as_ref().map_or(Vector::none(), Vector::from)
}

impl Call {
    /// # Safety
    /// `given` is null or the address of a struct that is as large as it says.
    unsafe fn new(kernels: *const Handle, given: *const Gemm) -> Result<Self> {
        let device = device(kernels)?;
        // SAFETY: as the caller promises.
        let given = unsafe { read(given)? };
        if given.dtype != Dtype::Bf16 as u32 {
            return Err(Refusal::unsupported(
                "gemm: dtype is not TRENCADIS_DTYPE_BF16, for which alone there are kernels",
            ));
        }
        let layout = match given.layout {
            n if n == GemmLayout::Nt as u32 => CheckedLayout::Nt,
            n if n == GemmLayout::Nn as u32 => CheckedLayout::Nn,
            n if n == GemmLayout::Tn as u32 => CheckedLayout::Tn,
            other => {
                return Err(Refusal::invalid(format!(
                    "gemm: {other} is no trencadis_gemm_layout; give 0, 1 or 2"
                )));
            }
        };
        let gelu = match given.gelu {
            n if n == Gelu::None as u32 => None,
            n if n == Gelu::Erf as u32 => Some(GeluKind::Erf),
            n if n == Gelu::Tanh as u32 => Some(GeluKind::Tanh),
            other => {
                return Err(Refusal::invalid(format!("gemm: {other} is no trencadis_gelu; give 0, 1 or 2")));
            }
        };
        for (name, extent) in [("m", given.m), ("n", given.n), ("k", given.k)] {
            if extent == 0 || extent > MOST {
                return Err(Refusal::invalid(format!(
                    "gemm: {name} is {extent}; it must be from 1 to {MOST}"
                )));
            }
        }
        let shape = Shape { layout, m: count(given.m), n: count(given.n), k: count(given.k) };
        Ok(Self { device, given, shape, gelu })
    }

    fn operands(&self) -> Result<Operands> {
        let memory = Memory { device: &self.device, operation: "gemm" };
        let (g, Shape { layout, m, n, k }) = (&self.given, self.shape);
        let (a, b) = match layout {
            CheckedLayout::Nt => ([m, k], [n, k]),
            CheckedLayout::Nn => ([m, k], [k, n]),
            CheckedLayout::Tn => ([k, m], [k, n]),
        };
        let mut operands = Operands {
            a: Some(memory.lines("a", g.a, a, g.a_stride)?),
            b: Some(memory.lines("b", g.b, b, g.b_stride)?),
            live: memory.live(g.cu_seqlens, g.slots)?,
            accumulate: memory.optional("accumulate", g.accumulate, 1)?,
            ..Operands::default()
        };
        if g.epilogue == GemmEpilogue::Sum as u32 {
            operands.sum = Some(memory.lines("out", g.out, [m, n], g.out_stride)?);
            return Ok(operands);
        }
        operands.out = Some(memory.lines("out", g.out, [m, n], g.out_stride)?);
        operands.pre = memory.optional_lines("pre", g.pre, [m, n], g.pre_stride)?;
        operands.residual = memory.optional_lines("residual", g.residual, [m, n], g.residual_stride)?;
        operands.bias = memory.optional("bias", g.bias, n)?;
        operands.gamma = memory.optional("gamma", g.gamma, n)?;
        operands.keep = memory.optional("keep", g.keep, m)?;
        operands.bias_grad = memory.optional("bias_grad", g.bias_grad, n)?;
        Ok(operands)
    }

    fn epilogue<'a>(&self, operands: &'a Operands) -> Result<Checked<'a>> {
        match self.given.epilogue {
            n if n == GemmEpilogue::Store as u32 => Ok(Checked::Store(Store {
                out: matrix_of(&operands.out),
                bias: vector_of(&operands.bias),
                gelu: self.gelu,
                pre: matrix_of(&operands.pre),
                residual: matrix_of(&operands.residual),
                gamma: vector_of(&operands.gamma),
                keep: vector_of(&operands.keep),
            })),
            n if n == GemmEpilogue::GeluGrad as u32 => Ok(Checked::GeluGrad(GeluGrad {
                out: matrix_of(&operands.out),
                pre: matrix_of(&operands.pre),
                gelu: self.gelu.ok_or_else(|| {
                    Refusal::invalid("gemm: gelu is 0, but the epilogue is the slope of one; give 1 or 2")
                })?,
                bias_grad: vector_of(&operands.bias_grad),
                accumulate: vector_of(&operands.accumulate),
            })),
            n if n == GemmEpilogue::Sum as u32 => Ok(Checked::Sum(Sum {
                out: matrix_of(&operands.sum),
                accumulate: vector_of(&operands.accumulate),
                squares: Vector::none(),
            })),
            other => {
                Err(Refusal::invalid(format!("gemm: {other} is no trencadis_gemm_epilogue; give 0, 1 or 2")))
            }
        }
    }

    fn product<'a>(&self, operands: &'a Operands) -> Product<'a> {
        Product {
            shape: self.shape,
            a: matrix_of(&operands.a),
            b: matrix_of(&operands.b),
            live: vector_of(&operands.live),
            dependent: false,
        }
    }

    /// The plan, and bytes of workspace: by the numbers, and by which addresses are null.
    fn plan(&self) -> Result<(Plan, usize)> {
        let Gemm { epilogue, pre, residual, bias_grad, .. } = self.given;
        let finish = match epilogue {
            n if n == GemmEpilogue::GeluGrad as u32 => Finish::gelu_grad(),
            n if n == GemmEpilogue::Sum as u32 => Finish::sum(),
            _ => Finish::store(self.gelu.is_some(), !pre.is_null(), !residual.is_null()),
        };
        let info = self.device.info();
        let plan = plan(self.shape, finish, info).ok_or_else(|| {
            Refusal::unsupported(format!("gemm: {} has too little shared memory for a block", info.name))
        })?;
        let Shape { m, n, .. } = self.shape;
        Ok((plan, workspace_bytes(&plan, finish.kind, m, n, !bias_grad.is_null())))
    }

    fn launch(&self, stream: &Stream) -> Result {
        let operands = self.operands()?;
        let epilogue = self.epilogue(&operands)?;
        let product = self.product(&operands);
        let (plan, needed) = self.plan()?;
        let memory = Memory { device: &self.device, operation: "gemm" };
        let workspace = memory.workspace(self.given.workspace, self.given.workspace_bytes, needed)?;
        Ok(product.launch(stream, &epilogue, &plan, &Vector::from(&workspace))?)
    }
}

/// Tells how much workspace a product needs. It follows no address; which of them are null counts.
///
/// # Safety
/// `gemm` is a struct whose `size` is set, `workspace_bytes` an address to write to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_gemm_plan(
    kernels: *const Handle,
    gemm: *const Gemm,
    workspace_bytes: *mut u64,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let bytes = Call::new(kernels, gemm)?.plan()?.1;
        give("workspace_bytes", workspace_bytes, bytes as u64)
    })
}

/// Queues a product.
///
/// # Safety
/// Addresses are as their fields say until the kernels have run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_gemm_launch(
    kernels: *const Handle,
    stream: *mut c_void,
    gemm: *const Gemm,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, gemm)?;
        call.launch(&borrow(&call.device, stream)?)
    })
}
