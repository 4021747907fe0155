// Shared memory: what is wrong with an access to it, and the asynchronous copies into it.
#include "asynchronous.h"

#include <algorithm>
#include <stdio.h>

namespace emulator {

namespace {

// " of block rank 1" where that is not the block of the current thread.
struct Whose {
    char text[32] = "";

    explicit Whose(const Block& block)
    {
        if (&block != current->block) snprintf(text, sizeof text, " of block rank %u", block.rank);
    }
};

// " (file:line)" of the last write to a granule, where that is known.
struct Place {
    char text[256] = "";

    Place(const Block& block, uint32_t g)
    {
        if (!block.launch_races()) return;
        Site site = block.launch->site_of(block.places[g]);
        snprintf(text, sizeof text, " (%s:%u)", site.file, site.line);
    }
};

} // namespace

Owner::Owner(const Cluster& cluster, uint32_t owner)
{
    uint32_t threads = cluster.launch->arguments.threads;
    if (owner >= cluster.warp_count * 32) {
        snprintf(text, sizeof text, "an asynchronous copy");
    } else if (owner / threads == current->block->rank) {
        snprintf(text, sizeof text, "thread %u", owner % threads);
    } else {
        snprintf(text, sizeof text, "thread %u of block rank %u", owner % threads, owner / threads);
    }
}

void fail_shared_bounds(const char* verb, const Block& block, uint32_t address, uint32_t bytes, uint32_t alignment,
                        Site site)
{
    int64_t offset = int64_t(address) - shared_origin;
    if (address % alignment != 0) {
        fail(site, "%s %u bytes at byte %lld of shared memory%s, which is not aligned to %u", verb, bytes,
             (long long)offset, Whose(block).text, alignment);
    }
    fail(site, "%s %u bytes at byte %lld of shared memory%s, of which the block has %u", verb, bytes,
         (long long)offset, Whose(block).text, block.shared_bytes);
}

namespace {

// What orders the accesses of `owner` and of the current thread.
const char* missing_between(uint32_t owner)
{
    const Cluster& cluster = *current->block->cluster;
    if (owner >= cluster.warp_count * 32) return "wait for its mbarrier";
    if (owner / 32 == current->warp->party) return "warp_sync or barrier";
    bool peer = owner / cluster.launch->arguments.threads != current->block->rank;
    return peer ? "barrier of the cluster" : "barrier";
}

// Where neither may go: a copy under way, an mbarrier.
void examine_state(const char* verb, const Block& block, uint32_t g, uint32_t epoch, uint32_t owner, Site site)
{
    if (epoch == pending) {
        fail(site, "%s byte %u of shared memory%s while an asynchronous copy of %s%s writes it: wait for it first",
             verb, g * granule, Whose(block).text, Owner(*block.cluster, owner).text, Place(block, g).text);
    }
    if (epoch == reserved)
        fail(site, "%s byte %u of shared memory%s, where an mbarrier lies", verb, g * granule, Whose(block).text);
}

} // namespace

void examine_read(const Block& block, uint32_t offset, uint32_t bytes, bool by_warp, Site site)
{
    const Thread& thread = *current;
    for (uint32_t g = offset / granule; g < (offset + bytes) / granule; g++) {
        uint32_t epoch = block.writers[g] >> owner_bits, owner = block.writers[g] & owner_mask;
        examine_state("reads", block, g, epoch, owner, site);
        if (epoch <= block.start) {
            fail(site, "reads byte %u of shared memory%s, which nobody wrote", g * granule, Whose(block).text);
        }
        if (epoch <= thread.warp->clock.known(owner) || (owner == thread.owner && !by_warp)) continue;
        fail(site, "race: reads byte %u of shared memory%s, which %s wrote%s with no %s in between", g * granule,
             Whose(block).text, Owner(*block.cluster, owner).text, Place(block, g).text, missing_between(owner));
    }
}

void examine_write(const Block& block, uint32_t offset, uint32_t bytes, const void* value, Site site)
{
    const Thread& thread = *current;
    const Clock& clock = thread.warp->clock;
    const Cluster& cluster = *block.cluster;
    for (uint32_t g = offset / granule; g < (offset + bytes) / granule; g++) {
        uint32_t epoch = block.writers[g] >> owner_bits, owner = block.writers[g] & owner_mask;
        examine_state("writes", block, g, epoch, owner, site);
        if (!block.reading.empty() && block.reading[g * granule / chunk] != 0) fail_reading(block, g * granule, site);
        // Lanes of a warp may write the same value to the same place: whichever wins, it is there.
        const uint8_t* now = block.shared.data() + g * granule;
        bool same = value && owner / 32 == thread.warp->party
            && memcmp(now, static_cast<const uint8_t*>(value) + (g * granule - offset), granule) == 0;
        if (epoch > clock.known(owner) && owner != thread.owner && !same) {
            fail(site, "race: writes byte %u of shared memory%s, which %s wrote%s with no %s in between",
                 g * granule, Whose(block).text, Owner(cluster, owner).text, Place(block, g).text,
                 missing_between(owner));
        }
        if (!block.launch_races()) continue;
        for (uint32_t r = 0; r < block.rows; r++) {
            uint32_t word = block.readers[size_t(r) * block.granules + g], lane = word & owner_mask;
            uint32_t party = block.row_party[r];
            if (word >> owner_bits <= clock.seen[party]) continue;
            if (party == thread.warp->party && lane == thread.lane) continue;
            bool group = r >= block.warp_count;
            if (group) {
                fail(site, "race: writes byte %u of shared memory%s, which a wgmma of warps %u to %u read with no "
                           "barrier in between",
                     g * granule, Whose(block).text, (r - block.warp_count) * warps_of_a_group,
                     (r - block.warp_count) * warps_of_a_group + warps_of_a_group - 1);
            }
            if (lane == several_lanes) {
                fail(site, "race: writes byte %u of shared memory%s, which lanes of warp %u read with no %s in "
                           "between",
                     g * granule, Whose(block).text, r, missing_between(party * 32));
            }
            if (word >> owner_bits <= clock.known(party * 32 + lane)) continue;
            fail(site, "race: writes byte %u of shared memory%s, which thread %u read with no %s in between",
                 g * granule, Whose(block).text, r * 32 + lane, missing_between(party * 32));
        }
        if (!block.read_by_peers) continue;
        uint32_t word = block.readers[size_t(block.peer_row()) * block.granules + g], peer = word & owner_mask;
        if (word >> owner_bits <= clock.known(peer) || peer == thread.owner) continue;
        fail(site, "race: writes byte %u of shared memory%s, which %s read with no %s in between", g * granule,
             Whose(block).text, Owner(cluster, peer).text, missing_between(peer));
    }
}

namespace {

uint8_t* destination_of(const Copy& copy)
{
    return current->block->shared.data() + (copy.destination - shared_origin);
}

void perform(Copy& copy)
{
    if (copy.done) return;
    copy.done = true;
    if (copy.source) {
        memcpy(destination_of(copy), copy.source, 16);
    } else {
        memset(destination_of(copy), 0, 16);
    }
}

} // namespace

void copy_issue(uint32_t destination, const void* source, bool valid, Site site)
{
    Thread& thread = *current;
    Launch& launch = *thread.block->launch;
    uint32_t offset = shared_offset("copies to", destination, 16, 16, site);
    Copy copy{nullptr, destination, thread.groups + 1, false, {}, site};
    if (valid) {
        Range* range = global_range<16>(nullptr, "copies from", source, source, 16, site);
        if (range->writers) note_global_read(*range, reinterpret_cast<uint64_t>(source), 16, site);
        copy.source = source;
        memcpy(copy.snapshot, source, 16);
    }
    claim_shared<16>(*thread.block, offset, pending, nullptr, site);
    CopyPolicy policy = launch.arguments.policy;
    if (policy == CopyPolicy::at_issue || (policy == CopyPolicy::random && launch.next_random() % 2)) {
        perform(copy);
    } else {
        memset(destination_of(copy), 0xff, 16);
    }
    thread.copies.push_back(copy);
}

void copy_commit()
{
    Thread& thread = *current;
    Launch& launch = *thread.block->launch;
    thread.groups++;
    if (launch.arguments.policy != CopyPolicy::random) return;
    for (size_t i = thread.first_copy; i < thread.copies.size(); i++) {
        if (launch.next_random() % 4 == 0) perform(thread.copies[i]);
    }
}

void copy_wait(uint32_t pending_groups)
{
    Thread& thread = *current;
    Block& block = *thread.block;
    uint32_t newest = thread.groups > pending_groups ? thread.groups - pending_groups : 0;
    while (thread.first_copy < thread.copies.size()) {
        Copy& copy = thread.copies[thread.first_copy];
        if (copy.group > newest) return;
        perform(copy);
        if (copy.source && memcmp(copy.source, copy.snapshot, 16) != 0) {
            fail(copy.site, "the source of this asynchronous copy was overwritten before it was waited for");
        }
        uint32_t word = thread.warp->epoch << owner_bits | thread.owner;
        uint32_t* writers = block.writers.data() + (copy.destination - shared_origin) / granule;
        std::fill(writers, writers + 16 / granule, word);
        thread.first_copy++;
    }
    thread.copies.clear();
    thread.first_copy = 0;
}

} // namespace emulator
