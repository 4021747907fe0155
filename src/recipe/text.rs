//! Learning from pairs of images and texts.

use serde::{Deserialize, Serialize};

use super::validate::{MAX_DIMENSION, at_least, moderate, require, within};
use super::{
    ContrastiveKind, LossKind, ModelConfig, PoolKind, PositionBasis, PositionCombination, PositionConfig,
    PositionCoordinate, Recipe, Rope,
};
use crate::{Error, Result};

/// Largest vocabulary: positions of a batch are u16, and the largest marks prefix tokens.
pub const MAX_VOCABULARY: usize = u16::MAX as usize;
/// What a template has in the place of a class.
pub const PLACE_OF_CLASS: &str = "{}";

/// The text tower: a transformer as `[model]` has it, with attention pooling, over packed texts. Its tokens attend to
/// all others of their text, and a linear layer takes its vectors to the width of the images'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextConfig {
    /// The tokenizer: the path of a Hugging Face `tokenizer.json`, or `built-in` for the one of the built-in digits;
    /// empty trains on classes, without texts.
    pub tokenizer: String,
    /// Tokens that the tokenizer knows; 0 asks it.
    pub vocabulary: usize,
    /// Name in the shape table, or empty.
    pub shape: String,
    /// Width; 0 takes the shape's.
    pub width: usize,
    /// Number of blocks; 0 takes the shape's.
    pub depth: usize,
    /// Hidden width of the MLP; 0 takes the shape's.
    pub mlp: usize,
    /// Attention heads; 0 takes the shape's.
    pub heads: usize,
    /// Longest text in tokens; what is longer is cut off.
    pub max_tokens: usize,
    /// What the texts of a class are when images are classified: its name in the place of `{}`. Of several templates the
    /// vectors are averaged.
    pub prompts: Vec<String>,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            tokenizer: String::new(),
            vocabulary: 0,
            shape: String::new(),
            width: 0,
            depth: 0,
            mlp: 0,
            heads: 0,
            max_tokens: 24,
            prompts: vec!["a photo of a {}".into()],
        }
    }
}

/// The loss over the images and texts of a batch. The score of an image and a text is the cosine of their vectors times
/// a factor that is learned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContrastiveConfig {
    /// Which text belongs to an image and which image to a text (softmax: CLIP, NaViT), or whether each image and text
    /// belong together (sigmoid: SigLIP).
    pub loss: ContrastiveKind,
    /// What the factor starts as: the inverse of the temperature.
    pub init_factor: f64,
    /// What the bias on the scores starts as (`sigmoid`).
    pub init_bias: f64,
    /// Locked-image tuning (LiT): the image tower stays as `--init` gives it, and the text tower alone learns.
    pub lock_image: bool,
}

impl Default for ContrastiveConfig {
    fn default() -> Self {
        Self { loss: ContrastiveKind::Softmax, init_factor: 10.0, init_bias: -10.0, lock_image: false }
    }
}

impl TextConfig {
    /// Whether images are learned from texts.
    pub fn is_on(&self) -> bool {
        !self.tokenizer.is_empty()
    }
}

impl Recipe {
    /// The text tower in the terms of the image tower: a token stands at (its id, its place in the text).
    ///
    /// # Errors
    /// A vocabulary that is not known or too large, an invalid shape.
    pub fn text_model(&self) -> Result<ModelConfig> {
        let text = &self.text;
        let vocabulary = match text.vocabulary {
            0 => crate::data::tokenizer::Tokenizer::open(&text.tokenizer)?.vocabulary(),
            vocabulary => vocabulary,
        };
        require(vocabulary <= MAX_VOCABULARY, || {
            format!(
                "text.tokenizer = \"{}\" knows {vocabulary} tokens, and the text tower takes up to {MAX_VOCABULARY}; take \
                 one with a smaller vocabulary",
                text.tokenizer
            )
        })?;
        let default = PositionConfig::default();
        Ok(ModelConfig {
            shape: text.shape.clone(),
            width: text.width,
            depth: text.depth,
            mlp: text.mlp,
            heads: text.heads,
            kv_heads: 0,
            head_dim: 0,
            attention_scale: 0.0,
            patch: 1,
            channels: 1,
            drop_path: 0.0,
            class_token: false,
            registers: 0,
            pool: PoolKind::Map,
            position: PositionConfig {
                basis: PositionBasis::Learned,
                coordinate: PositionCoordinate::Absolute,
                combination: PositionCombination::Sum,
                rows: vocabulary,
                columns: text.max_tokens,
                ..default
            },
            rope: super::RopeConfig { kind: Rope::None, ..self.model.rope.clone() },
            ..self.model.clone()
        })
    }

