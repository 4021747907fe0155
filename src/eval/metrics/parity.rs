//! Fairness between groups of images: accuracy gap, demographic parity, and thresholds by group that restore it.
//!
//! The best classifier under demographic parity thresholds a group's scores at a place of its own (Menon and Williamson
//! 2018, "The cost of fairness in binary classification"; Alabdulmohsin and Lucic 2021 fit it by post-processing, as is
//! done here, by an exact search instead of gradient descent).

use serde::Serialize;

/// Of each of `groups` groups: how many members it has, and for how many of them `counted` holds.
pub fn shares(groups: usize, group_of: &[usize], counted: impl Fn(usize) -> bool) -> Vec<Share> {
    let mut shares = vec![Share::default(); groups];
    for (image, &group) in group_of.iter().enumerate() {
        shares[group].images += 1;
        shares[group].counted += u64::from(counted(image));
    }
    shares
}

/// A part of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Images of the group.
    pub images: u64,
    /// Those of them that count.
    pub counted: u64,
}

impl Share {
    /// Between 0 and 1; none of an empty group.
    pub fn share(&self) -> Option<f64> {
        (self.images > 0).then(|| self.counted as f64 / self.images as f64)
    }
}

/// Largest minus smallest share of the groups that have images: of right answers the accuracy gap, of positive decisions
/// the demographic-parity gap. 0 without images.
pub fn gap(shares: &[Share]) -> f64 {
    let known = || shares.iter().filter_map(Share::share);
    let gap = known().fold(f64::NEG_INFINITY, f64::max) - known().fold(f64::INFINITY, f64::min);
    gap.max(0.0)
}

/// A threshold for each group: an image is positive where its score is at least that of its group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Thresholds {
    /// The share of positive decisions that every group is given, to within half an image of the group.
    pub rate: f64,
    /// By group.
    pub thresholds: Vec<f64>,
}

/// Above every probability.
const NEVER: f64 = 1.0 + f64::EPSILON;

impl Thresholds {
    /// The thresholds of the most accurate classifier among those that give all groups the same share of positive
    /// decisions; of equal scores in a group all or none are positive. `scores` are probabilities of being positive, `positive` what is true.
    ///
    /// # Panics
    /// If the lengths differ, or a group is empty: bugs of the caller.
    pub fn fit(groups: usize, group_of: &[usize], scores: &[f64], positive: &[bool]) -> Self {
        assert!(group_of.len() == scores.len() && scores.len() == positive.len(), "one of each an image");
        let mut members: Vec<Vec<(f64, bool)>> = vec![Vec::new(); groups];
        for ((&group, &score), &positive) in group_of.iter().zip(scores).zip(positive) {
            members[group].push((score, positive));
        }
        members.iter_mut().for_each(|own| own.sort_by(|a, b| b.0.total_cmp(&a.0)));
        // Right answers of a group whose first k members are decided positive.
        let right: Vec<Vec<u64>> = members
            .iter()
            .map(|own| {
                let negatives = own.iter().filter(|(_, positive)| !positive).count() as u64;
                let step = |right: &mut u64, &(_, positive): &(f64, bool)| {
                    *right = if positive { *right + 1 } else { *right - 1 };
                    Some(*right)
                };
                std::iter::once(negatives).chain(own.iter().scan(negatives, step)).collect()
            })
            .collect();
        // A threshold divides members only where the score falls: of equal scores it takes all or none.
        let divides = |k: usize, own: &[(f64, bool)]| k == 0 || k == own.len() || own[k - 1].0 > own[k].0;
        let largest = members.iter().map(Vec::len).max().unwrap_or(0);
        let first = |rate: f64, own: &[(f64, bool)]| (rate * own.len() as f64).round() as usize;
        let rate_of = |k: usize| k as f64 / largest.max(1) as f64;
        let answers = |k: &usize| -> u64 {
            members.iter().zip(&right).map(|(own, right)| right[first(rate_of(*k), own)]).sum()
        };
        let possible = |k: &usize| members.iter().all(|own| divides(first(rate_of(*k), own), own));
        // Of equally good rates the smallest; none and all are always possible.
        let best =
            (0..=largest).filter(possible).max_by_key(|k| (answers(k), std::cmp::Reverse(*k))).unwrap_or(0);
        let rate = rate_of(best);
        let threshold = |own: &Vec<(f64, bool)>| match first(rate, own) {
            0 => NEVER,
            all if all == own.len() => 0.0,
            k => {
                let (above, below) = (own[k - 1].0, own[k].0);
                // Between neighbouring numbers there is no other.
                let middle = 0.5 * (above + below);
                if middle > below { middle } else { above }
            }
        };
        Self { rate, thresholds: members.iter().map(threshold).collect() }
    }

