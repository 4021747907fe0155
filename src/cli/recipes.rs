//! `trencadis recipes`: list the embedded recipes, or print one in full.

use std::fmt::Write as _;

use super::print;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::recipe::load;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print this recipe with every key, ready to be saved and edited.
    #[arg(value_name = "RECIPE")]
    recipe: Option<String>,
}

pub(super) fn run(args: Args) -> Result<()> {
    if let Some(name) = args.recipe {
        return print(&Recipe::load(&name, &[])?.to_toml()?);
    }
    let recipes = load::list();
    let width = recipes.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, description) in recipes {
        let _ = writeln!(text, "{name:width$}  {description}");
    }
    text.push_str("\ntrencadis recipes NAME prints one; trencadis train NAME --data DIR trains it.\n");
    print(&text)
}
