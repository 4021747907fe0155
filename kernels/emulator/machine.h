// The emulated machine: launch, block, warp and thread, and the clocks that order their memory accesses.
//
// Every CUDA thread is a coroutine. Which one runs next is decided in Rust (src/device/emulator); what an
// instruction does is decided here. Everything of one launch happens on one host thread, so nothing in it
// needs a lock.
#pragma once

#include "clock.h"

#include <memory>
#include <stddef.h>
#include <unordered_map>

namespace emulator {

// Where in a kernel an operation stands: as a default argument it is the place of the call.
struct Site {
    const char* file;
    uint32_t line;

    static constexpr Site here(const char* file = __builtin_FILE(), uint32_t line = __builtin_LINE())
    {
        return {file, line};
    }
};

struct Index {
    uint32_t x, y, z;
};

// What the lanes of a warp do together.
enum class Collective : uint8_t {
    none,
    barrier,
    warp_sync,
    warp_id,
    shuffle,
    shuffle_xor,
    shuffle_up,
    ballot,
    ldmatrix,
    mma,
    barrier_arrive,
    stmatrix,
    elect,
    cluster_arrive,
    cluster_wait,
    // Of a warpgroup:
    wgmma_fence,
    wgmma,
    wgmma_commit,
    wgmma_wait,
    set_registers,
};

// When an asynchronous operation happens.
enum class CopyPolicy : uint32_t {
    at_issue, // as early as the hardware may
    at_wait,  // as late as it may
    random,   // either, or in between
};

struct Warp;
struct Block;
struct Cluster;
struct Launch;
struct Mbarrier;
struct Warpgroup;
struct BulkStore;
struct BulkLoad;

// An asynchronous copy that the issuing thread has not waited for.
struct Copy {
    const void* source; // null: zeros
    uint32_t destination;
    uint32_t group;
    bool done;
    uint8_t snapshot[16]; // the source when the copy was issued
    Site site;
};

struct Thread {
    const void* yielder = nullptr; // of its coroutine; first, the scheduler writes it
    Index index;                   // threadIdx
    uint32_t id;
    uint32_t lane;
    uint32_t owner; // its number in the cluster
    Warp* warp;
    Block* block;
    const void* polled = nullptr; // what it looked at last: a coherent load, or the test of an mbarrier
    Site polling{};
    std::vector<Copy> copies; // oldest first
    size_t first_copy = 0;    // those before it are complete
    uint32_t groups = 0;      // committed so far

    std::vector<uint32_t> fences;    // epochs of its proxy fences, ascending
    std::vector<BulkStore*> stores;  // copies out of shared memory that it has not waited for, oldest first
    uint32_t store_groups = 0;       // committed so far
    const Mbarrier* waits = nullptr; // the mbarrier that it waits for, since when
    uint32_t parity = 0;
    Site waiting{};
};

// Masks of lanes; the scheduler reads and writes them.
struct WarpState {
    uint32_t runnable;
    uint32_t polling; // gave way in a spin: runnable when the others had their turn
    uint32_t alive;
};

constexpr uint32_t most_warps = 32; // of a block
constexpr uint32_t warps_of_a_group = 4;
constexpr uint32_t all_lanes = 0xffffffffu;

struct Warp {
    WarpState state; // first
    uint32_t id;
    uint32_t party; // its number in the cluster
    Block* block;

    // The meeting under way: who has come, what for, and where the lanes keep arguments and results.
    Collective collective = Collective::none;
    uint32_t arrived = 0;
    Site site{};
    void* arguments[32];
    uint32_t blocked; // mask of lanes that wait for an mbarrier

    // Lanes that know that the launch before this one has ended: each has waited for it, or met at a barrier of the
    // block one who had. All, where the launch begins after that.
    uint32_t behind;

    bool at_cluster_barrier; // has arrived and not waited

