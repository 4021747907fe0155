// Work lists of the attention kernels, made on the device from cu_seqlens by attention_schedule, read here.
//
// int32 words:
//   0      token rows that belong to images, cu_seqlens[N]; 0 where cu_seqlens was refused
//   1..3   short images of which a head has all warps of a block, half of them, a quarter of them
//   4      long items: (image, tile) pairs
//   5..7   zero
//   8..    image indices of the short images, longest first, room for N
//   8+N..  (image, tile) of the long items, two words each, longest image first
// A block walks items blockIdx, blockIdx + gridDim, ...: a static grid serves every batch, and slots that are
// empty are in no list. The lists depend on cu_seqlens alone, so results do not vary from run to run.
#pragma once

#include "../common/view.cuh"

enum ScheduleWord : int32_t {
    SCHEDULE_ROWS = 0,
    SCHEDULE_WHOLE = 1,
    SCHEDULE_HALF = 2,
    SCHEDULE_QUARTER = 3,
    SCHEDULE_LONG = 4,
    SCHEDULE_HEADER = 8
};

// One item of a block: `heads` neighbouring heads (1, 2 or 4; those from the last head on do not exist) of one
// short image, or one tile of rows of one head of a long image.
struct ShortItem {
    int image;
    int head;
    int heads;
};

struct LongItem {
    int image;
    int head;
    int tile;
};

// A tile of rows of one head of a long image among its tiles, whose places in the list begin at `first`.
struct HeadTile {
    int image;
    int head;
    int tile;
    int tiles;
    int first;
};

struct Schedule {
    const int32_t* words;
    int slots;
    int heads;

    DEVICE int word(int i) const
    {
        return Global<const int32_t>(words).load(i);
    }

    // Token rows that belong to images.
    DEVICE int rows() const
    {
        return word(SCHEDULE_ROWS);
    }

    DEVICE int short_items() const
    {
        return word(SCHEDULE_WHOLE) * heads + word(SCHEDULE_HALF) * ceil_div(heads, 2) +
               word(SCHEDULE_QUARTER) * ceil_div(heads, 4);
    }

    DEVICE ShortItem short_item(int item) const
    {
        int first = 0;
        int shared_by = 1;
        for (int i = SCHEDULE_WHOLE; i < SCHEDULE_QUARTER; i++) {
            const int images = word(i);
            const int items = images * ceil_div(heads, shared_by);
            if (item < items) break;
            item -= items;
            first += images;
            shared_by *= 2;
        }
        const int groups = ceil_div(heads, shared_by);
        return ShortItem{word(SCHEDULE_HEADER + first + item / groups), item % groups * shared_by, shared_by};
    }

    DEVICE int long_items() const
    {
        return word(SCHEDULE_LONG) * heads;
    }

    // Heads of one tile are neighbouring items: their rows share cache lines.
    DEVICE LongItem long_item(int item) const
    {
        const int at = SCHEDULE_HEADER + slots + item / heads * 2;
        return LongItem{word(at), item % heads, word(at + 1)};
    }

    // The same items in another order: tiles of one head of an image are neighbours, so that blocks that work at the
    // same time read the same keys. `tile_rows` is what the list was made with.
    DEVICE HeadTile head_tile(int item, const int32_t* cu_seqlens, int tile_rows) const
    {
        const int entry = item / heads;
        const int at = SCHEDULE_HEADER + slots + entry * 2;
        const int image = word(at);
        const int first = entry - word(at + 1);
        const Global<const int32_t> starts(cu_seqlens);
        const int tiles = ceil_div(starts.load(image + 1) - starts.load(image), tile_rows);
        const int place = item - first * heads;
        return HeadTile{image, place / tiles, place % tiles, tiles, first};
    }
};
