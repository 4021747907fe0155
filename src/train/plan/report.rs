//! A plan as it is printed.

use std::fmt::{self, Write as _};

use super::activations::Held;
use super::search::{Candidate, Request, Search};
use super::time::Again;
use crate::train::engine::usable;
use crate::train::terminal::mib;

/// A plan with what was asked.
pub struct Report<'a> {
    /// Name of the recipe.
    pub name: &'a str,
    /// What was asked.
    pub request: &'a Request,
    /// What was found.
    pub search: &'a Search,
    /// Parameters of the whole model.
    pub parameters: usize,
    /// The command line that runs it.
    pub command: String,
}

/// `value` with a prefix for its power of 1000.
pub fn si(value: f64, unit: &str) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P", "E"];
    let power = (0..prefixes.len()).rev().find(|&i| value >= 0.9995 * 1000f64.powi(i as i32)).unwrap_or(0);
    let scaled = value / 1000f64.powi(power as i32);
    let digits = if scaled < 10.0 { 2 } else { usize::from(scaled < 99.95) };
    format!("{scaled:.digits$} {}{unit}", prefixes[power])
}

fn seconds(seconds: f64) -> String {
    match seconds {
        ..0.9995 => format!("{:.1} ms", 1e3 * seconds),
        0.9995..99.95 => format!("{seconds:.2} s"),
        _ => format!("{seconds:.0} s"),
    }
}

/// A figure of which there may be nothing.
fn some(value: f64, text: String) -> String {
    if value > 0.0 { text } else { "-".into() }
}

/// A mark before the one to take.
fn mark(chosen: bool) -> char {
    if chosen { '>' } else { ' ' }
}

