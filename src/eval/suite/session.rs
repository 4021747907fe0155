//! A model over a set, once for each size that the suites ask for.

use std::sync::Arc;

use serde_json::{Value, json};

use super::pass::{Of, Pass};
use super::setting::{Crop, Setting};
use crate::data::source::{Dataset, Source};
use crate::error::{Error, Result};
use crate::eval::trained::Trained;
use crate::recipe::{LossKind, Recipe};

/// A model and the images that it is evaluated on.
pub struct Session {
    /// The model.
    pub trained: Trained,
    /// The set; its validation images are meant.
    pub set: Arc<Dataset>,
    /// Its validation images, cropped, with its own labels.
    pub images: Arc<dyn Source>,
    crop: Option<Crop>,
    done: Vec<(Setting, Arc<Pass>)>,
}

impl Session {
    /// Nothing has run yet. A `crop` replaces the recipe's `eval.crop`.
    ///
    /// # Errors
    /// A set without validation images.
    pub fn new(mut trained: Trained, set: Arc<Dataset>, crop: Option<Crop>) -> Result<Self> {
        if set.validation.is_empty() {
            return Err(Error::usage(format!(
                "{}: there are no validation images to evaluate on; name others with --data",
                set.description
            )));
        }
        let images = set.validation.clone();
        let images = match crop {
            Some(crop) => {
                trained.recipe.eval.crop = 0.0;
                crop.apply(images)
            }
            None => images,
        };
        Ok(Self { trained, set, images, crop, done: Vec::new() })
    }

    /// Everything that is known of the model.
    pub fn recipe(&self) -> &Recipe {
        &self.trained.recipe
    }

    /// The loss that it was trained with.
    pub fn loss(&self) -> LossKind {
        self.trained.recipe.train.loss
    }

    /// The set, for people.
    pub fn described(&self) -> String {
        self.described_as(&self.set)
    }

    /// `set`, seen as the images of the session are.
    pub(super) fn described_as(&self, set: &Dataset) -> String {
        let seen = match self.crop {
            Some(Crop::Sides(share)) => format!(", the central {share} of height and width"),
            Some(Crop::Square(share)) => format!(", a central square of {share} of the shorter side"),
            None => String::new(),
        };
        set.description.clone() + &seen
    }

    /// What a report says of the model and the set.
    pub fn header(&self) -> Value {
        let crop = match (self.crop, self.recipe().eval.crop) {
            (Some(Crop::Sides(share)), _) => json!({ "sides": share }),
            (Some(Crop::Square(share)), _) => json!({ "square": share }),
            (None, recipe) if recipe > 0.0 => json!({ "eval.crop": recipe }),
            (None, _) => Value::Null,
        };
        json!({
            "model": self.trained.path.display().to_string(), "data": self.set.description, "crop": crop,
            "loss": self.loss(), "version": env!("CARGO_PKG_VERSION"),
        })
    }

    /// The model's class of every image, by name.
    ///
    /// # Errors
    /// A class that the model does not know.
    pub fn labels(&self) -> Result<Vec<usize>> {
        let matched = self.set.match_classes(&self.trained.classes)?;
        Ok((0..matched.len()).map(|index| matched.label(index)).collect())
    }

    /// Makes a model of texts tell `classes` by `prompts`.
    ///
    /// # Errors
    /// Those of [`Forward::set_classes`](crate::eval::model::Forward::set_classes).
    pub fn tell_classes(&mut self, classes: &[String], prompts: &[String]) -> Result<()> {
        self.trained.model.set_classes(classes, prompts)?;
        self.trained.classes = classes.to_vec();
        self.done.clear();
        Ok(())
    }

    /// Runs `of` on the model and gives it back the classes, and the recipe's prompts, that it tells now.
    ///
    /// # Errors
    /// Those of `of`.
    pub fn with_classes_kept<T>(&mut self, of: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let (classes, told) = (self.trained.classes.clone(), self.trained.model.classes());
        let done = of(self)?;
        let prompts = self.trained.recipe.text.prompts.clone();
        self.tell_classes(if told > 0 { &classes } else { &[] }, &prompts)?;
        self.trained.classes = classes;
        Ok(done)
    }

    /// Runs the model at `setting`, unless it has.
    ///
    /// # Errors
    /// Unreadable data beyond the recipe's share, no readable image, logits that are no numbers, a failed device.
    pub fn scores(&mut self, setting: Setting) -> Result<Arc<Pass>> {
        if let Some((_, scores)) = self.done.iter().find(|(known, _)| *known == setting) {
            return Ok(scores.clone());
        }
        let scores = Arc::new(self.run(setting)?);
        self.done.push((setting, scores.clone()));
        Ok(scores)
    }

    fn run(&mut self, setting: Setting) -> Result<Pass> {
        self.trained.require_classes()?;
        let pass =
            self.pass(self.images.clone(), setting, |model, batch| Ok(model.logits(batch)?.to_vec()))?;
        if let Some(sample) = pass.broken() {
            return Err(Error::failure(format!(
                "the model gives {} logits that are no finite numbers; its training has diverged, or the weights are \
                 damaged",
                self.images.name(sample)
            )));
        }
        Ok(pass)
    }

    /// What the head sees of every image of `source` that can be read, cropped as the images of the session are.
    ///
    /// # Errors
    /// As for [`scores`](Self::scores).
    pub fn features(&mut self, source: Arc<dyn Source>, setting: Setting) -> Result<Pass> {
        let source = self.cropped(source);
        let pass = self.pass(source.clone(), setting, |model, batch| model.pooled(batch))?;
        match pass.broken() {
            None => Ok(pass),
            Some(sample) => Err(Error::failure(format!(
                "the model gives {} features that are no finite numbers; its training has diverged, or the weights are \
                 damaged",
                source.name(sample)
            ))),
        }
    }

    fn pass(&mut self, source: Arc<dyn Source>, setting: Setting, of: Of) -> Result<Pass> {
        let of_set = || Error::usage(format!("{}: no image can be read", self.set.description));
        Pass::over(self.trained.model.as_mut(), &self.trained.recipe, source, setting, of)?.ok_or_else(of_set)
    }

    fn cropped(&self, source: Arc<dyn Source>) -> Arc<dyn Source> {
        match self.crop {
            Some(crop) => crop.apply(source),
            None => source,
        }
    }

    /// Whether a part of the images was cut out, whatever the recipe says.
    pub fn is_cropped(&self) -> bool {
        self.crop.is_some()
    }
}
