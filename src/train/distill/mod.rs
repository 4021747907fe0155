//! The teacher of a knowledge distillation: a consistent one (Beyer et al., arXiv 2106.05237), which runs over every
//! batch that the student is about to be trained on, as it is, and leaves its probabilities as the targets.
//!
//! With p the teacher's probabilities and q the student's, KL(p ‖ q) = Σ p ln p − Σ p ln q: what depends on the student
//! is the cross-entropy against soft targets, which has kernels, and whose gradient by the logits is q − p. Labels join
//! as further soft targets, `weight·p + (1 − weight)·label`, since cross-entropy is linear in them.
//!
//! Each data rank runs a whole teacher over its own batches; the ranks of a tensor axis all run it over the same. What it
//! says of an image depends on the sample and the epoch alone, so that it can be stored for other students.

mod network;
mod store;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use self::network::Network;
use self::store::{Store, Views};
use super::run_dir;
use super::start::Target;
use crate::data::batch::{PackedBatch, Targets};
use crate::data::resolution::Limits;
use crate::data::settings::PackingSettings;
use crate::data::source::{Dataset, fingerprint};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::recipe::Recipe;

/// A model whose probabilities another learns, or what is stored of one.
pub struct Teacher {
    network: Option<Network>,
    store: Option<Store>,
    /// Names its weights.
    name: String,
    /// Its classes.
    known: Vec<String>,
    /// Of each of the student's classes, the teacher's.
    columns: Vec<usize>,
    /// Share of the teacher in the targets.
    weight: f64,
    /// Of its probabilities.
    temperature: f64,
    /// Smoothing of the labels.
    smoothing: f64,
    /// `[N, classes]` of the newest batch.
    logits: Vec<f32>,
}

impl Teacher {
    /// The teacher of a run over `dataset`, where it has one. Every rank of the run calls this.
    ///
    /// # Errors
    /// As [`load`](Self::load), on every rank; ranks whose teachers differ; stored logits of another teacher or of other
    /// views.
    pub fn of_run(recipe: &Recipe, dataset: &Dataset, target: &Target) -> Result<Option<Self>> {
        if !recipe.distill.is_on() {
            return Ok(None);
        }
        let (ranks, device) = (&target.ranks, target.device.as_ref());
        let mut teacher = ranks.agree(Self::load(recipe, &dataset.classes, device))??;
        if !ranks.is_alone() {
            ranks.world.check_same("teachers", &teacher.name)?;
        }
        if !recipe.distill.store.is_empty() {
            let views = || -> Result<Store> {
                let views = Views {
                    teacher: teacher.name.clone(),
                    classes: teacher.known.clone(),
                    images: format!("{:016x}", fingerprint(dataset.train.as_ref())),
                    recipe: seen(recipe)?,
                };
                // The ranks of a tensor axis see the same batches.
                Store::open(Path::new(&recipe.distill.store), views, ranks.tensor.rank() == 0)
            };
            teacher.store = Some(ranks.agree(views().map_err(|error| of_key("distill.store", error)))??);
        }
        Ok(Some(teacher))
    }

    /// Opens `distill.teacher` of the student's recipe for batches of the student, whose classes these are; where there
    /// is none, what `distill.store` tells of it. It runs on `device`, where there is one.
    ///
    /// # Errors
    /// A file that cannot be opened as a model; one that cannot see the student's batches, or knows other classes; a
    /// model that does not run on the device; a store that holds nothing.
    pub fn load(student: &Recipe, classes: &[String], device: Option<&Device>) -> Result<Self> {
        let distill = &student.distill;
        let (file, key) = match distill.teacher.is_empty() {
            true => (PathBuf::from(&distill.store), "distill.store"),
            false => (
                run_dir::model_file(Path::new(&distill.teacher)).map_err(|e| of_key("distill.teacher", e))?,
                "distill.teacher",
            ),
        };
        let open = || -> Result<Self> {
            let (network, name, known) = if distill.teacher.is_empty() {
                let Some(Views { teacher, classes, .. }) = Store::views(&file)? else {
                    return Err(Error::file(
                        &file,
                        "holds no logits; set distill.teacher to a model that computes them",
                    ));
                };
                (None, teacher, classes)
            } else {
                let (network, known) = Network::open(student, &file, device)?;
                let name = format!("{:016x}", network.fingerprint);
                (Some(network), name, known)
            };
            let columns = match_classes(classes, &known).map_err(|cause| Error::file(&file, cause))?;
            Ok(Self {
                network,
                store: None,
                name,
                known,
                columns,
                weight: distill.weight,
                temperature: distill.temperature,
                smoothing: student.train.label_smoothing,
                logits: Vec::new(),
            })
        };
        open().map_err(|error| of_key(key, error))
    }

