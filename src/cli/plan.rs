//! `trencadis plan`.

use super::print;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::train::plan::report::Report;
use crate::train::plan::search::{Candidate, Request, search};
use crate::train::plan::time::{BANDWIDTH, LINK, NETWORK, PEAK, Rates, SHARE};
use crate::train::step::one_rank;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Named recipe or path of a .toml file; see `trencadis recipes`.
    #[arg(value_name = "RECIPE")]
    recipe: String,
    /// Override a key, such as `packing.tokens=8192`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Number of GPUs.
    #[arg(long, value_name = "N")]
    gpus: usize,
    /// Memory of a GPU, such as 80GiB or 141GB.
    #[arg(long, value_name = "SIZE", default_value = "80GiB", value_parser = bytes)]
    memory: f64,
    /// GPUs of a node.
    #[arg(long, value_name = "N", default_value_t = 8)]
    gpus_per_node: usize,
    /// Dense bf16 peak of a GPU; an H100's where it is not given (989TFLOP/s).
    #[arg(long, value_name = "RATE", value_parser = flops)]
    peak: Option<f64>,
    /// What a GPU reaches over a step without communication; 60 % of the peak where it is not given.
    #[arg(long, value_name = "RATE", value_parser = flops)]
    flops: Option<f64>,
    /// What a GPU reads and writes of its memory; an H100's where it is not given (3.35TB/s).
    #[arg(long, value_name = "RATE", value_parser = bytes)]
    bandwidth: Option<f64>,
    /// What a GPU sends to others of its node, in one direction; NVLink 4's where it is not given (450GB/s).
    #[arg(long, value_name = "RATE", value_parser = bytes)]
    link: Option<f64>,
    /// What a GPU sends to other nodes; one 400 Gbit/s adapter's where it is not given (50GB/s).
    #[arg(long, value_name = "RATE", value_parser = bytes)]
    network: Option<f64>,
    /// Number of classes.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    classes: usize,
}

pub(super) fn run(args: Args) -> Result<()> {
    for (option, value) in
        [("gpus", args.gpus), ("gpus-per-node", args.gpus_per_node), ("classes", args.classes)]
    {
        if value == 0 {
            return Err(Error::usage(format!("--{option} must be at least 1")));
        }
    }
    let peak = args.peak.unwrap_or(PEAK);
    let flops = args.flops.unwrap_or(SHARE * peak);
    if flops > peak {
        return Err(Error::usage("--flops is above --peak; give what a GPU reaches, and its peak"));
    }
    let request = Request {
        recipe: Recipe::load(&args.recipe, &args.sets)?,
        classes: args.classes,
        gpus: args.gpus,
        memory: args.memory as usize,
        rates: Rates {
            peak,
            flops,
            bandwidth: args.bandwidth.unwrap_or(BANDWIDTH),
            gpus_per_node: args.gpus_per_node,
            link: args.link.unwrap_or(LINK),
            network: args.network.unwrap_or(NETWORK),
        },
    };
    if request.recipe.text.is_on() && request.gpus > 1 {
        return Err(one_rank(&request.recipe));
    }
    let found = search(&request)?;
    let report = Report {
        name: &args.recipe,
        parameters: found.parameters,
        command: command(&args, &request, found.chosen()),
        request: &request,
        search: &found,
    };
    print(&format!("{report}\n"))
}

/// The command line that runs a candidate: ranks of one node start themselves.
fn command(args: &Args, request: &Request, chosen: &Candidate) -> String {
    let (gpus, node) = (request.gpus, request.rates.gpus_per_node);
    let mut words = match gpus {
        _ if gpus > node => {
            format!("srun --ntasks {gpus} --ntasks-per-node {node} trencadis train {}", args.recipe)
        }
        _ => format!("trencadis train {}", args.recipe),
    };
    words.push_str(" --data PATH");
    if (2..=node).contains(&gpus) {
        words.push_str(&format!(" --ranks {gpus}"));
    }
    if chosen.tensor > 1 {
        words.push_str(&format!(" --tensor {}", chosen.tensor));
    }
    let mut sets = args.sets.clone();
    let given = &request.recipe;
    if chosen.recompute != given.model.recompute {
        sets.push(format!("model.recompute={}", chosen.recompute.name()));
    }
    if chosen.accumulate != given.train.accumulate {
        sets.push(format!("train.accumulate={}", chosen.accumulate));
    }
    for set in sets {
        let plain = set.chars().all(|c| c.is_ascii_alphanumeric() || "._-=+".contains(c));
        let set = if plain { set } else { format!("'{}'", set.replace('\'', "'\\''")) };
        words.push_str(&format!(" --set {set}"));
    }
    words
}

/// A size such as `80GiB`, or a rate of so many a second.
fn bytes(text: &str) -> Result<f64, String> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("kB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    quantity(text, &UNITS)
        .ok_or_else(|| "expected a number with its unit, such as 80GiB, 141GB or 450GB/s".into())
}

/// A rate such as `600TFLOP/s`.
fn flops(text: &str) -> Result<f64, String> {
    const UNITS: [(&str, f64); 4] = [("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15), ("FLOP", 1.0)];
    quantity(text, &UNITS).ok_or_else(|| "expected a number with its unit, such as 600TFLOP/s".into())
}

/// A positive number with a unit, where there is one.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim().trim_end_matches("/s");
    let (number, unit) = units.iter().find_map(|(unit, factor)| {
        let end = text.len().checked_sub(unit.len()).filter(|&at| text.is_char_boundary(at))?;
        text[end..].eq_ignore_ascii_case(unit).then(|| (&text[..end], factor))
    })?;
    let value = number.trim().parse::<f64>().ok()? * unit;
    (value.is_finite() && (1.0..1e18).contains(&value)).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates_have_units() {
        assert_eq!(bytes("80GiB"), Ok(80.0 * 1024f64.powi(3)));
        assert_eq!([bytes("141 GB"), bytes("0.5tb"), bytes("450GB/s")], [141e9, 5e11, 450e9].map(Ok));
        assert_eq!([flops("989TFLOP/s"), flops("1.5 PFLOP")], [989e12, 1.5e15].map(Ok));
        for wrong in ["80", "GiB", "-3GB", "0GB", "nanGB", "80 GX", "", "é", "1e30GB"] {
            assert!(bytes(wrong).is_err() && flops(wrong).is_err(), "{wrong}");
        }
    }
}
