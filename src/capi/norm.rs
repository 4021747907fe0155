//! LayerNorm and RMSNorm of rows.

use std::ffi::c_void;

use bytemuck::Zeroable;
use half::bf16;

use super::Dtype;
use super::handle::{Handle, borrow, device};
use super::operands::{Lines, Memory, count};
use super::status::{Refusal, Result, Status, guard};
use super::structs::{give, read, sized};
use crate::device::{Buffer, Device, Stream};
use crate::kernels::norm::{MAX_WIDTH, Norm as Checked, NormBackward, NormForward};
use crate::ops::NormKind as CheckedKind;

/// LayerNorm or RMSNorm of rows, `y = gain * (x - mean) / sqrt(variance + eps) + bias`. Strides are in elements and multiples
/// of 8, 0 where rows follow one another. Addresses are those of device memory and multiples of 16 bytes, which stay valid
/// until the kernels have run.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct Norm {
    /// sizeof(trencadis_norm).
    pub size: u64,
    /// Rows.
    pub tokens: u64,
    /// Columns, a multiple of 8 to 8192.
    pub width: u64,
    /// Which norm: a trencadis_norm_kind.
    pub kind: u32,
    /// Elements of x, y and their gradients: a trencadis_dtype, TRENCADIS_DTYPE_BF16.
    pub dtype: u32,
    /// Added to the variance.
    pub eps: f64,

    /// [tokens, width].
    pub x: *const c_void,
    /// Elements from row to row of x.
    pub x_stride: u64,
    /// `[width]`; null is 1.
    pub gain: *const f32,
    /// `[width]`; null is 0.
    pub bias: *const f32,
    /// Starts of packed images and the end of the last one, [slots + 1]: rows from that end on are not read, and zeros are
    /// written. Null: all rows are used.
    pub cu_seqlens: *const i32,
    /// Images that `cu_seqlens` has room for.
    pub slots: u64,
    /// Result of the forward pass, [tokens, width].
    pub y: *mut c_void,
    /// Elements from row to row of y.
    pub y_stride: u64,
    /// Mean (0 for RMSNorm) and reciprocal standard deviation of each row, [tokens, 2]: written by the forward pass, read by
    /// the backward pass.
    pub stats: *mut f32,

    /// Gradient of y, [tokens, width].
    pub dy: *const c_void,
    /// Elements from row to row of dy.
    pub dy_stride: u64,
    /// What else is added to the gradient of x, such as that of a residual connection around the norm, [tokens, width]; may
    /// be null.
    pub dresidual: *const c_void,
    /// Elements from row to row of dresidual.
    pub dresidual_stride: u64,
    /// Gradient of x, [tokens, width]; may be `dy` or `dresidual`.
    pub dx: *mut c_void,
    /// Elements from row to row of dx.
    pub dx_stride: u64,
    /// Gradient of `gain`, `[width]`; null: not wanted.
    pub dgain: *mut f32,
    /// Gradient of `bias`, `[width]`; null: not wanted.
    pub dbias: *mut f32,
    /// One number: where it is not 0, `dgain` and `dbias` are added to. Null: they are written.
    pub accumulate: *const i32,
    /// Workspace of the backward pass.
    pub workspace: *mut c_void,
    /// Its bytes.
    pub workspace_bytes: u64,
}
sized!(Norm, "trencadis_norm", 200);

/// Which norm.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Centred, divided by the standard deviation.
    LayerNorm = 0,
    /// Divided by the root mean square.
    Rms = 1,
}

struct Call {
    device: Device,
    given: Norm,
    checked: Checked,
}

impl Call {
    /// # Safety
    /// `given` is null or the address of a struct that is as large as it says.
    unsafe fn new(kernels: *const Handle, given: *const Norm) -> Result<Self> {
        let device = device(kernels)?;
        // SAFETY: as the caller promises.
        let given = unsafe { read(given)? };
        if given.dtype != Dtype::Bf16 as u32 {
            return Err(Refusal::unsupported(
                "norm: dtype is not TRENCADIS_DTYPE_BF16, for which alone there are kernels",
            ));
        }
        let kind = match given.kind {
            n if n == NormKind::LayerNorm as u32 => CheckedKind::LayerNorm,
            n if n == NormKind::Rms as u32 => CheckedKind::Rms,
            other => {
                return Err(Refusal::invalid(format!(
                    "norm: {other} is no trencadis_norm_kind; give 0 or 1"
                )));
            }
        };
        let checked =
            Checked { tokens: count(given.tokens), width: count(given.width), kind, eps: given.eps };
        checked.check().map_err(|error| {
            let refusal = Refusal::from(error);
            let served = (1..=MAX_WIDTH).contains(&checked.width) && checked.width.is_multiple_of(8);
            if served { refusal } else { Refusal::unsupported(refusal.message) }
        })?;
        Ok(Self { device, given, checked })
    }

