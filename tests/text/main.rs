//! Images learned from texts: tokens, captions, both towers, and the binary from end to end.

mod binary;
mod captions;
mod device;
#[path = "../support/mod.rs"]
mod support;
mod towers;

use std::sync::Arc;

use trencadis::data::texts::TextSettings;
use trencadis::data::tokenizer::{BUILT_IN, Tokenizer};
use trencadis::recipe::Recipe;

/// Towers of a few hundred parameters.
const TINY: [&str; 11] = [
    "model.width=16",
    "model.depth=1",
    "model.mlp=16",
    "model.heads=1",
    "text.width=8",
    "text.depth=1",
    "text.mlp=8",
    "text.heads=1",
    "packing.tokens=256",
    "packing.images=16",
    "data.workers=1",
];

fn recipe(sets: &[&str]) -> Recipe {
    let sets: Vec<String> = TINY.iter().chain(sets).map(|set| set.to_string()).collect();
    Recipe::load("captions", &sets).unwrap()
}

fn settings(recipe: &Recipe, slots: usize) -> TextSettings {
    TextSettings::new(recipe, slots, Arc::new(Tokenizer::open(BUILT_IN).unwrap()))
}
