//! Images by their names, as tables name them.

use std::collections::HashMap;
use std::path::Path;

use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::recipe::shapes::nearest;

/// What stands between a tar file and its member in the name of an image.
const MEMBER: &str = ".tar member ";

/// The name of an image as a path, a tar file being the folder of its members.
fn path_of(name: &str) -> String {
    name.replacen(MEMBER, ".tar/", 1)
}

/// The name of an image without folder and tar file.
pub fn base_name(name: &str) -> &str {
    let path = name.split_once(MEMBER).map_or(name, |(_, member)| member);
    path.rsplit('/').next().unwrap_or(path)
}

/// The images of a set by every end of their path: `1.png`, `cat/1.png`, `val/cat/1.png`, ...
pub struct ImageNames {
    /// None where several images end so.
    by_end: HashMap<String, Option<usize>>,
    names: Vec<String>,
}

impl ImageNames {
    /// The images of `source`.
    pub fn new(source: &dyn Source) -> Self {
        let names: Vec<String> = (0..source.len()).map(|index| path_of(&source.name(index))).collect();
        let mut by_end: HashMap<String, Option<usize>> = HashMap::new();
        for (index, name) in names.iter().enumerate() {
            let starts = name.match_indices('/').map(|(at, _)| at + 1).chain([0]);
            for start in starts {
                by_end.entry(name[start..].into()).and_modify(|known| *known = None).or_insert(Some(index));
            }
        }
        Self { by_end, names }
    }

    /// The image of this name, if it is one and the only one.
    pub fn known(&self, name: &str) -> Option<usize> {
        self.by_end.get(name.trim_start_matches("./")).copied().flatten()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::Image;

    struct Named(Vec<&'static str>);

    impl Source for Named {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn name(&self, index: usize) -> String {
            self.0[index].into()
        }
        fn label(&self, _: usize) -> usize {
            0
        }
        fn size(&self, _: usize) -> Result<(usize, usize)> {
            Ok((1, 1))
        }
        fn load(&self, _: usize, channels: usize) -> Result<Image> {
            Ok(Image { height: 1, width: 1, channels, pixels: vec![0; channels] })
        }
    }

    #[test]
    fn base_names() {
        for (name, base) in [
            ("a/b/c.png", "c.png"),
            ("c.png", "c.png"),
            ("x/val-000.tar member cat0-dog0.png", "cat0-dog0.png"),
            ("x/val-000.tar member a/cat 1.png", "cat 1.png"),
            ("a/team member 1.png", "team member 1.png"),
            ("built-in digits image 3", "built-in digits image 3"),
        ] {
            assert_eq!(base_name(name), base);
        }
    }

    #[test]
    fn every_end_of_a_path_is_a_name() {
        let set = Named(vec!["v.tar member a/1.png", "v.tar member 2.png", "b/1.png", "b/team member 3.png"]);
        let images = ImageNames::new(&set);
        for (name, index) in [
            ("a/1.png", 0),
            ("v.tar/a/1.png", 0),
            ("./2.png", 1),
            ("v.tar/2.png", 1),
            ("b/1.png", 2),
            ("team member 3.png", 3),
        ] {
            assert_eq!(
                (images.find(Path::new("t"), name).unwrap(), images.known(name)),
                (index, Some(index))
            );
        }
        for (name, part) in [("1.png", "several"), ("3.png", "no image `3.png`")] {
            assert!(images.find(Path::new("t"), name).unwrap_err().to_string().contains(part), "{name}");
            assert_eq!(images.known(name), None);
        }
    }
}
