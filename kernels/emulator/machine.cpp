// Meetings, barriers, faults, and the life of launches and blocks: what src/device/emulator calls.
#include "operations.h"

#include <algorithm>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Switches to the scheduler; returns when this thread is to go on. Defined in src/device/emulator.
extern "C" void trencadis_emulator_suspend(const void* yielder, uint32_t faulted);

namespace emulator {

__thread Thread* current = nullptr;
__thread const Thread* blamed = nullptr;

namespace {

const char* name_of(Collective collective)
{
    switch (collective) {
    case Collective::barrier: return "barrier";
    case Collective::warp_sync: return "warp_sync";
    case Collective::warp_id: return "warp_id";
    case Collective::shuffle: return "shuffle";
    case Collective::shuffle_xor: return "shuffle_xor";
    case Collective::shuffle_up: return "shuffle_up";
    case Collective::ballot: return "ballot";
    case Collective::ldmatrix: return "ldmatrix";
    case Collective::mma: return "mma";
    case Collective::none: break;
    }
    return "nothing";
}

void suspend(bool faulted)
{
    trencadis_emulator_suspend(current->yielder, faulted);
}

uint32_t lane_bit(const Thread& thread)
{
    return 1u << thread.lane;
}

// Lanes that have come to the meeting under way.
uint32_t lanes_waiting(const Warp& warp)
{
    return warp.arrived == 0 ? 0 : warp.state.alive & ~warp.state.runnable & ~warp.state.polling;
}

struct BarrierCall {
    uint32_t id;
    uint32_t threads;
};

// After a barrier each of the warps in `mask` knows what any of them knew or did.
void join_clocks(Block& block, uint32_t mask)
{
    if (block.launch_races()) {
        uint32_t joined[most_warps] = {};
        for (Warp& warp : block.warps) {
            if (!(mask >> warp.id & 1)) continue;
            for (uint32_t u = 0; u < block.warp_count; u++) joined[u] = std::max(joined[u], warp.seen[u]);
            joined[warp.id] = std::max(joined[warp.id], warp.epoch);
        }
        for (Warp& warp : block.warps) {
            if (mask >> warp.id & 1) memcpy(warp.seen, joined, block.warp_count * sizeof(uint32_t));
        }
    }
    for (Warp& warp : block.warps) {
        if (mask >> warp.id & 1) block.advance(warp);
    }
}

void end_meeting(Warp& warp)
{
    warp.arrived = 0;
    warp.state.runnable = warp.state.alive;
}

} // namespace

void fail(Site site, const char* format, ...)
{
    Launch& launch = *current->block->launch;
    FaultRecord& fault = launch.fault;
    if (!fault.set) {
        const Thread& thread = blamed ? *blamed : *current;
        fault.set = 1;
        fault.in_thread = 1;
        fault.block = thread.block->index;
        fault.thread = thread.id;
        fault.site = site;
        va_list values;
        va_start(values, format);
        vsnprintf(fault.what, sizeof fault.what, format, values);
        va_end(values);
    }
    blamed = nullptr;
    for (;;) suspend(true);
}

bool meet(Collective collective, void* arguments, Site site)
{
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    if (__builtin_expect(warp.state.alive != all_lanes, 0)) {
        fail(site, "is at %s, which all 32 lanes must reach, but lane %d of its warp has ended",
             name_of(collective), __builtin_ctz(~warp.state.alive));
    }
    if (warp.arrived == 0) {
        warp.collective = collective;
        warp.site = site;
    } else if (__builtin_expect(warp.collective != collective || warp.site.line != site.line
                                    || (warp.site.file != site.file && strcmp(warp.site.file, site.file) != 0),
                                0)) {
        fail(site, "the lanes of a warp diverged: this one is at %s, but lane %d waits at %s (%s:%u)",
             name_of(collective), __builtin_ctz(lanes_waiting(warp)), name_of(warp.collective), warp.site.file,
             warp.site.line);
    }
    warp.arguments[thread.lane] = arguments;
    if (++warp.arrived == 32) return true;
    warp.state.runnable &= ~lane_bit(thread);
    suspend(false);
    return false;
}

void part()
{
    end_meeting(*current->warp);
}

void give_way(Site site)
{
    Thread& thread = *current;
    thread.polling = site;
    thread.warp->state.runnable &= ~lane_bit(thread);
    thread.warp->state.polling |= lane_bit(thread);
    suspend(false);
}

void order_warp(Site site)
{
    if (!meet(Collective::warp_sync, nullptr, site)) return;
    Warp& warp = *current->warp;
    warp.block->advance(warp);
    part();
}

void block_barrier(uint32_t id, uint32_t threads, Site site)
{
    BarrierCall call{id, threads};
    if (!meet(Collective::barrier, &call, site)) return;
    Warp& warp = *current->warp;
    Block& block = *warp.block;
    for (uint32_t lane = 0; lane < 32; lane++) {
        const BarrierCall& other = *static_cast<const BarrierCall*>(warp.arguments[lane]);
        if (other.id != id || other.threads != threads) {
            fail(site, "the lanes of a warp name different barriers: this one barrier %u of %u threads, lane %u "
                       "barrier %u of %u threads",
                 id, threads, lane, other.id, other.threads);
        }
    }
    if (threads == 0 || threads % 32 != 0 || threads > block.warp_count * 32) {
        fail(site, "barrier %u of %u threads: must be a multiple of 32, and at most the block's %u", id, threads,
             block.warp_count * 32);
    }
    Barrier& barrier = block.barriers[id];
    if (barrier.expected == 0) {
        barrier = Barrier{threads, 0, 0, site};
    } else if (barrier.expected != threads) {
        fail(site, "barrier %u of %u threads, but warp %d waits at it for %u threads (%s:%u)", id, threads,
             __builtin_ctz(barrier.warps), barrier.expected, barrier.site.file, barrier.site.line);
    }
    barrier.arrived += 32;
    barrier.warps |= 1u << warp.id;
    if (barrier.arrived < barrier.expected) {
        warp.state.runnable &= ~lane_bit(*current);
        suspend(false);
        return;
    }
    uint32_t mask = barrier.warps;
    barrier = Barrier{};
    join_clocks(block, mask);
    for (Warp& other : block.warps) {
        if (mask >> other.id & 1) end_meeting(other);
    }
}

void Block::restart_time()
{
    // What was ordered when is forgotten: a race across this moment goes unseen, nothing is made up.
    for (uint32_t& word : writers) {
        uint32_t epoch = word >> owner_bits;
        if (epoch == pending) continue;
        word = epoch > start ? 1u << owner_bits | (word & owner_mask) : 0;
    }
    std::fill(readers.begin(), readers.end(), 0u);
    start = 0;
    time = 2;
    for (Warp& warp : warps) {
        warp.epoch = time;
        if (launch_races()) std::fill(warp.seen, warp.seen + most_warps, 1u);
    }
}

namespace {

// Blocks of ended launches, kept for the next: their shadows are large.
struct BlockPool {
    std::vector<Block*> blocks;

