//! What a recipe must satisfy beyond the types of its values.

mod sampling;
mod train;

use super::{
    ModelConfig, PoolKind, PositionBasis, PositionCombination, PositionCoordinate, Recipe, ResolutionKind,
    Rope, RopeCoordinate, RopeFrequencies,
};
use crate::{Error, Result};

/// Longest accepted side in pixels.
pub const MAX_SIDE: usize = 30_000;

pub(super) fn require(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
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

pub(super) fn at_least(key: &str, value: f64, low: f64) -> Result<()> {
    require(value >= low && value.is_finite(), || format!("{key} must be at least {low}, but it is {value}"))
}

fn above(key: &str, value: f64, low: f64) -> Result<()> {
    require(value > low && value.is_finite(), || format!("{key} must be above {low}, but it is {value}"))
}

/// `low <= value <= high`.
pub(super) fn within(key: &str, value: u64, low: u64, high: u64) -> Result<()> {
    require((low..=high).contains(&value), || format!("{key} must lie in {low}..{high}, but it is {value}"))
}

/// Kernels compute in single precision.
fn single(key: &str, value: f64) -> Result<()> {
    require((value as f32).is_finite(), || {
        format!("{key} must be a finite number in single precision, but it is {value}")
    })
}

/// An ε that single precision, squared sums included, does not lose.
fn epsilon(key: &str, value: f64) -> Result<()> {
    single(key, value)?;
    require(value >= MIN_EPS, || format!("{key} must be above 0, at least {MIN_EPS:e}, but it is {value}"))
}

pub(super) fn moderate(key: &str, value: f64) -> Result<()> {
    require(value.abs() <= MAX_FACTOR, || {
        format!("{key} must lie in -{MAX_FACTOR}..{MAX_FACTOR}, but it is {value}")
    })
}

/// Smallest accepted ε.
const MIN_EPS: f64 = 1e-30;
/// Largest accepted magnitude of a scale or an initial value.
const MAX_FACTOR: f64 = 1e6;
/// Largest accepted base of rotary frequencies.
const MAX_THETA: f64 = 1e12;
/// Largest accepted band of rotary frequencies.
const MAX_BAND: f64 = 1e4;
/// Largest accepted width, depth or count of the model.
pub(super) const MAX_DIMENSION: u64 = 1_000_000;
/// Largest accepted number of values in a tensor of one batch, or of parameters: in bytes these stay
/// far below what an address can count.
const MAX_VALUES: u128 = 1 << 44;

impl Recipe {
    /// Checks that the values fit together.
    ///
    /// # Errors
    /// One sentence that names the key, its value and what it must be.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.validate_products()?;
        self.validate_data()?;
        self.validate_resolution()?;
        self.validate_packing()?;
        self.validate_drop()?;
        self.validate_mix()?;
        self.validate_distill()?;
        self.validate_text()?;
        self.validate_augment()?;
        self.validate_train()
    }

    fn validate_data(&self) -> Result<()> {
        let (data, channels) = (&self.data, self.model.channels);
        for (key, values) in [("data.mean", &data.mean), ("data.std", &data.std)] {
            require(values.len() == 1 || values.len() == channels, || {
                let grey = match values[..] {
                    [r, g, b] => format!("; for grey images set {key}=[{:.3}]", luma([r, g, b])),
                    _ => String::new(),
                };
                format!(
                    "{key} must hold 1 value or one for each of the model.channels = {channels} channels, but it \
                     holds {}{grey}",
                    values.len()
                )
            })?;
            require(values.iter().all(|v| v.is_finite()), || format!("{key} must hold finite numbers"))?;
        }
        for &std in &data.std {
            require(std >= 1e-6, || format!("data.std must be above 0, at least 1e-6, but it is {std}"))?;
        }
        within("data.workers", data.workers as u64, 0, 1024)?;
        below("data.validation", data.validation, 0.0, 1.0)?;
        require((0.0..=1.0).contains(&data.max_unreadable), || {
            format!("data.max_unreadable must lie in 0..1, but it is {}", data.max_unreadable)
        })
    }

    /// Nothing that is computed from several keys may overflow later.
    fn validate_products(&self) -> Result<()> {
        let (model, d) = (&self.model, self.model.dimensions()?);
        let [width, depth, mlp] = [d.width, d.depth, d.mlp].map(|n| n as u128);
        let attention = d.heads as u128 * d.head_dim as u128;
        let key_values = d.kv_heads as u128 * d.head_dim as u128;
        let patch_dim = model.channels as u128 * (model.patch as u128).pow(2);
        let widest = [width, mlp, attention + 2 * key_values, patch_dim].into_iter().max().unwrap_or(0);
        let values = self.packing.tokens as u128 * widest;
        require(values <= MAX_VALUES, || {
            format!(
                "packing.tokens = {} times the model's widest layer of {widest} makes {values} values a tensor, \
                 more than 2^44; lower one of them",
                self.packing.tokens
            )
        })?;
        let table = model.position.rows as u128 * model.position.columns as u128 * width;
        let parameters = depth * width * (2 * (attention + key_values) + 2 * mlp) + patch_dim * width + table;
        require(parameters <= MAX_VALUES, || {
            format!(
                "the model has about {parameters} parameters, more than 2^44; lower model.width, model.depth, \
                 model.mlp, model.heads, model.patch or the model.position tables"
            )
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
        within("resolution.max", r.max as u64, 1, MAX_SIDE as u64)?;
        let eval = self.eval.resolution;
        require(eval == 0 || (patch..=MAX_SIDE).contains(&eval), || {
            format!(
                "eval.resolution must be 0 (as resolution.max) or lie in model.patch = {patch}..{MAX_SIDE}, but it \
                 is {eval}"
            )
        })?;
        if matches!(r.kind, ResolutionKind::Uniform | ResolutionKind::TruncatedNormal)
            || self.needs_smallest()
        {
            positive("resolution.min", r.min as u64)?;
            require(r.min <= r.max, || {
                format!("resolution.min = {} must not exceed resolution.max = {}", r.min, r.max)
            })?;
        }
        if r.kind == ResolutionKind::TruncatedNormal {
            require(r.std > 0.0 && r.std <= 10.0, || {
                format!("resolution.std must be above 0 and at most 10, but it is {}", r.std)
            })?;
            require((-1.0..=1.0).contains(&r.mean), || {
                format!("resolution.mean must lie in -1..1, but it is {}", r.mean)
            })?;
        }
        Ok(())
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
        for (key, value) in [
            ("model.width", self.width),
            ("model.depth", self.depth),
            ("model.mlp", self.mlp),
            ("model.heads", self.heads),
            ("model.kv_heads", self.kv_heads),
            ("model.head_dim", self.head_dim),
            ("model.registers", self.registers),
        ] {
            within(key, value as u64, 0, MAX_DIMENSION)?;
        }
        within("model.patch", self.patch as u64, 1, MAX_SIDE as u64)?;
        let dims = self.dimensions()?;
        epsilon("model.norm_eps", self.norm_eps)?;
        epsilon("model.qk_norm_eps", self.qk_norm_eps)?;
        at_least("model.attention_scale", self.attention_scale, 0.0)?;
        at_least("model.layer_scale", self.layer_scale, 0.0)?;
        below("model.drop_path", self.drop_path, 0.0, 1.0)?;
        for (key, value) in [
            ("model.attention_scale", self.attention_scale),
            ("model.layer_scale", self.layer_scale),
            ("model.head_init_bias", self.head_init_bias),
            ("model.position.fourier_std", self.position.fourier_std),
        ] {
            moderate(key, value)?;
        }
        require(self.pool != PoolKind::Cls || self.class_token, || {
            "model.pool = \"cls\" needs model.class_token = true; or pool with \"map\" or \"mean\"".into()
        })?;
        self.validate_rope(dims.head_dim)?;
        self.validate_position(dims.width)
    }

    fn validate_rope(&self, head_dim: usize) -> Result<()> {
        use RopeCoordinate as C;
        let r = &self.rope;
        if r.kind == Rope::None {
            return Ok(());
        }
        require(head_dim.is_multiple_of(4), || {
            format!(
                "model.rope turns pairs of columns, half of them by rows and half by columns of patches: it needs a head \
                 dim (model.head_dim, or model.width / model.heads) that 4 divides, but it is {head_dim}"
            )
        })?;
        moderate("model.rope.offset", r.offset)?;
        match r.frequencies {
            RopeFrequencies::Axial | RopeFrequencies::Alternating | RopeFrequencies::Turns => {
                require((1.0..=MAX_THETA).contains(&r.theta), || {
                    format!("model.rope.theta must lie in 1..{MAX_THETA:e}, but it is {}", r.theta)
                })?;
            }
            RopeFrequencies::Linear | RopeFrequencies::Logarithmic => {
                require((2.0..=MAX_BAND).contains(&r.max_frequency), || {
                    format!(
                        "model.rope.max_frequency must lie in 2..{MAX_BAND}, but it is {}",
                        r.max_frequency
                    )
                })?;
            }
        }
        let whole = matches!(r.coordinate, C::Absolute | C::Fractional);
        let language = matches!(r.frequencies, RopeFrequencies::Axial | RopeFrequencies::Alternating);
        require(language || !whole, || {
            "model.rope.frequencies = \"turns\", \"linear\" and \"logarithmic\" turn by whole or half turns at a \
             coordinate of 1: they need a model.rope.coordinate from -1 to 1 (\"centered\", \"centered-longer\", \
             \"centered-shorter\" or \"ends\")"
                .into()
        })?;
        if r.coordinate == C::Fractional {
            within("model.rope.rows", r.rows as u64, 1, u64::from(u16::MAX))?;
            within("model.rope.columns", r.columns as u64, 1, u64::from(u16::MAX))?;
        }
        Ok(())
    }

    fn validate_position(&self, width: usize) -> Result<()> {
        let p = &self.position;
        use PositionCombination as C;
        if p.basis == PositionBasis::None {
            return Ok(());
        }
        require(p.combination != C::Flat || p.coordinate == PositionCoordinate::Absolute, || {
            "model.position.combination = \"flat\" needs model.position.coordinate = \"absolute\": a flattened \
             index has no fraction; use \"joint\" to resize a table to the image's grid"
                .into()
        })?;
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
        within("model.position.rows", p.rows as u64, 1, u64::from(u16::MAX))?;
        within("model.position.columns", p.columns as u64, 1, u64::from(u16::MAX))
    }
}

/// BT.601 luma, as colour images become grey.
fn luma([r, g, b]: [f32; 3]) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}
