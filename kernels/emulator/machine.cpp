// Meetings, barriers, faults: how threads wait for one another.
#include "asynchronous.h"

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
    case Collective::barrier_arrive: return "barrier_arrive";
    case Collective::stmatrix: return "stmatrix";
    case Collective::elect: return "elect";
    case Collective::cluster_arrive: return "cluster_arrive";
    case Collective::cluster_wait: return "cluster_wait";
    case Collective::wgmma_fence: return "wgmma_fence";
    case Collective::wgmma: return "wgmma";
    case Collective::wgmma_commit: return "wgmma_commit";
    case Collective::wgmma_wait: return "wgmma_wait";
    case Collective::set_registers: return "set_registers";
    case Collective::none: break;
    }
    return "nothing";
}

uint32_t lanes_waiting(const Warp& warp)
{
    return warp.arrived == 0 ? 0 : warp.state.alive & ~warp.state.runnable & ~warp.state.polling & ~warp.blocked;
}

namespace {

void suspend(bool faulted)
{
    trencadis_emulator_suspend(current->yielder, faulted);
}

uint32_t lane_bit(const Thread& thread)
{
    return 1u << thread.lane;
}

struct BarrierCall {
    uint32_t id;
    uint32_t threads;
};

// After a barrier each of the warps in `mask` knows what any of them, and of those that went on, knew or did.
void join_clocks(Block& block, uint32_t mask, const Clock* gone_on)
{
    if (block.launch_races()) {
        static thread_local Clock joined;
        uint32_t parties = block.cluster->parties;
        joined.set(0, parties);
        if (gone_on) joined.join(*gone_on, parties);
        for (Warp& warp : block.warps) {
            if (!(mask >> warp.id & 1)) continue;
            joined.join(warp.clock, parties);
            joined.seen[warp.party] = std::max(joined.seen[warp.party], warp.epoch);
        }
        joined.prune();
        for (Warp& warp : block.warps) {
            if (mask >> warp.id & 1) warp.clock.join(joined, parties);
        }
    }
    for (Warp& warp : block.warps) {
        if (mask >> warp.id & 1) block.advance(warp);
    }
}

void record(Launch& launch, const Thread& thread, Site site, const char* format, va_list values)
{
    FaultRecord& fault = launch.fault;
    if (fault.set) return;
    fault.set = 1;
    fault.in_thread = 1;
    fault.block = thread.block->index;
    fault.thread = thread.id;
    fault.site = site;
    vsnprintf(fault.what, sizeof fault.what, format, values);
}

} // namespace

void end_meeting(Warp& warp)
{
    warp.arrived = 0;
    warp.state.runnable = warp.state.alive;
}

void rest()
{
    current->warp->state.runnable &= ~lane_bit(*current);
    suspend(false);
}

void fail(Site site, const char* format, ...)
{
    va_list values;
    va_start(values, format);
    record(*current->block->launch, blamed ? *blamed : *current, site, format, values);
    va_end(values);
    blamed = nullptr;
    for (;;) suspend(true);
}

void report(const Thread& thread, Site site, const char* format, ...)
{
    va_list values;
    va_start(values, format);
    record(*thread.block->launch, thread, site, format, values);
    va_end(values);
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
    rest();
    return false;
}

void part()
{
    end_meeting(*current->warp);
}

bool meet_group(Collective collective, void* arguments, Site site)
{
    if (!meet(collective, arguments, site)) return false;
    Warp& warp = *current->warp;
    Block& block = *warp.block;
    uint32_t number = warp.id / warps_of_a_group;
    if (number >= block.warpgroups.size()) {
        fail(site, "is at %s, which four warps do together, but the last warps of the block are fewer",
             name_of(collective));
    }
    if (!block.warpgroups[number]) {
        block.warpgroups[number] = std::make_unique<Warpgroup>();
        block.rows = block.peer_row();
    }
    Warpgroup& group = *block.warpgroups[number];
    if (group.warps == 0) {
        group.collective = collective;
        group.site = site;
    } else if (group.collective != collective || group.site.line != site.line
               || (group.site.file != site.file && strcmp(group.site.file, site.file) != 0)) {
        fail(site, "the warps of a warpgroup diverged: this one is at %s, but another waits at %s (%s:%u)",
             name_of(collective), name_of(group.collective), group.site.file, group.site.line);
    }
    group.warps |= 1u << warp.id % warps_of_a_group;
    if (group.warps == (1u << warps_of_a_group) - 1) return true;
    rest();
    return false;
}

void part_group()
{
    Warp& warp = *current->warp;
    uint32_t number = warp.id / warps_of_a_group;
    warp.block->warpgroups[number]->warps = 0;
    for (uint32_t w = 0; w < warps_of_a_group; w++) end_meeting(warp.block->warps[number * warps_of_a_group + w]);
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

void block_barrier(uint32_t id, uint32_t threads, bool wait, Site site)
{
    BarrierCall call{id, threads};
    if (!meet(wait ? Collective::barrier : Collective::barrier_arrive, &call, site)) return;
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
        barrier = Barrier{threads, 0, 0, false, site, nullptr};
    } else if (barrier.expected != threads) {
        fail(site, "barrier %u of %u threads, but another warp waits at it for %u threads (%s:%u)", id, threads,
             barrier.expected, barrier.site.file, barrier.site.line);
    }
    barrier.arrived += 32;
    barrier.behind |= warp.behind != 0;
    if (wait) {
        barrier.warps |= 1u << warp.id;
    } else {
        if (block.launch_races()) {
            if (!barrier.clock) {
                barrier.clock = std::make_unique<Clock>();
                barrier.clock->set(0, most_parties);
            }
            barrier.clock->join(warp.clock, block.cluster->parties);
            barrier.clock->seen[warp.party] = warp.epoch;
        }
        block.advance(warp);
        end_meeting(warp);
    }
    if (barrier.arrived < barrier.expected) {
        if (wait) rest();
        return;
    }
    Barrier complete = std::move(barrier);
    barrier = Barrier{};
    join_clocks(block, complete.warps, complete.clock.get());
    for (Warp& other : block.warps) {
        if (!(complete.warps >> other.id & 1)) continue;
        if (complete.behind) other.behind = all_lanes;
        end_meeting(other);
    }
}

} // namespace emulator
