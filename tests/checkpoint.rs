//! Checkpoints of a run, also when the process is killed while it writes them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;
use trencadis::Result;
use trencadis::autograd::ParamSpec;
use trencadis::autograd::graph::Init;
use trencadis::data::packing::PackingStats;
use trencadis::recipe::{OptimizerKind, SaveKind};
use trencadis::train::checkpoint::{
    Best, Content, Header, Progress, Snapshot, load_header, load_model, open_training,
};
use trencadis::train::engine::{StateKind, StateSource, TrainState, Wanted, Whole};
use trencadis::train::run_dir::RunDir;
use trencadis::weights::Weights;
use trencadis::weights::sharded::{Index, index_of};

fn params(width: usize) -> Vec<ParamSpec> {
    [("blocks.0.weight", vec![width, 3]), ("head.bias", vec![4])]
        .map(|(name, shape)| ParamSpec {
            name: name.into(),
            shape,
            init: Init::Constant(0.0),
            decay: true,
            head: false,
        })
        .into()
}

fn filled(params: &[ParamSpec], value: f32) -> Vec<Vec<f32>> {
    params.iter().map(|p| vec![value; p.len()]).collect()
}

fn header(step: u64) -> Header {
    Header {
        recipe: "description = \"digits\"\n".into(),
        classes: vec!["null".into(), "\"eins\" é".into()],
        tokenizer: Some("{\"model\": \"é\"}".into()),
        progress: Progress {
            step,
            images_seen: 32 * step,
            evaluated: Some(1),
            packing: PackingStats::default(),
            best: Some(Best { step: 1, metric: 0.1 + 0.2 }),
            loader: json!({"epoch": 3, "next": u64::MAX, "share": 0.1}),
        },
    }
}

/// Weights that are all `value`, and everything else near it.
fn state(params: &[ParamSpec], value: f32, average: bool, step: u64) -> TrainState<'static> {
    let all = |offset: f32| filled(params, value + offset).into();
    TrainState {
        weights: all(0.0),
        ema: average.then(|| all(0.75)),
        m: all(0.25),
        v: all(0.5),
        statistics: Vec::new().into(),
        optimizer_step: step,
    }
}

const KINDS: [SaveKind; 2] = [SaveKind::Merged, SaveKind::Sharded];

/// Writes checkpoints of a state that one rank holds.
fn write(
    kind: SaveKind,
    files: &[(PathBuf, Content)],
    header: &Header,
    params: &[ParamSpec],
    state: &TrainState<'_>,
) -> Result<bool> {
    let whole = Whole::new(params, state)?;
    Snapshot { header, state: &whole, kind }.write(files)?
}

/// Saves into a run, which the weights of `params` are those of.
fn save(
    kind: SaveKind,
    run: &RunDir,
    header: &Header,
    (params, state): (&[ParamSpec], &TrainState<'_>),
    [improved, keep]: [bool; 2],
) -> Result<bool> {
    let whole = Whole::new(params, state)?;
    Snapshot { header, state: &whole, kind }.save(run, improved, keep)?
}

fn load_training(path: &Path, params: &[ParamSpec]) -> Result<(Header, TrainState<'static>)> {
    let (header, saved) = open_training(path, params, OptimizerKind::AdamW)?;
    Ok((header, TrainState::of(&saved, params)?))
}

/// Momentum alone; or momentum, rows and columns of a matrix that is factored, and all elements of another parameter.
#[test]
fn round_trip_of_what_other_optimisers_keep() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("last.safetensors");
    let mut params = params(5);
    params[0].shape = vec![40, 33];
    let files = [(path.clone(), Content::Training)];
    let lens = [40 + 33, params[1].len()];
    let statistics: Vec<Vec<f32>> = lens.map(|len| (0..len).map(|i| i as f32).collect()).into();
    for kind in KINDS {
        let sgd = TrainState { v: Vec::new().into(), ..state(&params, 1.0, true, 3) };
        let adafactor = TrainState { statistics: statistics.clone().into(), ..sgd.clone() };
        for (optimizer, state) in [(OptimizerKind::Sgd, sgd), (OptimizerKind::Adafactor, adafactor)] {
            assert!(write(kind, &files, &header(3), &params, &state).unwrap());
            let (_, saved) = open_training(&path, &params, optimizer).unwrap();
            assert_eq!(saved.optimizer_step(), 3);
            if optimizer == OptimizerKind::Adafactor {
                assert_eq!(saved.statistics(&lens).unwrap(), statistics);
            }
            let whole = |(param, spec): (usize, &ParamSpec)| Wanted {
                param,
                runs: std::iter::once(0..spec.len()).collect(),
            };
            let wanted: Vec<Wanted> = params.iter().enumerate().map(whole).collect();
            assert_eq!(saved.read(StateKind::First, &wanted).unwrap(), state.m.to_vec());
            // What another optimiser would go on from is not there.
            let message = open_training(&path, &params, OptimizerKind::AdamW).unwrap_err().to_string();
            assert!(message.contains("missing") || message.contains("has no"), "{message}");
            assert_eq!(load_model(&path).unwrap().1.tensors.len(), 2);
        }
    }
    let cut = TrainState { statistics: vec![vec![0.0; 3]; 2].into(), ..state(&params, 1.0, false, 3) };
    assert!(Whole::new(&params, &cut).is_err());
}

