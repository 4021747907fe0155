// What a device can do at most, to hold kernels against: copying through 16-byte accesses, and matrix
// instructions on registers. Data is random, since a GPU that multiplies zeros draws less power and clocks
// higher.
#include "../common/view.cuh"

struct MeasureCopy {
    bf16* out;
    const bf16* x;
    int64_t size; // elements, a multiple of 8
};

struct MeasureMma {
    float* out;         // [threads of the grid]
    const bf16* values; // 48 for each thread of a block, [24][blockDim][2]
    int rounds;
};

namespace measure {

constexpr int mma_rows = 2;    // tiles of a warp along m
constexpr int mma_columns = 8; // and along n: sixteen independent products hide the latency of one

DEVICE void copy(const MeasureCopy& p)
{
    begin_dependent();
    constexpr int unroll = 4;
    Global<bf16> out(p.out);
    Global<const bf16> x(p.x);
    int64_t first = (int64_t(blockIdx.x) * unroll * blockDim.x + threadIdx.x) * 8;
    Vec16 values[unroll];
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int64_t i = first + int64_t(u) * blockDim.x * 8;
        if (i < p.size) values[u] = x.load_16(i);
    }
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int64_t i = first + int64_t(u) * blockDim.x * 8;
        if (i < p.size) out.store_16(i, values[u]);
    }
}

DEVICE void mma(const MeasureMma& p)
{
    begin_dependent();
    Global<const bf16> values(p.values);
    uint32_t a[mma_rows][4];
    uint32_t b[mma_columns][2];
    auto pair = [&](int i) { return values.load_pair(2 * (int64_t(i) * blockDim.x + threadIdx.x)); };
    UNROLL
    for (int i = 0; i < 4 * mma_rows; i++) a[i / 4][i % 4] = pair(i);
    UNROLL
    for (int i = 0; i < 2 * mma_columns; i++) b[i / 2][i % 2] = pair(4 * mma_rows + i);
    float d[mma_rows][mma_columns][4] = {};
    for (int round = 0; round < p.rounds; round++) ptx::mma_tiles(d, a, b);
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < mma_rows * mma_columns * 4; i++) {
        sum += d[i / (4 * mma_columns)][i / 4 % mma_columns][i % 4];
    }
    Global<float>(p.out).store(int64_t(blockIdx.x) * blockDim.x + threadIdx.x, sum);
}

} // namespace measure
