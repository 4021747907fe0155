//! Training and evaluation on the devices that have kernels: the emulator, where the feature is on, and a GPU, where
//! there is one.

use trencadis::device::Device;

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

/// What `--device` takes here.
fn devices() -> Vec<&'static str> {
    let emulator = cfg!(feature = "emulator").then_some("emulator");
    let gpu = Device::cuda(0).is_ok().then_some("cuda");
    emulator.into_iter().chain(gpu).collect()
}

/// The metric lines of kind `train`: loss and gradient norm.
fn losses(place: &Place, run: &str) -> Vec<[f64; 2]> {
    let lines = place.metrics(run);
    let train = lines.iter().filter(|line| line["kind"] == "train");
    train.map(|line| ["loss", "grad_norm"].map(|key| line[key].as_f64().unwrap())).collect()
}

#[track_caller]
fn follows(got: &[[f64; 2]], want: &[[f64; 2]], tolerance: f64) {
    assert!(got.len() == want.len() && !got.is_empty());
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        assert!((got - want).abs() <= tolerance * want.abs(), "{got} instead of {want}");
    }
}

/// The same run on the CPU and on a device; the checkpoint of the one is evaluated and used on the other, also at a
/// resolution above the training's.
#[test]
fn a_run_on_a_device_follows_the_cpu() {
    let sets = small(&[
        "train.ema=0.9",
        "train.accumulate=3",
        "eval.resolution=24",
        "model.position.coordinate=\"fractional\"",
    ]);
    for device in devices() {
        let place = Place::new();
        let done = place.train(&format!("--name there --device {device}"), &sets).succeeds();
        assert!(!done.out.lines().next().unwrap().starts_with("device            cpu"), "{}", done.out);
        done.says_err(&["device memory     ", "weights and optimiser", "workspace"]);
        place.train("--name here --device cpu", &sets).succeeds();
        follows(&losses(&place, "runs/there-1"), &losses(&place, "runs/here-1"), 0.02);

        let eval = |device: &str, run: &str| {
            let done = place
                .run(&format!("eval runs/{run}-1 --json --resolution 0,12 --device {device}"))
                .succeeds();
            let numbers = |line: &serde_json::Value| ["top1", "loss"].map(|key| line[key].as_f64().unwrap());
            json_lines(&done.out).iter().map(numbers).collect::<Vec<_>>()
        };
        for run in ["there", "here"] {
            for ([top1, loss], [wanted, wanted_loss]) in eval(device, run).into_iter().zip(eval("cpu", run)) {
                let close = (top1 - wanted).abs() <= 0.03 && (loss - wanted_loss).abs() <= 0.01;
                assert!(close, "{run}: {top1} {loss} instead of {wanted} {wanted_loss}");
            }
        }
        // What the head sees of the images.
        let few_shot = |device: &str| {
            let words = "eval runs/here-1 --suite few-shot --shots 3 --seeds 1 --json --device";
            let done = place.run(&format!("{words} {device}")).succeeds();
            json_lines(&done.out)[0]["few_shot"][0]["by_l2"][0]["top1"].as_f64().unwrap()
        };
        let (top1, wanted) = (few_shot(device), few_shot("cpu"));
        assert!((top1 - wanted).abs() <= 0.05, "{top1} instead of {wanted}");
    }
}

/// Ranks that share a device, on either axis, and a run of theirs that one rank goes on with.
#[test]
fn ranks_share_a_device() {
    let sets = small(&["train.ema=0.9", "train.accumulate=2", "train.steps=3", "model.heads=2"]);
    for device in devices() {
        let place = Place::new();
        place.train(&format!("--name one --device {device}"), &sets).succeeds();
        for (name, ranks) in [("data", "--ranks 2"), ("tensor", "--ranks 2 --tensor 2")] {
            let done = place.train(&format!("--name {name} --device {device} {ranks}"), &sets).succeeds();
            done.says_err(&["device memory     ", "mesh              "]);
            follows(&losses(&place, &format!("runs/{name}-1")), &losses(&place, "runs/one-1"), 0.02);
            place.run(&format!("eval runs/{name}-1 --device {device}")).succeeds();
        }
        let words = format!("--dry-run --device {device} --ranks 2");
        place.train(&words, &sets).succeeds().says(&["device memory     ", "mesh              2 x 1"]);
    }
}

