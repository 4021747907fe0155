//! How checkpoints are written: tensor by tensor, as ranks hand them over.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Header;
use crate::autograd::{ParamSpec, Split};
use crate::error::{Error, Result};
use crate::files::AtomicFile;
use crate::parallel::zero::Slice;
use crate::recipe::SaveKind;
use crate::train::engine::{StateKind, StateParts, distinct, gather, read_distinct};
use crate::train::run_dir::RunDir;
use crate::weights::safetensors::TensorWriter;
use crate::weights::sharded::{self, Index, SET, Sliced, StoredSlice, index_of};

/// What a checkpoint holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The model: the moving average where there is one.
    Model,
    /// The model with everything that resuming needs.
    Training,
}

/// A state of a training, to be saved. All ranks save it together.
#[derive(Clone, Copy)]
pub struct Snapshot<'a> {
    /// Description.
    pub header: &'a Header,
    /// Weights, moving average, moments.
    pub state: &'a dyn StateParts,
    /// One file, or one a rank.
    pub kind: SaveKind,
}

impl Snapshot<'_> {
    /// Saves into a run, in the order that a kill cannot harm: `best` if the model has
    /// `improved`, `step-N` if it is to be kept, then `last`. Returns as [`write`](Self::write) does.
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    pub fn save(&self, run: &RunDir, improved: bool, keep: bool) -> Result<Result<bool>> {
        let step = run.step(self.header.progress.step);
        let models = [improved.then(|| run.best()), keep.then_some(step)];
        let models = models.into_iter().flatten().map(|path| (path, Content::Model));
        let files: Vec<_> = models.chain([(run.last(), Content::Training)]).collect();
        self.write(&files)
    }

    /// Writes these checkpoints, all of one folder, and puts them in their places in this order once all are whole.
    /// Returns whether the weights are finite, and writes nothing where they are not.
    ///
    /// All ranks return an error in writing, [`Error::Failure`], and are whole after it; the checkpoints are then
    /// the former ones.
    ///
    /// # Errors
    /// A rank that is gone or silent; a failed device.
    pub fn write(&self, files: &[(PathBuf, Content)]) -> Result<Result<bool>> {
        match self.kind {
            SaveKind::Merged => self.write_merged(files),
            SaveKind::Sharded => self.write_sharded(files),
        }
    }

    fn write_merged(&self, files: &[(PathBuf, Content)]) -> Result<Result<bool>> {
        let ranks = self.state.ranks();
        let statistics = self.state.statistics()?;
        let lens: Vec<[usize; 1]> = statistics.iter().map(|values| [values.len()]).collect();
        let create = |(path, content): &(PathBuf, Content)| -> Result<TensorWriter> {
            let names = self.names(*content);
            let shapes = self.kinds(*content).flat_map(|_| self.state.params()).map(|p| p.shape.as_slice());
            let tensors = names.iter().map(String::as_str).zip(shapes);
            let summed = self.statistic_names(*content, statistics.len());
            let summed = summed.iter().map(String::as_str).zip(lens.iter().map(<[usize; 1]>::as_slice));
            TensorWriter::create(path, tensors.chain(summed), &self.metadata(*content)?)
        };
        let created = match ranks.is_first() {
            true => files.iter().map(create).collect::<Result<Vec<_>>>(),
            false => Ok(Vec::new()),
        };
        let mut writers = match ranks.agree(created)? {
            Ok(writers) => writers,
            Err(error) => return Ok(Err(error)),
        };
        let mut finite = true;
        for (kind, prefix) in self.kinds(all_of(files)) {
            let gathered = gather(self.state, kind, &mut |_, values| {
                finite &= kind != StateKind::Weights || is_finite(values);
                let mut holding = writers.iter_mut().zip(files).filter(|(_, file)| holds(file.1, prefix));
                holding.try_for_each(|(writer, _)| writer.write(values))
            })?;
            if let Err(error) = gathered {
                return Ok(Err(error));
            }
        }
        let written = write_statistics(&mut writers, files, &statistics);
        if let Err(error) = ranks.agree(written)? {
            return Ok(Err(error));
        }
        if ranks.any(!finite)? {
            return Ok(Ok(false));
        }
        let committed = writers.into_iter().zip(files).try_for_each(|(writer, (path, _))| {
            writer.finish()?.commit()?;
            replaces(&index_of(path))
        });
        let cleared = || if ranks.is_first() { sharded::remove_strays(folder(files)) } else { Ok(()) };
        Ok(ranks.agree(committed.and_then(|()| cleared()))?.map(|()| true))
    }

    fn write_sharded(&self, files: &[(PathBuf, Content)]) -> Result<Result<bool>> {
        let ranks = self.state.ranks();
        let step = self.header.progress.step;
        let names = || files.iter().map(|(path, _)| free_name(path, step)).collect::<Vec<_>>().join("\n");
        let sets = ranks.first_text(ranks.is_first().then(names).as_deref())?.unwrap_or_default();
        let sets: Vec<&str> = sets.lines().collect();
        let written = match ranks.agree(self.write_own(files, &sets))? {
            Ok(written) => written,
            Err(error) => return Ok(Err(error)),
        };
        let Some(written) = written else { return ranks.any(true).map(|_| Ok(false)) };
        if ranks.any(false)? {
            return Ok(Ok(false));
        }
        let committed = written.into_iter().try_for_each(AtomicFile::commit);
        if let Err(error) = ranks.agree(committed)? {
            return Ok(Err(error));
        }
        // From here on a set is whole, and its index says so.
        let place = || -> Result<()> {
            for ((path, content), set) in files.iter().zip(&sets) {
                let index = self.index(set, *content)?;
                if let Some(name) = index.files().into_iter().find(|name| !path.with_file_name(name).exists())
                {
                    return Err(Error::write(
                        path,
                        format_args!(
                            "{name}, which another rank has written, is not there; let all ranks write to one \
                             folder, or set train.save_as=\"merged\""
                        ),
                    ));
                }
                index.save_atomic(&index_of(path))?;
                replaces(path)?;
            }
            sharded::remove_strays(folder(files))
        };
        let placed = if ranks.is_first() { place() } else { Ok(()) };
        Ok(ranks.agree(placed)?.map(|()| true))
    }

    /// Writes this rank's files; none where its weights are not finite.
    fn write_own(&self, files: &[(PathBuf, Content)], sets: &[&str]) -> Result<Option<Vec<AtomicFile>>> {
        let (state, world) = (self.state, &self.state.ranks().world);
        let units = state.units().len();
        let own: Vec<Slice> = (0..units).flat_map(|unit| distinct(state, unit, world.rank())).collect();
        if own.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let shapes: Vec<Vec<usize>> = own.iter().map(|slice| self.shape(slice)).collect();
        // What all ranks have is written by the first.
        let statistics = if world.rank() == 0 { state.statistics()? } else { Vec::new() };
        let lens: Vec<[usize; 1]> = statistics.iter().map(|values| [values.len()]).collect();
        let mut writers = Vec::new();
        for ((path, content), set) in files.iter().zip(sets) {
            let prefixes = self.kinds(*content);
            let named: Vec<(String, &[usize])> = prefixes
                .flat_map(|(_, prefix)| {
                    own.iter().zip(&shapes).map(move |(slice, shape)| (prefix, slice, shape))
                })
                .map(|(prefix, slice, shape)| {
                    (format!("{prefix}{}", state.params()[slice.param].name), shape.as_slice())
                })
                .collect();
            let path = path.with_file_name(sharded::file_name(set, world.rank(), world.size()));
            let metadata = BTreeMap::from([("format".into(), "pt".into()), (SET.into(), (*set).to_owned())]);
            let tensors = named.iter().map(|(name, shape)| (name.as_str(), *shape));
            let summed = self.statistic_names(*content, statistics.len());
            let summed = summed.iter().map(String::as_str).zip(lens.iter().map(<[usize; 1]>::as_slice));
            writers.push(TensorWriter::create(&path, tensors.chain(summed), &metadata)?);
        }
        let mut finite = true;
        for (kind, prefix) in self.kinds(all_of(files)) {
            for unit in 0..units {
                read_distinct(state, kind, unit, &mut |_, values| {
                    finite &= kind != StateKind::Weights || is_finite(values);
                    let mut holding = writers.iter_mut().zip(files).filter(|(_, file)| holds(file.1, prefix));
                    holding.try_for_each(|(writer, _)| writer.write(values))
                })?;
            }
        }
        write_statistics(&mut writers, files, &statistics)?;
        let whole = || writers.into_iter().map(TensorWriter::finish).collect::<Result<Vec<_>>>();
        finite.then(whole).transpose()
    }

    /// Where all ranks have their slices.
    fn index(&self, set: &str, content: Content) -> Result<Index> {
        let (state, ranks) = (self.state, self.state.ranks());
        let params = state.params();
        let mut slices: Vec<Vec<StoredSlice>> = vec![Vec::new(); params.len()];
        for rank in 0..ranks.world.size() {
            let file = sharded::file_name(set, rank, ranks.world.size());
            let part = [ranks.mesh.coordinates(rank).1, ranks.mesh.tensor()];
            for unit in 0..state.units().len() {
                for Slice { param, range } in distinct(state, unit, rank) {
                    let split = state.split(param);
                    let (split, part) =
                        if split.is_replicated() { (Split::Whole, [0, 1]) } else { (split, part) };
                    let range = [range.start, range.end];
                    slices[param].push(StoredSlice { file: file.clone(), split, part, range });
                }
            }
        }
        let tensor = |(param, slices): (&ParamSpec, &Vec<StoredSlice>)| Sliced {
            shape: param.shape.clone(),
            slices: slices.clone(),
        };
        let names = self.names(content).into_iter();
        let tensors = self.kinds(content).flat_map(|_| params.iter().zip(&slices)).map(tensor);
        let first = sharded::file_name(set, 0, ranks.world.size());
        let statistics = state.statistics()?;
        let summed = self.statistic_names(content, statistics.len()).into_iter().zip(&statistics);
        let summed = summed.map(|(name, values)| {
            let (file, range) = (first.clone(), [0, values.len()]);
            let slice = StoredSlice { file, split: Split::Whole, part: [0, 1], range };
            (name, Sliced { shape: vec![values.len()], slices: vec![slice] })
        });
        Ok(Index {
            set: set.into(),
            metadata: self.metadata(content)?,
            weight_map: names.zip(tensors).chain(summed).collect(),
        })
    }

    /// As a file has it: that of the parameter where the slice is all of it.
    fn shape(&self, slice: &Slice) -> Vec<usize> {
        let param = &self.state.params()[slice.param];
        if slice.range.len() == param.len() { param.shape.clone() } else { vec![slice.range.len()] }
    }

    /// What a checkpoint holds of every parameter, in this order, and how its name begins.
    fn kinds(&self, content: Content) -> impl Iterator<Item = (StateKind, &'static str)> + use<> {
        let average = self.state.keeps_average();
        let model = if average { StateKind::Average } else { StateKind::Weights };
        let training = [
            Some((StateKind::First, super::FIRST)),
            self.state.keeps_second().then_some((StateKind::Second, super::SECOND)),
            average.then_some((StateKind::Weights, super::WEIGHTS)),
        ];
        let training = training.into_iter().flatten();
        std::iter::once((model, "")).chain(training.filter(move |_| content == Content::Training))
    }

    /// Names of the tensors, in order.
    fn names(&self, content: Content) -> Vec<String> {
        let params = self.state.params();
        let named = |(_, prefix)| params.iter().map(move |param| format!("{prefix}{}", param.name));
        self.kinds(content).flat_map(named).collect()
    }

    /// Names of what is kept of the second moments of so many whole parameters, which follow the others.
    fn statistic_names(&self, content: Content, count: usize) -> Vec<String> {
        let params = self.state.params().iter().take(if content == Content::Training { count } else { 0 });
        params.map(|param| format!("{}{}", super::STATISTICS, param.name)).collect()
    }

    fn metadata(&self, content: Content) -> Result<BTreeMap<String, String>> {
        let mut metadata = self.header.metadata()?;
        if content == Content::Training {
            metadata.insert("optimizer_step".into(), self.state.optimizer_step()?.to_string());
        }
        Ok(metadata)
    }
}

