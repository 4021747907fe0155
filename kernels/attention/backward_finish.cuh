// Finished gradients of the backward pass of attention on their way to global memory: dv from registers, dq and
// dk from f32 rows in shared memory, through the rotation and the norm.
#pragma once

#include "backward_rows.cuh"

namespace attention_backward {

// Gradients of a gain and a bias, this lane's columns: chunks j, j + LANES, ...
template <int D, int M>
struct ColumnSums {
    static constexpr int LANES = HeadRows<D>::LANES;
    static constexpr int N = HeadRows<D>::LANE_CHUNKS;
    // Lanes of a warp that have the same columns.
    static constexpr int SHARES = 32 / LANES;

    float gain[N][8];
    float bias[N][8];

    DEVICE ColumnSums()
    {
        UNROLL
        for (int i = 0; i < N * 8; i++) gain[i / 8][i % 8] = bias[i / 8][i % 8] = 0.0f;
    }

    // Sums of gains lie in the first tile, sums of biases in the second, from the rows of their warp on: D to a
    // share.
    static DEVICE Shared<float> place(Pair<D> tile, int row, bool of_bias)
    {
        return Shared<float>((of_bias ? tile.second : tile.first).base + row * HeadRows<D>::ROW_BYTES);
    }

    // Puts them into this warp's rows, from row `row` on, which have been used up. Collective.
    DEVICE void store(Pair<D> tile, int row) const
    {
        static_assert(SHARES * D * 4 <= 16 * M * HeadRows<D>::ROW_BYTES, "the rows of a warp hold its sums");
        const int lane = ptx::unknown(ptx::lane_id());
        ptx::warp_sync();
        UNROLL
        for (int i = 0; i < N; i++) {
            const int column = 8 * (i * LANES + lane % LANES);
            if (column >= D) continue;
            UNROLL
            for (int c = 0; c < 8; c++) {
                place(tile, row, false).store(lane / LANES * D + column + c, gain[i][c]);
                place(tile, row, true).store(lane / LANES * D + column + c, bias[i][c]);
            }
        }
    }

