//! What every tile takes for the products of Vision Transformers, and what the cost model loses by its choice.

use std::io::Write;

use trencadis::device::DeviceInfo;
use trencadis::kernels::gemm::{HOPPER_TILES, Kind, Layout, Plan, Scheme, Shape, plans};
use trencadis::recipe::GeluKind;
use trencadis::{Error, Result};

use super::operands::Operands;
use super::{Fused, TOKENS, WIDTHS, alone, has_tokens, layers};
use crate::common::gpu::{Gpu, table};

/// Columns of the table.
pub const HEADER: &str = "kernel,shape,tile,splits,clusters,group,microseconds,tflop_per_s,chosen,samples,device,driver,\
                          sm_mhz,memory_mhz,watts,celsius";

/// What is measured.
pub struct Tuning {
    /// Products whose results are compared with those of the portable kernels first.
    pub checked: Vec<(Shape, Fused)>,
    /// Times that each is run with the same bits.
    pub runs: usize,
    /// Products that are timed.
    pub timed: Vec<(Shape, Fused)>,
    /// Samples of each plan, of which the median counts.
    pub samples: usize,
}

impl Tuning {
    /// ViT-B to ViT-22B over 8192 to 65536 tokens: minutes on one GPU.
    pub fn of_vits() -> Self {
        // No tile divides these extents, nor a stage k.
        let shape = |layout, k| Shape { layout, m: 1160, n: 1168, k };
        let erf = GeluKind::Erf;
        let checked = vec![
            (shape(Layout::Nt, 4304), Fused::Gelu(erf)),
            (shape(Layout::Nt, 4304), Fused::Residual),
            (shape(Layout::Nn, 4304), Fused::Nothing),
            (shape(Layout::Nn, 4304), Fused::GeluGrad(erf)),
            (shape(Layout::Tn, 8200), Fused::Sum),
        ];
        let mut timed = Vec::new();
        for [d, hidden] in WIDTHS {
            for t in TOKENS.into_iter().filter(|&t| has_tokens(d, t)) {
                timed.extend(layers(d, hidden, t).into_iter().filter(|&(shape, fused)| !alone(shape, fused)));
            }
        }
        timed.push((Shape { layout: Layout::Nt, m: 8192, n: 8192, k: 8192 }, Fused::Nothing));
        Self { checked, runs: 100, timed, samples: 5 }
    }
}

/// Plans to measure: the best of every tile of Hopper's and the best of the portable ones; sums also with half and
/// twice the slices.
fn candidates(shape: Shape, operands: &Operands, device: &DeviceInfo) -> Vec<Plan> {
    let finish = operands.epilogue(0).finish();
    let all = plans(shape, finish, device);
    let portable = all.iter().position(|plan| plan.tile.hopper.is_none());
    let mut chosen: Vec<Plan> = all
        .iter()
        .enumerate()
        .filter(|(i, plan)| plan.tile.hopper.is_some() || Some(*i) == portable)
        .map(|(_, plan)| *plan)
        .collect();
    if finish.kind == Kind::Sum {
        for plan in chosen.clone() {
            let most = u32::try_from(shape.k / 64).unwrap_or(16).clamp(1, 16);
            for splits in [plan.splits / 2, 2 * plan.splits] {
                if (1..=most).contains(&splits) && splits != plan.splits {
                    let clusters = if plan.clusters == 0 { 0 } else { device.multiprocessors / 2 };
                    chosen.push(Plan { splits, clusters, ..plan });
                }
            }
        }
    }
    chosen
}

/// What a table calls a tile.
fn label(plan: &Plan) -> String {
    let tile = plan.tile;
    match tile.hopper {
        None => format!("{}x{}x{} portable", tile.m, tile.n, tile.k),
        Some(Scheme::Cooperative) => format!("{}x{} cooperative", tile.m, tile.n),
        Some(Scheme::PingPong) => format!("{}x{} ping-pong", tile.m, tile.n),
    }
}

