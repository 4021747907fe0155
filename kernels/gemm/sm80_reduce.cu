// The gradient of a bias, the column sums of dy [m, n] in bf16: first over the rows of a slice, to a row of the
// workspace [slices, n]; sum_rows then adds up the slices. And the sums of split-K and of the epilogue that
// sums columns.
#include "../common/reduce.cuh"

struct BiasGradParams {
    const bf16* dy;   // [m, n]
    const int* live;  // number of live rows, or null: all; the others are not read
    float* partial;   // [slices, n]
    int64_t ld;       // elements between rows of dy
    int m;
    int n;            // a multiple of 8
    int rows;         // of a slice
};

// A block takes 64 columns, 8 to a lane, of one slice; its groups of 8 lanes take every (4 WARPS)th row.
// Grid: x columns, y slices. Shared memory: WARPS x 64 floats.
template <int WARPS>
DEVICE void bias_grad(const BiasGradParams& p)
{
    begin_dependent();
    uint32_t thread = threadIdx.x;
    int column = int(blockIdx.x) * 64 + int(thread % 8) * 8;
    int live = p.m;
    if (p.live != nullptr) {
        int given = Global<const int>(p.live).load(0);
        live = given < live ? given : live;
    }
    int begin = int(blockIdx.y) * p.rows;
    int end = begin + p.rows < live ? begin + p.rows : live;
    Global<const bf16> dy(p.dy);
    float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    if (column < p.n) {
        for (int row = begin + int(thread / 8); row < end; row += 4 * WARPS) {
            Vec16 x = dy.load_16(row * p.ld + column);
            UNROLL
            for (int j = 0; j < 4; j++) {
                sum[2 * j] += low(x.word[j]);
                sum[2 * j + 1] += high(x.word[j]);
            }
        }
    }
    Shared<float> sums(ptx::shared_base());
    UNROLL
    for (int j = 0; j < 8; j++) {
        sum[j] += ptx::shuffle_xor(sum[j], 8);
        sum[j] += ptx::shuffle_xor(sum[j], 16);
        if (thread % 32 < 8) sums.store(thread / 32 * 64 + thread % 8 * 8 + j, sum[j]);
    }
    ptx::barrier();
    int own = int(blockIdx.x) * 64 + int(thread);
    if (thread >= 64 || own >= p.n) return;
    float total = sums.load(thread);
    UNROLL
    for (int w = 1; w < WARPS; w++) total += sums.load(w * 64 + thread);
    Global<float>(p.partial).store(int64_t(blockIdx.y) * p.n + own, total);
}
