//! Which data rank computes which batch of a step: in every step the ranks wait for the slowest of them.
//!
//! What a step is trained on is decided before, by the [planner](super::planner), and is the same on any number of
//! ranks; only who computes it is decided here. Images may move from one batch of the step to another, as no result
//! depends on what an image is packed with and the step's loss is the mean over all of them.

use crate::data::packing::{BatchPlan, PlannedImage};
use crate::error::{Error, Result};
use crate::recipe::Recipe;

/// What images cost, in units of 4·A FLOPs in the forward pass of each block, where A = heads · head width.
///
/// A block's matrix products take 2·D·(2·A + 2·K + 2·M) FLOPs a token (width D, MLP width M, K = kv heads · head width,
/// which is A unless query heads share them) and its attention, Q·Kᵀ and P·V, 4·A·S² an image of S tokens; backward takes
/// twice as much of both (the count behind model FLOPs utilisation, Chowdhery et al. 2022, "PaLM", appendix B). So an
/// image costs S² + D·(1 + K/A + M/A)·S, which is S² + 6·D·S where A = K = D and M = 4·D. What happens before and after the blocks is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// D·(1 + K/A + M/A).
    per_token: f64,
}

impl Cost {
    /// Of the model of a recipe.
    ///
    /// # Errors
    /// A model without dimensions.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        let d = recipe.model.dimensions()?;
        let attention = (d.heads * d.head_dim).max(1) as f64;
        let key_values = d.kv_heads as f64 / d.heads as f64;
        Ok(Self { per_token: d.width as f64 * (1.0 + key_values + d.mlp as f64 / attention) })
    }

    /// Of an image of so many tokens.
    pub fn image(self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        tokens * (tokens + self.per_token)
    }

    /// Of all images of a batch.
    pub fn batch(self, plan: &BatchPlan) -> f64 {
        plan.images.iter().map(|image| self.image(image.tokens)).sum()
    }
}

/// What a batch holds at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Token budget T.
    pub tokens: usize,
    /// Image slots N.
    pub slots: usize,
}

/// Whether `accumulate` batches can be dealt evenly to `ranks` data ranks.
///
/// # Errors
/// One sentence with the nearest number that can.
pub fn check_deals(accumulate: usize, ranks: usize) -> Result<()> {
    if accumulate.is_multiple_of(ranks) && accumulate > 0 {
        return Ok(());
    }
    let below = accumulate / ranks * ranks;
    let nearest = if below > 0 && accumulate - below < ranks.div_ceil(2) { below } else { below + ranks };
    Err(Error::usage(format!(
        "train.accumulate = {accumulate} batches of a step cannot be dealt evenly to {ranks} data ranks; start a number \
         of data ranks that divides it, or a new run with --set train.accumulate={nearest}"
    )))
}

/// The plans of a step by rank, the same number for each. Of the ways that are tried the one whose most expensive
/// rank costs least; the first of them is the order of planning, so it is never worse than that.
///
/// # Panics
/// If `ranks` does not divide the number of plans, which [`check_deals`] tells: a bug of the caller.
pub fn deal(plans: Vec<BatchPlan>, ranks: usize, cost: Cost, room: Room) -> Vec<Vec<BatchPlan>> {
    if ranks == 1 {
        return vec![plans];
    }
    let costs = |plans: &[BatchPlan]| plans.iter().map(|plan| cost.batch(plan)).collect::<Vec<_>>();
    let planned = costs(&plans);
    let mut best = (plans, assign(&planned, ranks));
    if let Some(levelled) = level(&best.0, cost, room) {
        let other = costs(&levelled);
        let dealt = assign(&other, ranks);
        if highest(&other, &dealt) < highest(&planned, &best.1) {
            best = (levelled, dealt);
        }
    }
    let (plans, dealt) = best;
    let mut plans: Vec<_> = plans.into_iter().map(Some).collect();
    dealt.iter().map(|batches| batches.iter().filter_map(|&batch| plans[batch].take()).collect()).collect()
}

