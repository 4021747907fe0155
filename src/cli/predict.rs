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
    /// Also draw, for each image, which patches its prediction attends to: `NAME.attention.png` in this folder.
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
    let pictures = args.attention.as_deref().map(|folder| picture_paths(folder, &args.images)).transpose()?;
    let keep = if args.attention.is_some() { Keep::Pooling } else { Keep::Logits };
    let told = args.told.told(None)?;
    let shape = |recipe: &Recipe, slots| BatchShape::of_recipe(recipe, slots, args.resolution);
    let mut trained = Trained::load_for(&args.model, &told, device.as_ref(), keep, shape)?;
    let (top, attention) = (args.top as usize, args.attention.is_some());
    let predictions = predict(&mut trained, args.images.clone(), top, args.resolution, attention)?;
    let pictures = match (&args.attention, pictures) {
        (Some(folder), Some(paths)) => draw_attention(&args, folder, paths, &trained, &predictions)?,
        _ => Vec::new(),
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

/// Where the picture of each image goes: into `folder`, each under a name of its own.
///
/// # Errors
/// A folder that is none; a path that is one of the images, which its picture would overwrite.
fn picture_paths(folder: &Path, images: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if folder.exists() && !folder.is_dir() {
        return Err(Error::file(
            folder,
            "this is no folder; --attention names one, in which pictures are written",
        ));
    }
    let mut taken = HashSet::new();
    let paths: Vec<PathBuf> =
        images.iter().map(|image| folder.join(picture_name(image, &mut taken))).collect();
    let real: HashSet<PathBuf> = images.iter().filter_map(|image| image.canonicalize().ok()).collect();
    match paths.iter().find(|path| path.canonicalize().is_ok_and(|path| real.contains(&path))) {
        Some(path) => Err(Error::file(
            path,
            "this image is to be drawn, and a picture would overwrite it; name another folder with --attention",
        )),
        None => Ok(paths),
    }
}

/// Writes a picture of each image that was read to its path; which of them there are, in the order of the images.
fn draw_attention(
    args: &Args,
    folder: &Path,
    paths: Vec<PathBuf>,
    trained: &Trained,
    predictions: &[Prediction],
) -> Result<Vec<Option<PathBuf>>> {
    std::fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
    let source = Files::new(args.images.clone());
    let draw = |(sample, (prediction, path)): (usize, (&Prediction, PathBuf))| -> Result<Option<PathBuf>> {
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
        canvas.save(&path)?;
        Ok(Some(path))
    };
    predictions.iter().zip(paths).enumerate().map(draw).collect()
}

/// The name of an image's picture, which no other has, also where the file system does not tell capitals apart.
fn picture_name(image: &Path, taken: &mut HashSet<String>) -> String {
    let stem = image.file_stem().map_or_else(|| "image".into(), |stem| stem.to_string_lossy());
    let numbered = (2..).map(|number| format!("{stem}-{number}.attention.png"));
    let names = std::iter::once(format!("{stem}.attention.png")).chain(numbered);
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
        let expected = ["x", "X-2", "x-2-2", "x-3", "y.tar"].map(|stem| format!("{stem}.attention.png"));
        assert_eq!(names, expected);
    }
}
