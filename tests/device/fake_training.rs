//! `trencadis train --device cuda` over the fake driver: what a run asks a GPU for, step by step.

use std::collections::BTreeSet;
use std::fs;

use trencadis::device::emulator::parameter_bytes;
use trencadis::kernels::registry;
use trencadis::train::checkpoint::load_header;

use crate::fake::Fake;
use crate::support::places;
use crate::timeline::overlaps;

/// Overrides that make the digits a tiny run.
const TINY: [&str; 11] = [
    "model.shape=\"\"",
    "model.width=16",
    "model.depth=1",
    "model.mlp=16",
    "model.heads=1",
    "model.patch=4",
    "packing.tokens=256",
    "train.steps=9",
    "train.warmup=2",
    "train.log_every=1",
    "train.eval_every=0",
];

/// A fake driver that knows the kernels' parameters, in a folder where the program runs.
pub struct Place(pub Fake);

/// What a run of the program left.
pub struct Done {
    code: Option<i32>,
    out: String,
    pub err: String,
    log: Vec<String>,
}

impl Place {
    pub fn new() -> Self {
        let fake = Fake::new();
        let kernels = registry::sources().into_iter().flat_map(|source| source.kernels);
        let line = |name: &str| format!("{name} {}\n", parameter_bytes(name).unwrap());
        let lines: String = kernels.map(|kernel| line(&kernel.name)).collect();
        fs::write(fake.path().join("parameters"), lines).unwrap();
        Self(fake)
    }

    /// `trencadis train --device cuda` with these words and overrides.
    fn run(&self, words: &str, sets: &[&str], settings: &[(&str, &str)]) -> Done {
        let mut command = self.0.command(places::program());
        command.args(["train", "--threads", "2", "--device", "cuda"]).args(words.split_whitespace());
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        command.current_dir(self.0.path()).env("FAKE_CUDA_PARAMETERS", self.0.path().join("parameters"));
        command.envs(settings.iter().copied());
        let (done, log) = self.0.output(command);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Done { code: done.status.code(), out: text(done.stdout), err: text(done.stderr), log }
    }

    /// A tiny run on the digits.
    pub fn train(&self, words: &str, sets: &[&str], settings: &[(&str, &str)]) -> Done {
        self.run(words, &[&TINY, sets].concat(), settings)
    }

    /// The steps that the metrics of `runs/digits-1` have.
    fn steps(&self) -> Vec<u64> {
        let text = fs::read_to_string(self.0.path().join("runs/digits-1/metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter(|line| line["kind"] == "train").map(|line| line["step"].as_u64().unwrap()).collect()
    }
}

impl Done {
    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.out, self.err);
        self
    }

    /// Ends with exit code `code` and one sentence, which it returns.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        let errors: Vec<_> = self.err.lines().skip_while(|line| !line.starts_with("error: ")).collect();
        let [error] = errors[..] else { panic!("one sentence and no more: {}", self.err) };
        error.to_string()
    }

    pub fn count(&self, part: &str) -> usize {
        self.log.iter().filter(|line| line.starts_with(part)).count()
    }

    /// The kernels that were launched in a row or captured together, each with its grid, block and shared memory.
    fn launches(&self) -> Vec<Vec<&str>> {
        let mut rows = vec![Vec::new()];
        for line in &self.log {
            match line.strip_prefix("launch ") {
                Some(launch) => rows.last_mut().unwrap().push(launch.split(", first").next().unwrap()),
                // What the first launch of a kernel brings with it.
                None if line.starts_with("load ") || line.contains(" may have ") => {}
                None => rows.push(Vec::new()),
            }
        }
        rows.retain(|row| !row.is_empty());
        rows
    }

    /// The launches of each batch: those of a training step begin with the gradients.
    fn batches(&self) -> Vec<Vec<&str>> {
        let mut rows = self.launches();
        rows.retain(|row| row[0].starts_with("optim_zero"));
        rows
    }
}

#[test]
fn a_step_is_one_graph() {
    let place = Place::new();
    let done = place.train("", &[], &[]).succeeds();
    assert_eq!(overlaps(&done.log), 8, "every step from the second on is one graph");
    assert_eq!((done.count("capture, "), done.count("captured ")), (2, 2), "one graph a place");
    let batches = done.batches();
    assert_eq!(batches.len(), 3, "the first step, and two captures");
    assert!(batches.iter().all(|batch| *batch == batches[0]));
    let launched = format!("graph of {} launches on ", batches[0].len());
    assert_eq!(done.count(&launched), 8, "a graph is all of a step");

    let plain = place.train("--no-graph", &[], &[]).succeeds();
    assert_eq!((plain.count("capture"), plain.count("graph of")), (0, 0));
    assert_eq!(plain.batches(), vec![batches[0].clone(); 9], "the same launches by themselves");
}

#[test]
fn a_step_of_three_batches_is_three_graphs() {
    let done = Place::new().train("", &["train.accumulate=3", "train.steps=6"], &[]).succeeds();
    assert_eq!(overlaps(&done.log), 6 * 3 - 1, "the first batch is launched plainly");
    assert_eq!((done.count("capture, "), done.batches().len()), (2, 3));
}