/// Where patches are made changes no bit, neither of a run alone nor of one with mixed images and a teacher that has other
/// prefix tokens, nor on several ranks. On the CPU the host makes them.
#[test]
fn patches_are_made_on_the_device_or_on_the_host() {
    let plain = ["augment.color_jitter=0.4", "data.flip=true", "train.save_every=3"];
    let taught =
        ["mix.mixup=0.8", "mix.cutmix=1", "model.class_token=true", "distill.teacher=\"runs/teacher-1\""];
    for device in devices() {
        let place = Place::new();
        place.train("--name teacher --device cpu", &small(&["model.registers=2"])).succeeds();
        for (name, sets, words) in [
            ("plain", &plain[..], ""),
            ("taught", &taught[..], ""),
            ("ranks", &["train.accumulate=2"], " --ranks 2"),
        ] {
            let run = |views: &str| {
                let made = format!("data.views={views}");
                let sets = [sets, &[&made[..]]].concat();
                let words = format!("--name {name}-{views} --device {device}{words}");
                let done = place.train(&words, &small(&sets)).succeeds();
                (losses(&place, &format!("runs/{name}-{views}-1")), done)
            };
            let ((host, _), (there, done)) = (run("host"), run("device"));
            assert!(!host.is_empty() && host == there, "{name}: {there:?} instead of {host:?}");
            done.says_err(&["patches           made on the device, of images as they are decoded"]);
            let bits = |views: &str| place.bits(&format!("runs/{name}-{views}-1/last.safetensors"));
            assert!(bits("host") == bits("device"), "{name}");
        }
        place.run(&format!("eval runs/plain-device-1 --device {device}")).succeeds();
    }
    let place = Place::new();
    let sets = ["data.views=device", "train.steps=2"];
    let done = place.train("--device cpu", &small(&sets)).succeeds();
    done.says_err(&["patches           made on the host: data.views = \"device\" is for a GPU"]);
}

/// Killed in the middle and resumed, with graphs or without, a run ends with the bits of one that was left alone;
/// resumed on the CPU it goes on from the same place.
#[test]
#[cfg(unix)]
fn a_kill_costs_nothing_on_a_device() {
    let sets = small(&["train.steps=14", "train.save_every=2", "model.drop_path=0.3"]);
    for device in devices() {
        let place = Place::new();
        place.train(&format!("--name whole --device {device}"), &sets).succeeds();
        let bits = |run: &str| place.bits(&format!("runs/{run}-1/last.safetensors"));
        for (name, graphs) in [("cut", ""), ("plain", " --no-graph")] {
            let words = format!("--device {device}{graphs}");
            let command = place.training(&format!("--name {name} {words}"), &sets);
            let (killed, _) = signal_at(&place, command, &format!("runs/{name}-1"), 4, "KILL");
            assert!(killed, "the run was over before the signal");
            let copy = format!("runs/{name}-2");
            fs::create_dir(place.path(&copy)).unwrap();
            for file in ["recipe.toml", "last.safetensors", "metrics.jsonl"] {
                let from = place.path(&format!("runs/{name}-1")).join(file);
                fs::copy(from, place.path(&copy).join(file)).unwrap();
            }
            place.run(&format!("train --threads 2 --resume runs/{name}-1 {words}")).succeeds();
            assert!(bits("whole") == bits(name), "{name}");
            assert_eq!(place.metrics("runs/whole-1"), place.metrics(&format!("runs/{name}-1")), "{name}");
            place.run(&format!("train --threads 2 --resume {copy} --device cpu")).succeeds();
            follows(&losses(&place, &copy), &losses(&place, "runs/whole-1"), 0.05);
        }
    }
}

