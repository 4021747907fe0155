//! `trencadis train`: what it leaves, that it repeats, and how it ends.

use std::process::Stdio;

use trencadis::recipe::Recipe;

use super::*;

#[test]
fn a_run_leaves_all_its_files() {
    let place = Place::new();
    let first = place.train("", &["train.eval_every=6", "train.keep_every=4"]).succeeds();
    assert!(first.out.lines().next().unwrap().starts_with("device            cpu, 2 threads ("));
    let next = first.out.lines().last().unwrap();
    assert_eq!(next, "next              trencadis eval runs/digits-1");
    for file in
        ["recipe.toml", "best.safetensors", "last.safetensors", "step-4.safetensors", "step-12.safetensors"]
    {
        assert!(exists(place.path("runs/digits-1").join(file)), "{file}");
    }
    let events = fs::read_dir(place.path("runs/digits-1")).unwrap().any(|entry| {
        let entry = entry.unwrap();
        entry.file_name().to_str().unwrap().starts_with("events.out.tfevents.")
            && entry.metadata().unwrap().len() > 500
    });
    assert!(events, "an event file with content");

    let lines = place.metrics("runs/digits-1");
    let kinds = |kind: &str| lines.iter().filter(|line| line["kind"] == kind).count();
    assert_eq!((kinds("train"), kinds("eval")), (12, 2));
    let meta = place.checkpoint("runs/digits-1/best.safetensors").metadata;
    let classes: Vec<String> = serde_json::from_str(&meta["classes"]).unwrap();
    assert_eq!(classes, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);

    // What the last line advises works, and a second run gets the next number.
    place.run(next.split_once("trencadis ").unwrap().1).succeeds().says(&["top-1", "359"]);
    place.trained();
    place.train("--name other", &[]).succeeds();
    assert_eq!(place.runs(), ["digits-1", "digits-2", "other-1"]);
}

/// The recipe that a run or `trencadis recipes` writes is one to train from.
#[test]
fn a_printed_recipe_trains_the_same() {
    let place = Place::new();
    place.write("my.toml", place.run("recipes digits").succeeds().out);
    place.trained();
    place.train("my.toml", &[]).succeeds();
    assert_eq!(place.runs(), ["digits-1", "my-1"]);
    assert_eq!(place.bits("runs/digits-1/last.safetensors"), place.bits("runs/my-1/last.safetensors"));
    Done::of(place.command("train runs/digits-1/recipe.toml --threads 2")).succeeds();
    assert_eq!(place.bits("runs/digits-1/last.safetensors"), place.bits("runs/recipe-1/last.safetensors"));
}

/// What is computed again changes no bit, and no line of the log.
#[test]
fn recomputation_changes_nothing() {
    let place = Place::new();
    for recompute in ["none", "selective", "full"] {
        let set = format!("model.recompute={recompute}");
        let sets = [&set[..], "model.depth=2", "model.layer_scale=0.1", "model.drop_path=0.2"];
        place.train(&format!("--name {recompute}"), &sets).succeeds();
    }
    let of = |name: &str| {
        (place.metrics(&format!("runs/{name}-1")), place.bits(&format!("runs/{name}-1/last.safetensors")))
    };
    let kept = of("none");
    assert!(kept == of("selective") && kept == of("full"));
    place
        .train("", &["model.recompute=blocks"])
        .refuses(&["`model.recompute` must be one of none, selective, full, but it is \"blocks\""]);
}

