// Rows of one head in shared memory as wgmma and mma both read them: without a swizzle, so that any multiple of 8
// columns is exact.
//
// The 16-byte chunks of a tile lie plane by plane: chunk c of all rows, then chunk c + 1. 8 rows of a plane are one
// core matrix of wgmma, 128 bytes in a row, which it reads (and ldmatrix, and 8 lanes that have a row each) without
// meeting a bank twice. Planes are 16 bytes longer than their rows, so that the chunks of one row lie in different
// banks too: whole rows are written and read without conflicts as well.
//
// The same tile is an operand of wgmma in two ways: with its rows as m or n and its columns as k ("rows"), and with
// its columns as m or n and its rows as k ("columns", which wgmma calls transposed).
//
// The depth of wgmma is 16. Where a row is an odd number of chunks, the last step of depth takes its upper half from a
// plane of zeros that all tiles of a block share, behind all of them in shared memory.
#pragma once

#include "../common/wgmma.cuh"
#include "mma_rows.cuh"

template <int D, int ROWS>
struct CoreRows : MmaRows<CoreRows<D, ROWS>, D> {
    static_assert(D % 8 == 0 && ROWS % 8 == 0, "core matrices are 8 rows of 8 columns");
    static constexpr int CHUNKS = D / 8;
    // Steps of 16 columns, the last one half where CHUNKS is odd.
    static constexpr int STEPS = ceil_div(CHUNKS, 2);
    // From a row to the next, and rows whose first four chunks meet none of each other's banks, as OwnRows wants them.
    static constexpr uint32_t ROW_BYTES = 16;
    static constexpr int APART = 4;
    // From a chunk of a row to the next.
    static constexpr uint32_t PITCH = 16 * ROWS + 16;
    static constexpr uint32_t BYTES = CHUNKS * PITCH;
    // Of the plane of zeros that a tile of so many rows needs.
    static constexpr uint32_t ZERO_BYTES = CHUNKS % 2 != 0 ? 16 * ROWS : 0;

    uint32_t base;

    DEVICE explicit CoreRows(uint32_t base) : base(base) {}

    DEVICE uint32_t address(uint32_t row, uint32_t chunk) const
    {
        return base + chunk * PITCH + row * 16;
    }

    // The rows from `row` on, a multiple of 8.
    DEVICE CoreRows from(uint32_t row) const
    {
        return CoreRows(address(row, 0));
    }

    // As MmaRows wants it.
    DEVICE uint32_t address(uint32_t row, uint32_t inner, uint32_t step, uint32_t odd) const
    {
        return address(row + inner, 2 * step + odd);
    }

    // Operand of wgmma, K-major: m or n are the rows from `row` (a multiple of 8) on, depth the 16 columns of step
    // `step`. `zeros` is the address of the plane of zeros.
    DEVICE uint64_t rows_matrix(int row, int step, uint32_t zeros) const
    {
        const uint32_t at = address(row, 2 * step);
        if (CHUNKS % 2 != 0 && step == STEPS - 1) return ptx::wgmma_matrix(at, zeros - at, 128, Swizzle::none);
        return further(ptx::wgmma_matrix(base, PITCH, 128, Swizzle::none), at - base);
    }

    // Operand of wgmma, transposed: m or n are the columns from `chunk` on, depth the 16 rows from `row` (a multiple of
    // 8) on.
    DEVICE uint64_t columns_matrix(int row, int chunk = 0) const
    {
        return further(ptx::wgmma_matrix(base, 128, PITCH, Swizzle::none), address(row, chunk) - base);
    }

private:
    // wgmma_advance in the lower half alone, where the address is: one instruction.
    DEVICE static uint64_t further(uint64_t matrix, uint32_t bytes)
    {
        return (matrix & 0xffffffff00000000u) | (uint32_t(matrix) + (bytes >> 4));
    }
};
