// Who knows of whose accesses to shared memory: the clocks by which races are found.
//
// Time. Each warp has an epoch, a number that grows whenever its lanes are ordered (warp_sync, barrier) or one of
// them tells others how far it is (mbarrier_arrive). Every granule of shared memory (two bytes) remembers the epoch
// and thread of its last write and, per reader, epoch and lane of its last read. `Clock::seen[u]` is the newest
// epoch of party u whose accesses are ordered before what the clock's owner does now: a vector clock that barriers
// join. An access that meets a conflicting one from a later epoch than `seen` is a race, whichever order the
// emulator happened to run them in.
//
// Parties. All blocks of a cluster share one count of epochs and one numbering of parties: first every warp of
// every block, then every warpgroup as reader of wgmma operands, then every mbarrier as writer of the copies that
// it counts.
#pragma once

#include <algorithm>
#include <stdint.h>
#include <string.h>
#include <vector>

namespace emulator {

// A word of the shadow: epoch << owner_bits | owner, the owner being a thread of the cluster, or 32 x the party that
// is no warp. Of a read it is the lane, or `several_lanes`.
constexpr uint32_t owner_bits = 13;
constexpr uint32_t owner_mask = (1u << owner_bits) - 1;
constexpr uint32_t most_parties = (owner_mask + 1) / 32;
constexpr uint32_t last_epoch = (1u << (32 - owner_bits)) - 3;
constexpr uint32_t pending = last_epoch + 1;  // as the epoch of a write: a copy is under way
constexpr uint32_t reserved = last_epoch + 2; // likewise: an mbarrier lies here
constexpr uint32_t several_lanes = 32;

inline uint32_t party_of(uint32_t word)
{
    return (word & owner_mask) / 32;
}

// What is known of a single thread beyond its warp.
struct ThreadTime {
    uint32_t owner;
    uint32_t epoch;
};

struct Clock {
    uint32_t seen[most_parties];
    uint32_t fenced[most_parties];   // accesses that a proxy fence of someone who knew of them has ordered
    std::vector<ThreadTime> threads; // threads that told of themselves alone

    // Knows of the first `parties` parties up to `epoch`, and of single threads nothing.
    void set(uint32_t epoch, uint32_t parties)
    {
        std::fill(seen, seen + parties, epoch);
        std::fill(fenced, fenced + parties, epoch);
        threads.clear();
    }

    // The newest epoch in which accesses of `owner` are known.
    uint32_t known(uint32_t owner) const
    {
        uint32_t epoch = seen[owner / 32];
        for (const ThreadTime& thread : threads) {
            if (thread.owner == owner) epoch = std::max(epoch, thread.epoch);
        }
        return epoch;
    }

    // Learns that accesses of one thread up to `epoch` are over; of a whole warp once all its lanes have told.
    void learn(uint32_t owner, uint32_t epoch)
    {
        uint32_t lanes = 1, least = epoch, party = owner / 32;
        bool found = false;
        for (ThreadTime& thread : threads) {
            if (thread.owner == owner) {
                found = true;
                thread.epoch = std::max(thread.epoch, epoch);
            } else if (thread.owner / 32 == party) {
                lanes++;
                least = std::min(least, thread.epoch);
            }
        }
        if (!found) threads.push_back({owner, epoch});
        if (lanes == 32) {
            seen[party] = std::max(seen[party], least);
            prune();
        }
    }

    // Learns all that `other` knows, of the first `parties` parties.
    void join(const Clock& other, uint32_t parties)
    {
        for (uint32_t u = 0; u < parties; u++) {
            seen[u] = std::max(seen[u], other.seen[u]);
            fenced[u] = std::max(fenced[u], other.fenced[u]);
        }
        for (const ThreadTime& thread : other.threads) {
            if (thread.epoch > seen[thread.owner / 32]) learn(thread.owner, thread.epoch);
        }
        if (!threads.empty()) prune();
    }

    // Forgets of threads what is known of their warp.
    void prune()
    {
        auto known = [this](const ThreadTime& thread) { return thread.epoch <= seen[thread.owner / 32]; };
        threads.erase(std::remove_if(threads.begin(), threads.end(), known), threads.end());
    }
};

} // namespace emulator
