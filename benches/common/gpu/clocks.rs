//! What `nvidia-smi` says of the GPU while kernels run. Without that program the columns stay empty.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

const FIELDS: &str = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu";

/// One reading.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// Version of the driver.
    pub driver: String,
    /// Clock of the multiprocessors and of memory, MHz.
    pub sm_mhz: Option<f64>,
    pub memory_mhz: Option<f64>,
    /// Power, W.
    pub watts: Option<f64>,
    /// Temperature, °C.
    pub celsius: Option<f64>,
}

/// Readings ten times a second until it is dropped.
pub struct Clocks {
    program: Option<Child>,
    readings: Arc<Mutex<Vec<Reading>>>,
}

impl Clocks {
    /// Starts reading the GPU that is device 0 for this process.
    pub fn start() -> Self {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let gpu = match visible.split(',').next() {
            Some(first) if !first.is_empty() => first,
            _ => "0",
        };
        let readings = Arc::new(Mutex::new(Vec::new()));
        let program = Command::new("nvidia-smi")
            .args([
                &format!("--query-gpu={FIELDS}"),
                "--format=csv,noheader,nounits",
                "-lms",
                "100",
                "-i",
                gpu,
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut clocks = Self { program: program.ok(), readings };
        if let Some(output) = clocks.program.as_mut().and_then(|program| program.stdout.take()) {
            let readings = Arc::clone(&clocks.readings);
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if let (Some(reading), Ok(mut readings)) = (parse(&line), readings.lock()) {
                        readings.push(reading);
                    }
                }
            });
        }
        clocks
    }

    /// Forgets what was read before.
    pub fn restart(&self) {
        if let Ok(mut readings) = self.readings.lock() {
            let old = readings.len().saturating_sub(1);
            readings.drain(..old);
        }
    }

    /// The medians since [`restart`](Self::restart); the last reading before it where there is none since.
    pub fn medians(&self) -> Reading {
        let Ok(readings) = self.readings.lock() else { return Reading::default() };
        let Some(last) = readings.last() else { return Reading::default() };
        let since = if readings.len() > 1 { &readings[1..] } else { &readings[..] };
        let median = |of: &dyn Fn(&Reading) -> Option<f64>| {
            let mut values: Vec<f64> = since.iter().filter_map(of).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        Reading {
            driver: last.driver.clone(),
            sm_mhz: median(&|r| r.sm_mhz),
            memory_mhz: median(&|r| r.memory_mhz),
            watts: median(&|r| r.watts),
            celsius: median(&|r| r.celsius),
        }
    }
}

impl Drop for Clocks {
    fn drop(&mut self) {
        if let Some(program) = &mut self.program {
            // It may have ended by itself.
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

/// A line of the program; a field that it does not know is `[N/A]`.
pub fn parse(line: &str) -> Option<Reading> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [driver, sm, memory, watts, celsius] = fields[..] else { return None };
    let number = |text: &str| text.parse().ok();
    Some(Reading {
        driver: driver.into(),
        sm_mhz: number(sm),
        memory_mhz: number(memory),
        watts: number(watts),
        celsius: number(celsius),
    })
}