    fn memory(&self) -> Memory<'_> {
        Memory { device: &self.device, operation: "norm" }
    }

    fn lines(&self, name: &str, at: *const c_void, stride: u64) -> Result<Lines<bf16>> {
        self.memory().lines(name, at, [self.checked.tokens, self.checked.width], stride)
    }

    fn column(&self, name: &str, at: *const f32) -> Result<Option<Buffer<f32>>> {
        self.memory().optional(name, at, self.checked.width)
    }

    fn launch_forward(&self, stream: &Stream) -> Result {
        let n = &self.given;
        let (x, y) = (self.lines("x", n.x, n.x_stride)?, self.lines("y", n.y, n.y_stride)?);
        let (gain, bias) = (self.column("gain", n.gain)?, self.column("bias", n.bias)?);
        let stats = self.memory().vector("stats", n.stats, 2 * self.checked.tokens)?;
        let live = self.memory().live(n.cu_seqlens, n.slots)?;
        let operands = NormForward {
            x: x.rows(),
            residual: None,
            gain: gain.as_ref(),
            bias: bias.as_ref(),
            y: y.rows(),
            stats: &stats,
        };
        Ok(self.checked.forward_live(stream, live.as_ref(), &operands)?)
    }

    fn launch_backward(&self, stream: &Stream) -> Result {
        let n = &self.given;
        let (x, dy) = (self.lines("x", n.x, n.x_stride)?, self.lines("dy", n.dy, n.dy_stride)?);
        let dx = self.lines("dx", n.dx, n.dx_stride)?;
        let shape = [self.checked.tokens, self.checked.width];
        let dresidual = self.memory().optional_lines("dresidual", n.dresidual, shape, n.dresidual_stride)?;
        let gain = self.column("gain", n.gain)?;
        let (dgain, dbias) = (self.column("dgain", n.dgain)?, self.column("dbias", n.dbias)?);
        let stats = self.memory().vector("stats", n.stats, 2 * self.checked.tokens)?;
        let live = self.memory().live(n.cu_seqlens, n.slots)?;
        let accumulate = self.memory().optional("accumulate", n.accumulate, 1)?;
        let needed = self.checked.backward_workspace_bytes(&self.device);
        let workspace = self.memory().workspace(n.workspace, n.workspace_bytes, needed)?;
        let operands = NormBackward {
            dy: dy.rows(),
            dresidual: dresidual.as_ref().map(Lines::rows),
            x: x.rows(),
            stats: &stats,
            gain: gain.as_ref(),
            residual: None,
            dx: dx.rows(),
            dgain: dgain.as_ref(),
            dbias: dbias.as_ref(),
            accumulate: accumulate.as_ref(),
        };
        Ok(self.checked.backward_live(stream, live.as_ref(), &operands, &workspace)?)
    }
}

/// Tells how much workspace the backward pass needs; the forward pass needs none.
///
/// # Safety
/// `norm` is a struct whose `size` is set, `workspace_bytes` an address to write to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_norm_plan(
    kernels: *const Handle,
    norm: *const Norm,
    workspace_bytes: *mut u64,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, norm)?;
        let bytes = call.checked.backward_workspace_bytes(&call.device);
        give("workspace_bytes", workspace_bytes, bytes as u64)
    })
}

/// Queues the forward pass: writes `y` and `stats`.
///
/// # Safety
/// Addresses are as their fields say until the kernels have run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_norm_forward(
    kernels: *const Handle,
    stream: *mut c_void,
    norm: *const Norm,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, norm)?;
        call.launch_forward(&borrow(&call.device, stream)?)
    })
}

/// Queues the backward pass: writes `dx`, `dgain` and `dbias` from `dy`, `x` and `stats`.
///
/// # Safety
/// As for `trencadis_norm_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_norm_backward(
    kernels: *const Handle,
    stream: *mut c_void,
    norm: *const Norm,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, norm)?;
        call.launch_backward(&borrow(&call.device, stream)?)
    })
}