impl Report<'_> {
    fn head(&self, text: &mut String) -> fmt::Result {
        let Request { recipe, classes, gpus, memory, rates } = self.request;
        let chosen = self.search.chosen();
        writeln!(
            text,
            "recipe            {}, {} parameters, {classes} classes",
            self.name,
            si(self.parameters as f64, "")
        )?;
        let batches =
            if chosen.accumulate == 1 { "1 batch".into() } else { format!("{} batches", chosen.accumulate) };
        let raised = match chosen.accumulate == recipe.train.accumulate {
            true => String::new(),
            false => format!(
                " (train.accumulate raised from {}, for every data rank to have as many)",
                recipe.train.accumulate
            ),
        };
        writeln!(
            text,
            "step              {batches} of {} tokens{raised}, {} of model FLOPs",
            recipe.packing.tokens,
            si(chosen.accumulate as f64 * chosen.flops.model, "FLOP")
        )?;
        writeln!(
            text,
            "GPUs              {} of {}, of which a training may take {}; {} in a node",
            gpus,
            mib(*memory),
            mib(usable(*memory)),
            rates.gpus_per_node
        )?;
        writeln!(
            text,
            "rates             {} a GPU over a step ({:.0} % of its peak), {} of its memory, {} to GPUs of its node, {} to \
             others: stated, not measured",
            si(rates.flops, "FLOP/s"),
            100.0 * rates.flops / rates.peak,
            si(rates.bandwidth, "B/s"),
            si(rates.link, "B/s"),
            si(rates.network, "B/s")
        )
    }

    fn table(&self, text: &mut String) -> fmt::Result {
        let width = self.search.candidates.iter().map(|c| c.mesh().len()).max().unwrap_or(0).max(8);
        writeln!(
            text,
            "\n  {:width$}  {:10}{:>11}{:>13}{:>11}{:>8}  fits",
            "mesh", "recompute", "memory", "sent a step", "step", "MFU"
        )?;
        for (i, candidate) in self.search.candidates.iter().enumerate() {
            writeln!(
                text,
                "{} {:width$}  {:10}{:>11}{:>13}{:>11}{:>8}  {}",
                mark(i == self.search.chosen),
                candidate.mesh(),
                candidate.recompute.name(),
                mib(candidate.memory.total()),
                si(candidate.traffic.total() as f64, "B"),
                seconds(candidate.time.total()),
                format!("{:.1} %", 100.0 * candidate.mfu),
                if candidate.fits { "yes" } else { "no" }
            )?;
        }
        writeln!(text, "  mesh is data x tensor; memory and what is sent are those of one GPU")?;
        self.search.left_out.iter().try_for_each(|reason| writeln!(text, "  left out: {reason}"))
    }

    /// What each way of recomputing costs and saves on the mesh of the one to take.
    fn prices(&self, text: &mut String) -> fmt::Result {
        let chosen = self.search.chosen();
        writeln!(
            text,
            "\n  {:<16}{:>13}{:>13}{:>13}{:>13}{:>11}  on {}",
            "model.recompute",
            "activations",
            "memory",
            "FLOPs again",
            "moved again",
            "step",
            chosen.mesh()
        )?;
        for candidate in self.search.on_chosen_mesh() {
            let Again { flops, bytes } = candidate.again;
            writeln!(
                text,
                "{} {:<16}{:>13}{:>13}{:>13}{:>13}{:>11}",
                mark(candidate.recompute == chosen.recompute),
                candidate.recompute.name(),
                mib(candidate.memory.activations),
                mib(candidate.memory.total()),
                some(flops, si(flops, "FLOP")),
                some(bytes, si(bytes, "B")),
                seconds(candidate.time.total())
            )?;
        }
        writeln!(text, "  of one GPU, in a step")
    }

    /// What the activations are at the peak.
    fn held(&self, text: &mut String) -> fmt::Result {
        writeln!(
            text,
            "\n  {:<24}{:>10}{:>12}{:>14}",
            "activations at the peak", "kept", "in passing", "made again"
        )?;
        let bytes = |bytes: usize| some(bytes as f64, mib(bytes));
        let mut gaps = self.search.chosen().memory.activations;
        for Held { what, kept, passing, again } in &self.search.activations {
            let [kept_bytes, passing_bytes, again] = [*kept, *passing, *again].map(bytes);
            writeln!(text, "  {what:<24}{kept_bytes:>10}{passing_bytes:>12}{again:>14}")?;
            gaps = gaps.saturating_sub(kept + passing);
        }
        match gaps {
            0 => Ok(()),
            _ => writeln!(text, "  {:<24}{:>10}", "gaps between them", mib(gaps)),
        }
    }

    fn detail(&self, text: &mut String) -> fmt::Result {
        let chosen = self.search.chosen();
        let Candidate { memory, traffic, flops, time, .. } = chosen;
        writeln!(
            text,
            "\nchosen            {} (data x tensor), model.recompute = \"{}\"",
            chosen.mesh(),
            chosen.recompute.name()
        )?;
        let kinds: Vec<_> = memory.kinds().into_iter().filter(|(_, bytes)| *bytes > 0).collect();
        let parts: Vec<_> = kinds.iter().map(|(kind, bytes)| format!("{kind} {}", mib(*bytes))).collect();
        writeln!(text, "memory            {} a GPU: {}", mib(memory.total()), parts.join(", "))?;
        let bytes = |bytes: u64| si(bytes as f64, "B");
        writeln!(
            text,
            "sent a step       tensor axis {} (activations {}, sums {}), data axis {} (weights {}, gradients {}, counts {})",
            bytes(traffic.tensor()),
            bytes(traffic.activations),
            bytes(traffic.tensor_sums),
            bytes(traffic.data()),
            bytes(traffic.weights),
            bytes(traffic.gradients),
            bytes(traffic.counts)
        )?;
        writeln!(
            text,
            "FLOPs             {} of the model a batch, {} with what is done again",
            si(flops.model, "FLOP"),
            si(flops.hardware, "FLOP")
        )?;
        writeln!(
            text,
            "step time         {}: products {}, norms and GELU again {}, not hidden: tensor axis {}, data axis {}, update {}",
            seconds(time.total()),
            seconds(time.compute),
            seconds(time.passes),
            seconds(time.tensor),
            seconds(time.data),
            seconds(time.update)
        )?;
        writeln!(
            text,
            "MFU               {:.1} %, {} tokens a second",
            100.0 * chosen.mfu,
            si(chosen.speed() * self.request.recipe.packing.tokens as f64, "").trim_end()
        )?;
        writeln!(text, "run               {}", self.command)
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.head(&mut text)?;
        self.table(&mut text)?;
        self.prices(&mut text)?;
        self.held(&mut text)?;
        self.detail(&mut text)?;
        f.write_str(text.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_as_a_person_reads_them() {
        assert_eq!(si(21.76e9, ""), "21.8 G");
        assert_eq!(si(593.4e12, "FLOP/s"), "593 TFLOP/s");
        assert_eq!(si(999.9e3, "B"), "1.00 MB");
        assert_eq!(si(0.0, "B"), "0.00 B");
        assert_eq!([0.0123, 1.234, 140.0].map(seconds), ["12.3 ms", "1.23 s", "140 s"]);
    }
}