#[test]
fn the_same_seed_gives_the_same_bits_whatever_the_threads() {
    let place = Place::new();
    let train = |name: &str, words: &str, set: &str| {
        let mut command = place.command("train --name");
        command.arg(name).args(words.split_whitespace());
        for set in TINY.iter().chain([&set]) {
            command.args(["--set", set]);
        }
        Done::of(command).succeeds();
        place.bits(&format!("runs/{name}-1/last.safetensors"))
    };
    let base = train("base", "--threads 2", "data.workers=1");
    assert!(base == train("again", "--threads 2", "data.workers=1"), "the same run");
    assert!(base == train("workers", "--threads 2", "data.workers=5"), "more workers");
    assert!(base == train("thread", "--threads 1", "data.workers=1"), "one thread");
    assert!(base == train("threads", "--threads 5", "data.workers=1"), "five threads");
    assert!(base != train("seed", "--threads 2", "train.seed=1"), "another seed");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let place = Place::new();
    let sets = ["train.lr=1e30", "train.warmup=0", "train.clip=0", "train.save_every=1"];
    let done = place.train("", &sets);
    assert_eq!(done.code, Some(1), "{}", done.err);
    let sentence = done.err.lines().last().unwrap();
    for part in
        ["error: step ", "the loss is ", "last good checkpoint is runs/digits-1/last.safetensors of step "]
    {
        assert!(sentence.contains(part), "`{part}` is missing in: {sentence}");
    }
    let saved = place.checkpoint("runs/digits-1/last.safetensors");
    assert!(saved.tensors.values().all(|(_, values)| values.iter().all(|v| v.is_finite())));
}

#[test]
fn without_validation_images_there_is_no_best() {
    let place = Place::new();
    place
        .train("", &["data.validation=0"])
        .succeeds()
        .says(&["last checkpoint", "next              trencadis predict runs/digits-1"])
        .says_err(&["no validation images"]);
    assert!(exists(place.path("runs/digits-1/last.safetensors")));
    assert!(!exists(place.path("runs/digits-1/best.safetensors")));
}

/// Shells without job control start background jobs so, and `nohup` does the same to hang-ups.
#[cfg(unix)]
#[test]
fn ignored_signals_are_no_obstacle() {
    let place = Place::new();
    let train = place.training("", &[]);
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' INT HUP; exec \"$@\"", "sh"])
        .arg(train.get_program())
        .args(train.get_args());
    command.current_dir(place.0.path());
    Done::of(command).succeeds();
}

#[test]
fn a_dry_run_writes_nothing() {
    let place = Place::new();
    place.train("--dry-run", &[]).succeeds().says(&["parameters", "FLOP", "peak memory", "device"]);
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 0);
    // Far beyond any memory: nothing of it is allocated.
    place.run("train vit-22b --dry-run --set packing.tokens=1048576").succeeds().says(&["GiB"]);
}

#[test]
fn a_new_start_takes_the_weights_and_names_what_is_fresh() {
    let place = Place::new();
    place.trained();
    place.photos("photos", 8);
    let grey =
        ["model.channels=1", "model.patch=4", "data.mean=[0.5]", "data.std=[0.5]", "resolution.max=32"];
    let sets =
        [&grey[..], &["resolution.min=12", "model.position.rows=16", "model.position.columns=16"]].concat();
    let words = "--data photos --init runs/digits-1/last.safetensors";
    let done = place.train(words, &sets).succeeds();
    let fresh = done.err.lines().find(|line| line.starts_with("fresh")).unwrap();
    assert_eq!(fresh, "fresh             head.weight, head.bias", "{}", done.err);
    assert!(done.err.contains("tensors from runs/digits-1/last.safetensors"));
    // The same classes keep the head: no step is taken, so nothing else can differ.
    let same = place.train("--init runs/digits-1/last.safetensors", &[]).succeeds();
    assert!(!same.err.contains("fresh"), "{}", same.err);

    // Another patch is another patch embedding, made of the former one.
    let coarse =
        place.train("--init runs/digits-1/last.safetensors --name coarse", &["model.patch=8"]).succeeds();
    let resized = coarse.err.lines().find(|line| line.starts_with("resized")).unwrap();
    assert_eq!(resized, "resized           patch embedding from 4×4 to 8×8 pixels (pseudo-inverse)");

    place
        .train("--init runs/digits-1/last.safetensors --name wide", &["model.width=32"])
        .refuses(&["runs/digits-1/last.safetensors", "patch_embed.weight [16, 16] (expected [32, 16])"]);
    assert!(!exists(place.path("runs/wide-1")));
}

