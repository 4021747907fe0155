//! Training and evaluation on a device, through the launches that a GPU gets: here on the emulator.
#![cfg(feature = "emulator")]

use super::*;
#[cfg(unix)]
use crate::resume::signal_at;

/// Overrides besides [`TINY`] that leave little to emulate.
const SMALL: [&str; 6] = [
    "model.patch=4",
    "model.depth=1",
    "packing.tokens=128",
    "resolution.max=16",
    "train.steps=6",
    "train.eval_every=0",
];

fn small<'a>(sets: &[&'a str]) -> Vec<&'a str> {
    SMALL.iter().copied().chain(sets.iter().copied()).collect()
}

/// The metric lines of kind `train`: loss and gradient norm.
fn losses(place: &Place, run: &str) -> Vec<[f64; 2]> {
    let lines = place.metrics(run);
    let train = lines.iter().filter(|line| line["kind"] == "train");
    train.map(|line| ["loss", "grad_norm"].map(|key| line[key].as_f64().unwrap())).collect()
}

#[track_caller]
fn follows(got: &[[f64; 2]], want: &[[f64; 2]], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        assert!((got - want).abs() <= tolerance * want.abs(), "{got} instead of {want}");
    }
}

/// The same run on the CPU and on a device; the checkpoint of the one is evaluated and used on the other.
#[test]
fn a_run_on_a_device_follows_the_cpu() {
    let place = Place::new();
    let sets = small(&["train.ema=0.9", "train.accumulate=2"]);
    let done = place.train("--name there --device emulator", &sets).succeeds();
    assert_eq!(done.out.lines().next(), Some("device            emulator, for tests"));
    done.says_err(&["device memory     ", "weights and optimiser", "workspace"]);
    place.train("--name here --device cpu", &sets).succeeds();
    follows(&losses(&place, "runs/there-1"), &losses(&place, "runs/here-1"), 0.02);

    let eval = |device: &str, run: &str| {
        let done = place.run(&format!("eval runs/{run}-1 --json --device {device}")).succeeds();
        let line = &json_lines(&done.out)[0];
        ["top1", "loss"].map(|key| line[key].as_f64().unwrap())
    };
    for run in ["there", "here"] {
        let ([top1, loss], [wanted, wanted_loss]) = (eval("emulator", run), eval("cpu", run));
        assert!((top1 - wanted).abs() <= 0.02 && (loss - wanted_loss).abs() <= 0.01, "{run}: {top1} {loss}");
    }
}

/// Killed in the middle and resumed, with graphs or without, a run ends with the bits of one that was left alone;
/// resumed on the other device it goes on from the same place.
#[test]
#[cfg(unix)]
fn a_kill_costs_nothing_on_a_device() {
    let place = Place::new();
    let sets = small(&["train.steps=14", "train.save_every=2", "model.drop_path=0.3"]);
    place.train("--name whole --device emulator", &sets).succeeds();
    let bits = |run: &str| place.bits(&format!("runs/{run}-1/last.safetensors"));
    for (name, words) in [("cut", "--device emulator"), ("plain", "--device emulator --no-graph")] {
        let command = place.training(&format!("--name {name} {words}"), &sets);
        let (killed, _) = signal_at(&place, command, &format!("runs/{name}-1"), 4, "KILL");
        assert!(killed, "the run was over before the signal");
        let copy = format!("runs/{name}-2");
        fs::create_dir(place.path(&copy)).unwrap();
        for file in ["recipe.toml", "last.safetensors", "metrics.jsonl"] {
            fs::copy(place.path(&format!("runs/{name}-1")).join(file), place.path(&copy).join(file)).unwrap();
        }
        place.run(&format!("train --threads 2 --resume runs/{name}-1 {words}")).succeeds();
        assert!(bits("whole") == bits(name), "{name}");
        assert_eq!(place.metrics("runs/whole-1"), place.metrics(&format!("runs/{name}-1")), "{name}");
        place.run(&format!("train --threads 2 --resume {copy} --device cpu")).succeeds();
        follows(&losses(&place, &copy), &losses(&place, "runs/whole-1"), 0.05);
    }
}

#[test]
#[cfg(unix)]
fn a_run_of_the_cpu_goes_on_on_a_device() {
    let place = Place::new();
    let sets = small(&["train.steps=400", "train.save_every=2"]);
    let (killed, _) = signal_at(&place, place.training("", &sets), "runs/digits-1", 380, "INT");
    assert!(killed, "the run was over before the signal");
    place.run("train --threads 2 --resume runs/digits-1 --device emulator").succeeds();
    place.train("--name whole", &sets).succeeds();
    follows(&losses(&place, "runs/digits-1")[380..], &losses(&place, "runs/whole-1")[380..], 0.2);
}

/// A loss that is not finite is told by its step, though the next is under way by then.
#[test]
fn a_loss_that_is_not_finite_ends_a_run_on_a_device() {
    let place = Place::new();
    let sets = small(&["train.lr=1e30", "train.warmup=0", "train.clip=0.0", "train.save_every=1"]);
    let done = place.train("--device emulator", &sets);
    assert_eq!(done.code, Some(1), "{}", done.err);
    done.says_err(&[
        "error: step ",
        " is NaN; the last good checkpoint is runs/digits-1/last.safetensors of step ",
    ]);
}

#[test]
fn what_a_device_cannot_do_is_said_at_the_start() {
    let place = Place::new();
    let no_kernel = [(
        "model.head_dim=12",
        ["model.head_dim = 12 has no kernel on a GPU", "model.head_dim = 8 or 16, or use"],
    )];
    for (set, parts) in no_kernel {
        for words in ["--device emulator", "--device emulator --dry-run"] {
            place.train(words, &[set]).refuses(&parts);
        }
        assert!(!exists(place.path("runs")), "{set}: nothing is left behind");
    }
    let large = ["model.width=1024", "model.heads=16", "model.mlp=4096", "model.depth=24"];
    let said = place.train("--device emulator --dry-run", &[&large[..], &["packing.tokens=131072"]].concat());
    said.refuses(&[
        "the run needs ",
        " GiB of device memory and 16.0 GiB of emulator are free; lower packing.tokens from 131072 to ",
        "train.accumulate=",
        "model.checkpoint=true, which needs ",
        "or use --device cpu",
    ]);
    let huge = ["model.width=8192", "model.heads=64", "model.mlp=32768", "model.depth=40"];
    place.train("--device emulator --dry-run", &huge).refuses(&["take a smaller model", "alone are "]);
    place.train("--device emulator --dry-run", &[]).succeeds().says(&["device memory     ", "evaluation"]);
    if trencadis::device::Device::cuda(0).is_err() {
        place.train("--device cuda", &[]).refuses(&["--device cuda: ", "use --device cpu"]);
        let plan = place.train("--device cuda --dry-run", &[]).succeeds();
        plan.says(&[
            "device            NVIDIA H100 80GB HBM3, assumed as there is no GPU",
            "device memory     ",
        ]);
    }
}
