//! What every plan takes for the batches of Vision Transformers, and what is lost by the one that is chosen.

use std::io::Write;
use std::time::{Duration, Instant};

use trencadis::{Error, Result};

use super::operands::{Group, Operands, Pass, Plan, Ready, Results};
use crate::common::gpu::{Gpu, table};
use crate::common::shapes::Images;

/// Columns of the table.
pub const HEADER: &str = "kernel,shape,plan,short,half,quarter,tile_rows,microseconds,tflop_per_s,chosen,portable,\
                          samples,device,driver,sm_mhz,memory_mhz,watts,celsius";

/// Tokens of a batch.
const TOKENS: usize = 32_768;

/// Heads and head dims: of ViT-L, So400m, -H and -g, and the widest.
const HEADS: [(usize, usize); 5] = [(16, 64), (16, 72), (16, 80), (16, 88), (8, 128)];

/// Heads, head dim and images.
pub type Shape = (usize, usize, Images);

/// What is measured.
pub struct Tuning {
    /// Batches whose results are compared with those of the portable kernels first.
    pub checked: Vec<Shape>,
    /// Rows behind the last image of these.
    pub padding: usize,
    /// Times that each is run with the same bits.
    pub runs: usize,
    /// Batches that are timed, the most important first.
    pub timed: Vec<Shape>,
    /// Samples of each plan, of which the median counts.
    pub samples: usize,
    /// After this no further batch is begun.
    pub limit: Duration,
}

impl Tuning {
    /// Images of 64 to 4096 tokens and NaViT's mixes in batches of 32768: minutes on one GPU.
    pub fn of_vits() -> Self {
        // Odd lengths about the tiles of any plan, images of nothing and of one row, long ones.
        let lengths = vec![1, 64, 0, 196, 17, 577, 257, 5, 128, 63, 1025, 0, 400, 2111, 90, 0];
        let images = Images { name: "ragged".into(), lengths };
        let checked = HEADS.iter().map(|&(heads, head_dim)| (heads / 4, head_dim, images.clone())).collect();
        let mut timed = Vec::new();
        for (heads, head_dim) in HEADS {
            for length in [64, 196, 256, 577, 1024, 4096] {
                timed.push((heads, head_dim, Images::same(TOKENS / length, length)));
            }
            for high in [256.0, 512.0] {
                timed.push((heads, head_dim, Images::mix(64.0, high, TOKENS)));
            }
        }
        Self { checked, padding: 37, runs: 100, timed, samples: 5, limit: Duration::from_secs(180) }
    }
}

/// A plan that is measured.
struct Candidate {
    plan: Plan,
    portable: bool,
}

impl Candidate {
    /// The plans of a pass; the first is the one that is chosen, and the best portable one is among them.
    fn all(pass: Pass, head_dim: usize, gpu: &Gpu) -> Result<Vec<Self>> {
        let info = gpu.device.info();
        let portable = pass.portable_plans(head_dim, info)?;
        let mut plans = pass.plans(head_dim, info)?;
        if !plans.contains(&portable[0]) {
            plans.push(portable[0]);
        }
        Ok(plans.into_iter().map(|plan| Self { plan, portable: portable.contains(&plan) }).collect())
    }

    /// What a table calls it.
    fn label(&self) -> String {
        let limits = self.plan.limits();
        let tier = if self.portable { "portable" } else { "Hopper" };
        let (turns, pairs) = match self.plan {
            Plan::Forward(plan) => (plan.turns, plan.pairs),
            Plan::Backward(_) => (false, false),
        };
        let turns = if turns { " by turns" } else { "" };
        let pairs = if pairs { " in pairs" } else { "" };
        format!("{tier} {} / {}{turns}{pairs}", limits.short, limits.tile_rows)
    }
}

