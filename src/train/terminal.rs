//! What a training says besides its progress.

use std::io::Write;
use std::path::Path;

use crate::error::Result;

/// A line on standard error; a closed one is no reason to stop a training.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Lines on standard output, which may be a closed pipe.
pub(super) fn tell(lines: &str) -> Result<()> {
    let _ = writeln!(std::io::stdout(), "{lines}");
    Ok(())
}

/// A path as a shell takes it.
pub(super) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// Bytes as a person reads them.
pub(crate) fn mib(bytes: usize) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match mib {
        0.0..9.95 => format!("{mib:.1} MiB"),
        9.95..1023.5 => format!("{mib:.0} MiB"),
        _ => format!("{:.1} GiB", mib / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_a_shell() {
        assert_eq!(quoted(Path::new("runs/digits-1")), "runs/digits-1");
        assert_eq!(quoted(Path::new("o 2/it's")), "'o 2/it'\\''s'");
    }
}
