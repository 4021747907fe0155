// What forward and backward pass of the norms share. A row of up to 256 CHUNKS WARPS columns belongs to WARPS
// warps: chunk c of their thread t is the eight columns from 8 (32 WARPS c + t), so that a warp reads 512
// neighbouring bytes at a time. Every sum has one order, whichever row or block it is.
#pragma once

#include "../residual/residual.cuh"

// Mean and reciprocal standard deviation of a row; the mean of RMSNorm is 0.
struct alignas(8) RowStats {
    float mean;
    float rstd;
};

namespace norms {

// x, packed as it is: what was unpacked of it before is unpacked anew and does not stay in registers meanwhile.
DEVICE Vec16 still_packed(const Vec16& x)
{
    Vec16 same;
    UNROLL
    for (int i = 0; i < 4; i++) same.word[i] = uint32_t(ptx::unknown(int(x.word[i])));
    return same;
}

// Sums N values over the lanes of a warp in N + 4 - log2 N shuffles rather than 5 N: while there are several, each
// step folds half of them onto the lanes that keep the others. Value i ends up in the lanes from 32 i / N.
template <int N>
DEVICE float spread_sums(float (&x)[N])
{
    uint32_t lane = ptx::lane_id();
    UNROLL
    for (int count = N, offset = 16; offset > 0; offset /= 2) {
        if (count > 1) {
            count /= 2;
            bool upper = (lane & uint32_t(offset)) != 0;
            UNROLL
            for (int i = 0; i < N / 2; i++) {
                if (i >= count) continue;
                float kept = upper ? x[i + count] : x[i];
                float given = upper ? x[i] : x[i + count];
                x[i] = kept + ptx::shuffle_xor(given, uint32_t(offset));
            }
        } else {
            x[0] += ptx::shuffle_xor(x[0], uint32_t(offset));
        }
    }
    return x[0];
}

// x[i] becomes its sum over the threads of a row, the warps in order. Shared memory: N x WARPS floats from `sums`
// where there are several warps, not read by anybody since a barrier. Collective for the warps of the row, which
// meet at barrier `id`.
template <int N, int WARPS>
DEVICE void sum_over_row(float (&x)[N], Shared<float> sums, uint32_t id)
{
    constexpr uint32_t lanes = 32 / N;
    uint32_t lane = ptx::lane_id();
    float own = spread_sums(x);
    if (WARPS == 1) {
        UNROLL
        for (int i = 0; i < N; i++) x[i] = N == 1 ? own : ptx::shuffle(own, i * lanes);
        return;
    }
    if (lane % lanes == 0) sums.store(lane / lanes * WARPS + threadIdx.x / 32 % WARPS, own);
    ptx::barrier(id, 32 * WARPS);
    UNROLL
    for (int i = 0; i < N; i++) {
        x[i] = sums.load(i * WARPS);
        UNROLL
        for (int w = 1; w < WARPS; w++) x[i] += sums.load(i * WARPS + w);
    }
}

} // namespace norms
