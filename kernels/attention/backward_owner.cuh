// The products of the backward pass of attention: what a warp owns takes a step of the other side, and dq^ of a
// step from all keys.
#pragma once

#include "backward_rows.cuh"

namespace attention_backward {

// ds^T of one step in shared memory: a row of 32 queries a key, 4 chunks, turned so that neither the stores of
// mma's results nor ldmatrix meet a bank twice.
DEVICE uint32_t ds_address(uint32_t base, int key, int chunk)
{
    return base + key * (2 * STEP) + (chunk ^ (key / 2 % 4)) * 16;
}

// What a warp owns: 16 M rows of keys (and values), or of queries (and dout).
template <int D, int M, int G, bool QUERIES>
struct Owner {
    static constexpr int CHUNKS = HeadRows<D>::CHUNKS;
    static constexpr int STEPS = HeadRows<D>::STEPS;

    float first[STEPS][M][2][4];  // dk^ or dq^ before the scale
    float second[STEPS][M][2][4]; // dv; queries have none

    DEVICE Owner()
    {
        UNROLL
        for (int i = 0; i < STEPS * M * 8; i++) {
            first[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
            second[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
        }
    }

    // x[g] += own rows times 16 streamed rows, the g-th, transposed.
    DEVICE void product(float (&x)[G][M][2][4], Reader<D> own, Reader<D> stream)
    {
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            uint32_t a[M][4];
            UNROLL
            for (int m = 0; m < M; m++) own.rows_as_a(a[m], 16 * m, step);
            UNROLL
            for (int g = 0; g < G; g++) {
                uint32_t b[2][2];
                stream.rows_as_b(b, 16 * g, step);
                ptx::mma_tiles<Element>(x[g], a, b);
            }
        }
    }

    // sum += a times the streamed rows.
    DEVICE void accumulate(float (&sum)[STEPS][M][2][4], const uint32_t (&a)[G][M][4], Reader<D> stream)
    {
        UNROLL
        for (int g = 0; g < G; g++) {
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                uint32_t b[2][2];
                stream.columns_as_b(b, 16 * g, step);
                if (2 * step + 1 < CHUNKS) {
                    ptx::mma_tiles<Element>(sum[step], a[g], b);
                } else {
                    UNROLL
                    for (int m = 0; m < M; m++) ptx::mma<Element>(sum[step][m][0], a[g][m], b[0]);
                }
            }
        }
    }

    static DEVICE void pack(uint32_t (&a)[G][M][4], const float (&x)[G][M][2][4])
    {
        UNROLL
        for (int i = 0; i < G * M * 4; i++) {
            const float(&four)[4] = x[i / (M * 4)][i / 4 % M][i / 2 % 2];
            a[i / (M * 4)][i / 4 % M][i % 4] = pack_pair(four[i % 2 * 2], four[i % 2 * 2 + 1]);
        }
    }

    // A number of each query, `x`[0] that of the first one of this warp's tile of scores, for each of its scores.
    static DEVICE void spread(float (&to)[G][M][2][4], Shared<float> x, int lane)
    {
        UNROLL
        for (int i = 0; i < G * M * 4; i++) {
            float(&four)[4] = to[i / (M * 4)][i / 4 % M][i / 2 % 2];
            if (QUERIES) {
                four[i % 2 * 2] = four[i % 2 * 2 + 1] = x.load(16 * (i / 4 % M) + 8 * (i % 2) + lane / 4);
            } else if (i % 2 == 0) {
                const int column = 16 * (i / (M * 4)) + 8 * (i / 2 % 2) + 2 * (lane % 4);
                const FloatPair two = Shared<FloatPair>(x.address).load(column / 2);
                four[0] = four[2] = two.first;
                four[1] = four[3] = two.second;
            }
        }
    }

