//! The teacher of a knowledge distillation: a consistent one (Beyer et al., arXiv 2106.05237), which runs over every
//! batch that the student is about to be trained on, as it is, and leaves its probabilities as the targets.
//!
//! With p the teacher's probabilities and q the student's, KL(p ‖ q) = Σ p ln p − Σ p ln q: what depends on the student
//! is the cross-entropy against soft targets, which has kernels, and whose gradient by the logits is q − p. Labels join
//! as further soft targets, `weight·p + (1 − weight)·label`, since cross-entropy is linear in them.
//!
//! Each data rank runs a whole teacher over its own batches; the ranks of a tensor axis all run it over the same.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::run_dir;
use super::start::Target;
use crate::autograd::ParamSpec;
use crate::autograd::device::BatchShape;
use crate::data::batch::{PackedBatch, Targets};
use crate::data::positions::longest_axis;
use crate::data::resolution::{self, Limits};
use crate::data::settings::{PackingSettings, has_absolute_table, position_limits, slots};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::device::DeviceModel;
use crate::eval::model::{Forward, Model, WithParams};
use crate::eval::open::{Opened, Told, open};
use crate::hash::fnv1a;
use crate::recipe::{AspectKind, DataConfig, DistillConfig, Recipe};
use crate::weights::foreign::fold_prefix;
use crate::weights::{Policy, assign};

/// A model whose probabilities another learns.
pub struct Teacher {
    file: PathBuf,
    model: Box<dyn Forward>,
    parameters: usize,
    /// Of some of its weights.
    fingerprint: u64,
    /// Of each of the student's classes, the teacher's.
    columns: Vec<usize>,
    /// Prefix tokens of the student and of the teacher, and the teacher's token budget, where these differ.
    prefix: Option<[usize; 3]>,
    /// Share of the teacher in the targets.
    weight: f64,
    /// Smoothing of the labels.
    smoothing: f64,
}

impl Teacher {
    /// The teacher of a run, where it has one. Every rank of the run calls this.
    ///
    /// # Errors
    /// As [`load`](Self::load), on every rank; ranks whose teachers differ.
    pub fn of_run(recipe: &Recipe, classes: &[String], target: &Target) -> Result<Option<Self>> {
        if !recipe.distill.is_on() {
            return Ok(None);
        }
        let teacher = target.ranks.agree(Self::load(recipe, classes, target.device.as_ref()))??;
        if !target.ranks.is_alone() {
            target.ranks.world.check_same("teachers", &format!("{:016x}", teacher.fingerprint))?;
        }
        Ok(Some(teacher))
    }

    /// Opens `distill.teacher` of the student's recipe for batches of the student, whose classes these are. It runs on
    /// `device`, where there is one.
    ///
    /// # Errors
    /// A file that cannot be opened as a model; one that cannot see the student's batches, or knows other classes; a
    /// model that does not run on the device.
    pub fn load(student: &Recipe, classes: &[String], device: Option<&Device>) -> Result<Self> {
        let DistillConfig { teacher, weight } = &student.distill;
        Self::open(student, classes, device, teacher, *weight).map_err(|error| match error {
            Error::Usage(message) => Error::Usage(format!("distill.teacher: {message}")),
            failure => failure,
        })
    }

    fn open(
        student: &Recipe,
        classes: &[String],
        device: Option<&Device>,
        path: &str,
        weight: f64,
    ) -> Result<Self> {
        let file = run_dir::model_file(Path::new(path))?;
        let Opened { recipe: teacher, classes: known, mut weights, .. } = open(&file, &Told::default())?;
        fold_prefix(&mut weights)?;
        check_batches(student, &teacher).map_err(|cause| Error::file(&file, cause))?;
        let columns = match_classes(classes, &known).map_err(|cause| Error::file(&file, cause))?;
        // Its network, over the student's batches, whose pixels it normalises as it is used to.
        let recipe = Recipe {
            model: teacher.model,
            data: DataConfig { mean: teacher.data.mean, std: teacher.data.std, ..student.data.clone() },
            ..student.clone()
        };
        let (slots, here, there) = (slots(student), student.model.prefix(), recipe.model.prefix());
        let tokens = match there > here {
            true => (student.packing.tokens + slots * (there - here)).next_multiple_of(128),
            false => student.packing.tokens,
        };
        let prefix = (here != there).then_some([here, there, tokens]);
        let model = Model::new(&recipe, known.len(), tokens, slots, false)?;
        let parameters = model.params().iter().map(ParamSpec::len).sum();
        let (params, _) = assign(&file, weights, model.params(), Policy::Exact)?;
        let fingerprint = fingerprint(&params);
        let model: Box<dyn Forward> = match device {
            None => Box::new(WithParams { model, params }),
            Some(device) => {
                let resolution = student.resolution.max.max(student.eval.resolution);
                let shape = BatchShape::of_recipe(student, slots, 0);
                let shape = BatchShape {
                    tokens,
                    image_rows: shape.image_rows - here + there,
                    longest: longest_axis(&recipe.model.position, resolution, recipe.model.patch),
                    ..shape
                };
                Box::new(DeviceModel::new(device, &recipe, known.len(), shape, false, &params)?)
            }
        };
        let smoothing = student.train.label_smoothing;
        Ok(Self { file, model, parameters, fingerprint, columns, prefix, weight, smoothing })
    }

