//! How images are mixed with others during training, under the names and by the rules of timm.

use serde::{Deserialize, Serialize};

use super::validate::require;
use super::{LossKind, Recipe};
use crate::Result;

/// Accepted α besides 0, at which nothing is drawn: beyond these the Beta distribution is one point, or two.
const ALPHA: std::ops::RangeInclusive<f64> = 1e-3..=1e3;

/// How images are mixed with others during training. Each is mixed with another of the whole training set, drawn for
/// it alone, by mixup or CutMix. Both leave targets of two classes; `train.label_smoothing` smooths both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixConfig {
    /// α of mixup (arXiv 1710.09412): an image becomes λ of itself and 1 − λ of the other, λ ~ Beta(α, α); 0 leaves
    /// mixup out.
    pub mixup: f64,
    /// α of CutMix (arXiv 1905.04899): a box with 1 − λ of the area is that of the other image, λ ~ Beta(α, α); 0
    /// leaves CutMix out.
    pub cutmix: f64,
    /// Share of the images that are mixed.
    pub prob: f64,
    /// Where both are on, the share of the mixed images that get CutMix.
    pub switch_prob: f64,
    /// Whether every class of an image counts in full, as DeiT III trains with binary cross-entropy.
    pub binarise: bool,
}

impl Default for MixConfig {
    fn default() -> Self {
        Self { mixup: 0.0, cutmix: 0.0, prob: 1.0, switch_prob: 0.5, binarise: false }
    }
}

impl MixConfig {
    /// Whether any image is mixed.
    pub fn is_on(&self) -> bool {
        (self.mixup > 0.0 || self.cutmix > 0.0) && self.prob > 0.0
    }
}

impl Recipe {
    pub(super) fn validate_mix(&self) -> Result<()> {
        let (mix, train) = (&self.mix, &self.train);
        for (key, alpha) in [("mix.mixup", mix.mixup), ("mix.cutmix", mix.cutmix)] {
            require(alpha == 0.0 || ALPHA.contains(&alpha), || {
                format!(
                    "{key} is the α of a Beta distribution: it must be 0 (off) or lie in {}..{}, but it is {alpha}",
                    ALPHA.start(),
                    ALPHA.end()
                )
            })?;
        }
        for (key, share) in [("mix.prob", mix.prob), ("mix.switch_prob", mix.switch_prob)] {
            require((0.0..=1.0).contains(&share), || format!("{key} must lie in 0..1, but it is {share}"))?;
        }
        let asked =
            [("mix.mixup", mix.mixup), ("mix.cutmix", mix.cutmix)].into_iter().find(|(_, a)| *a > 0.0);
        if let (Some((key, alpha)), true) = (asked, mix.prob == 0.0) {
            return require(false, || {
                format!("mix.prob = 0 mixes no image, but {key} = {alpha}; raise one or set the other to 0")
            });
        }
        if !mix.binarise {
            return Ok(());
        }
        require(mix.is_on(), || {
            "mix.binarise = true needs mixed images; set mix.mixup or mix.cutmix above 0, or mix.binarise to false"
                .into()
        })?;
        require(train.label_smoothing == 0.0, || {
            format!(
                "mix.binarise = true would make 1 of every class that train.label_smoothing = {} puts above 0; set \
                 one of them",
                train.label_smoothing
            )
        })?;
        require(train.loss != LossKind::Softmax, || {
            "mix.binarise = true needs train.loss = \"bce\" or \"sigmoid\": the targets of a softmax sum to 1; set one \
             of them"
                .into()
        })
    }
}
