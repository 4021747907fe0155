//! What trainings on the CPU allocate, rank by rank, against what is planned for them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};

use trencadis::Result;
use trencadis::autograd::Shard;
use trencadis::data::batch::PackedBatch;
use trencadis::parallel::{Group, Mesh, MeshGroups, run_ranks};
use trencadis::recipe::*;
use trencadis::train::engine::{CpuEngine, Engine, TrainState};
use trencadis::train::plan::cpu;
use trencadis::train::plan::memory::RankMemory;
use trencadis::train::step::TrainStep;

mod support;

use support::batch;

/// Owners of memory: threads that are no rank, and up to 7 ranks.
const OWNERS: usize = 8;

thread_local! {
    static OWNER: Cell<usize> = const { Cell::new(0) };
}

/// Bytes that the threads of an owner have allocated and nobody has freed, and the most of them since they were last
/// asked.
static LIVE: [AtomicIsize; OWNERS] = [const { AtomicIsize::new(0) }; OWNERS];
static MOST: [AtomicIsize; OWNERS] = [const { AtomicIsize::new(0) }; OWNERS];

fn count(owner: usize, bytes: isize) {
    let live = LIVE[owner].fetch_add(bytes, Relaxed) + bytes;
    MOST[owner].fetch_max(live, Relaxed);
}

/// The system's allocator. In front of every block stands who has allocated it, whoever frees it.
struct Counting;

/// Bytes in front of a block: room for its owner that keeps the block's alignment.
fn front(layout: Layout) -> usize {
    layout.align().max(align_of::<usize>())
}

/// The block with what stands in front.
fn whole(layout: Layout, size: usize) -> Option<Layout> {
    Layout::from_size_align(size.checked_add(front(layout))?, front(layout)).ok()
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: blocks are those of the system's allocator, from `front` bytes on: a multiple of their alignment, and behind
// them lies as much as was asked for. They are freed and resized with the layout that they were made with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(all) = whole(layout, layout.size()) else { return std::ptr::null_mut() };
        // SAFETY: its size is at least that of its front, which is not 0.
        let block = unsafe { System.alloc(all) };
        if block.is_null() {
            return block;
        }
        let owner = OWNER.try_with(Cell::get).unwrap_or(0);
        count(owner, layout.size() as isize);
        // SAFETY: the first `front` bytes of the block are the allocator's own, at least a usize, and aligned for it.
        unsafe {
            block.cast::<usize>().write(owner);
            block.add(front(layout))
        }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let Some(all) = whole(layout, layout.size()) else { return };
        // SAFETY: `at` came from `alloc` or `realloc` with this layout, so the block begins `front` bytes before.
        unsafe {
            let block = at.sub(front(layout));
            count(block.cast::<usize>().read(), -(layout.size() as isize));
            System.dealloc(block, all);
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let (Some(all), Some(new)) = (whole(layout, layout.size()), whole(layout, size)) else {
            return std::ptr::null_mut();
        };
        // SAFETY: as for `dealloc`; the new size is not 0, and what stands in front moves with the block.
        unsafe {
            let block = System.realloc(at.sub(front(layout)), all, new.size());
            if block.is_null() {
                return block;
            }
            count(block.cast::<usize>().read(), size as isize - layout.size() as isize);
            block.add(front(layout))
        }
    }
}

const CLASSES: usize = 100;
const SLOTS: usize = 40;
const TOKENS: usize = 512;

fn recipe(block: BlockKind, recompute: Recompute) -> Recipe {
    let model = ModelConfig {
        shape: String::new(),
        width: 256,
        depth: 12,
        mlp: 1024,
        heads: 4,
        patch: 8,
        block,
        recompute,
        position: PositionConfig { rows: 8, columns: 8, ..PositionConfig::default() },
        ..ModelConfig::default()
    };
    let mut recipe = Recipe { model, ..Recipe::default() };
    recipe.packing.tokens = TOKENS;
    recipe.train.ema = 0.9;
    recipe
}

fn full(recipe: &Recipe) -> PackedBatch {
    batch(&[[4, 4]; 32], 0, recipe.model.patch_dim(), CLASSES, TOKENS, SLOTS - 32)
}

