//! Checkpoints that are saved on one mesh and loaded on others, on the CPU and on devices: the same bits.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Mutex;

use trencadis::autograd::{ParamSpec, Shard};
use trencadis::device::Device;
use trencadis::nn::init::initialise;
use trencadis::parallel::{Mesh, MeshGroups, run_ranks};
use trencadis::recipe::*;
use trencadis::train::checkpoint::{Content, Header, Progress, Snapshot, load_model, open_training};
use trencadis::train::engine::{
    CpuEngine, DeviceEngine, DeviceOptions, DeviceRanks, Engine, Fresh, StateKind, StateSource, TrainState,
    Wanted, Whole,
};
use trencadis::train::step::TrainStep;
use trencadis::weights::sharded::{Index, index_of};
use trencadis::{Error, Result};

use crate::support::devices::devices;

const CLASSES: usize = 10;
const SLOTS: usize = 4;
const MESHES: [[usize; 2]; 5] = [[1, 1], [2, 1], [1, 2], [2, 2], [3, 1]];

/// Every split, odd widths that devices pad, and pieces that end within a row.
fn recipe() -> Recipe {
    let model = ModelConfig {
        shape: String::new(),
        width: 24,
        depth: 2,
        mlp: 40,
        heads: 2,
        head_dim: 8,
        patch: 2,
        channels: 1,
        layer_scale: 0.5,
        qkv_bias: true,
        proj_bias: true,
        position: PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() },
        ..ModelConfig::default()
    };
    let mut recipe = Recipe { model, ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.packing.tokens = 128;
    recipe.resolution.max = 20;
    recipe.train.ema = 0.9;
    recipe
}

fn params() -> Vec<ParamSpec> {
    TrainStep::new(&recipe(), CLASSES, SLOTS).unwrap().params().to_vec()
}

/// Other numbers everywhere.
fn state() -> TrainState<'static> {
    let mut next = 0.0;
    let mut numbers = || -> Vec<Vec<f32>> {
        let mut number = || {
            next += 1.0;
            next
        };
        params().iter().map(|param| (0..param.len()).map(|_| number()).collect()).collect()
    };
    TrainState {
        weights: numbers().into(),
        ema: Some(numbers().into()),
        m: numbers().into(),
        v: numbers().into(),
        statistics: Vec::new().into(),
        optimizer_step: 7,
    }
}

fn header(step: u64) -> Header {
    let progress = Progress { step, ..Progress::default() };
    Header { recipe: "seed = 1".into(), classes: vec!["a".into()], tokenizer: None, progress }
}

/// This rank's part of a training from a source; none is the CPU.
fn engine(
    device: Option<&Device>,
    ranks: Rc<MeshGroups>,
    source: &dyn StateSource,
) -> Result<Box<dyn Engine>> {
    let recipe = recipe();
    let [data, tensor] =
        [&ranks.data, &ranks.tensor].map(|group| Shard { rank: group.rank(), size: group.size() });
    let step = TrainStep::of_shard(&recipe, CLASSES, SLOTS, tensor)?;
    let Some(device) = device else {
        return Ok(Box::new(CpuEngine::new(&recipe, step, SLOTS, source, ranks)?));
    };
    let connected = match ranks.world.size() {
        1 => None,
        _ => Some(DeviceRanks::connect(ranks, device)?),
    };
    let options = DeviceOptions::default();
    let mut engine = DeviceEngine::on_mesh(device, &recipe, step, SLOTS, options, (data, connected))?;
    engine.load(source)?;
    Ok(Box::new(engine))
}

/// Runs `f` on all ranks of a mesh, or on one that has no others.
fn on_mesh<T: Send + 'static>(
    [data, tensor]: [usize; 2],
    f: impl Fn(Rc<MeshGroups>) -> Result<T> + Send + Sync + 'static,
) -> Vec<T> {
    if data * tensor == 1 {
        return vec![f(Rc::new(MeshGroups::alone())).unwrap()];
    }
    let mesh = Mesh::of(data * tensor, data, tensor).unwrap();
    run_ranks(mesh.world(), move |group| f(Rc::new(MeshGroups::new(group, mesh)?))).unwrap()
}

