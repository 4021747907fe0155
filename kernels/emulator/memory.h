// Checks of every access to memory: bounds, alignment, what nobody wrote, asynchronous copies, races.
#pragma once

#include "machine.h"

#include <string.h>

namespace emulator {

// Explain what is wrong with an access that the quick test refused, or return where nothing is. `block` is whose
// shared memory it is.
void examine_read(const Block& block, uint32_t offset, uint32_t bytes, bool by_warp, Site site);
void examine_write(const Block& block, uint32_t offset, uint32_t bytes, const void* value, Site site);
[[noreturn, gnu::cold]] void fail_shared_bounds(const char* verb, const Block& block, uint32_t address,
                                                uint32_t bytes, uint32_t alignment, Site site);

// Allocation of `bytes` bytes at `address`, reached from a view that begins at `base`; fails if there is none.
Range* find_range(const char* verb, const void* base, uint64_t address, uint32_t bytes, uint32_t alignment,
                  Site site);
void note_global_write(Range& range, uint64_t address, uint32_t bytes, const void* value, Site site);
void note_global_read(const Range& range, uint64_t address, uint32_t bytes, Site site);
void note_coherent_read(const Range& range, uint64_t address);

// Offset of an address of the block's own shared memory after the test of bounds and alignment.
inline uint32_t shared_offset(const char* verb, uint32_t address, uint32_t bytes, uint32_t alignment, Site site)
{
    const Block& block = *current->block;
    uint32_t offset = address - shared_origin;
    if (__builtin_expect(uint64_t(offset) + bytes > block.shared_bytes || address % alignment != 0, 0))
        fail_shared_bounds(verb, block, address, bytes, alignment, site);
    return offset;
}

// Reads from the shared memory of `block`. `by_warp`: the warp reads as one (ldmatrix), so only what its warp_sync
// or a barrier ordered is there.
template <uint32_t bytes>
inline void read_block(Block& block, void* value, uint32_t offset, bool by_warp, Site site)
{
    const Thread& thread = *current;
    const Warp& warp = *thread.warp;
    constexpr uint32_t n = bytes / granule;
    const uint32_t* writers = block.writers.data() + offset / granule;
    uint32_t differ = 0;
    for (uint32_t i = 1; i < n; i++) differ |= writers[i] ^ writers[0];
    uint32_t seen = warp.clock.seen[party_of(writers[0])];
    bool ordered = (writers[0] >> owner_bits) - block.start - 1 < seen - block.start;
    if (__builtin_expect(differ != 0 || !ordered, 0)) examine_read(block, offset, bytes, by_warp, site);
    if (block.launch_races()) {
        bool own = &block == thread.block;
        uint32_t row = own ? warp.id : block.peer_row();
        uint32_t* readers = block.readers.data() + size_t(row) * block.granules + offset / granule;
        uint32_t seen_self = warp.clock.seen[warp.party];
        uint32_t word = warp.epoch << owner_bits | (!own ? thread.owner : by_warp ? several_lanes : thread.lane);
        uint32_t several = warp.epoch << owner_bits | several_lanes;
        for (uint32_t i = 0; i < n; i++) {
            // Reads of other lanes that nothing has ordered yet.
            bool other = own && (readers[i] >> owner_bits) > seen_self && ((readers[i] ^ word) & owner_mask) != 0;
            readers[i] = other ? several : word;
        }
    }
    memcpy(value, block.shared.data() + offset, bytes);
}

template <uint32_t bytes>
inline void read_shared(void* value, uint32_t address, uint32_t alignment, bool by_warp, Site site)
{
    uint32_t offset = shared_offset("reads", address, bytes, alignment, site);
    read_block<bytes>(*current->block, value, offset, by_warp, site);
}

// Tests a write of the current thread, and enters `epoch` as its time. `value` is null where it is not known yet.
template <uint32_t bytes>
inline void claim_shared(Block& block, uint32_t offset, uint32_t epoch, const void* value, Site site)
{
    const Thread& thread = *current;
    const Clock& clock = thread.warp->clock;
    constexpr uint32_t n = bytes / granule;
    uint32_t* writers = block.writers.data() + offset / granule;
    uint32_t suspect = 0;
    for (uint32_t i = 1; i < n; i++) suspect |= writers[i] ^ writers[0];
    suspect |= (writers[0] >> owner_bits) > clock.seen[party_of(writers[0])];
    if (!block.reading.empty()) suspect |= block.reading[offset / chunk] | block.reading[(offset + bytes - 1) / chunk];
    if (block.launch_races()) {
        const uint32_t* readers = block.readers.data() + offset / granule;
        for (uint32_t r = 0; r < block.rows; r++, readers += block.granules) {
            uint32_t seen = clock.seen[block.row_party[r]];
            for (uint32_t i = 0; i < n; i++) suspect |= (readers[i] >> owner_bits) > seen;
        }
        suspect |= block.read_by_peers;
    }
    if (__builtin_expect(suspect != 0, 0)) examine_write(block, offset, bytes, value, site);
    uint32_t word = epoch << owner_bits | thread.owner;
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
    Block& block = *current->block;
    claim_shared<bytes>(block, offset, current->warp->epoch, value, site);
    memcpy(block.shared.data() + offset, value, bytes);
}

// Tests an access of the current thread to global memory and returns the allocation, which is tried first the next time.
template <uint32_t bytes>
inline Range* global_range(Range* hint, const char* verb, const void* base, const void* at, uint32_t alignment,
                           Site site)
{
    uint64_t address = reinterpret_cast<uint64_t>(at);
    bool inside = hint && address >= hint->low && address + bytes <= hint->high && address % alignment == 0;
    if (__builtin_expect(!inside || !is_behind(*current), 0)) return find_range(verb, base, address, bytes, alignment, site);
    return hint;
}

} // namespace emulator
