//! `trencadis predict`.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::{ModelArgs, print};
use crate::device::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::eval::predict::predict;
use crate::eval::trained::Trained;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Run folder, checkpoint, or weights of another program.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Image files.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// Classes to name for each image.
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    top: u32,
    /// Resolution in pixels; the recipe's where it is not given.
    #[arg(long, value_name = "PIXELS", default_value_t = 0)]
    resolution: usize,
    /// Print one JSON object an image.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    told: ModelArgs,
    /// Device to run on.
    #[arg(long, value_enum, default_value_t)]
    device: DeviceChoice,
}

pub(super) fn run(args: Args) -> Result<()> {
    let device = device::select(args.device)?.device;
    if args.top == 0 {
        return Err(Error::usage("--top must be at least 1"));
    }
    let mut trained = Trained::load(&args.model, &args.told.told(None)?, device.as_ref(), args.resolution)?;
    let predictions = predict(&mut trained, args.images, args.top as usize, args.resolution)?;
    let mut text = String::new();
    for prediction in &predictions {
        if args.json {
            let line = serde_json::to_string(prediction).map_err(Error::failure)?;
            let _ = writeln!(text, "{line}");
            continue;
        }
        let _ = writeln!(text, "{}", prediction.image);
        if let Some(error) = &prediction.error {
            let _ = writeln!(text, "  not read: {error}");
        }
        for scored in &prediction.top {
            let _ = writeln!(text, "  {:6.2} %  {}", 100.0 * scored.probability, scored.class);
        }
    }
    print(&text)?;
    match predictions.iter().filter(|p| p.error.is_some()).count() {
        0 => Ok(()),
        failed => Err(Error::usage(format!("{failed} of {} images could not be read", predictions.len()))),
    }
}