/// The most that this rank has held in steps of `batches` batches with an evaluation between.
fn used(group: &Group, recipe: &Recipe, mesh: Mesh, batches: usize) -> Result<usize> {
    let owner = 1 + group.rank();
    OWNER.set(owner);
    let before = LIVE[owner].load(Relaxed);
    let ranks = Rc::new(MeshGroups::new(group, mesh)?);
    let shard = Shard { rank: ranks.tensor.rank(), size: ranks.tensor.size() };
    let step = TrainStep::of_shard(recipe, CLASSES, SLOTS, shard)?;
    let weights = step.params().iter().map(|param| vec![0.02; param.len()]).collect();
    let mut engine = CpuEngine::new(recipe, step, SLOTS, &TrainState::fresh(weights, true), ranks)?;
    // As the loader has them.
    let waiting = vec![full(recipe); 3];
    group.barrier()?;
    MOST[owner].store(LIVE[owner].load(Relaxed), Relaxed);
    for evaluates in [false, true, false] {
        for number in 1..=batches {
            let next = waiting[0].clone();
            engine.add(&next, (number == batches).then_some(1e-3))?;
        }
        assert!(engine.collect()?.grad_norm.is_finite());
        if evaluates {
            engine.model()?.logits(&waiting[0])?;
        }
    }
    let most = MOST[owner].load(Relaxed) - before;
    group.barrier()?;
    Ok(most as usize)
}

/// Runs ranks and compares each with its plan.
#[track_caller]
fn check(block: BlockKind, recompute: Recompute, [data, tensor]: [usize; 2], batches: usize) -> RankMemory {
    check_recipe(recipe(block, recompute), [data, tensor], batches)
}

#[track_caller]
fn check_recipe(recipe: Recipe, [data, tensor]: [usize; 2], batches: usize) -> RankMemory {
    let (model, matmul) = (&recipe.model, recipe.train.matmul.name());
    let what =
        format!("{:?}, {data} x {tensor}, recompute {}, {matmul}", model.block, model.recompute.name());
    let step = TrainStep::of_shard(&recipe, CLASSES, SLOTS, Shard { rank: 0, size: tensor }).unwrap();
    let plan = cpu::memory(&recipe, &step, SLOTS, data, batches);
    let mesh = Mesh::of(data * tensor, data, tensor).unwrap();
    // Threads of the pool come to hold what they need for themselves.
    MOST[0].store(LIVE[0].load(Relaxed), Relaxed);
    let others = LIVE[0].load(Relaxed);
    let used = run_ranks(mesh.world(), move |group| used(group, &recipe, mesh, batches)).unwrap();
    let others = MOST[0].load(Relaxed) - others;
    let planned = plan.total();
    println!("{what}: planned {planned}, used {used:?}, threads of the pool {others}\n  {plan:?}");
    for (rank, used) in used.into_iter().enumerate() {
        let ratio = used as f64 / planned as f64;
        assert!(
            (0.95..=1.05).contains(&ratio),
            "{what}: rank {rank} has used {used} of {planned}: {ratio:.3}"
        );
    }
    plan
}

/// One test, as the counters are of the whole process.
#[test]
fn ranks_hold_what_is_planned() {
    use BlockKind::{Parallel, Serial};
    use Recompute::{Full, None, Selective};
    let alone = check(Serial, None, [1, 1], 1);
    let again = check(Serial, Full, [1, 1], 3);
    assert!(again.activations < alone.activations / 2, "recomputation saves memory");
    let cheap = check(Serial, Selective, [1, 1], 1);
    assert!(cheap.activations < alone.activations * 3 / 4 && cheap.activations > again.activations);
    check(Parallel, Selective, [1, 2], 1);
    let pieces = check(Serial, None, [2, 1], 2);
    assert!(pieces.state() <= alone.state() / 2 + 4096 && pieces.gathered > 0);
    check(Serial, None, [1, 2], 1);
    check(Parallel, None, [1, 2], 1);
    check(Parallel, None, [2, 2], 1);
    check(Serial, None, [3, 1], 1);
    let mut rounded = recipe(Serial, None);
    rounded.train.matmul = MatmulKind::Bf16;
    let packed = check_recipe(rounded, [1, 1], 1);
    assert!(packed.activations > alone.activations, "operands are packed");
}
