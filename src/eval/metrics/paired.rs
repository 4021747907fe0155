//! Whether two answers to the same questions differ by more than chance.

use libm::lgamma;

/// Two-sided exact p of McNemar's test: of the images on which exactly one of two models is right, `first` for the one and
/// `second` for the other, as many or more on one side under a fair coin. 1 where there are none.
pub fn mcnemar(first: u64, second: u64) -> f64 {
    let coins = (first + second) as f64;
    let choose = |k: f64| lgamma(coins + 1.0) - lgamma(k + 1.0) - lgamma(coins - k + 1.0);
    let of = |k: u64| (choose(k as f64) - coins * 2f64.ln()).exp();
    (2.0 * (0..=first.min(second)).map(of).sum::<f64>()).min(1.0)
}

/// Two-sided exact p of Wilcoxon's signed-rank test: the ranks of the differences that are not 0, by size, those of equal
/// size sharing the mean of theirs, under fair signs. None where all are 0. Differences are of counts: those of shares are
/// rounded, and equal ones need not be equal then.
pub fn wilcoxon(differences: &[i64]) -> Option<f64> {
    let mut sizes: Vec<(u64, bool)> =
        differences.iter().filter(|d| **d != 0).map(|d| (d.unsigned_abs(), *d > 0)).collect();
    sizes.sort_unstable();
    // Twice the ranks, which are whole.
    let mut ranks = Vec::with_capacity(sizes.len());
    for group in sizes.chunk_by(|a, b| a.0 == b.0) {
        let (before, count) = (ranks.len(), group.len());
        ranks.extend(std::iter::repeat_n(2 * before + count + 1, count));
    }
    let all: usize = ranks.iter().sum();
    let positive: usize = ranks.iter().zip(&sizes).filter(|(_, (_, up))| *up).map(|(rank, _)| rank).sum();
    // Probability of each sum of the positive ranks.
    let mut of_sum = vec![0.0; all + 1];
    of_sum[0] = 1.0;
    for &rank in &ranks {
        for sum in (0..=all).rev() {
            let without = if sum >= rank { of_sum[sum - rank] } else { 0.0 };
            of_sum[sum] = 0.5 * (of_sum[sum] + without);
        }
    }
    let tail = positive.min(all - positive);
    (!ranks.is_empty()).then(|| (2.0 * of_sum[..=tail].iter().sum::<f64>()).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-12, "{got} instead of {want}");
    }

    #[test]
    fn coins_by_hand() {
        close(mcnemar(0, 5), 2.0 / 32.0);
        close(mcnemar(5, 0), 2.0 / 32.0);
        close(mcnemar(1, 3), 2.0 * (1.0 + 4.0) / 16.0);
        assert_eq!((mcnemar(0, 0), mcnemar(4, 4)), (1.0, 1.0));
        // scipy.stats.binomtest(900, 2000).pvalue
        assert!((mcnemar(900, 1100) / 8.457_089_535_503_81e-6 - 1.0).abs() < 1e-8, "{}", mcnemar(900, 1100));
    }

    #[test]
    fn signs_by_hand() {
        close(wilcoxon(&[1, 2, 3, 4, 5, 6]).unwrap(), 2.0 / 64.0);
        // Negative ranks 1: sums 0 and 1 of 32.
        close(wilcoxon(&[-1, 2, 3, 4, 5]).unwrap(), 2.0 * 2.0 / 32.0);
        // Of two equal ones each has rank 1.5: sums 0 (1), 1.5 (2) of 8.
        close(wilcoxon(&[-1, 1, 2, 0]).unwrap(), 2.0 * 3.0 / 8.0);
        close(wilcoxon(&[1, -1]).unwrap(), 1.0);
        assert_eq!((wilcoxon(&[]), wilcoxon(&[0])), (None, None));
    }
}
