// Keys and values on their way to shared memory: each thread copies some, and normalises those by itself.
#pragma once

#include "common.cuh"

// The part of one thread of `threads` (whole warps) in rows of tiles. Four lanes share a row: fewer shuffles a
// column than with eight. Lane j of them has chunks j, j + 4, ... of every (threads / 4)th row; as that is a
// multiple of 8 rows, all its rows have one twist and its places in a row are constant.
//
// Shared memory serves 8 lanes, two rows, at a time. These are APART rows apart, so that the four chunks of one
// lie in the groups of 4 banks that the four of the other leave.
template <class Tile>
struct OwnRows {
    static constexpr int CHUNKS = Tile::CHUNKS;
    static constexpr int LANES = 4;
    static constexpr int N = ceil_div(CHUNKS, LANES);
    static constexpr int APART = Tile::APART;
    using Affine = LaneAffine<LANES, N>;

    int j;
    int row;  // the first one
    int step; // rows from one to the next
    uint32_t place[N];

    DEVICE OwnRows(int thread, int threads) : j(thread % LANES), row(first(thread / LANES)), step(threads / LANES)
    {
        UNROLL
        for (int i = 0; i < N; i++) place[i] = Tile(0).address(row, i * LANES + j);
    }

    // Bit 0 of `x` changes places with the bit worth APART.
    DEVICE static int first(int x)
    {
        const int differs = (x ^ x / APART) & 1;
        return x ^ (differs | differs * APART);
    }

    DEVICE int chunk(int i) const
    {
        return i * LANES + j;
    }

    // Starts copying `rows` rows (a multiple of 8) of a head from global memory, of which the first `valid`
    // exist; the others, and columns from head_dim on, become zeros. Does not commit.
    DEVICE void copy(Tile tile, const bf16* source, int64_t stride, int rows, int valid, int head_dim) const
    {
        const bf16* from = Global<const bf16>(source).at(row * stride + 8 * j);
        uint32_t to = tile.base;
        for (int r = row; r < rows; r += step) {
            UNROLL
            for (int i = 0; i < N; i++) {
                const bool exists = r < valid && 8 * chunk(i) < head_dim;
                if (chunk(i) < CHUNKS)
                    ptx::cp_async_16(to + place[i], Global<const bf16>(from).at(8 * LANES * i), exists);
            }
            from = Global<const bf16>(from).at(step * stride);
            to += step * Tile::ROW_BYTES;
        }
    }

    // Normalises the first `valid` rows in place, R of its own at a time. The thread touches what it copied and
    // nothing else: its own cp_async_wait is enough. Writes the statistics of row r to mean and
    // rstd[r * statistics_stride] where these are not null. Collective.
    template <int R>
    DEVICE void normalise(Tile tile, const HeadNorm& norm, const Affine& affine, int valid, int head_dim,
                          float* mean, float* rstd, int statistics_stride) const
    {
        // Lanes of a warp leave the loop together: a row beyond the last one takes part in its shuffles.
        for (int r = row; r - row % 8 < valid; r += R * step) {
            Vec16 x[R][N];
            RowStatistics statistics[R];
            load(x, tile, r, valid);
            rows_statistics<LANES>(statistics, x, j, head_dim, norm);
            UNROLL
            for (int k = 0; k < R; k++) normalise_row(x[k], affine, statistics[k], j, head_dim);
            store(x, statistics, tile, r, valid, head_dim, mean, rstd, statistics_stride);
        }
    }

    // The same with gains and biases that are loaded chunk by chunk, for whoever has no registers to keep them.
    template <int R>
    DEVICE void normalise(Tile tile, const HeadNorm& norm, int valid, int head_dim, float* mean, float* rstd,
                          int statistics_stride) const
    {
        ROLLED
        for (int r = row; r - row % 8 < valid; r += R * step) {
            Vec16 x[R][N];
            RowStatistics statistics[R];
            load(x, tile, r, valid);
            rows_statistics<LANES>(statistics, x, j, head_dim, norm);
            UNROLL
            for (int i = 0; i < N; i++) {
                const LaneAffine<LANES, 1> affine(norm, chunk(i), head_dim);
                UNROLL
                for (int k = 0; k < R; k++) {
                    Vec16 part[1] = {x[k][i]};
                    normalise_row(part, affine, statistics[k], chunk(i), head_dim);
                    x[k][i] = part[0];
                }
            }
            store(x, statistics, tile, r, valid, head_dim, mean, rstd, statistics_stride);
        }
    }

private:
    // Row r, and R - 1 of its own that follow.
    template <int R>
    DEVICE void load(Vec16 (&x)[R][N], Tile tile, int r, int valid) const
    {
        UNROLL
        for (int k = 0; k < R; k++) {
            UNROLL
            for (int i = 0; i < N; i++) {
                const uint32_t address = tile.base + (r - row + k * step) * Tile::ROW_BYTES + place[i];
                const bool exists = r + k * step < valid && chunk(i) < CHUNKS;
                x[k][i] = exists ? Shared<bf16>(address).load_16(0) : Vec16{};
            }
        }
    }

    template <int R>
    DEVICE void store(const Vec16 (&x)[R][N], const RowStatistics (&statistics)[R], Tile tile, int r, int valid,
                      int head_dim, float* mean, float* rstd, int statistics_stride) const
    {
        UNROLL
        for (int k = 0; k < R; k++) {
            if (r + k * step >= valid) continue;
            UNROLL
            for (int i = 0; i < N; i++) {
                const uint32_t address = tile.base + (r - row + k * step) * Tile::ROW_BYTES + place[i];
                if (8 * chunk(i) < head_dim) Shared<bf16>(address).store_16(0, x[k][i]);
            }
            if (mean && j == 0) {
                const int64_t to = int64_t(r + k * step) * statistics_stride;
                Global<float>(mean).store(to, statistics[k].mean);
                Global<float>(rstd).store(to, statistics[k].rstd);
            }
        }
    }
};
