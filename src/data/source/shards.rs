//! Which tar files a path means: one file, a pattern such as `train-{000..127}.tar`, or a folder.

use std::fs;
use std::path::{Path, PathBuf};

use super::split::Part;
use crate::error::{Error, Result};

/// Patterns that expand to more files than this are taken for a typing mistake.
const MAX_SHARDS: usize = 1 << 20;

/// A tar file and the part of the set that its name or folder says it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shard {
    pub path: PathBuf,
    pub part: Option<Part>,
}

/// Whether `path` names tar files: a `.tar` (or refused `.tar.gz`) file, a pattern, or a folder
/// that holds some.
pub(super) fn is_tar(path: &str) -> bool {
    let folder = Path::new(path);
    if folder.is_dir() {
        return !in_folder(folder).is_empty();
    }
    path.contains("::")
        || (path.contains('{') && path.contains('}'))
        || path.ends_with(".tar")
        || is_packed(path)
}

fn is_packed(path: &str) -> bool {
    path.ends_with(".tgz")
        || [".gz", ".bz2", ".xz", ".zst"].iter().any(|end| path.ends_with(&format!(".tar{end}")))
}

/// The shards that `path` means, each of them a file that exists.
///
/// `a-{000..127}.tar` counts (with the zeros of the first number), `{train,val}` enumerates,
/// several braces multiply, and `::` separates several patterns.
pub(super) fn find(path: &str) -> Result<Vec<Shard>> {
    let folder = Path::new(path);
    let shards = if folder.is_dir() {
        in_folder(folder)
    } else {
        let mut shards = Vec::new();
        for pattern in path.split("::") {
            for file in expand(pattern)? {
                let path = PathBuf::from(file);
                shards.push(Shard { part: part_of(&path), path });
            }
        }
        shards
    };
    if shards.is_empty() {
        return Err(Error::file(folder, "the folder holds no .tar file"));
    }
    for shard in &shards {
        let name = shard.path.display().to_string();
        if is_packed(&name) {
            return Err(Error::usage(format!(
                "{name}: packed tar files allow no random access; unpack it to a plain .tar (images \
                 are compressed anyway)"
            )));
        }
        if !shard.path.is_file() {
            return Err(Error::usage(format!("{name}: there is no such tar file; check data.path")));
        }
    }
    Ok(shards)
}

fn in_folder(folder: &Path) -> Vec<Shard> {
    let mut shards = list(folder);
    for (inner, part) in [
        ("train", Part::Train),
        ("val", Part::Validation),
        ("validation", Part::Validation),
        ("test", Part::Test),
    ] {
        shards.extend(list(&folder.join(inner)).into_iter().map(|shard| Shard { part: Some(part), ..shard }));
    }
    shards
}

fn list(folder: &Path) -> Vec<Shard> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| {
        let name = file_name(path);
        !name.starts_with('.') && (name.ends_with(".tar") || is_packed(&name)) && path.is_file()
    });
    paths.sort();
    paths.into_iter().map(|path| Shard { part: Part::of_file(&file_name(&path)), path }).collect()
}

/// What the name of a shard says, or else the folder that it lies in.
fn part_of(path: &Path) -> Option<Part> {
    Part::of_file(&file_name(path)).or_else(|| Part::of_folder(&file_name(path.parent()?)))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn expand(pattern: &str) -> Result<Vec<String>> {
    let Some((before, rest)) = pattern.split_once('{') else { return Ok(vec![pattern.to_string()]) };
    let bad =
        |why: &str| Error::usage(format!("{pattern}: {why}; a pattern looks like shards-{{000..127}}.tar"));
    let (inner, after) = rest.split_once('}').ok_or_else(|| bad("the brace is not closed"))?;
    let choices: Vec<String> = match inner.split_once("..") {
        Some((first, last)) => {
            let number =
                |text: &str| text.parse::<usize>().map_err(|_| bad("the braces do not hold two numbers"));
            let (from, to) = (number(first)?, number(last)?);
            if from > to {
                return Err(bad("the first number is larger than the last"));
            }
            if to - from >= MAX_SHARDS {
                return Err(bad("the braces mean more than a million files"));
            }
            let digits = first.len();
            (from..=to).map(|n| format!("{n:0digits$}")).collect()
        }
        None => inner.split(',').map(str::to_string).collect(),
    };
    let tails = expand(after)?;
    if choices.len().saturating_mul(tails.len()) > MAX_SHARDS {
        return Err(bad("the braces mean more than a million files"));
    }
    Ok(choices
        .iter()
        .flat_map(|choice| tails.iter().map(move |tail| format!("{before}{choice}{tail}")))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_count_enumerate_and_multiply() {
        assert_eq!(expand("a-{008..011}.tar").unwrap(), ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]);
        assert_eq!(expand("{a,b}-{0..1}").unwrap(), ["a-0", "a-1", "b-0", "b-1"]);
        assert_eq!(expand("plain.tar").unwrap(), ["plain.tar"]);
        for bad in ["a-{1..", "a-{x..y}.tar", "a-{5..2}.tar", "a-{0..99999999}.tar"] {
            assert!(expand(bad).unwrap_err().to_string().contains("{000..127}"), "{bad}");
        }
    }

    #[test]
    fn names_and_folders_say_the_part() {
        let part = |path: &str| part_of(Path::new(path));
        assert_eq!(part("x/train-000.tar"), Some(Part::Train));
        assert_eq!(part("x/caltech101-val.tar"), Some(Part::Validation));
        assert_eq!(part("validation/000.tar"), Some(Part::Validation));
        assert_eq!(part("x/trainer-000.tar"), None);
    }
}
