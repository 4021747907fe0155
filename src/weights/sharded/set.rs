//! The files of a set.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Index, SET, Sliced};
use crate::autograd::Split;
use crate::weights::safetensors::TensorFile;
use crate::{Error, Result};

/// A set of files that are read when their tensors are asked for.
#[derive(Debug)]
pub struct TensorSet {
    pub(super) path: PathBuf,
    pub(super) index: Index,
    files: BTreeMap<String, TensorFile>,
}

impl TensorSet {
    /// Opens all files that the index at `path` names, and checks that they hold everything once.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the index or file, and what is wrong: absent, damaged, of another save; elements that
    /// are in no file or in two.
    pub fn open(path: &Path) -> Result<Self> {
        let (mut index, shapes) = Index::read(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut files = BTreeMap::new();
        for name in index.files() {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(Error::file(
                    path,
                    format_args!("names {name:?}, which is no name of a file beside it"),
                ));
            }
            let at = folder.join(name);
            if !at.exists() {
                return Err(Error::file(
                    &at,
                    format_args!(
                        "is missing, and {} names it; restore it, or use another checkpoint",
                        path.display()
                    ),
                ));
            }
            let file = TensorFile::open(&at)?;
            let set = file.metadata().remove(SET).unwrap_or_default();
            if set != index.set {
                return Err(Error::file(
                    &at,
                    format_args!(
                        "is of another save ({set:?}) than {} ({:?}); restore it, or use another checkpoint",
                        path.display(),
                        index.set
                    ),
                ));
            }
            files.insert(name.to_owned(), file);
        }
        if !shapes {
            take_shapes(path, &mut index, &files)?;
        }
        let set = Self { path: path.into(), index, files };
        set.index.weight_map.iter().try_for_each(|(name, tensor)| set.check(name, tensor))?;
        // Files of other libraries may have tensors that nobody asks for.
        if shapes {
            set.index.weight_map.keys().try_for_each(|name| set.check_type(name))?;
        }
        Ok(set)
    }

    /// Checks that the slices of a tensor are where the index says, and hold every element once.
    fn check(&self, name: &str, tensor: &Sliced) -> Result<()> {
        let mut runs: Vec<(Range<usize>, &str)> = Vec::new();
        for slice in &tensor.slices {
            let file = &self.files[&slice.file];
            // Before its runs are listed, of which there may be as many as elements.
            let len = slice.range[1].saturating_sub(slice.range[0]);
            match file.shape(name).map(|shape| shape.iter().product::<usize>()) {
                Some(found) if found == len => {}
                found => {
                    let found = found.map_or("no".into(), |found| found.to_string());
                    return Err(Error::file(
                        file.path(),
                        format_args!(
                            "holds {found} elements of {name}, and {} says {len}",
                            self.path.display()
                        ),
                    ));
                }
            }
            let Some(own) = slice.runs(&tensor.shape) else {
                return Err(Error::file(
                    &self.path,
                    format_args!("says that {} has a slice of {name} that its shape has not", slice.file),
                ));
            };
            runs.extend(own.into_iter().map(|run| (run, slice.file.as_str())));
        }
        runs.sort_by_key(|(run, _)| run.start);
        let (mut at, mut before) = (0, "");
        let Some(count) = Split::Whole.part_len(&tensor.shape, 1) else {
            return Err(Error::file(
                &self.path,
                format_args!("is damaged: {name} of shape {:?} has more elements than memory", tensor.shape),
            ));
        };
        for (run, file) in runs.into_iter().chain([(count..count, "")]) {
            if run.start > at {
                let (from, to) = (at, run.start);
                return Err(Error::file(
                    &self.path,
                    format_args!("is incomplete: none of its files has elements {from} to {to} of {name}"),
                ));
            }
            if run.start < at {
                let twice = match before == file {
                    true => format!("twice in {file}"),
                    false => format!("in {before} and in {file}"),
                };
                return Err(Error::file(
                    &self.path,
                    format_args!("is damaged: element {} of {name} is {twice}", run.start),
                ));
            }
            (at, before) = (run.end, file);
        }
        Ok(())
    }

    pub(super) fn check_type(&self, name: &str) -> Result<()> {
        let slices = self.index.weight_map.get(name).map_or(&[][..], |tensor| &tensor.slices);
        slices.iter().try_for_each(|slice| self.files[&slice.file].check_type(name))
    }

    pub(super) fn read(&self, name: &str, runs: &[Range<usize>]) -> Result<Vec<f32>> {
        let Some(tensor) = self.index.weight_map.get(name) else {
            return Err(Error::file(&self.path, format_args!("tensor {name}: is missing")));
        };
        let mut values = vec![0.0; runs.iter().map(Range::len).sum()];
        for slice in &tensor.slices {
            let own = slice.runs(&tensor.shape).unwrap_or_default();
            let (stored, wanted) = common(&own, runs);
            if stored.is_empty() {
                continue;
            }
            let found = self.files[&slice.file].read(name, &stored)?;
            let mut rest = &found[..];
            for range in wanted {
                let (head, tail) = rest.split_at(range.len());
                values[range].copy_from_slice(head);
                rest = tail;
            }
        }
        Ok(values)
    }
}