    /// Writes its logits of `batch`, whose targets are class indices, to `self.logits`.
    fn look(&mut self, batch: &PackedBatch) -> Result<()> {
        let (classes, used) = (self.known.len(), |slot: &usize| batch.weights[*slot] != 0.0);
        let slots = (0..batch.slots()).filter(used);
        let key = |slot: usize| (batch.sample_ids[slot], batch.epochs[slot]);
        if let Some(store) = &mut self.store
            && (self.network.is_none() || slots.clone().all(|slot| store.holds(key(slot))))
        {
            self.logits.resize(batch.slots() * classes, 0.0);
            return slots
                .into_iter()
                .try_for_each(|slot| store.read(key(slot), &mut self.logits[slot * classes..][..classes]));
        }
        let Some(network) = &mut self.network else {
            return Err(Error::failure("a teacher has neither a network nor stored logits"));
        };
        self.logits.clear();
        self.logits.extend_from_slice(network.logits(batch)?);
        let rows = self.logits.chunks_exact_mut(classes).enumerate().filter(|(slot, _)| used(slot));
        match &mut self.store {
            None => Ok(()),
            Some(store) => store.add(rows.map(|(slot, row)| (key(slot), row))),
        }
    }

    /// Replaces the targets of `batch`, whatever they are, by the teacher's probabilities joined with them.
    ///
    /// # Errors
    /// A failed device; an image too slender for the teacher's positions; stored logits that are missing, damaged, or
    /// cannot be written.
    pub fn teach(&mut self, batch: &mut PackedBatch) -> Result<()> {
        let (classes, slots) = (self.columns.len(), batch.slots());
        let labels = std::mem::replace(&mut batch.targets, Targets::Classes(vec![0; slots]));
        self.look(batch)?;
        let (columns, logits) = (&self.columns, &self.logits);
        let labelled = 1.0 - self.weight;
        let (kept, floor) = (labelled * (1.0 - self.smoothing), labelled * self.smoothing / classes as f64);
        let mut soft = vec![0f32; slots * classes];
        let rows = soft.par_chunks_exact_mut(classes).zip(logits.par_chunks_exact(classes)).enumerate();
        rows.filter(|(slot, _)| batch.weights[*slot] != 0.0).for_each(|(slot, (row, logits))| {
            softmax(logits, columns, self.temperature, row);
            row.iter_mut().for_each(|p| *p = (self.weight * f64::from(*p) + floor) as f32);
            let mut add = |class: usize, share: f32| row[class] += (kept * f64::from(share)) as f32;
            match &labels {
                Targets::Classes(labels) => add(labels[slot] as usize, 1.0),
                Targets::Mixed(mixtures) => {
                    let mixture = &mixtures[slot];
                    let parts = mixture.classes.iter().zip(mixture.shares);
                    parts.for_each(|(&class, share)| add(class as usize, share));
                }
                Targets::Soft(soft) => {
                    let own = &soft[slot * classes..][..classes];
                    own.iter().enumerate().for_each(|(class, &share)| add(class, share));
                }
            }
        });
        batch.targets = Targets::Soft(soft);
        Ok(())
    }
}

impl fmt::Display for Teacher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "teacher           ")?;
        if let Some(network) = &self.network {
            write!(f, "{network}, ")?;
        }
        if let Some(store) = &self.store {
            write!(f, "{} stored views in {}, ", store.views_held(), store.folder().display())?;
        }
        write!(f, "{:.0} % of the targets", 100.0 * self.weight)?;
        match self.temperature {
            1.0 => Ok(()),
            temperature => write!(f, ", temperature {temperature}"),
        }
    }
}

