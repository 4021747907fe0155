//! `trencadis report`.

use std::path::PathBuf;

use super::print;
use crate::device::{self, DeviceChoice};
use crate::error::Result;
use crate::files::write_atomic;
use crate::report::{RunLog, page, samples};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folders of runs, such as runs/digits-1.
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The page.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
    /// Validation images of each run whose predictions are shown; 0 leaves them out and needs no data.
    #[arg(long, value_name = "N", default_value_t = 16)]
    samples: usize,
    /// Device that predicts.
    #[arg(long, value_enum, default_value_t)]
    device: DeviceChoice,
}

pub(super) fn run(args: Args) -> Result<()> {
    let runs = RunLog::read_all(&args.runs)?;
    let device = if args.samples > 0 { device::select(args.device)?.device } else { None };
    let shown = args.runs.iter().map(|path| samples(path, args.samples, device.as_ref()));
    let html = page(&runs, &shown.collect::<Result<Vec<_>>>()?);
    write_atomic(&args.out, |out| out.write_all(html.as_bytes()))?;
    print(&format!("written           {} ({} KiB)\n", args.out.display(), html.len().div_ceil(1024)))
}
