//! The checked launch: head dim, sizes, strides, alignment and extents are verified before anything is queued.

use half::bf16;

use super::heuristics::{ForwardPlan, Limits};
use super::instances::INSTANCES;
use super::lists::Schedule;
use super::raw::{self, ForwardParams, QkNorm, QkStatistics};
use crate::device::{Buffer, DeviceInfo, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::Element;
use crate::kernels::operand::{Rows, check_len, check_wide, check_wide_some, check_workspace};
use crate::ops::{AttentionConfig, QkNormKind, Rope};

/// Most heads: the kernels count with products of heads and of columns in 32 bits.
const MAX_HEADS: usize = 4096;

/// Attention over batches of one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Heads, head dim, scale, norm and rotation. The scale is above 0.
    pub config: AttentionConfig,
    /// Token rows T.
    pub tokens: usize,
    /// Image slots N.
    pub slots: usize,
}

/// Statistics of the rows of q, `[T, heads]`, and of k, `[T, kv_heads]`.
#[derive(Clone, Copy)]
pub struct Statistics<'a> {
    /// μ of q; 0 for RMS.
    pub q_mean: &'a Buffer<f32>,
    /// 1/σ of q.
    pub q_rstd: &'a Buffer<f32>,
    /// μ of k.
    pub k_mean: &'a Buffer<f32>,
    /// 1/σ of k.
    pub k_rstd: &'a Buffer<f32>,
}

/// Operands of the forward pass, of [`bf16`] or [`f16`](half::f16).
#[derive(Clone, Copy)]
pub struct Forward<'a, E: Element = bf16> {
    /// `[T, heads·head_dim]`.
    pub q: Rows<'a, E>,
    /// `[T, kv_heads·head_dim]`.
    pub k: Rows<'a, E>,
    /// `[T, kv_heads·head_dim]`.
    pub v: Rows<'a, E>,
    /// γq, βq, γk, βk, `[heads, head_dim]` (those of k `[kv_heads, head_dim]`) or `[head_dim]` as the config says; missing
    /// is 1 or 0. A config without a norm ignores them.
    pub affine: [Option<&'a Buffer<f32>>; 4],
    /// Cosine and sine of the angle of each pair of columns of a token, `[T, head_dim/2, 2]`, the same in all heads; just
    /// where the config has a rotation. Rows of tokens that have no position are (1, 0).
    pub rope: Option<&'a Buffer<f32>>,
    /// `[N + 1]`.
    pub cu_seqlens: &'a Buffer<i32>,
    /// The lists made from it.
    pub schedule: &'a Schedule,
    /// `[T, heads·head_dim]`, all rows written, apart from the operands.
    pub out: Rows<'a, E>,
    /// `[T, heads]`: natural logarithm of the sum of the exponentials of the scaled scores.
    pub lse: &'a Buffer<f32>,
    /// Where the statistics go, where they are wanted; needs a norm.
    pub statistics: Option<Statistics<'a>>,
    /// At least [`Attention::forward_workspace_bytes`], where these are not 0.
    pub workspace: Option<&'a Buffer<u8>>,
}

