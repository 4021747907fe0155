//! Training on several ranks, as threads of one process and as processes of a launcher.
#![cfg(unix)]

use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use trencadis::train::checkpoint::load_model;

use super::*;

/// A step that 1, 2 and 4 ranks can share, and a model that two can; it learns from the first step.
const SHARED: [&str; 5] =
    ["train.accumulate=4", "model.heads=2", "train.lr=0.01", "train.eval_every=6", "train.save_every=3"];

/// Processes as a launcher starts them, in the same folder unless told otherwise.
struct Launched(Vec<Child>);

impl Drop for Launched {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Launched {
    /// `commands`, each a rank.
    fn start(commands: Vec<Command>) -> Self {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let world = commands.len();
        let start = |(rank, mut command): (usize, Command)| {
            let vars =
                [("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank), ("MASTER_PORT", port.into())];
            command.envs(vars.map(|(name, value)| (name, value.to_string()))).env("MASTER_ADDR", "127.0.0.1");
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        Self(commands.into_iter().enumerate().map(start).collect())
    }

    fn signal(&self, rank: usize, name: &str) {
        let id = self.0[rank].id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// What each has left, one that was told to end without finishing excepted.
    fn done(mut self, but: Option<usize>) -> Vec<Done> {
        let children = self.0.iter_mut().enumerate().filter(|(rank, _)| Some(*rank) != but);
        let wait = |(_, child): (usize, &mut Child)| {
            let (mut out, mut err) = (String::new(), String::new());
            child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
            child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
            Done { code: child.wait().unwrap().code(), out, err }
        };
        children.map(wait).collect()
    }
}

impl Place {
    fn ranks(&self, count: usize, words: &str, sets: &[&str]) -> Launched {
        Launched::start((0..count).map(|_| self.training(words, sets)).collect())
    }

    /// Waits until a run has come to `step` and is saved.
    fn comes_to(&self, run: &str, step: usize) {
        let begun = Instant::now();
        let lines = || fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap_or_default();
        while lines().lines().count() < step || !exists(self.path(run).join("last.safetensors")) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{run} has not come to step {step}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Step, kind, and what of it is the same on any mesh but for rounding: loss, accuracy, gradient norm.
    fn curve(&self, run: &str) -> Vec<(u64, String, [f64; 3])> {
        let lines = self.metrics(run);
        let number = |line: &serde_json::Value, key: &str| line[key].as_f64().unwrap_or(0.0);
        let curve = lines.iter().map(|line| {
            let accuracy = number(line, "accuracy") + number(line, "top1");
            let kind = line["kind"].as_str().unwrap().to_owned();
            (
                line["step"].as_u64().unwrap(),
                kind,
                [number(line, "loss"), accuracy, number(line, "grad_norm")],
            )
        });
        curve.collect()
    }
}

/// Losses to 1e-4, gradient norms to 1e-3 of themselves, and weights that ended in the same place; a weight that
/// rounds otherwise may turn one image over.
#[track_caller]
fn same_run(place: &Place, one: &str, other: &str) {
    let (a, b) = (place.curve(one), place.curve(other));
    assert_eq!(a.len(), b.len());
    for ((step, kind, [loss, accuracy, norm]), b) in a.into_iter().zip(b) {
        assert_eq!((step, &kind), (b.0, &b.1));
        assert!((loss - b.2[0]).abs() < 1e-4, "{kind} {step}: loss {loss} and {}", b.2[0]);
        assert!((accuracy - b.2[1]).abs() < 0.03, "{kind} {step}: accuracy {accuracy} and {}", b.2[1]);
        assert!((norm - b.2[2]).abs() <= 1e-3 * norm, "{kind} {step}: norm {norm} and {}", b.2[2]);
    }
    let [one, other] = [one, other].map(|run| place.checkpoint(&format!("{run}/last.safetensors")).tensors);
    for (name, (_, one)) in one.iter().filter(|(name, _)| !name.starts_with("training.")) {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let size: f64 = one.iter().map(|x| square(*x)).sum();
        let apart: f64 = one.iter().zip(&other[name].1).map(|(x, y)| square(x - y)).sum();
        assert!(apart.sqrt() <= 1e-2 * size.sqrt(), "{name}: {} of {}", apart.sqrt(), size.sqrt());
    }
}

#[test]
fn any_number_of_ranks_gives_the_run_of_one() {
    let place = Place::new();
    place.train("--name one", &SHARED).succeeds();
    for (name, words) in [
        ("two", "--ranks 2"),
        ("four", "--ranks 4"),
        ("mesh", "--ranks 4 --tensor 2"),
        ("pair", "--ranks 2 --tensor 2"),
    ] {
        let done = place.train(&format!("--name {name} {words}"), &SHARED).succeeds();
        assert_eq!(done.out.matches("device ").count(), 1, "one rank speaks: {}", done.out);
        assert_eq!(done.err.matches("step 12/12").count(), 1, "{}", done.err);
        same_run(&place, "runs/one-1", &format!("runs/{name}-1"));
    }
    // The mesh is no part of what is saved.
    for file in ["last.safetensors", "recipe.toml"] {
        let [one, four] =
            ["one", "four"].map(|name| fs::read(place.path(&format!("runs/{name}-1/{file}"))).unwrap());
        assert_eq!(one.len(), four.len(), "{file}");
    }
}

/// Mixed images, each data rank with a teacher of its own.
#[test]
fn any_number_of_ranks_mixes_and_teaches_alike() {
    let place = Place::new();
    place.train("--name teacher", &["model.depth=2", "train.lr=0.01"]).succeeds();
    let mixed = ["mix.mixup=0.8", "mix.cutmix=1", "distill.teacher=runs/teacher-1", "distill.weight=0.5"];
    let sets = [&SHARED[..], &mixed].concat();
    let one = place.train("--name one", &sets).succeeds();
    assert!(one.err.contains("runs/teacher-1/best.safetensors, "), "{}", one.err);
    for (name, words) in [("two", "--ranks 2"), ("mesh", "--ranks 4 --tensor 2")] {
        place.train(&format!("--name {name} {words}"), &sets).succeeds();
        same_run(&place, "runs/one-1", &format!("runs/{name}-1"));
    }
    // A run without them is another.
    place.train("--name plain", &SHARED).succeeds();
    assert_ne!(place.curve("runs/one-1"), place.curve("runs/plain-1"));
}

#[test]
fn processes_give_the_run_of_threads() {
    let place = Place::new();
    place.train("--name threads --ranks 2", &SHARED).succeeds();
    let done = place.ranks(2, "--name processes", &SHARED).done(None);
    let [first, second]: [Done; 2] = done.try_into().map_err(drop).unwrap();
    first
        .succeeds()
        .says(&["device ", "runs/processes-1"])
        .says_err(&["mesh              2 x 1", "step 12/12"]);
    let second = second.succeeds();
    assert_eq!((second.out.as_str(), second.err.as_str()), ("", ""), "the others are silent");
    let bits = |run: &str| place.bits(&format!("runs/{run}-1/last.safetensors"));
    assert!(bits("threads") == bits("processes"));
    // A launcher that starts one process.
    let mut alone = place.ranks(1, "--name alone", &SHARED).done(None);
    alone.remove(0).succeeds();
}

/// Long enough to be ended in the middle.
fn long() -> Vec<&'static str> {
    [&SHARED[..], &["train.steps=4000", "train.eval_every=0", "train.save_every=60"]].concat()
}

/// The one message of all that are left, and that they end with this code.
#[track_caller]
fn one_message(done: Vec<Done>, code: i32) -> String {
    let last = |done: &Done| done.err.lines().last().unwrap_or_default().to_owned();
    let message = last(&done[0]);
    for done in &done {
        assert_eq!((done.code, last(done)), (Some(code), message.clone()), "{}", done.err);
    }
    message
}

/// The step that such a message names and that is saved.
#[track_caller]
fn saved_step(place: &Place, run: &str, message: &str) -> u64 {
    let advice = format!(" is saved, continue on any mesh with: trencadis train --resume {run}");
    let (_, step) =
        message.strip_suffix(&advice).unwrap_or_else(|| panic!("{message}")).split_once("; step ").unwrap();
    let progress = place.checkpoint(&format!("{run}/last.safetensors")).metadata.remove("progress").unwrap();
    let progress: serde_json::Value = serde_json::from_str(&progress).unwrap();
    assert_eq!(progress["step"].to_string(), step, "saved at the step that it names");
    step.parse().unwrap()
}

#[test]
fn a_killed_rank_ends_all_and_the_run_goes_on_with_fewer() {
    let place = Place::new();
    let short = [&SHARED[..], &["train.steps=40"]].concat();
    let ranks = place.ranks(4, "--name cut", &long());
    // Well after a save: of one that is under way not all learn.
    place.comes_to("runs/cut-1", 75);
    ranks.signal(2, "KILL");
    let begun = Instant::now();
    let message = one_message(ranks.done(Some(2)), 1);
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert!(message.starts_with("error: rank 2 has died: its connection is closed; step "), "{message}");
    assert!(saved_step(&place, "runs/cut-1", &message).is_multiple_of(60));

    // The same in short, to its end: four ranks, then two, then one, beside one that was left alone.
    place.train("--name whole", &short).succeeds();
    let ranks = place.ranks(4, "--name parts", &short);
    place.comes_to("runs/parts-1", 4);
    ranks.signal(1, "KILL");
    if ranks.done(Some(1)).iter().all(|done| done.code == Some(1)) {
        let mut command = place.command("train --threads 2 --ranks 2 --resume runs/parts-1");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut two = Launched(vec![command.spawn().unwrap()]);
        std::thread::sleep(Duration::from_millis(150));
        let _ = two.0[0].kill();
        let _ = two.0[0].wait();
        place.run("train --threads 2 --resume runs/parts-1");
    }
    same_run(&place, "runs/whole-1", "runs/parts-1");
}

#[test]
fn a_stalled_rank_ends_the_others_within_the_timeout() {
    let place = Place::new();
    let ranks =
        place.ranks(3, "--name stalled --timeout 2", &[&long()[..], &["train.accumulate=3"]].concat());
    place.comes_to("runs/stalled-1", 75);
    ranks.signal(1, "STOP");
    let begun = Instant::now();
    let message = one_message(ranks.done(Some(1)), 1);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(
        message.starts_with("error: rank 1 has been silent for 2s: it does not answer; step "),
        "{message}"
    );
}

#[test]
fn an_interrupt_of_one_rank_stops_all_after_the_same_step() {
    let place = Place::new();
    let ranks = place.ranks(2, "--name cut", &long());
    place.comes_to("runs/cut-1", 62);
    ranks.signal(1, "TERM");
    let done = ranks.done(None);
    assert!(done.iter().all(|done| done.code == Some(0)), "{}", done[0].err);
    let last = done[0].err.lines().last().unwrap();
    let step = last.strip_prefix("stopped after step ").unwrap().split(';').next().unwrap();
    let progress = place.checkpoint("runs/cut-1/last.safetensors").metadata.remove("progress").unwrap();
    let progress: serde_json::Value = serde_json::from_str(&progress).unwrap();
    assert_eq!(progress["step"].to_string(), step, "saved at the step that it names");
}

/// One file a rank: everything takes them, and a run goes on from them on another mesh.
#[test]
fn sharded_checkpoints_are_taken_everywhere() {
    let place = Place::new();
    let sharded = [&SHARED[..], &["train.save_as=sharded", "train.keep_every=6"]].concat();
    place.train("--name one --ranks 2", &SHARED).succeeds();
    place.train("--name files --ranks 2", &sharded).succeeds();
    let names = |run: &str| -> Vec<String> {
        let names =
            fs::read_dir(place.path(run)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name.contains("safetensors")).collect();
        names.sort();
        names
    };
    let set = |stem: &str, step: u64, ranks: usize| {
        let files = (1..=ranks).map(move |n| format!("{stem}.{step}-{n:05}-of-{ranks:05}.safetensors"));
        files.chain([format!("{stem}.safetensors.index.json")]).collect::<Vec<_>>()
    };
    let found = names("runs/files-1");
    let kept = [set("last", 12, 2), set("step-6", 6, 2), set("step-12", 12, 2)].concat();
    assert!(kept.iter().all(|name| found.contains(name)), "{found:?}");
    assert_eq!(found.len(), kept.len() + 3, "and the best: {found:?}");
    let model = |file: &str| load_model(&place.path(file)).unwrap();
    let [one, files] = ["one", "files"].map(|run| model(&format!("runs/{run}-1/last.safetensors")).1.tensors);
    assert!(one == files, "the same bits");

    for file in ["", "/last.safetensors", "/best.safetensors.index.json", "/step-6.safetensors.index.json"] {
        place.run(&format!("eval runs/files-1{file}")).succeeds().says(&["359", "top-1"]);
    }
    let words = "--init runs/files-1/last.safetensors.index.json --name from";
    place
        .train(words, &SHARED)
        .succeeds()
        .says_err(&["tensors from runs/files-1/last.safetensors.index.json"]);
    place.run("train --resume runs/files-1").succeeds().says(&["runs/files-1 is finished"]);

    // Ended by a kill after a save, and resumed by four ranks on another mesh.
    let ranks = place.ranks(2, "--name cut", &sharded);
    let index = place.path("runs/cut-1/last.safetensors.index.json");
    let begun = Instant::now();
    while !exists(&index) {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    ranks.signal(1, "KILL");
    ranks.done(Some(1));
    place.run("train --threads 2 --resume runs/cut-1 --ranks 4 --tensor 2").succeeds();
    let (cut, one) = (place.curve("runs/cut-1"), place.curve("runs/one-1"));
    for (cut, one) in cut.iter().zip(&one) {
        assert!(cut.0 == one.0 && (cut.2[0] - one.2[0]).abs() < 1e-4, "{cut:?} {one:?}");
    }
    assert_eq!(cut.len(), one.len());
    let found = names("runs/cut-1");
    assert!(set("last", 12, 4).iter().all(|name| found.contains(name)), "{found:?}");
    assert!(!found.iter().any(|name| name.starts_with("last.") && name.contains("of-00002")), "{found:?}");

    fs::remove_file(place.path("runs/files-1/last.12-00002-of-00002.safetensors")).unwrap();
    let sentence =
        &["runs/files-1/last.12-00002-of-00002.safetensors: is missing, and ", "last.safetensors.index.json"];
    place.run("eval runs/files-1/last.safetensors").refuses(sentence);
    place.run("train --ranks 2 --resume runs/files-1").succeeds().says(&["is finished"]);
}

/// That every rank ends with this sentence and nothing else, and nothing is left behind.
#[track_caller]
fn all_refuse(place: &Place, ranks: Launched, sentence: &str) {
    for done in ranks.done(None) {
        assert_eq!((done.code, done.out.as_str()), (Some(2), ""));
        assert_eq!(done.err.trim_end(), format!("error: {sentence}"));
    }
    assert!(!exists(place.path("runs")));
}

#[test]
fn ranks_that_differ_are_refused_by_all() {
    let place = Place::new();
    let commands = |sets: [&str; 3]| {
        let with = |set: &&str| place.training("", &[&SHARED[..], &["train.accumulate=3", set]].concat());
        Launched::start(sets.iter().map(with).collect())
    };
    let same = "train.seed=0";
    // Each says so before it tells what it runs on.
    for done in commands([same, "train.clip=3", same]).done(None) {
        assert_eq!(done.code, Some(2));
        let sentence =
            "error: recipes differ: train.clip is 1.0 on rank 0 and 3.0 on rank 1; start all ranks alike";
        assert_eq!(done.err.trim_end(), sentence);
    }
    all_refuse(
        &place,
        commands([same, same, "train.lr=-1"]),
        "rank 2: train.lr must be above 0, but it is -1",
    );
    let tensor = |k| place.training(&format!("--tensor {k}"), &SHARED);
    all_refuse(
        &place,
        Launched::start(vec![tensor(1), tensor(2)]),
        "lengths of the tensor axis differ: rank 0 has 1, rank 1 has 2; start all ranks alike",
    );
}

/// Each rank reads what it begins with by itself.
#[test]
fn weights_that_differ_are_refused_by_all() {
    let place = Place::new();
    for (name, seed) in [("one", "train.seed=1"), ("two", "train.seed=2")] {
        place.train(&format!("--name {name}"), &[&SHARED[..], &["train.steps=1", seed]].concat()).succeeds();
    }
    let from = |name: &str| place.training(&format!("--init runs/{name}-1/last.safetensors"), &SHARED);
    for commands in [vec![from("one"), from("two")], vec![from("one"), place.training("", &SHARED)]] {
        let done = Launched::start(commands).done(None);
        let sentence = one_message(done, 2);
        assert!(sentence.contains("weights to begin with differ: rank 0 has "), "{sentence}");
    }
}

/// A shell within a launch of one process starts ranks of its own.
#[test]
fn a_launch_of_one_may_start_ranks() {
    let place = Place::new();
    let mut command = place.training("--ranks 2 --dry-run", &SHARED);
    command.envs([("RANK", "0"), ("WORLD_SIZE", "1")]);
    Done::of(command).succeeds().says(&["mesh              2 x 1"]);
}

/// One path, and other images behind it, as on machines that have a disk each.
#[cfg(target_os = "linux")]
#[test]
fn data_sets_that_differ_are_refused_by_all() {
    let place = Place::new();
    place.photos("a/photos", 8);
    place.photos("b/photos", 9);
    let sets = [&SHARED[..], &["train.accumulate=2"]].concat();
    let at = |folder: &str| {
        let mut command = place.training("--data /proc/self/cwd/photos", &sets);
        command.current_dir(place.path(folder));
        command
    };
    for done in Launched::start(vec![at("a"), at("b")]).done(None) {
        assert_eq!(done.code, Some(2));
        let parts = ["error: data sets differ: rank 0 has ", "of 2 classes (", "; start all ranks alike"];
        assert!(
            parts.iter().all(|part| done.err.contains(part)) && done.err.lines().count() == 1,
            "{}",
            done.err
        );
    }
    assert!(!exists(place.path("a/runs")) && !exists(place.path("b/runs")));
}

#[test]
fn what_is_no_mesh_is_refused() {
    let place = Place::new();
    for (words, sets, part) in [
        (
            "--ranks 3",
            &SHARED[..],
            "train.accumulate = 4 batches of a step cannot be dealt evenly to 3 data ranks",
        ),
        ("--ranks 3", &SHARED[..], "--set train.accumulate=3"),
        ("--ranks 4 --tensor 4", &SHARED[..], "model.heads 2 cannot be shared evenly by 4 ranks"),
        ("--ranks 4 --tensor 3", &[], "4 ranks are no mesh with a tensor axis of 3"),
        ("--tensor 2", &[], "1 ranks are no mesh with a tensor axis of 2"),
        ("--ranks 0", &[], "0 ranks are no mesh"),
        ("--ranks 2 --timeout 0", &[], "--timeout"),
    ] {
        let done = place.train(&format!("--dry-run {words}"), sets).refuses(&[part]);
        assert_eq!(done.out, "");
        let done = Done::of(place.training(words, sets));
        assert_eq!(done.code, Some(2), "{words}: {}", done.err);
        assert!(done.err.contains(part) && done.err.lines().count() == 1, "{words}: {}", done.err);
    }
    let mut command = place.training("--ranks 2", &SHARED);
    command.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")]);
    Done::of(command).refuses(&["rank 1 of 2", "leave --ranks out"]);
    let mut command = place.training("", &SHARED);
    command.env("RANK", "1");
    Done::of(command).refuses(&["RANK is set but WORLD_SIZE is not"]);
    assert!(!exists(place.path("runs")), "nothing is left behind");

    let dry = place.train("--dry-run --ranks 4 --tensor 2", &SHARED).succeeds();
    dry.says(&["mesh              2 x 2 (data x tensor), of the 4 batches of a step 2 a data rank"]);
}

#[test]
fn a_run_that_the_ranks_cannot_share_is_not_resumed() {
    let place = Place::new();
    let sets = [&SHARED[..], &["train.steps=6"]].concat();
    place.train("", &sets).succeeds();
    let before = fs::read(place.path("runs/digits-1/last.safetensors")).unwrap();
    let done = place.run("train --threads 2 --ranks 3 --resume runs/digits-1");
    assert_eq!(done.code, Some(2));
    assert!(done.err.contains("cannot be dealt evenly to 3 data ranks"), "{}", done.err);
    place
        .run("train --threads 2 --ranks 2 --resume runs/digits-1")
        .succeeds()
        .says(&["runs/digits-1 is finished"]);
    place.run("train --ranks 2 --resume absent").refuses(&["rank 0: absent: there is no such folder"]);
    assert_eq!(fs::read(place.path("runs/digits-1/last.safetensors")).unwrap(), before);
}

/// More than `data.max_unreadable` allows, which only the rank finds out that meets them.
#[test]
fn images_that_one_rank_cannot_read_end_all() {
    let place = Place::new();
    place.photos("photos", 10);
    for i in 0..2 {
        let mut png = fs::read(place.path(&format!("photos/a/{i}.png"))).unwrap();
        // The size is whole, the pixels are not.
        let at = png.len() / 2;
        png[at..].fill(0);
        fs::write(place.path(&format!("photos/a/{i}.png")), png).unwrap();
    }
    let sets =
        [&SHARED[..], &["train.accumulate=2", "model.patch=8", "resolution.min=16", "resolution.max=32"]]
            .concat();
    let strict = [&sets[..], &["data.max_unreadable=0"]].concat();
    let message = one_message(place.ranks(2, "--data photos", &strict).done(None), 2);
    assert!(message.contains("images cannot be read, more than data.max_unreadable = 0 allows"), "{message}");
    let done = place.train("--ranks 2 --data photos", &strict);
    assert_eq!(one_message(vec![done], 2), message, "as threads");

    let lax = [&sets[..], &["data.max_unreadable=0.5"]].concat();
    let done = place.train("--ranks 2 --data photos", &lax).succeeds();
    assert!(
        done.err.contains("skipped ") && done.err.contains(" unreadable images so far, the newest: "),
        "{}",
        done.err
    );
}

/// All end at the same step, with it saved though no save was due.
#[test]
fn images_that_vanish_cost_no_step() {
    let place = Place::new();
    place.photos("photos", 12);
    let sets =
        ["train.accumulate=2", "model.patch=8", "resolution.min=16", "resolution.max=32", "train.steps=5000"];
    let ranks =
        place.ranks(2, "--data photos", &[&sets[..], &["data.cache_mib=0", "train.save_every=0"]].concat());
    let metrics = place.path("runs/photos-1/metrics.jsonl");
    let begun = Instant::now();
    while fs::read_to_string(&metrics).unwrap_or_default().lines().count() < 5 {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    fs::rename(place.path("photos"), place.path("elsewhere")).unwrap();
    let message = one_message(ranks.done(None), 2);
    // More than may be, or all: which comes first is a matter of the moment.
    assert!(
        ["images cannot be read", "images can be read"].iter().any(|part| message.contains(part)),
        "{message}"
    );
    assert!(saved_step(&place, "runs/photos-1", &message) >= 5);
}