/// Weights of timm in a built-in recipe of the same network, for another grid.
#[test]
fn a_new_start_takes_weights_of_timm() {
    let place = Place::new();
    place.photos("photos", 8);
    let file = crate::places::root().join("tests/golden/vit_cls/weights.safetensors");
    place.write("timm.safetensors", fs::read(file).unwrap());
    let sets = [
        "model.width=32",
        "model.depth=2",
        "model.mlp=64",
        "model.heads=2",
        "model.patch=4",
        "model.position.rows=1",
        "model.position.columns=25",
        "resolution.min=20",
        "resolution.max=20",
        "packing.images=8",
        "train.accumulate=1",
    ];
    let words = "vit-s16 --data photos --init timm.safetensors --name timm";
    let done = place.train(words, &sets).succeeds();
    assert!(done.err.contains("tensors from timm.safetensors"), "{}", done.err);
    let line = |word: &str| done.err.lines().find(|line| line.starts_with(word)).unwrap();
    assert_eq!(line("resized"), "resized           positions from 5×5 to 1×25 patches (bicubic)");
    assert_eq!(line("fresh"), "fresh             head.weight, head.bias");
    place
        .train(words, &[&sets[..], &["model.norm_eps=1e-3"]].concat())
        .refuses(&["timm.safetensors", "model.norm_eps is "]);
}

/// Peak of the resident set against the plan. The rest is the binary, the threads' stacks, the
/// input's decoders and the allocator's slack.
#[cfg(target_os = "linux")]
#[test]
fn the_planned_memory_is_what_is_used() {
    let place = Place::new();
    let settings = "--threads 2 --set train.steps=30 --set train.eval_every=10 --set model.depth=2";
    let plan = place.run(&format!("train --dry-run {settings}")).succeeds().out;
    let line = plan.lines().find(|line| line.starts_with("peak memory")).unwrap();
    let planned: f64 = line.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!(line.contains(" MiB ("), "{line}");
    let mut child = place
        .command(&format!("train {settings}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut peak = 0.0f64;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"));
        peak = kib.map_or(peak, |kib| peak.max(kib.trim().parse::<f64>().unwrap() / 1024.0));
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(child.wait().unwrap().success());
    assert!(peak > 0.7 * planned && peak < planned + 60.0, "planned {planned} MiB and used {peak} MiB");
}

/// The lines of kind `attention`.
fn attention(place: &Place, run: &str) -> Vec<serde_json::Value> {
    place.metrics(run).into_iter().filter(|line| line["kind"] == "attention").collect()
}

