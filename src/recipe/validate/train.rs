//! Optimiser, schedule and what goes with them.

use super::{above, at_least, below, epsilon, positive, require, single, within};
use crate::Result;
use crate::recipe::{LossKind, OptimizerKind, Recipe, ScheduleKind, TrainConfig};

impl Recipe {
    pub(super) fn validate_train(&self) -> Result<()> {
        let t = &self.train;
        positive("train.steps", t.steps)?;
        within("train.accumulate", t.accumulate as u64, 1, 65_536)?;
        positive("train.log_every", t.log_every)?;
        above("train.lr", t.lr, 0.0)?;
        at_least("train.lr_min", t.lr_min, 0.0)?;
        if matches!(t.schedule, ScheduleKind::Cosine | ScheduleKind::Linear) {
            require(t.lr_min <= t.lr, || {
                format!("train.lr_min = {} must not exceed train.lr = {}", t.lr_min, t.lr)
            })?;
        }
        at_least("train.weight_decay", t.weight_decay, 0.0)?;
        require(t.head_weight_decay.is_finite(), || "train.head_weight_decay must be finite".into())?;
        below("train.beta1", t.beta1, 0.0, 1.0)?;
        below("train.beta2", t.beta2, 0.0, 1.0)?;
        for (key, value) in [
            ("train.lr", t.lr),
            ("train.weight_decay", t.weight_decay),
            ("train.head_weight_decay", t.head_weight_decay),
            ("train.clip", t.clip),
        ] {
            single(key, value)?;
        }
        epsilon("train.eps", t.eps)?;
        self.validate_optimizer()?;
        at_least("train.clip", t.clip, 0.0)?;
        below("train.ema", t.ema, 0.0, 1.0)?;
        below("train.label_smoothing", t.label_smoothing, 0.0, 1.0)?;
        require(t.loss == LossKind::Softmax || t.label_smoothing == 0.0, || {
            format!(
                "train.label_smoothing = {} needs train.loss = \"softmax\"; set one of them",
                t.label_smoothing
            )
        })
    }

    /// Keys of another optimiser are a mistake where they were changed: nothing would follow from them.
    fn validate_optimizer(&self) -> Result<()> {
        let (t, default) = (&self.train, TrainConfig::default());
        let (sgd, adafactor) = (t.optimizer == OptimizerKind::Sgd, t.optimizer == OptimizerKind::Adafactor);
        let optimizer = t.optimizer.name();
        above("train.beta2_power", t.beta2_power, 0.0)?;
        require(adafactor || t.beta2_power == default.beta2_power, || {
            format!(
                "train.beta2_power = {} is of train.optimizer = \"adafactor\", but that is \"{optimizer}\"; change one of \
                 them",
                t.beta2_power
            )
        })?;
        require(sgd || !t.nesterov, || {
            format!(
                "train.nesterov = true is of train.optimizer = \"sgd\", but that is \"{optimizer}\"; change one of them"
            )
        })?;
        require(!t.nesterov || t.beta1 > 0.0, || {
            "train.nesterov = true needs momentum, but train.beta1 is 0; change one of them".into()
        })?;
        require(!(sgd || adafactor) || t.eps == default.eps, || {
            format!(
                "train.eps = {:e} has no part in train.optimizer = \"{optimizer}\": leave it at {:e}, or use \"adamw\" or \
                 \"lamb\"",
                t.eps, default.eps
            )
        })?;
        require(!sgd || t.beta2 == default.beta2, || {
            format!(
                "train.beta2 = {} has no part in train.optimizer = \"sgd\", which keeps no second moments: leave it at {}, \
                 or use another optimizer",
                t.beta2, default.beta2
            )
        })
    }
}
