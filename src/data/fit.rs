//! The image that is fitted to a gap: its resolution or drop rate is chosen so that it fills what is left of a bin
//! (NaViT, section 2.3, which names the idea and does not use it).

use crate::data::packing::{PackingSettings, PlannedImage};
use crate::recipe::FitKind;

impl PackingSettings {
    /// Fewest tokens that `packing.fit` can give the image.
    pub fn fewest(&self, image: &PlannedImage) -> usize {
        match self.packing.fit {
            FitKind::None => image.tokens,
            FitKind::Resolution => {
                let (drop, draw) = (self.token_drop(image.draw()), image.draw());
                let tokens = |side: usize| self.plan_at(&drop, draw, image.size, side as f64).tokens;
                // Where longer images drop more, the longest may keep fewer than the shortest.
                tokens(self.resolution.min).min(tokens(self.resolution.max)).min(image.tokens)
            }
            FitKind::Drop => self.prefix + self.fewest_kept(image.target.grid.patches()),
        }
    }

    /// The image as `packing.fit` has it fill `gap` tokens best; `None` where it can't.
    ///
    /// `resolution` takes that between `resolution.min` and `resolution.max` which leaves least of the gap, the drawn one
    /// where it leaves as little; the aspect ratio stays, and the drop rate or its deviation. `drop` keeps the drawn
    /// resolution and fills the gap exactly, at a rate in 0..`drop.max`.
    pub fn fit(&self, image: &PlannedImage, gap: usize) -> Option<PlannedImage> {
        match self.packing.fit {
            FitKind::None => None,
            FitKind::Resolution => self.fit_resolution(image, gap),
            FitKind::Drop => {
                let (kept, patches) = (gap.checked_sub(self.prefix)?, image.target.grid.patches());
                let fits = (self.fewest_kept(patches)..=patches).contains(&kept);
                fits.then(|| PlannedImage { kept, tokens: gap, fitted: true, ..image.clone() })
            }
        }
    }

    /// Of so many patches at the highest rate that may be fitted; at least one.
    fn fewest_kept(&self, patches: usize) -> usize {
        // 1 − 0.9 is a little less than 0.1: a tenth of 10 patches is one, not two.
        (((1.0 - self.drop.max) * patches as f64 - 1e-9).ceil() as usize).max(1)
    }

    /// Looks at resolutions half a patch apart, and where the gap lies between two of them, at what is between.
    fn fit_resolution(&self, image: &PlannedImage, gap: usize) -> Option<PlannedImage> {
        let (min, max) = (self.resolution.min as f64, self.resolution.max as f64);
        let (drop, draw) = (self.token_drop(image.draw()), image.draw());
        let plan = |resolution: f64| self.plan_at(&drop, draw, image.size, resolution);
        let steps = (2.0 * (max - min) / self.patch as f64).ceil().max(1.0) as usize;
        let at = |step: usize| min + (max - min) * step as f64 / steps as f64;
        let tokens: Vec<usize> = (0..=steps).map(|step| plan(at(step)).tokens).collect();
        let fits = (0..=steps).filter(|&step| tokens[step] <= gap);
        let step = fits.max_by_key(|&step| tokens[step])?;
        let mut best = plan(at(step));
        for other in [step.wrapping_sub(1), step + 1] {
            if tokens.get(other).is_none_or(|&tokens| tokens <= gap) {
                continue;
            }
            let (mut low, mut high) = (at(step), at(other));
            for _ in 0..24 {
                let middle = 0.5 * (low + high);
                let planned = plan(middle);
                if planned.tokens > gap {
                    high = middle;
                } else {
                    low = middle;
                    best = if planned.tokens >= best.tokens { planned } else { best };
                }
            }
        }
        // Where longer images drop more, the drawn one may fill it better than those looked at.
        let drawn = (best.tokens..=gap).contains(&image.tokens);
        let best = if drawn { image.clone() } else { best };
        Some(PlannedImage { fitted: true, ..best })
    }
}