    /// The decision on an image of `group`.
    pub fn decide(&self, group: usize, score: f64) -> bool {
        score >= self.thresholds[group]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_by_hand() {
        let group_of = [0, 0, 0, 0, 1, 1, 3];
        let shares = shares(4, &group_of, |image| [0, 1, 2, 4].contains(&image));
        assert_eq!(shares[0], Share { images: 4, counted: 3 });
        assert_eq!(
            shares.iter().map(Share::share).collect::<Vec<_>>(),
            [Some(0.75), Some(0.5), None, Some(0.0)]
        );
        assert_eq!(gap(&shares), 0.75);
        assert_eq!(gap(&shares[..2]), 0.25);
        assert_eq!((gap(&[]), gap(&shares[..1])), (0.0, 0.0));
    }

    #[test]
    fn thresholds_by_hand() {
        // At one threshold of 0.5 group 0 is positive three times of four, group 1 never. Half of each group is best:
        // only the third of group 0 is then decided wrongly.
        let group_of = [0, 0, 0, 0, 1, 1, 1, 1];
        let scores = [0.9, 0.8, 0.7, 0.1, 0.45, 0.35, 0.2, 0.1];
        let positive = [true, true, true, false, true, true, false, false];
        let fitted = Thresholds::fit(2, &group_of, &scores, &positive);
        assert_eq!(fitted.rate, 0.5);
        assert!((fitted.thresholds[0] - 0.75).abs() < 1e-12 && (fitted.thresholds[1] - 0.275).abs() < 1e-12);
        let decisions = |image: usize| fitted.decide(group_of[image], scores[image]);
        assert_eq!(gap(&shares(2, &group_of, decisions)), 0.0);
        assert_eq!(gap(&shares(2, &group_of, |image| scores[image] >= 0.5)), 0.75);
        assert_eq!((0..8).filter(|&image| decisions(image) == positive[image]).count(), 7);
    }

    #[test]
    fn ties_are_not_divided() {
        let group_of = [0, 0, 0, 0, 1, 1, 1, 1];
        let positive = [true, true, false, false, true, true, false, false];
        let fit = |own: [f64; 4]| {
            let scores = [own.as_slice(), &[0.9, 0.8, 0.2, 0.1]].concat();
            let fitted = Thresholds::fit(2, &group_of, &scores, &positive);
            let decided: Vec<bool> =
                (0..8).map(|image| fitted.decide(group_of[image], scores[image])).collect();
            assert_eq!(gap(&shares(2, &group_of, |image| decided[image])), 0.0, "{own:?}");
            let right = (0..8).filter(|&image| decided[image] == positive[image]).count();
            (fitted.rate, right)
        };
        // Half would be best, and all of group 0 would be decided positive.
        assert_eq!(fit([0.5; 4]), (0.0, 4));
        assert_eq!(fit([0.9, 0.5, 0.5, 0.1]), (0.25, 6));
        assert_eq!(fit([0.9, 0.9, 0.5, 0.5]), (0.5, 8));
        assert_eq!(fit([0.5f64.next_up(), 0.5f64.next_up(), 0.5, 0.5]), (0.5, 8));
    }

    #[test]
    fn all_and_none() {
        let all = Thresholds::fit(2, &[0, 1, 1], &[0.0, 0.2, 0.3], &[true; 3]);
        assert_eq!((all.rate, all.decide(0, 0.0), all.decide(1, 0.0)), (1.0, true, true));
        let none = Thresholds::fit(2, &[0, 1, 1], &[1.0, 0.2, 0.3], &[false; 3]);
        assert_eq!((none.rate, none.decide(0, 1.0), none.decide(1, 1.0)), (0.0, false, false));
    }

    #[test]
    fn groups_of_unequal_size_are_as_equal_as_their_sizes_allow() {
        let group_of: Vec<usize> = (0..90).map(|i| usize::from(i % 9 == 0)).collect();
        let scores: Vec<f64> =
            (0..90).map(|i| f64::from(i * 37 % 90) / 90.0 / (1.0 + f64::from(i % 9 == 0))).collect();
        let positive: Vec<bool> =
            scores.iter().enumerate().map(|(i, s)| s + (i % 5) as f64 / 10.0 > 0.6).collect();
        let fitted = Thresholds::fit(2, &group_of, &scores, &positive);
        let after = shares(2, &group_of, |image| fitted.decide(group_of[image], scores[image]));
        assert!(gap(&after) <= 0.5 / 10.0 + 0.5 / 80.0, "{after:?}");
        assert!(gap(&shares(2, &group_of, |image| scores[image] >= 0.5)) > 0.3);
    }
}
