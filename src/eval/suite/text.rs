//! Plain-text tables.

use std::fmt::Write as _;

/// Columns under their names, the first to the left, the others to the right; ends with a line break.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = String::new();
    let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let _ =
                if column == 0 { write!(line, "{cell:width$}") } else { write!(line, "  {cell:>width$}") };
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.2}", 100.0 * share)
}

/// A line that counts images that could not be read, or nothing without them.
pub fn unreadable(images: u64) -> String {
    if images > 0 { format!("unreadable        {images}\n") } else { String::new() }
}

/// A line that counts images that were made smaller than they were to be, or nothing without them.
pub fn downscaled(images: u64) -> String {
    match images {
        0 => String::new(),
        images => format!(
            "downscaled        {images}: at this resolution they have no place in packing.tokens or the position tables\n"
        ),
    }
}

/// A number that somebody has given, without rows of zeros.
pub fn number(x: f64) -> String {
    match x.abs() {
        1e-6..1e6 | 0.0 => x.to_string(),
        _ => format!("{x:e}"),
    }
}

/// GFLOP to four digits.
pub fn gflop(flops: f64) -> String {
    let giga = flops / 1e9;
    let decimals = (3.0 - giga.log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{giga:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_digits() {
        assert_eq!(
            [1.234_56e5, 1.7581e10, 3.1e12, 0.0].map(gflop),
            ["0.0001235", "17.58", "3100", "0.000000000"]
        );
    }

    #[test]
    fn numbers_without_rows_of_zeros() {
        let numbers = [0.0, 0.3, 1024.0, 999_999.0, 1e6, 1e-6, 2.5e-7, 1e38].map(number);
        assert_eq!(numbers, ["0", "0.3", "1024", "999999", "1e6", "0.000001", "2.5e-7", "1e38"]);
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["é".into(), "1.5".into()], vec!["long".into(), "22".into()]];
        assert_eq!(table(&["", "value %"], &rows), "      value %\né         1.5\nlong       22\n");
    }
}
