// The emulated machine: launch, block, warp and thread, and the clocks that order their memory accesses.
//
// Every CUDA thread is a coroutine. Which one runs next is decided in Rust (src/device/emulator); what an
// instruction does is decided here. Everything of one launch happens on one host thread, so nothing in it
// needs a lock.
//
// Time. Each warp has an epoch, a number that grows whenever its lanes are ordered (warp_sync, barrier).
// Every granule of shared memory (two bytes) remembers the epoch and thread of its last write and, per warp,
// epoch and lane of its last read. `Warp::seen[u]` is the newest epoch of warp u whose accesses are ordered
// before what this warp does now: a vector clock that barriers join. An access that meets a conflicting one
// from a later epoch than `seen` is a race, whichever order the emulator happened to run them in.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <unordered_map>
#include <vector>

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
};

// When a copy from global to shared memory happens.
enum class CopyPolicy : uint32_t {
    at_issue, // as early as the hardware may
    at_wait,  // as late as it may
    random,   // either, or in between
};

struct Warp;
struct Block;
struct Launch;

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
    Warp* warp;
    Block* block;
    const void* polled = nullptr; // last address of a coherent load
    Site polling{};
    std::vector<Copy> copies; // oldest first
    size_t first_copy = 0;    // those before it are complete
    uint32_t groups = 0;      // committed so far
};

// Masks of lanes; the scheduler reads and writes them.
struct WarpState {
    uint32_t runnable;
    uint32_t polling; // gave way in a spin: runnable when the others had their turn
    uint32_t alive;
};

constexpr uint32_t most_warps = 32;
constexpr uint32_t all_lanes = 0xffffffffu;

struct Warp {
    WarpState state; // first
    uint32_t id;
    Block* block;

    // The meeting under way: who has come, what for, and where the lanes keep arguments and results.
    Collective collective = Collective::none;
    uint32_t arrived = 0;
    Site site{};
    void* arguments[32];

    uint32_t epoch;
    uint32_t seen[most_warps];
};

struct Barrier {
    uint32_t expected = 0; // threads; 0: nobody waits
    uint32_t arrived = 0;
    uint32_t warps = 0; // mask of those that wait
    Site site{};
};

constexpr uint32_t barriers_of_a_block = 16;

// Shared memory begins here, not at 0: an address that forgot shared_base() is out of bounds.
constexpr uint32_t shared_origin = 1024;
constexpr uint32_t granule = 2;

// Words of the shadow: epoch << 10 | thread for writes, epoch << 10 | lane for reads.
constexpr uint32_t owner_bits = 10;
constexpr uint32_t owner_mask = (1u << owner_bits) - 1;
constexpr uint32_t last_epoch = (1u << (32 - owner_bits)) - 2;
constexpr uint32_t pending = last_epoch + 1; // as the epoch of a write: a copy is under way
constexpr uint32_t several_lanes = 32;

// A place is a file's number << line_bits | line.
constexpr uint32_t line_bits = 20;

struct Block {
    Launch* launch;
    Index index;
    uint32_t number; // 1 for the first block of the grid
    uint32_t warp_count;
    uint32_t shared_bytes;
    uint32_t granules;
    std::vector<uint8_t> shared;
    std::vector<uint32_t> writers; // [granules]
    std::vector<uint32_t> readers; // [warp][granules]; empty where races are not looked for
    std::vector<uint32_t> places;  // [granules], where the last write stands; empty likewise
    uint32_t start = 0;            // epochs up to here are of earlier blocks
    uint32_t time = 0;             // newest epoch
    Barrier barriers[barriers_of_a_block];
    std::vector<Warp> warps;
    std::vector<Thread> threads;

    // Orders the accesses of the lanes of `warp`.
    void advance(Warp& warp)
    {
        if (time >= last_epoch) restart_time();
        warp.epoch = ++time;
        if (launch_races()) warp.seen[warp.id] = warp.epoch - 1;
    }

    bool launch_races() const
    {
        return !readers.empty();
    }

    void restart_time();
};

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
};

// The thread that runs on this host thread.
extern __thread Thread* current;

// The thread that a fault names, where one works for others; null: the current one.
extern __thread const Thread* blamed;

// Ends the launch with a report and never returns: the coroutine is abandoned.
[[noreturn, gnu::cold, gnu::format(printf, 2, 3)]] void fail(Site site, const char* format, ...);

// Meets the other lanes of the warp. True in the last lane to come, which then does the work for all and
// calls `part`; the others return false when that has happened. `arguments` is what the lane brings.
bool meet(Collective collective, void* arguments, Site site);

// Ends a meeting: all lanes run again.
void part();

// Lets other threads run before this one goes on.
void give_way(Site site);

} // namespace emulator
