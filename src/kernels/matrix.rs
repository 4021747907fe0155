//! The table of what the kernels do, for which shapes, on which GPUs and how exactly: made from the registry, printed
//! by `trencadis kernels --matrix`.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::registry::{self, Source, Tier};
use super::tolerance as to;
use super::{collective, contrastive, loss, pool};

/// One operation: the kernels whose names begin like this, and what the registry does not tell of them.
struct Op {
    name: &'static str,
    prefixes: &'static [&'static str],
    limits: String,
    tolerance: String,
}

fn op(
    name: &'static str,
    prefixes: &'static [&'static str],
    limits: impl Into<String>,
    tolerance: String,
) -> Op {
    Op { name, prefixes, limits: limits.into(), tolerance }
}

/// Every operation that has kernels.
fn ops() -> Vec<Op> {
    let widths = |widths: &mut dyn Iterator<Item = usize>| {
        let widths: BTreeSet<usize> = widths.collect();
        let list = widths.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        format!(
            "head dim a multiple of 8 to {}; others run on the next of {list}",
            widths.last().unwrap_or(&0)
        )
    };
    let forward = widths(&mut registry::attention::INSTANCES.iter().map(|instance| instance.width));
    let backward = widths(&mut registry::attention::BACKWARD_INSTANCES.iter().map(|instance| instance.width));
    let norm = registry::norm::FORWARD.iter().map(|kernel| kernel.widest()).max().unwrap_or(0);
    let rows = "rows a multiple of 8 wide";
    let gemm = |of: &str, unit: f64| format!("{of}: {unit:.1e} of each element + {:e}", to::GEMM_MARGIN);
    vec![
        op("attention, work lists", &["attention_schedule"], "up to 2^30 rows and images", "exact".into()),
        op(
            "attention, forward: QK-norm (none, RMS, LayerNorm), rotary positions, shared kv heads",
            &["attention_forward", "attention_prepare"],
            forward,
            format!("{}; in f16 {}", to::ATTENTION, to::ATTENTION.finer(to::F16_FINER)),
        ),
        op(
            "attention, backward",
            &["attention_backward"],
            backward,
            format!(
                "{}; gains {}; in f16 {}; gains {}",
                to::ATTENTION_GRAD,
                to::ATTENTION_AFFINE_GRAD,
                to::ATTENTION_GRAD.finer(to::F16_FINER),
                to::ATTENTION_AFFINE_GRAD.finer(to::F16_FINER)
            ),
        ),
        op(
            "GEMM with bias, GELU, residual",
            &["gemm_bf16_nt_store", "gemm_bf16_nn_store", "gemm_bf16_tn_store"],
            "rows 16-byte aligned; m, n, k below 2^31",
            gemm("bf16", to::GEMM_BF16),
        ),
        op(
            "GEMM times the slope of GELU, column sums",
            &["gemm_bf16_nt_gelugrad", "gemm_bf16_nn_gelugrad", "gemm_bf16_tn_gelugrad"],
            "as above",
            gemm("bf16", to::GEMM_BF16),
        ),
        op(
            "GEMM summed in f32 (weight gradients)",
            &["gemm_bf16_nt_sum", "gemm_bf16_nn_sum", "gemm_bf16_tn_sum", "sum_f32", "bias_grad"],
            "as above",
            gemm("f32", to::GEMM_F32),
        ),
        op(
            "GEMM over chunks of ranks",
            &["gemm_sharded"],
            "as above; at most 64 chunks",
            gemm("bf16", to::GEMM_BF16),
        ),
        op(
            "LayerNorm, RMSNorm, forward, with a residual branch before it",
            &["norm_forward"],
            format!("{rows}, to {norm}"),
            format!("{}; statistics {}", to::ROUNDED, to::SINGLE),
        ),
        op(
            "LayerNorm, RMSNorm, backward",
            &["norm_backward", "norm_sums"],
            format!("{rows}, to {norm}"),
            format!("{}; gain and bias {}", to::ROUNDED, to::SUMMED),
        ),
        op(
            "residual, LayerScale, stochastic depth",
            &["residual", "drop_path_keep"],
            rows,
            format!("{}; LayerScale {}", to::ROUNDED, to::SUMMED),
        ),
        op(
            "attention pooling (MAP)",
            &["pool_attention"],
            format!(
                "head dim a multiple of 8 to {}; at most {} queries",
                pool::MAX_HEAD_DIM,
                pool::MAX_QUERIES
            ),
            format!(
                "{}; gradients in f32 {}, with a bias of k {}",
                to::ROUNDED,
                to::POOL_GRAD,
                to::POOL_GRAD_BIASED
            ),
        ),
        op("mean pooling", &["pool_mean"], rows, to::ROUNDED.to_string()),
        op("gathering of one token an image", &["pool_gather"], rows, "exact".into()),
        op(
            "position embedding",
            &["position"],
            "rows a multiple of 8 wide, of 16 where halves are stacked and for Fourier",
            format!("{}; tables {}; Fourier map {}", to::ROUNDED, to::POSITION_GRAD, to::FOURIER_GRAD),
        ),
        op(
            "angles of rotary positions",
            &["rope_table"],
            "head dim as for attention",
            format!("{:e} of each element", to::ROPE),
        ),
        op(
            "patches: scaling of pixels",
            &["patch_normalise"],
            "any patch; u8 or f32 pixels",
            "one rounding".into(),
        ),
        op("patches: cls and registers", &["patch_prefix"], rows, to::SINGLE.to_string()),
        op(
            "patches from pictures: cropped, resized, augmented, mixed, cut, scaled",
            &["view"],
            "1 or 3 channels; u8 pixels",
            "the host's pixels, and one rounding".into(),
        ),
        op(
            "softmax and sigmoid cross-entropy with gradient",
            &["loss"],
            format!("1 to {} classes", loss::MAX_CLASSES),
            format!("{:e}; gradient {:e}", to::LOSS, to::LOSS_GRAD),
        ),
        op(
            "contrastive losses of images and texts with gradients",
            &["contrastive"],
            format!("vectors a multiple of 8 wide to {}; 1 to 2^24 pairs", contrastive::MAX_WIDTH),
            format!(
                "{:e}; gradients {}; of scale and bias {:e}",
                to::CONTRASTIVE,
                to::CONTRASTIVE_GRAD,
                to::CONTRASTIVE_SUMS
            ),
        ),
        op(
            "AdamW, LAMB, SGD, Adafactor, gradient norm, EMA",
            &["optim"],
            "f32 arenas to 2^35 elements",
            format!("{:e}; Adafactor as one rounding of its momentum to bf16", to::OPTIMISER),
        ),
        op(
            "sums of tensors",
            &["elementwise_add", "elementwise_accumulate"],
            "a multiple of 8 elements",
            "one rounding".into(),
        ),
        op("GELU by itself", &["elementwise_gelu"], rows, to::ROUNDED.to_string()),
        op(
            "sums over ranks",
            &["collective"],
            format!("at most {} ranks", collective::MOST_RANKS),
            "one rounding".into(),
        ),
        op("copy and matrix instructions, for benchmarks", &["measure"], "", "exact".into()),
    ]
}

