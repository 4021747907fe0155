// Sums of f32 partial results in a fixed order, into a gradient that is added to or overwritten: the second
// half of every reduction that spans blocks.
#pragma once

#include "sums.cuh"

// Whether a gradient is added to: the flag lies in memory, so that a replayed graph sees it change.
DEVICE bool accumulates(const int* flag)
{
    return flag != nullptr && Global<const int>(flag).load(0) != 0;
}

// out[r, c] = (out[r, c] if *accumulate) + sum over s of slices[s, r, c]
struct SumSlicesParams {
    const float* slices;    // [count, rows, cols]
    float* out;             // [rows, cols], rows ld_out apart
    double* squares;        // [blocks], sums of the squares of what each has written; or null
    const int* accumulate;  // or null: overwrite
    int64_t ld_out;         // a multiple of 4
    int count;
    int rows;
    int cols;               // a multiple of 4
};

// Few slices of a large matrix of fewer than 2^34 elements: four columns to a thread. Shared memory: a double for
// each warp.
DEVICE void sum_slices(const SumSlicesParams& p)
{
    begin_dependent();
    uint32_t fours = uint32_t(p.cols) / 4;
    uint32_t four = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t row = four / fours;
    int64_t size = int64_t(p.rows) * p.cols;
    int64_t i = int64_t(four) * 4;
    Global<const float> slices(p.slices);
    Global<float> out(p.out);
    int64_t target = row * p.ld_out + (four - row * fours) * 4;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    auto add = [&](const Vec16& x) {
        UNROLL
        for (int j = 0; j < 4; j++) sum[j] += bits_to_float(x.word[j]);
    };
    if (row < uint32_t(p.rows)) {
        if (accumulates(p.accumulate)) add(out.load_16(target));
        for (int s = 0; s < p.count; s++) add(slices.load_16(s * size + i));
        out.store_16(target, Vec16{{float_to_bits(sum[0]), float_to_bits(sum[1]), float_to_bits(sum[2]),
                                    float_to_bits(sum[3])}});
    }
    if (p.squares == nullptr) return;
    double squares[1] = {squares_of_four(sum)};
    block_sums(squares);
    if (threadIdx.x == 0) Global<double>(p.squares).store(blockIdx.x, squares[0]);
}

// out[c] = (out[c] if *accumulate) + sum over r of rows[r, c]
struct SumRowsParams {
    const float* rows;      // [count, cols]
    float* out;             // [cols]
    const int* accumulate;  // or null: overwrite
    int count;
    int cols;
};

// Many rows, few columns: a block takes 32 columns, its warps every WARPSth row. Shared memory: WARPS x 32
// floats.
template <int WARPS>
DEVICE void sum_rows(const SumRowsParams& p)
{
    begin_dependent();
    uint32_t lane = ptx::lane_id();
    uint32_t warp = threadIdx.x / 32;
    int column = int(blockIdx.x) * 32 + int(lane);
    Global<const float> rows(p.rows);
    float sum = 0.0f;
    if (column < p.cols) {
        for (int r = int(warp); r < p.count; r += WARPS) sum += rows.load(int64_t(r) * p.cols + column);
    }
    Shared<float> sums(ptx::shared_base());
    sums.store(threadIdx.x, sum);
    ptx::barrier();
    if (warp != 0 || column >= p.cols) return;
    UNROLL
    for (int w = 1; w < WARPS; w++) sum += sums.load(w * 32 + lane);
    Global<float> out(p.out);
    out.store(column, accumulates(p.accumulate) ? out.load(column) + sum : sum);
}