#[test]
fn all_memory_is_had_before_the_first_step_and_as_announced() {
    let place = Place::new();
    let sets = [
        "packing.tokens=8192",
        "eval.resolution=32",
        "train.eval_every=2",
        "train.save_every=3",
        "train.ema=0.9",
        "model.drop_path=0.1",
    ];
    let done = place.train("", &sets, &[]).succeeds();
    let first = done.log.iter().position(|line| line.starts_with("launch ")).unwrap();
    let late: Vec<_> = done.log[first..]
        .iter()
        .filter(|line| line.starts_with("alloc") || line.starts_with("pin"))
        .collect();
    assert!(late.is_empty(), "{late:?}");
    let evaluations = done.launches().iter().filter(|row| row[0].starts_with("attention_schedule")).count();
    assert!(evaluations >= 5 && done.err.matches("eval at step ").count() == 5, "{}", done.err);
    assert!(done.count("free") == done.count("alloc") && done.log.last().unwrap() == "release 0");

    let bytes = |line: &String| line.strip_prefix("alloc ").map(|bytes| bytes.parse::<f64>().unwrap());
    let allocated = done.log.iter().filter_map(bytes).sum::<f64>() / f64::from(1 << 20);
    let plan = place.train("--dry-run", &sets, &[]).succeeds();
    let line = plan.out.lines().find_map(|line| line.strip_prefix("device memory     ")).unwrap();
    let announced: f64 = line.split(" MiB").next().unwrap().parse().unwrap();
    assert!((announced - allocated).abs() <= 0.05 * allocated, "{allocated} MiB instead of {line}");
    assert_eq!(plan.count("alloc"), 0, "a plan takes nothing");
}

#[test]
fn too_little_memory_is_said_before_anything_is_made() {
    let place = Place::new();
    // 256 MiB are left to the driver.
    let memory = [("FAKE_CUDA_MEMORY", "269435456")];
    let done = place.train("", &["packing.tokens=2048"], &memory);
    assert!(done.count("alloc") == 0 && done.err.lines().count() == 1, "{}", done.err);
    let error = done.fails(2);
    let lower = "error: the run needs 1.4 MiB of device memory, and of 257 MiB free on Fake GPU 0 it may take 1.0 MiB; \
                 lower packing.tokens from 2048 to ";
    let rest = error.strip_prefix(lower).unwrap_or_else(|| panic!("{error}"));
    let (tokens, rest) = rest.split_once(" (train.accumulate=").unwrap();
    let (accumulate, rest) = rest.split_once(" keeps the size of a step)").unwrap();
    assert!(rest.ends_with("or use --device cpu"), "{error}");
    assert!(!place.0.path().join("runs").exists(), "nothing is left behind");
    // What it advises is enough, and not much less than there is.
    let advised = format!("packing.tokens={tokens}");
    place.train("", &[&advised, &format!("train.accumulate={accumulate}")], &memory).succeeds();
    let tokens: usize = tokens.parse().unwrap();
    place.train("", &[&format!("packing.tokens={}", tokens + 256)], &memory).fails(2);
}

#[test]
fn a_run_survives_a_lost_gpu() {
    let place = Place::new();
    let lost = [("FAKE_CUDA_FAIL_AFTER", "6")];
    let error = place.train("", &["train.save_every=2"], &lost).fails(1);
    assert_eq!(
        error,
        "error: a graph cannot be launched: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure); step 6 is saved, \
         continue with: trencadis train --resume runs/digits-1"
    );
    let done = place.run("--resume runs/digits-1", &[], &[]).succeeds();
    assert!(done.err.contains("run               runs/digits-1, from step 6\n"), "{}", done.err);
    assert_eq!(place.steps(), Vec::from_iter(1..=9));
    assert_eq!(done.count("graph of"), 2, "all but the first step of a process");
}

#[test]
fn a_gpu_lost_before_the_first_checkpoint_is_told_as_such() {
    let place = Place::new();
    let mut sentences = BTreeSet::new();
    for after in ["1", "2", "5"] {
        sentences.insert(place.train("", &[], &[("FAKE_CUDA_FAIL_AFTER", after)]).fails(1));
    }
    let sentence = "error: a graph cannot be launched: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure); nothing is \
                    saved that could be resumed";
    assert_eq!(Vec::from_iter(sentences), [sentence]);
}

/// Wherever the host hears of it: in a step, an evaluation, a save.
#[test]
fn a_gpu_is_lost_at_any_time() {
    let place = Place::new();
    let sets = ["packing.tokens=2048", "train.steps=6", "train.eval_every=4", "train.save_every=2"];
    let mut ends = BTreeSet::new();
    for wait in (16..).step_by(7) {
        let words = format!("--name at-{wait}");
        let done = place.train(&words, &sets, &[("FAKE_CUDA_FAIL_AT_WAIT", &wait.to_string())]);
        if done.code == Some(0) {
            break;
        }
        let error = done.fails(1);
        let (failed, end) = error.split_once("; ").unwrap();
        assert!(failed.contains("the GPU has failed: "), "{error}");
        let run = format!("runs/at-{wait}-1");
        let saved = place.0.path().join(&run).join("last.safetensors");
        let says = match saved.exists() {
            true => {
                let step = load_header(&saved).unwrap().progress.step;
                ends.insert(step);
                format!("step {step} is saved, continue with: trencadis train --resume {run}")
            }
            false => "nothing is saved that could be resumed".into(),
        };
        assert_eq!(end, says);
    }
    assert!([2, 4].iter().all(|step| ends.contains(step)), "{ends:?}");
}
