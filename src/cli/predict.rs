//! `trencadis predict`.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{ModelArgs, print};
use crate::autograd::device::BatchShape;
use crate::data::source::files::Files;
use crate::device::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::eval::attention::picture::{self, Drawing};
use crate::eval::model::Keep;
use crate::eval::predict::{Prediction, predict};
use crate::eval::trained::Trained;
use crate::recipe::Recipe;

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
    /// Also draw, for each image, which patches its prediction attends to: a PNG in this folder.
    #[arg(long, value_name = "DIR")]
    attention: Option<PathBuf>,
    /// Draw the attention of each head too.
    #[arg(long, requires = "attention")]
    attention_heads: bool,
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
    let keep = if args.attention.is_some() { Keep::Pooling } else { Keep::Logits };
    let told = args.told.told(None)?;
    let shape = |recipe: &Recipe, slots| BatchShape::of_recipe(recipe, slots, args.resolution);
    let mut trained = Trained::load_for(&args.model, &told, device.as_ref(), keep, shape)?;
    let (top, attention) = (args.top as usize, args.attention.is_some());
    let predictions = predict(&mut trained, args.images.clone(), top, args.resolution, attention)?;
    let pictures = match &args.attention {
        Some(folder) => draw_attention(&args, folder, &trained, &predictions)?,
        None => Vec::new(),
    };
    let mut text = String::new();
    for (index, prediction) in predictions.iter().enumerate() {
        let picture = pictures.get(index).and_then(Option::as_ref);
        if args.json {
            let mut line = serde_json::to_value(prediction).map_err(Error::failure)?;
            if let Some(picture) = picture {
                line["attention"] = picture.display().to_string().into();
            }
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
        if let Some(picture) = picture {
            let _ = writeln!(text, "  attention {}", picture.display());
        }
    }
    print(&text)?;
    match predictions.iter().filter(|p| p.error.is_some()).count() {
        0 => Ok(()),
        failed => Err(Error::usage(format!("{failed} of {} images could not be read", predictions.len()))),
    }
}

/// Writes a picture of each image that was read into `folder`; its path, in the order of the images.
fn draw_attention(
    args: &Args,
    folder: &Path,
    trained: &Trained,
    predictions: &[Prediction],
) -> Result<Vec<Option<PathBuf>>> {
    if folder.exists() && !folder.is_dir() {
        return Err(Error::file(
            folder,
            "this is no folder; --attention names one, in which pictures are written",
        ));
    }
    std::fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
    let source = Files::new(args.images.clone());
    let mut taken = HashSet::new();
    let mut draw = |(sample, prediction): (usize, &Prediction)| -> Result<Option<PathBuf>> {
        let Some(map) = &prediction.attention else { return Ok(None) };
        let image = picture::seen(&source, sample, &trained.recipe, args.resolution, map)?;
        let canvas = picture::draw(&Drawing {
            name: &prediction.image,
            image: &image,
            map,
            pool: trained.recipe.model.pool,
            top: prediction.top.first(),
            heads: args.attention_heads,
        });
        let path = folder.join(picture_name(source.path(sample), &mut taken));
        canvas.save(&path)?;
        Ok(Some(path))
    };
    predictions.iter().enumerate().map(&mut draw).collect()
}

/// The name of an image's picture, which no other has, also where the file system does not tell capitals apart.
fn picture_name(image: &Path, taken: &mut HashSet<String>) -> String {
    let stem = image.file_stem().map_or_else(|| "image".into(), |stem| stem.to_string_lossy());
    let names =
        std::iter::once(format!("{stem}.png")).chain((2..).map(|number| format!("{stem}-{number}.png")));
    let mut free = names.skip_while(|name| !taken.insert(name.to_lowercase()));
    free.next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_have_names_of_their_own() {
        let mut taken = HashSet::new();
        let names = ["a/x.jpg", "b/X.png", "x-2.png", "x", "y.tar.gz"];
        let names = names.map(|name| picture_name(Path::new(name), &mut taken));
        assert_eq!(names, ["x.png", "X-2.png", "x-2-2.png", "x-3.png", "y.tar.png"]);
    }
}