    uint32_t epoch;
    Clock clock;
    uint32_t observed[most_parties]; // how often mbarriers had completed when it last learned of them
};

struct Barrier {
    uint32_t expected = 0; // threads; 0: nobody waits
    uint32_t arrived = 0;
    uint32_t warps = 0; // mask of those that wait
    bool behind = false; // whether somebody who came knows that the launch before has ended
    Site site{};
    std::unique_ptr<Clock> clock; // of those that came and went on
};

constexpr uint32_t barriers_of_a_block = 16;

// Shared memory begins here, not at 0: an address that forgot shared_base() is out of bounds.
constexpr uint32_t shared_origin = 1024;
constexpr uint32_t granule = 2;

// What the asynchronous copies move at least, and the matrix instructions read.
constexpr uint32_t chunk = 16;

// An address in the shared memory of block `rank` of the cluster is (rank + 1) << rank_shift | its address there.
constexpr uint32_t rank_shift = 24;

// A place is a file's number << line_bits | line.
constexpr uint32_t line_bits = 20;

struct Block {
    Launch* launch;
    Cluster* cluster;
    uint32_t rank; // in the cluster
    Index index;
    uint32_t number; // 1 for the first block of the grid
    uint32_t warp_count;
    uint32_t shared_bytes;
    uint32_t granules;
    std::vector<uint8_t> shared;
    std::vector<uint32_t> writers; // [granules]
    // [row][granules], a row for every warp, for every warpgroup that used wgmma, and one for other blocks, which
    // holds owners instead of lanes; empty where races are not looked for.
    std::vector<uint32_t> readers;
    std::vector<uint32_t> row_party; // of each row but the last
    uint32_t rows = 0;               // of them in use, without the last
    bool read_by_peers = false;      // whether the last is
    std::vector<uint32_t> places;    // [granules], where the last write stands; empty likewise
    std::vector<uint8_t> reading;    // [chunks], by how many asynchronous operations under way; empty while none was
    uint32_t start = 0;              // epochs up to here are of earlier blocks
    uint32_t time = 0;               // newest epoch that its shadow may hold
    Barrier barriers[barriers_of_a_block];
    std::vector<Warp> warps;
    std::vector<Thread> threads;
    std::vector<std::unique_ptr<Mbarrier>> mbarriers;
    std::vector<std::unique_ptr<Warpgroup>> warpgroups; // made when first used
    uint32_t registers; // that are free, a thread of a warpgroup

    // What peers did to its shared memory last, by warp of the cluster; and what its ended warps knew.
    struct Visit {
        uint32_t owner;
        uint32_t epoch;
        Site site;
    };
    std::vector<Visit> visits;
    std::unique_ptr<Clock> ended_clock;
    bool ended = false;

    // Orders the accesses of the lanes of `warp`.
    void advance(Warp& warp);

    // Begins a new epoch of `warp` without ordering anything.
    void tick(Warp& warp);

    bool launch_races() const
    {
        return !readers.empty();
    }

    uint32_t* reader_row(uint32_t row)
    {
        return readers.data() + size_t(row) * granules;
    }

    // The row of other blocks.
    uint32_t peer_row() const
    {
        return uint32_t(row_party.size());
    }
};

// Blocks that run together and reach each other's shared memory; one block where there are no clusters.
struct Cluster {
    Launch* launch;
    std::vector<Block*> blocks;
    uint32_t warp_count; // of all blocks
    uint32_t parties;    // so far
    uint32_t start;
    uint32_t time; // newest epoch
    uint32_t ended = 0;

    // barrier.cluster
    std::vector<bool> arrived; // [warp_count], in this phase
    std::vector<bool> waiting;
    std::unique_ptr<Clock> gathering; // of those that have arrived
    std::unique_ptr<Clock> complete;  // of those that arrived in earlier phases

