// What is wrong with an access to memory, and the asynchronous copies.
#include "operations.h"

#include <algorithm>
#include <iterator>
#include <stdlib.h>

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

void examine_read(uint32_t offset, uint32_t bytes, bool by_warp, Site site)
{
    const Thread& thread = *current;
    const Block& block = *thread.block;
    const Warp& warp = *thread.warp;
    for (uint32_t g = offset / granule; g < (offset + bytes) / granule; g++) {
        uint32_t epoch = block.writers[g] >> owner_bits, writer = block.writers[g] & owner_mask;
        if (epoch == pending) {
            fail(site, "reads byte %u of shared memory while an asynchronous copy of thread %u writes it: "
                       "wait for it first",
                 g * granule, writer);
        }
        if (epoch <= block.start) fail(site, "reads byte %u of shared memory, which nobody wrote", g * granule);
        if (epoch <= warp.seen[writer / 32] || (writer == thread.id && !by_warp)) continue;
        fail(site, "race: reads byte %u of shared memory, which thread %u wrote with no %s in between", g * granule,
             writer, writer / 32 == warp.id ? "warp_sync or barrier" : "barrier");
    }
}

void examine_write(uint32_t offset, uint32_t bytes, Site site)
{
    const Thread& thread = *current;
    const Block& block = *thread.block;
    const Warp& warp = *thread.warp;
    for (uint32_t g = offset / granule; g < (offset + bytes) / granule; g++) {
        uint32_t epoch = block.writers[g] >> owner_bits, writer = block.writers[g] & owner_mask;
        if (epoch == pending) {
            fail(site, "writes byte %u of shared memory while an asynchronous copy of thread %u writes it: "
                       "wait for it first",
                 g * granule, writer);
        }
        if (epoch > warp.seen[writer / 32] && writer != thread.id) {
            fail(site, "race: writes byte %u of shared memory, which thread %u wrote with no %s in between",
                 g * granule, writer, writer / 32 == warp.id ? "warp_sync or barrier" : "barrier");
        }
        if (!block.launch_races()) continue;
        for (uint32_t u = 0; u < block.warp_count; u++) {
            uint32_t word = block.readers[size_t(u) * block.granules + g], lane = word & owner_mask;
            if (word >> owner_bits <= warp.seen[u]) continue;
            if (u == warp.id && lane == thread.lane) continue;
            if (lane == several_lanes) {
                fail(site, "race: writes byte %u of shared memory, which lanes of warp %u read with no %s in between",
                     g * granule, u, u == warp.id ? "warp_sync or barrier" : "barrier");
            }
            fail(site, "race: writes byte %u of shared memory, which thread %u read with no %s in between",
                 g * granule, u * 32 + lane, u == warp.id ? "warp_sync or barrier" : "barrier");
        }
    }
}

namespace {

template <class R>
R* containing(R* ranges, size_t count, uint64_t address, bool with_end)
{
    R* after = std::upper_bound(ranges, ranges + count, address,
                                [](uint64_t at, const R& range) { return at < range.low; });
    if (after == ranges) return nullptr;
    R* range = after - 1;
    return address < range->high || (with_end && address == range->high) ? range : nullptr;
}

} // namespace

Range* find_range(const char* verb, const void* base, uint64_t address, uint32_t bytes, uint32_t alignment, Site site)
{
    Launch& launch = *current->block->launch;
    const LaunchArguments& arguments = launch.arguments;
    if (!base) fail(site, "%s %u bytes through a null pointer", verb, bytes);
    uint64_t begin = reinterpret_cast<uint64_t>(base);
    Range* range = nullptr;
    for (Range* recent : launch.recent) {
        if (recent && begin >= recent->low && begin < recent->high) range = recent;
    }
    if (!range) {
        range = containing(arguments.ranges, arguments.range_count, begin, true);
        launch.recent[launch.next_recent++ % std::size(launch.recent)] = range;
    }
    if (!range) range = containing(arguments.ranges, arguments.range_count, address, false);
    if (!range) {
        const FreedRange* freed = nullptr;
        for (size_t i = 0; i < arguments.freed_count; i++) {
            const FreedRange& candidate = arguments.freed[i];
            if (address >= candidate.low && address < candidate.high) freed = &candidate;
        }
        if (freed) {
            fail(site, "%s %u bytes in global memory that was freed, at byte %llu of an allocation of %llu", verb, bytes,
                 (unsigned long long)(address - freed->low), (unsigned long long)(freed->high - freed->low));
        }
        fail(site, "%s %u bytes at address 0x%llx, which lies in no allocation of global memory", verb, bytes,
             (unsigned long long)address);
    }
    if (address < range->low || address + bytes > range->high) {
        fail(site, "%s %u bytes at byte %lld of an allocation of %llu bytes of global memory", verb, bytes,
             (long long)(address - range->low), (unsigned long long)(range->high - range->low));
    }
    if (address % alignment != 0) {
        fail(site, "%s %u bytes at address 0x%llx of global memory, which is not aligned to %u", verb, bytes,
             (unsigned long long)address, alignment);
    }
    return range;
}

void note_global_write(Range& range, uint64_t address, uint32_t bytes, const void* value, Site site)
{
    Launch& launch = *current->block->launch;
    launch.changes++;
    if (!launch.arguments.global_races || bytes < granule) return;
    if (!range.writers) {
        range.writers = static_cast<uint32_t*>(calloc((range.high - range.low) / granule + 1, sizeof(uint32_t)));
        if (!range.writers) return;
    }
    uint32_t* writers = range.writers + (address - range.low) / granule;
    uint32_t own = current->block->number;
    for (uint32_t i = 0; i < bytes / granule; i++) {
        const char* old = reinterpret_cast<const char*>(address) + i * granule;
        if (writers[i] != 0 && writers[i] != own
            && memcmp(old, static_cast<const char*>(value) + i * granule, granule) != 0) {
            fail(site, "writes byte %llu of an allocation of global memory, where block %u of this launch wrote "
                       "something else",
                 (unsigned long long)(address - range.low + i * granule), writers[i] - 1);
        }
        writers[i] = own;
    }
}

void note_global_read(const Range& range, uint64_t address, uint32_t bytes, Site site)
{
    const uint32_t* writers = range.writers + (address - range.low) / granule;
    uint32_t own = current->block->number;
    for (uint32_t i = 0; i < bytes / granule; i++) {
        if (writers[i] == 0 || writers[i] == own) continue;
        fail(site, "reads byte %llu of an allocation of global memory, which block %u of this launch wrote: "
                   "load_coherent is for that",
             (unsigned long long)(address - range.low + i * granule), writers[i] - 1);
    }
}

int add_to_global(int* counter, int x, Site site)
{
    global_range<sizeof(int)>(nullptr, "adds to", counter, counter, alignof(int), site);
    Thread& thread = *current;
    if (x == 0) {
        if (thread.polled == counter) give_way(site);
        thread.polled = counter;
    } else {
        thread.block->launch->changes++;
    }
    int old = *counter;
    *counter = int(uint32_t(old) + uint32_t(x));
    return old;
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
    claim_shared<16>(offset, pending, site);
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
            fail(copy.site, "the global source of this asynchronous copy was overwritten before the copy was waited for");
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