#[test]
fn round_trip_with_and_without_a_moving_average() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("last.safetensors");
    let params = params(5);
    let header = header(42);
    for (kind, average) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let state = state(&params, 1.0, average, 41);
        let alone = dir.path().join("best.safetensors");
        let files = [(alone.clone(), Content::Model), (path.clone(), Content::Training)];
        assert!(write(kind, &files, &header, &params, &state).unwrap());
        assert_eq!(
            (path.exists(), index_of(&path).exists()),
            match kind {
                SaveKind::Merged => (true, false),
                SaveKind::Sharded => (false, true),
            }
        );

        let (loaded, training) = load_training(&path, &params).unwrap();
        assert_eq!(loaded, header);
        assert_eq!(training, state);

        // The same file is a model, under plain names.
        let (loaded, model) = load_model(&path).unwrap();
        assert_eq!(loaded, Some(header.clone()));
        assert_eq!(model.tensors.keys().collect::<Vec<_>>(), ["blocks.0.weight", "head.bias"]);
        assert_eq!(model.tensors["head.bias"].1, state.ema.as_ref().unwrap_or(&state.weights)[1]);

        assert_eq!(load_model(&alone).unwrap().1.tensors, model.tensors);
        assert_eq!(load_header(&alone).unwrap(), header);
        match kind {
            SaveKind::Merged => assert_eq!(Weights::load(&alone).unwrap().tensors.len(), 2),
            SaveKind::Sharded => assert_eq!(Index::load(&index_of(&alone)).unwrap().weight_map.len(), 2),
        }
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            if kind == SaveKind::Merged { 2 } else { 4 }
        );
    }
}

#[test]
fn weights_that_are_not_finite_replace_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::create(dir.path(), "a", "").unwrap();
    let params = params(2);
    for kind in KINDS {
        let files = [(run.best(), Content::Model), (run.last(), Content::Training)];
        let mut state = state(&params, 1.0, true, 1);
        assert!(write(kind, &files, &header(1), &params, &state).unwrap());
        let names = || -> std::collections::BTreeSet<_> {
            std::fs::read_dir(run.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        let before = names();
        state.weights.to_mut()[1][3] = f32::INFINITY;
        assert!(
            !write(kind, &files, &header(2), &params, &state).unwrap(),
            "of the raw weights, not the average"
        );
        for path in [run.best(), run.last()] {
            assert_eq!(load_header(&path).unwrap().progress.step, 1);
        }
        assert_eq!(names(), before, "nothing is left over");
    }
}

#[test]
fn a_run_holds_what_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::create(dir.path(), "a", "").unwrap();
    let params = params(2);
    let (state, header) = (state(&params, 1.0, false, 3), header(3));
    save(SaveKind::Merged, &run, &header, (&params, &state), [false, false]).unwrap();
    assert!(run.last().exists() && !run.best().exists() && !run.step(3).exists());
    save(SaveKind::Merged, &run, &header, (&params, &state), [true, true]).unwrap();
    assert!(run.best().exists() && run.step(3).exists());

    // What cannot be written fails before `last` claims it.
    let later = Header { progress: Progress { step: 4, ..header.progress.clone() }, ..header.clone() };
    std::fs::create_dir(run.step(4)).unwrap();
    assert!(save(SaveKind::Merged, &run, &later, (&params, &state), [true, true]).is_err());
    assert_eq!(load_header(&run.last()).unwrap().progress.step, 3);
}

