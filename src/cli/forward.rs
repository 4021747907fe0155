//! `trencadis forward`: raw images in, logits, features and tokens out.

use std::path::PathBuf;

use crate::device::{self, DeviceChoice};
use crate::error::Result;
use crate::eval::forward;
use crate::recipe::Recipe;
use crate::train::checkpoint;
use crate::weights::Weights;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Weights: a trencadis checkpoint, or a file of timm, vit-pytorch, DeiT or SigLIP 2.
    #[arg(long, value_name = "W.safetensors")]
    weights: PathBuf,
    /// Recipe that describes the model.
    #[arg(long, value_name = "C.toml")]
    config: String,
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
    let recipe = Recipe::load(&args.config, &[])?;
    let (_, weights) = checkpoint::load_model(&args.weights)?;
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
