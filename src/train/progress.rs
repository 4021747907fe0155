//! Progress of a training on standard error: a bar where it is a terminal, plain lines elsewhere.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::report::{EvalReport, StepReport};

/// Share of a new step in the running averages behind rates and loss: about the last 20 steps.
const NEWEST: f64 = 0.05;

/// Shows where a training stands.
#[derive(Debug)]
pub struct Progress {
    total: u64,
    log_every: u64,
    averages: Averages,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A display for steps `start` to `total`; where there is no terminal, a line every
    /// `log_every` steps (0 counts as 1) and at the end.
    pub fn new(total: u64, start: u64, log_every: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            // The template is a constant that the tests parse; a bar without style still works.
            if let Ok(style) = style() {
                bar.set_style(style);
            }
            bar.set_position(start);
            bar
        });
        Self { total, log_every: log_every.max(1), averages: Averages::default(), bar }
    }

    /// Shows a completed step.
    pub fn step(&mut self, report: &StepReport) {
        self.averages.add(report);
        let left = self.total.saturating_sub(report.step) as f64 * self.averages.seconds;
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(format!("ETA {}", duration(left)));
                // One column stays free: some terminals wrap a full line.
                let width = usize::from(Term::stderr().size().1).saturating_sub(1);
                bar.set_message(fit(&self.averages.parts(report), width));
                bar.set_position(report.step);
            }
            None if report.step % self.log_every == 0 || report.step == self.total => {
                let parts = self.averages.parts(report).join("  ");
                self.message(&format!(
                    "step {}/{}  {parts}  ETA {}",
                    report.step,
                    self.total,
                    duration(left)
                ));
            }
            None => {}
        }
    }

    /// Shows an evaluation.
    pub fn eval(&mut self, report: &EvalReport) {
        self.message(&eval_line(report));
    }

    /// Shows a line of text, above the bar where there is one.
    pub fn message(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            // A closed standard error is no reason to stop a training.
            None => drop(writeln!(std::io::stderr(), "{text}")),
        }
    }

    /// Leaves the bar as it stands.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

fn style() -> Result<ProgressStyle, indicatif::style::TemplateError> {
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {elapsed}  {prefix}\n{msg}")?;
    Ok(style.progress_chars("━╸─"))
}

fn eval_line(report: &EvalReport) -> String {
    let mut line = format!(
        "eval at step {}: accuracy {:.2}%  top-5 {:.2}%  loss {:.4}  {} images  {}",
        report.step,
        100.0 * report.top1,
        100.0 * report.top5,
        report.loss,
        report.images,
        duration(report.seconds),
    );
    if report.best {
        line += "  (best)";
    }
    line
}

/// As many leading parts as fit into `width` columns, so that a narrow terminal shows less
/// instead of wrapping.
fn fit(parts: &[String], width: usize) -> String {
    let mut line = String::new();
    for part in parts {
        let gap = if line.is_empty() { 0 } else { 2 };
        if line.chars().count() + gap + part.chars().count() > width {
            break;
        }
        let _ = write!(line, "{:gap$}{part}", "");
    }
    line
}

/// Exponentially weighted means a step. Rates are quotients of means, so that long steps weigh
/// as much as they last.
#[derive(Clone, Copy, Debug, Default)]
struct Averages {
    steps: u64,
    loss: f64,
    accuracy: f64,
    images: f64,
    tokens: f64,
    padding: f64,
    flop: f64,
    seconds: f64,
}

impl Averages {
    fn add(&mut self, report: &StepReport) {
        self.steps += 1;
        // The first steps average evenly; otherwise the very first would weigh for long.
        let share = NEWEST.max(1.0 / self.steps as f64);
        for (mean, value) in [
            (&mut self.loss, report.loss),
            (&mut self.accuracy, report.accuracy),
            (&mut self.images, report.images as f64),
            (&mut self.tokens, report.tokens as f64),
            (&mut self.padding, report.padding()),
            (&mut self.flop, report.flop),
            (&mut self.seconds, report.seconds),
        ] {
            // A value that is not finite shows once, and does not stay in the mean.
            *mean = if mean.is_finite() { *mean + share * (value - *mean) } else { value };
        }
    }

