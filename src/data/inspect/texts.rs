//! What the texts of a set hold.

use std::fmt;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{EXAMPLES, TokenSpread};
use crate::data::source::Source;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::recipe::Recipe;

/// Texts of the measured images.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TextFigures {
    /// Texts that can be used.
    pub usable: usize,
    /// Images without a text, or with one that cannot be read.
    pub missing: usize,
    /// Texts without a token.
    pub empty: usize,
    /// Usable texts that are cut off.
    pub cut: usize,
    /// Tokens at which they are.
    pub max_tokens: usize,
    /// Names and causes of the first ten that cannot be used.
    pub examples: Vec<String>,
    /// Tokens of a usable text, before it is cut off.
    pub tokens: TokenSpread,
}

/// Why there are no tokens.
enum Unusable {
    Missing(String),
    Empty(String),
}

/// Reads the texts of the images with these `indices`; none where `recipe` trains on classes.
///
/// # Errors
/// A tokenizer that cannot be opened.
pub(super) fn figures(
    source: &dyn Source,
    recipe: &Recipe,
    indices: &[usize],
) -> Result<Option<TextFigures>> {
    if !recipe.text.is_on() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::open(&recipe.text.tokenizer)?;
    let length = |&index: &usize| -> Result<usize, Unusable> {
        let text = source.caption(index).map_err(|why| Unusable::Missing(why.to_string()))?;
        match tokenizer.encode(&text, usize::MAX) {
            Ok(tokens) => Ok(tokens.ids.len()),
            Err(why) => Err(Unusable::Empty(format!("{}: {why}", source.name(index)))),
        }
    };
    let lengths: Vec<Result<usize, Unusable>> = indices.par_iter().map(length).collect();
    let mut figures = TextFigures { max_tokens: recipe.text.max_tokens, ..TextFigures::default() };
    let mut sum = 0;
    for length in lengths {
        let why = match length {
            Ok(tokens) => {
                let spread = &mut figures.tokens;
                spread.min = if figures.usable == 0 { tokens } else { spread.min.min(tokens) };
                spread.max = spread.max.max(tokens);
                figures.usable += 1;
                figures.cut += usize::from(tokens > figures.max_tokens);
                sum += tokens;
                continue;
            }
            Err(Unusable::Missing(why)) => {
                figures.missing += 1;
                why
            }
            Err(Unusable::Empty(why)) => {
                figures.empty += 1;
                why
            }
        };
        figures.examples.extend((figures.examples.len() < EXAMPLES).then_some(why));
    }
    figures.tokens.mean = sum as f64 / figures.usable.max(1) as f64;
    Ok(Some(figures))
}

impl fmt::Display for TextFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { usable, missing, empty, cut, max_tokens, tokens, .. } = self;
        writeln!(
            f,
            "texts       {usable} usable, {missing} missing or unreadable, {empty} empty, {cut} cut off at {max_tokens} tokens"
        )?;
        for example in &self.examples {
            writeln!(f, "  {example}")?;
        }
        writeln!(f, "text tokens min {}, mean {:.1}, max {} per text", tokens.min, tokens.mean, tokens.max)
    }
}
