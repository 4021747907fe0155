//! `trencadis convert`: weights of other programs in, a model that describes itself, or timm's names, out.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::{ModelArgs, print};
use crate::error::{Error, Result};
use crate::eval::open::{Opened, open};
use crate::recipe::PositionBasis;
use crate::train::terminal::mib;
use crate::weights::Weights;
use crate::weights::foreign::{arch, export};

const EXAMPLES: &str = "\
Known are the names of timm (VisionTransformer, NaFlexVit), transformers (ViT, DINOv2, SigLIP, SigLIP 2), vit-pytorch
(ViT, SimpleViT, both NaViT), and of the repositories of DeiT, DINOv2 and big_vision; see docs/parity.md.

Examples:
  trencadis convert timm.safetensors model.safetensors --arch vit_base_patch16_224
  trencadis convert theirs.npz model.safetensors --classes names.txt
  trencadis convert runs/mine/best.safetensors timm.safetensors --to timm";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Weights of any known program, or a checkpoint.
    #[arg(value_name = "IN", required_unless_present = "list")]
    input: Option<PathBuf>,
    /// Where the converted weights are written, all or nothing: safetensors, f32.
    #[arg(value_name = "OUT", required_unless_present = "list")]
    output: Option<PathBuf>,
    /// What is written.
    #[arg(long, value_enum, default_value_t)]
    to: To,
    #[command(flatten)]
    model: ModelArgs,
    /// Recipe that describes the model, in the place of what the architecture or its implementation tells.
    #[arg(long, value_name = "RECIPE")]
    config: Option<String>,
    /// List the names that --arch knows.
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum To {
    /// A model that describes itself, for eval, predict, forward and train --init.
    #[default]
    Trencadis,
    /// timm's names, of the class that fits.
    Timm,
    /// The names of timm's NaFlexVit.
    TimmNaflex,
}

pub(super) fn run(args: Args) -> Result<()> {
    if args.list {
        return list();
    }
    let (Some(input), Some(output)) = (&args.input, &args.output) else {
        return Err(Error::usage("convert needs the file to read and the file to write"));
    };
    let opened = open(input, &args.model.told(args.config.as_deref())?)?;
    let mut text = told(&opened)?;
    let written: Weights = match args.to {
        To::Trencadis => opened.into_checkpoint()?,
        To::Timm | To::TimmNaflex => {
            let Opened { recipe, weights, origin, .. } = opened;
            let naflex = args.to == To::TimmNaflex;
            let exported = export::to_timm(weights, &recipe.model, origin.as_deref(), naflex)
                .map_err(|cause| Error::file(input, cause))?;
            let _ = writeln!(text, "timm              {}", exported.call);
            exported.weights
        }
    };
    written.save_atomic(output)?;
    let bytes: usize = written.tensors.values().map(|(_, values)| size_of_val(&values[..])).sum();
    let _ = writeln!(
        text,
        "written           {}: {} tensors, {}",
        output.display(),
        written.tensors.len(),
        mib(bytes)
    );
    print(&text)
}

/// What was read, and which settings are not from the file.
fn told(opened: &Opened) -> Result<String> {
    let (model, dims) = (&opened.recipe.model, opened.recipe.model.dimensions()?);
    let mut text = String::new();
    let from = if opened.foreign { opened.implementation } else { "a checkpoint of trencadis" };
    let _ =
        writeln!(text, "read              {from}: {} tensors under our names", opened.weights.tensors.len());
    let _ = writeln!(
        text,
        "model             {} blocks, width {}, {} heads of {}, MLP {}, patch {}, {} outputs",
        dims.depth,
        dims.width,
        dims.heads,
        dims.head_dim,
        dims.mlp,
        model.patch,
        opened.classes.len()
    );
    if opened.foreign {
        // What no file of another program tells.
        let mut assumed = format!(
            "model.heads={} model.gelu={} model.norm_eps={:e}",
            dims.heads,
            word(&model.gelu)?,
            model.norm_eps
        );
        if model.position.basis == PositionBasis::Learned {
            let position = &model.position;
            let _ = write!(
                assumed,
                " model.position.coordinate={} model.position.resample={}",
                word(&position.coordinate)?,
                word(&position.resample)?
            );
        }
        let data = &opened.recipe.data;
        let _ = write!(assumed, " data.mean={:?} data.std={:?}", data.mean, data.std);
        let _ = writeln!(text, "taken to be       {assumed}");
    }
    Ok(text)
}

/// A choice as a recipe writes it.
fn word(choice: &impl serde::Serialize) -> Result<String> {
    let json = serde_json::to_value(choice).map_err(Error::failure)?;
    Ok(json.as_str().unwrap_or_default().to_owned())
}

fn list() -> Result<()> {
    let width = arch::all().map(|arch| arch.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for arch in arch::all() {
        let _ = writeln!(
            text,
            "{:width$}  width {:4}  {:2} blocks  {:2} heads  {:3} pixels",
            arch.name, arch.width, arch.depth, arch.heads, arch.resolution
        );
    }
    print(&text)
}
