//! What a recipe must satisfy beyond the types of its values.

use super::recipe::{
    DropKind, LossKind, ModelConfig, PackingKind, PoolKind, PositionBasis, PositionCombination,
    PositionCoordinate, Recipe, ResolutionKind, ScheduleKind,
};
use crate::{Error, Result};

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::usage(message())) }
}

fn positive(key: &str, value: u64) -> Result<()> {
    require(value > 0, || format!("{key} must be at least 1, but it is 0"))
}

/// Far beyond every model and machine, and far below where a product of sizes would overflow.
fn at_most(key: &str, value: usize, high: usize) -> Result<()> {
    require(value <= high, || format!("{key} must be at most {high}, but it is {value}"))
}

/// `low <= value < high`.
fn below(key: &str, value: f64, low: f64, high: f64) -> Result<()> {
    require(value >= low && value < high, || {
        format!("{key} must be at least {low} and below {high}, but it is {value}")
    })
}

fn at_least(key: &str, value: f64, low: f64) -> Result<()> {
    require(value >= low && value.is_finite(), || format!("{key} must be at least {low}, but it is {value}"))
}

fn above(key: &str, value: f64, low: f64) -> Result<()> {
    require(value > low && value.is_finite(), || format!("{key} must be above {low}, but it is {value}"))
}

impl Recipe {
    /// Checks that the values fit together.
    ///
    /// # Errors
    /// One sentence that names the key, its value and what it must be.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.validate_data()?;
        self.validate_resolution()?;
        self.validate_packing()?;
        self.validate_drop()?;
        self.validate_train()
    }

    fn validate_data(&self) -> Result<()> {
        let (data, channels) = (&self.data, self.model.channels);
        for (key, values) in [("data.mean", &data.mean), ("data.std", &data.std)] {
            require(values.len() == 1 || values.len() == channels, || {
                format!(
                    "{key} must hold 1 value or one for each of the model.channels = {channels} channels, but it holds {}",
                    values.len()
                )
            })?;
            require(values.iter().all(|v| v.is_finite()), || format!("{key} must hold finite numbers"))?;
        }
        for &std in &data.std {
            above("data.std", f64::from(std), 0.0)?;
        }
        below("data.validation", data.validation, 0.0, 1.0)?;
        require((0.0..=1.0).contains(&data.max_unreadable), || {
            format!("data.max_unreadable must lie in 0..1, but it is {}", data.max_unreadable)
        })
    }

    fn validate_resolution(&self) -> Result<()> {
        let r = &self.resolution;
        positive("resolution.max", r.max as u64)?;
        at_most("resolution.max", r.max, 1 << 16)?;
        at_most("eval.resolution", self.eval.resolution, 1 << 16)?;
        let patch = self.model.patch;
        require(r.max >= patch, || {
            format!("resolution.max = {} must be at least model.patch = {patch}", r.max)
        })?;
        if matches!(r.kind, ResolutionKind::Uniform | ResolutionKind::TruncatedNormal) {
            positive("resolution.min", r.min as u64)?;
            require(r.min <= r.max, || {
                format!("resolution.min = {} must not exceed resolution.max = {}", r.min, r.max)
            })?;
        }
        if r.kind == ResolutionKind::TruncatedNormal {
            above("resolution.std", r.std, 0.0)?;
            require((-1.0..=1.0).contains(&r.mean), || {
                format!("resolution.mean must lie in -1..1, but it is {}", r.mean)
            })?;
        }
        Ok(())
    }

    fn validate_packing(&self) -> Result<()> {
        let p = &self.packing;
        require(p.tokens > 0 && p.tokens.is_multiple_of(128), || {
            format!("packing.tokens must be a positive multiple of 128, but it is {}", p.tokens)
        })?;
        at_most("packing.tokens", p.tokens, 1 << 24)?;
        at_most("packing.images", p.images, 1 << 24)?;
        at_most("packing.open", p.open, 1 << 24)?;
        let (room, name) = match p.kind {
            PackingKind::Flat => (p.tokens, "packing.tokens"),
            PackingKind::Bins => {
                positive("packing.sequence", p.sequence as u64)?;
                positive("packing.open", p.open as u64)?;
                require(p.tokens.is_multiple_of(p.sequence), || {
                    format!("packing.sequence = {} must divide packing.tokens = {}", p.sequence, p.tokens)
                })?;
                (p.sequence, "packing.sequence")
            }
        };
        let prefix = usize::from(self.model.class_token) + self.model.registers;
        let side = self.resolution.max / self.model.patch;
        require(side * side + prefix <= room, || {
            format!(
                "an image at resolution.max = {} has {} tokens with model.patch = {}, more than {name} = {room}: \
                 raise {name} or lower resolution.max",
                self.resolution.max,
                side * side + prefix,
                self.model.patch
            )
        })
    }

    fn validate_drop(&self) -> Result<()> {
        let d = &self.drop;
        if d.kind == DropKind::None {
            return Ok(());
        }
        below("drop.mean", d.mean, 0.0, 1.0)?;
        if d.kind == DropKind::Beta {
            below("drop.max", d.max, 0.0, 1.0)?;
            require(d.mean > 0.0 && d.mean < d.max, || {
                format!("drop.mean = {} must lie between 0 and drop.max = {}", d.mean, d.max)
            })?;
        }
        Ok(())
    }

    fn validate_train(&self) -> Result<()> {
        let t = &self.train;
        positive("train.steps", t.steps)?;
        positive("train.accumulate", t.accumulate as u64)?;
        at_most("train.accumulate", t.accumulate, 1 << 20)?;
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
        above("train.eps", t.eps, 0.0)?;
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
}