    void restart_time();
};

inline void Block::tick(Warp& warp)
{
    if (cluster->time >= last_epoch) cluster->restart_time();
    warp.epoch = ++cluster->time;
}

inline void Block::advance(Warp& warp)
{
    tick(warp);
    if (launch_races()) warp.clock.seen[warp.party] = warp.epoch - 1;
}

// An allocation of global memory.
struct Range {
    uint64_t low, high;
    uint32_t* writers; // per granule the number of the block that wrote it; null before the first store
};

struct FreedRange {
    uint64_t low, high;
};

// What the scheduler tells of a launch. Mirrored in src/device/emulator/machine.rs.
struct LaunchArguments {
    Index grid;
    uint32_t threads;
    uint32_t shared_bytes;
    CopyPolicy policy;
    uint64_t seed;
    uint32_t races;        // whether races on shared memory are looked for
    uint32_t global_races; // whether conflicts of blocks on global memory are
    uint32_t cluster;      // blocks of a cluster along x
    uint32_t registers;    // of a thread at the start
    uint32_t dependent;    // whether it begins while the launch before it may still run
    Range* ranges;         // sorted
    size_t range_count;
    const FreedRange* freed;
    size_t freed_count;
};

// The first fault of a launch. Mirrored in src/device/emulator/machine.rs.
struct FaultRecord {
    uint32_t set;
    uint32_t in_thread; // whether `block` and `thread` are known
    Index block;
    uint32_t thread;
    Site site; // file null: not known
    char what[2048];
};

struct Launch {
    uint64_t changes = 0; // stores to global memory and threads that ended: a spin may see something new
    FaultRecord fault{};
    LaunchArguments arguments;
    Index block_size;
    uint64_t random;
    Range* recent[4] = {}; // allocations that were looked up last
    uint32_t next_recent = 0;
    std::vector<float> scratch;
    std::vector<std::unique_ptr<BulkLoad>> loads; // under way, oldest first
    std::unordered_map<uint32_t, std::vector<bool>> known; // by number: blocks whose writes it may count on
    std::unordered_map<const void*, std::vector<bool>> passed_on; // by counter: blocks that added to it

    // Source files by number, and a site as one word.
    std::vector<const char*> files;
    const char* last_file = nullptr;
    uint32_t last_number = 0;

    uint32_t place(Site site)
    {
        if (site.file != last_file) {
            last_file = site.file;
            last_number = 0;
            while (last_number < files.size() && files[last_number] != site.file) last_number++;
            if (last_number == files.size()) files.push_back(site.file);
        }
        return last_number << line_bits | (site.line & ((1u << line_bits) - 1));
    }

    Site site_of(uint32_t place) const
    {
        return {files[place >> line_bits], place & ((1u << line_bits) - 1)};
    }

    uint64_t next_random()
    {
        random += 0x9e3779b97f4a7c15u;
        uint64_t z = random;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
};

// A kernel as the launch finds it.
struct Kernel {
    const char* name;
    void (*run)(const void* params);
    size_t params_bytes;
    uint32_t threads;
    uint32_t registers; // of a thread, at most
};

// The thread that runs on this host thread.
extern __thread Thread* current;

// The thread that a fault names, where one works for others; null: the current one.
extern __thread const Thread* blamed;

// Ends the launch with a report and never returns: the coroutine is abandoned.
[[noreturn, gnu::cold, gnu::format(printf, 2, 3)]] void fail(Site site, const char* format, ...);

// The same for what went wrong on behalf of `thread` while it does not run: returns.
[[gnu::cold, gnu::format(printf, 3, 4)]] void report(const Thread& thread, Site site, const char* format, ...);

// Whether a thread knows that the launch before this one has ended.
inline bool is_behind(const Thread& thread)
{
    return thread.warp->behind >> thread.lane & 1;
}

// Meets the other lanes of the warp. True in the last lane to come, which then does the work for all and
// calls `part`; the others return false when that has happened. `arguments` is what the lane brings.
bool meet(Collective collective, void* arguments, Site site);

// Ends a meeting: all lanes run again.
void part();

// The same for a warpgroup: true in one lane, which works for all four warps and calls `part_group`.
bool meet_group(Collective collective, void* arguments, Site site);
void part_group();

// Ends the meeting of a warp that is not that of the current thread.
void end_meeting(Warp& warp);

// What a collective is called, and the lanes that have come to the meeting under way.
const char* name_of(Collective collective);
uint32_t lanes_waiting(const Warp& warp);

// Lets the current thread rest until someone makes it runnable.
void rest();

// Lets other threads run before this one goes on.
void give_way(Site site);

} // namespace emulator
