// What Hopper's forward kernel of attention works on, and where it has it: the items of a block, and the ring of stages
// in its shared memory.
#pragma once

#include "../common/ring.cuh"
#include "core_rows.cuh"
#include "forward_rows.cuh"
#include "schedule.cuh"

namespace attention_forward {

// Queries of a head, as many as the image has or a tile takes, and all keys. In pairs the last tile of an image may lie
// behind its end.
template <int TILE_ROWS>
struct HopperItem {
    Head head;
    int tile; // its first row, or -1 where the item is all of a short image

    DEVICE bool is_long() const
    {
        return tile >= 0;
    }

    DEVICE int first() const
    {
        return is_long() ? tile : 0;
    }

    DEVICE int rows() const
    {
        const int rest = head.length - first();
        if (is_long() && rest > TILE_ROWS) return TILE_ROWS;
        return rest > 0 ? rest : 0;
    }
};

// The items of a block, one after another. Each lane looks up one of the next 32, so that nobody waits for it often.
//
// In pairs a long item of the list has twice the rows, of which each block of a cluster takes a tile. Items are dealt
// as if the list had both tiles, one after the other, so that short ones go on where the long ones end.
template <int TILE_ROWS>
struct HopperItems {
    int given = 0;
    int start, length, head, tile; // the lane's; length is 0 where there is no item

    // False after the last one. Collective.
    DEVICE bool next(HopperItem<TILE_ROWS>& item, const AttentionForward& p)
    {
        const int lane = given % 32;
        if (lane == 0) look_up(p, int(blockIdx.x) + (given + int(ptx::lane_id())) * int(gridDim.x));
        given++;
        item.head.start = int(ptx::shuffle(uint32_t(start), lane));
        item.head.length = ptx::shuffle(uint32_t(length), lane);
        item.head.head = ptx::shuffle(uint32_t(head), lane);
        item.tile = ptx::shuffle(uint32_t(tile), lane);
        return item.head.length != 0;
    }

    DEVICE void look_up(const AttentionForward& p, int number)
    {
        const Schedule schedule{p.schedule, p.slots, p.heads};
        const int pairs = p.pairs != 0;
        const int long_items = schedule.long_items() << pairs;
        int image = 0;
        start = length = head = tile = 0;
        if (number < long_items) {
            const HeadTile item = schedule.head_tile(number >> pairs, p.cu_seqlens, TILE_ROWS << pairs);
            image = item.image;
            head = item.head;
            tile = ((item.tile << pairs) + (number & pairs)) * TILE_ROWS;
        } else if (number - long_items < schedule.short_items()) {
            const ShortItem item = schedule.short_item(number - long_items);
            image = item.image;
            head = item.head;
            tile = -1;
        } else {
            return;
        }
        const Global<const int32_t> starts(p.cu_seqlens);
        start = starts.load(image);
        length = starts.load(image + 1) - start;
    }
};

// The ring of a block of which CONSUMERS warpgroups multiply: stages of 64 keys and their values, what passes them on,
// and room for the results of tails.
template <int D, int CONSUMERS>
struct HopperStages {
    using Tile = CoreRows<D, 64>;
    using Items = HopperItems<64 * CONSUMERS>;
    using Item = HopperItem<64 * CONSUMERS>;
    static constexpr int KEYS = 64; // of a stage
    static constexpr int THREADS = 128;
    // A thread's, of those that multiply and those that copy: together as many as the launch gives them.
    static constexpr uint32_t MULTIPLY_REGISTERS = CONSUMERS == 3 ? 136 : D <= 96 ? 176 : 192;
    static constexpr uint32_t COPY_REGISTERS = (CONSUMERS == 3 ? 512 : 504) - CONSUMERS * MULTIPLY_REGISTERS;
    static constexpr uint32_t STAGE_BYTES = 2 * Tile::BYTES;
    // What a block is launched with: all that there is.
    static constexpr uint32_t SHARED_BYTES = 232448;
    static constexpr uint32_t ZERO_BYTES = Tile::ZERO_BYTES;
    static constexpr uint32_t MBARRIER_BYTES = 320;
    // Where the warps of a tail hand over results: 8 rows of 8 columns of three warps, or as many such as there is room
    // for; and before, the highest scores and sums of 16 rows of four warps.
    static constexpr uint32_t UNIT_BYTES = 3 * 8 * 8 * 4;
    static_assert(UNIT_BYTES >= 4 * 16 * 8, "");
    static constexpr int STAGES = (SHARED_BYTES - ZERO_BYTES - MBARRIER_BYTES - CONSUMERS * UNIT_BYTES) / STAGE_BYTES;
    static_assert((8 + 8 + 8) * STAGES <= MBARRIER_BYTES, "");
    static constexpr int ROOM =
        (SHARED_BYTES - ZERO_BYTES - MBARRIER_BYTES - STAGES * STAGE_BYTES) / (CONSUMERS * UNIT_BYTES);
    static constexpr int UNITS = ROOM < Tile::CHUNKS ? ROOM : Tile::CHUNKS;
    using Ring = HopperRing<STAGES>;

    uint32_t ring, full, empty, exchange;

    DEVICE HopperStages()
    {
        ring = ptx::shared_base();
        full = zeros() + ZERO_BYTES;
        empty = full + 8 * STAGES;
        exchange = full + MBARRIER_BYTES;
    }

    // The plane of zeros of CoreRows.
    DEVICE uint32_t zeros() const
    {
        return ring + STAGES * STAGE_BYTES;
    }

    // By all threads, before a barrier.
    DEVICE void clear_zeros() const
    {
        if constexpr (ZERO_BYTES != 0) {
            for (uint32_t i = threadIdx.x; i < ZERO_BYTES / 16; i += blockDim.x)
                Shared<Vec16>(zeros()).store(i, Vec16{});
            ptx::fence_proxy_async();
        }
    }

    DEVICE void initialise(bool pairs) const
    {
        for (int stage = 0; stage < STAGES; stage++) {
            ptx::mbarrier_init(full + 8 * stage, THREADS);
            // Each warp that multiplies; in pairs of both blocks, or each twice.
            ptx::mbarrier_init(empty + 8 * stage, (pairs ? 8 : 4) * CONSUMERS);
            owners().store(2 * stage, empty + 8 * stage);
        }
    }

    // Where a stage is given back, two words each: the mbarrier of this block, and in pairs those of both or twice that
    // of this one. Those who copy note it before they hand the stage over; those who multiply have no registers to work
    // it out.
    DEVICE Shared<uint32_t> owners() const
    {
        return Shared<uint32_t>(empty + 8 * STAGES);
    }

    DEVICE Tile keys_of(uint32_t stage) const
    {
        return Tile(ring + stage * STAGE_BYTES);
    }

    DEVICE Tile values_of(uint32_t stage) const
    {
        return Tile(ring + stage * STAGE_BYTES + Tile::BYTES);
    }

    static DEVICE int stages_of(const Head& head)
    {
        return ceil_div(head.length, KEYS);
    }
};

} // namespace attention_forward