#[test]
fn errors_are_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let params = params(5);
    let message = |params: &[ParamSpec]| {
        let error = load_training(&path, params).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    assert!(message(&params).contains("no such file"));

    Weights::default().save_atomic(&path).unwrap();
    assert!(message(&params).contains("not a trencadis checkpoint"));
    assert_eq!(load_model(&path).unwrap().0, None, "a foreign model has no description");

    let (state, header) = (state(&params, 0.0, false, 1), header(1));
    let save = |content| write(SaveKind::Merged, &[(path.clone(), content)], &header, &params, &state);
    save(Content::Model).unwrap();
    assert!(message(&params).contains("without training state"));

    save(Content::Training).unwrap();
    let wider = self::params(6);
    assert!(message(&wider).contains("blocks.0.weight [5, 3] (expected [6, 3])"), "{}", message(&wider));

    let mut raw = Weights::load(&path).unwrap();
    raw.metadata.insert("progress".into(), "{".into());
    raw.save_atomic(&path).unwrap();
    assert!(message(&params).contains("no readable progress"));
    raw.metadata.insert("trencadis".into(), "999".into());
    raw.save_atomic(&path).unwrap();
    assert!(message(&params).contains("layout 999"));

    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(message(&params).contains("not a readable safetensors file"));
}

/// Width of the model that is killed while it is saved: about 1 MiB, several writes a file.
const WIDTH: usize = 20_000;

/// Saves as fast as it can until it is killed; not a test of its own.
#[test]
fn child_saves_for_ever() {
    let Some(dir) = std::env::var_os("TRENCADIS_TEST_SAVE_INTO") else { return };
    let run = RunDir::resume(Path::new(&dir)).unwrap();
    let params = params(WIDTH);
    let kind = if index_of(&run.last()).exists() { SaveKind::Sharded } else { SaveKind::Merged };
    let first = load_header(&run.last()).unwrap().progress.step + 1;
    for step in first.. {
        save_step(kind, &run, &params, step);
    }
}

fn save_step(kind: SaveKind, run: &RunDir, params: &[ParamSpec], step: u64) {
    let state = state(params, step as f32, true, step);
    save(kind, run, &header(step), (params, &state), [true, false]).unwrap();
}

/// A child that never outlives its test, whatever fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_kill_at_any_time_leaves_a_whole_checkpoint() {
    KINDS.into_iter().for_each(kill_at_any_time);
}

fn kill_at_any_time(kind: SaveKind) {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::create(dir.path(), "a", "").unwrap();
    let params = params(WIDTH);
    save_step(kind, &run, &params, 0);
    let (path, last, best) = (run.path().to_owned(), run.last(), run.best());
    drop(run);
    let mut before = 0;
    for round in 0..10u32 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_saves_for_ever"])
            .env("TRENCADIS_TEST_SAVE_INTO", &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Killed(child);
        // Once it saves, let it get to some other point of a save in every round.
        while load_header(&last).unwrap().progress.step == before {
            assert!(child.0.try_wait().unwrap().is_none(), "the child runs until it is killed");
        }
        std::thread::sleep(std::time::Duration::from_micros(u64::from(round) * 1_700));
        drop(child);

        let (header, training) = load_training(&last, &params).unwrap();
        let step = header.progress.step;
        assert!(step > before);
        before = step;
        assert_eq!(training, state(&params, step as f32, true, step));
        // `best` is at most one save ahead, never behind.
        let (header, model) = load_model(&best).unwrap();
        let ahead = header.unwrap().progress.step;
        assert!((step..=step + 1).contains(&ahead), "{ahead} {step}");
        assert_eq!(model.tensors["head.bias"].1, [ahead as f32 + 0.75; 4]);
        // Resuming clears what was left half-written.
        drop(RunDir::resume(&path).unwrap());
        let files = std::fs::read_dir(&path).unwrap().count();
        let of_model = if kind == SaveKind::Merged { 1 } else { 2 };
        assert_eq!(files, 2 + 2 * of_model, "recipe, lock, best, last");
    }
}
