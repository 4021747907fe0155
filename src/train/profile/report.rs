//! A profile for people, and for Perfetto.

use std::fmt;

use serde_json::{Value, json};

use super::{Peaks, Profile};

/// A rate, or a dash where there is nothing to it.
fn rate(amount: f64, seconds: f64, unit: f64) -> String {
    if amount > 0.0 && seconds > 0.0 { format!("{:.1}", amount / seconds / unit) } else { "-".into() }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.2}", 1e3 * seconds)
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { recipe, device, budget, tokens, images, seconds, flops, steps, .. } = self;
        writeln!(f, "device            {device}")?;
        writeln!(
            f,
            "recipe            {recipe}: {images} images in {tokens} of {budget} tokens, random pixels"
        )?;
        // On a device steps are queued ahead of one another.
        let each = if self.launches() == 0 { "fastest" } else { "mean" };
        writeln!(
            f,
            "step              {} ms, the {each} of {steps}; {:.0} tokens/s, {} GFLOP/s as model FLOPs",
            milliseconds(*seconds),
            *tokens as f64 / seconds,
            rate(*flops, *seconds, 1e9)
        )?;
        if let (Some(Peaks { flops: most, bytes, sheet, launch }), Some(floor)) = (self.peaks, self.floor()) {
            let source = if sheet { " (data sheet)" } else { "" };
            writeln!(
                f,
                "peaks             {:.0} GFLOP/s{source}, {:.1} GB/s read and written, measured now",
                most / 1e9,
                bytes / 1e9
            )?;
            writeln!(
                f,
                "floor             {} ms for arithmetic and bytes at these peaks, part after part; {} of the step; \
                 model FLOPs alone {}",
                milliseconds(floor),
                percent(floor / seconds),
                percent(flops / most / seconds)
            )?;
            if let Some(launch) = launch {
                let least = launch * self.launches() as f64;
                writeln!(
                    f,
                    "launches          {}, of which one that does next to nothing takes {:.2} us: {} ms, {} of the step",
                    self.launches(),
                    1e6 * launch,
                    milliseconds(least),
                    percent(least / seconds)
                )?;
            }
        }
        if let Some(input) = &self.input {
            writeln!(
                f,
                "input             {} ms a batch of {:.1} images by {} alone, {} of the step{}",
                milliseconds(input.seconds),
                input.images,
                if input.workers == 1 { "1 worker".into() } else { format!("{} workers", input.workers) },
                percent(input.seconds / seconds),
                if input.pictures {
                    "; decoded images, where the step has patches that the host made"
                } else {
                    ""
                }
            )?;
        }
        writeln!(f)?;
        let header = ["operation", "result", "parts", "ms", "share", "GFLOP/s", "GB/s", "floor ms"];
        let mut lines = vec![header.map(String::from)];
        for row in &self.rows {
            lines.push([
                row.operation.clone(),
                row.shape.clone(),
                row.count.to_string(),
                milliseconds(row.seconds),
                percent(row.seconds / seconds),
                rate(row.flops, row.seconds, 1e9),
                rate(row.bytes, row.seconds, 1e9),
                self.peaks
                    .map_or_else(|| "-".into(), |peaks| milliseconds(peaks.floor(row.flops, row.bytes))),
            ]);
        }
        let between = self.between();
        let none = || String::from("-");
        lines.push([
            "between the parts".into(),
            String::new(),
            String::new(),
            milliseconds(between),
            percent(between / seconds),
            none(),
            none(),
            none(),
        ]);
        let widths: Vec<usize> =
            (0..header.len()).map(|i| lines.iter().map(|line| line[i].len()).max().unwrap_or(0)).collect();
        for line in &lines {
            let cell = |(i, text): (usize, &String)| match i {
                0 | 1 => format!("{text:<width$}", width = widths[i]),
                _ => format!("{text:>width$}", width = widths[i]),
            };
            let cells: Vec<String> = line.iter().enumerate().map(cell).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// The parts as a trace of events, which Perfetto and Chrome's tracing open.
pub fn trace(profile: &Profile) -> Value {
    let micro = |seconds: f64| (1e9 * seconds).round() / 1e3;
    let event = |name: &str, begin: f64, seconds: f64, row: usize, args: Value| {
        json!({
            "name": name, "ph": "X", "ts": micro(begin), "dur": micro(seconds), "pid": 0, "tid": row, "args": args,
        })
    };
    let step = json!({ "tokens": profile.tokens, "images": profile.images });
    let mut events = vec![
        json!({ "name": "process_name", "ph": "M", "pid": 0, "args": { "name": profile.device } }),
        event(&format!("step of {}", profile.recipe), 0.0, profile.seconds, 0, step),
    ];
    events.extend(profile.spans.iter().map(|span| {
        let floor = profile.peaks.map(|peaks| micro(peaks.floor(span.flops, span.bytes)));
        let args =
            json!({ "result": span.shape, "flops": span.flops, "bytes": span.bytes, "floor_us": floor });
        event(&span.operation, span.begin, span.seconds, 1, args)
    }));
    json!({ "traceEvents": events, "displayTimeUnit": "ms" })
}
