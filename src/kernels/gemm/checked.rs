//! Checked launches: shapes, alignment and extents of memory are verified before anything is queued.

use half::bf16;

use crate::device::{DeviceInfo, Kernels, Ptr, RawStream, Stream};
use crate::ops::GeluKind;
use crate::{Error, Result};

use super::heuristics::{self, Finish, Plan, Shape};
use super::memory::{Matrix, Vector};
use super::raw::{self, GemmParams, SumRowsParams, SumSlicesParams};
use super::tiles::{Kind, Layout, MAX_STAGES, MIN_STAGES};

/// A product of two matrices in bf16, summed in f32.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// Extents of the product and layout of its operands. `n` is a multiple of 8; so are `k` of NT and NN,
    /// and `m` of TN.
    pub shape: Shape,
    /// First operand, `[m, k]`, or `[k, m]` for TN.
    pub a: Matrix<'a, bf16>,
    /// Second operand, `[k, n]`, or `[n, k]` for NT.
    pub b: Matrix<'a, bf16>,
    /// One number: the rows of the batch that hold anything. The other rows of `a` (for TN: of both
    /// operands) are not read, and for NT and NN the result's are zeros. [`Vector::none`]: all rows.
    pub live: Vector<'a, i32>,
    /// Programmatic dependent launch, see [`Launch`](crate::device::Launch).
    pub dependent: bool,
}

/// A formula as kernels are told it: `enum Gelu` of `kernels/gemm/gelu.cuh`.
pub(in crate::kernels) fn gelu_code(kind: GeluKind) -> i32 {
    match kind {
        GeluKind::Erf => 1,
        GeluKind::Tanh => 2,
    }
}

/// What becomes of the product. Vectors are f32 like the master parameters that they are: they are short,
/// so a bf16 copy would round them and save no time.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a> {
    /// See [`Store`].
    Store(Store<'a>),
    /// See [`GeluGrad`].
    GeluGrad(GeluGrad<'a>),
    /// See [`Sum`].
    Sum(Sum<'a>),
}

/// `v = a b + bias; pre = v; v = gelu(v); out = residual + keep[row] · gamma[column] · v`, each step where
/// it is asked for. GELU is taken of the f32 `v`; `pre` is rounded.
#[derive(Clone, Copy, Debug)]
pub struct Store<'a> {
    /// Result, `[m, n]`.
    pub out: Matrix<'a, bf16>,
    /// `[n]`.
    pub bias: Vector<'a, f32>,
    /// Which GELU.
    pub gelu: Option<GeluKind>,
    /// Result before GELU, `[m, n]`.
    pub pre: Matrix<'a, bf16>,
    /// `[m, n]`; may be `out`.
    pub residual: Matrix<'a, bf16>,
    /// LayerScale, `[n]`.
    pub gamma: Vector<'a, f32>,
    /// Drop-path factor of each row, `[m]`: 0, or what makes up for the dropped ones.
    pub keep: Vector<'a, f32>,
}

impl<'a> Store<'a> {
    /// The product itself.
    pub fn plain(out: Matrix<'a, bf16>) -> Self {
        Self {
            out,
            bias: Vector::none(),
            gelu: None,
            pre: Matrix::none(),
            residual: Matrix::none(),
            gamma: Vector::none(),
            keep: Vector::none(),
        }
    }
}

/// `out = (a b) · gelu'(pre)`, and the gradient of the bias: the column sums of the result before it is
/// rounded to bf16, so that no rounding adds up over the rows.
#[derive(Clone, Copy, Debug)]
pub struct GeluGrad<'a> {
    /// Result, `[m, n]`; may be `pre`.
    pub out: Matrix<'a, bf16>,
    /// What GELU was taken of, `[m, n]`.
    pub pre: Matrix<'a, bf16>,
    /// Which GELU.
    pub gelu: GeluKind,
    /// Column sums, `[n]`.
    pub bias_grad: Vector<'a, f32>,
    /// One number: whether `bias_grad` is added to (not 0) or overwritten (0, or [`Vector::none`]).
    pub accumulate: Vector<'a, i32>,
}

