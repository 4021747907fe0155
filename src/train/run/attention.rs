//! Attention of a few validation images, logged at every evaluation. The first rank computes it on its CPU, from the whole
//! weights in f32, so that it is the same on every mesh and device but for what their arithmetic makes of the weights.

use std::time::Instant;

use super::Trainer;
use crate::data::source::Dataset;
use crate::error::Result;
use crate::eval::attention::BlockAttention;
use crate::eval::attention::probe::AttentionProbe;
use crate::parallel::MeshGroups;
use crate::recipe::Recipe;
use crate::train::engine::{StateKind, gather};
use crate::train::report::AttentionReport;

/// What measures it, on the rank that does, where the recipe asks for it.
pub(super) fn probe(
    recipe: &Recipe,
    dataset: &Dataset,
    ranks: &MeshGroups,
) -> Result<Option<AttentionProbe>> {
    if !recipe.train.log_attention || !ranks.is_first() {
        return Ok(None);
    }
    AttentionProbe::new(recipe, dataset.classes.len(), dataset.validation.clone())
}

impl Trainer {
    /// Logs it for the weights that an evaluation uses. All ranks call it.
    pub(super) fn log_attention(&mut self, step: u64) -> Result<()> {
        let begun = Instant::now();
        let kind = if self.recipe.train.ema > 0.0 { StateKind::Average } else { StateKind::Weights };
        let mut weights = Vec::new();
        let gathered = gather(self.engine.parts()?, kind, &mut |_, values| {
            weights.push(values.to_vec());
            Ok(())
        })?;
        gathered.inspect_err(|_| self.agreed = true)?;
        let Some(probe) = &mut self.probe else { return Ok(()) };
        let blocks = probe.measure(&weights)?;
        let of = |value: fn(&BlockAttention) -> f64| blocks.iter().map(value).collect();
        let report = AttentionReport {
            step,
            entropy: of(|block| block.entropy),
            min_head_entropy: of(|block| block.min_head_entropy),
            max_logit: of(|block| block.max_logit),
            uniform_entropy: probe.uniform_entropy(),
            images: probe.images() as u64,
            seconds: begun.elapsed().as_secs_f64(),
        };
        let told = self.journal.attention(&report);
        self.keep_unsaid(told)
    }
}
