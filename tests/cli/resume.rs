//! Killed or interrupted at any time, a resumed run ends with the bits of one that was left alone.
#![cfg(unix)]

use std::process::{Child, Stdio};
use std::time::Duration;

use super::*;

/// A child that never outlives its test, whatever fails.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends `name` once the run has come to `step`; whether it was still running.
pub(crate) fn signal_at(
    place: &Place,
    mut command: Command,
    run: &str,
    step: u64,
    name: &str,
) -> (bool, String) {
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut child = Guarded(child);
    let metrics = place.path(run).join("metrics.jsonl");
    let reached = || {
        let text = fs::read_to_string(&metrics).unwrap_or_default();
        text.lines().count() as u64 >= step && exists(place.path(run).join("last.safetensors"))
    };
    while !reached() && child.0.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    let running = child.0.try_wait().unwrap().is_none();
    let status =
        Command::new("kill").args(["-s", name, &child.0.id().to_string()]).stderr(Stdio::null()).status();
    assert!(!running || status.unwrap().success());
    let code = child.0.wait().unwrap().code();
    assert!(!running || code == if name == "KILL" { None } else { Some(0) }, "{name}: {code:?}");
    let mut text = String::new();
    std::io::Read::read_to_string(child.0.stderr.as_mut().unwrap(), &mut text).unwrap();
    (running, text)
}

/// Trains twice with these overrides, once killed in the middle; compares all that is left.
#[track_caller]
fn survives_a_kill(sets: &[&str]) {
    survives_a_kill_on("", sets);
}

/// The same on ranks, as these words ask for them.
#[track_caller]
fn survives_a_kill_on(ranks: &str, sets: &[&str]) {
    survives_a_kill_in(&Place::new(), ranks, sets);
}

/// The same in a place of its own.
#[track_caller]
fn survives_a_kill_in(place: &Place, ranks: &str, sets: &[&str]) {
    let sets = [&["train.steps=240", "train.save_every=5", "train.eval_every=40"], sets].concat();
    place.train(&format!("--name whole {ranks}"), &sets).succeeds();
    let cut = place.training(&format!("--name cut {ranks}"), &sets);
    let (killed, _) = signal_at(place, cut, "runs/cut-1", 12, "KILL");
    assert!(killed, "the run was over before the signal");
    let resumed = place.run(&format!("train --threads 2 {ranks} --resume runs/cut-1")).succeeds();
    assert!(resumed.err.contains("run               runs/cut-1, from step "), "{}", resumed.err);
    for file in ["last", "best"] {
        let bits = |run: &str| place.bits(&format!("runs/{run}-1/{file}.safetensors"));
        assert!(bits("whole") == bits("cut"), "{sets:?}: {file} differs");
    }
    assert_eq!(place.metrics("runs/whole-1"), place.metrics("runs/cut-1"), "{sets:?}");
}

#[test]
fn a_kill_costs_nothing() {
    survives_a_kill(&[]);
}

#[test]
fn a_kill_costs_nothing_with_an_average_and_accumulation() {
    survives_a_kill(&[
        "train.ema=0.9",
        "train.accumulate=2",
        "train.schedule=\"rsqrt\"",
        "train.cooldown=20",
    ]);
}

#[test]
fn a_kill_costs_nothing_where_attention_is_logged() {
    let place = Place::new();
    survives_a_kill_in(&place, "", &["train.log_attention=true", "train.ema=0.9"]);
    let lines = place.metrics("runs/cut-1");
    let attention: Vec<_> = lines.iter().filter(|line| line["kind"] == "attention").collect();
    assert_eq!(attention.len(), 6, "one an evaluation");
}

#[test]
fn a_kill_costs_nothing_with_products_of_bf16() {
    survives_a_kill(&["train.matmul=\"bf16\""]);
}

#[test]
fn a_kill_costs_nothing_on_the_same_ranks() {
    let sets = ["train.ema=0.9", "train.accumulate=4", "drop.kind=\"constant\"", "train.optimizer=\"lamb\""];
    survives_a_kill_on("--ranks 2", &sets);
}

#[test]
fn a_kill_costs_nothing_with_every_kind_of_chance() {
    survives_a_kill(&[
        "train.optimizer=\"lamb\"",
        "model.drop_path=0.3",
        "model.layer_scale=0.1",
        "model.class_token=true",
        "model.pool=\"cls\"",
        "model.registers=2",
        "model.recompute=\"selective\"",
        "drop.kind=\"constant\"",
        "data.flip=true",
        "packing.kind=\"bins\"",
        "packing.sequence=128",
        "packing.open=4",
    ]);
}