    /// Texts in order of importance.
    fn parts(&self, report: &StepReport) -> Vec<String> {
        let rate = |amount: f64| if self.seconds > 0.0 { amount / self.seconds } else { 0.0 };
        vec![
            format!("loss {:.4}", self.loss),
            format!("acc {:.1}%", 100.0 * self.accuracy),
            format!("{} img/s", number(rate(self.images))),
            format!("{} tok/s", number(rate(self.tokens))),
            format!("{}FLOP/s", scaled(rate(self.flop))),
            format!("pad {:.1}%", 100.0 * self.padding),
            format!("lr {:.2e}", report.learning_rate),
            format!("|g| {:.2}", report.grad_norm),
        ]
    }
}

/// `812`, `12.3k`, `4.56M`.
fn number(value: f64) -> String {
    if (100.0..1000.0).contains(&value.round()) {
        format!("{value:.0}")
    } else {
        scaled(value).replace(' ', "")
    }
}

/// Three digits with an SI prefix: `1.23 `, `45.6 G`.
fn scaled(value: f64) -> String {
    let mut value = value;
    for prefix in ["", "k", "M", "G", "T", "P"] {
        // Rounded to three digits it must stay below 1000.
        if value < 999.5 || prefix == "P" {
            let digits = if value < 9.995 {
                2
            } else if value < 99.95 {
                1
            } else {
                0
            };
            return format!("{value:.digits$} {prefix}");
        }
        value /= 1000.0;
    }
    String::new()
}

/// `42s`, `3:05`, `2:03:05`, `5d 02h`.
fn duration(seconds: f64) -> String {
    let s = seconds.round().max(0.0) as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}:{:02}", s / 60, s % 60),
        3600..86_400 => format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60),
        _ => format!("{}d {:02}h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_is_valid() {
        assert!(style().is_ok());
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [0.0, 8.121, 81.21, 812.1, 999.6, 12_345.0].map(number),
            ["0.00", "8.12", "81.2", "812", "1.00k", "12.3k"]
        );
        assert_eq!([45.6e9, 999.9e9, 1.234e12, 5e18].map(scaled), ["45.6 G", "1.00 T", "1.23 T", "5000 P"]);
        assert_eq!(
            [0.4, 59.6, 3599.0, 3600.0, 442_800.0].map(duration),
            ["0s", "1:00", "59:59", "1:00:00", "5d 03h"]
        );
    }

    fn report(seconds: f64) -> StepReport {
        StepReport {
            step: 10,
            loss: 12.345_67,
            accuracy: 1.0,
            learning_rate: 1e-3,
            images: 512,
            tokens: 98_304,
            token_rows: 131_072,
            flop: 5e12,
            grad_norm: 10.0,
            seconds,
        }
    }

    #[test]
    fn eighty_columns_show_all_but_the_last() {
        let mut averages = Averages::default();
        averages.add(&report(0.25));
        let parts = averages.parts(&report(0.25));
        let line = fit(&parts, 79);
        assert_eq!(line, "loss 12.3457  acc 100.0%  2.05k img/s  393k tok/s  20.0 TFLOP/s  pad 25.0%");
        assert_eq!(fit(&parts, 25), "loss 12.3457  acc 100.0%");
        assert_eq!(fit(&parts, 3), "");
    }

    #[test]
    fn rates_weigh_steps_by_their_time() {
        let mut averages = Averages::default();
        // Half the steps take 1 s, half 3 s: 512 images every 2 s.
        for step in 0..400 {
            averages.add(&report(if step % 2 == 0 { 1.0 } else { 3.0 }));
        }
        let rate = averages.images / averages.seconds;
        assert!((rate - 256.0).abs() < 10.0, "{rate}");
        averages.add(&StepReport { loss: f64::NAN, ..report(1.0) });
        assert!(averages.loss.is_nan());
        averages.add(&report(1.0));
        assert!(averages.loss.is_finite());
    }

    #[test]
    fn evaluation_line() {
        let report = EvalReport {
            step: 300,
            loss: 0.1234,
            top1: 0.975,
            top5: 1.0,
            images: 360,
            best: true,
            seconds: 2.0,
        };
        assert_eq!(
            eval_line(&report),
            "eval at step 300: accuracy 97.50%  top-5 100.00%  loss 0.1234  360 images  2s  (best)"
        );
    }
}
