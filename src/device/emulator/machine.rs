//! The C++ half of the emulator, as Rust calls it: mirrors of `kernels/emulator/machine.h`.

use std::ffi::{c_char, c_void};

use super::CopyPolicy;

/// `emulator::Index`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Index {
    pub x: u32,
    pub y: u32,
    pub z: u32,
}

/// `emulator::Site`.
#[repr(C)]
pub struct Site {
    pub file: *const c_char,
    pub line: u32,
}

/// `emulator::Range`.
#[repr(C)]
pub struct Range {
    pub low: u64,
    pub high: u64,
    pub writers: *mut u32,
}

/// `emulator::FreedRange`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FreedRange {
    pub low: u64,
    pub high: u64,
}

/// `emulator::LaunchArguments`.
#[repr(C)]
pub struct LaunchArguments {
    pub grid: Index,
    pub threads: u32,
    pub shared_bytes: u32,
    pub policy: CopyPolicy,
    pub seed: u64,
    pub races: u32,
    pub global_races: u32,
    pub cluster: u32,
    pub registers: u32,
    pub dependent: u32,
    pub ranges: *mut Range,
    pub range_count: usize,
    pub freed: *const FreedRange,
    pub freed_count: usize,
}

/// `emulator::FaultRecord`.
#[repr(C)]
pub struct FaultRecord {
    pub set: u32,
    pub in_thread: u32,
    pub block: Index,
    pub thread: u32,
    pub site: Site,
    pub what: [c_char; 2048],
}

/// `emulator::WarpState`: masks of lanes.
#[repr(C)]
pub struct WarpState {
    pub runnable: u32,
    pub polling: u32,
    pub alive: u32,
}

/// `emulator::Kernel`.
#[repr(C)]
pub struct Kernel {
    pub name: *const c_char,
    pub run: unsafe extern "C" fn(*const c_void),
    pub params_bytes: usize,
    pub threads: u32,
    pub registers: u32,
}

/// `emulator::Launch`, owned by C++.
#[repr(C)]
pub struct Launch {
    opaque: [u8; 0],
}

/// `emulator::Cluster`, owned by C++ until its last block has ended.
#[repr(C)]
pub struct Cluster {
    opaque: [u8; 0],
}

/// `emulator::Block`, owned by C++.
#[repr(C)]
pub struct Block {
    opaque: [u8; 0],
}

/// `emulator::Thread`, owned by its block; what follows the first field is C++'s own.
#[repr(C)]
pub struct Thread {
    /// Of the coroutine, for [`super::schedule`] to suspend.
    pub yielder: *const c_void,
}

unsafe extern "C" {
    /// Where the C++ half looks for the thread that runs on this host thread.
    pub fn trencadis_emulator_current() -> *mut *mut Thread;
    pub fn trencadis_emulator_launch_begin(arguments: *const LaunchArguments) -> *mut Launch;
    pub fn trencadis_emulator_launch_end(launch: *mut Launch);
    pub fn trencadis_emulator_fault(launch: *const Launch) -> *const FaultRecord;
    pub fn trencadis_emulator_changes(launch: *const Launch) -> u64;
    pub fn trencadis_emulator_cluster_begin(launch: *mut Launch, x: u32, y: u32, z: u32) -> *mut Cluster;
    pub fn trencadis_emulator_block(cluster: *mut Cluster, rank: u32) -> *mut Block;
    /// Lets one asynchronous copy arrive, or `some`; whether any did. A fault may be set afterwards.
    pub fn trencadis_emulator_progress(launch: *mut Launch, some: u32) -> u32;
    pub fn trencadis_emulator_block_end(block: *mut Block);
    pub fn trencadis_emulator_warp(block: *mut Block, warp: u32) -> *mut WarpState;
    pub fn trencadis_emulator_thread(block: *mut Block, thread: u32) -> *mut Thread;
    /// Runs a kernel on the current thread to its end; called on its coroutine.
    pub fn trencadis_emulator_enter(run: unsafe extern "C" fn(*const c_void), params: *const c_void);
    pub fn trencadis_emulator_deadlock(
        launch: *mut Launch,
        blocks: *const *mut Block,
        count: usize,
        not_started: usize,
    );
}