/// Interrupted with steps under way, a run saves the step that it names, and goes on from there.
#[test]
#[cfg(unix)]
fn an_interrupt_saves_on_a_device() {
    let sets = small(&["train.steps=14", "train.save_every=3", "train.accumulate=2", "train.ema=0.5"]);
    for device in devices() {
        let place = Place::new();
        place.train(&format!("--name whole --device {device}"), &sets).succeeds();
        let command = place.training(&format!("--name cut --device {device}"), &sets);
        let (interrupted, err) = signal_at(&place, command, "runs/cut-1", 4, "INT");
        assert!(interrupted, "the run was over before the signal");
        let last = err.lines().last().unwrap();
        assert!(last.starts_with("stopped after step ") && last.contains("--resume runs/cut-1"), "{err}");
        place.run(&format!("train --threads 2 --resume runs/cut-1 --device {device}")).succeeds();
        let bits = |run: &str| place.bits(&format!("runs/{run}-1/last.safetensors"));
        assert!(bits("whole") == bits("cut"));
        assert_eq!(place.metrics("runs/whole-1"), place.metrics("runs/cut-1"));
    }
}

/// A finished run of the CPU that is given more steps goes on on a device as on the CPU.
#[test]
fn a_run_of_the_cpu_goes_on_on_a_device() {
    for device in devices() {
        let place = Place::new();
        for (name, device) in [("here", "cpu"), ("there", device)] {
            place.train(&format!("--name {name} --device cpu"), &small(&[])).succeeds();
            let last = place.path(&format!("runs/{name}-1/last.safetensors"));
            let mut checkpoint = Weights::load(&last).unwrap();
            let recipe = checkpoint.metadata["recipe"].replace("\nsteps = 6\n", "\nsteps = 12\n");
            assert_ne!(checkpoint.metadata.insert("recipe".into(), recipe.clone()), Some(recipe));
            checkpoint.save_atomic(&last).unwrap();
            place.run(&format!("train --threads 2 --resume runs/{name}-1 --device {device}")).succeeds();
        }
        let [here, there] = ["here", "there"].map(|run| losses(&place, &format!("runs/{run}-1")));
        assert_eq!((here.len(), &here[..6]), (12, &there[..6]));
        follows(&there[6..], &here[6..], 0.02);
    }
}

/// A loss that is not finite is told by its step, though the next is under way by then.
#[test]
fn a_loss_that_is_not_finite_ends_a_run_on_a_device() {
    let sets = small(&["train.lr=1e30", "train.warmup=0", "train.clip=0.0"]);
    for device in devices() {
        let place = Place::new();
        let done = place.train(&format!("--device {device}"), &sets);
        assert_eq!(done.code, Some(1), "{}", done.err);
        done.says_err(&["error: step ", " is NaN; no checkpoint had been saved yet; lower train.lr"]);
    }
}

/// Images that cannot be read any more end a run whose last good step is saved, though others were under way.
#[test]
fn a_data_error_saves_what_has_run_on_a_device() {
    let sets = small(&[
        "data.max_unreadable=0.4",
        "model.patch=8",
        "resolution.min=16",
        "resolution.max=24",
        "train.steps=4000",
        "data.cache_mib=0",
    ]);
    for device in devices() {
        let place = Place::new();
        place.photos("photos", 12);
        let command = place.training(&format!("--data photos --device {device}"), &sets);
        let child = std::thread::spawn(move || Done::of(command));
        let metrics = place.path("runs/photos-1/metrics.jsonl");
        while fs::read_to_string(&metrics).unwrap_or_default().lines().count() < 3 && !child.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for class in ["a", "b"] {
            (0..12).for_each(|i| place.write(&format!("photos/{class}/{i}.png"), "no image"));
        }
        let done = child.join().unwrap();
        // Too many of them, or a whole step of them: whichever comes first.
        assert!(matches!(done.code, Some(1 | 2)), "{}", done.err);
        let said = done.err.lines().last().unwrap();
        let cause = said.contains("max_unreadable") || said.contains("no image of the step could be read");
        assert!(cause && said.contains("is saved, continue with"), "{said}");
        let metadata = place.checkpoint("runs/photos-1/last.safetensors").metadata;
        let progress: serde_json::Value = serde_json::from_str(&metadata["progress"]).unwrap();
        assert_eq!(metadata["optimizer_step"], progress["step"].to_string());
        assert!(said.contains(&format!("step {} is saved", progress["step"])), "{said}");
    }
}

