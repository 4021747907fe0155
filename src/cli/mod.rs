//! The command line: one file a subcommand, each thin.

mod convert;
mod eval;
mod forward;
mod inspect;
mod kernels;
mod plan;
mod predict;
mod profile;
mod ranks;
mod recipes;
mod report;
mod train;

use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand as HelpInstead;
use clap::{Parser, Subcommand};

use crate::error::{Error, Result};
use crate::eval::open::Told;
use crate::recipe::{Recipe, SourceKind};

/// Trains Vision Transformers on images of any shape.
#[derive(Debug, Parser)]
#[command(name = "trencadis", version, propagate_version = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// CPU threads; all cores where it is not given.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model, or resume a run.
    Train(train::Args),
    /// Evaluate a trained model.
    Eval(Box<eval::Args>),
    /// Classify images.
    Predict(predict::Args),
    /// Write one page that compares runs.
    Report(report::Args),
    /// Plan a training on several GPUs: memory, traffic, time, and the mesh to take.
    Plan(plan::Args),
    /// Time a training step part by part.
    Profile(profile::Args),
    /// Look at data, at a model, or at the GPU.
    #[command(subcommand)]
    Inspect(inspect::Command),
    /// List the recipes, or print one.
    Recipes(recipes::Args),
    /// List the GPU kernels, or export them for a build that has none.
    Kernels(kernels::Args),
    /// Run raw images through a model and write logits, features and tokens.
    Forward(forward::Args),
    /// Convert weights of other programs (timm, transformers, vit-pytorch, big_vision), or ours to timm.
    Convert(convert::Args),
}

/// Options that choose and change a recipe.
#[derive(Debug, clap::Args)]
struct RecipeArgs {
    /// Named recipe or path of a .toml file; see `trencadis recipes`.
    #[arg(value_name = "RECIPE")]
    recipe: Option<String>,
    /// Folder, tar shards (`shards-{000..127}.tar`), IDX or CIFAR files.
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Override a key, such as `train.steps=1000`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// What a file of another program's weights does not tell.
#[derive(Debug, clap::Args)]
struct ModelArgs {
    /// Published architecture of weights of another program, such as `vit_base_patch16_224` (`trencadis convert --list`).
    #[arg(long, value_name = "NAME")]
    arch: Option<String>,
    /// Override a key of the model's recipe, such as `model.heads=12`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Names of the classes, one a line, for weights that hold none.
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
}

impl ModelArgs {
    /// With a recipe, where there is one.
    fn told<'a>(&'a self, config: Option<&'a str>) -> Result<Told<'a>> {
        let classes = self.classes.as_ref().map(|path| {
            let text = std::fs::read_to_string(path)
                .map_err(|cause| Error::file(path, format_args!("cannot be read: {cause}")))?;
            Ok(text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
        });
        Ok(Told { arch: self.arch.as_deref(), config, sets: &self.sets, classes: classes.transpose()? })
    }
}

impl RecipeArgs {
    /// The recipe with its overrides. Without a name: `digits`, or `photos` for data of one's own.
    fn load(&self) -> Result<(String, Recipe)> {
        let default = if self.data.is_some() { "photos" } else { "digits" };
        let name = self.recipe.as_deref().unwrap_or(default);
        let mut recipe = Recipe::load(name, &self.sets)?;
        if let Some(path) = &self.data {
            use_data(&mut recipe, path)?;
        }
        fix_paths(&mut recipe)?;
        let stem = std::path::Path::new(name).file_stem().map(|s| s.to_string_lossy().into_owned());
        Ok((stem.unwrap_or_else(|| name.into()), recipe))
    }
}

/// Points a recipe at other data.
fn use_data(recipe: &mut Recipe, path: &str) -> Result<()> {
    if path.is_empty() {
        return Err(Error::usage(
            "the path of the data is empty; give a folder, tar shards, IDX or CIFAR files",
        ));
    }
    recipe.data.path = path.into();
    if recipe.data.source == SourceKind::Digits {
        recipe.data.source = SourceKind::Auto;
    }
    fix_paths(recipe)
}

/// Makes the paths of a recipe absolute, every pattern of `data.path`, so that the run can be evaluated and resumed from
/// another folder.
fn fix_paths(recipe: &mut Recipe) -> Result<()> {
    let absolute = |path: &str| {
        if path.is_empty() {
            return Ok(String::new());
        }
        let absolute = std::path::absolute(path).map_err(|e| {
            Error::usage(format!("{path}: the path cannot be made absolute ({e}); check the recipe"))
        })?;
        absolute.into_os_string().into_string().map_err(|path| {
            Error::usage(format!("{}: the path is not valid UTF-8; rename the folder", path.display()))
        })
    };
    let paths = recipe.data.path.split("::").map(absolute).collect::<Result<Vec<_>>>()?;
    recipe.data.path = paths.join("::");
    for path in [&mut recipe.distill.teacher, &mut recipe.distill.store] {
        *path = absolute(path)?;
    }
    Ok(())
}

/// Prints to standard output; a closed pipe (`| head`) ends the program quietly.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.map_err(|e| Error::failure(format!("cannot write to standard output: {e}"))),
    }
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    let outcome = match Cli::try_parse() {
        Ok(cli) => catch(|| run(cli)),
        Err(asked) if !asked.use_stderr() || asked.kind() == HelpInstead => asked.exit(),
        Err(wrong) => Err(Error::usage(sentence(&wrong.render().to_string()))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(error.exit_code() as u8)
        }
    }
}

