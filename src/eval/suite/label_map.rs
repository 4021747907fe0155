//! Files that say which classes of a model are right: for a class of the set, or for an image.
//!
//! | file | holds |
//! |---|---|
//! | `.json`, an object | `{"tench": ["n01440764"], "spider": ["n01773157", "n01773549"]}`; a lone value needs no list |
//! | `.json`, a list | lists in the order of the images' names, as ReaL's `real.json` |
//! | `.csv`, `.tsv` | a line a class or image: its name, then classes of the model; no header, `#` begins a comment |
//!
//! Classes of the model are named, or numbered from 0 where no class has such a name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::csv;
use crate::error::{Error, Result};
use crate::recipe::shapes::nearest;

/// Unknown names that an error lists.
const LISTED: usize = 5;

/// What such a file holds.
#[derive(Debug)]
pub struct LabelMap {
    /// The file.
    pub path: PathBuf,
    /// Names with their classes, or the lists of images that are told apart by their order.
    entries: Entries,
}

#[derive(Debug)]
enum Entries {
    Named(BTreeMap<String, Vec<String>>),
    Ordered(Vec<Vec<String>>),
}

/// The same with classes of a model by their index, rising.
pub enum Resolved {
    /// By name of class or image.
    Named(BTreeMap<String, Vec<usize>>),
    /// In the order of the images' names.
    Ordered(Vec<Vec<usize>>),
}

impl LabelMap {
    /// Reads `path`.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file: unreadable, of another form, empty.
    pub fn read(path: &Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let entries = match extension.as_str() {
            "json" => Self::json(path)?,
            "csv" | "tsv" => {
                let mut named: BTreeMap<String, Vec<String>> = BTreeMap::new();
                for (_, mut fields) in csv::records(path, true)? {
                    let classes = fields.split_off(1);
                    let name = fields.swap_remove(0);
                    named.entry(name).or_default().extend(classes.into_iter().filter(|c| !c.is_empty()));
                }
                Entries::Named(named)
            }
            _ => return Err(Error::file(path, "a label map is a .json, .csv or .tsv file")),
        };
        let empty = match &entries {
            Entries::Named(named) => named.is_empty(),
            Entries::Ordered(lists) => lists.is_empty(),
        };
        if empty {
            return Err(Error::file(
                path,
                "the label map is empty; expected a line `class,class of the model`",
            ));
        }
        Ok(Self { path: path.into(), entries })
    }

    fn json(path: &Path) -> Result<Entries> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| Error::file(path, format_args!("cannot be read: {cause}")))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|cause| Error::file(path, format_args!("is no JSON: {cause}")))?;
        let one = |value: &Value| match value {
            Value::String(name) => Some(name.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let list = |of: &str, value: &Value| -> Result<Vec<String>> {
            let classes = match value {
                Value::Array(values) => values.iter().map(one).collect(),
                value => one(value).map(|name| vec![name]),
            };
            classes.ok_or_else(|| {
                Error::file(
                    path,
                    format!("`{of}` has `{value}`; expected a class of the model or a list of them"),
                )
            })
        };
        Ok(match &value {
            Value::Object(map) => Entries::Named(
                map.iter()
                    .map(|(name, value)| Ok((name.clone(), list(name, value)?)))
                    .collect::<Result<_>>()?,
            ),
            Value::Array(lists) => Entries::Ordered(
                lists
                    .iter()
                    .enumerate()
                    .map(|(i, value)| list(&i.to_string(), value))
                    .collect::<Result<_>>()?,
            ),
            _ => return Err(Error::file(path, "expected an object of lists, or a list of lists")),
        })
    }

    /// With indices into `classes`, those of a model.
    ///
    /// # Errors
    /// [`Error::Usage`] naming classes that the model does not have, with the nearest that it has.
    pub fn resolve(&self, classes: &[String]) -> Result<Resolved> {
        let numbers: BTreeMap<&str, usize> =
            classes.iter().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
        let mut unknown = Vec::new();
        let mut find = |name: &String| {
            let number = || name.parse().ok().filter(|number| *number < classes.len());
            let found = numbers.get(name.as_str()).copied().or_else(number);
            if found.is_none() && !unknown.contains(name) {
                unknown.push(name.clone());
            }
            found
        };
        let mut all = |names: &Vec<String>| {
            let mut found: Vec<usize> = names.iter().filter_map(&mut find).collect();
            found.sort_unstable();
            found.dedup();
            found
        };
        let resolved = match &self.entries {
            Entries::Named(named) => {
                Resolved::Named(named.iter().map(|(name, classes)| (name.clone(), all(classes))).collect())
            }
            Entries::Ordered(lists) => Resolved::Ordered(lists.iter().map(all).collect()),
        };
        check(&self.path, &unknown, "the model", classes.iter().map(String::as_str))?;
        Ok(resolved)
    }
}

