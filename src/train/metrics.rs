//! `metrics.jsonl`: one JSON object a line, `{"step":12,"kind":"train",…}`, for scripts.
//!
//! A resumed run first cuts off what its predecessor wrote after the checkpoint, so that the file
//! equals that of an uninterrupted run but for the field `seconds`. Numbers are written with the
//! fewest digits that read back as the same value; NaN and infinities are `null`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::report::{AttentionReport, EvalReport, StepReport};
use crate::{Error, Result};

/// Appends metric lines to a file.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens `path`, which may not exist yet, and drops every line of a step after `step`, along
    /// with a line that was not written to its end. A new run passes 0.
    ///
    /// # Errors
    /// [`Error::Failure`] if the file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let open = || {
            let text = match std::fs::read(path) {
                Ok(text) => text,
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(cause) => return Err(cause),
            };
            let file = OpenOptions::new().append(true).create(true).open(path)?;
            // Steps rise from line to line, so what goes is the end of the file; shortening a
            // file is one operation, which a kill cannot split.
            file.set_len(length_up_to(&text, step) as u64)?;
            Ok(file)
        };
        let file = open().map_err(|cause| Error::io(path, cause))?;
        Ok(Self { path: path.into(), file })
    }

    /// Writes the line of a step, kind `train`.
    ///
    /// # Errors
    /// [`Error::Failure`] if it cannot be written.
    pub fn train(&mut self, report: &StepReport) -> Result<()> {
        self.write("train", report.step, report)
    }

    /// Writes the line of an evaluation, kind `eval`.
    ///
    /// # Errors
    /// [`Error::Failure`] if it cannot be written.
    pub fn eval(&mut self, report: &EvalReport) -> Result<()> {
        self.write("eval", report.step, report)
    }

    /// Writes the attention of an evaluation, kind `attention`.
    ///
    /// # Errors
    /// [`Error::Failure`] if it cannot be written.
    pub fn attention(&mut self, report: &AttentionReport) -> Result<()> {
        self.write("attention", report.step, report)
    }

    /// Writes a line of any kind; `fields` is a struct or map. `step` may not fall from line to line.
    ///
    /// # Errors
    /// [`Error::Failure`] if it cannot be written.
    pub fn write(&mut self, kind: &str, step: u64, fields: &impl Serialize) -> Result<()> {
        #[derive(Serialize)]
        struct Line<'a, T> {
            step: u64,
            kind: &'a str,
            #[serde(flatten)]
            fields: &'a T,
        }
        let line = serde_json::to_string(&Line { step, kind, fields }).map_err(Error::failure)?;
        // One call, so that whoever follows the file sees whole lines.
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(|cause| Error::io(&self.path, cause))
    }

    /// Makes all lines survive a power failure; called before a checkpoint is written.
    ///
    /// # Errors
    /// [`Error::Failure`] if the file system refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|cause| Error::io(&self.path, cause))
    }
}

/// Bytes of the leading whole lines whose step is at most `step`.
fn length_up_to(text: &[u8], step: u64) -> usize {
    #[derive(Deserialize)]
    struct Line {
        step: u64,
    }
    text.split_inclusive(|&byte| byte == b'\n')
        .take_while(|line| {
            line.ends_with(b"\n") && serde_json::from_slice::<Line>(line).is_ok_and(|line| line.step <= step)
        })
        .map(<[u8]>::len)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(path: &Path, start: u64, end: u64) {
        let mut log = MetricsLog::open(path, start).unwrap();
        for step in start + 1..=end {
            let report = StepReport { step, loss: 1.0 / step as f64, images: 3, ..StepReport::default() };
            log.train(&report).unwrap();
            if step % 3 == 0 {
                log.eval(&EvalReport { step, top1: 0.1 + 0.2, ..EvalReport::default() }).unwrap();
            }
        }
        log.sync().unwrap();
    }

    #[test]
    fn a_resumed_file_equals_an_uninterrupted_one() {
        let dir = tempfile::tempdir().unwrap();
        let [whole, resumed] = ["whole", "resumed"].map(|name| dir.path().join(name));
        run(&whole, 0, 10);
        // Checkpoint at 6; killed at 8 in the middle of a line.
        run(&resumed, 0, 8);
        let mut text = std::fs::read(&resumed).unwrap();
        text.extend(br#"{"step":9,"kind":"tr"#);
        std::fs::write(&resumed, text).unwrap();
        run(&resumed, 6, 10);
        let text = std::fs::read_to_string(&whole).unwrap();
        assert_eq!(text, std::fs::read_to_string(&resumed).unwrap());
        assert_eq!(text.lines().count(), 13);
    }

    #[test]
    fn a_line_is_what_scripts_expect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        log.eval(&EvalReport { step: 7, loss: f64::NAN, top1: 0.1 + 0.2, ..EvalReport::default() }).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":7,\"kind\":\"eval\",\"loss\":null,\"top1\":0.30000000000000004,\"top5\":0.0,\
             \"images\":0,\"best\":false,\"seconds\":0.0}\n"
        );
    }

    #[test]
    fn a_new_run_starts_empty_and_a_bad_place_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        run(&path, 0, 2);
        drop(MetricsLog::open(&path, 0).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        let error = MetricsLog::open(&path.join("below"), 0).unwrap_err();
        assert!(error.to_string().contains("m/below"), "{error}");
    }
}