/// What is wrong with a command line, as one sentence out of clap's paragraphs: the mistake and its tip
/// without the usage.
fn sentence(rendered: &str) -> String {
    let paragraphs = rendered.split("\n\n").map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
    let told: Vec<String> =
        paragraphs.filter(|p| !p.starts_with("Usage:") && !p.starts_with("For more information")).collect();
    format!("{}; --help tells more", told.join("; ").trim_start_matches("error: "))
}

/// Turns a defect of the program into an error of one sentence instead of a backtrace. Threads that
/// catch panics of their own, such as those of a decoder, stay quiet.
fn catch(run: impl FnOnce() -> Result<()>) -> Result<()> {
    static LAST: Mutex<String> = Mutex::new(String::new());
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or(String::new(), |l| format!(" ({}:{})", l.file(), l.line()));
        let text = info.payload().downcast_ref::<&str>().copied();
        let cause = text.or(info.payload().downcast_ref::<String>().map(String::as_str));
        let cause = cause.unwrap_or("unknown cause");
        if let Ok(mut last) = LAST.lock() {
            *last = format!("{cause}{place}");
        }
    }));
    std::panic::catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let cause = LAST.lock().map_or(String::new(), |last| last.clone());
        Err(Error::failure(format!("this is a defect of trencadis, please report it: {cause}")))
    })
}

fn run(cli: Cli) -> Result<()> {
    if let Some(threads) = cli.threads {
        if threads == 0 {
            return Err(Error::usage("--threads must be at least 1"));
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.map_err(|e| Error::failure(format!("cannot start {threads} threads: {e}")))?;
    }
    match cli.command {
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(*args),
        Command::Predict(args) => predict::run(args),
        Command::Report(args) => report::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Profile(args) => profile::run(args),
        Command::Inspect(command) => inspect::run(command),
        Command::Recipes(args) => recipes::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::Forward(args) => forward::run(args),
        Command::Convert(args) => convert::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_stored_absolute() {
        let here = std::env::current_dir().unwrap().display().to_string();
        let mut recipe = Recipe::default();
        assert!(use_data(&mut recipe, "").unwrap_err().to_string().contains("is empty"));
        recipe.data.source = SourceKind::Digits;
        use_data(&mut recipe, "a/train-{000..127}.tar::/b/val.tar").unwrap();
        assert_eq!(recipe.data.path, format!("{here}/a/train-{{000..127}}.tar::/b/val.tar"));
        assert_eq!(recipe.data.source, SourceKind::Auto);
        let mut digits = Recipe::default();
        digits.distill.teacher = "runs/a".into();
        fix_paths(&mut digits).unwrap();
        assert_eq!((digits.data.path.as_str(), digits.distill.store.as_str()), ("", ""));
        assert_eq!(digits.distill.teacher, format!("{here}/runs/a"));
    }
}