/// What decides what a student sees of an image in an epoch, and so what its teacher says.
fn seen(recipe: &Recipe) -> Result<toml::Table> {
    let all = toml::Table::try_from(recipe).map_err(Error::failure)?;
    let mut seen = toml::Table::new();
    for (section, keys) in [
        ("data", &["source", "validation", "flip"][..]),
        ("model", &["patch", "channels"]),
        ("train", &["seed"]),
        ("resolution", &[]),
        ("drop", &[]),
        ("augment", &[]),
        ("mix", &[]),
    ] {
        if let Some(toml::Value::Table(table)) = all.get(section) {
            let chosen = table.iter().filter(|(key, _)| keys.is_empty() || keys.contains(&key.as_str()));
            let chosen: toml::Table = chosen.map(|(key, value)| (key.clone(), value.clone())).collect();
            seen.insert(section.into(), chosen.into());
        }
    }
    // How large an image may become follows from positions and packing.
    let settings = PackingSettings::train(recipe)?;
    let tokens = settings.capacity().saturating_sub(settings.prefix);
    let Limits { patches, rows, cols } = settings.limits;
    let mut largest = toml::Table::new();
    for (key, value) in [("rows", rows), ("columns", cols), ("patches", patches.min(tokens))] {
        largest.insert(key.into(), i64::try_from(value).unwrap_or(i64::MAX).into());
    }
    seen.insert("largest".into(), largest.into());
    Ok(seen)
}

/// An error in what `key` names.
fn of_key(key: &str, error: Error) -> Error {
    match error {
        Error::Usage(message) => Error::Usage(format!("{key}: {message}")),
        failure => failure,
    }
}

/// The softmax of `logits / temperature`, of which entry `columns[i]` goes to `row[i]`.
fn softmax(logits: &[f32], columns: &[usize], temperature: f64, row: &mut [f32]) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |z: f32| (f64::from(z - largest) / temperature).exp();
    let sum: f64 = logits.iter().map(|&z| exp(z)).sum();
    row.iter_mut().zip(columns).for_each(|(p, &column)| *p = (exp(logits[column]) / sum) as f32);
}