    /// Token budget of the texts of a batch of `slots` images: all of them may be as long as they can.
    pub fn text_tokens(&self, slots: usize) -> usize {
        (slots * self.text.max_tokens).next_multiple_of(128)
    }

    /// What a class is called in a text, once for each template.
    pub fn check_prompts(prompts: &[String], key: &str) -> Result<()> {
        require(!prompts.is_empty(), || {
            format!("{key} holds no template; expected texts such as \"a photo of a {PLACE_OF_CLASS}\"")
        })?;
        let wrong = prompts.iter().find(|prompt| prompt.matches(PLACE_OF_CLASS).count() != 1);
        match wrong {
            None => Ok(()),
            Some(prompt) => Err(Error::usage(format!(
                "{key} holds \"{prompt}\", where {PLACE_OF_CLASS} must stand once, in the place of the class"
            ))),
        }
    }

    pub(super) fn validate_text(&self) -> Result<()> {
        let (text, contrastive, train) = (&self.text, &self.contrastive, &self.train);
        if !text.is_on() {
            return require(!contrastive.lock_image, || {
                "contrastive.lock_image = true needs texts to learn from, but text.tokenizer = \"\"; set one of them"
                    .into()
            });
        }
        within("text.max_tokens", text.max_tokens as u64, 1, u64::from(u16::MAX))?;
        for (key, value) in [
            ("text.vocabulary", text.vocabulary),
            ("text.width", text.width),
            ("text.depth", text.depth),
            ("text.mlp", text.mlp),
            ("text.heads", text.heads),
        ] {
            within(key, value as u64, 0, MAX_DIMENSION)?;
        }
        at_least("contrastive.init_factor", contrastive.init_factor, 1e-3)?;
        moderate("contrastive.init_factor", contrastive.init_factor)?;
        moderate("contrastive.init_bias", contrastive.init_bias)?;
        Self::check_prompts(&text.prompts, "text.prompts")?;
        // With the vocabulary of one token, which is asked for when it is needed.
        let known = TextConfig { vocabulary: text.vocabulary.max(1), ..text.clone() };
        Self { text: known, ..self.clone() }
            .text_model()?
            .dimensions()
            .map_err(|error| Error::usage(error.to_string().replace("model.", "text.")))?;
        let excluded = [
            (
                self.mix.is_on(),
                format!("mix.mixup = {} and mix.cutmix = {}", self.mix.mixup, self.mix.cutmix),
            ),
            (self.distill.is_on(), format!("distill.teacher = \"{}\"", self.distill.teacher)),
            (train.log_attention, "train.log_attention = true".into()),
            (train.label_smoothing > 0.0, format!("train.label_smoothing = {}", train.label_smoothing)),
        ];
        for (on, key) in excluded {
            require(!on, || {
                format!(
                    "text.tokenizer = \"{}\" trains on texts, and {key} needs classes; unset one",
                    text.tokenizer
                )
            })?;
        }
        require(train.loss == LossKind::Softmax, || {
            format!(
                "train.loss is of classes, and text.tokenizer = \"{}\" trains on texts; leave train.loss at \"softmax\" and set \
                 contrastive.loss",
                text.tokenizer
            )
        })?;
        require(self.augment.repeats == 1, || {
            format!(
                "augment.repeats = {} puts an image into a batch more than once, and with text.tokenizer = \"{}\" its text \
                 would then belong to the one and not to the other; set augment.repeats = 1",
                self.augment.repeats, text.tokenizer
            )
        })?;
        require(train.accumulate == 1, || {
            format!(
                "train.accumulate = {} splits a step, and with text.tokenizer = \"{}\" the pairs of a step are compared \
                 with each other; set train.accumulate = 1 and raise packing.tokens",
                train.accumulate, text.tokenizer
            )
        })
    }
}