/// Appends what is kept of whole parameters to the files that hold it.
fn write_statistics(
    writers: &mut [TensorWriter],
    files: &[(PathBuf, Content)],
    statistics: &[Vec<f32>],
) -> Result<()> {
    let holding = writers.iter_mut().zip(files).filter(|(_, file)| file.1 == Content::Training);
    for (writer, _) in holding {
        statistics.iter().try_for_each(|values| writer.write(values))?;
    }
    Ok(())
}

/// The most that any of the files holds.
fn all_of(files: &[(PathBuf, Content)]) -> Content {
    match files.iter().any(|(_, content)| *content == Content::Training) {
        true => Content::Training,
        false => Content::Model,
    }
}

/// Whether a file of this content has the tensors whose names begin so.
fn holds(content: Content, prefix: &str) -> bool {
    prefix.is_empty() || content == Content::Training
}

fn is_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

fn folder(files: &[(PathBuf, Content)]) -> &Path {
    let folder = files.first().and_then(|(path, _)| path.parent());
    folder.filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes a checkpoint in the other form, which would now be an old one.
fn replaces(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(Error::io(path, cause)),
        _ => Ok(()),
    }
}

/// A name for a set of `step` that is not that of the set which is to be replaced.
fn free_name(path: &Path, step: u64) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = format!("{stem}.{step}");
    match Index::load(&index_of(path)) {
        Ok(index) if index.set == name => name + ".2",
        _ => name,
    }
}