    ~BlockPool()
    {
        for (Block* block : blocks) delete block;
    }
};

thread_local BlockPool pool;

struct Text {
    char* at;
    size_t left;

    [[gnu::format(printf, 2, 3)]] void add(const char* format, ...)
    {
        va_list values;
        va_start(values, format);
        int n = vsnprintf(at, left, format, values);
        va_end(values);
        size_t used = std::min(size_t(n < 0 ? 0 : n), left - 1);
        at += used;
        left -= used;
    }
};

// Who waits on what in one warp.
void describe_warp(Text& text, const Block& block, const Warp& warp)
{
    if (warp.state.alive == 0) {
        text.add("; warp %u has ended", warp.id);
        return;
    }
    uint32_t waiting = lanes_waiting(warp);
    if (warp.arrived == 32) {
        for (uint32_t id = 0; id < barriers_of_a_block; id++) {
            const Barrier& barrier = block.barriers[id];
            if (!(barrier.warps >> warp.id & 1)) continue;
            text.add("; warp %u waits at barrier %u (%s:%u), to which %u of %u threads have come", warp.id, id,
                     warp.site.file, warp.site.line, barrier.arrived, barrier.expected);
        }
    } else if (waiting) {
        text.add("; warp %u: lanes %08x wait at %s (%s:%u)", warp.id, waiting, name_of(warp.collective),
                 warp.site.file, warp.site.line);
    }
    if (warp.state.polling) {
        int lane = __builtin_ctz(warp.state.polling);
        Site site = block.threads[warp.id * 32 + lane].polling;
        text.add("; warp %u: lanes %08x load the same value again and again (%s:%u)", warp.id, warp.state.polling,
                 site.file, site.line);
    }
}

} // namespace

} // namespace emulator

using namespace emulator;