/// Shapes of tensors that are whole in one file each.
fn take_shapes(path: &Path, index: &mut Index, files: &BTreeMap<String, TensorFile>) -> Result<()> {
    for (name, tensor) in &mut index.weight_map {
        for slice in &mut tensor.slices {
            let Some(shape) = files[&slice.file].shape(name) else {
                return Err(Error::file(
                    path,
                    format_args!("says that {} has {name}, and it has not; fetch both again", slice.file),
                ));
            };
            tensor.shape = shape.to_vec();
            slice.range = [0, shape.iter().product()];
        }
    }
    Ok(())
}

/// What two rising lists of runs have in common, as ranges of the elements of the first and of the second.
fn common(a: &[Range<usize>], b: &[Range<usize>]) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
    let (mut in_a, mut in_b) = (Vec::new(), Vec::new());
    let (mut i, mut j, mut before_a, mut before_b) = (0, 0, 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (first, last) = (x.start.max(y.start), x.end.min(y.end));
        if first < last {
            in_a.push(before_a + first - x.start..before_a + last - x.start);
            in_b.push(before_b + first - y.start..before_b + last - y.start);
        }
        if x.end <= y.end {
            before_a += x.len();
            i += 1;
        } else {
            before_b += y.len();
            j += 1;
        }
    }
    (in_a, in_b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Weights;

    #[test]
    fn runs_in_common() {
        let (a, b) = ([2..5, 8..12, 20..30], [0..3, 4..9, 11..25]);
        let (in_a, in_b) = common(&a, &b);
        assert_eq!(in_a, [0..1, 2..3, 3..4, 6..7, 7..12]);
        assert_eq!(in_b, [2..3, 3..4, 7..8, 8..9, 17..22]);
        let elements = |runs: &[Range<usize>], ranges: Vec<Range<usize>>| -> Vec<usize> {
            let all: Vec<usize> = runs.iter().cloned().flatten().collect();
            ranges.into_iter().flat_map(|range| all[range].to_vec()).collect()
        };
        assert_eq!(elements(&a, in_a), elements(&b, in_b));
        assert_eq!(common(&a, &[]), (vec![], vec![]));
    }
    /// A folder with one file of two tensors, and what an index in it is said to be.
    fn opened(index: &str) -> Result<Vec<f32>> {
        let dir = tempfile::tempdir().unwrap();
        let mut weights = Weights::default();
        weights.tensors.insert("w".into(), (vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        weights.tensors.insert("none".into(), (vec![0], Vec::new()));
        weights.save_atomic(&dir.path().join("a.safetensors")).unwrap();
        let path = dir.path().join("model.safetensors.index.json");
        std::fs::write(&path, index).unwrap();
        TensorSet::open(&path)?.read("w", &[1..3, 4..6])
    }

    #[test]
    fn an_index_of_file_names_is_read() {
        let index = |name: &str, file: &str| {
            format!(r#"{{"metadata": {{"total_size": 24}}, "weight_map": {{"{name}": "{file}"}}}}"#)
        };
        assert_eq!(opened(&index("w", "a.safetensors")).unwrap(), [1.0, 2.0, 4.0, 5.0]);
        for (name, file, part) in [
            ("v", "a.safetensors", "says that a.safetensors has v, and it has not"),
            ("w", "b.safetensors", "is missing"),
            ("w", "../a.safetensors", "no name of a file beside it"),
        ] {
            let sentence = opened(&index(name, file)).unwrap_err().to_string();
            assert!(sentence.contains(part), "{sentence}");
        }
    }

    /// What an index says of sizes is checked before memory is taken for it.
    #[test]
    fn lies_of_an_index_are_a_sentence() {
        let index = |name: &str, shape: &str, split: &str, part: &str, range: &str| {
            format!(
                r#"{{"set": "", "metadata": {{}}, "weight_map": {{"{name}": {{"shape": {shape}, "slices": [{{
                    "file": "a.safetensors", "split": "{split}", "part": {part}, "range": {range}}}]}}}}}}"#
            )
        };
        assert!(opened(&index("w", "[2, 3]", "rows:2", "[0, 1]", "[0, 6]")).is_ok());
        let most = usize::MAX;
        for (name, shape, split, part, range) in [
            ("w", "[2, 3]", format!("rows:{most}"), "[0, 1]", "[0, 6]"),
            ("w", "[2, 3]", format!("grouped:{most}"), "[0, 1]", "[0, 6]"),
            ("w", "[2, 3]", "rows:9223372036854775808".into(), "[0, 2]", "[0, 6]"),
            ("w", "[2, 3]", "columns".into(), "[0, 0]", "[0, 6]"),
            ("w", "[2, 3]", "whole".into(), "[0, 1]", "[6, 0]"),
            ("w", "[4294967296, 4294967296]", "whole".into(), "[0, 1]", "[0, 6]"),
            ("none", "[1152921504606846976, 1]", "columns".into(), "[0, 1]", "[0, 0]"),
            ("none", "[1152921504606846976]", "rows:1152921504606846976".into(), "[0, 1]", "[0, 0]"),
        ] {
            let error = opened(&index(name, shape, &split, part, range)).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{split}: {error}");
        }
        let none = r#"{"set": "", "metadata": {}, "weight_map": {"w": {"shape": [4294967296, 4294967296], "slices": []}}}"#;
        assert!(opened(none).unwrap_err().to_string().contains("more elements than memory"));
    }
}
