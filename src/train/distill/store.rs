//! A teacher's logits on disk, for the views of images that it has seen: another student of the same views needs no
//! teacher to run, and none at all once they are complete.
//!
//! A folder: `views.toml` says whose logits of what views these are, and every process that adds some writes a file
//! `logits-N.bin` of its own, of records
//!
//! | bytes | what |
//! |---|---|
//! | 8 | sample, its place in the training images |
//! | 8 | epoch in which it was drawn, see [`PackedBatch::epochs`](crate::data::batch::PackedBatch::epochs) |
//! | 2 a class | f16, logit less the largest, which no softmax can tell from the logit |
//! | 8 | FNV-1a of what stands before |
//!
//! in little endian. A record at the end that a killed process left unfinished is passed over.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::f16;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::hash::fnv1a;
use crate::recipe::compare::differences;

const VIEWS: &str = "views.toml";
const KEY_BYTES: usize = 16;
const HASH_BYTES: usize = 8;

/// Whose logits a store holds, of what views.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Views {
    /// Names the teacher's weights.
    pub teacher: String,
    /// The teacher's classes, in the order of its logits.
    pub classes: Vec<String>,
    /// Fingerprint of the training images.
    pub images: String,
    /// Every key of the recipe that decides what a student sees of an image.
    pub recipe: toml::Table,
}

/// An image of an epoch.
pub type Key = (u64, u64);

/// Logits on disk.
pub struct Store {
    folder: PathBuf,
    views: Views,
    files: Vec<PathBuf>,
    /// Of each image of an epoch, the file and the number of its record.
    places: HashMap<Key, (u32, u32)>,
    /// The file that was read last: there may be more than can be open.
    open: Option<(u32, File)>,
    /// The file that this process adds to, once it has.
    own: Option<(u32, File)>,
    /// Whether this process may add.
    writes: bool,
}