impl ModelConfig {
    /// Checks that the network can be built.
    ///
    /// # Errors
    /// One sentence that names the key, its value and what it must be.
    pub fn validate(&self) -> Result<()> {
        positive("model.patch", self.patch as u64)?;
        require(matches!(self.channels, 1 | 3), || {
            format!("model.channels must be 1 (grey) or 3 (RGB), but it is {}", self.channels)
        })?;
        at_most("model.patch", self.patch, 1 << 10)?;
        at_most("model.registers", self.registers, 1 << 16)?;
        let dimensions = self.dimensions()?;
        let width = dimensions.width;
        at_most("model.width", width, 1 << 18)?;
        at_most("model.mlp", dimensions.mlp, 1 << 20)?;
        at_most("model.depth", dimensions.depth, 1 << 12)?;
        at_most("model.heads", dimensions.heads, 1 << 12)?;
        at_most("model.head_dim", dimensions.head_dim, 1 << 12)?;
        above("model.norm_eps", self.norm_eps, 0.0)?;
        above("model.qk_norm_eps", self.qk_norm_eps, 0.0)?;
        at_least("model.attention_scale", self.attention_scale, 0.0)?;
        at_least("model.layer_scale", self.layer_scale, 0.0)?;
        below("model.drop_path", self.drop_path, 0.0, 1.0)?;
        require(self.head_init_bias.is_finite(), || "model.head_init_bias must be finite".into())?;
        require(self.pool != PoolKind::Cls || self.class_token, || {
            "model.pool = \"cls\" needs model.class_token = true; or pool with \"map\" or \"mean\"".into()
        })?;
        self.validate_position(width)
    }

    fn validate_position(&self, width: usize) -> Result<()> {
        let p = &self.position;
        use PositionCombination as C;
        match p.basis {
            PositionBasis::None => return Ok(()),
            PositionBasis::Fourier => {
                above("model.position.fourier_std", p.fourier_std, 0.0)?;
                return require(width.is_multiple_of(2), || {
                    format!("model.position.basis = \"fourier\" needs an even model.width, but it is {width}")
                });
            }
            PositionBasis::Sinusoidal => {
                let parts = if p.combination == C::Stack { 4 } else { 2 };
                require(width.is_multiple_of(parts), || {
                    format!(
                        "model.position.basis = \"sinusoidal\" needs a model.width that {parts} divides, but it is {width}"
                    )
                })?;
            }
            PositionBasis::Learned => {
                require(p.combination != C::Stack || width.is_multiple_of(2), || {
                    format!(
                        "model.position.combination = \"stack\" needs an even model.width, but it is {width}"
                    )
                })?;
            }
        }
        positive("model.position.rows", p.rows as u64)?;
        positive("model.position.columns", p.columns as u64)?;
        at_most("model.position.rows", p.rows, 1 << 16)?;
        at_most("model.position.columns", p.columns, 1 << 16)?;
        require(p.combination != C::Flat || p.coordinate == PositionCoordinate::Absolute, || {
            "model.position.combination = \"flat\" needs model.position.coordinate = \"absolute\": a flattened \
             index has no fraction; use \"joint\" to resize a table to the image's grid"
                .into()
        })
    }
}
