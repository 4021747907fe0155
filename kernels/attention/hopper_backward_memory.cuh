// Shared memory of a block of Hopper's backward pass of attention, and what its roles tell each other there.
#pragma once

#include "../common/ring.cuh"
#include "core_rows.cuh"
#include "hopper_backward.cuh"
#include "own_rows.cuh"

namespace hopper_backward {

// What a block launches with: a KiB less than there is, in case that the system's own counts.
constexpr uint32_t SHARED_BYTES = 231424;

// What the two warpgroups do with a key block.
enum Kind : int {
    END = 0,   // nothing: there are no more
    WHOLE = 1, // of a short image: all of its queries stay in shared memory for the next one
    PAIR = 2,  // of two heads of an image of up to 64 tokens: a warpgroup has a head
    LONG = 3   // of a long image: dq is added to that of the other key blocks in global memory
};

struct alignas(16) KeyBlock {
    int kind;
    int start;  // token row of the image
    int length; // rows of it
    int head;
    int heads;  // that exist, where a block has a pair
    int key;    // first key
    int first;  // query tile that a long image begins with
    int unused;
};

// Slots for blocks of keys and their values, stages for queries and their dout, one tile of ds, room for tiles of dq
// between two key blocks of a short image or on their way to global memory. Short images of more than one key block
// have as many query tiles as there are stages and room.
template <int D>
struct Memory {
    static constexpr int SLOTS = D == 64 ? 2 : 1;
    static constexpr int STAGES = D <= 80 ? 4 : D <= 112 ? 3 : 2;
    static constexpr int ROOM = D <= 80 ? 4 : D <= 96 ? 3 : 2;

    using Keys = CoreRows<D, KEYS_OF_BLOCK>;
    using Queries = CoreRows<D, QUERIES_OF_STAGE>;
    using Scores = CoreRows<QUERIES_OF_STAGE, KEYS_OF_BLOCK>;

    // Two numbers of a query behind its tiles: -lse log2(e) and -delta.
    static constexpr uint32_t STATISTICS_BYTES = QUERIES_OF_STAGE * 4;
    static constexpr uint32_t SLOT_BYTES = 2 * Keys::BYTES;
    static constexpr uint32_t STAGE_BYTES = 2 * Queries::BYTES + 2 * STATISTICS_BYTES;
    // Of a warp that copies.
    static constexpr uint32_t NOTES_BYTES = 256;
    // Of a warp that multiplies: sums of the columns of its rows, for a gain and a bias.
    static constexpr uint32_t SUMS_BYTES = 2 * D * 4;

    static constexpr uint32_t STAGES_AT = SLOTS * SLOT_BYTES;
    static constexpr uint32_t SCORES_AT = STAGES_AT + STAGES * STAGE_BYTES;
    static constexpr uint32_t ROOM_AT = SCORES_AT + Scores::BYTES;
    static constexpr uint32_t SUMS_AT = ROOM_AT + ROOM * FragmentTile<D>::BYTES;
    static constexpr uint32_t NOTES_AT = round_up(SUMS_AT + WARPS * SUMS_BYTES, 64);
    static constexpr uint32_t BLOCKS_AT = NOTES_AT + 4 * NOTES_BYTES;
    static constexpr uint32_t MBARRIERS_AT = BLOCKS_AT + SLOTS * sizeof(KeyBlock);
    static constexpr uint32_t ZEROS_AT = MBARRIERS_AT + round_up(2 * 8 * (SLOTS + STAGES + ROOM), 16);
    static constexpr uint32_t BYTES = ZEROS_AT + Keys::ZERO_BYTES;
    static_assert(BYTES <= SHARED_BYTES, "fits a multiprocessor");

    // Arrivals that fill a slot or a stage: four of each of three warps where the fourth moves dq, else three of each.
    static constexpr uint32_t FILLS = 12;

    uint32_t base;

    DEVICE Memory() : base(ptx::shared_base()) {}

    DEVICE Keys keys(uint32_t slot) const
    {
        return Keys(base + slot * SLOT_BYTES);
    }

    DEVICE Keys values(uint32_t slot) const
    {
        return Keys(base + slot * SLOT_BYTES + Keys::BYTES);
    }

    DEVICE Queries queries(uint32_t stage) const
    {
        return Queries(base + STAGES_AT + stage * STAGE_BYTES);
    }

