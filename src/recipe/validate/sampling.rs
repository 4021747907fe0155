//! What dropping and packing must satisfy, and how they fit the resolutions.

use super::{below, positive, require};
use crate::Result;
use crate::recipe::{DropKind, FitKind, PackingKind, Recipe, ResolutionKind};

impl Recipe {
    /// Whether dropping or packing asks for `resolution.min`, even if the distribution does not.
    pub(super) fn needs_smallest(&self) -> bool {
        self.resolution.kind != ResolutionKind::Fixed
            && (self.drop.kind == DropKind::Resolution || self.packing.fit == FitKind::Resolution)
    }

    pub(super) fn validate_packing(&self) -> Result<()> {
        let p = &self.packing;
        require(p.tokens > 0 && p.tokens.is_multiple_of(128), || {
            format!("packing.tokens must be a positive multiple of 128, but it is {}", p.tokens)
        })?;
        require(p.tokens < 1 << 31, || format!("packing.tokens must be below 2^31, but it is {}", p.tokens))?;
        require(p.images <= p.tokens, || {
            format!("packing.images = {} must not exceed packing.tokens = {}", p.images, p.tokens)
        })?;
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
        let prefix = self.model.prefix();
        let side = self.resolution.max / self.model.patch;
        require(side * side + prefix <= room, || {
            format!(
                "an image at resolution.max = {} has {} tokens with model.patch = {}, more than {name} = {room}: \
                 raise {name} or lower resolution.max",
                self.resolution.max,
                side * side + prefix,
                self.model.patch
            )
        })?;
        self.validate_fit()
    }

    fn validate_fit(&self) -> Result<()> {
        match self.packing.fit {
            FitKind::None => Ok(()),
            FitKind::Resolution => self.resolutions_differ("packing.fit", "leave packing.fit at \"none\""),
            FitKind::Drop => {
                require(self.drop.kind != DropKind::None, || {
                    "packing.fit = \"drop\" drops tokens of the images that it fits, but drop.kind = \"none\": choose a \
                     drop.kind, or packing.fit = \"resolution\""
                        .into()
                })?;
                below("drop.max", self.drop.max, 0.0, 1.0)
            }
        }
    }

    /// `key` is "resolution" and needs resolutions that differ.
    fn resolutions_differ(&self, key: &str, instead: &str) -> Result<()> {
        let r = &self.resolution;
        require(r.kind != ResolutionKind::Fixed, || {
            format!(
                "{key} = \"resolution\" has nothing to choose from where resolution.kind = \"fixed\": {instead}"
            )
        })?;
        require(r.min < r.max, || {
            format!(
                "{key} = \"resolution\" has nothing to choose from where resolution.min = {} and resolution.max = {} are \
                 the same: {instead}",
                r.min, r.max
            )
        })
    }

    pub(super) fn validate_drop(&self) -> Result<()> {
        let d = &self.drop;
        match d.kind {
            DropKind::None => Ok(()),
            DropKind::Constant => below("drop.mean", d.mean, 0.0, 1.0),
            DropKind::Beta => {
                below("drop.mean", d.mean, 0.0, 1.0)?;
                below("drop.max", d.max, 0.0, 1.0)?;
                require(d.mean > 0.0 && d.mean < d.max, || {
                    format!("drop.mean = {} must lie between 0 and drop.max = {}", d.mean, d.max)
                })
            }
            DropKind::Resolution => {
                self.validate_ends()?;
                require(d.std > 0.0 && d.min - 2.0 * d.std >= 0.0 && d.max + 2.0 * d.std < 1.0, || {
                    format!(
                        "the rates of drop.kind = \"resolution\" reach from drop.min - 2 drop.std to drop.max + 2 \
                         drop.std, which must lie between 0 and 1, but drop.min = {}, drop.max = {} and drop.std = {}",
                        d.min, d.max, d.std
                    )
                })?;
                self.resolutions_differ("drop.kind", "choose drop.kind = \"constant\" or \"beta\"")
            }
            DropKind::Schedule => {
                self.validate_ends()?;
                require(d.midpoint.is_finite(), || {
                    format!("drop.midpoint must be a finite number, but it is {}", d.midpoint)
                })?;
                require(d.timescale.is_finite() && d.timescale != 0.0, || {
                    format!(
                        "drop.timescale must be a number below 0 (rates fall) or above 0 (they rise), but it is {}",
                        d.timescale
                    )
                })?;
                require(d.images > 0 || self.resolution.kind != ResolutionKind::Native, || {
                    "drop.kind = \"schedule\" follows the images seen, whose number cannot be derived where \
                     resolution.kind = \"native\": set drop.images to the images of the run"
                        .into()
                })
            }
        }
    }

    /// `drop.min` and `drop.max` where they are the ends of what rates follow.
    fn validate_ends(&self) -> Result<()> {
        let d = &self.drop;
        below("drop.min", d.min, 0.0, 1.0)?;
        below("drop.max", d.max, 0.0, 1.0)?;
        require(d.min <= d.max, || format!("drop.min = {} must not exceed drop.max = {}", d.min, d.max))
    }
}
