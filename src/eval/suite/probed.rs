//! What linear models on frozen features are fitted on and judged by: the set's own classes, whatever the model's are.

use std::sync::Arc;

use super::pass::Pass;
use super::{Options, Session, Setting, Suite, text};
use crate::data::source::Dataset;
use crate::data::source::chosen::Chosen;
use crate::error::{Error, Result};

/// A set with training images and others.
pub struct Probed {
    /// The set.
    pub set: Arc<Dataset>,
    setting: Setting,
}

impl Probed {
    /// The set of `options`, or of the session.
    ///
    /// # Errors
    /// No images to train or to validate on, a single class, several sizes.
    pub fn new(session: &Session, options: &Options, suite: Suite) -> Result<Self> {
        let setting = options.setting(suite)?;
        let set = options.probed.clone().unwrap_or_else(|| session.set.clone());
        let refuse = |what: &str| {
            Err(Error::usage(format!(
                "--suite {} fits a linear model to training images and judges it by validation images, and {} has {what}",
                suite.name(),
                set.description
            )))
        };
        if set.train.is_empty() {
            return refuse("none of the former; name a set that has both with --data");
        }
        if set.validation.is_empty() {
            return refuse("none of the latter; hold some out with --set data.validation=0.2");
        }
        if set.classes.len() < 2 {
            return refuse("one class alone; there is nothing to tell apart");
        }
        Ok(Self { set, setting })
    }

    /// What the head sees of the validation images.
    ///
    /// # Errors
    /// As for [`Session::features`].
    pub fn validation(&self, session: &mut Session) -> Result<Pass> {
        session.features(self.set.validation.clone(), self.setting)
    }

    /// The same of training images, all or those at `indices`, whose samples are indices of them.
    ///
    /// # Errors
    /// As for [`Session::features`].
    pub fn train(&self, session: &mut Session, indices: Option<Vec<usize>>) -> Result<Pass> {
        let inner = self.set.train.clone();
        match indices {
            None => session.features(inner, self.setting),
            Some(indices) => session.features(Arc::new(Chosen::at(inner, indices)), self.setting),
        }
    }

    /// Lines above a table.
    pub fn preamble(&self, session: &Session, train: &Pass, validation: &Pass) -> String {
        let mut out = format!(
            "model             {}\ndata              {}\nfeatures          {} of an image, at {} ({:.1} tokens, {} GFLOP an \
             image)\nimages            {} to fit to, {} to judge by\n",
            session.trained.path.display(),
            session.described_as(&self.set),
            train.width,
            self.setting.size,
            validation.tokens,
            text::gflop(validation.flops),
            train.images(),
            validation.images(),
        );
        out += &text::unreadable(train.unreadable + validation.unreadable);
        out + &text::downscaled(train.downscaled + validation.downscaled)
    }

    /// What a report says of model and set.
    pub fn header(
        &self,
        session: &Session,
        suite: Suite,
        train: &Pass,
        validation: &Pass,
    ) -> serde_json::Value {
        let mut json = session.header();
        json["data"] = self.set.description.as_str().into();
        json["suite"] = suite.name().into();
        json["size"] = self.setting.size.to_string().into();
        json["features"] = train.width.into();
        json["train_images"] = train.images().into();
        json["images"] = validation.images().into();
        json["unreadable"] = (train.unreadable + validation.unreadable).into();
        json["downscaled"] = (train.downscaled + validation.downscaled).into();
        json
    }
}