/// Compares each plan with a portable one, and its bits over `runs` runs.
fn check(gpu: &Gpu, (heads, head_dim, images): &Shape, padding: usize, runs: usize) -> Result<()> {
    let operands = Operands::new(gpu, *heads, *head_dim, images, padding, 1)?;
    for pass in Pass::ALL {
        let wrong = |what: String| {
            Error::failure(format!("{} {heads}x{head_dim} {}: {what}", pass.name(), images.name))
        };
        let run = |ready: &Ready| -> Result<Results> {
            operands.launch(&gpu.stream, 0, ready)?;
            gpu.stream.synchronize()?;
            operands.results(pass)
        };
        let all = Candidate::all(pass, *head_dim, gpu)?;
        let Some(reference) = all.iter().find(|candidate| candidate.portable) else {
            return Err(Error::failure("no portable plan serves the device"));
        };
        let portable = operands.ready(gpu, reference.plan)?;
        let want = operands.groups(pass, &run(&portable)?);
        for candidate in &all {
            let ready = operands.ready(gpu, candidate.plan)?;
            operands.spoil(&gpu.stream, pass)?;
            let got = run(&ready)?;
            if let Some(what) =
                operands.groups(pass, &got).iter().zip(&want).find_map(|(got, want)| far(got, want))
            {
                return Err(wrong(format!("{}, beside {}: {what}", candidate.label(), reference.label())));
            }
            for number in 1..runs {
                if !run(&ready)?.same_bits(&got) {
                    let this = candidate.label();
                    return Err(wrong(format!("{this}: run {number} has other bits than the first")));
                }
            }
        }
        // Every plan of the backward pass is to read the same results.
        operands.launch(&gpu.stream, 0, &portable)?;
    }
    Ok(())
}

/// Where a result is first not near what is wanted. Both round, to bf16 even, and sum what they have rounded; a value
/// of a wrong place is as far off as values are large. Operands are of the order of 1: below a thousandth there is
/// nothing but rounding, as in dq of an image of one row. lse is never rounded, and all values of a result together
/// are nearer than each.
pub fn far(got: &Group, want: &Group) -> Option<String> {
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        got.values.iter().zip(&want.values).map(|(&x, &y)| f(x.into(), y.into())).sum()
    };
    let square = sum(&|_, y| y * y);
    let typical = (square / want.values.len().max(1) as f64).sqrt();
    let exact = want.name.starts_with("lse");
    let near = |x: f32, y: f32| {
        let (apart, size) = (f64::from((x - y).abs()), f64::from(y.abs()));
        apart <= if exact { 1e-3 * size.max(1.0) } else { size / 64.0 + 0.06 * typical + 1e-3 }
    };
    if let Some(i) = (0..want.values.len()).find(|&i| !near(got.values[i], want.values[i])) {
        return Some(format!("element {i} of {} is {} and not {}", want.name, got.values[i], want.values[i]));
    }
    let apart = (sum(&|x, y| (x - y) * (x - y)) / want.values.len().max(1) as f64).sqrt();
    (apart > 0.015 * typical + 5e-4).then(|| {
        format!("{} is {apart:.1e} from what is wanted, on root mean square, of {typical:.1e}", want.name)
    })
}

/// Checks, then measures; writes the lines of the table to `out` as they come, and returns a page.
///
/// # Errors
/// A result that is wrong or not always the same, a device that fails, a table that cannot be written.
pub fn run(gpu: &Gpu, tuning: &Tuning, out: &mut dyn Write) -> Result<String> {
    let info = gpu.device.info();
    if !info.hopper {
        return Err(Error::usage(format!(
            "{} has none of the attention kernels that are tuned; take an H100 or H200, and unset TRENCADIS_PORTABLE",
            info.name
        )));
    }
    let begun = Instant::now();
    for shape in &tuning.checked {
        check(gpu, shape, tuning.padding, tuning.runs)?;
    }
    let mut write = |line: String| {
        writeln!(out, "{line}")
            .map_err(|cause| Error::failure(format!("the table cannot be written: {cause}")))
    };
    write(HEADER.into())?;
    let mut page = Page::default();
    for (heads, head_dim, images) in &tuning.timed {
        if begun.elapsed() > tuning.limit {
            break;
        }
        let sets = Operands::sets(gpu, *heads, *head_dim, images);
        let operands = Operands::new(gpu, *heads, *head_dim, images, 0, sets)?;
        for pass in Pass::ALL {
            let all = Candidate::all(pass, *head_dim, gpu)?;
            let plans = all
                .iter()
                .map(|candidate| operands.ready(gpu, candidate.plan))
                .collect::<Result<Vec<_>>>()?;
            gpu.clocks.restart();
            let launch = |plan: usize, set: usize| operands.launch(&gpu.stream, set, &plans[plan]);
            let seconds = gpu.medians(plans.len(), sets, tuning.samples, &launch)?;
            // Whatever was timed before, the backward pass is to read results of every set.
            (0..sets).try_for_each(|set| operands.launch(&gpu.stream, set, &plans[0]))?;
            let operations = pass.operations(images, heads * head_dim);
            let shape = format!("{heads}x{head_dim}_{}", images.name);
            for (i, (candidate, &seconds)) in all.iter().zip(&seconds).enumerate() {
                let limits = candidate.plan.limits();
                let cells = [
                    pass.name().into(),
                    shape.clone(),
                    candidate.label(),
                    limits.short.to_string(),
                    limits.half.to_string(),
                    limits.quarter.to_string(),
                    limits.tile_rows.to_string(),
                    format!("{:.3}", seconds * 1e6),
                    format!("{:.2}", operations / seconds / 1e12),
                    u8::from(i == 0).to_string(),
                    u8::from(candidate.portable).to_string(),
                    tuning.samples.to_string(),
                    info.name.clone(),
                ];
                write(table::csv(cells.into_iter().chain(table::clocks(&gpu.reading()))))?;
            }
            page.add(pass, &shape, &all, &seconds, operations);
        }
    }
    Ok(page.text(gpu, tuning))
}

