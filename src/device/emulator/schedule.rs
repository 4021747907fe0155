//! Which thread runs next: coroutines, turns, and when nothing moves.

use std::cell::RefCell;
use std::ffi::c_void;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use super::CopyPolicy;
use super::beside::{Beside, Pace};
use super::fault::Fault;
use super::kernels::Entry;
use super::machine::{self, Block, Launch, LaunchArguments, Thread, WarpState};

/// Bytes of a thread's stack; below it lies a page that may not be touched.
const STACK_BYTES: usize = 128 << 10;
/// Stacks that a host thread keeps for its next launch.
const KEPT_STACKS: usize = 4096;
/// Turns in which only spinning threads ran and nothing changed, after which nothing will.
const IDLE_TURNS: u32 = 4096;
/// The same where other threads ran, but nothing that a spin could see changed.
const QUIET_TURNS: u32 = 100_000;

/// What a coroutine tells when it gives up control: whether the launch is at fault.
type Faulted = bool;
type Fiber = Coroutine<(), Faulted, (), DefaultStack>;

thread_local! {
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Called by the C++ half on a coroutine: gives control to the scheduler, and returns when the thread is to
/// go on.
///
/// # Safety
/// `yielder` is that of the coroutine that runs.
#[unsafe(no_mangle)]
unsafe extern "C" fn trencadis_emulator_suspend(yielder: *const c_void, faulted: u32) {
    // SAFETY: set by the coroutine's own closure in `start`, on whose stack it lives.
    let yielder = unsafe { &*yielder.cast::<Yielder<(), Faulted>>() };
    yielder.suspend(faulted != 0);
}

/// A seeded sequence (splitmix64); seed 0 leaves every order as it is.
pub struct Order {
    state: u64,
    natural: bool,
}

impl Order {
    pub fn new(seed: u64) -> Self {
        Self { state: seed, natural: seed == 0 }
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        if self.natural {
            return;
        }
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// A warp: its masks, and its lanes' coroutines in the order in which they take turns.
struct Warp {
    state: *mut WarpState,
    lanes: Vec<(u32, *mut Thread, Fiber)>,
}

struct Resident {
    block: *mut Block,
    warps: Vec<Warp>,
}

/// Takes part in no unwinding: what is left of a coroutine is given up as it stands.
fn give_up(mut fiber: Fiber) {
    // SAFETY: nothing on its stack has a destructor: C++ frames of kernels, which own no memory, and the
    // closure of `start`, which holds plain pointers.
    unsafe { fiber.force_reset() };
    let stack = fiber.into_stack();
    STACKS.with_borrow_mut(|stacks| {
        if stacks.len() < KEPT_STACKS {
            stacks.push(stack);
        }
    });
}

fn start(
    thread: *mut Thread,
    run: unsafe extern "C" fn(*const c_void),
    params: *const c_void,
) -> Option<Fiber> {
    let stack = match STACKS.with_borrow_mut(Vec::pop) {
        Some(stack) => stack,
        None => DefaultStack::new(STACK_BYTES).ok()?,
    };
    Some(Fiber::with_stack(stack, move |yielder: &Yielder<(), Faulted>, ()| {
        // SAFETY: thread and parameters outlive the coroutine; `run` is a kernel that takes them.
        unsafe {
            (*thread).yielder = std::ptr::from_ref(yielder).cast();
            machine::trencadis_emulator_enter(run, params);
        }
    }))
}

impl Resident {
    /// Makes the threads of a block, none of which has run.
    fn new(
        block: *mut Block,
        threads: u32,
        kernel: Entry,
        params: *const c_void,
        order: &mut Order,
    ) -> Option<Self> {
        let mut resident = Self { block, warps: Vec::with_capacity(threads as usize / 32) };
        for warp in 0..threads / 32 {
            // SAFETY: the block has this many warps, which live as long as it.
            let state = unsafe { machine::trencadis_emulator_warp(block, warp) };
            resident.warps.push(Warp { state, lanes: Vec::with_capacity(32) });
            for lane in 0..32 {
                // SAFETY: as above.
                let thread = unsafe { machine::trencadis_emulator_thread(block, warp * 32 + lane) };
                let Some(fiber) = start(thread, kernel.run, params) else {
                    resident.end();
                    return None;
                };
                resident.warps[warp as usize].lanes.push((lane, thread, fiber));
            }
            order.shuffle(&mut resident.warps[warp as usize].lanes);
        }
        Some(resident)
    }

    fn end(self) {
        for (_, _, fiber) in self.warps.into_iter().flat_map(|warp| warp.lanes) {
            give_up(fiber);
        }
        // SAFETY: begun once, ended once, and its coroutines are gone.
        unsafe { machine::trencadis_emulator_block_end(self.block) };
    }

    fn ended(&self) -> bool {
        // SAFETY: the states live as long as the block.
        self.warps.iter().all(|warp| unsafe { (*warp.state).alive } == 0)
    }
}

/// How a turn of a block went.
struct Turn {
    ran: bool,
    /// A thread ran that was not spinning before.
    advanced: bool,
    faulted: bool,
}

/// Lets every warp of a block run until all its lanes wait.
fn turn(resident: &mut Resident, order: &mut Order, pace: &mut Pace<'_>, current: *mut *mut Thread) -> Turn {
    let mut turn = Turn { ran: false, advanced: false, faulted: false };
    order.shuffle(&mut resident.warps);
    for warp in &mut resident.warps {
        let state = warp.state;
        // SAFETY: lives as long as the block, and is only read and written on this host thread; no
        // reference to it is held across a switch.
        let runnable = move || unsafe { (*state).runnable };
        turn.advanced |= runnable() != 0;
        // SAFETY: as above.
        unsafe {
            (*state).runnable |= (*state).polling;
            (*state).polling = 0;
        }
        while runnable() != 0 {
            turn.ran = true;
            pace.between();
            for (lane, thread, fiber) in &mut warp.lanes {
                if runnable() >> *lane & 1 == 0 {
                    continue;
                }
                // SAFETY: `current` is this host thread's, and the thread lives as long as its block.
                unsafe { *current = *thread };
                if fiber.resume(()) == CoroutineResult::Yield(true) {
                    turn.faulted = true;
                    return turn;
                }
            }
        }
    }
    turn
}

/// Ends a launch whichever way it is left.
struct LaunchGuard(*mut Launch);

impl Drop for LaunchGuard {
    fn drop(&mut self) {
        // SAFETY: begun once; its blocks are ended before.
        unsafe { machine::trencadis_emulator_launch_end(self.0) };
    }
}

/// Runs all blocks of a launch, at most `resident` at a time, or one cluster of them.
///
/// # Safety
/// `params` is what the kernel takes, and addresses in it belong to the ranges of `arguments`.
pub unsafe fn run(
    name: &str,
    kernel: Entry,
    arguments: &LaunchArguments,
    params: *const c_void,
    resident: usize,
    beside: &mut dyn Beside,
) -> Result<(), Fault> {
    let mut pace = Pace::new(beside, arguments.policy, arguments.seed);
    let mut order = Order::new(arguments.seed);
    let grid = arguments.grid;
    let cluster = arguments.cluster as usize;
    // First blocks of clusters.
    let mut waiting: Vec<[u32; 3]> = (0..grid.z)
        .flat_map(|z| (0..grid.y).flat_map(move |y| (0..grid.x).step_by(cluster).map(move |x| [x, y, z])))
        .collect();
    order.shuffle(&mut waiting);
    waiting.reverse();
    // SAFETY: the arguments live until the guard is dropped.
    let launch = LaunchGuard(unsafe { machine::trencadis_emulator_launch_begin(arguments) });
    // SAFETY: always valid on this host thread.
    let current = unsafe { machine::trencadis_emulator_current() };

    let mut residents: Vec<Resident> = Vec::new();
    let mut outcome = Ok(());
    // SAFETY: the record lives as long as the launch, and is not written while it is read here.
    let record = || unsafe { &*machine::trencadis_emulator_fault(launch.0) };
    let mut changes = 0;
    let (mut idle, mut quiet) = (0, 0);
    'launch: loop {
        while residents.is_empty() || residents.len() + cluster <= resident {
            let Some([x, y, z]) = waiting.pop() else { break };
            // SAFETY: the launch is under way.
            let begun = unsafe { machine::trencadis_emulator_cluster_begin(launch.0, x, y, z) };
            let mut complete = true;
            for rank in 0..arguments.cluster {
                // SAFETY: the cluster has this many blocks, and lives until the last of them has ended.
                let block = unsafe { machine::trencadis_emulator_block(begun, rank) };
                match Resident::new(block, arguments.threads, kernel, params, &mut order) {
                    Some(block) => residents.push(block),
                    None => complete = false,
                }
            }
            if !complete {
                outcome = Err(Fault::refused(name, "no memory for the stacks of its threads"));
                break 'launch;
            }
        }
        if residents.is_empty() {
            break;
        }
        order.shuffle(&mut residents);
        let mut sum = Turn { ran: false, advanced: false, faulted: false };
        for block in &mut residents {
            let one = turn(block, &mut order, &mut pace, current);
            sum.ran |= one.ran;
            sum.advanced |= one.advanced;
            if one.faulted {
                outcome = Err(Fault::from_record(name, record()));
                break 'launch;
            }
        }
        // Copies under way arrive now and then, or as late as can be: when nobody gets on without them.
        let now_and_then = arguments.policy == CopyPolicy::Random;
        if now_and_then || !sum.advanced {
            // SAFETY: the launch is under way, and none of its threads runs.
            let mut arrived =
                unsafe { machine::trencadis_emulator_progress(launch.0, now_and_then.into()) } != 0;
            if !arrived && !sum.advanced {
                // SAFETY: as above.
                arrived = unsafe { machine::trencadis_emulator_progress(launch.0, 0) } != 0;
            }
            if !arrived && !sum.advanced {
                arrived = pace.at_last();
            }
            sum.ran |= arrived;
            if record().set != 0 {
                outcome = Err(Fault::from_record(name, record()));
                break 'launch;
            }
        }
        let mut i = 0;
        while i < residents.len() {
            if residents[i].ended() {
                residents.swap_remove(i).end();
            } else {
                i += 1;
            }
        }
        // SAFETY: the launch is under way.
        let now = unsafe { machine::trencadis_emulator_changes(launch.0) };
        if now != changes || pace.happened() {
            (changes, idle, quiet) = (now, 0, 0);
        } else if sum.advanced {
            (idle, quiet) = (0, quiet + 1);
        } else {
            idle += 1;
        }
        let stuck = !sum.ran || idle > IDLE_TURNS || quiet > QUIET_TURNS;
        if stuck && !residents.is_empty() {
            let blocks: Vec<*mut Block> = residents.iter().map(|resident| resident.block).collect();
            let not_started = waiting.len() * cluster;
            // SAFETY: the launch and its resident blocks are under way.
            unsafe {
                machine::trencadis_emulator_deadlock(launch.0, blocks.as_ptr(), blocks.len(), not_started);
            }
            outcome = Err(Fault::from_record(name, record()).and(&pace.waits()));
            break;
        }
    }
    for block in residents {
        block.end();
    }
    outcome
}