impl Store {
    /// Whose logits of what views `folder` holds; nothing where it holds none yet.
    ///
    /// # Errors
    /// A file that cannot be read or is damaged.
    pub fn views(folder: &Path) -> Result<Option<Views>> {
        let path = folder.join(VIEWS);
        match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map(Some).map_err(|cause| {
                Error::file(&path, format!("does not describe stored logits ({})", cause.message()))
            }),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(Error::file(&path, cause)),
        }
    }

    /// Opens `folder` for the logits of `views`, and makes it where it does not exist. One process of those that see the
    /// same batches `writes`.
    ///
    /// # Errors
    /// A folder that holds the logits of another teacher or of other views; one that cannot be read or written.
    pub fn open(folder: &Path, views: Views, writes: bool) -> Result<Self> {
        match Self::views(folder)? {
            Some(there) => check(folder, &there, &views)?,
            None => {
                fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
                let text = toml::to_string(&views).map_err(Error::failure)?;
                write_atomic(&folder.join(VIEWS), |out| out.write_all(text.as_bytes()))?;
            }
        }
        let mut store = Self {
            folder: folder.into(),
            views,
            files: Vec::new(),
            places: HashMap::new(),
            open: None,
            own: None,
            writes,
        };
        let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut paths: Vec<PathBuf> = entries
            .map_err(|cause| Error::file(folder, cause))?
            .iter()
            .map(fs::DirEntry::path)
            .filter(|path| path.extension().is_some_and(|extension| extension == "bin"))
            .collect();
        paths.sort();
        paths.into_iter().try_for_each(|path| store.index(path))?;
        Ok(store)
    }

    /// How many images of whatever epochs there are.
    pub fn views_held(&self) -> usize {
        self.places.len()
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether the logits of an image of an epoch are there.
    pub fn holds(&self, key: Key) -> bool {
        self.places.contains_key(&key)
    }

    /// Writes the logits of an image of an epoch to `logits`, less the largest of them.
    ///
    /// # Errors
    /// Logits that are not there, are damaged or cannot be read.
    pub fn read(&mut self, key: Key, logits: &mut [f32]) -> Result<()> {
        let Some(&(number, record)) = self.places.get(&key) else {
            return Err(Error::usage(format!(
                "{} holds no logits of training image {} in epoch {}, only those of {} views; set distill.teacher to \
                 add them, or end the run earlier with train.steps",
                self.folder.display(),
                key.0,
                key.1,
                self.views_held()
            )));
        };
        let mut bytes = vec![0; self.record_bytes()];
        let (path, at) = (&self.files[number as usize], u64::from(record) * bytes.len() as u64);
        let fail = |cause| Error::file(path, cause);
        let file = match &mut self.open {
            Some((open, file)) if *open == number => file,
            open => &mut open.insert((number, File::open(path).map_err(fail)?)).1,
        };
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut bytes)).map_err(fail)?;
        let (content, hash) = bytes.split_at(bytes.len() - HASH_BYTES);
        if hash != fnv1a(content).to_le_bytes() {
            return Err(Error::file(
                path,
                format!("is damaged at byte {at}; delete it, and its logits are computed again"),
            ));
        }
        for (logit, bytes) in logits.iter_mut().zip(content[KEY_BYTES..].chunks_exact(2)) {
            *logit = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        }
        Ok(())
    }

    /// Makes `rows` of logits what [`read`](Self::read) gives: those that are there, and what the others are once
    /// they are kept.
    ///
    /// # Errors
    /// Logits that are not finite; a file that cannot be read or written.
    pub fn add<'a>(&mut self, rows: impl Iterator<Item = (Key, &'a mut [f32])>) -> Result<()> {
        let (mut records, mut keys) = (Vec::new(), Vec::new());
        for (key, logits) in rows {
            if self.holds(key) {
                self.read(key, logits)?;
                continue;
            }
            if !logits.iter().all(|logit| logit.is_finite()) {
                return Err(Error::usage(format!(
                    "the teacher's logits of training image {} in epoch {} are not finite; take another teacher",
                    key.0, key.1
                )));
            }
            let begin = records.len();
            records.extend(key.0.to_le_bytes());
            records.extend(key.1.to_le_bytes());
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for logit in logits {
                let rounded = f16::from_f32((*logit - largest).max(f16::MIN.to_f32()));
                *logit = rounded.to_f32();
                records.extend(rounded.to_le_bytes());
            }
            if !self.writes || keys.contains(&key) {
                records.truncate(begin);
                continue;
            }
            let hash = fnv1a(&records[begin..]);
            records.extend(hash.to_le_bytes());
            keys.push(key);
        }
        if keys.is_empty() {
            return Ok(());
        }
        let bytes = self.record_bytes() as u64;
        let (number, file) = match &mut self.own {
            Some(own) => own,
            None => {
                let own = self.create()?;
                self.own.insert(own)
            }
        };
        let end = file.seek(SeekFrom::End(0)).and_then(|end| file.write_all(&records).map(|()| end));
        let end = end.map_err(|cause| Error::io(&self.files[*number as usize], cause))?;
        let places = ((end / bytes) as u32..).map(|record| (*number, record));
        self.places.extend(keys.into_iter().zip(places));
        Ok(())
    }

    fn record_bytes(&self) -> usize {
        KEY_BYTES + 2 * self.views.classes.len() + HASH_BYTES
    }

    fn index(&mut self, path: PathBuf) -> Result<()> {
        let fail = |cause| Error::file(&path, cause);
        let mut file = File::open(&path).map_err(fail)?;
        let bytes = self.record_bytes() as u64;
        let records = file.metadata().map_err(fail)?.len() / bytes;
        let number = self.files.len() as u32;
        for record in 0..records as u32 {
            let mut key = [0; KEY_BYTES];
            let at = u64::from(record) * bytes;
            file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut key)).map_err(fail)?;
            let (sample, epoch) = key.split_at(8);
            let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            self.places.insert((word(sample), word(epoch)), (number, record));
        }
        self.files.push(path);
        Ok(())
    }

    /// A new file for this process, as another one may add to any that is there.
    fn create(&mut self) -> Result<(u32, File)> {
        let mut number = self.files.len();
        let (path, file) = loop {
            let path = self.folder.join(format!("logits-{number:04}.bin"));
            match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(cause) => return Err(Error::io(&path, cause)),
            }
        };
        self.files.push(path);
        Ok((self.files.len() as u32 - 1, file))
    }
}

