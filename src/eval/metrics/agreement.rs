//! How alike two observers err: accuracy difference, observed and error consistency, as the toolbox model-vs-human
//! computes them (Geirhos et al. 2021, "Partial success in closing the gap between human and machine vision").

use serde::Serialize;

/// Two observers on the same images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Share of images that the first gets right.
    pub accuracy: f64,
    /// Share of images that the second gets right.
    pub accuracy_of_other: f64,
    /// Squared difference of the two accuracies.
    pub accuracy_difference: f64,
    /// Share of images that both get right or both get wrong.
    pub observed_consistency: f64,
    /// The share that two independent observers of these accuracies would have: p₁p₂ + (1 − p₁)(1 − p₂).
    pub expected_consistency: f64,
    /// Cohen's κ of being right: (observed − expected) / (1 − expected), in [−1, 1]; 1 where all is consistent.
    pub error_consistency: f64,
}

/// Compares who is right on which image. `None` without images.
///
/// # Panics
/// If the lengths differ: a bug of the caller.
pub fn agreement(correct: &[bool], of_other: &[bool]) -> Option<Agreement> {
    assert_eq!(correct.len(), of_other.len(), "two observers of the same images");
    let images = correct.len();
    if images == 0 {
        return None;
    }
    let share = |count: usize| count as f64 / images as f64;
    let accuracy = |right: &[bool]| share(right.iter().filter(|right| **right).count());
    let (first, second) = (accuracy(correct), accuracy(of_other));
    let both = correct.iter().zip(of_other).filter(|(a, b)| a == b).count();
    let observed = share(both);
    let expected = first * second + (1.0 - first) * (1.0 - second);
    // Where both are always right, or always wrong, chance alone explains everything and the quotient is 0 / 0.
    let kappa = if both == images { 1.0 } else { (observed - expected) / (1.0 - expected) };
    Some(Agreement {
        accuracy: first,
        accuracy_of_other: second,
        accuracy_difference: (first - second).powi(2),
        observed_consistency: observed,
        expected_consistency: expected,
        error_consistency: kappa,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pattern: &str) -> Vec<bool> {
        pattern.chars().map(|c| c == '+').collect()
    }

    #[test]
    fn by_hand() {
        // 3/4 and 1/2 right, alike on 1, 2 and 4: observed 3/4, expected 3/8 + 1/8 = 1/2, κ = 1/2.
        let a = agreement(&of("+++-"), &of("++--")).unwrap();
        assert_eq!((a.accuracy, a.accuracy_of_other, a.accuracy_difference), (0.75, 0.5, 0.0625));
        assert_eq!((a.observed_consistency, a.expected_consistency, a.error_consistency), (0.75, 0.5, 0.5));
    }

    #[test]
    fn edge_cases() {
        let kappa = |a: &str, b: &str| agreement(&of(a), &of(b)).unwrap().error_consistency;
        assert_eq!(kappa("++++", "++++"), 1.0, "0 / 0 counts as consistent");
        assert_eq!(kappa("----", "----"), 1.0);
        assert_eq!(kappa("+-+-", "+-+-"), 1.0);
        assert_eq!(kappa("+-+-", "-+-+"), -1.0, "never alike");
        assert_eq!(kappa("++--", "+-+-"), 0.0, "as chance would have it");
        assert_eq!(kappa("++++", "----"), 0.0, "never alike, and never could be");
        assert_eq!(kappa("++++", "++--"), 0.0, "who is always right agrees by chance alone");
        assert_eq!(agreement(&[], &[]), None);
    }

    #[test]
    fn symmetric() {
        let (a, b) = (of("++-+--+"), of("+---+-+"));
        let (there, back) = (agreement(&a, &b).unwrap(), agreement(&b, &a).unwrap());
        assert_eq!(there.error_consistency, back.error_consistency);
        assert_eq!(there.accuracy, back.accuracy_of_other);
    }
}