impl Attention {
    /// Verifies the sizes.
    pub(super) fn check(&self) -> Result<()> {
        let AttentionConfig { heads, kv_heads, head_dim, scale, norm, eps, .. } = self.config;
        let widest = INSTANCES[INSTANCES.len() - 1].width;
        if head_dim == 0 || head_dim > widest || !head_dim.is_multiple_of(8) {
            return Err(Error::usage(format!(
                "attention has a head dim of {head_dim}, expected a multiple of 8 to {widest}; use the CPU \
                 device for others"
            )));
        }
        // Above the smallest normal number, so that a masked score times it stays minus infinity.
        if !(scale as f32).is_normal() || scale <= 0.0 {
            return Err(Error::usage(format!("attention has a scale of {scale}, expected one above 0")));
        }
        // The kernels take subnormal numbers for zero, and a row of zeros would be divided by it.
        if norm != QkNormKind::None && (!(eps as f32).is_normal() || eps < 0.0) {
            return Err(Error::usage(format!(
                "QK-norm has an epsilon of {eps}, expected one above 0, such as 1e-6"
            )));
        }
        if heads > MAX_HEADS {
            return Err(Error::usage(format!(
                "attention has {heads} heads, expected 1 to {MAX_HEADS}, up to which the kernels count pairs of heads and \
                 columns of a row; use the CPU device for more"
            )));
        }
        let (most, items) = (1 << 30, self.tokens.saturating_add(self.slots).max(1).saturating_mul(heads));
        if heads == 0 || self.tokens > most || self.slots > most || items > i32::MAX as usize {
            return Err(Error::usage(format!(
                "attention of {heads} heads over {} token rows in {} image slots: there must be a head, no \
                 number above 2^30, and no more than 2^31 rows of heads; use a smaller token budget",
                self.tokens, self.slots
            )));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::usage(format!(
                "attention has {heads} heads of queries and {kv_heads} of keys and values, expected a number of these \
                 that divides the other; give as many, or fewer that the heads of queries share evenly"
            )));
        }
        Ok(())
    }

    /// Verifies the sizes, and plans for a device.
    ///
    /// # Errors
    /// A head dim that no kernel serves; no heads, or more than 4096; heads of keys that do not divide those of queries; a
    /// scale that is not above 0; a norm with an epsilon that is not above 0; sizes beyond what the kernels count with; a
    /// device whose shared memory is too small.
    pub fn plan(&self, device: &DeviceInfo) -> Result<ForwardPlan> {
        self.check()?;
        let head_dim = self.config.head_dim;
        ForwardPlan::new(head_dim, device).ok_or_else(|| {
            Error::usage(format!(
                "{} has {} bytes of shared memory for a block, too few for attention with a head dim of \
                 {head_dim}; use the CPU device",
                device.name, device.shared_per_block
            ))
        })
    }

    /// Bytes of workspace of the forward pass with a schedule of images of up to `longest` rows: Hopper's kernel takes
    /// keys of long images normalised and rotated, where there is a norm or a rotation.
    pub fn forward_workspace_bytes(&self, plan: &ForwardPlan, longest: usize) -> usize {
        if !plan.normalises_before(self.makes_rows(), self.tokens, self.slots, longest) {
            return 0;
        }
        self.tokens * self.config.kv_width() * size_of::<bf16>()
    }

    /// Verifies the operands and queues the forward pass.
    ///
    /// # Errors
    /// Anything that is not as the fields of [`Attention`] and [`Forward`] say, or a plan that is not of
    /// this head dim and of the schedule's limits; what the device refuses.
    pub fn forward<E: Element>(
        &self,
        stream: &Stream,
        plan: &ForwardPlan,
        operands: &Forward<'_, E>,
    ) -> Result<()> {
        self.plan(stream.device().info())?;
        let params = self.params(plan, operands)?;
        let longest = operands.schedule.longest();
        // SAFETY: every operand was found to be as large as the kernels take it to be.
        unsafe { raw::forward(stream.device().kernels(), stream.raw(), plan, &params, longest) }
    }

    /// Whether rows of q and k are normalised or rotated.
    pub(super) fn makes_rows(&self) -> bool {
        self.config.norm != QkNormKind::None || self.config.rope != Rope::None
    }

    /// The table of the rotation and what is a pair of columns, as the kernels take them.
    pub(super) fn rope(&self, table: Option<&Buffer<f32>>) -> Result<(Ptr<f32>, i32)> {
        let (head_dim, rope) = (self.config.head_dim, self.config.rope);
        let kind = match rope {
            Rope::None => 0,
            Rope::Interleaved => 1,
            Rope::Halves => 2,
        };
        match (kind, table) {
            (0, None) => Ok((Ptr::null(), 0)),
            (0, Some(_)) => Err(Error::usage(
                "attention was given a table of rotary positions, but its config has no rotation; leave the table out \
                 or name the rotation",
            )),
            (_, None) => Err(Error::usage(format!(
                "attention with rotary positions ({rope:?}) needs their table; give cosine and sine of each pair of \
                 columns, [{}, {}, 2]",
                self.tokens,
                head_dim / 2
            ))),
            (_, Some(table)) => Ok((
                check_wide("the table of rotary positions", table, &[self.tokens, head_dim / 2, 2])?,
                kind,
            )),
        }
    }

    /// Whether a plan for `width` columns with `limits` and a schedule belong to this attention.
    pub(super) fn check_schedule(&self, width: usize, limits: Limits, schedule: &Schedule) -> Result<()> {
        let Self { config, tokens, slots, .. } = *self;
        if width < config.head_dim || limits != schedule.limits() {
            return Err(Error::usage(format!(
                "attention with a head dim of {} cannot follow a plan for {width} columns and {limits:?} with a \
                 schedule of {:?}; make the schedule with the limits of this attention's plan",
                config.head_dim,
                schedule.limits()
            )));
        }
        if schedule.sizes() != (tokens, slots) {
            return Err(Error::usage(format!(
                "the schedule is for (token rows, image slots) {:?}, the attention for {:?}; make one of the \
                 same size",
                schedule.sizes(),
                (tokens, slots)
            )));
        }
        Ok(())
    }

    fn params<E: Element>(&self, plan: &ForwardPlan, operands: &Forward<'_, E>) -> Result<ForwardParams<E>> {
        let Self { config, tokens, slots, .. } = *self;
        let schedule = operands.schedule;
        self.check_schedule(plan.instance.width, plan.limits, schedule)?;
        let (width, kv_width) = (config.heads * config.head_dim, config.kv_width());
        let rows = |name, rows: &Rows<'_, E>, width| rows.check(name, tokens, width);
        let (rope, rope_kind) = self.rope(operands.rope)?;
        let k_norm = match (self.forward_workspace_bytes(plan, schedule.longest()), operands.workspace) {
            (0, _) => Ptr::null(),
            (bytes, Some(workspace)) => check_workspace(workspace, bytes)?.cast(),
            (bytes, None) => {
                return Err(Error::usage(format!(
                    "attention with images of up to {} rows needs a workspace of {bytes} bytes on this device; give \
                     it one, or promise the schedule images of at most {} rows",
                    schedule.longest(),
                    plan.limits.short
                )));
            }
        };
        Ok(ForwardParams {
            q: rows("q", &operands.q, width)?,
            k: rows("k", &operands.k, kv_width)?,
            v: rows("v", &operands.v, kv_width)?,
            k_norm,
            out: rows("out", &operands.out, width)?,
            lse: check_len("lse", operands.lse, &[tokens, config.heads])?,
            cu_seqlens: operands.schedule.starts(operands.cu_seqlens)?,
            schedule: schedule.words(),
            rope,
            norm: qk_norm(&config, operands.affine)?,
            statistics: qk_statistics(&config, operands.statistics, tokens)?,
            q_stride: operands.q.stride as i64,
            k_stride: operands.k.stride as i64,
            v_stride: operands.v.stride as i64,
            out_stride: operands.out.stride as i64,
            tokens: tokens as i32,
            slots: slots as i32,
            heads: config.heads as i32,
            kv_heads: config.kv_heads as i32,
            head_dim: config.head_dim as i32,
            rope_kind,
            scale: config.scale as f32,
            turns: i32::from(plan.turns),
            pairs: 0,
            unused: 0,
        })
    }
}