/// Loads one checkpoint on a mesh and saves it as others.
fn convert(device: Option<&Device>, mesh: [usize; 2], from: &Path, to: &[(PathBuf, SaveKind)], step: u64) {
    let (device, from, to) = (device.cloned(), from.to_owned(), to.to_vec());
    on_mesh(mesh, move |ranks| {
        let (_, saved) = open_training(&from, &params(), OptimizerKind::AdamW)?;
        let mut engine = engine(device.as_ref(), ranks, &saved)?;
        for (path, kind) in &to {
            let snapshot = Snapshot { header: &header(step), state: engine.parts()?, kind: *kind };
            assert!(snapshot.write(&[(path.clone(), Content::Training)])??);
        }
        Ok(())
    });
}

/// One file, which one rank writes that has it in memory.
fn reference(folder: &Path) -> PathBuf {
    let path = folder.join("reference.safetensors");
    let (params, state) = (params(), state());
    let whole = Whole::new(&params, &state).unwrap();
    let snapshot = Snapshot { header: &header(7), state: &whole, kind: SaveKind::Merged };
    assert!(snapshot.write(&[(path.clone(), Content::Training)]).unwrap().unwrap());
    path
}

/// From `a` to `b`: one file from one file, and from the files of `a` on `b`.
fn goes_from(device: Option<&Device>, a: [usize; 2], others: &[[usize; 2]]) {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let reference = reference(folder.path());
    let bytes = std::fs::read(&reference).unwrap();
    let (merged, sharded) = (at("merged.safetensors"), at("sharded.safetensors"));
    let to = [(merged.clone(), SaveKind::Merged), (sharded.clone(), SaveKind::Sharded)];
    convert(device, a, &reference, &to, 7);
    assert!(std::fs::read(&merged).unwrap() == bytes, "{a:?}: one file");
    assert!(!sharded.exists());
    let index = Index::load(&index_of(&sharded)).unwrap();
    assert_eq!(index.files().len(), a[0] * a[1], "every rank has a file");
    // Nothing that two ranks have is written twice.
    let stored: usize = index.files().iter().map(|file| values(&at(file))).sum();
    assert_eq!(stored, 4 * params().iter().map(ParamSpec::len).sum::<usize>());
    for &b in others {
        convert(device, b, &sharded, &[(at("again.safetensors"), SaveKind::Merged)], 7);
        assert!(std::fs::read(at("again.safetensors")).unwrap() == bytes, "{a:?} to {b:?}");
    }
    let (loaded, model) = load_model(&index_of(&sharded)).unwrap();
    assert_eq!((loaded.unwrap(), model.tensors.len()), (header(7), params().len()));
    assert_eq!(model.tensors, load_model(&reference).unwrap().1.tensors);
}

fn values(path: &Path) -> usize {
    trencadis::weights::Weights::load(path).unwrap().tensors.values().map(|(_, values)| values.len()).sum()
}

#[test]
fn checkpoints_go_from_any_mesh_to_any() {
    MESHES.into_iter().for_each(|mesh| goes_from(None, mesh, &MESHES));
}

#[test]
fn checkpoints_go_from_any_mesh_to_any_on_a_device() {
    for device in devices() {
        for (i, mesh) in MESHES.into_iter().enumerate() {
            goes_from(Some(&device), mesh, &[MESHES[(i + 1) % 5]]);
        }
    }
}

/// Weights that are drawn are the same on every mesh, and their own average.
#[test]
fn fresh_weights_are_those_of_one_rank() {
    let wanted = TrainState::fresh(initialise(&params(), 3), true);
    for mesh in MESHES {
        for device in [None, devices().into_iter().next()] {
            let ranks = on_mesh(mesh, move |ranks| {
                engine(device.as_ref(), ranks, &Fresh::drawn(&params(), 3, true))?.state()
            });
            assert!(ranks[0] == wanted, "{mesh:?}");
        }
    }
    let given = Fresh::given(&params(), initialise(&params(), 3), true);
    assert!(TrainState::of(&given, &params()).unwrap() == wanted);
}

/// Counts what is asked for.
struct Counted<'a> {
    state: &'a TrainState<'static>,
    elements: Mutex<usize>,
}

