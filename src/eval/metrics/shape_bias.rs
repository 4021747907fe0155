//! Shape against texture on cue-conflict images: an elephant's skin on a cat (Geirhos et al. 2019, "ImageNet-trained CNNs
//! are biased towards texture"). Definitions as in the toolbox model-vs-human.

use serde::Serialize;

/// The 16 classes of the stimuli.
pub const CATEGORIES: [&str; 16] = [
    "airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock", "dog",
    "elephant", "keyboard", "knife", "oven", "truck",
];

/// A cue-conflict image and what an observer said of it, as indices of categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// What its outline shows.
    pub shape: usize,
    /// What its surface shows.
    pub texture: usize,
    /// What it was taken for; none where the answer was no category.
    pub decision: Option<usize>,
}

/// Decisions counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cues {
    /// Images whose shape and texture differ.
    pub conflicts: u64,
    /// Of those, decided by shape.
    pub shape: u64,
    /// Of those, decided by texture.
    pub texture: u64,
}

impl Cues {
    /// Counts the trials; those whose shape and texture are the same say nothing and are left out.
    pub fn count<'a>(trials: impl IntoIterator<Item = &'a Trial>) -> Self {
        let mut cues = Self::default();
        for trial in trials.into_iter().filter(|trial| trial.shape != trial.texture) {
            cues.conflicts += 1;
            cues.shape += u64::from(trial.decision == Some(trial.shape));
            cues.texture += u64::from(trial.decision == Some(trial.texture));
        }
        cues
    }

    /// Shape decisions / (shape + texture decisions); `None` where there are neither.
    pub fn shape_bias(&self) -> Option<f64> {
        let decided = self.shape + self.texture;
        (decided > 0).then(|| self.shape as f64 / decided as f64)
    }

    /// Share of decisions that are one of the two cues; `None` without images.
    pub fn either(&self) -> Option<f64> {
        (self.conflicts > 0).then(|| (self.shape + self.texture) as f64 / self.conflicts as f64)
    }
}

/// Probability of each category: the mean of those of its model classes, as model-vs-human takes it. A category without
/// model classes has none.
pub fn category_probabilities(probabilities: &[f64], classes: &[Vec<usize>]) -> Vec<Option<f64>> {
    let mean =
        |own: &Vec<usize>| own.iter().map(|&class| probabilities[class]).sum::<f64>() / own.len() as f64;
    classes.iter().map(|own| (!own.is_empty()).then(|| mean(own))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let trial = |shape, texture, decision| Trial { shape, texture, decision: Some(decision) };
        // Three for shape, one for texture, one for neither, and one where the cues agree.
        let trials =
            [trial(0, 1, 0), trial(1, 2, 1), trial(2, 0, 2), trial(3, 4, 4), trial(5, 6, 7), trial(8, 8, 8)];
        let cues = Cues::count(&trials);
        assert_eq!(cues, Cues { conflicts: 5, shape: 3, texture: 1 });
        assert_eq!((cues.shape_bias(), cues.either()), (Some(0.75), Some(0.8)));
        let none = Cues::count(&trials[4..]);
        assert_eq!((none.shape_bias(), none.either()), (None, Some(0.0)));
        assert_eq!(Cues::count(&[]).either(), None);
    }

    #[test]
    fn a_category_has_the_mean_of_its_classes() {
        let got = category_probabilities(&[0.5, 0.3, 0.2], &[vec![0], vec![1, 2], vec![]]);
        assert_eq!(
            got,
            [Some(0.5), Some(0.25), None],
            "a sum would make the second as probable as the first"
        );
    }
}
