// Tiles of 16-bit elements in shared memory, and the way to the fragments of mma.m16n8k16.
//
// A tile is `rows` rows of ROW_BYTES bytes, cut into chunks of 16 bytes (8 elements). Chunk c of row r lies
// where chunk c ^ s(r) would lie, with
//
//   ROW_BYTES >= 128 (a multiple):  s(r) = r % 8
//   ROW_BYTES == 64:                s(r) = (r / 2) % 4
//   ROW_BYTES == 32:                s(r) = (r / 4) % 2
//
// so that the same chunk of 8 rows that follow each other lies in 8 different bank groups: ldmatrix reads
// them, and rows are copied in, without bank conflicts. For rows of 128 bytes it is the 128-byte swizzle of
// the tensor memory accelerator as well, where the tile begins at a multiple of 1024 bytes.
//
// s(r) repeats after 8 rows and touches the low three bits of a chunk's number alone. Hence a lane computes
// one address, the one for its first fragment, and comes to any other by adding whole groups of 8 rows
// (`rows`) and by exclusive-or with a number of chunks (`chunks`) whose bits are zero in the first chunk
// that the lane was given:
//
//   first = Tile::row_major_a(base, row, chunk, lane)      row % 8 == 0, chunk % (chunks walked over) == 0
//   ldmatrix_x4(fragment, Tile::rows(first, 16 * i) ^ Tile::chunks(2 * j))
//
// A tile begins at a multiple of 128 bytes.
#pragma once

#include "view.cuh"

template <int ROW_BYTES>
struct Tile {
    static_assert(ROW_BYTES == 32 || ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "a row is 32, 64 or 128 k bytes");

    // Chunks of 16 bytes in a row.
    static constexpr int CHUNKS = ROW_BYTES / 16;

    // Rows after which the swizzle repeats.
    static constexpr int PERIOD = 8;

    static DEVICE uint32_t swizzle(uint32_t row)
    {
        if (ROW_BYTES == 32) return (row >> 2) & 1;
        if (ROW_BYTES == 64) return (row >> 1) & 3;
        return row & 7;
    }

    // Byte offset of a chunk in the tile.
    static DEVICE uint32_t offset(uint32_t row, uint32_t chunk)
    {
        return row * ROW_BYTES + ((chunk ^ swizzle(row)) << 4);
    }

    // `address`, `count` rows down; a multiple of PERIOD.
    static DEVICE uint32_t rows(uint32_t address, uint32_t count)
    {
        return address + count * ROW_BYTES;
    }

    // What to combine an address with by exclusive-or to come `count` chunks to the right.
    static DEVICE uint32_t chunks(uint32_t count)
    {
        return count << 4;
    }

    // The four functions below give the address that `lane` hands to ldmatrix_x4.
    //
    // Operand a, 16 x 16, from a tile whose rows are m and whose chunks are k. For ldmatrix_x4.
    static DEVICE uint32_t row_major_a(uint32_t base, uint32_t row, uint32_t chunk, uint32_t lane)
    {
        return base + offset(row + lane % 16, chunk + lane / 16);
    }

    // Operand a, 16 x 16, from a tile whose rows are k and whose chunks are m. For ldmatrix_x4_trans.
    static DEVICE uint32_t transposed_a(uint32_t base, uint32_t row, uint32_t chunk, uint32_t lane)
    {
        return base + offset(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2);
    }

    // Operand b, k 16 x n 16, as two fragments one after the other (n 0..7, n 8..15), from a tile whose rows
    // are n and whose chunks are k. For ldmatrix_x4.
    static DEVICE uint32_t column_major_b(uint32_t base, uint32_t row, uint32_t chunk, uint32_t lane)
    {
        return base + offset(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2);
    }

    // The same from a tile whose rows are k and whose chunks are n. For ldmatrix_x4_trans.
    static DEVICE uint32_t row_major_b(uint32_t base, uint32_t row, uint32_t chunk, uint32_t lane)
    {
        return base + offset(row + lane % 16, chunk + lane / 16);
    }
};

// Copies rows from global memory into a tile, asynchronously, by THREADS threads of which each takes the same
// chunk of every (THREADS / CHUNKS)th row.
template <int ROWS, int ROW_BYTES, int THREADS>
struct TileCopy {
    using Layout = Tile<ROW_BYTES>;
    static constexpr int STEP = THREADS / Layout::CHUNKS;
    static constexpr int COPIES = ROWS / STEP;
    static_assert(THREADS % Layout::CHUNKS == 0 && ROWS % STEP == 0, "every thread copies as much as the others");
    static_assert(STEP % Layout::PERIOD == 0, "all rows of a thread lie in the same swizzled chunk");

    uint32_t row;    // first row of this thread
    uint32_t chunk;  // its chunk

    DEVICE explicit TileCopy(uint32_t thread) : row(thread / Layout::CHUNKS), chunk(thread % Layout::CHUNKS) {}

    // Copies into the tile at `base`. `index` is the element of `source` that this thread's first chunk comes
    // from, `stride` the elements between two rows. Rows from `limit` of the tile on are written as zeros,
    // their source is not read.
    DEVICE void copy(uint32_t base, Global<const bf16> source, int64_t index, int64_t stride, int limit) const
    {
        uint32_t destination = base + Layout::offset(row, chunk);
        int left = limit - int(row);
        UNROLL
        for (int i = 0; i < COPIES; i++) {
            ptx::cp_async_16(Layout::rows(destination, i * STEP), source.at(index), i * STEP < left);
            index += STEP * stride;
        }
    }
};