    // Adds what the warps of the first `rows` rows have stored to rows `affine` and `affine` + 1 of the head in
    // the block's partial sums.
    static DEVICE void add(const AttentionBackward& p, Pair<D> tile, int rows, int head, int affine, Group group)
    {
        const Global<float> partial(p.partial);
        const int64_t first = ((int64_t(blockIdx.x) * p.heads + head) * AFFINE + affine) * p.head_dim;
        for (int i = group.thread(); i < 2 * p.head_dim; i += group.threads()) {
            const bool of_bias = i >= p.head_dim;
            const int column = of_bias ? i - p.head_dim : i;
            float sum = partial.load(first + i);
            for (int row = 0; row < rows; row += 16 * M) {
                const Shared<float> sums = place(tile, row, of_bias);
                UNROLL
                for (int share = 0; share < SHARES; share++) sum += sums.load(share * D + column);
            }
            partial.store(first + i, sum);
        }
    }
};

// Rotates 16 M gradient rows from row `row` on, f32 in shared memory, back, those below `length`: each lane columns of the
// first half of a head and those as far in the second. One warp. Collective.
template <int D, int M>
DEVICE void rotate_rows_back(Pair<D> tile, int row, int length, const Rope& rope)
{
    constexpr int LANES = HeadRows<D>::LANES;
    const int lane = ptx::unknown(ptx::lane_id());
    const int half = rope.head_dim / 2;
    // Lanes stay together.
    ROLLED
    for (int r = row + lane / LANES; r - lane / LANES < row + 16 * M; r += 32 / LANES) {
        ROLLED
        for (int first = 0; first < half; first += 2 * LANES) {
            const int column = first + 2 * (lane % LANES);
            if (r >= length || column >= half) continue;
            const Shared<FloatPair> lower(tile.f32_address(r, column / 4) + column % 4 * 4);
            const Shared<FloatPair> upper(tile.f32_address(r, (column + half) / 4) + column % 4 * 4);
            FloatPair x = lower.load(0);
            FloatPair y = upper.load(0);
            rotate(x, y, column, rope.from(r), true);
            lower.store(0, x);
            upper.store(0, y);
        }
    }
    ptx::warp_sync();
}

// Writes 16 M gradient rows from row `row` on, f32 in shared memory, to `target`, those below `length`: times
// `factor`, and through the norm of the rows `source` if there is one. One warp. Collective.
template <int D, int M, bool NORM>
DEVICE void finish_rows(Pair<D> tile, int row, int length, float factor, int head_dim, Element* target,
                        int64_t target_stride, Rows source, const HeadNorm& norm, ColumnSums<D, M>& sums)
{
    constexpr int LANES = HeadRows<D>::LANES;
    constexpr int N = HeadRows<D>::LANE_CHUNKS;
    constexpr int R = rows_at_once<D>();
    constexpr int APART = 32 / LANES;
    constexpr int BATCHES = 16 * M / (R * APART);
    const int lane = ptx::unknown(ptx::lane_id());
    const int j = lane % LANES;
    const int first = row + lane / LANES;
    const Global<Element> memory(target);

    // All that comes from global memory is asked for at once.
    Vec16 x[BATCHES][R][N];
    float gain[N][8];
    if (NORM) {
        UNROLL
        for (int i = 0; i < BATCHES * R * N; i++) {
            const int r = first + i / N * APART;
            const int column = 8 * (i % N * LANES + j);
            const bool inside = r < length && column < head_dim;
            x[i / (R * N)][i / N % R][i % N] =
                inside ? Global<const Element>(source.p).load_16(r * source.stride + column) : Vec16{};
        }
        LaneAffine<LANES, N>::load(gain, norm.gain, 1.0f, j, head_dim);
    }
    UNROLL
    for (int batch = 0; batch < BATCHES; batch++) {
        float dy[R][N][8];
        UNROLL
        for (int i = 0; i < R * N * 2; i++) {
            const int r = first + (batch * R + i / (2 * N)) * APART;
            const int chunk = i / 2 % N * LANES + j;
            const bool inside = r < length && 8 * chunk < head_dim;
            // Read in any case, without a branch.
            const Vec16 four = Shared<float>(tile.f32_address(r, (inside ? 2 * chunk : 0) + i % 2)).load_16(0);
            const float times = inside ? factor : 0.0f;
            UNROLL
            for (int c = 0; c < 4; c++)
                dy[i / (2 * N)][i / 2 % N][i % 2 * 4 + c] = bits_to_float(four.word[c]) * times;
        }
        if (NORM) {
            RowStatistics statistics[R];
            rows_statistics<LANES>(statistics, x[batch], j, head_dim, norm);
            // Column `c` of chunk `i` of row `r`, normalised.
            auto normal = [&](int r, int i, int c) {
                const uint32_t pair = x[batch][r][i].word[c / 2];
                return ((c % 2 ? high(pair) : low(pair)) - statistics[r].mean) * statistics[r].rstd;
            };
            float sum[R];
            float along[R];
            UNROLL
            for (int r = 0; r < R; r++) {
                // Without an eps a row that does not exist has no finite rstd.
                if (first + (batch * R + r) * APART >= length) statistics[r].rstd = 0.0f;
                sum[r] = along[r] = 0.0f;
                UNROLL
                for (int i = 0; i < N * 8; i++) {
                    const float n = normal(r, i / 8, i % 8);
                    float& g = dy[r][i / 8][i % 8];
                    sums.gain[i / 8][i % 8] = ptx::fused_multiply_add(g, n, sums.gain[i / 8][i % 8]);
                    sums.bias[i / 8][i % 8] += g;
                    g *= gain[i / 8][i % 8];
                    sum[r] += g;
                    along[r] = ptx::fused_multiply_add(g, n, along[r]);
                }
            }
            const float share = ptx::reciprocal(float(head_dim));
            sums_of_lanes<LANES>(along);
            if (norm.kind == NORM_LAYER) {
                sums_of_lanes<LANES>(sum);
            } else {
                UNROLL
                for (int r = 0; r < R; r++) sum[r] = 0.0f;
            }
            UNROLL
            for (int r = 0; r < R; r++) {
                UNROLL
                for (int i = 0; i < N * 8; i++) {
                    float& g = dy[r][i / 8][i % 8];
                    const float rest = ptx::fused_multiply_add(-normal(r, i / 8, i % 8), along[r] * share, g);
                    g = statistics[r].rstd * (rest - sum[r] * share);
                }
            }
        }
        UNROLL
        for (int i = 0; i < R * N; i++) {
            const int r = first + (batch * R + i / N) * APART;
            const int column = 8 * (i % N * LANES + j);
            const float(&g)[8] = dy[i / N][i % N];
            Vec16 packed;
            UNROLL
            for (int w = 0; w < 4; w++) packed.word[w] = pack_pair(g[2 * w], g[2 * w + 1]);
            if (r < length && column < head_dim) memory.store_16(r * target_stride + column, packed);
        }
    }
}

// Writes 16 M rows of a result of mma, the sums of dv, from row `row` on, those below `length`. One warp.
// Collective.
template <int D, int M>
DEVICE void write_rows(const float (&sum)[HeadRows<D>::STEPS][M][2][4], int row, int length, int head_dim,
                       Element* target, int64_t stride)
{
    constexpr int CHUNKS = HeadRows<D>::CHUNKS;
    const Global<Element> memory(target);
    const int lane = ptx::unknown(ptx::lane_id());
    UNROLL
    for (int i = 0; i < 2 * M * ceil_div(CHUNKS, 4); i++) {
        const int m = i % (2 * M) / 2, half = i % 2, first = i / (2 * M) * 4;
        Vec16 x{};
        UNROLL
        for (int c = first; c < first + 4 && c < CHUNKS; c++)
            x.word[c - first] = pack_pair(sum[c / 2][m][c % 2][2 * half], sum[c / 2][m][c % 2][2 * half + 1]);
        transpose_quad(x);
        const int r = row + 16 * m + 8 * half + lane / 4;
        const int column = 8 * (first + lane % 4);
        if (r < length && column < head_dim) memory.store_16(r * stride + column, x);
    }
}

} // namespace attention_backward