/// For each of `ranks` the batches it computes, in order, equally many: the most expensive first, each to the rank that
/// has least to do and still takes one (longest processing time, Graham 1969), or in order where that is no worse.
///
/// # Panics
/// If `ranks` does not divide the number of batches: a bug of the caller.
pub fn assign(costs: &[f64], ranks: usize) -> Vec<Vec<usize>> {
    assert!(costs.len().is_multiple_of(ranks), "{} batches for {ranks} ranks", costs.len());
    let each = costs.len() / ranks;
    let in_order: Vec<Vec<usize>> =
        (0..ranks).map(|rank| (rank * each..(rank + 1) * each).collect()).collect();
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]));
    let mut dealt = vec![Vec::with_capacity(each); ranks];
    let mut load = vec![0f64; ranks];
    for batch in order {
        let open = (0..ranks).filter(|&rank| dealt[rank].len() < each);
        let Some(least) = open.min_by(|&a, &b| load[a].total_cmp(&load[b])) else { break };
        dealt[least].push(batch);
        load[least] += costs[batch];
    }
    dealt.iter_mut().for_each(|batches| batches.sort_unstable());
    if highest(costs, &dealt) < highest(costs, &in_order) { dealt } else { in_order }
}

/// Cost of the rank that has most to do.
pub fn highest(costs: &[f64], dealt: &[Vec<usize>]) -> f64 {
    let load = |batches: &Vec<usize>| batches.iter().map(|&batch| costs[batch]).sum::<f64>();
    dealt.iter().map(load).fold(0.0, f64::max)
}

/// The same images in as many batches of about the same cost: the longest first, each into the batch that costs
/// least and has room. `None` where one has no room anywhere.
fn level(plans: &[BatchPlan], cost: Cost, room: Room) -> Option<Vec<BatchPlan>> {
    /// Images by their place in the order of planning.
    #[derive(Clone, Default)]
    struct Filled {
        images: Vec<usize>,
        tokens: usize,
        cost: f64,
    }
    let images: Vec<&PlannedImage> = plans.iter().flat_map(|plan| &plan.images).collect();
    let mut order: Vec<usize> = (0..images.len()).collect();
    order.sort_by_key(|&image| std::cmp::Reverse(images[image].tokens));
    let mut filled = vec![Filled::default(); plans.len()];
    for image in order {
        let tokens = images[image].tokens;
        let fits =
            |batch: &&mut Filled| batch.tokens + tokens <= room.tokens && batch.images.len() < room.slots;
        let least = filled.iter_mut().filter(fits).min_by(|a, b| a.cost.total_cmp(&b.cost))?;
        least.images.push(image);
        least.tokens += tokens;
        least.cost += cost.image(tokens);
    }
    let levelled = filled.into_iter().zip(plans).map(|(mut batch, plan)| {
        batch.images.sort_unstable();
        BatchPlan {
            bins: vec![batch.images.len()],
            images: batch.images.into_iter().map(|image| images[image].clone()).collect(),
            skipped: plan.skipped.clone(),
            ..*plan
        }
    });
    Some(levelled.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_costs_six_widths_in_a_plain_model() {
        let mut recipe = Recipe::default();
        recipe.model.shape = "B".into();
        (recipe.model.width, recipe.model.depth, recipe.model.mlp, recipe.model.heads) = (0, 0, 0, 0);
        let cost = Cost::of(&recipe).unwrap();
        assert_eq!(cost.image(100), 100.0 * 100.0 + 6.0 * 768.0 * 100.0);
    }

    #[test]
    fn what_cannot_be_dealt_names_the_nearest_that_can() {
        for (accumulate, ranks, nearest) in
            [(1, 2, 2), (3, 2, 4), (5, 4, 4), (6, 4, 8), (7, 4, 8), (1, 8, 8), (9, 8, 8), (10, 3, 9)]
        {
            let told = check_deals(accumulate, ranks).unwrap_err().to_string();
            assert!(told.contains(&format!("--set train.accumulate={nearest}")), "{told}");
            assert!(
                told.contains(&format!("= {accumulate} ")) && told.contains(&format!("{ranks} data ranks"))
            );
        }
        for (accumulate, ranks) in [(1, 1), (7, 1), (8, 4), (6, 6)] {
            check_deals(accumulate, ranks).unwrap();
        }
    }

    #[test]
    fn the_most_expensive_are_dealt_apart() {
        assert_eq!(assign(&[4.0, 3.0, 2.0, 1.0], 2), [vec![0, 3], vec![1, 2]]);
        // As good in order, so it stays.
        assert_eq!(assign(&[1.0; 4], 2), [vec![0, 1], vec![2, 3]]);
        assert_eq!(assign(&[5.0, 1.0], 2), [vec![0], vec![1]]);
    }
}
