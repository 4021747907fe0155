// The life of launches, clusters and blocks, and the report of a deadlock: what src/device/emulator calls.
#include "asynchronous.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulator {

void Cluster::restart_time()
{
    // What was ordered when is forgotten: a race across this moment goes unseen, nothing is made up.
    for (Block* block : blocks) {
        for (uint32_t& word : block->writers) {
            uint32_t epoch = word >> owner_bits;
            if (epoch > last_epoch) continue;
            word = epoch > start ? 1u << owner_bits | (word & owner_mask) : 0;
        }
        std::fill(block->readers.begin(), block->readers.end(), 0u);
        block->start = 0;
        for (Warp& warp : block->warps) {
            warp.epoch = 2;
            if (block->launch_races()) warp.clock.set(1, most_parties);
        }
        for (Thread& thread : block->threads) thread.fences.clear();
        for (auto& mbarrier : block->mbarriers) {
            mbarrier->epoch = 1;
            mbarrier->gathering.set(1, most_parties);
            mbarrier->complete.set(1, most_parties);
        }
        for (Barrier& barrier : block->barriers) {
            if (barrier.clock) barrier.clock->set(1, most_parties);
        }
        block->visits.clear();
        if (block->ended_clock) block->ended_clock->set(1, most_parties);
    }
    if (gathering) gathering->set(1, most_parties);
    if (complete) complete->set(1, most_parties);
    start = 0;
    time = 2;
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

// Where a flag lies that is looked at again and again, and what it is.
void describe_polled(Text& text, const Launch& launch, const void* polled)
{
    uint64_t address = reinterpret_cast<uint64_t>(polled);
    const LaunchArguments& arguments = launch.arguments;
    for (size_t i = 0; i < arguments.range_count; i++) {
        const Range& range = arguments.ranges[i];
        if (address < range.low || address + sizeof(int) > range.high) continue;
        int value;
        memcpy(&value, polled, sizeof value);
        text.add(", byte %llu of an allocation of %llu bytes of global memory, which is %d",
                 (unsigned long long)(address - range.low), (unsigned long long)(range.high - range.low), value);
    }
}

// Who waits on what in one warp.
void describe_warp(Text& text, const Block& block, const Warp& warp)
{
    if (warp.state.alive == 0) {
        text.add("; warp %u has ended", warp.id);
        return;
    }
    uint32_t waiting = lanes_waiting(warp);
    bool at_barrier = warp.collective == Collective::barrier;
    if (warp.arrived == 32 && !at_barrier) {
        bool of_cluster = warp.collective == Collective::cluster_wait;
        text.add("; warp %u waits at %s (%s:%u) for %s", warp.id, name_of(warp.collective), warp.site.file,
                 warp.site.line, of_cluster ? "the other warps of its cluster" : "the other warps of its warpgroup");
        const Warpgroup* group = of_cluster ? nullptr : block.warpgroups[warp.id / warps_of_a_group].get();
        if (group && group->wanted) {
            text.add(" or registers: it wants %u a thread, and %u are free", group->wanted, block.registers);
        }
    } else if (warp.arrived == 32) {
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
    for (uint32_t lanes = warp.blocked; lanes != 0;) {
        const Thread& first = block.threads[warp.id * 32 + __builtin_ctz(lanes)];
        uint32_t same = 0;
        for (uint32_t l = 0; l < 32; l++) {
            const Thread& other = block.threads[warp.id * 32 + l];
            bool with = other.waits == first.waits && other.parity == first.parity;
            if (lanes >> l & 1 && with) same |= 1u << l;
        }
        char what[256];
        describe_mbarrier_wait(first, what, sizeof what);
        text.add("; warp %u: lanes %08x wait at %s", warp.id, same, what);
        lanes &= ~same;
    }
    if (warp.state.polling) {
        int lane = __builtin_ctz(warp.state.polling);
        const Thread& thread = block.threads[warp.id * 32 + lane];
        text.add("; warp %u: lanes %08x look at the same value again and again (%s:%u)", warp.id, warp.state.polling,
                 thread.polling.file, thread.polling.line);
        describe_polled(text, *block.launch, thread.polled);
    }
}

void begin_block(Cluster& cluster, uint32_t rank, Index index)
{
    Launch& launch = *cluster.launch;
    const LaunchArguments& arguments = launch.arguments;
    Block* block = cluster.blocks[rank];
    block->launch = &launch;
    block->cluster = &cluster;
    block->rank = rank;
    block->index = index;
    block->number = 1 + index.x + arguments.grid.x * (index.y + arguments.grid.y * index.z);
    block->warp_count = arguments.threads / 32;
    block->shared_bytes = arguments.shared_bytes;
    block->granules = (arguments.shared_bytes + granule - 1) / granule;
    block->shared.assign(arguments.shared_bytes, 0xff);
    uint32_t groups = block->warp_count / warps_of_a_group;
    block->row_party.clear();
    for (uint32_t w = 0; w < block->warp_count; w++) block->row_party.push_back(rank * block->warp_count + w);
    for (uint32_t g = 0; g < groups; g++) block->row_party.push_back(cluster.warp_count + rank * groups + g);
    block->rows = block->warp_count;
    block->read_by_peers = false;
    block->reading.clear();
    size_t words = arguments.races ? size_t(block->granules) * (block->row_party.size() + 1) : 0;
    // Words left by an earlier block lie at or before `start`, and so mean nothing.
    if (block->writers.size() < block->granules) block->writers.resize(block->granules, 0);
    // A copy that was never waited for would look like one of this block, and so would an mbarrier.
    for (uint32_t& word : block->writers) {
        if (word >> owner_bits > last_epoch) word = 0;
    }
    if (words == 0) {
        block->readers.clear();
        block->places.clear();
    } else {
        if (block->readers.size() < words) block->readers.resize(words, 0);
        if (block->places.size() < block->granules) block->places.resize(block->granules, 0);
    }
    block->start = cluster.start;
    for (Barrier& barrier : block->barriers) barrier = Barrier{};
    block->mbarriers.clear();
    block->warpgroups.clear();
    block->warpgroups.resize(groups);
    block->registers = 0;
    block->visits.clear();
    block->ended_clock.reset();
    block->ended = false;
    block->warps.resize(block->warp_count);
    block->threads.resize(arguments.threads);
    for (uint32_t w = 0; w < block->warp_count; w++) {
        Warp& warp = block->warps[w];
        warp.state = WarpState{all_lanes, 0, all_lanes};
        warp.id = w;
        warp.party = rank * block->warp_count + w;
        warp.block = block;
        warp.collective = Collective::none;
        warp.arrived = 0;
        warp.blocked = 0;
        warp.behind = arguments.dependent ? 0 : all_lanes;
        warp.at_cluster_barrier = false;
        warp.epoch = cluster.time;
        // Of every party that may come, too: its traces of earlier launches are no news.
        warp.clock.set(arguments.races ? cluster.start : last_epoch, most_parties);
    }
    for (uint32_t t = 0; t < arguments.threads; t++) {
        Thread& thread = block->threads[t];
        thread.yielder = nullptr;
        thread.index = Index{t, 0, 0};
        thread.id = t;
        thread.lane = t % 32;
        thread.owner = rank * arguments.threads + t;
        thread.warp = &block->warps[t / 32];
        thread.block = block;
        thread.polled = nullptr;
        thread.copies.clear();
        thread.first_copy = 0;
        thread.groups = 0;
        thread.fences.clear();
        thread.store_groups = 0;
        thread.waits = nullptr;
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

// Begins the blocks of a cluster, of which (x, y, z) is the first; they run together.
Cluster* trencadis_emulator_cluster_begin(Launch* launch, uint32_t x, uint32_t y, uint32_t z)
{
    Cluster* cluster = new Cluster;
    uint32_t size = launch->arguments.cluster;
    cluster->launch = launch;
    cluster->warp_count = launch->arguments.threads / 32 * size;
    cluster->arrived.assign(cluster->warp_count, false);
    cluster->waiting.assign(cluster->warp_count, false);
    uint32_t time = 0;
    for (uint32_t rank = 0; rank < size; rank++) {
        if (pool.blocks.empty()) {
            cluster->blocks.push_back(new Block);
        } else {
            cluster->blocks.push_back(pool.blocks.back());
            pool.blocks.pop_back();
        }
        time = std::max(time, cluster->blocks.back()->time);
    }
    if (time > last_epoch / 2) {
        for (Block* block : cluster->blocks) {
            block->writers.clear();
            block->readers.clear();
        }
        time = 0;
    }
    cluster->start = time + 1;
    cluster->time = time + 2;
    uint32_t groups = launch->arguments.threads / 32 / warps_of_a_group;
    cluster->parties = cluster->warp_count + groups * size;
    for (uint32_t rank = 0; rank < size; rank++) begin_block(*cluster, rank, Index{x + rank, y, z});
    return cluster;
}

Block* trencadis_emulator_block(Cluster* cluster, uint32_t rank)
{
    return cluster->blocks[rank];
}

// Lets asynchronous copies arrive: one, which the seed chooses, where `some` is 0, and each with a chance of one in
// four otherwise. Whether any did; a fault may have come up.
uint32_t trencadis_emulator_progress(Launch* launch, uint32_t some)
{
    if (launch->loads.empty()) return 0;
    if (!some) {
        land_a_copy(*launch, launch->arguments.seed == 0 ? 0 : launch->next_random() % launch->loads.size());
        return 1;
    }
    size_t under_way = launch->loads.size();
    for (size_t i = under_way; i-- > 0;) {
        if (launch->next_random() % 4 == 0) land_a_copy(*launch, i);
    }
    return launch->loads.size() < under_way;
}

// The threads of a block have run to their end, or are given up.
void trencadis_emulator_block_end(Block* block)
{
    Cluster* cluster = block->cluster;
    if (++cluster->ended < cluster->blocks.size()) return;
    for (Block* other : cluster->blocks) {
        other->time = cluster->time;
        other->mbarriers.clear();
        other->warpgroups.clear();
        for (Thread& thread : other->threads) {
            for (BulkStore* store : thread.stores) delete store;
            thread.stores.clear();
        }
        pool.blocks.push_back(other);
    }
    delete cluster;
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
    thread_ends(thread);
    if (warp.arrived != 0) {
        fail(warp.site, "ends while lane %d of its warp waits at %s", __builtin_ctz(lanes_waiting(warp)),
             name_of(warp.collective));
    }
    if (!is_behind(thread)) {
        fail(Site{}, "ends without dependency_wait: when all its threads do, the launch behind this one does not know "
                     "that the launch before it has ended");
    }
    uint32_t lane = 1u << thread.lane;
    warp.state.alive &= ~lane;
    warp.state.runnable &= ~lane;
    thread.block->launch->changes++;
    if (warp.state.alive == 0) warp_ends(warp);
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
