//! Texts as tokens: a tokenizer in the format of Hugging Face's `tokenizer.json`.

use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::recipe::MAX_VOCABULARY;

/// What `text.tokenizer` calls the tokenizer in the binary.
pub const BUILT_IN: &str = "built-in";
/// Word pieces of the captions of the built-in digits, made by `tools/make_tokenizer.py`.
const DIGITS: &str = include_str!("tokenizer/digits.json");

/// A tokenizer with the text that describes it.
pub struct Tokenizer {
    json: String,
    inner: tokenizers::Tokenizer,
    vocabulary: usize,
}

/// A text as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// At least one, and no more than asked for.
    pub ids: Vec<u16>,
    /// Whether the text was cut off.
    pub cut: bool,
}

impl Tokenizer {
    /// The one that `text.tokenizer` names: [`BUILT_IN`], or a file.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file: it cannot be read, is no tokenizer, or has too many tokens.
    pub fn open(name: &str) -> Result<Self> {
        if name == BUILT_IN {
            return Self::from_json(DIGITS.into()).map_err(Error::failure);
        }
        let path = Path::new(name);
        let json = std::fs::read_to_string(path).map_err(|cause| {
            Error::file(
                path,
                format!("the tokenizer cannot be read ({cause}); set text.tokenizer to a tokenizer.json, or to `{BUILT_IN}`"),
            )
        })?;
        Self::from_json(json).map_err(|why| Error::file(path, why))
    }

    /// The one that a checkpoint holds.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_json(json: String) -> Result<Self, String> {
        let mut inner: tokenizers::Tokenizer =
            json.parse().map_err(|cause| format!("this is no tokenizer.json that can be read ({cause})"))?;
        // Texts are cut off, and packed, here.
        inner.with_truncation(None).map_err(|cause| cause.to_string())?;
        inner.with_padding(None);
        // Ids may have gaps.
        let vocabulary = inner.get_vocab(true).into_values().max().map_or(0, |largest| largest as usize + 1);
        let tokenizer = match vocabulary {
            0 => return Err("the tokenizer knows no token".into()),
            1..=MAX_VOCABULARY => Self { json, inner, vocabulary },
            _ => {
                return Err(format!(
                    "the tokenizer knows {vocabulary} tokens, and the text tower takes up to {MAX_VOCABULARY}; take one with a \
                     smaller vocabulary"
                ));
            }
        };
        // What it adds to every text shows in any; a text that it has no tokens for says nothing.
        if let Ok(encoded) = tokenizer.inner.encode("a", true) {
            tokenizer.known(encoded.get_ids())?;
        }
        Ok(tokenizer)
    }

    /// What describes it, for [`from_json`](Self::from_json).
    pub fn json(&self) -> &str {
        &self.json
    }

    /// One more than the largest id.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The first `most` tokens of `text`.
    ///
    /// # Errors
    /// What is wrong with the text: it has no token, but those that every text has, or one beyond the vocabulary.
    pub fn encode(&self, text: &str, most: usize) -> Result<Tokens, String> {
        if text.trim().is_empty() {
            return Err("the text is empty".into());
        }
        let encoded = self.inner.encode(text.trim(), true).map_err(|cause| cause.to_string())?;
        if encoded.get_special_tokens_mask().iter().all(|special| *special == 1) {
            return Err(format!("the tokenizer makes no token of the text `{}`", text.trim()));
        }
        let ids = self.known(encoded.get_ids())?;
        Ok(Tokens { cut: ids.len() > most, ids: ids.into_iter().take(most).collect() })
    }

    /// Ids that the vocabulary holds. A post-processor may name others.
    fn known(&self, ids: &[u32]) -> Result<Vec<u16>, String> {
        let known =
            |id: &u32| u16::try_from(*id).ok().filter(|id| usize::from(*id) < self.vocabulary).ok_or(*id);
        ids.iter().map(known).collect::<Result<_, u32>>().map_err(|id| {
            format!(
                "the tokenizer makes a token of number {id}, and its vocabulary ends at {}; add the token to its vocabulary",
                self.vocabulary - 1
            )
        })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}
