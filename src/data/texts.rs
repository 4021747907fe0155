//! Texts laid out as images are: one after another, a token at (its id, its place in the text).

use std::sync::Arc;

use super::batch::{PackedBatch, Patches, Targets};
use super::tokenizer::{Tokenizer, Tokens};
use crate::error::{Error, Result};
use crate::recipe::{PLACE_OF_CLASS, Recipe};

/// How texts become tokens.
#[derive(Clone, Debug)]
pub struct TextSettings {
    /// Makes tokens.
    pub tokenizer: Arc<Tokenizer>,
    /// Longest text.
    pub max_tokens: usize,
    /// Token budget of a batch.
    pub tokens: usize,
    /// Slots of a batch.
    pub slots: usize,
}

impl TextSettings {
    /// Those of `recipe` for batches of `slots` pairs.
    pub fn new(recipe: &Recipe, slots: usize, tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, max_tokens: recipe.text.max_tokens, tokens: recipe.text_tokens(slots), slots }
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn encode(&self, text: &str) -> Result<Tokens, String> {
        self.tokenizer.encode(text, self.max_tokens)
    }

    /// The tokens of what `classes` are called by `prompt`, a template with `{}` in the place of a class.
    ///
    /// # Errors
    /// [`Error::Usage`] naming a text without a token, or with more than there is room for.
    pub fn encode_classes(&self, prompt: &str, classes: &[String]) -> Result<Vec<Vec<u16>>> {
        let encode = |class: &String| {
            let text = prompt.replace(PLACE_OF_CLASS, class);
            match self.encode(&text) {
                Ok(Tokens { ids, cut: false }) => Ok(ids),
                Ok(_) => Err(Error::usage(format!(
                    "the prompt `{text}` has more tokens than text.max_tokens = {}; shorten the class's name or its template, \
                     or train with a larger text.max_tokens",
                    self.max_tokens
                ))),
                Err(why) => {
                    Err(Error::usage(format!("the prompt `{text}`: {why}; change the class or its template")))
                }
            }
        };
        classes.iter().map(encode).collect()
    }

    /// A batch of the texts with these tokens, as many as there are slots at most.
    pub fn pack(&self, texts: &[Vec<u16>]) -> PackedBatch {
        let mut positions = Vec::with_capacity(self.tokens);
        let mut cu_seqlens = vec![0];
        let mut grids = Vec::with_capacity(self.slots);
        for ids in texts {
            positions.extend(ids.iter().enumerate().map(|(place, id)| [*id, place as u16]));
            cu_seqlens.push(positions.len() as i32);
            grids.push([1, ids.len() as u16]);
        }
        cu_seqlens.resize(self.slots + 1, positions.len() as i32);
        positions.resize(self.tokens, [0, 0]);
        grids.resize(self.slots, [0, 0]);
        PackedBatch {
            patches: Patches::U8(Vec::new()),
            patch_dim: 0,
            cu_seqlens,
            positions,
            grids,
            targets: Targets::Classes(vec![0; self.slots]),
            weights: (0..self.slots).map(|slot| if slot < texts.len() { 1.0 } else { 0.0 }).collect(),
            sample_ids: vec![0; self.slots],
            epochs: vec![0; self.slots],
            images: texts.len(),
            texts: None,
        }
    }

    /// A batch of texts alone, for a model whose batches of images have so many tokens, and patches of so many values.
    pub fn alone(&self, texts: &[Vec<u16>], [tokens, patch_dim]: [usize; 2]) -> PackedBatch {
        let texts = self.pack(texts);
        PackedBatch {
            patches: Patches::U8(vec![0; tokens * patch_dim]),
            patch_dim,
            cu_seqlens: vec![0; self.slots + 1],
            positions: vec![[0, 0]; tokens],
            grids: vec![[0, 0]; self.slots],
            images: texts.images,
            texts: Some(Box::new(texts.clone())),
            ..texts
        }
    }
}
