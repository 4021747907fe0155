//! `trencadis` on texts: trained, resumed, evaluated, and refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::{TempDir, tempdir};
use trencadis::data::tokenizer::{BUILT_IN, Tokenizer};
use trencadis::weights::Weights;

use super::TINY;
use super::captions::{png, write};
use super::support::places;

struct Place(TempDir);

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, words: &str, sets: &[&str]) -> Command {
        let mut command = Command::new(places::program());
        command.args(words.split_whitespace()).current_dir(self.0.path()).env("CUDA_VISIBLE_DEVICES", "");
        sets.iter().for_each(|set| _ = command.args(["--set", set]));
        command
    }

    /// Exit code, and both outputs.
    fn run(&self, words: &str, sets: &[&str]) -> (Option<i32>, String) {
        let done = self.command(words, sets).output().unwrap();
        (done.status.code(), [done.stdout, done.stderr].map(|text| String::from_utf8(text).unwrap()).concat())
    }

    #[track_caller]
    fn succeeds(&self, words: &str, sets: &[&str]) -> String {
        let (code, text) = self.run(words, sets);
        assert_eq!(code, Some(0), "{words}: {text}");
        text
    }

    #[track_caller]
    fn refuses(&self, words: &str, sets: &[&str], part: &str) {
        let (code, text) = self.run(words, sets);
        assert_eq!(code, Some(2), "{words}: {text}");
        assert!(
            text.contains(part) && text.trim_end().lines().last().unwrap().starts_with("error: "),
            "{text}"
        );
    }

    fn bits(&self, name: &str) -> BTreeMap<String, Vec<u32>> {
        let weights = Weights::load(&self.path(name)).unwrap();
        weights
            .tensors
            .into_iter()
            .map(|(name, (_, v))| (name, v.iter().map(|x| x.to_bits()).collect()))
            .collect()
    }
}

fn with<'a>(sets: &[&'a str]) -> Vec<&'a str> {
    [&TINY[..], sets].concat()
}