    /// Replaces the targets of `batch`, whatever they are, by the teacher's probabilities joined with them.
    ///
    /// # Errors
    /// A failed device; an image too slender for the teacher's positions.
    pub fn teach(&mut self, batch: &mut PackedBatch) -> Result<()> {
        let (classes, slots) = (self.columns.len(), batch.slots());
        let labels = std::mem::replace(&mut batch.targets, Targets::Classes(vec![0; slots]));
        let own = self.prefix.map(|[from, to, tokens]| batch.with_prefix(from, to, tokens));
        let logits = self.model.logits(own.as_ref().unwrap_or(batch))?;
        let columns = &self.columns;
        let labelled = 1.0 - self.weight;
        let (kept, floor) = (labelled * (1.0 - self.smoothing), labelled * self.smoothing / classes as f64);
        let mut soft = vec![0f32; slots * classes];
        let rows = soft.par_chunks_exact_mut(classes).zip(logits.par_chunks_exact(classes)).enumerate();
        rows.filter(|(slot, _)| batch.weights[*slot] != 0.0).for_each(|(slot, (row, logits))| {
            softmax(logits, columns, row);
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
        write!(
            f,
            "teacher           {}, {:.2} M parameters, {:.0} % of the targets",
            self.file.display(),
            self.parameters as f64 / 1e6,
            100.0 * self.weight
        )
    }
}

/// The softmax of `logits`, of which entry `columns[i]` goes to `row[i]`.
fn softmax(logits: &[f32], columns: &[usize], row: &mut [f32]) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |z: f32| f64::from(z - largest).exp();
    let sum: f64 = logits.iter().map(|&z| exp(z)).sum();
    row.iter_mut().zip(columns).for_each(|(p, &column)| *p = (exp(logits[column]) / sum) as f32);
}

/// Of the beginning of each tensor, which training leaves in no two files alike.
fn fingerprint(params: &[Vec<f32>]) -> u64 {
    let looked_at = params.iter().flat_map(|param| param.iter().take(64));
    fnv1a(&looked_at.flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
}

/// Whether a teacher can see the batches of a student as they are.
fn check_batches(student: &Recipe, teacher: &Recipe) -> Result<()> {
    let (there, here) = (&teacher.model, &student.model);
    for (key, there, here) in
        [("model.patch", there.patch, here.patch), ("model.channels", there.channels, here.channels)]
    {
        if there != here {
            return Err(Error::usage(format!(
                "{key} is {there} there and {here} in the student; a teacher sees the student's batches, so give both \
                 the same"
            )));
        }
    }
    let settings = PackingSettings::train(student)?;
    let sizes = &settings.resolution;
    let largest = match sizes.aspect {
        AspectKind::Native => settings.limits,
        AspectKind::Square => {
            let square = (1 << 16, 1 << 16);
            let grid =
                resolution::target(sizes, settings.patch, settings.limits, square, sizes.max as f64).grid;
            Limits { patches: grid.patches(), rows: grid.rows, cols: grid.cols }
        }
    };
    let known = position_limits(&there.position, sizes.max, settings.patch);
    let table = |limits: Limits| limits.patches.min(limits.rows.saturating_mul(limits.cols));
    let fits = largest.rows <= known.rows && largest.cols <= known.cols && table(largest) <= known.patches;
    if fits || !has_absolute_table(&there.position) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "has absolute positions for model.position.rows = {} and model.position.columns = {}, and an image of the \
         student may have more; lower resolution.max, or set resolution.aspect = \"square\"",
        there.position.rows, there.position.columns
    )))
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
    use crate::cpu::loss::softmax_cross_entropy;
    use crate::data::batch::{Mixture, Patches};
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
        let model = Box::new(Given(columns.len(), logits.to_vec()));
        let file = PathBuf::from("teacher.safetensors");
        Teacher { file, model, parameters: 0, fingerprint: 0, columns, prefix: None, weight, smoothing }
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
        let labels = Targets::Classes(vec![0; images + 1]);
        let soft = taught(teacher(&given, (0..classes).collect(), 1.0, 0.0), labels, images + 1);
        let entropy: f64 =
            soft.iter().filter(|p| **p > 0.0).map(|&p| -f64::from(p) * f64::from(p).ln()).sum();
        let (mut loss, mut gradient) = (vec![0f32; images], vec![0f32; logits.len()]);
        let (weights, targets, scale) = (vec![1.0; images], Targets::Soft(soft), 1.0 / images as f64);
        softmax_cross_entropy(&mut loss, &mut gradient, logits, &targets, &weights, classes, 0.0, scale);
        let kl = (loss.iter().map(|&l| f64::from(l)).sum::<f64>() - entropy) * scale;
        assert!((kl - f64::from(goldens["kl"].1[0])).abs() < 1e-6, "{kl}");
        for (got, want) in gradient.iter().zip(&goldens["kl gradient"].1) {
            assert!((got - want).abs() < 1e-7, "{got} for {want}");
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