    // Takes the 16 G streamed rows from `streamed` on. `owned` of this warp's rows and `arrived` of the streamed
    // ones exist. `lse` (times -log2 e) and `delta` (negative) begin at the first query of this warp's scores.
    // Keys write ds^T of their rows to chunks `chunk`.. of `ds` if that is not 0. Collective.
    DEVICE void take(Pair<D> own, int row, int owned, Pair<D> stream, int streamed, int arrived, Shared<float> lse,
                     Shared<float> delta, float factor, uint32_t ds, int chunk)
    {
        const int lane = ptx::unknown(ptx::lane_id());
        const Reader<D> first_stream(stream.first, streamed, lane);
        const Reader<D> second_stream(stream.second, streamed, lane);
        float s[G][M][2][4];
        UNROLL
        for (int i = 0; i < G * M * 8; i++) s[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
        product(s, Reader<D>(own.first, row, lane), first_stream);
        float t[G][M][2][4];
        spread(t, lse, lane);
        UNROLL
        for (int i = 0; i < G * M * 8; i++) {
            float& x = s[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4];
            x = ptx::exp2(ptx::fused_multiply_add(x, factor, t[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4]));
        }
        // Keys that do not exist have no part in the sums; queries that do not have an lse of infinity.
        if (QUERIES ? arrived < 16 * G : owned < 16 * M) {
            UNROLL
            for (int i = 0; i < G * M * 8; i++) {
                const int g = i / (M * 8), m = i / 8 % M, h = i / 4 % 2, e = i % 4;
                const int own_row = 16 * m + e / 2 * 8 + lane / 4;
                const int column = 16 * g + 8 * h + lane % 4 * 2 + e % 2;
                if (QUERIES ? column >= arrived : own_row >= owned) s[g][m][h][e] = 0.0f;
            }
        }
        spread(t, delta, lane);
        product(t, Reader<D>(own.second, row, lane), second_stream);
        UNROLL
        for (int i = 0; i < G * M * 8; i++)
            t[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] *= s[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4];
        uint32_t a[G][M][4];
        if (!QUERIES) {
            pack(a, s);
            accumulate(second, a, second_stream);
        }
        pack(a, t);
        if (!QUERIES && ds) {
            UNROLL
            for (int i = 0; i < G * M * 4; i++) {
                const int g = i / (M * 4), m = i / 4 % M, w = i % 4;
                const int key = row + 16 * m + w % 2 * 8 + lane / 4;
                const uint32_t address = ds_address(ds, key, chunk + 2 * g + w / 2);
                Shared<uint32_t>(address).store(lane % 4, a[g][m][w]);
            }
        }
        accumulate(first, a, first_stream);
    }

    // Puts a sum into this warp's own rows, f32.
    static DEVICE void store(const float (&sum)[STEPS][M][2][4], Pair<D> own, int row)
    {
        const int lane = ptx::unknown(ptx::lane_id());
        UNROLL
        for (int i = 0; i < STEPS * M * 4; i++) {
            const int step = i / (M * 4), m = i / 4 % M, h = i / 2 % 2, half = i % 2;
            if (2 * step + h >= CHUNKS) continue;
            const float(&four)[4] = sum[step][m][h];
            const int r = row + 16 * m + 8 * half + lane / 4;
            own.store_f32(r, 2 * step + h, lane, four[2 * half], four[2 * half + 1]);
        }
    }
};

// dq^ (before the scale) of the 32 queries from `row` on from ds^T over `keys` keys (a multiple of 32, above 0),
// to the place of their q^ and dout. A warp takes 16 M queries by 16 columns at a time. Collective of the group.
template <int D, int M>
DEVICE void query_gradient(HeadRows<D> k, int keys, uint32_t ds, Pair<D> q, int row, Group group)
{
    constexpr int STEPS = HeadRows<D>::STEPS;
    const int lane = ptx::unknown(ptx::lane_id());
    const Reader<D> keys_of(k, 0, lane);
    for (int unit = group.warp(); unit < STEPS * (2 / M); unit += group.warps) {
        const int step = unit % STEPS;
        const int tile = unit / STEPS * M;
        // Two sums, so that neighbouring products do not wait for each other.
        float sum[2][M][2][4];
        UNROLL
        for (int i = 0; i < 2 * M * 8; i++) sum[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
        int key = 0;
        do {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int first = key + 16 * half;
                uint32_t a[M][4];
                UNROLL
                for (int m = 0; m < M; m++) {
                    const int chunk = 2 * (tile + m) + lane / 8 % 2;
                    ptx::ldmatrix_x4_trans(a[m], ds_address(ds, first + lane / 16 * 8 + lane % 8, chunk));
                }
                uint32_t b[2][2];
                keys_of.columns_as_b(b, first, step);
                ptx::mma_tiles<Element>(sum[half], a, b);
            }
            key += 32;
        } while (key < keys);
        UNROLL
        for (int i = 0; i < M * 4; i++) {
            const int m = i / 4, h = i / 2 % 2, e = i % 2 * 2;
            if (2 * step + h >= HeadRows<D>::CHUNKS) continue;
            const int r = row + 16 * (tile + m) + 4 * e + lane / 4;
            q.store_f32(r, 2 * step + h, lane, sum[0][m][h][e] + sum[1][m][h][e],
                        sum[0][m][h][e + 1] + sum[1][m][h][e + 1]);
        }
    }
}

} // namespace attention_backward
