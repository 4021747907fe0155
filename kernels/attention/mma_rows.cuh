// Operands of mma from rows of one head in shared memory, read with ldmatrix, whatever the layout of the rows.
#pragma once

#include "../common/view.cuh"

// Base of a tile of rows of D columns. Tile::address(row, inner, step, odd) is the address of chunk 2 `step` +
// `odd` (16 bytes, 8 columns) of row `row` + `inner`, where `row` is a multiple of 8 that is known beforehand.
template <class Tile, int D>
struct MmaRows {
    static constexpr int CHUNKS = D / 8;

    // Operands read with ldmatrix; `row` is a multiple of 8.
    //
    // Operand b of X Tᵀ: n is row `row` + 8 i, depth the columns of step `step`. Collective.
    DEVICE void rows_as_b(uint32_t (&b)[2][2], int row, int step) const
    {
        const uint32_t lane = ptx::lane_id();
        if (2 * step + 1 < CHUNKS) {
            uint32_t r[4];
            ptx::ldmatrix_x4(r, tile().address(row, lane / 16 * 8 + lane % 8, step, lane / 8 % 2));
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
        } else {
            uint32_t r[2];
            ptx::ldmatrix_x2(r, tile().address(row, lane % 16, step, 0));
            b[0][0] = r[0], b[0][1] = 0, b[1][0] = r[1], b[1][1] = 0;
        }
    }

    // Operand b of X T: depth the rows `row` to `row` + 15, n is column 16 `step` + 8 i; b[1] is zero where
    // the step is half. Collective.
    DEVICE void columns_as_b(uint32_t (&b)[2][2], int row, int step) const
    {
        const uint32_t lane = ptx::lane_id();
        if (2 * step + 1 < CHUNKS) {
            uint32_t r[4];
            ptx::ldmatrix_x4_trans(r, tile().address(row, lane % 16, step, lane / 16));
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
        } else {
            uint32_t r[2];
            ptx::ldmatrix_x2_trans(r, tile().address(row, lane % 16, step, 0));
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = 0, b[1][1] = 0;
        }
    }

    // Operand a of T X: rows `row` to `row` + 15, depth the columns of step `step`. Collective.
    DEVICE void rows_as_a(uint32_t (&a)[4], int row, int step) const
    {
        const uint32_t lane = ptx::lane_id();
        if (2 * step + 1 < CHUNKS) {
            ptx::ldmatrix_x4(a, tile().address(row, lane % 16, step, lane / 16));
        } else {
            uint32_t r[2];
            ptx::ldmatrix_x2(r, tile().address(row, lane % 16, step, 0));
            a[0] = r[0], a[1] = r[1], a[2] = 0, a[3] = 0;
        }
    }

private:
    DEVICE const Tile& tile() const
    {
        return static_cast<const Tile&>(*this);
    }
};