/// Refuses names that `owner` does not have.
///
/// # Errors
/// [`Error::Usage`] with the first of them and what was probably meant.
pub fn check<'a>(
    path: &Path,
    unknown: &[String],
    owner: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> Result<()> {
    if unknown.is_empty() {
        return Ok(());
    }
    let with_nearest = |name: &String| match nearest(name, known.clone()) {
        Some(near) => format!("`{name}` (did you mean `{near}`?)"),
        None => format!("`{name}`"),
    };
    let listed: Vec<String> = unknown.iter().take(LISTED).map(with_nearest).collect();
    let more = if unknown.len() > LISTED { ", ..." } else { "" };
    Err(Error::file(
        path,
        format!(
            "names {} that {owner} does not have: {}{more}; correct or remove {}",
            if unknown.len() == 1 { "a class".into() } else { format!("{} classes", unknown.len()) },
            listed.join(", "),
            if unknown.len() == 1 { "it" } else { "them" }
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: &str, text: &str) -> Result<LabelMap> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        LabelMap::read(&path)
    }

    fn named(name: &str, text: &str) -> Vec<(String, Vec<usize>)> {
        let classes = ["cat", "dog", "7", "snow leopard"].map(str::to_owned);
        match map(name, text).unwrap().resolve(&classes).unwrap() {
            Resolved::Named(named) => named.into_iter().collect(),
            Resolved::Ordered(lists) => lists.into_iter().map(|list| ("".to_owned(), list)).collect(),
        }
    }

    #[test]
    fn every_form_says_the_same() {
        let expected = [("feline".to_owned(), vec![0, 3]), ("hound".to_owned(), vec![1])];
        assert_eq!(named("a.json", r#"{"feline": ["snow leopard", "cat"], "hound": "dog"}"#), expected);
        assert_eq!(named("a.csv", "# who\nfeline,cat,snow leopard\nhound, dog\n"), expected);
        assert_eq!(named("a.tsv", "feline\tcat\nhound\tdog\nfeline\tsnow leopard\tcat\n"), expected);
        assert_eq!(named("a.json", r#"{"feline": [3, 0], "hound": 1}"#), expected, "by number");
        // A class that is called 7 goes before the number 7, which there is not.
        assert_eq!(named("a.csv", "x,7"), [("x".to_owned(), vec![2])]);
        assert_eq!(
            named("real.json", "[[1, 0], [], [3]]").iter().map(|e| e.1.clone()).collect::<Vec<_>>(),
            [vec![0, 1], vec![], vec![3]]
        );
    }

    #[test]
    fn mistakes_are_named() {
        let classes = ["tabby cat", "dog"].map(str::to_owned);
        let unknown = |text| map("m.csv", text).unwrap().resolve(&classes).err().unwrap().to_string();
        let error = unknown("a,tabby kat\nb,dog");
        assert!(
            error.contains("a class that the model does not have: `tabby kat` (did you mean `tabby cat`?)"),
            "{error}"
        );
        let error = unknown("a,zebra,5\nb,tabby cat,zebra");
        assert!(error.contains("2 classes") && error.contains("`zebra`, `5`;"), "{error}");
        let refused = |name, text| map(name, text).unwrap_err().to_string();
        assert!(refused("m.txt", "a,b").contains(".json, .csv or .tsv"));
        assert!(refused("m.csv", "# nothing\n").contains("is empty"));
        assert!(refused("m.json", "{}").contains("is empty"));
        assert!(refused("m.json", "{").contains("is no JSON"));
        assert!(refused("m.json", r#"{"a": {"b": 1}}"#).contains("`a` has `{\"b\":1}`"));
        assert!(refused("m.json", "3").contains("expected an object"));
    }
}
