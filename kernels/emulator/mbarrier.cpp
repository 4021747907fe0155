// mbarriers: phases that end when enough threads have arrived and enough bytes were copied.
#include "asynchronous.h"

#include <stdio.h>

namespace emulator {

namespace {

constexpr uint32_t mbarrier_bytes = 8;
constexpr uint32_t most_arrivals = (1u << 20) - 1;
constexpr int64_t most_bytes = (1 << 20) - 1;

void reserve(Block& block, uint32_t offset, uint32_t word, Site site)
{
    uint32_t first = offset / granule;
    std::fill_n(block.writers.begin() + first, mbarrier_bytes / granule, word);
    if (block.launch_races())
        std::fill_n(block.places.begin() + first, mbarrier_bytes / granule, block.launch->place(site));
}

// The current thread knows from here on what those knew that ended the phases so far.
void observe(const Mbarrier& mbarrier)
{
    Warp& warp = *current->warp;
    if (!warp.block->launch_races() || warp.observed[mbarrier.party] == mbarrier.phase) return;
    warp.observed[mbarrier.party] = mbarrier.phase;
    warp.clock.join(mbarrier.complete, warp.block->cluster->parties);
}

} // namespace

Mbarrier& mbarrier_at(Block& block, uint32_t offset, const char* verb, Site site)
{
    const Thread& thread = *current;
    for (auto& mbarrier : block.mbarriers) {
        if (mbarrier->offset != offset || !mbarrier->valid) continue;
        if (mbarrier->epoch > thread.warp->clock.known(mbarrier->owner) && mbarrier->owner != thread.owner) {
            fail(site, "race: %s the mbarrier at byte %u, which %s initialised (%s:%u) with no barrier in between",
                 verb, offset, Owner(*block.cluster, mbarrier->owner).text, mbarrier->site.file,
                 mbarrier->site.line);
        }
        return *mbarrier;
    }
    fail(site, "%s byte %u of shared memory, where no mbarrier was initialised", verb, offset);
}

void settle(Mbarrier& mbarrier)
{
    if (mbarrier.missing != 0 || mbarrier.bytes != 0) return;
    Block& block = *mbarrier.block;
    Cluster& cluster = *block.cluster;
    if (!mbarrier.landed.empty()) {
        if (cluster.time >= last_epoch) cluster.restart_time();
        uint32_t epoch = ++cluster.time;
        for (const Region& region : mbarrier.landed) {
            uint32_t first = region.offset / granule, count = region.bytes / granule;
            std::fill_n(block.writers.begin() + first, count, epoch << owner_bits | mbarrier.party * 32);
            if (block.launch_races()) std::fill_n(block.places.begin() + first, count, region.place);
        }
        mbarrier.landed.clear();
        mbarrier.gathering.seen[mbarrier.party] = epoch;
    }
    if (block.launch_races()) mbarrier.complete.join(mbarrier.gathering, cluster.parties);
    mbarrier.phase++;
    mbarrier.missing = mbarrier.expected;
    block.launch->changes++;
    for (Thread* thread : mbarrier.waiting) {
        thread->warp->blocked &= ~(1u << thread->lane);
        thread->warp->state.runnable |= 1u << thread->lane;
        thread->waits = nullptr;
    }
    mbarrier.waiting.clear();
}

void mbarrier_init(uint32_t address, uint32_t count, Site site)
{
    Thread& thread = *current;
    Block& block = *thread.block;
    uint32_t offset = shared_offset("initialises an mbarrier in", address, mbarrier_bytes, mbarrier_bytes, site);
    if (count == 0 || count > most_arrivals)
        fail(site, "an mbarrier for %u arrivals: must be 1 to %u", count, most_arrivals);
    Mbarrier* mbarrier = nullptr;
    for (auto& other : block.mbarriers) {
        if (other->offset == offset) mbarrier = other.get();
    }
    if (mbarrier && mbarrier->valid) {
        fail(site, "initialises the mbarrier at byte %u a second time (%s:%u): invalidate it first", offset,
             mbarrier->site.file, mbarrier->site.line);
    }
    if (!mbarrier) {
        block.mbarriers.push_back(std::make_unique<Mbarrier>());
        mbarrier = block.mbarriers.back().get();
        mbarrier->block = &block;
        mbarrier->offset = offset;
        mbarrier->party = block.cluster->parties++;
        if (mbarrier->party >= most_parties) {
            fail(site, "the emulator follows %u warps, warpgroups and mbarriers of a cluster, not more",
                 most_parties);
        }
        mbarrier->gathering.set(0, most_parties);
        mbarrier->complete.set(0, most_parties);
    }
    claim_shared<mbarrier_bytes>(block, offset, reserved, nullptr, site);
    reserve(block, offset, reserved << owner_bits | thread.owner, site);
    mbarrier->expected = mbarrier->missing = count;
    mbarrier->bytes = 0;
    mbarrier->phase = 0;
    mbarrier->valid = true;
    mbarrier->published = false;
    mbarrier->owner = thread.owner;
    mbarrier->epoch = thread.warp->epoch;
    mbarrier->site = site;
    for (Block* peer : block.cluster->blocks) {
        for (Warp& warp : peer->warps) warp.observed[mbarrier->party] = 0;
    }
}

void mbarrier_invalidate(uint32_t address, Site site)
{
    Thread& thread = *current;
    uint32_t offset = shared_offset("invalidates an mbarrier in", address, mbarrier_bytes, mbarrier_bytes, site);
    Mbarrier& mbarrier = mbarrier_at(*thread.block, offset, "invalidates", site);
    if (!mbarrier.waiting.empty() || !mbarrier.landed.empty() || mbarrier.bytes != 0) {
        fail(site, "invalidates the mbarrier at byte %u, which threads or copies still use", offset);
    }
    mbarrier.valid = false;
    reserve(*thread.block, offset, thread.warp->epoch << owner_bits | thread.owner, site);
}

void mbarrier_publish()
{
    for (auto& mbarrier : current->block->mbarriers) {
        if (mbarrier->owner == current->owner) mbarrier->published = true;
    }
}

void mbarrier_arrive(uint32_t address, uint32_t count, uint32_t bytes, bool peer, Site site)
{
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    Block& own = *thread.block;
    Block& block = peer ? block_of(address, "arrives at an mbarrier in", site) : own;
    uint32_t offset = address - shared_origin;
    Mbarrier& mbarrier = mbarrier_at(block, offset, "arrives at", site);
    if (&block != &own) {
        if (!mbarrier.published) {
            fail(site, "arrives at the mbarrier at byte %u of block rank %u, which no fence_mbarrier_init has shown "
                       "to the cluster",
                 offset, block.rank);
        }
        note_visit(block, site);
        tell_of_global(own, block);
    }
    if (count == 0 || count > mbarrier.missing) {
        fail(site, "arrives %u times at the mbarrier at byte %u (%s:%u), whose phase %u expects %u more of %u", count,
             offset, mbarrier.site.file, mbarrier.site.line, mbarrier.phase, mbarrier.missing, mbarrier.expected);
    }
    mbarrier.bytes += bytes;
    if (mbarrier.bytes > most_bytes) {
        fail(site, "expects %lld bytes at the mbarrier at byte %u: at most %lld can be", (long long)mbarrier.bytes,
             offset, (long long)most_bytes);
    }
    if (own.launch_races()) {
        uint32_t parties = own.cluster->parties;
        mbarrier.gathering.join(warp.clock, parties);
        mbarrier.gathering.learn(thread.owner, warp.epoch);
        own.tick(warp);
    }
    mbarrier.missing -= count;
    settle(mbarrier);
}

void mbarrier_expect(uint32_t address, uint32_t bytes, Site site)
{
    Block& block = *current->block;
    Mbarrier& mbarrier = mbarrier_at(block, address - shared_origin, "expects bytes at", site);
    mbarrier.bytes += bytes;
    if (mbarrier.bytes > most_bytes) {
        fail(site, "expects %lld bytes at the mbarrier at byte %u: at most %lld can be", (long long)mbarrier.bytes,
             mbarrier.offset, (long long)most_bytes);
    }
    settle(mbarrier);
}

bool mbarrier_test(uint32_t address, uint32_t parity, Site site)
{
    Thread& thread = *current;
    Mbarrier& mbarrier = mbarrier_at(*thread.block, address - shared_origin, "tests", site);
    if ((mbarrier.phase & 1) == (parity & 1)) {
        // A thread that tests again is spinning: the others run first.
        if (thread.polled == &mbarrier) give_way(site);
        thread.polled = &mbarrier;
    }
    if ((mbarrier.phase & 1) == (parity & 1)) return false;
    thread.polled = nullptr;
    observe(mbarrier);
    return true;
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site)
{
    Thread& thread = *current;
    Mbarrier& mbarrier = mbarrier_at(*thread.block, address - shared_origin, "waits at", site);
    if (parity > 1) fail(site, "waits at the mbarrier at byte %u for parity %u: 0 or 1", mbarrier.offset, parity);
    uint32_t phase = mbarrier.phase;
    if ((phase & 1) == parity) {
        mbarrier.waiting.push_back(&thread);
        thread.waits = &mbarrier;
        thread.parity = parity;
        thread.waiting = site;
        thread.warp->blocked |= 1u << thread.lane;
        rest();
        if (mbarrier.phase != phase + 1) {
            fail(site, "waits at the mbarrier at byte %u for the end of phase %u and finds the next over too: on a GPU "
                       "it may have missed both",
                 mbarrier.offset, phase);
        }
    }
    observe(mbarrier);
}

void describe_mbarrier_wait(const Thread& thread, char* text, size_t size)
{
    const Mbarrier& mbarrier = *thread.waits;
    snprintf(text, size,
             "the mbarrier at byte %u for the end of phase %u, parity %u (%s:%u): %u of %u arrivals and %lld bytes "
             "are missing",
             mbarrier.offset, mbarrier.phase, thread.parity, thread.waiting.file, thread.waiting.line,
             mbarrier.missing, mbarrier.expected, (long long)mbarrier.bytes);
}

} // namespace emulator
