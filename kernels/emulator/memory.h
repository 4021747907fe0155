// Checks of every access to memory: bounds, alignment, what nobody wrote, asynchronous copies, races.
#pragma once

#include "machine.h"

#include <string.h>

namespace emulator {

// Explain what is wrong with an access that the quick test refused, or return where nothing is.
void examine_read(uint32_t offset, uint32_t bytes, bool by_warp, Site site);
void examine_write(uint32_t offset, uint32_t bytes, const void* value, Site site);
[[noreturn, gnu::cold]] void fail_shared_bounds(const char* verb, uint32_t address, uint32_t bytes,
                                                uint32_t alignment, Site site);

// Allocation of `bytes` bytes at `address`, reached from a view that begins at `base`; fails if there is none.
Range* find_range(const char* verb, const void* base, uint64_t address, uint32_t bytes, uint32_t alignment,
                  Site site);
void note_global_write(Range& range, uint64_t address, uint32_t bytes, const void* value, Site site);
void note_global_read(const Range& range, uint64_t address, uint32_t bytes, Site site);
void note_coherent_read(const Range& range, uint64_t address);

// Offset of a shared address after the test of bounds and alignment.
inline uint32_t shared_offset(const char* verb, uint32_t address, uint32_t bytes, uint32_t alignment, Site site)
{
    uint32_t offset = address - shared_origin;
    if (__builtin_expect(uint64_t(offset) + bytes > current->block->shared_bytes || address % alignment != 0, 0))
        fail_shared_bounds(verb, address, bytes, alignment, site);
    return offset;
}

// `by_warp`: the warp reads as one (ldmatrix), so only what its warp_sync or a barrier ordered is there.
template <uint32_t bytes>
inline void read_shared(void* value, uint32_t address, uint32_t alignment, bool by_warp, Site site)
{
    const Thread& thread = *current;
    Block& block = *thread.block;
    const Warp& warp = *thread.warp;
    uint32_t offset = shared_offset("reads", address, bytes, alignment, site);
    constexpr uint32_t n = bytes / granule;
    const uint32_t* writers = block.writers.data() + offset / granule;
    uint32_t differ = 0;
    for (uint32_t i = 1; i < n; i++) differ |= writers[i] ^ writers[0];
    uint32_t seen = warp.seen[(writers[0] & owner_mask) / 32];
    bool ordered = (writers[0] >> owner_bits) - block.start - 1 < seen - block.start;
    if (__builtin_expect(differ != 0 || !ordered, 0)) examine_read(offset, bytes, by_warp, site);
    if (block.launch_races()) {
        uint32_t* readers = block.readers.data() + size_t(warp.id) * block.granules + offset / granule;
        uint32_t word = warp.epoch << owner_bits | (by_warp ? several_lanes : thread.lane);
        uint32_t several = warp.epoch << owner_bits | several_lanes;
        for (uint32_t i = 0; i < n; i++) {
            bool other = ((readers[i] ^ word) >> owner_bits) == 0 && readers[i] != word;
            readers[i] = other ? several : word;
        }
    }
    memcpy(value, block.shared.data() + offset, bytes);
}

// Tests a write of the current thread, and enters `epoch` as its time. `value` is null where it is not known yet.
template <uint32_t bytes>
inline void claim_shared(uint32_t offset, uint32_t epoch, const void* value, Site site)
{
    const Thread& thread = *current;
    Block& block = *thread.block;
    const Warp& warp = *thread.warp;
    constexpr uint32_t n = bytes / granule;
    uint32_t* writers = block.writers.data() + offset / granule;
    uint32_t suspect = 0;
    for (uint32_t i = 1; i < n; i++) suspect |= writers[i] ^ writers[0];
    suspect |= (writers[0] >> owner_bits) > warp.seen[(writers[0] & owner_mask) / 32];
    if (block.launch_races()) {
        const uint32_t* readers = block.readers.data() + offset / granule;
        for (uint32_t u = 0; u < block.warp_count; u++, readers += block.granules) {
            for (uint32_t i = 0; i < n; i++) suspect |= (readers[i] >> owner_bits) > warp.seen[u];
        }
    }
    if (__builtin_expect(suspect != 0, 0)) examine_write(offset, bytes, value, site);
    uint32_t word = epoch << owner_bits | thread.id;
    for (uint32_t i = 0; i < n; i++) writers[i] = word;
    if (block.launch_races()) {
        uint32_t* places = block.places.data() + offset / granule;
        uint32_t place = block.launch->place(site);
        for (uint32_t i = 0; i < n; i++) places[i] = place;
    }
}

template <uint32_t bytes>
inline void write_shared(uint32_t address, const void* value, uint32_t alignment, Site site)
{
    uint32_t offset = shared_offset("writes", address, bytes, alignment, site);
    claim_shared<bytes>(offset, current->warp->epoch, value, site);
    memcpy(current->block->shared.data() + offset, value, bytes);
}

// Tests an access to global memory and returns the allocation, which is tried first the next time.
template <uint32_t bytes>
inline Range* global_range(Range* hint, const char* verb, const void* base, const void* at, uint32_t alignment,
                           Site site)
{
    uint64_t address = reinterpret_cast<uint64_t>(at);
    bool inside = hint && address >= hint->low && address + bytes <= hint->high && address % alignment == 0;
    if (__builtin_expect(!inside, 0)) return find_range(verb, base, address, bytes, alignment, site);
    return hint;
}

} // namespace emulator