impl StateSource for Counted<'_> {
    fn optimizer_step(&self) -> u64 {
        self.state.optimizer_step
    }

    fn average(&self) -> trencadis::train::engine::Average {
        self.state.average()
    }

    fn statistics(&self, lens: &[usize]) -> Result<Vec<Vec<f32>>> {
        self.state.statistics(lens)
    }

    fn read(&self, kind: StateKind, wanted: &[Wanted]) -> Result<Vec<Vec<f32>>> {
        let values = self.state.read(kind, wanted)?;
        *self.elements.lock().unwrap() += values.iter().map(Vec::len).sum::<usize>();
        Ok(values)
    }
}

/// A rank reads its share, and of a state that is saved it sends no more.
#[test]
fn a_rank_moves_its_share_alone() {
    let whole: usize = params().iter().map(ParamSpec::len).sum();
    for mesh in [[2, 1], [2, 2], [3, 1]] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let counts = on_mesh(mesh, move |ranks| {
            let state = state();
            let source = Counted { state: &state, elements: Mutex::new(0) };
            let mut engine = engine(None, ranks.clone(), &source)?;
            let read = *source.elements.lock().unwrap();
            let before = ranks.world.sent()[0];
            let files = [(path.clone(), Content::Training)];
            let snapshot = Snapshot { header: &header(1), state: engine.parts()?, kind: SaveKind::Merged };
            snapshot.write(&files)??;
            Ok((read, (ranks.world.sent()[0] - before) as usize))
        });
        let replicated = mesh[1] * 4 * whole;
        let read: usize = counts.iter().map(|(read, _)| read).sum();
        assert!((4 * whole..=replicated).contains(&read), "{mesh:?}: {read}");
        for (rank, &(read, sent)) in counts.iter().enumerate() {
            // Padding of pieces, vectors that a tensor axis does not share out.
            assert!(read * mesh[0] < 4 * whole * 11 / 10, "{mesh:?}: rank {rank} reads {read} of {whole}");
            assert!(rank == 0 || sent >= 4 * (read / 2) && sent < 4 * read + 1000, "{sent} {read}");
        }
    }
}

/// The second save fails on one rank, or is left by a kill before its index: the first stands, with its own files.
#[test]
fn a_save_that_fails_leaves_the_former_one() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let reference = reference(folder.path());
    let last = at("last.safetensors");
    let sharded = [(last.clone(), SaveKind::Sharded)];
    convert(None, [2, 2], &reference, &sharded, 10);
    let first = std::fs::read(index_of(&last)).unwrap();
    let names = || -> BTreeSet<String> {
        std::fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    let files = names();

    // Where the third rank would write there is a folder.
    std::fs::create_dir(at("last.11-00003-of-00004.safetensors")).unwrap();
    let (source, path) = (reference.clone(), last.clone());
    let told = on_mesh([2, 2], move |ranks| {
        let (_, saved) = open_training(&source, &params(), OptimizerKind::AdamW)?;
        let mut engine = engine(None, ranks.clone(), &saved)?;
        let header = header(11);
        let snapshot = Snapshot { header: &header, state: engine.parts()?, kind: SaveKind::Sharded };
        let failed = snapshot.write(&[(path.clone(), Content::Training)])?;
        // All are whole, and can save again.
        ranks.world.barrier()?;
        Ok(failed.unwrap_err().to_string())
    });
    for text in told {
        assert!(text.starts_with("rank 2: ") && text.contains("last.11-00003-of-00004"), "{text}");
    }
    std::fs::remove_dir(at("last.11-00003-of-00004.safetensors")).unwrap();
    assert_eq!((names(), std::fs::read(index_of(&last)).unwrap()), (files.clone(), first));

    // Files of a save that was killed are no part of the set, and go with the next.
    for name in ["last.11-00001-of-00004.safetensors", "last.11-00002-of-00004.safetensors"] {
        std::fs::copy(at("last.10-00003-of-00004.safetensors"), at(name)).unwrap();
    }
    convert(None, [1, 1], &last, &[(at("again.safetensors"), SaveKind::Merged)], 7);
    assert!(std::fs::read(at("again.safetensors")).unwrap() == std::fs::read(&reference).unwrap());
    // The same step once more, on another mesh of as many ranks: its files get another name.
    convert(None, [4, 1], &last, &sharded, 10);
    let index = Index::load(&index_of(&last)).unwrap();
    assert_eq!(index.set, "last.10.2");
    assert_eq!(names().len(), 3 + 4, "the reference, the merged one, an index, and four files");
    convert(None, [1, 2], &last, &[(at("again.safetensors"), SaveKind::Merged)], 7);
    assert!(std::fs::read(at("again.safetensors")).unwrap() == std::fs::read(&reference).unwrap());
    // In the other form, nothing is left of the former.
    convert(None, [2, 1], &last, &[(last.clone(), SaveKind::Merged)], 12);
    assert_eq!(names().len(), 3);
}

