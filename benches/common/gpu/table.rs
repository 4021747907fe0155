//! The table beside criterion's report: one line a kernel and shape.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::clocks::Reading;
use trencadis::kernels::measure::Rates;

use super::Case;

/// Columns of the table.
pub const HEADER: &str = "kernel,shape,microseconds,tflop_per_s,share_of_mma,gb_per_s,share_of_copy,sets,samples,\
                          mma_tflop_per_s,copy_gb_per_s,device,driver,sm_mhz,memory_mhz,watts,celsius";

/// What was measured of one case.
#[derive(Clone, Debug)]
pub struct Row {
    /// Median of the samples, seconds a run.
    pub seconds: f64,
    /// Samples.
    pub samples: usize,
    /// Clocks while they were taken.
    pub clocks: Reading,
}

/// A line of the table. Rates that a kernel has no count for are empty.
pub fn line(case: &Case<'_>, row: &Row, peaks: &Rates, device: &str) -> String {
    let rate = |count: f64, peak: f64, unit: f64| match count > 0.0 {
        true => [format!("{:.2}", count / row.seconds / unit), format!("{:.3}", count / row.seconds / peak)],
        false => [String::new(), String::new()],
    };
    let [operations, of_mma] = rate(case.operations, peaks.operations, 1e12);
    let [bytes, of_copy] = rate(case.bytes, peaks.bytes, 1e9);
    let cells = [
        case.kernel.clone(),
        case.shape.clone(),
        format!("{:.3}", row.seconds * 1e6),
        operations,
        of_mma,
        bytes,
        of_copy,
        case.sets.to_string(),
        row.samples.to_string(),
        format!("{:.1}", peaks.operations / 1e12),
        format!("{:.0}", peaks.bytes / 1e9),
        device.into(),
    ];
    csv(cells.into_iter().chain(clocks(&row.clocks)))
}

/// The cells of a reading.
pub fn clocks(reading: &Reading) -> [String; 5] {
    let number = |x: Option<f64>| x.map_or_else(String::new, |x| x.to_string());
    let Reading { driver, sm_mhz, memory_mhz, watts, celsius } = reading;
    [driver.clone(), number(*sm_mhz), number(*memory_mhz), number(*watts), number(*celsius)]
}

/// Cells as a line.
pub fn csv(cells: impl IntoIterator<Item = String>) -> String {
    let quoted = cells.into_iter().map(|cell| match cell.contains([',', '"']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell,
    });
    quoted.collect::<Vec<_>>().join(",")
}

/// A table being written, line by line, so that an interrupted run leaves what it has measured.
#[derive(Debug)]
pub struct Table {
    path: PathBuf,
}

impl Table {
    /// `<name>.csv` with these columns in `folder`, begun anew.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn begin(folder: &Path, name: &str, header: &str) -> std::io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join(format!("{name}.csv"));
        fs::write(&path, format!("{header}\n"))?;
        Ok(Self { path })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&self, line: &str) -> std::io::Result<()> {
        writeln!(fs::OpenOptions::new().append(true).open(&self.path)?, "{line}")
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Criterion's folder.
pub fn folder() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    variable("CRITERION_HOME")
        .or_else(|| variable("CARGO_TARGET_DIR").map(|target| target.join("criterion")))
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/criterion"))
}