#[test]
fn attention_is_logged_where_it_is_asked_for() {
    let place = Place::new();
    let sets = ["train.eval_every=6", "model.depth=2", "model.heads=2", "train.accumulate=2"];
    let logged = [&sets[..], &["train.log_attention=true"]].concat();
    place.train("--name without", &sets).succeeds();
    place.train("--name with", &logged).succeeds();
    assert!(attention(&place, "runs/without-1").is_empty());
    let lines = attention(&place, "runs/with-1");
    assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [6, 12]);
    for line in &lines {
        let numbers = |key: &str| -> Vec<f64> {
            line[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let uniform = line["uniform_entropy"].as_f64().unwrap();
        let (entropy, least) = (numbers("entropy"), numbers("min_head_entropy"));
        assert_eq!(
            (entropy.len(), numbers("max_logit").len(), &line["images"]),
            (2, 2, &4.into()),
            "as many as a batch holds"
        );
        for (entropy, least) in entropy.iter().zip(&least) {
            assert!(0.0 < *least && least <= entropy && *entropy <= uniform + 1e-6, "{line}");
        }
    }
    // What is trained does not depend on it.
    let bits = |run: &str| place.bits(&format!("runs/{run}-1/last.safetensors"));
    assert!(bits("with") == bits("without"));
    // Of several ranks the first logs the whole model.
    for (name, words) in [("data", "--ranks 2"), ("tensor", "--ranks 2 --tensor 2")] {
        place.train(&format!("--name {name} {words}"), &logged).succeeds();
        let there = attention(&place, &format!("runs/{name}-1"));
        assert_eq!(there.len(), 2);
        for (there, here) in there.iter().zip(&lines) {
            for (there, here) in
                there["entropy"].as_array().unwrap().iter().zip(here["entropy"].as_array().unwrap())
            {
                let (there, here) = (there.as_f64().unwrap(), here.as_f64().unwrap());
                assert!((there - here).abs() < 1e-3, "{name}: {there} instead of {here}");
            }
        }
    }
    let events = fs::read_dir(place.path("runs/with-1")).unwrap().map(|entry| entry.unwrap().path());
    let events =
        events.filter(|path| path.to_string_lossy().contains("tfevents")).map(|path| fs::read(path).unwrap());
    let tag = b"attention_entropy/block_01";
    assert!(events.into_iter().any(|bytes| bytes.windows(tag.len()).any(|window| window == tag)));
    place.run("report runs/with-1 runs/without-1 --samples 0 --out page.html").succeeds();
    let page = fs::read_to_string(place.path("page.html")).unwrap();
    assert!(page.contains("Attention entropy: with-1") && page.contains("Largest attention logit: with-1"));
    assert!(!page.contains("Attention entropy: without-1"));
}

#[test]
fn products_of_bf16_train_much_as_those_of_f32() {
    let place = Place::new();
    place.train("--name single", &[]).succeeds();
    place.train("--name half", &["train.matmul='bf16'"]).succeeds();
    let losses = |run: &str| -> Vec<f64> {
        let lines = place.metrics(run).into_iter().filter(|line| line["kind"] == "train");
        lines.map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let (single, half) = (losses("runs/single-1"), losses("runs/half-1"));
    assert!(single.len() == half.len() && single != half, "{single:?} and {half:?}");
    for (single, half) in single.iter().zip(&half) {
        assert!((single - half).abs() < 0.03, "{half} instead of {single}");
    }
    // What was trained so is evaluated so.
    let logged = place.metrics("runs/half-1").into_iter().rfind(|line| line["kind"] == "eval").unwrap();
    let evaluated = json_lines(&place.run("eval runs/half-1/last.safetensors --json").succeeds().out);
    assert_eq!(evaluated[0]["loss"], logged["loss"]);
}

#[test]
fn every_recipe_trains_for_some_steps_when_made_small() {
    let place = Place::new();
    place.photos("photos", 6);
    let sets = [
        "model.shape=''",
        "model.width=32",
        "model.depth=1",
        "model.mlp=48",
        "model.heads=2",
        "resolution.min=56",
        "resolution.max=56",
        "packing.tokens=256",
        "packing.sequence=128",
        "packing.images=4",
        "train.steps=2",
        "train.accumulate=1",
        "train.schedule=constant",
        "train.warmup=1",
        "train.cooldown=0",
        "train.eval_every=0",
        "data.validation=0.2",
    ];
    let recipes = trencadis::recipe::load::list();
    // Texts are learned from captions, which these photographs have none of: `--test text`.
    let of_classes = |name: &str| !Recipe::load(name, &[]).unwrap().text.is_on();
    for (name, _) in recipes.iter().filter(|(name, _)| of_classes(name)) {
        let mut command = place.command(&format!("train {name} --data photos --name {name}"));
        for set in sets {
            command.args(["--set", set]);
        }
        Done::of(command).succeeds();
        let losses: Vec<f64> = place
            .metrics(&format!("runs/{name}-1"))
            .iter()
            .filter(|line| line["kind"] == "train")
            .map(|line| line["loss"].as_f64().unwrap_or_else(|| panic!("{name}: {line}")))
            .collect();
        assert!(!losses.is_empty() && losses.iter().all(|loss| loss.is_finite()), "{name}: {losses:?}");
    }
}