fn check(folder: &Path, there: &Views, here: &Views) -> Result<()> {
    let refuse = |cause: String| {
        Err(Error::file(folder, format!("{cause}; name another folder, or delete this one to begin anew")))
    };
    if (&there.teacher, &there.classes) != (&here.teacher, &here.classes) {
        return refuse("holds the logits of another teacher".into());
    }
    if there.images != here.images {
        return refuse("holds logits of other training images".into());
    }
    match differences("", &there.recipe, &here.recipe, &[]).first() {
        None => Ok(()),
        Some(difference) => refuse(format!("holds logits of other views: {difference}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views(crop: &str) -> Views {
        let recipe = toml::from_str(&format!("train.seed = 3\naugment.crop = \"{crop}\"")).unwrap();
        Views {
            teacher: "1f".into(),
            classes: vec!["a".into(), "b".into(), "c".into()],
            images: "9".into(),
            recipe,
        }
    }

    fn add(store: &mut Store, key: Key, logits: [f32; 3]) -> [f32; 3] {
        let mut rounded = logits;
        store.add([(key, &mut rounded[..])].into_iter()).unwrap();
        rounded
    }

    fn read(store: &mut Store, key: Key) -> [f32; 3] {
        let mut logits = [f32::NAN; 3];
        store.read(key, &mut logits).unwrap();
        logits
    }

    #[test]
    fn what_was_added_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("logits");
        assert_eq!(Store::views(&folder).unwrap(), None);
        let mut first = Store::open(&folder, views("none"), true).unwrap();
        assert_eq!(add(&mut first, (4, 0), [1.0, 3.0, -1e9]), [-2.0, 0.0, -65504.0]);
        let rounded = add(&mut first, (1 << 40, 7), [0.1, 0.2, 0.3]);
        assert!((rounded[0] + 0.2).abs() < 1e-4 && rounded[2] == 0.0, "{rounded:?}");
        // Another process adds at the same time, and one that sees the same batches adds nothing.
        let mut second = Store::open(&folder, views("none"), true).unwrap();
        assert_eq!(second.views_held(), 2);
        assert_eq!(add(&mut second, (5, 0), [2.0, 0.0, 1.0]), [0.0, -2.0, -1.0]);
        let mut silent = Store::open(&folder, views("none"), false).unwrap();
        assert_eq!(add(&mut silent, (6, 0), [2.0, 0.0, 1.0]), [0.0, -2.0, -1.0]);
        assert!(!silent.holds((6, 0)));
        // What is there stays as it is, and is what others get.
        assert_eq!(add(&mut second, (4, 0), [9.0, 0.0, 0.0]), [-2.0, 0.0, -65504.0]);
        let said = second.add([((7, 0), &mut [0.0, f32::NAN, 0.0][..])].into_iter()).unwrap_err().to_string();
        assert!(said.contains("logits of training image 7 in epoch 0 are not finite"), "{said}");

        let mut all = Store::open(&folder, views("none"), true).unwrap();
        assert_eq!(all.views_held(), 3);
        assert_eq!(Store::views(&folder).unwrap(), Some(views("none")));
        assert_eq!(read(&mut all, (4, 0)), [-2.0, 0.0, -65504.0]);
        assert_eq!(read(&mut all, (1 << 40, 7)), rounded);
        assert_eq!(read(&mut all, (5, 0)), [0.0, -2.0, -1.0]);
        let said = all.read((4, 1), &mut [0.0; 3]).unwrap_err().to_string();
        assert!(said.contains("no logits of training image 4 in epoch 1, only those of 3 views"), "{said}");
    }

    #[test]
    fn damage_is_found_and_an_unfinished_record_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), views("none"), true).unwrap();
        add(&mut store, (1, 0), [0.0, 1.0, 2.0]);
        add(&mut store, (2, 0), [0.0, 1.0, 2.0]);
        let path = folder.path().join("logits-0000.bin");
        let mut bytes = fs::read(&path).unwrap();
        bytes[18] ^= 1;
        bytes.pop();
        fs::write(&path, bytes).unwrap();
        let mut store = Store::open(folder.path(), views("none"), true).unwrap();
        assert!(store.holds((1, 0)) && !store.holds((2, 0)));
        let said = store.read((1, 0), &mut [0.0; 3]).unwrap_err().to_string();
        assert!(said.contains("logits-0000.bin: is damaged at byte 0; delete it"), "{said}");
    }

    #[test]
    fn logits_of_another_teacher_or_of_other_views_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        Store::open(folder.path(), views("none"), true).unwrap();
        let refused = |views: Views| {
            let error = Store::open(folder.path(), views, true).err().expect("refused");
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        assert!(refused(Views { teacher: "2f".into(), ..views("none") }).contains("of another teacher"));
        let others = refused(Views { images: "8".into(), ..views("none") });
        assert!(others.contains("holds logits of other training images"), "{others}");
        let said = refused(views("simple"));
        assert!(said.contains("augment.crop is \"none\" there and \"simple\" here; name another"), "{said}");
        fs::write(folder.path().join(VIEWS), "teacher = 3").unwrap();
        let said = Store::views(folder.path()).unwrap_err().to_string();
        assert!(said.contains("views.toml: does not describe stored logits"), "{said}");
    }
}