/// Element types that are named in names of kernels.
const DTYPES: [&str; 4] = ["bf16", "f16", "f32", "u8"];

/// Beginnings of the names of kernels that help others: what they sum or draw in f32 is no type that the operation takes.
const HELPERS: [&str; 5] =
    ["attention_backward_sum", "sum_f32", "norm_sums", "drop_path_keep", "pool_attention_finish"];

/// The table, as markdown.
pub fn markdown() -> String {
    let sources = registry::sources();
    let mut text =
        String::from("| operation | element types | sizes | GPUs | within |\n|---|---|---|---|---|\n");
    for op in ops() {
        let (dtypes, tiers) = found(&sources, op.prefixes);
        let Op { name, limits, tolerance, .. } = op;
        let _ = writeln!(text, "| {name} | {dtypes} | {limits} | {tiers} | {tolerance} |");
    }
    text
}

/// Element types and tiers of the kernels that begin with one of `prefixes`, helpers' types apart.
fn found(sources: &[Source], prefixes: &[&str]) -> (String, &'static str) {
    let mut dtypes: BTreeSet<&str> = BTreeSet::new();
    let mut hopper = false;
    for source in sources {
        for kernel in
            source.kernels.iter().filter(|kernel| prefixes.iter().any(|p| kernel.name.starts_with(p)))
        {
            if !HELPERS.iter().any(|helper| kernel.name.starts_with(helper)) {
                dtypes.extend(kernel.name.split('_').filter(|word| DTYPES.contains(word)));
            }
            hopper |= source.tier == Tier::Sm90;
        }
    }
    let tiers = if hopper { "sm_80 and newer; sm_90a has its own" } else { "sm_80 and newer" };
    (dtypes.into_iter().collect::<Vec<_>>().join(", "), tiers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_one_row_and_every_row_kernels() {
        let (sources, ops) = (registry::sources(), ops());
        for kernel in sources.iter().flat_map(|source| &source.kernels) {
            let rows =
                ops.iter().filter(|op| op.prefixes.iter().any(|prefix| kernel.name.starts_with(prefix)));
            assert_eq!(rows.count(), 1, "{}", kernel.name);
        }
        for helper in HELPERS {
            let mut kernels = sources.iter().flat_map(|source| &source.kernels);
            assert!(kernels.any(|kernel| kernel.name.starts_with(helper)), "{helper}");
        }
        for op in &ops {
            let found = sources.iter().flat_map(|source| &source.kernels);
            assert!(
                found.into_iter().any(|k| op.prefixes.iter().any(|p| k.name.starts_with(p))),
                "{}",
                op.name
            );
        }
    }
}