#[cfg(feature = "emulator")]
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
        " GiB of device memory, and of 16.0 GiB free on emulator it may take 15.7 GiB; lower packing.tokens from 131072 to ",
        "train.accumulate=",
        "model.recompute=full, which needs ",
        "or use --device cpu",
    ]);
    // Norms and GELU are enough where little is missing.
    let less = place.train("--device emulator --dry-run", &[&large[..], &["packing.tokens=16384"]].concat());
    less.refuses(&["model.recompute=selective, which needs "]);
    let fits = [&large[..], &["packing.tokens=16384", "model.recompute=selective"]].concat();
    let plan = place.train("--device emulator --dry-run", &fits).succeeds();
    plan.says(&["recompute         selective: norms and GELU\n", "device memory     "]);
    let huge = ["model.width=8192", "model.heads=64", "model.mlp=32768", "model.depth=40"];
    place.train("--device emulator --dry-run", &huge).refuses(&["take a smaller model", "alone are "]);
    place.train("--device emulator --dry-run", &[]).succeeds().says(&["device memory     ", "evaluation"]);
    // NaViT's bins divide what is advised.
    let bins = ["packing.kind=\"bins\"", "packing.sequence=256", "packing.tokens=131072"];
    place
        .train("--device emulator --dry-run", &[&large[..], &bins].concat())
        .refuses(&["lower packing.tokens"]);
    place.train("--device cpu --no-graph", &[]).refuses(&["--no-graph goes with a GPU"]);
    if Device::cuda(0).is_err() {
        place.train("--device cuda", &[]).refuses(&["--device cuda: ", "use --device cpu"]);
        let plan = place.train("--device cuda --dry-run", &[]).succeeds();
        plan.says(&[
            "device            NVIDIA H100 80GB HBM3, assumed as there is no GPU",
            "device memory     ",
        ]);
    }
}

#[test]
fn a_step_on_a_device_is_profiled_launch_by_launch() {
    let place = Place::new();
    let sets: String = small(&["packing.tokens=128"]).iter().map(|set| format!(" --set {set}")).collect();
    for device in devices() {
        let words = format!("profile digits{sets} --steps 1 --classes 10 --device {device} --json");
        let profile = &json_lines(&place.run(&words).succeeds().out)[0];
        let spans = profile["spans"].as_array().unwrap();
        let names: Vec<&str> = spans.iter().map(|span| span["operation"].as_str().unwrap()).collect();
        assert_eq!(names[..2], ["zero gradients", "work lists and stochastic depth"], "{profile}");
        assert_eq!(names[names.len() - 1], "optimiser");
        assert!(names.contains(&"attention") && names.contains(&"d attention"), "{names:?}");
        let flops: f64 = spans.iter().map(|span| span["flops"].as_f64().unwrap()).sum();
        let products = flops / profile["flops"].as_f64().unwrap();
        assert!((0.97..=1.0 + 1e-9).contains(&products), "{products}: {profile}");
        place.run(&words.replace(" --json", "")).succeeds().says(&[
            "\nstep   ",
            "the mean of 1",
            "\nbetween the parts ",
        ]);
    }
}
