//! Products of matrices in another engine's memory.

use std::ffi::c_void;

use half::bf16;
use trencadis::device::{Kernels, Ptr, RawStream};
use trencadis::kernels::gemm::{Epilogue, GeluGrad, Gemm, Layout, Matrix, Plan, Shape, Store, Sum, Vector};
use trencadis::recipe::GeluKind;
use trencadis::{Error, Result};

use super::code;

/// A product and what becomes of it. Matrices are dense and bf16, vectors f32; 0 is none.
#[repr(C)]
pub struct GemmCall {
    /// Result `[m, n]` over k.
    pub m: i64,
    pub n: i64,
    pub k: i64,
    /// 0 NT: `a[m, k] b[n, k]`; 1 NN: `b[k, n]`; 2 TN: `a[k, m] b[k, n]`.
    pub layout: i32,
    /// 0 the product; 1 with GELU (erf) of it, kept before GELU in `side`; 2 plus the residual `side`;
    /// 3 times the slope of GELU at `side`, column sums to `bias_grad`; 4 written to `out` in f32.
    pub fused: i32,
    pub a: u64,
    pub b: u64,
    pub out: u64,
    pub bias: u64,
    pub side: u64,
    pub bias_grad: u64,
    pub workspace: u64,
    pub workspace_bytes: u64,
}

impl GemmCall {
    /// # Safety
    /// Every address has memory for what its field says.
    unsafe fn prepare(&self, kernels: &Kernels) -> Result<(Gemm<'_>, Epilogue<'_>, Plan)> {
        let layout = match self.layout {
            0 => Layout::Nt,
            1 => Layout::Nn,
            2 => Layout::Tn,
            other => return Err(Error::usage(format!("{other} is no layout, expected 0, 1 or 2"))),
        };
        let [m, n, k] = [self.m, self.n, self.k].map(|x| usize::try_from(x).unwrap_or(0));
        let [a_stride, b_stride] = match layout {
            Layout::Nt => [k, k],
            Layout::Nn => [k, n],
            Layout::Tn => [m, n],
        };
        // SAFETY: as the caller promises.
        let matrix =
            |address, stride, len| unsafe { Matrix::raw(Ptr::<bf16>::from_raw(address), stride, len) };
        // SAFETY: likewise.
        let vector = |address| unsafe { Vector::raw(Ptr::<f32>::from_raw(address), n) };
        let result = |address| matrix(address, n, m * n);
        let gelu = GeluKind::Erf;
        let plain = Store { bias: vector(self.bias), ..Store::plain(result(self.out)) };
        let epilogue = match self.fused {
            0 => Epilogue::Store(plain),
            1 => Epilogue::Store(Store { gelu: Some(gelu), pre: result(self.side), ..plain }),
            2 => Epilogue::Store(Store { residual: result(self.side), ..plain }),
            3 => Epilogue::GeluGrad(GeluGrad {
                out: result(self.out),
                pre: result(self.side),
                gelu,
                bias_grad: vector(self.bias_grad),
                accumulate: Vector::none(),
            }),
            4 => Epilogue::Sum(Sum {
                // SAFETY: likewise.
                out: unsafe { Matrix::raw(Ptr::from_raw(self.out), n, m * n) },
                accumulate: Vector::none(),
            }),
            other => {
                return Err(Error::usage(format!("{other} is nothing that can be fused, expected 0 to 4")));
            }
        };
        let gemm = Gemm {
            shape: Shape { layout, m, n, k },
            a: matrix(self.a, a_stride, m * k),
            b: matrix(self.b, b_stride, n * k),
            live: Vector::none(),
            dependent: false,
        };
        let plan = gemm.plan(&epilogue, kernels.info())?;
        Ok((gemm, epilogue, plan))
    }
}

/// Bytes of workspace that a product needs.
///
/// # Safety
/// `kernels` is open, `call` is a struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_gemm_workspace(kernels: *const Kernels, call: *const GemmCall) -> i64 {
    // SAFETY: as the caller promises; addresses are not followed.
    let (kernels, call) = unsafe { (&*kernels, &*call) };
    // SAFETY: nothing is launched.
    code(
        unsafe { call.prepare(kernels) }
            .map(|(gemm, epilogue, plan)| epilogue.workspace_bytes(gemm.shape, &plan) as i64),
    )
}

/// Queues a product.
///
/// # Safety
/// `kernels` is open, its context current, `stream` one of its streams, every address in `call` as its field
/// says until the kernels have run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_gemm(
    kernels: *const Kernels,
    stream: *mut c_void,
    call: *const GemmCall,
) -> i64 {
    // SAFETY: as the caller promises.
    let (kernels, call) = unsafe { (&*kernels, &*call) };
    // SAFETY: likewise.
    code(unsafe { call.prepare(kernels) }.and_then(|(gemm, epilogue, plan)| unsafe {
        let workspace = Vector::raw(Ptr::<u8>::from_raw(call.workspace), call.workspace_bytes as usize);
        gemm.launch_on(kernels, RawStream(stream), &epilogue, &plan, &workspace).map(|()| 0)
    }))
}
