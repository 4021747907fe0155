//! From values to places along an axis, and which of them are labelled.

/// Labelled places of an axis, at most.
const MOST: usize = 9;

/// How values lie along an axis.
#[derive(Clone, Debug, PartialEq)]
pub enum Scale {
    /// Evenly between two values.
    Linear(f64, f64),
    /// By the logarithm, between two values above 0.
    Log(f64, f64),
    /// Names at 0, 1, 2, ...
    Names(Vec<String>),
}

impl Scale {
    /// From `low` to `high`, which are moved apart where they are the same.
    pub fn linear(low: f64, high: f64) -> Self {
        if high > low { Self::Linear(low, high) } else { Self::Linear(low - 0.5, low + 0.5) }
    }

    /// Around all values with a margin, within `bounds`, of which one may be infinite. The margin is at least a hundredth
    /// of them, or of the largest value.
    pub fn around(values: impl IntoIterator<Item = f64>, bounds: (f64, f64)) -> Self {
        let (low, high) = extent(values).unwrap_or(bounds);
        let whole = bounds.1 - bounds.0;
        let least = 0.01 * if whole.is_finite() { whole } else { high.abs().max(low.abs()) };
        let margin = (0.08 * (high - low)).max(least);
        Self::linear((low - margin).max(bounds.0), (high + margin).min(bounds.1))
    }

    /// Around all values, which are above 0, by the logarithm.
    pub fn log_around(values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = extent(values).unwrap_or((1.0, 10.0));
        let margin = (high / low).powf(0.08).max(1.1);
        Self::Log(low / margin, high * margin)
    }

    /// Where a value lies, from 0 to 1; beyond them cut off.
    pub fn place(&self, value: f64) -> f64 {
        let place = match self {
            Self::Linear(low, high) => (value - low) / (high - low),
            Self::Log(low, high) => (value / low).ln() / (high / low).ln(),
            Self::Names(names) => (value + 0.5) / names.len().max(1) as f64,
        };
        place.clamp(0.0, 1.0)
    }

    /// Places from 0 to 1 with their labels.
    pub fn ticks(&self) -> Vec<(f64, String)> {
        let labelled = |values: Vec<f64>, step: f64| {
            values.into_iter().map(|value| (self.place(value), number(value, step))).collect()
        };
        match self {
            Self::Names(names) => {
                names.iter().enumerate().map(|(i, name)| (self.place(i as f64), name.clone())).collect()
            }
            Self::Linear(low, high) => {
                let step = step(high - low);
                labelled(multiples(*low, *high, step), step)
            }
            Self::Log(low, high) => {
                let decades = || (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
                let within = |of: &[f64]| -> Vec<f64> {
                    let all = decades().flat_map(|d| of.iter().map(move |m| m * 10f64.powi(d)));
                    all.filter(|v| (*low..=*high).contains(v)).collect()
                };
                let sets = [&[1.0, 2.0, 5.0][..], &[1.0, 3.0], &[1.0]].map(within);
                let chosen = sets.into_iter().find(|set| set.len() <= MOST).unwrap_or_default();
                if chosen.len() >= 3 {
                    return chosen.iter().map(|value| (self.place(*value), number(*value, *value))).collect();
                }
                let step = step(high - low);
                labelled(multiples(*low, *high, step), step)
            }
        }
    }
}

fn extent(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let finite = values.into_iter().filter(|value| value.is_finite());
    finite.fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((f64::min(low, value), f64::max(high, value))),
    })
}

/// 1, 2 or 5 times a power of ten, of which four to eight fit into `range`.
fn step(range: f64) -> f64 {
    let rough = range / 8.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= rough).unwrap_or(10.0 * power)
}

fn multiples(low: f64, high: f64, step: f64) -> Vec<f64> {
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// With as many decimals as the step has.
fn number(value: f64, step: f64) -> String {
    if value.abs() >= 1e6 {
        let power = |x: f64| (x.abs().log10() + 1e-9).floor();
        let digits = (power(value) - power(step)).clamp(0.0, 9.0) as usize;
        return format!("{value:.digits$e}");
    }
    let decimals = (-(step.log10() + 1e-9).floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.trim_start_matches('-').chars().all(|c| c == '0' || c == '.') { "0".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: &Scale) -> Vec<String> {
        scale.ticks().into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn linear() {
        assert_eq!(labels(&Scale::linear(0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&Scale::linear(93.1, 98.4)), ["94", "95", "96", "97", "98"]);
        assert_eq!(
            labels(&Scale::linear(0.0, 3e6)),
            ["0", "500000", "1.0e6", "1.5e6", "2.0e6", "2.5e6", "3.0e6"]
        );
        assert_eq!(labels(&Scale::linear(0.9e9, 5.1e9)), ["1e9", "2e9", "3e9", "4e9", "5e9"]);
        assert_eq!(Scale::linear(0.0, 4.0).place(1.0), 0.25);
        assert_eq!(Scale::linear(3.0, 3.0).place(3.0), 0.5);
        for range in [1e-7, 0.3, 7.0, 99.0, 12345.0, 3e8] {
            let count = Scale::linear(0.0, range).ticks().len();
            assert!((4..=MOST).contains(&count), "{range}: {count}");
        }
    }

    #[test]
    fn logarithmic() {
        assert_eq!(labels(&Scale::Log(1.0, 100.0)), ["1", "2", "5", "10", "20", "50", "100"]);
        assert_eq!(labels(&Scale::Log(0.004, 0.06)), ["0.005", "0.01", "0.02", "0.05"]);
        assert!((Scale::Log(1.0, 100.0).place(10.0) - 0.5).abs() < 1e-12);
        // Less than a decade: even steps.
        assert_eq!(labels(&Scale::Log(6.1, 9.2)), ["6.5", "7.0", "7.5", "8.0", "8.5", "9.0"]);
        for high in [1.2, 7.0, 1e3, 1e9] {
            let count = Scale::Log(1.0, high).ticks().len();
            assert!((3..=12).contains(&count), "{high}: {count}");
        }
    }

    #[test]
    fn around_the_data_and_within_bounds() {
        let Scale::Linear(low, high) = Scale::around([97.0, 99.5, 98.0, f64::NAN], (0.0, 100.0)) else {
            panic!()
        };
        assert!(low < 97.0 && low > 90.0 && high == 100.0, "{low} {high}");
        assert_eq!(Scale::around([0.0, 0.0], (0.0, 100.0)), Scale::Linear(0.0, 1.0), "all the same");
        assert_eq!(Scale::around([], (0.0, 1.0)), Scale::Linear(0.0, 1.0));
        let Scale::Linear(low, high) = Scale::around([2.0, 3.0], (0.0, f64::INFINITY)) else { panic!() };
        assert!(low > 1.8 && low < 2.0 && high > 3.0 && high < 3.2, "{low} {high}");
        let Scale::Linear(low, high) = Scale::around([1e-3], (0.0, f64::INFINITY)) else { panic!() };
        assert!(
            low > 9e-4 && low < 1e-3 && high < 1.1e-3,
            "a constant, such as a learning rate: {low} {high}"
        );
        let Scale::Log(low, high) = Scale::log_around([5.0]) else { panic!() };
        assert!(low < 5.0 && high > 5.0 && low > 4.0);
    }
}