/// The rows of the page.
#[derive(Default)]
struct Page {
    rows: Vec<String>,
    /// Time of the chosen plan over that of the fastest.
    losses: Vec<f64>,
}

impl Page {
    fn add(&mut self, pass: Pass, shape: &str, all: &[Candidate], seconds: &[f64], operations: f64) {
        let best = (0..all.len()).min_by(|&i, &j| seconds[i].total_cmp(&seconds[j])).unwrap_or(0);
        let portable = all.iter().position(|candidate| candidate.portable).unwrap_or(0);
        let rate = |i: usize| operations / seconds[i] / 1e12;
        let loss = seconds[0] / seconds[best];
        self.losses.push(loss);
        self.rows.push(format!(
            "| {} | {shape} | {} | {:.0} | {} | {:.0} | {:.1} | {:.2} |",
            pass.name(),
            all[best].label(),
            rate(best),
            all[0].label(),
            rate(0),
            100.0 * (loss - 1.0),
            seconds[portable] / seconds[0]
        ));
    }

    fn text(&self, gpu: &Gpu, tuning: &Tuning) -> String {
        let (count, wanted) = (self.losses.len(), Pass::ALL.len() * tuning.timed.len());
        let left = match count < wanted {
            true => format!(" Time was out after {count} of {wanted} rows."),
            false => String::new(),
        };
        let mean = (self.losses.iter().map(|loss| loss.ln()).sum::<f64>() / count.max(1) as f64).exp();
        let worst = self.losses.iter().fold(1.0f64, |worst, &loss| worst.max(loss));
        format!(
            "# Plans of packed attention\n\n{}, driver {}. bf16, with RMS norm of q and k; medians of {} samples on \
             random operands that rotate through more than the L2 cache. Before, every plan was compared with a \
             portable one on {} ragged batches, forward and backward, and gave the same bits {} times.{left}\n\n\
             A shape is heads, head dim and images, such as 512*64 for 512 images of 64 tokens; U(64,256) is NaViT's \
             mix of image sides, at patch 16. A plan is told by the rows of the longest image that is short to it, \
             and of a tile of a long one, and by whether warpgroups take turns at that. TFLOP/s count S² Dh of every image and head 4 times forward and 10 times \
             backward. `portable takes` is how many times as long as the chosen plan the best portable one takes.\n\n\
             The choice loses {:.1} % on geometric mean, {:.1} % at most.\n\n\
             | pass | shape | fastest | TFLOP/s | chosen | TFLOP/s | loss % | portable takes |\n\
             |---|---|---|---|---|---|---|---|\n{}\n",
            gpu.device.info().name,
            gpu.reading().driver,
            tuning.samples,
            tuning.checked.len(),
            tuning.runs,
            100.0 * (mean - 1.0),
            100.0 * (worst - 1.0),
            self.rows.join("\n")
        )
    }
}