/// `out (+)= a b` in f32, such as a weight's gradient.
#[derive(Clone, Copy, Debug)]
pub struct Sum<'a> {
    /// Result, `[m, n]`.
    pub out: Matrix<'a, f32>,
    /// One number: whether `out` is added to (not 0) or overwritten (0, or [`Vector::none`]).
    pub accumulate: Vector<'a, i32>,
    /// Sums of the squares of `out` as it is left, [`raw::square_sums`] of them, or [`Vector::none`]. They are written,
    /// and all together are the square of the norm, infinite where `out` has numbers from 1.8e19 on.
    pub squares: Vector<'a, f64>,
}

impl Epilogue<'_> {
    /// The kernel that computes it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Store(_) => Kind::Store,
            Self::GeluGrad(_) => Kind::GeluGrad,
            Self::Sum(_) => Kind::Sum,
        }
    }

    /// What it takes beside the product.
    pub fn finish(&self) -> Finish {
        match self {
            Self::Store(e) => Finish::store(e.gelu.is_some(), !e.pre.is_none(), !e.residual.is_none()),
            Self::GeluGrad(_) => Finish::gelu_grad(),
            Self::Sum(_) => Finish::sum(),
        }
    }

    fn column_sums(&self) -> bool {
        matches!(self, Self::GeluGrad(e) if !e.bias_grad.is_none())
    }

    /// Bytes of workspace that a launch with this plan needs.
    pub fn workspace_bytes(&self, shape: Shape, plan: &Plan) -> usize {
        raw::workspace_bytes(plan, self.kind(), shape.m, shape.n, self.column_sums())
    }
}

pub(super) fn refuse<T>(what: std::fmt::Arguments<'_>) -> Result<T> {
    Err(Error::usage(format!("gemm: {what}")))
}

/// Most clusters of a plan, far more than a GPU has.
const MAX_CLUSTERS: u32 = 65_535;

/// Largest extent: the kernels count in i32, up to the end of the last tile.
const MAX_EXTENT: usize = i32::MAX as usize - 511;

/// Verifies an extent, which has to be a multiple of 8 where memory is read 16 bytes at a time along it.
pub(super) fn check_extent(name: &str, extent: usize, contiguous: bool) -> Result<()> {
    if extent == 0 || extent > MAX_EXTENT {
        return refuse(format_args!("{name} is {extent}; it must be from 1 to {MAX_EXTENT}"));
    }
    if contiguous && !extent.is_multiple_of(8) {
        return refuse(format_args!("{name} is {extent}; it must be a multiple of 8, so pad the matrix"));
    }
    Ok(())
}