/// Compares each tile of Hopper's with a portable one, and its bits over `runs` runs.
fn check(gpu: &Gpu, shape: Shape, fused: Fused, runs: usize) -> Result<()> {
    let operands = Operands::of(gpu, shape, fused, 1, false)?;
    let all = candidates(shape, &operands, gpu.device.info());
    let workspace = operands.workspace(gpu, &all)?;
    let run = |plan: &Plan| -> Result<Vec<f32>> {
        operands.launch(&gpu.stream, 0, plan, &workspace)?;
        gpu.stream.synchronize()?;
        operands.results()
    };
    let Some(portable) = all.iter().find(|plan| plan.tile.hopper.is_none()) else {
        return Err(Error::failure("no portable tile fits the device"));
    };
    let want = run(portable)?;
    let square: f64 = want.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let typical = (square / want.len() as f64).sqrt();
    for plan in all.iter().filter(|plan| plan.tile.hopper.is_some()) {
        let got = run(plan)?;
        // Both round, to bf16 even.
        let near = |x: f32, y: f32| f64::from((x - y).abs()) <= f64::from(y.abs()) / 64.0 + 0.02 * typical;
        if let Some(i) = (0..want.len()).find(|&i| !near(got[i], want[i])) {
            return Err(Error::failure(format!(
                "{} {shape:?} by {}: element {i} is {} and by {} {}",
                operands.name(),
                label(plan),
                got[i],
                label(portable),
                want[i]
            )));
        }
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let first = bits(&got);
        for number in 1..runs {
            if bits(&run(plan)?) != first {
                return Err(Error::failure(format!(
                    "{} {shape:?} by {}: run {number} has other bits than the first",
                    operands.name(),
                    label(plan)
                )));
            }
        }
    }
    Ok(())
}

/// Checks, then measures; writes the lines of the table to `out` as they come, and returns a page.
///
/// # Errors
/// A result that is wrong or not always the same, a device that fails, a table that cannot be written.
pub fn run(gpu: &Gpu, tuning: &Tuning, out: &mut dyn Write) -> Result<String> {
    let info = gpu.device.info();
    if !info.hopper {
        return Err(Error::usage(format!(
            "{} has none of the {} tiles that are tuned; take an H100 or H200, and unset TRENCADIS_PORTABLE",
            info.name,
            HOPPER_TILES.len()
        )));
    }
    for &(shape, fused) in &tuning.checked {
        check(gpu, shape, fused, tuning.runs)?;
    }
    let mut write = |line: String| {
        writeln!(out, "{line}")
            .map_err(|cause| Error::failure(format!("the table cannot be written: {cause}")))
    };
    write(HEADER.into())?;
    let mut rows = Vec::new();
    let mut losses = Vec::new();
    for &(shape, fused) in &tuning.timed {
        let operands = Operands::new(gpu, shape, fused)?;
        let plans = candidates(shape, &operands, info);
        gpu.clocks.restart();
        let workspace = operands.workspace(gpu, &plans)?;
        let launch = |plan: usize, set| operands.launch(&gpu.stream, set, &plans[plan], &workspace);
        let seconds = gpu.medians(plans.len(), operands.sets, tuning.samples, &launch)?;
        let (name, size) = (operands.name(), format!("{}x{}x{}", shape.m, shape.n, shape.k));
        let rate = |seconds: f64| operands.operations() / seconds / 1e12;
        for (i, (plan, &seconds)) in plans.iter().zip(&seconds).enumerate() {
            let cells = [
                name.clone(),
                size.clone(),
                label(plan),
                plan.splits.to_string(),
                plan.clusters.to_string(),
                plan.group.to_string(),
                format!("{:.3}", seconds * 1e6),
                format!("{:.2}", rate(seconds)),
                u8::from(i == 0).to_string(),
                tuning.samples.to_string(),
                info.name.clone(),
            ];
            write(table::csv(cells.into_iter().chain(table::clocks(&gpu.reading()))))?;
        }
        let best = (0..plans.len()).min_by(|&i, &j| seconds[i].total_cmp(&seconds[j])).unwrap_or(0);
        let portable = plans.iter().position(|plan| plan.tile.hopper.is_none()).unwrap_or(0);
        let told = |i: usize| format!("{}, {} slices", label(&plans[i]), plans[i].splits);
        losses.push(seconds[0] / seconds[best]);
        rows.push(format!(
            "| {name} | {size} | {} | {:.0} | {} | {:.0} | {:.1} | {:.2} |",
            told(best),
            rate(seconds[best]),
            told(0),
            rate(seconds[0]),
            100.0 * (seconds[0] / seconds[best] - 1.0),
            seconds[portable] / seconds[0]
        ));
    }
    let mean = (losses.iter().map(|loss| loss.ln()).sum::<f64>() / losses.len() as f64).exp();
    let worst = losses.iter().fold(1.0f64, |worst, &loss| worst.max(loss));
    Ok(format!(
        "# Tiles of the GEMM for Hopper\n\n{}, driver {}. Medians of {} samples on random operands that rotate through \
         more than the L2 cache. Before, every tile was compared with a portable one on {} products, and gave the same \
         bits {} times.\n\nThe cost model loses {:.1} % on geometric mean, {:.1} % at most.\n\n\
         | product | shape | fastest | TFLOP/s | chosen | TFLOP/s | loss % | portable takes |\n\
         |---|---|---|---|---|---|---|---|\n{}\n",
        info.name,
        gpu.reading().driver,
        tuning.samples,
        tuning.checked.len(),
        tuning.runs,
        100.0 * (mean - 1.0),
        100.0 * (worst - 1.0),
        rows.join("\n")
    ))
}
