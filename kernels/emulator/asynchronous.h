// What only Hopper has: mbarriers, bulk copies, the matrix instructions of a warpgroup, and clusters.
#pragma once

#include "operations.h"

namespace emulator {

// "thread 5", as the current thread would call the owner of a word of the shadow.
struct Owner {
    char text[64];

    Owner(const Cluster& cluster, uint32_t owner);
};

// Bytes of shared memory.
struct Region {
    uint32_t offset;
    uint32_t bytes;
    uint32_t place; // of the copy that wrote them
};

struct Mbarrier {
    Block* block;
    uint32_t offset;
    uint32_t party; // writer of the copies that it counts
    uint32_t expected = 0;
    uint32_t missing = 0; // arrivals
    int64_t bytes = 0;    // that copies have yet to write; below 0 where they came before they were expected
    uint32_t phase = 0;
    bool valid = false;
    bool published = false; // whether a fence has shown it to the asynchronous proxy and the cluster
    uint32_t owner = 0;     // who made it, and when
    uint32_t epoch = 0;
    Site site{};
    Clock gathering; // of those that have arrived
    Clock complete;  // of those that arrived in earlier phases
    std::vector<Region> landed;
    std::vector<Thread*> waiting;
};

// The `bytes` of a box in global memory, and where they lie: rows of the innermost dimension, one after the other
// in shared memory before the swizzle.
struct Box {
    struct Row {
        uint8_t* global; // null: outside, zeros
        uint32_t offset; // of the bytes that lie inside, from the begin of the box
        uint32_t bytes;
    };
    std::vector<Row> rows;
    uint32_t bytes;
    uint32_t swizzle; // what of the bits 7 to 9 of an address counts: 0, 1, 3 or 7
};

// A copy into shared memory under way.
struct BulkLoad {
    const Thread* thread;
    Mbarrier* mbarrier;
    uint32_t offset;
    std::shared_ptr<const Box> box;
    std::shared_ptr<const std::vector<uint8_t>> snapshot; // the box when the copy was issued
    Site site;
};

enum class BulkKind { store, add_f32, add_bf16 };

// A copy out of shared memory that its thread has not waited for.
struct BulkStore {
    BulkKind kind;
    uint32_t group;
    uint32_t offset;
    Box box;
    std::vector<uint8_t> data; // as it lies in the box
    bool reading = true;
    bool written = false;
    Site site{};
};

// One wgmma under way.
struct WgmmaRead {
    uint32_t group;
    std::vector<uint16_t> chunks; // of shared memory that it reads
    uint32_t accumulator;
    Site site;
};

// The accumulator registers of a warpgroup, as fragments: [128][count].
struct Accumulator {
    float* registers[128];
    uint32_t count;   // of a thread
    uint32_t flights; // products under way
    bool shown;       // whether the registers hold the values, or NaN
    std::vector<float> values;
    Site site;
};

struct Warpgroup {
    // The meeting under way.
    Collective collective = Collective::none;
    uint32_t warps = 0;
    Site site{};

    bool fenced = false; // wgmma_fence since the last wait
    uint32_t groups = 0; // committed so far
    std::vector<WgmmaRead> reads;
    std::vector<Accumulator> accumulators;
    uint32_t registers = 0; // of a thread; 0: as at the start
    uint32_t wanted = 0;    // that it waits for, in the lane that works for all
    Thread* worker = nullptr;
};

Mbarrier& mbarrier_at(Block& block, uint32_t offset, const char* verb, Site site);
void settle(Mbarrier& mbarrier);

// Mark bytes that a thread copies into as under way, or test those that an asynchronous operation of `clock`'s owner
// reads: whether they are there, and visible to it.
void claim_region(Block& block, uint32_t offset, uint32_t bytes, Site site);
void examine_asynchronous_read(const Block& block, uint32_t offset, uint32_t bytes, const Clock& clock, bool alone,
                               Site site);
void begin_reading(Block& block, uint32_t chunk_number);

// Names the asynchronous operation that reads a byte while it is written.
[[noreturn, gnu::cold]] void fail_reading(const Block& block, uint32_t offset, Site site);

// The block that an address of the cluster lies in, and the address there.
Block& block_of(uint32_t& address, const char* verb, Site site);
void note_visit(Block& block, Site site);

// Block `to` may count on the writes to global memory that block `from` made or had learned of.
void tell_of_global(const Block& from, const Block& to);

// Lets one of the copies under way arrive.
void land_a_copy(Launch& launch, size_t which);

void thread_ends(Thread& thread);
void warp_ends(Warp& warp);
void settle_cluster(Cluster& cluster);

// What waits for what, for the report of a deadlock.
void describe_mbarrier_wait(const Thread& thread, char* text, size_t size);

} // namespace emulator
