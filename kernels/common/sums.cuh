// Sums in f64 over a block, in a fixed order.
#pragma once

#include "view.cuh"

// Value of lane `lane ^ mask`. Collective.
DEVICE double shuffle_xor(double x, uint32_t mask)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    uint64_t upper = ptx::shuffle_xor(uint32_t(bits >> 32), mask);
    bits = upper << 32 | ptx::shuffle_xor(uint32_t(bits), mask);
    memcpy(&x, &bits, 8);
    return x;
}

// Sum over the warp, in all lanes. Collective.
DEVICE double warp_sum(double x)
{
    UNROLL
    for (uint32_t mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// Sums over the block, right in thread 0. Shared memory: n doubles for each warp. Collective.
template <int n>
DEVICE void block_sums(double (&x)[n])
{
    Shared<double> sums(ptx::shared_base());
    uint32_t warp = threadIdx.x / 32;
    UNROLL
    for (int i = 0; i < n; i++) {
        x[i] = warp_sum(x[i]);
        if (ptx::lane_id() == 0) sums.store(warp * n + i, x[i]);
    }
    ptx::barrier();
    if (threadIdx.x != 0) return;
    for (uint32_t w = 1; w < blockDim.x / 32; w++) {
        UNROLL
        for (int i = 0; i < n; i++) x[i] += sums.load(w * n + i);
    }
}

// Sum of the squares of four numbers for a sum of many in f64: in f32, where 1.8e19 squared is infinite.
DEVICE double squares_of_four(const float (&x)[4])
{
    float sum = x[0] * x[0];
    UNROLL
    for (int i = 1; i < 4; i++) sum = ptx::fused_multiply_add(x[i], x[i], sum);
    return double(sum);
}
