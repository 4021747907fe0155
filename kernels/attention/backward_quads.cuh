// Finished gradients of the backward pass of attention, from results of mma or wgmma in the registers of a warp: a quad
// of lanes has a row. Of chunk c, lane j of it has columns 8 c + 2 j and the next one.
#pragma once

#include "backward_rows.cuh"

namespace attention_backward {

// What a lane has of a chunk: two columns of row lane / 4, then of the row 8 further down.
struct alignas(16) FragmentFour {
    float x[4];
};

DEVICE float unknown(float x)
{
    return bits_to_float(ptx::unknown(int(float_to_bits(x))));
}

// Writes this warp's 16 rows, from `row` on, to `target`, those below `length`: four(c), the sum of chunk c, times
// `factor`, and through the norm of the rows `source` if there is one. Where `summed`, the gradients of gain and bias go
// to `sums`, D each. Collective.
template <int D, class Four>
DEVICE void finish_quads(Four four, int row, int length, float factor, int head_dim, Element* target, int64_t stride,
                         Rows source, const HeadNorm& norm, bool summed, Shared<float> sums)
{
    constexpr int CHUNKS = D / 8;
    constexpr int N = ceil_div(CHUNKS, 4);
    const int lane = ptx::lane_id();
    const int j = lane % 4;
    const bool has_norm = norm.kind != NORM_NONE;
    const float share = ptx::reciprocal(float(head_dim));
    auto gain_of = [&](int c) {
        if (!norm.gain || 8 * c >= head_dim) return FloatPair{1.0f, 1.0f};
        return Global<const FloatPair>(reinterpret_cast<const FloatPair*>(ptx::unknown(norm.gain))).load(4 * c + j);
    };
    // One row after the other, for want of registers.
    ROLLED
    for (int half = 0; half < 2; half++) {
        const int r = row + lane / 4 + 8 * half;
        const bool exists = r < length;
        auto dy_of = [&](int c, float times) {
            const FragmentFour sum = four(c);
            // Rows that do not exist may have any sum.
            const float first = half ? sum.x[2] : sum.x[0];
            const float second = half ? sum.x[3] : sum.x[1];
            return FloatPair{exists ? first * times : 0.0f, exists ? second * times : 0.0f};
        };
        Vec16 x[1][N] = {};
        RowStatistics statistics[1] = {};
        float along = 0.0f;
        float mean = 0.0f;
        auto normal = [&](int c) {
            const uint32_t pair = x[0][c / 4].word[c % 4];
            return FloatPair{(low(pair) - statistics[0].mean) * statistics[0].rstd,
                             (high(pair) - statistics[0].mean) * statistics[0].rstd};
        };
        if (has_norm) {
            UNROLL
            for (int i = 0; i < N; i++) {
                const int column = 8 * (4 * i + j);
                const bool inside = exists && column < head_dim;
                x[0][i] = inside ? Global<const Element>(source.p).load_16(r * source.stride + column) : Vec16{};
            }
            rows_statistics<4>(statistics, x, j, head_dim, norm);
            UNROLL
            for (int i = 0; i < N; i++) transpose_quad(x[0][i]);
            // Without an eps a row that does not exist has no finite rstd.
            if (!exists) statistics[0].rstd = 0.0f;
            UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                const FloatPair dy = dy_of(c, factor);
                const FloatPair n = normal(c);
                const FloatPair gain = gain_of(c);
                const float g[2] = {dy.first * gain.first, dy.second * gain.second};
                mean += g[0] + g[1];
                along = ptx::fused_multiply_add(g[0], n.first, along);
                along = ptx::fused_multiply_add(g[1], n.second, along);
                if (!summed) continue;
                float column[4] = {dy.first * n.first, dy.second * n.second, dy.first, dy.second};
                // Two of the four stay with each half of the lanes, then one.
                UNROLL
                for (int values = 2; values > 0; values /= 2) {
                    const bool upper = lane & 8 * values;
                    UNROLL
                    for (int i = 0; i < values; i++) {
                        const float other = ptx::shuffle_xor(upper ? column[i] : column[i + values], 8 * values);
                        column[i] = (upper ? column[i + values] : column[i]) + other;
                    }
                }
                column[0] += ptx::shuffle_xor(column[0], 4);
                if (lane % 8 < 4) {
                    const int place = lane / 16 * D + 8 * c + 2 * j + lane / 8 % 2;
                    sums.store(place, half ? sums.load(place) + column[0] : column[0]);
                }
            }
            along = sum_of_lanes<4>(along) * share;
            mean = norm.kind == NORM_LAYER ? sum_of_lanes<4>(mean) * share : 0.0f;
            // What was made of them is made again: there are no registers to keep it in.
            UNROLL
            for (int i = 0; i < N * 4; i++) x[0][i / 4].word[i % 4] = ptx::unknown(int(x[0][i / 4].word[i % 4]));
        }
        const float again = unknown(factor);
        const Global<Element> memory(target);
        UNROLL
        for (int i = 0; i < N; i++) {
            Vec16 y{};
            UNROLL
            for (int w = 0; w < 4; w++) {
                const int c = 4 * i + w;
                if (c >= CHUNKS) continue;
                FloatPair dy = dy_of(c, again);
                if (has_norm) {
                    const FloatPair n = normal(c);
                    const FloatPair gain = gain_of(c);
                    const float first = ptx::fused_multiply_add(-n.first, along, dy.first * gain.first);
                    const float second = ptx::fused_multiply_add(-n.second, along, dy.second * gain.second);
                    dy = FloatPair{statistics[0].rstd * (first - mean), statistics[0].rstd * (second - mean)};
                }
                y.word[w] = pack_pair(dy.first, dy.second);
            }
            transpose_quad(y);
            const int column = 8 * (4 * i + j);
            if (exists && column < head_dim) memory.store_16(r * stride + column, y);
        }
    }
}

// Adds what four warps have left in `sums` to rows `affine` and `affine` + 1 of the head in row `row` of the partial sums.
// 128 threads, behind a barrier.
template <int D>
DEVICE void add_sums(const AttentionBackward& p, Shared<float> sums, int row, int head, int affine, int thread)
{
    const Global<float> partial(p.partial);
    const int64_t first = ((int64_t(row) * p.heads + head) * AFFINE + affine) * p.head_dim;
    for (int i = thread; i < 2 * p.head_dim; i += 128) {
        const int at = i < p.head_dim ? i : D + i - p.head_dim;
        float sum = partial.load(first + i);
        UNROLL
        for (int warp = 0; warp < 4; warp++) sum += sums.load(warp * 2 * D + at);
        partial.store(first + i, sum);
    }
}

// Clears two rows of the partial sums.
DEVICE void clear_partial(const AttentionBackward& p, int row)
{
    const Global<float> partial(p.partial);
    const int64_t values = 2 * int64_t(p.heads) * AFFINE * p.head_dim;
    for (int64_t i = threadIdx.x; i < values; i += blockDim.x)
        partial.store(int64_t(row) * p.heads * AFFINE * p.head_dim + i, 0.0f);
}

} // namespace attention_backward
