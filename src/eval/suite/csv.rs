//! Tables with a header line.

use std::path::Path;

use crate::error::{Error, Result};

/// A table as it stands in a file.
#[derive(Debug)]
pub struct Table {
    /// Names of the columns.
    pub header: Vec<String>,
    /// Line in the file, and as many fields as the header has.
    pub rows: Vec<(u64, Vec<String>)>,
}

/// Records of a file of comma-separated (tab-separated where its name ends in `.tsv`) values, each with its line. Those
/// of a label map are of any length, and `#` begins a comment.
///
/// # Errors
/// A file that cannot be read or is no such text.
pub fn records(path: &Path, label_map: bool) -> Result<Vec<(u64, Vec<String>)>> {
    let delimiter =
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tsv")) { b'\t' } else { b',' };
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .delimiter(delimiter)
        .comment(label_map.then_some(b'#'))
        .flexible(label_map)
        .trim(csv::Trim::All)
        .from_path(path)
        .map_err(|cause| Error::file(path, format_args!("cannot be read: {cause}")))?;
    let mut records = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|cause| Error::file(path, format_args!("is no table: {cause}")))?;
        let line = record.position().map_or(0, csv::Position::line);
        records.push((line, record.iter().map(str::to_owned).collect()));
    }
    Ok(records)
}

impl Table {
    /// Reads a table of which each line is about an image.
    ///
    /// # Errors
    /// A file that cannot be read, lines of unequal length, no lines.
    pub fn read(path: &Path) -> Result<Self> {
        let mut rows = records(path, false)?.into_iter();
        let header = rows.next().map(|(_, fields)| fields).unwrap_or_default();
        let rows: Vec<_> = rows.collect();
        if header.len() < 2 || rows.is_empty() {
            return Err(Error::file(
                path,
                format!(
                    "the table has {} and {} lines; expected a header such as `image,attribute` and a line an image",
                    if header.is_empty() {
                        "no header".into()
                    } else {
                        format!("the columns {}", header.join(", "))
                    },
                    rows.len()
                ),
            ));
        }
        Ok(Self { header, rows })
    }

    /// The column that has one of these names, in any case.
    pub fn column(&self, names: &[&str]) -> Option<usize> {
        self.header.iter().position(|column| names.iter().any(|name| column.eq_ignore_ascii_case(name)))
    }
}
