//! From logits to probabilities, by the loss that a model was trained with.

use crate::recipe::LossKind;

/// Probabilities of the classes: the softmax, or after the sigmoid loss each class's own sigmoid. In f64.
pub fn probabilities(logits: &[f32], loss: LossKind) -> Vec<f64> {
    tempered(logits, loss, 1.0)
}

/// The same of logits divided by `temperature` > 0.
pub fn tempered(logits: &[f32], loss: LossKind, temperature: f64) -> Vec<f64> {
    let scaled = logits.iter().map(|&x| f64::from(x) / temperature);
    match loss {
        LossKind::Sigmoid | LossKind::Bce => scaled.map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        LossKind::Softmax => {
            let max = scaled.clone().fold(f64::NEG_INFINITY, f64::max);
            let mut values: Vec<f64> = scaled.map(|x| (x - max).exp()).collect();
            let sum: f64 = values.iter().sum();
            values.iter_mut().for_each(|value| *value /= sum);
            values
        }
    }
}

/// The class with the largest value and that value; of equal ones the first. `None` without classes.
pub fn largest<T: Copy + PartialOrd>(values: &[T]) -> Option<(usize, T)> {
    let mut best: Option<(usize, T)> = None;
    for (class, &value) in values.iter().enumerate() {
        if best.is_none_or(|(_, most)| value > most) {
            best = Some((class, value));
        }
    }
    best
}

/// The class with the largest logit, and its probability: what a model says of an image, and how sure it is of it.
///
/// # Panics
/// Without classes: a bug of the caller.
pub fn decision(logits: &[f32], loss: LossKind, temperature: f64) -> (usize, f64) {
    let (class, _) = largest(logits).expect("a model has classes");
    (class, tempered(logits, loss, temperature)[class])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let ln = |x: f64| x.ln() as f32;
        let logits = [ln(1.0), ln(2.0), ln(5.0)];
        for (p, expected) in probabilities(&logits, LossKind::Softmax).iter().zip([0.125, 0.25, 0.625]) {
            assert!((p - expected).abs() < 1e-7, "{p} {expected}");
        }
        for (p, expected) in probabilities(&logits, LossKind::Sigmoid).iter().zip([0.5, 2.0 / 3.0, 5.0 / 6.0])
        {
            assert!((p - expected).abs() < 1e-7, "{p} {expected}");
        }
        // Half the logits are the roots of the odds.
        let (class, p) = decision(&logits, LossKind::Sigmoid, 2.0);
        let root = 5f64.sqrt();
        assert!(class == 2 && (p - root / (1.0 + root)).abs() < 1e-7, "{p}");
        assert_eq!(probabilities(&[1e30, -1e30], LossKind::Softmax), [1.0, 0.0], "no overflow");
        assert_eq!(probabilities(&[1e30, -1e30], LossKind::Sigmoid), [1.0, 0.0]);
    }

    #[test]
    fn of_equal_values_the_first() {
        assert_eq!(largest(&[1.0, 3.0, 3.0]), Some((1, 3.0)));
        assert_eq!(largest::<f32>(&[]), None);
    }
}
