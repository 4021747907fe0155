//! Images by their names, as tables name them.

use std::collections::HashMap;
use std::path::Path;

use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::recipe::shapes::nearest;

/// The images of a set by every end of their path: `1.png`, `cat/1.png`, `val/cat/1.png`, ...
pub struct ImageNames {
    /// None where several images end so.
    by_end: HashMap<String, Option<usize>>,
    names: Vec<String>,
}

impl ImageNames {
    /// The images of `source`.
    pub fn new(source: &dyn Source) -> Self {
        // A tar file and its members are a path as well.
        let names: Vec<String> =
            (0..source.len()).map(|index| source.name(index).replace(" member ", "/")).collect();
        let mut by_end: HashMap<String, Option<usize>> = HashMap::new();
        for (index, name) in names.iter().enumerate() {
            let starts = name.match_indices('/').map(|(at, _)| at + 1).chain([0]);
            for start in starts {
                by_end.entry(name[start..].into()).and_modify(|known| *known = None).or_insert(Some(index));
            }
        }
        Self { by_end, names }
    }

    /// The image that `table` calls `name`.
    ///
    /// # Errors
    /// None or several of that name.
    pub fn find(&self, table: &Path, name: &str) -> Result<usize> {
        match self.by_end.get(name.trim_start_matches("./")) {
            Some(Some(index)) => Ok(*index),
            Some(None) => Err(Error::file(
                table,
                format!(
                    "several images are called `{name}`; name them with their folder, as in `cat/{name}`"
                ),
            )),
            None => {
                let near = nearest(name, self.names.iter().map(|n| n.rsplit('/').next().unwrap_or(n)))
                    .map_or(String::new(), |near| format!(", did you mean `{near}`?"));
                Err(Error::file(
                    table,
                    format!("the set has no image `{name}`{near}; remove the line or correct it"),
                ))
            }
        }
    }

    /// What messages call an image.
    pub fn name(&self, index: usize) -> &str {
        &self.names[index]
    }

    /// Refuses a table that leaves images out: `seen` says which it names.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the first of them.
    pub fn require_all(&self, table: &Path, what: &str, seen: &[bool]) -> Result<()> {
        let missing = seen.iter().filter(|seen| !**seen).count();
        match seen.iter().position(|seen| !seen) {
            None => Ok(()),
            Some(first) => Err(Error::file(
                table,
                format!(
                    "{missing} of {} images have no {what}, the first is {}; add a line for each",
                    seen.len(),
                    self.name(first)
                ),
            )),
        }
    }
}
