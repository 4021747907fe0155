//! Attributes of images, by which they fall into groups: `image,skin,age` and a line an image.

use std::collections::BTreeSet;
use std::path::Path;

use super::csv::Table;
use super::names::ImageNames;
use crate::data::source::Source;
use crate::error::{Error, Result};

/// One attribute of all images of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// Its name, that of the column.
    pub name: String,
    /// Its values in order: the groups.
    pub values: Vec<String>,
    /// `[images of the set]` index of its value.
    pub group_of: Vec<usize>,
}

/// Reads the table of `path`, whose first column names images of `source`.
///
/// # Errors
/// [`Error::Usage`] naming the file: no table or an empty one, images that the set does not have or that are named twice,
/// images of the set that it leaves out, an attribute that is not filled in.
pub fn read(path: &Path, source: &dyn Source) -> Result<Vec<Attribute>> {
    let table = Table::read(path)?;
    let images = ImageNames::new(source);
    let mut rows: Vec<Option<&[String]>> = vec![None; source.len()];
    for (line, fields) in &table.rows {
        let image = images.find(path, &fields[0])?;
        if let Some(column) = fields.iter().position(String::is_empty) {
            return Err(Error::file(
                path,
                format!("line {line}: image `{}` has no {}; fill it in", fields[0], table.header[column]),
            ));
        }
        if rows[image].replace(fields).is_some() {
            return Err(Error::file(path, format!("line {line}: image `{}` is named twice", fields[0])));
        }
    }
    let seen: Vec<bool> = rows.iter().map(Option::is_some).collect();
    images.require_all(path, "attributes", &seen)?;
    let attribute = |column: usize| {
        let of_image = |row: &Option<&[String]>| row.map_or("", |fields| fields[column].as_str()).to_owned();
        let all: Vec<String> = rows.iter().map(of_image).collect();
        let values: Vec<String> = all.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        let group = |value: &String| values.binary_search(value).unwrap_or_default();
        Attribute {
            name: table.header[column].clone(),
            group_of: all.iter().map(group).collect(),
            values: values.clone(),
        }
    };
    Ok((1..table.header.len()).map(attribute).collect())
}