/// Of each class the teacher's number.
fn match_classes(classes: &[String], known: &[String]) -> Result<Vec<usize>> {
    let numbers: HashMap<&str, usize> =
        known.iter().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
    if classes.len() != known.len() {
        return Err(Error::usage(format!(
            "knows {} classes and the data has {}; take a teacher of the same classes",
            known.len(),
            classes.len()
        )));
    }
    let column = |name: &String| {
        numbers.get(name.as_str()).copied().ok_or_else(|| {
            Error::usage(format!(
                "does not know the class `{name}` of the data, its own begin with `{}`; take a teacher of the same \
                 classes, or name those of weights of another library with `trencadis convert --classes`",
                known.first().map_or("", String::as_str)
            ))
        })
    };
    classes.iter().map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::Workload;
    use crate::cpu::loss::cross_entropy;
    use crate::data::batch::{Mixture, Patches};
    use crate::eval::model::Forward;
    use crate::ops::{ClassificationLoss, LossKind};
    use crate::weights::Weights;

    /// Logits that are given.
    struct Given(usize, Vec<f32>);

    impl Forward for Given {
        fn classes(&self) -> usize {
            self.0
        }

        fn flops(&self, _: &Workload) -> f64 {
            0.0
        }

        fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]> {
            assert!(matches!(batch.targets, Targets::Classes(_)), "as in an evaluation");
            Ok(&self.1)
        }
    }

    fn teacher(logits: &[f32], columns: Vec<usize>, weight: f64, smoothing: f64) -> Teacher {
        let network = Network::of(Box::new(Given(columns.len(), logits.to_vec())));
        let known = (0..columns.len()).map(|class| class.to_string()).collect();
        let (network, name, temperature) = (Some(network), String::new(), 1.0);
        let logits = Vec::new();
        Teacher { network, store: None, name, known, columns, weight, temperature, smoothing, logits }
    }

    /// Slots alone, of which the last is unused.
    fn batch(targets: Targets, slots: usize) -> PackedBatch {
        let mut weights = vec![1.0; slots];
        weights[slots - 1] = 0.0;
        PackedBatch {
            patches: Patches::U8(Vec::new()),
            patch_dim: 1,
            cu_seqlens: vec![0; slots + 1],
            positions: Vec::new(),
            grids: vec![[0; 2]; slots],
            targets,
            weights,
            sample_ids: vec![0; slots],
            epochs: vec![0; slots],
            images: slots - 1,
            texts: None,
        }
    }

    fn taught(mut teacher: Teacher, targets: Targets, slots: usize) -> Vec<f32> {
        let mut batch = batch(targets, slots);
        teacher.teach(&mut batch).unwrap();
        match batch.targets {
            Targets::Soft(soft) => soft,
            other => panic!("{other:?}"),
        }
    }

    /// tools/mix_goldens.py
    #[test]
    fn loss_and_gradient_are_those_of_torch_kl_div() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mix/timm.safetensors");
        let goldens = Weights::load(&path).unwrap().tensors;
        let (shape, logits) = &goldens["logits"];
        let [images, classes] = shape[..] else { panic!("{shape:?}") };
        let mut given = goldens["teacher"].1.clone();
        given.resize((images + 1) * classes, f32::NAN);
        for (temperature, golden) in [(1.0, "kl"), (2.5, "kl 2.5")] {
            let labels = Targets::Classes(vec![0; images + 1]);
            let teacher = Teacher { temperature, ..teacher(&given, (0..classes).collect(), 1.0, 0.0) };
            let soft = taught(teacher, labels, images + 1);
            let entropy: f64 =
                soft.iter().filter(|p| **p > 0.0).map(|&p| -f64::from(p) * f64::from(p).ln()).sum();
            let of = ClassificationLoss { temperature, ..LossKind::Softmax.into() };
            let (mut loss, mut gradient) = (vec![0f32; images], vec![0f32; logits.len()]);
            let (weights, targets, scale) = (vec![1.0; images], Targets::Soft(soft), 1.0 / images as f64);
            cross_entropy(of, &mut loss, &mut gradient, logits, &targets, &weights, classes, scale);
            let kl =
                (loss.iter().map(|&l| f64::from(l)).sum::<f64>() - temperature.powi(2) * entropy) * scale;
            assert!((kl - f64::from(goldens[golden].1[0])).abs() < 2e-6, "{kl}");
            for (got, want) in gradient.iter().zip(&goldens[&format!("{golden} gradient")].1) {
                assert!((got - want).abs() < 1e-7, "{got} for {want}");
            }
        }
    }

    #[test]
    fn labels_join_in_whatever_form_they_come() {
        // Probabilities 1/4, 3/4 and nothing, of which the student's order is the last first.
        let logits = [0.0, 3f32.ln(), -200.0, 9.0, 9.0, 9.0];
        let columns = vec![2, 0, 1];
        let join = |targets| taught(teacher(&logits, columns.clone(), 0.5, 0.3), targets, 2);
        let near = |got: Vec<f32>, label: [f32; 3]| {
            for (got, (p, label)) in got.iter().zip([0.0, 0.25, 0.75].into_iter().zip(label)) {
                let want = 0.5 * p + 0.5 * (0.7 * label + 0.1);
                assert!((got - want).abs() < 1e-6, "{got} for {want}");
            }
            assert_eq!(got[3..], [0.0; 3], "no weight");
        };
        near(join(Targets::Classes(vec![1, 0])), [0.0, 1.0, 0.0]);
        near(join(Targets::Mixed(vec![Mixture::new(1, 2, 0.25), Mixture::one(0)])), [0.0, 0.25, 0.75]);
        near(join(Targets::Soft(vec![0.5, 0.5, 0.0, 1.0, 1.0, 1.0])), [0.5, 0.5, 0.0]);
    }

    #[test]
    fn classes_are_matched_by_name() {
        let names = |names: [&str; 3]| names.map(String::from).to_vec();
        let known = names(["a", "b", "c"]);
        assert_eq!(match_classes(&names(["c", "a", "b"]), &known).unwrap(), [2, 0, 1]);
        let said = match_classes(&names(["a", "b", "d"]), &known).unwrap_err().to_string();
        assert!(said.contains("class `d`") && said.contains("`a`"), "{said}");
        let said = match_classes(&known[..2], &known).unwrap_err().to_string();
        assert!(said.contains("knows 3 classes and the data has 2"), "{said}");
    }
}
