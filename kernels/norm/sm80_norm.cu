// LayerNorm and RMSNorm of rows in bf16, alone or after the residual connection before them:
//   x_out = x + keep scale branch                  (where there is a branch; else x_out = x and is not written)
//   y = (x_out - mean) rstd gain + bias            rstd = 1 / sqrt(mean((x_out - mean)^2) + eps); RMSNorm: mean 0
// x_out is rounded to bf16 before it is normalised, so that the fused kernel gives the bits of two kernels.
// Memory-bound: a row lies in the registers of one warp (norm.cuh), or of a block where it is wide, and is read
// once. The variance is summed over x - mean in a second pass over registers: sum x^2 - n mean^2 would cancel.
// Narrow rows go ROWS to a warp, so that enough bytes are under way and a gain is read once for all of them.
#include "norm.cuh"

struct NormForward {
    bf16* y;             // [tokens] rows, all written
    bf16* x_out;         // likewise where there is a branch; may be x
    RowStats* stats;     // [tokens], all written
    const bf16* x;
    const bf16* branch;  // null: no residual connection
    const float* scale;  // [width]; null is 1
    const float* keep;   // [tokens]; null is 1
    const float* gain;   // [width]; null is 1
    const float* bias;   // [width]; null is 0
    const int* live;     // rows from *live on are not read and are written as zeros; null: all are live
    int64_t y_stride;
    int64_t x_out_stride;
    int64_t x_stride;
    int64_t branch_stride;
    int tokens;
    int width;           // a multiple of 8
    int layer_norm;      // 0: RMSNorm
    float eps;
};

namespace norms {

constexpr int forward_warps = 8;

// Shared memory where WARPS > 1: 2 WARPS floats.
template <int CHUNKS, int ROWS, int WARPS>
DEVICE void forward(const NormForward& p)
{
    constexpr int lanes = 32 * WARPS;
    int thread = int(threadIdx.x) % lanes;
    int group = int(threadIdx.x) / lanes;
    int first = (int(blockIdx.x) * (forward_warps / WARPS) + group) * ROWS;
    begin_dependent();
    if (first >= p.tokens) return;
    int live = live_rows(p.live, p.tokens);
    Shared<float> sums(ptx::shared_base());
    Global<const bf16> x(p.x), branch(p.branch);
    Global<bf16> y(p.y), x_out(p.x_out);

    Vec16 packed[ROWS][CHUNKS];
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            int column = 8 * (c * lanes + thread);
            bool valid = column < p.width && first + r < live;
            packed[r][c] = valid ? x.load_16((first + r) * p.x_stride + column) : zero_vector();
        }
    }
    if (p.branch != nullptr) {
        Vec16 added[ROWS][CHUNKS];
        float keep[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            keep[r] = first + r < live ? row_keep(p.keep, first + r) : 0.0f;
            UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                int column = 8 * (c * lanes + thread);
                bool valid = column < p.width && first + r < live;
                added[r][c] = valid ? branch.load_16((first + r) * p.branch_stride + column) : zero_vector();
            }
        }
        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            int column = 8 * (c * lanes + thread);
            if (column >= p.width) continue;
            float scale[8];
            load_8(scale, p.scale, column, 1.0f);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                packed[r][c] = add_branch(packed[r][c], added[r][c], scale, keep[r]);
                if (first + r >= p.tokens) continue;
                Vec16 stored = first + r < live ? packed[r][c] : zero_vector();
                x_out.store_16((first + r) * p.x_out_stride + column, stored);
            }
        }
    }

    float scale_of_mean = 1.0f / float(p.width);
    float mean[ROWS] = {};
    if (p.layer_norm != 0) {
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                float row[8];
                unpack_8(row, packed[r][c]);
                UNROLL
                for (int i = 0; i < 8; i++) mean[r] += row[i];
            }
        }
        sum_over_row<ROWS, WARPS>(mean, sums, 1);
        UNROLL
        for (int r = 0; r < ROWS; r++) mean[r] *= scale_of_mean;
    }
    float rstd[ROWS] = {};
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            // Columns beyond the row hold 0, which is not the mean.
            if (8 * (c * lanes + thread) >= p.width) continue;
            float row[8];
            unpack_8(row, packed[r][c]);
            UNROLL
            for (int i = 0; i < 8; i++) {
                float centred = row[i] - mean[r];
                rstd[r] = ptx::fused_multiply_add(centred, centred, rstd[r]);
            }
        }
    }
    sum_over_row<ROWS, WARPS>(rstd, Shared<float>(sums.address + ROWS * WARPS * sizeof(float)), 1);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        rstd[r] = ptx::rsqrt(ptx::fused_multiply_add(rstd[r], scale_of_mean, p.eps));
        bool is_live = first + r < live;
        if (thread == 0 && first + r < p.tokens) {
            RowStats stats = {is_live ? mean[r] : 0.0f, is_live ? rstd[r] : 0.0f};
            Global<RowStats>(p.stats).store(first + r, stats);
        }
    }

    UNROLL
    for (int c = 0; c < CHUNKS; c++) {
        int column = 8 * (c * lanes + thread);
        if (column >= p.width) continue;
        float gain[8], bias[8];
        load_8(gain, p.gain, column, 1.0f);
        load_8(bias, p.bias, column, 0.0f);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            if (first + r >= p.tokens) continue;
            float row[8];
            unpack_8(row, packed[r][c]);
            UNROLL
            for (int i = 0; i < 8; i++) {
                row[i] = ptx::fused_multiply_add((row[i] - mean[r]) * rstd[r], gain[i], bias[i]);
            }
            Vec16 stored = first + r < live ? pack_8(row) : zero_vector();
            y.store_16((first + r) * p.y_stride + column, stored);
        }
    }
}

} // namespace norms
