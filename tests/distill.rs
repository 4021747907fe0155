//! A student learns what a small trained teacher says of the built-in digits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use trencadis::data::batch::Targets;
use trencadis::data::loader::Loader;
use trencadis::data::source;
use trencadis::eval::trained::Trained;
use trencadis::recipe::Recipe;
use trencadis::train::distill::Teacher;
use trencadis::train::start::{Target, TrainOptions, start};
use trencadis::weights::Weights;

const SMALL: [&str; 13] = [
    "model.width=32",
    "model.depth=1",
    "model.mlp=64",
    "model.heads=2",
    "model.pool=mean",
    "resolution.max=16",
    "packing.tokens=1024",
    "drop.kind=none",
    "train.steps=250",
    "train.warmup=10",
    "train.lr=1e-2",
    "train.eval_every=0",
    "data.workers=1",
];

fn recipe(sets: &[&str]) -> Recipe {
    let sets: Vec<String> = SMALL.iter().chain(sets).map(|set| set.to_string()).collect();
    Recipe::load("digits", &sets).unwrap()
}

/// Trains `recipe` as the run `name` in `out`, and returns the run's folder.
fn train(recipe: Recipe, out: &Path, name: &str) -> trencadis::Result<PathBuf> {
    let options = TrainOptions { name: name.into(), recipe, out: out.into(), init: None };
    start(options, &Target::default())?;
    Ok(out.join(format!("{name}-1")))
}

/// Mean KL(teacher ‖ student) over the validation images.
fn divergence(teacher: &Path, student: &Path) -> f64 {
    let [mut teacher, mut student] =
        [teacher, student].map(|path| Trained::load(path, &Default::default(), None, 0).unwrap());
    let data = source::open(&student.recipe.data, 1, student.recipe.train.seed).unwrap();
    let classes = data.classes.len();
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
        logits.iter().map(|&z| f64::from(z) - sum.ln()).collect()
    };
    let (mut sum, mut images) = (0.0, 0);
    for loaded in Loader::eval(data.validation.clone(), &student.recipe, 0).unwrap() {
        let batch = loaded.unwrap().batch;
        let [p, q] = [&mut teacher, &mut student].map(|model| model.model.logits(&batch).unwrap().to_vec());
        for slot in 0..batch.images {
            let [p, q] = [&p, &q].map(|logits| log_softmax(&logits[slot * classes..][..classes]));
            sum += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            images += 1;
        }
    }
    sum / f64::from(images)
}

#[test]
fn a_student_comes_closer_to_its_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = train(recipe(&[]), folder.path(), "teacher").unwrap();
    let told = format!("distill.teacher={}", teacher.display());
    // Another shape, mixed images, and no labels at all.
    let sets = ["model.width=24", "model.depth=2", "train.keep_every=10", "mix.mixup=0.8", "drop.kind=beta"];
    let student = train(recipe(&[&sets[..], &[&told, "train.seed=3"]].concat()), folder.path(), "student");
    let student = student.unwrap();
    let [early, late] =
        ["step-10", "last"].map(|at| divergence(&teacher, &student.join(format!("{at}.safetensors"))));
    println!("KL {early:.3} after 10 steps, {late:.3} at the end");
    assert!(late < 0.5 * early, "{early} -> {late}");
    assert!(divergence(&teacher, &teacher).abs() < 1e-9);
}

/// A teacher's cls token and registers have no place in the student's batches; it sees them all the same.
#[test]
fn prefixes_may_differ() {
    let folder = tempfile::tempdir().unwrap();
    let with = ["train.steps=20", "model.class_token=true", "model.registers=2", "model.pool=cls"];
    for (there, here) in [(&with[..], &[][..]), (&["train.steps=20"], &with[1..])] {
        let teacher = train(recipe(there), folder.path(), "teacher").unwrap();
        let told = format!("distill.teacher={}", teacher.display());
        let student = recipe(&[here, &[&told]].concat());
        let data = source::open(&student.data, 1, student.train.seed).unwrap();
        let mut known = Trained::load(&teacher, &Default::default(), None, 0).unwrap();
        let mut taught = Teacher::load(&student, &data.classes, None).unwrap();
        // What the teacher says of each image in a batch of its own.
        let mut own = BTreeMap::new();
        for loaded in Loader::eval(data.validation.clone(), &known.recipe, 0).unwrap() {
            let batch = loaded.unwrap().batch;
            let logits = known.model.logits(&batch).unwrap();
            for (slot, logits) in logits.chunks_exact(10).enumerate().take(batch.images) {
                let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
                let p = logits.iter().map(|&z| f64::from(z).exp() / sum).collect::<Vec<_>>();
                own.insert(batch.sample_ids[slot], p);
            }
        }
        for loaded in Loader::eval(data.validation.clone(), &student, 0).unwrap() {
            let mut batch = loaded.unwrap().batch;
            taught.teach(&mut batch).unwrap();
            let Targets::Soft(soft) = &batch.targets else { panic!("{:?}", batch.targets) };
            for (slot, got) in soft.chunks_exact(10).enumerate().take(batch.images) {
                let want = own.remove(&batch.sample_ids[slot]).unwrap();
                assert!(got.iter().zip(want).all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5));
            }
        }
        assert!(own.is_empty(), "every image was compared");
        std::fs::remove_dir_all(teacher).unwrap();
    }
}