/// Heads, or 1 where they share gains and biases, and columns: of q and of k.
pub(super) fn qk_norm_shapes(config: &AttentionConfig) -> [[usize; 2]; 2] {
    [config.heads, config.kv_heads]
        .map(|heads| [if config.gain_per_head { heads } else { 1 }, config.head_dim])
}

/// The norm as the kernels take it; `affine` is γq, βq, γk, βk.
pub(super) fn qk_norm(config: &AttentionConfig, affine: [Option<&Buffer<f32>>; 4]) -> Result<QkNorm> {
    let kind = match config.norm {
        QkNormKind::None => 0,
        QkNormKind::Rms => 1,
        QkNormKind::LayerNorm | QkNormKind::LayerNormBias => 2,
    };
    let [q, k] = &qk_norm_shapes(config);
    let [q_gain, q_bias, k_gain, k_bias] = if kind == 0 { [None; 4] } else { affine };
    Ok(QkNorm {
        q_gain: check_wide_some("the gain of q", q_gain, q)?,
        k_gain: check_wide_some("the gain of k", k_gain, k)?,
        q_bias: check_wide_some("the bias of q", q_bias, q)?,
        k_bias: check_wide_some("the bias of k", k_bias, k)?,
        kind,
        per_head: i32::from(config.gain_per_head),
        eps: config.eps as f32,
        unused: 0,
    })
}

/// Where the statistics lie.
pub(super) fn qk_statistics(
    config: &AttentionConfig,
    statistics: Option<Statistics<'_>>,
    tokens: usize,
) -> Result<QkStatistics> {
    let Some(statistics) = statistics else {
        let null = Ptr::null();
        return Ok(QkStatistics { q_mean: null, q_rstd: null, k_mean: null, k_rstd: null });
    };
    if config.norm == QkNormKind::None {
        return Err(Error::usage("statistics of q and k are only made with a QK-norm; leave them out"));
    }
    let (q, k) = ([tokens, config.heads], [tokens, config.kv_heads]);
    Ok(QkStatistics {
        q_mean: check_len("the means of q", statistics.q_mean, &q)?,
        q_rstd: check_len("the deviations of q", statistics.q_rstd, &q)?,
        k_mean: check_len("the means of k", statistics.k_mean, &k)?,
        k_rstd: check_len("the deviations of k", statistics.k_rstd, &k)?,
    })
}
