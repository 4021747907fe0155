//! `trencadis forward`: raw images in, logits, features and tokens out.

use std::path::PathBuf;

use super::ModelArgs;
use crate::device::{self, DeviceChoice};
use crate::error::Result;
use crate::eval::forward;
use crate::eval::open::open;
use crate::weights::Weights;
use crate::weights::foreign::fold_prefix;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Weights: a trencadis checkpoint, or a file of timm, transformers, vit-pytorch or another known program.
    #[arg(long, value_name = "W.safetensors")]
    weights: PathBuf,
    /// Recipe that describes the model, where neither the weights nor --arch do.
    #[arg(long, value_name = "C.toml")]
    config: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Images `image.0`, `image.1`, ...: f32, [channels, height, width], used as they are.
    #[arg(long, value_name = "IN.safetensors")]
    input: PathBuf,
    /// Where `logits` [N, classes], `features` [N, D] and `tokens.i` [n_i, D] are written.
    #[arg(long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Device to run on.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Cpu)]
    device: DeviceChoice,
}

pub(super) fn run(args: Args) -> Result<()> {
    let device = device::select(args.device)?.device;
    let opened = open(&args.weights, &args.model.told(args.config.as_deref())?)?;
    let (recipe, mut weights) = (opened.recipe, opened.weights);
    fold_prefix(&mut weights)?;
    let images = forward::images_of(&Weights::load(&args.input)?.tensors)?;
    let output = forward::run(weights, &recipe, &images, device.as_ref())?;
    let n = images.len();
    let mut tensors = Weights::default();
    let mut insert = |name: String, shape, values| tensors.tensors.insert(name, (shape, values));
    insert("logits".into(), vec![n, output.classes], output.logits);
    insert("features".into(), vec![n, output.width], output.features);
    for (i, tokens) in output.tokens.into_iter().enumerate() {
        insert(format!("tokens.{i}"), vec![tokens.len() / output.width, output.width], tokens);
    }
    tensors.save_atomic(&args.output)
}