    DEVICE Queries dout(uint32_t stage) const
    {
        return Queries(base + STAGES_AT + stage * STAGE_BYTES + Queries::BYTES);
    }

    DEVICE uint32_t lse(uint32_t stage) const
    {
        return base + STAGES_AT + stage * STAGE_BYTES + 2 * Queries::BYTES;
    }

    DEVICE uint32_t delta(uint32_t stage) const
    {
        return lse(stage) + STATISTICS_BYTES;
    }

    // A row a key, a column a query.
    DEVICE Scores scores() const
    {
        return Scores(base + SCORES_AT);
    }

    DEVICE uint32_t room(uint32_t tile) const
    {
        return base + ROOM_AT + tile * FragmentTile<D>::BYTES;
    }

    // Of warp `warp` of the eight that multiply.
    DEVICE Shared<float> sums(uint32_t warp) const
    {
        return Shared<float>(base + SUMS_AT + warp * SUMS_BYTES);
    }

    DEVICE Shared<KeyBlock> block(uint32_t slot) const
    {
        return Shared<KeyBlock>(base + BLOCKS_AT + slot * sizeof(KeyBlock));
    }

    DEVICE uint32_t notes(uint32_t warp) const
    {
        return base + NOTES_AT + warp * NOTES_BYTES;
    }

    DEVICE uint32_t zeros() const
    {
        return base + ZEROS_AT;
    }

    // The mbarriers of a slot, of a stage, of a tile of room: filled, and empty again.
    DEVICE uint32_t slot_filled(uint32_t slot) const
    {
        return base + MBARRIERS_AT + 8 * slot;
    }

    DEVICE uint32_t slot_empty(uint32_t slot) const
    {
        return slot_filled(SLOTS + slot);
    }

    DEVICE uint32_t stage_filled(uint32_t stage) const
    {
        return slot_filled(2 * SLOTS + stage);
    }

    DEVICE uint32_t stage_empty(uint32_t stage) const
    {
        return stage_filled(STAGES + stage);
    }

    DEVICE uint32_t room_filled(uint32_t tile) const
    {
        return stage_filled(2 * STAGES + tile);
    }

    DEVICE uint32_t room_empty(uint32_t tile) const
    {
        return room_filled(ROOM + tile);
    }

    // By one thread, before the barrier that all roles begin with.
    DEVICE void begin() const
    {
        for (int i = 0; i < SLOTS; i++) {
            ptx::mbarrier_init(slot_filled(i), FILLS);
            ptx::mbarrier_init(slot_empty(i), WARPS);
        }
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(stage_filled(i), FILLS);
            ptx::mbarrier_init(stage_empty(i), WARPS);
        }
        for (int i = 0; i < ROOM; i++) {
            ptx::mbarrier_init(room_filled(i), WARPS / 2);
            ptx::mbarrier_init(room_empty(i), 1);
        }
        ptx::fence_mbarrier_init();
    }
};

// The order in which the key blocks of a head of a long image take its query tiles.
//
// A window is as many neighbouring key blocks as may be under way at the same time. Block `index` of `blocks` in a
// window begins at its own share of the `tiles` query tiles and goes around. A tile is added to by one window after
// another, in a window first by the block that begins with it or, of those that begin before it, comes to it first,
// and then by the others as they come: who waits waits for a block that has been there at an earlier step. Windows are
// no wider than the grid, so each of their key blocks is that of another block. In the first window that is not done all
// blocks have come to their key blocks, or are on items before that wait for nobody: nobody waits for ever while all
// blocks of the grid are resident.
struct Window {
    int index;
    int blocks;
    int before; // key blocks in the windows before
    int tiles;

    DEVICE Window(int block, int all, int grid, int tiles) : tiles(tiles)
    {
        const int widest = all < grid ? all : grid;
        before = block / widest * widest;
        index = block - before;
        blocks = all - before < widest ? all - before : widest;
    }

    DEVICE int first() const
    {
        return index * tiles / blocks;
    }

    // How many key blocks add to a tile before this one.
    DEVICE int turn(int tile) const
    {
        const int leader = ((tile + 1) * blocks - 1) / tiles;
        return before + (leader >= index ? leader - index : leader - index + blocks);
    }
};

} // namespace hopper_backward
