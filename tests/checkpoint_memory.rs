//! Memory that several ranks take to load and to save a training: that of the state once, whatever their number.

#[path = "support/memory.rs"]
mod memory;

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use trencadis::Result;
use trencadis::autograd::{ParamSpec, Shard};
use trencadis::nn::init::initialise;
use trencadis::parallel::{Mesh, MeshGroups, run_ranks};
use trencadis::recipe::*;
use trencadis::train::checkpoint::{Content, Header, Snapshot, open_training};
use trencadis::train::engine::{CpuEngine, Engine, TrainState, Whole};
use trencadis::train::step::TrainStep;

use memory::{Counting, LIVE, PEAK};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CLASSES: usize = 10;
const SLOTS: usize = 4;

fn recipe() -> Recipe {
    let model = ModelConfig {
        shape: String::new(),
        width: 96,
        depth: 24,
        mlp: 384,
        heads: 4,
        patch: 2,
        channels: 1,
        ..ModelConfig::default()
    };
    let mut recipe = Recipe { model, ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.packing.tokens = 128;
    recipe.train.ema = 0.9;
    recipe
}

/// On `ranks` ranks, the most that loading and then saving takes, beside what there was.
fn peak(folder: &Path, [data, tensor]: [usize; 2]) -> usize {
    let mesh = Mesh::of(data * tensor, data, tensor).unwrap();
    let (from, to) = (folder.join("from.safetensors"), folder.join("to.safetensors"));
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let (source, target) = (from.clone(), to.clone());
    let run = move |ranks: MeshGroups| -> Result<()> {
        let recipe = recipe();
        let shard = Shard { rank: ranks.tensor.rank(), size: ranks.tensor.size() };
        let step = TrainStep::of_shard(&recipe, CLASSES, SLOTS, shard)?;
        let (header, saved) = open_training(&source, step.params(), OptimizerKind::AdamW)?;
        let mut engine = CpuEngine::new(&recipe, step, SLOTS, &saved, Rc::new(ranks))?;
        for kind in [SaveKind::Merged, SaveKind::Sharded] {
            let snapshot = Snapshot { header: &header, state: engine.parts()?, kind };
            assert!(snapshot.write(&[(target.clone(), Content::Training)])??);
        }
        Ok(())
    };
    match mesh.world() {
        1 => run(MeshGroups::alone()).unwrap(),
        ranks => drop(run_ranks(ranks, move |group| run(MeshGroups::new(group, mesh)?)).unwrap()),
    }
    PEAK.load(Ordering::Relaxed) - before
}

#[test]
fn ranks_share_one_state() {
    let folder = tempfile::tempdir().unwrap();
    let params = TrainStep::new(&recipe(), CLASSES, SLOTS).unwrap().params().to_vec();
    let state = TrainState::fresh(initialise(&params, 3), true);
    let header = Header::default();
    let whole = Whole::new(&params, &state).unwrap();
    let snapshot = Snapshot { header: &header, state: &whole, kind: SaveKind::Merged };
    assert!(snapshot.write(&[(folder.path().join("from.safetensors"), Content::Training)]).unwrap().unwrap());
    drop(state);
    let bytes = 16 * params.iter().map(ParamSpec::len).sum::<usize>();
    for mesh in [[1, 1], [4, 1], [2, 2], [8, 1]] {
        let peak = peak(folder.path(), mesh);
        // A rank's windows and buffers of files, a block, and what the recorded step and its plan take.
        let small = bytes / 4 + mesh[0] * mesh[1] * (2 << 20);
        println!("{mesh:?}: {peak} of {bytes} bytes");
        assert!((bytes..bytes + small).contains(&peak), "{mesh:?}: {peak} of {bytes} bytes");
    }
}
