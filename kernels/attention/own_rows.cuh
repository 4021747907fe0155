// Keys and values on their way to shared memory: each thread copies some, and normalises those by itself.
#pragma once

#include "rope.cuh"

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
    DEVICE void copy(Tile tile, const Element* source, int64_t stride, int rows, int valid, int head_dim) const
    {
        const Element* from = Global<const Element>(source).at(row * stride + 8 * j);
        uint32_t to = tile.base;
        for (int r = row; r < rows; r += step) {
            UNROLL
            for (int i = 0; i < N; i++) {
                const bool exists = r < valid && 8 * chunk(i) < head_dim;
                if (chunk(i) < CHUNKS)
                    ptx::cp_async_16(to + place[i], Global<const Element>(from).at(8 * LANES * i), exists);
            }
            from = Global<const Element>(from).at(step * stride);
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
            for (int k = 0; k < R; k++) {
                normalise_row(x[k], affine, statistics[k], j, head_dim);
                UNROLL
                for (int i = 0; i < N; i++) {
                    if (8 * chunk(i) < head_dim) store(x[k][i], tile, r + k * step, i, valid);
                }
                store(statistics[k], r + k * step, valid, mean, rstd, statistics_stride);
            }
        }
    }

    // The same with gains and biases that are loaded where they are needed, for whoever has no registers to keep them.
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
                if (8 * chunk(i) >= head_dim) continue;
                UNROLL
                for (int w = 0; w < 4; w += 2) {
                    float gain[4];
                    float bias[4];
                    load_four(gain, norm.gain, 8 * chunk(i) + 2 * w, 1.0f);
                    load_four(bias, norm.bias, 8 * chunk(i) + 2 * w, 0.0f);
                    UNROLL
                    for (int k = 0; k < R; k++) normalise_four(x[k][i], w, gain, bias, statistics[k]);
                }
                UNROLL
                for (int k = 0; k < R; k++) store(x[k][i], tile, r + k * step, i, valid);
            }
            UNROLL
            for (int k = 0; k < R; k++)
                store(statistics[k], r + k * step, valid, mean, rstd, statistics_stride);
        }
    }

    // Normalises and rotates the first `valid` rows in place; `rope` is that of the first of them. Lanes of a row take
    // others of its columns than they have copied, after each one's own cp_async_wait. Collective; others read the rows
    // behind a barrier.
    DEVICE void rotate(Tile tile, const HeadNorm& norm, const Rope& rope, int valid, float* mean, float* rstd,
                       int statistics_stride) const
    {
        ptx::warp_sync();
        ROLLED
        for (int r = row; r - row % 8 < valid; r += step) {
            RowStatistics statistics[1] = {{0.0f, 1.0f}};
            if (norm.kind != NORM_NONE) {
                Vec16 x[1][N];
                load(x, tile, r, valid);
                rows_statistics<LANES>(statistics, x, j, rope.head_dim, norm);
                store(statistics[0], r, valid, mean, rstd, statistics_stride);
                // All lanes of the row have read what others rotate.
                ptx::warp_sync();
            }
            rotate_in_tile<LANES>(tile, r, r < valid, j, norm, statistics[0], rope.from(r));
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
                x[k][i] = exists ? Shared<Element>(address).load_16(0) : Vec16{};
            }
        }
    }

    // Chunk `i` of its own of row r.
    DEVICE void store(const Vec16& x, Tile tile, int r, int i, int valid) const
    {
        if (r < valid) Shared<Element>(tile.base + (r - row) * Tile::ROW_BYTES + place[i]).store_16(0, x);
    }

    DEVICE void store(const RowStatistics& statistics, int r, int valid, float* mean, float* rstd, int stride) const
    {
        if (r >= valid || !mean || j != 0) return;
        Global<float>(mean).store(int64_t(r) * stride, statistics.mean);
        Global<float>(rstd).store(int64_t(r) * stride, statistics.rstd);
    }
};