/// Recipes of earlier versions say `model.checkpoint`: runs that were begun with them go on.
#[test]
fn a_run_of_an_earlier_version_goes_on() {
    let place = Place::new();
    for (name, set, was, line) in [
        ("kept", "model.recompute=none", "checkpoint = false", None),
        ("again", "model.recompute=full", "checkpoint = true", Some("recompute         full: blocks")),
    ] {
        place.train(&format!("--name {name}"), &[set]).succeeds();
        let last = place.path(&format!("runs/{name}-1/last.safetensors"));
        let mut checkpoint = Weights::load(&last).unwrap();
        let now = set.replace('=', " = \"").replace("model.", "") + "\"";
        let recipe = &checkpoint.metadata["recipe"];
        assert!(recipe.contains(&now), "{recipe}");
        let recipe = recipe.replace(&now, was).replace("\nsteps = 12\n", "\nsteps = 24\n");
        checkpoint.metadata.insert("recipe".into(), recipe);
        checkpoint.save_atomic(&last).unwrap();
        let resumed = place.run(&format!("train --resume runs/{name}-1")).succeeds();
        assert!(resumed.err.contains("from step 12"), "{}", resumed.err);
        assert_eq!(line.is_some_and(|line| resumed.err.contains(line)), line.is_some(), "{}", resumed.err);
        assert_eq!(
            place.metrics(&format!("runs/{name}-1")).iter().filter(|line| line["kind"] == "train").count(),
            24
        );
    }
}

#[test]
fn a_kill_costs_nothing_with_factored_moments_on_ranks() {
    let sets = ["train.optimizer=\"adafactor\"", "train.accumulate=2", "train.ema=0.9"];
    survives_a_kill_on("--ranks 2", &sets);
}

#[test]
fn a_kill_costs_nothing_with_momentum_or_factored_moments() {
    survives_a_kill(&["train.optimizer=\"sgd\"", "train.nesterov=true"]);
    survives_a_kill(&["train.optimizer=\"adafactor\""]);
}

#[test]
fn a_kill_costs_nothing_with_mixed_images_and_a_teacher() {
    let place = Place::new();
    place.train("--name teacher", &["model.depth=2", "train.lr=0.01"]).succeeds();
    let mixed = ["mix.mixup=0.8", "mix.cutmix=1", "mix.prob=0.8", "data.flip=true", "drop.kind=\"constant\""];
    let taught = ["distill.teacher=\"runs/teacher-1\"", "distill.weight=0.7", "train.label_smoothing=0.1"];
    survives_a_kill_in(&place, "", &[&mixed[..], &taught].concat());
}

#[test]
fn a_kill_costs_nothing_on_photos() {
    let place = Place::new();
    place.photos("photos", 12);
    let sets =
        ["train.steps=100", "train.save_every=4", "model.patch=8", "resolution.min=16", "resolution.max=32"];
    let words = |name: &str| format!("--data photos --name {name}");
    place.train(&words("whole"), &sets).succeeds();
    signal_at(&place, place.training(&words("cut"), &sets), "runs/cut-1", 10, "KILL");
    place.run("train --threads 2 --resume runs/cut-1").succeeds();
    let bits = |run: &str| place.bits(&format!("runs/{run}-1/last.safetensors"));
    assert!(bits("whole") == bits("cut"));
}

#[test]
fn an_interrupt_saves_and_a_finished_run_says_so() {
    let place = Place::new();
    let sets = ["train.steps=240", "train.save_every=5"];
    place.train("--name whole", &sets).succeeds();
    for (number, name) in (1..).zip(["INT", "TERM"]) {
        let run = format!("runs/cut-{number}");
        let (interrupted, err) = signal_at(&place, place.training("--name cut", &sets), &run, 8, name);
        assert!(interrupted, "the run was over before the signal");
        let last = err.lines().last().unwrap();
        let advice = format!("; continue with: trencadis train --resume {run}");
        let step: u64 =
            last.strip_prefix("stopped after step ").unwrap().strip_suffix(&advice).unwrap().parse().unwrap();
        let progress =
            place.checkpoint(&format!("{run}/last.safetensors")).metadata.remove("progress").unwrap();
        let progress: serde_json::Value = serde_json::from_str(&progress).unwrap();
        assert_eq!(progress["step"], step, "saved at the step that it names");
        place.run(&format!("train --threads 2 --resume {run}")).succeeds();
        let bits = |run: &str| place.bits(&format!("{run}/last.safetensors"));
        assert!(bits("runs/whole-1") == bits(&run), "{name}");
        assert_eq!(place.metrics("runs/whole-1"), place.metrics(&run));
    }
    let before = fs::read(place.path("runs/cut-1/last.safetensors")).unwrap();
    place.run("train --resume runs/cut-1").succeeds().says(&[
        "runs/cut-1 is finished",
        "all 240 steps",
        "--init",
    ]);
    assert_eq!(fs::read(place.path("runs/cut-1/last.safetensors")).unwrap(), before);
}