#[test]
fn a_teacher_that_cannot_see_the_students_batches_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = train(recipe(&["train.steps=2"]), folder.path(), "teacher").unwrap();
    let told = format!("distill.teacher={}", teacher.display());
    let classes: Vec<String> = (0..10).map(|digit| digit.to_string()).collect();
    let refused = |sets: &[&str], classes: &[String]| {
        let recipe = recipe(&[sets, &[&told]].concat());
        let error = Teacher::load(&recipe, classes, None).err().expect("refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    let said = refused(&["model.patch=8"], &classes);
    assert!(said.contains("distill.teacher: ") && said.contains("model.patch is 4 there and 8"), "{said}");
    let said = refused(&["model.channels=3"], &classes);
    assert!(said.contains("model.channels is 1 there and 3"), "{said}");
    let said = refused(&[], &classes[1..]);
    assert!(said.contains("knows 10 classes and the data has 9"), "{said}");
    let nowhere = recipe(&["distill.teacher=runs/nowhere"]);
    let said = Teacher::load(&nowhere, &classes, None).err().unwrap().to_string();
    assert!(said.contains("distill.teacher: ") && said.contains("runs/nowhere"), "{said}");
    // What fits is taken, and says what it is.
    let fits = Teacher::load(&recipe(&[&told, "distill.weight=0.5"]), &classes, None).unwrap();
    assert!(fits.to_string().contains("50 % of the targets"), "{fits}");
}

/// A run that stores its teacher's logits, one that reads them with no teacher, and one whose teacher finds them there
/// learn the same, bit for bit.
#[test]
fn stored_logits_are_as_good_as_the_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = train(recipe(&["train.steps=20"]), folder.path(), "teacher").unwrap();
    let store = folder.path().join("logits");
    let (told, kept) =
        (format!("distill.teacher={}", teacher.display()), format!("distill.store={}", store.display()));
    let views = ["mix.mixup=0.8", "drop.kind=beta", "augment.repeats=2", "train.steps=12"];
    let run = |sets: &[&str], name: &str| {
        let student =
            train(recipe(&[&views[..], &["model.width=24", &kept], sets].concat()), folder.path(), name)?;
        Ok::<_, trencadis::Error>(Weights::load(&student.join("last.safetensors")).unwrap().tensors)
    };
    let first = run(&[&told], "first").unwrap();
    let files = || std::fs::read_dir(&store).unwrap().count();
    assert_eq!(files(), 2, "what the views are, and one file of logits");
    let second = run(&[], "second").unwrap();
    let third = run(&[&told], "third").unwrap();
    assert_eq!(files(), 2, "nothing was missing");
    assert!(first == second && first == third);

    let said = run(&["train.steps=40"], "longer").unwrap_err().to_string();
    assert!(
        said.contains("logits holds no logits of training image") && said.contains("distill.teacher"),
        "{said}"
    );
    run(&["train.steps=14", &told], "filled").unwrap();
    assert_eq!(files(), 3, "what was missing was added");
    let said =
        run(&["model.position.rows=2", "model.position.columns=2"], "smaller").unwrap_err().to_string();
    assert!(
        said.contains("distill.store: ") && said.contains("largest.columns is 16 there and 2 here"),
        "{said}"
    );
    let said = run(&["augment.repeats=3"], "other").unwrap_err();
    assert_eq!(said.exit_code(), 2);
    let said = said.to_string();
    assert!(
        said.contains("distill.store: ") && said.contains("augment.repeats is 2 there and 3 here"),
        "{said}"
    );
    // Another seed holds out other images for validation.
    let said = run(&["train.seed=1"], "split").unwrap_err().to_string();
    assert!(said.contains("holds logits of other training images"), "{said}");
    let none = recipe(&["distill.store=runs/nowhere"]);
    let classes: Vec<String> = (0..10).map(|digit| digit.to_string()).collect();
    let said = Teacher::load(&none, &classes, None).err().unwrap().to_string();
    assert!(said.contains("distill.store: runs/nowhere: holds no logits; set distill.teacher"), "{said}");
}
