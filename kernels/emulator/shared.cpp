// Shared memory: what is wrong with an access to it, and the asynchronous copies into it.
#include "operations.h"

#include <algorithm>
#include <stdio.h>

namespace emulator {

void fail_shared_bounds(const char* verb, uint32_t address, uint32_t bytes, uint32_t alignment, Site site)
{
    int64_t offset = int64_t(address) - shared_origin;
    if (address % alignment != 0) {
        fail(site, "%s %u bytes at byte %lld of shared memory, which is not aligned to %u", verb, bytes,
             (long long)offset, alignment);
    }
    fail(site, "%s %u bytes at byte %lld of shared memory, of which the block has %u", verb, bytes,
         (long long)offset, current->block->shared_bytes);
}

namespace {

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

void examine_read(uint32_t offset, uint32_t bytes, bool by_warp, Site site)
{
    const Thread& thread = *current;
    const Block& block = *thread.block;
    const Warp& warp = *thread.warp;
    for (uint32_t g = offset / granule; g < (offset + bytes) / granule; g++) {
        uint32_t epoch = block.writers[g] >> owner_bits, writer = block.writers[g] & owner_mask;
        if (epoch == pending) {
            fail(site, "reads byte %u of shared memory while an asynchronous copy of thread %u%s writes it: "
                       "wait for it first",
                 g * granule, writer, Place(block, g).text);
        }
        if (epoch <= block.start) fail(site, "reads byte %u of shared memory, which nobody wrote", g * granule);
        if (epoch <= warp.seen[writer / 32] || (writer == thread.id && !by_warp)) continue;
        fail(site, "race: reads byte %u of shared memory, which thread %u wrote%s with no %s in between",
             g * granule, writer, Place(block, g).text,
             writer / 32 == warp.id ? "warp_sync or barrier" : "barrier");
    }
}

void examine_write(uint32_t offset, uint32_t bytes, const void* value, Site site)
{
    const Thread& thread = *current;
    const Block& block = *thread.block;
    const Warp& warp = *thread.warp;
    for (uint32_t g = offset / granule; g < (offset + bytes) / granule; g++) {
        uint32_t epoch = block.writers[g] >> owner_bits, writer = block.writers[g] & owner_mask;
        if (epoch == pending) {
            fail(site, "writes byte %u of shared memory while an asynchronous copy of thread %u%s writes it: "
                       "wait for it first",
                 g * granule, writer, Place(block, g).text);
        }
        // Lanes of a warp may write the same value to the same place: whichever wins, it is there.
        const uint8_t* now = block.shared.data() + g * granule;
        bool same = value && writer / 32 == warp.id
            && memcmp(now, static_cast<const uint8_t*>(value) + (g * granule - offset), granule) == 0;
        if (epoch > warp.seen[writer / 32] && writer != thread.id && !same) {
            fail(site, "race: writes byte %u of shared memory, which thread %u wrote%s with no %s in between",
                 g * granule, writer, Place(block, g).text,
                 writer / 32 == warp.id ? "warp_sync or barrier" : "barrier");
        }
        if (!block.launch_races()) continue;
        for (uint32_t u = 0; u < block.warp_count; u++) {
            uint32_t word = block.readers[size_t(u) * block.granules + g], lane = word & owner_mask;
            if (word >> owner_bits <= warp.seen[u]) continue;
            if (u == warp.id && lane == thread.lane) continue;
            if (lane == several_lanes) {
                fail(site, "race: writes byte %u of shared memory, which lanes of warp %u read with no %s in "
                           "between",
                     g * granule, u, u == warp.id ? "warp_sync or barrier" : "barrier");
            }
            fail(site, "race: writes byte %u of shared memory, which thread %u read with no %s in between",
                 g * granule, u * 32 + lane, u == warp.id ? "warp_sync or barrier" : "barrier");
        }
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
    claim_shared<16>(offset, pending, nullptr, site);
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
        uint32_t word = thread.warp->epoch << owner_bits | thread.id;
        uint32_t* writers = block.writers.data() + (copy.destination - shared_origin) / granule;
        std::fill(writers, writers + 16 / granule, word);
        thread.first_copy++;
    }
    thread.copies.clear();
    thread.first_copy = 0;
}

} // namespace emulator