impl Gemm<'_> {
    /// The plan for this product on a device.
    ///
    /// # Errors
    /// A device whose shared memory holds no tile.
    pub fn plan(&self, epilogue: &Epilogue<'_>, device: &DeviceInfo) -> Result<Plan> {
        match heuristics::plan(self.shape, epilogue.finish(), device) {
            Some(plan) => Ok(plan),
            None => refuse(format_args!(
                "{} has {} bytes of shared memory for a block, which hold no tile; use the CPU device",
                device.name, device.shared_per_block
            )),
        }
    }

    /// Verifies everything that can be verified without reading device memory.
    ///
    /// # Errors
    /// The first thing that is not as the fields of [`Gemm`] and [`Epilogue`] say.
    pub fn check(
        &self,
        epilogue: &Epilogue<'_>,
        plan: &Plan,
        workspace: &Vector<'_, u8>,
        device: &DeviceInfo,
    ) -> Result<()> {
        let Shape { layout, m, n, k } = self.shape;
        check_extent("m", m, layout == Layout::Tn)?;
        check_extent("n", n, true)?;
        check_extent("k", k, layout != Layout::Tn)?;
        let (a, b) = match layout {
            Layout::Nt => ([m, k], [n, k]),
            Layout::Nn => ([m, k], [k, n]),
            Layout::Tn => ([k, m], [k, n]),
        };
        self.a.check("a", a)?;
        self.b.check("b", b)?;
        self.live.check_optional("live", 1)?;
        match epilogue {
            Epilogue::Store(e) => {
                e.out.check("out", [m, n])?;
                e.pre.check_optional("pre", [m, n])?;
                e.residual.check_optional("residual", [m, n])?;
                e.bias.check_wide("bias", n)?;
                e.gamma.check_wide("gamma", n)?;
                e.keep.check_optional("keep", m)?;
            }
            Epilogue::GeluGrad(e) => {
                e.out.check("out", [m, n])?;
                e.pre.check("pre", [m, n])?;
                e.bias_grad.check_optional("bias_grad", n)?;
                e.accumulate.check_optional("accumulate", 1)?;
            }
            Epilogue::Sum(e) => {
                e.out.check("out", [m, n])?;
                e.accumulate.check_optional("accumulate", 1)?;
            }
        }
        self.check_plan(epilogue, plan, device)?;
        if let Epilogue::Sum(e) = epilogue {
            e.squares.check_optional("squares", raw::square_sums(plan, m, n))?;
        }
        let wanted = epilogue.workspace_bytes(self.shape, plan);
        if wanted > 0 {
            workspace.check_workspace(wanted)?;
        }
        Ok(())
    }

    fn check_plan(&self, epilogue: &Epilogue<'_>, plan: &Plan, device: &DeviceInfo) -> Result<()> {
        if plan.tile.hopper.is_some() {
            let kind = epilogue.kind();
            if !device.hopper || !plan.tile.has(kind) || !(1..=MAX_CLUSTERS).contains(&plan.clusters) {
                return refuse(format_args!(
                    "the plan has a tile of {}x{} for Hopper in {} clusters; {} has no such kernel for this epilogue, \
                     or the clusters are not 1 to {MAX_CLUSTERS}",
                    plan.tile.m, plan.tile.n, plan.clusters, device.name
                ));
            }
        } else if !(MIN_STAGES..=MAX_STAGES).contains(&plan.stages) {
            return refuse(format_args!(
                "the plan has {} stages; it must have {MIN_STAGES} to {MAX_STAGES}",
                plan.stages
            ));
        }
        if plan.shared_bytes() > device.shared_per_block {
            return refuse(format_args!(
                "the plan needs {} bytes of shared memory and {} gives a block {}; use fewer stages or a \
                 smaller tile",
                plan.shared_bytes(),
                device.name,
                device.shared_per_block
            ));
        }
        if plan.group == 0 || plan.splits == 0 || plan.splits > 65_535 {
            return refuse(format_args!(
                "the plan has group {} and {} splits; both must be at least 1, and splits at most 65535",
                plan.group, plan.splits
            ));
        }
        if plan.splits > 1 && epilogue.kind() != Kind::Sum {
            return refuse(format_args!(
                "the plan has {} splits; only a sum in f32 can be split, so use 1",
                plan.splits
            ));
        }
        // The kernels count tiles in i32, on Hopper slices of them, and a step beyond the last.
        let tiles = plan.tiles(self.shape.m, self.shape.n).saturating_mul(plan.splits as usize);
        let most = (i32::MAX as u32 - MAX_CLUSTERS) as usize;
        if tiles > most {
            return refuse(format_args!("the result has {tiles} tiles in all slices; it may have {most}"));
        }
        Ok(())
    }

    /// Queues the product and what ends it, on a stream of `kernels`' device that any engine has made.
    ///
    /// # Errors
    /// As for [`check`](Self::check); or the device refuses a launch.
    ///
    /// # Safety
    /// `stream` is a live stream of the device.
    pub unsafe fn launch_on(
        &self,
        kernels: &Kernels,
        stream: RawStream,
        epilogue: &Epilogue<'_>,
        plan: &Plan,
        workspace: &Vector<'_, u8>,
    ) -> Result<()> {
        self.check(epilogue, plan, workspace, kernels.info())?;
        let shape = self.shape;
        let params = self.params(epilogue, plan, workspace.ptr().cast());
        let which = (shape.layout, epilogue.kind());
        // SAFETY: every matrix, vector and the workspace lie in memory of sufficient length, as `check` has
        // found; whoever made them answers for that memory, the caller for the stream.
        unsafe { raw::gemm(kernels, stream, which, plan, &params, self.dependent)? };
        match epilogue {
            Epilogue::GeluGrad(e) if !e.bias_grad.is_none() => {
                let params = SumRowsParams {
                    rows: workspace.ptr().cast(),
                    out: e.bias_grad.ptr(),
                    accumulate: e.accumulate.ptr(),
                    count: shape.m.div_ceil(plan.tile.m as usize) as i32,
                    cols: shape.n as i32,
                };
                // SAFETY: as above.
                unsafe { raw::sum_rows(kernels, stream, &params) }
            }
            Epilogue::Sum(e) if plan.splits > 1 => {
                let params = SumSlicesParams {
                    slices: workspace.ptr().cast(),
                    out: e.out.ptr(),
                    squares: e.squares.ptr(),
                    accumulate: e.accumulate.ptr(),
                    ld_out: e.out.stride() as i64,
                    count: plan.splits as i32,
                    rows: shape.m as i32,
                    cols: shape.n as i32,
                };
                // SAFETY: as above.
                unsafe { raw::sum_slices(kernels, stream, &params) }
            }
            _ => Ok(()),
        }
    }

    /// Queues the product and what ends it.
    ///
    /// # Errors
    /// As for [`check`](Self::check); or the device refuses a launch.
    pub fn launch(
        &self,
        stream: &Stream,
        epilogue: &Epilogue<'_>,
        plan: &Plan,
        workspace: &Vector<'_, u8>,
    ) -> Result<()> {
        // SAFETY: `stream` lives, and the kernels are those of its device.
        unsafe { self.launch_on(stream.device().kernels(), stream.raw(), epilogue, plan, workspace) }
    }

    pub(super) fn params(&self, epilogue: &Epilogue<'_>, plan: &Plan, workspace: Ptr<f32>) -> GemmParams {
        let Shape { m, n, k, .. } = self.shape;
        let mut params = GemmParams {
            a: self.a.ptr(),
            b: self.b.ptr(),
            out: Ptr::null(),
            sum: Ptr::null(),
            live: self.live.ptr(),
            bias: Ptr::null(),
            pre: Ptr::null(),
            side: Ptr::null(),
            gamma: Ptr::null(),
            keep: Ptr::null(),
            workspace: Ptr::null(),
            squares: Ptr::null(),
            accumulate: Ptr::null(),
            lda: self.a.stride() as i64,
            ldb: self.b.stride() as i64,
            ldc: 0,
            ld_pre: 0,
            ld_side: 0,
            m: m as i32,
            n: n as i32,
            k: k as i32,
            gelu: 0,
            stages: plan.stages as i32,
            group: plan.group.min((n as u32).div_ceil(plan.tile.n)) as i32,
        };
        match epilogue {
            Epilogue::Store(e) => {
                (params.out, params.ldc) = (e.out.ptr(), e.out.stride() as i64);
                (params.pre, params.ld_pre) = (e.pre.ptr(), e.pre.stride() as i64);
                (params.side, params.ld_side) = (e.residual.ptr(), e.residual.stride() as i64);
                (params.bias, params.gamma, params.keep) = (e.bias.ptr(), e.gamma.ptr(), e.keep.ptr());
                params.gelu = e.gelu.map_or(0, gelu_code);
            }
            Epilogue::GeluGrad(e) => {
                (params.out, params.ldc) = (e.out.ptr(), e.out.stride() as i64);
                (params.side, params.ld_side) = (e.pre.ptr(), e.pre.stride() as i64);
                params.gelu = gelu_code(e.gelu);
                if epilogue.column_sums() {
                    params.workspace = workspace;
                }
            }
            Epilogue::Sum(e) => {
                (params.sum, params.ldc) = (e.out.ptr(), e.out.stride() as i64);
                params.accumulate = e.accumulate.ptr();
                params.squares = e.squares.ptr();
                params.workspace = workspace;
            }
        }
        params
    }
}