extern "C" {

Thread** trencadis_emulator_current()
{
    return &current;
}

Launch* trencadis_emulator_launch_begin(const LaunchArguments* arguments)
{
    Launch* launch = new Launch;
    launch->arguments = *arguments;
    launch->block_size = Index{arguments->threads, 1, 1};
    launch->random = arguments->seed;
    return launch;
}

void trencadis_emulator_launch_end(Launch* launch)
{
    for (size_t i = 0; i < launch->arguments.range_count; i++) free(launch->arguments.ranges[i].writers);
    delete launch;
}

const FaultRecord* trencadis_emulator_fault(const Launch* launch)
{
    return &launch->fault;
}

uint64_t trencadis_emulator_changes(const Launch* launch)
{
    return launch->changes;
}

Block* trencadis_emulator_block_begin(Launch* launch, uint32_t x, uint32_t y, uint32_t z)
{
    Block* block;
    if (pool.blocks.empty()) {
        block = new Block;
    } else {
        block = pool.blocks.back();
        pool.blocks.pop_back();
    }
    const LaunchArguments& arguments = launch->arguments;
    block->launch = launch;
    block->index = Index{x, y, z};
    block->number = 1 + x + arguments.grid.x * (y + arguments.grid.y * z);
    block->warp_count = arguments.threads / 32;
    block->shared_bytes = arguments.shared_bytes;
    block->granules = (arguments.shared_bytes + granule - 1) / granule;
    block->shared.assign(arguments.shared_bytes, 0xff);
    size_t words = arguments.races ? size_t(block->granules) * block->warp_count : 0;
    if (block->time > last_epoch / 2) {
        block->writers.clear();
        block->readers.clear();
        block->time = 0;
    }
    // Words left by an earlier block lie at or before `start`, and so mean nothing.
    if (block->writers.size() < block->granules) block->writers.resize(block->granules, 0);
    // A copy that was never waited for would look like one of this block.
    for (uint32_t& word : block->writers) {
        if (word >> owner_bits == pending) word = 0;
    }
    if (words == 0) {
        block->readers.clear();
        block->places.clear();
    } else {
        if (block->readers.size() < words) block->readers.resize(words, 0);
        if (block->places.size() < block->granules) block->places.resize(block->granules, 0);
    }
    block->start = ++block->time;
    block->time++;
    std::fill(std::begin(block->barriers), std::end(block->barriers), Barrier{});
    block->warps.resize(block->warp_count);
    block->threads.resize(arguments.threads);
    for (uint32_t w = 0; w < block->warp_count; w++) {
        Warp& warp = block->warps[w];
        warp.state = WarpState{all_lanes, 0, all_lanes};
        warp.id = w;
        warp.block = block;
        warp.collective = Collective::none;
        warp.arrived = 0;
        warp.epoch = block->time;
        std::fill(warp.seen, warp.seen + most_warps, arguments.races ? block->start : last_epoch);
    }
    for (uint32_t t = 0; t < arguments.threads; t++) {
        Thread& thread = block->threads[t];
        thread.yielder = nullptr;
        thread.index = Index{t, 0, 0};
        thread.id = t;
        thread.lane = t % 32;
        thread.warp = &block->warps[t / 32];
        thread.block = block;
        thread.polled = nullptr;
        thread.copies.clear();
        thread.first_copy = 0;
        thread.groups = 0;
    }
    return block;
}

void trencadis_emulator_block_end(Block* block)
{
    pool.blocks.push_back(block);
}

WarpState* trencadis_emulator_warp(Block* block, uint32_t warp)
{
    return &block->warps[warp].state;
}

Thread* trencadis_emulator_thread(Block* block, uint32_t thread)
{
    return &block->threads[thread];
}

// Runs the kernel on the current thread, from its begin to its end.
void trencadis_emulator_enter(void (*run)(const void*), const void* params)
{
    // Stacks lie whole pages apart, and what the lanes of a warp use of them would fall into the same few sets
    // of the host's caches: each lane begins a little lower.
    volatile char* shift = static_cast<volatile char*>(__builtin_alloca(128 * (1 + current->lane)));
    shift[0] = 0;
    run(params);
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    if (warp.arrived != 0) {
        fail(warp.site, "ends while lane %d of its warp waits at %s", __builtin_ctz(lanes_waiting(warp)),
             name_of(warp.collective));
    }
    warp.state.alive &= ~lane_bit(thread);
    warp.state.runnable &= ~lane_bit(thread);
    thread.block->launch->changes++;
}

// Reports that none of the resident blocks can go on.
void trencadis_emulator_deadlock(Launch* launch, Block* const* blocks, size_t count, size_t not_started)
{
    FaultRecord& fault = launch->fault;
    if (fault.set) return;
    fault.set = 1;
    Text text{fault.what, sizeof fault.what};
    text.add("deadlock: no thread can go on");
    if (not_started > 0) text.add("; %zu blocks wait for one of the resident ones to end", not_started);
    for (size_t i = 0; i < count; i++) {
        const Block& block = *blocks[i];
        text.add("; block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
        for (const Warp& warp : block.warps) describe_warp(text, block, warp);
    }
}

} // extern "C"