/// Every damage is one sentence that names the file.
#[test]
fn damaged_sets_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let reference = reference(folder.path());
    let last = at("last.safetensors");
    let save = |step| convert(None, [2, 2], &reference, &[(last.clone(), SaveKind::Sharded)], step);
    save(3);
    let former = std::fs::read(at("last.3-00002-of-00004.safetensors")).unwrap();
    save(4);
    let index = Index::load(&index_of(&last)).unwrap();
    let file = at("last.4-00002-of-00004.safetensors");
    let whole = std::fs::read(&file).unwrap();
    #[track_caller]
    fn refused(path: &Path, named: &Path, part: &str) {
        let error: Error = open_training(path, &params(), OptimizerKind::AdamW).unwrap_err();
        let text = error.to_string();
        assert!(error.exit_code() == 2 && text.starts_with(&format!("{}: ", named.display())), "{text}");
        assert!(text.contains(part) && text.lines().count() == 1, "{text}");
    }

    std::fs::remove_file(&file).unwrap();
    refused(&last, &file, "is missing, and ");
    std::fs::write(&file, &former).unwrap();
    refused(&last, &file, "is of another save (\"last.3\") than ");
    std::fs::write(&file, &whole[..whole.len() - 4]).unwrap();
    refused(&last, &file, "is not a readable safetensors file");
    std::fs::write(&file, &whole).unwrap();
    open_training(&last, &params(), OptimizerKind::AdamW).unwrap();

    let with = |change: &dyn Fn(&mut Index)| {
        let mut changed = index.clone();
        change(&mut changed);
        changed.save_atomic(&index_of(&last)).unwrap();
    };
    let name = "blocks.0.attn.qkv.weight";
    let slices = |index: &mut Index| index.weight_map.get_mut(name).unwrap().slices.clone();
    let index_path = index_of(&last);
    with(&|index| drop(index.weight_map.get_mut(name).unwrap().slices.pop()));
    refused(&last, &index_path, "is incomplete: none of its files has elements ");
    with(&|index| {
        let again = slices(index).pop().unwrap();
        index.weight_map.get_mut(name).unwrap().slices.push(again);
    });
    refused(&last, &index_path, " is twice in last.4-0000");
    with(&|index| index.weight_map.get_mut(name).unwrap().slices[1].part = [0, 2]);
    refused(&last, &index_path, " and in last.4-0000");
    with(&|index| index.weight_map.get_mut(name).unwrap().slices[1].range[1] -= 1);
    refused(&last, &file, &format!("elements of {name}, and "));
    with(&|index| index.weight_map.get_mut(name).unwrap().slices[1].part[1] = 5);
    refused(&last, &index_path, "that its shape has not");
    with(&|index| index.weight_map.get_mut(name).unwrap().slices[1].file = "../a".into());
    refused(&last, &index_path, "which is no name of a file beside it");
    with(&|index| drop(index.weight_map.remove(name)));
    refused(
        &last,
        &index_path,
        &format!("does not fit this model, use the recipe it was trained with (missing: {name})"),
    );
    with(&|index| {
        let bias = index.weight_map.get_mut("head.bias").unwrap();
        bias.shape = vec![1, CLASSES];
    });
    refused(&last, &index_path, "head.bias [1, 10] (expected [10])");
    std::fs::write(&index_path, "{\"set\": 3}").unwrap();
    refused(&last, &index_path, "is not a readable index of a sharded checkpoint");
    std::fs::remove_file(&index_path).unwrap();
    refused(&last, &last, "there is no such file");
    refused(&index_path, &index_path, "there is no such file");
}