/// What is learned from captions tells the digits by their names.
#[test]
fn digits_are_told_by_their_names() {
    let place = Place(tempdir().unwrap());
    let said = place.succeeds(
        "train captions --threads 2 --name run",
        &["train.steps=400", "train.schedule=constant", "train.eval_every=200", "train.ema=0.9"],
    );
    assert!(said.contains("run               "), "{said}");
    fs::write(place.path("prompts.txt"), "# two of them\na {} written by hand\nthe number {}\n").unwrap();
    let said = place.succeeds("eval runs/run-1 --suite zero-shot --prompts prompts.txt", &[]);
    assert!(said.contains("prompts           a {} written by hand; the number {}"), "{said}");
    let report: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(place.path("runs/run-1/eval/zero-shot.json")).unwrap())
            .unwrap();
    let top1 = report["top1"].as_f64().unwrap();
    assert!(top1 > 0.4, "ten classes, {top1}: {said}");
    assert_eq!(report["alone"].as_array().unwrap().len(), 2);
    assert_eq!(report["classes"].as_array().unwrap().len(), 10);
    assert!(
        fs::read_to_string(place.path("runs/run-1/eval/zero-shot.svg"))
            .unwrap()
            .contains("Zero-shot accuracy by class")
    );
    // Whatever tells classes works with those of the data, in the recipe's prompts.
    let said = place.succeeds("eval runs/run-1 --json", &[]);
    let plain: serde_json::Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert!(plain["top1"].as_f64().unwrap() > 0.4, "{said}");
    let metrics = fs::read_to_string(place.path("runs/run-1/metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!((last["kind"].as_str(), last["top1"].as_f64()), (Some("eval"), plain["top1"].as_f64()));
    // A suite before another leaves it the model as it was.
    place.succeeds("eval runs/run-1 --suite calibration --out alone", &[]);
    place.succeeds("eval runs/run-1 --suite zero-shot,calibration --prompts prompts.txt --out after", &[]);
    let calibration = |folder: &str| fs::read(place.path(folder).join("calibration.json")).unwrap();
    assert!(calibration("alone") == calibration("after"));
    for (text, part) in [("no place\n", "must stand once"), ("\n# nothing\n", "holds no template")] {
        fs::write(place.path("prompts.txt"), text).unwrap();
        place.refuses("eval runs/run-1 --suite zero-shot --prompts prompts.txt", &[], part);
    }
}

/// A resumed run has the bits of one that was left alone, by either loss.
#[test]
fn resumed_bit_for_bit() {
    for loss in ["contrastive.loss=softmax", "contrastive.loss=sigmoid"] {
        let place = Place(tempdir().unwrap());
        let sets =
            with(&[loss, "train.steps=40", "train.warmup=2", "train.eval_every=20", "train.save_every=3"]);
        place.succeeds("train captions --threads 2 --name whole", &sets);
        let mut half = place.command("train captions --threads 2 --name half", &sets);
        let mut half = half.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !place.path("runs/half-1/last.safetensors").exists() && half.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        half.kill().unwrap();
        half.wait().unwrap();
        let said = place.succeeds("train --threads 2 --resume runs/half-1", &[]);
        assert!(said.contains(", from step "), "{said}");
        assert_eq!(
            place.bits("runs/whole-1/last.safetensors"),
            place.bits("runs/half-1/last.safetensors"),
            "{loss}"
        );
        let names = place.bits("runs/whole-1/last.safetensors");
        assert!(names.contains_key("text.embed.token") && names.contains_key("patch_embed.weight"));
        assert!(!names.contains_key("head.weight"));
        assert_eq!(names.contains_key("contrastive.bias"), loss.contains("sigmoid"));
    }
}

/// Locked-image tuning: the image tower comes out as it went in, and the texts have learned.
#[test]
fn a_locked_image_tower_stays() {
    let place = Place(tempdir().unwrap());
    let image: Vec<&str> = TINY.iter().copied().filter(|set| !set.starts_with("text.")).collect();
    let short = ["train.steps=6", "train.warmup=1", "train.eval_every=0"];
    place.succeeds("train digits --threads 2 --name classes", &[&image[..], &short].concat());
    let lock = ["contrastive.lock_image=true", "train.ema=0.5", "train.weight_decay=0.3"];
    let sets = with(&[&short[..], &lock].concat());
    let said =
        place.succeeds("train captions --threads 2 --name lit --init runs/classes-1/best.safetensors", &sets);
    assert!(said.contains("fresh             the text tower"), "{said}");
    let (before, after) =
        (place.bits("runs/classes-1/best.safetensors"), place.bits("runs/lit-1/last.safetensors"));
    let tower: Vec<_> = before
        .iter()
        .filter(|(name, _)| !name.starts_with("head.") && !name.starts_with("training."))
        .collect();
    assert!(tower.len() > 10);
    for (name, bits) in tower {
        assert_eq!(after.get(name), Some(bits), "{name}");
        assert_eq!(after.get(&format!("training.weights.{name}")), Some(bits), "{name}");
    }
    let learned = |name: &str| after[&format!("training.m.{name}")].iter().any(|bits| *bits != 0);
    assert!(learned("text.embed.token") && learned("contrastive.scale") && !learned("patch_embed.weight"));
    place.refuses("train captions --threads 2", &sets, "contrastive.lock_image = true trains a text tower to a trained image tower; give its weights with --init");
    place.refuses("eval runs/classes-1 --suite zero-shot", &[], "was trained on classes and knows no texts");
}

/// Where the data have no classes, there is nothing to classify: texts are found, and classes are told by other data.
#[test]
fn captions_alone_know_no_classes() {
    let place = Place(tempdir().unwrap());
    for (number, word) in ["zero", "one", "two", "three", "four", "five", "six", "seven"].iter().enumerate() {
        write(place.path(&format!("flat/{number}.png")), png());
        write(place.path(&format!("flat/{number}.txt")), format!("the digit {word}"));
    }
    write(place.path("classes/six/1.png"), png());
    write(place.path("classes/one/2.png"), png());
    let sets = with(&["train.steps=3", "train.warmup=1", "data.validation=0.5"]);
    place.succeeds("train captions --threads 2 --name run --data flat", &sets);
    let said = place.succeeds("eval runs/run-1", &[]);
    assert!(said.contains("images            4\n") && said.contains("retrieval         "), "{said}");
    assert!(!said.contains("top-1"), "{said}");
    let said: serde_json::Value =
        serde_json::from_str(&place.succeeds("eval runs/run-1 --json --resolution 12", &[])).unwrap();
    assert_eq!((said["images"].as_u64(), said["resolution"].as_u64()), (Some(4), Some(12)));
    assert!(said["retrieval"].is_number() && said.get("top1").is_none(), "{said}");
    for words in ["predict runs/run-1 flat/1.png", "eval runs/run-1 --suite calibration"] {
        place.refuses(
            words,
            &[],
            "the data that the model was trained on had no classes; evaluate it on data that",
        );
    }
    place.refuses("eval runs/run-1 --suite zero-shot", &[], "there are no classes to tell apart");
    place.succeeds("report runs/run-1", &[]);
    let said = place.succeeds("eval runs/run-1 --suite zero-shot --data classes", &[]);
    assert!(said.contains("six"), "{said}");
}

/// Weights go on to another objective without what it has no use for, and only with the tokens that they know.
#[test]
fn weights_start_other_objectives() {
    let place = Place(tempdir().unwrap());
    let short = ["train.steps=2", "train.warmup=1"];
    let sets = with(&short);
    let sigmoid = with(&[&short[..], &["contrastive.loss=sigmoid"]].concat());
    let image: Vec<&str> = sets.iter().copied().filter(|set| !set.starts_with("text.")).collect();
    place.succeeds("train captions --threads 2 --name texts", &sets);
    let said = place.succeeds("train digits --threads 2 --name classes --init runs/texts-1", &image);
    assert!(said.contains("left out          the text tower") && said.contains("head.weight"), "{said}");
    let said = place.succeeds("train captions --threads 2 --name sigmoid --init runs/texts-1", &sigmoid);
    assert!(said.contains("fresh             contrastive.bias\n"), "{said}");
    let said = place.succeeds("train captions --threads 2 --name softmax --init runs/sigmoid-1", &sets);
    assert!(
        said.contains("left out          contrastive.bias, which contrastive.loss does not have"),
        "{said}"
    );
    // The same tokenizer in other words, and one whose numbers differ.
    let mut json: serde_json::Value =
        serde_json::from_str(Tokenizer::open(BUILT_IN).unwrap().json()).unwrap();
    let of_file = [&sets[..], &["text.tokenizer='mine.json'"]].concat();
    write(place.path("mine.json"), serde_json::to_string_pretty(&json).unwrap());
    place.succeeds("train captions --threads 2 --name same --init runs/texts-1", &of_file);
    let words = json["model"]["vocab"].as_object_mut().unwrap();
    (words["six"], words["one"]) = (words["one"].clone(), words["six"].clone());
    write(place.path("mine.json"), json.to_string());
    let told = "was trained with another tokenizer than text.tokenizer = \"mine.json\"";
    place.refuses("train captions --threads 2 --name other --init runs/texts-1", &of_file, told);
    let mut input = Weights::default();
    input.tensors.insert("image.0".into(), (vec![1, 8, 8], vec![0.5; 64]));
    input.save_atomic(&place.path("in.safetensors")).unwrap();
    place.refuses(
        "forward --weights runs/texts-1/last.safetensors --input in.safetensors --output out.safetensors",
        &[],
        "the model was trained on texts and has no head",
    );
}

/// Keys that contradict each other are named together.
#[test]
fn contradictions_are_named() {
    let place = Place(tempdir().unwrap());
    for (set, parts) in [
        ("mix.mixup=0.2", ["mix.mixup = 0.2", "text.tokenizer = \"built-in\""]),
        ("distill.teacher=\"x\"", ["distill.teacher = \"x\"", "text.tokenizer"]),
        ("train.label_smoothing=0.1", ["train.label_smoothing = 0.1", "text.tokenizer"]),
        ("augment.repeats=2", ["augment.repeats = 2", "text.tokenizer = \"built-in\""]),
        ("train.accumulate=2", ["train.accumulate = 2", "text.tokenizer"]),
        ("train.loss=sigmoid", ["train.loss is of classes", "contrastive.loss"]),
        ("text.vocabulary=7", ["text.vocabulary = 7", "knows 159 tokens"]),
        ("text.max_tokens=0", ["text.max_tokens must lie in 1..65535", ""]),
        ("text.heads=5", ["text.heads = 5", "text.width = 8"]),
        ("text.prompts=[]", ["text.prompts holds no template", ""]),
        ("text.tokenizer=\"gone.json\"", ["gone.json: the tokenizer cannot be read", "built-in"]),
    ] {
        for part in parts {
            place.refuses("train captions --threads 2", &with(&[set]), part);
        }
    }
    // Before anything is written.
    let few = ["text.max_tokens=2", "text.prompts=[\"the digit {}\"]"];
    place.refuses(
        "train captions --threads 2",
        &with(&few),
        "the prompt `the digit 0` has more tokens than text.max_tokens = 2; shorten the class's name or its template",
    );
    assert!(!place.path("runs").exists());
    place.refuses("train digits --threads 2", &["contrastive.lock_image=true"], "text.tokenizer = \"\"");
    let lock = with(&["contrastive.lock_image=true"]);
    place.refuses("train captions --dry-run", &lock, "give its weights with --init");
    place.refuses("train captions --threads 2 --ranks 2", &TINY, "one rank does alone");
    let said = place.succeeds("inspect model captions", &TINY);
    assert!(said.contains("text.embed.token") && said.contains("text tower"), "{said}");
    place.succeeds("train captions --dry-run", &TINY);
}
