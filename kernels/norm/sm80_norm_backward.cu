// Backward pass of LayerNorm and RMSNorm, alone or with the residual connection before them. With
// n = (x - mean) rstd and g = dy gain:
//   dx = rstd (g - mean(g) - n mean(g n)) + dresidual          RMSNorm: without mean(g)
//   dgain = sum over rows of dy n                dbias = sum over rows of dy
//   dbranch = keep scale dx                      dscale = sum over rows of keep dx branch
// where x is what was normalised (x_out of the fused forward pass), dresidual its gradient from everything else
// that reads it, and dx its whole gradient, rounded to bf16 before dbranch and dscale are made of it.
// Memory-bound: a block has GROUPS groups of WARPS warps (norm.cuh), each with ROWS rows under way; a thread keeps
// its columns from row to row, so that sums over rows lie in registers. Every block of a persistent grid leaves one
// row of partial sums, which norm_sums_f32 adds up in order.
#include "norm.cuh"
#include "../common/reduce.cuh"

struct NormBackward {
    bf16* dx;               // [tokens] rows, all written; may be dy or dresidual
    bf16* dbranch;          // likewise; null: no branch
    float* dgain;           // [blocks, width], written; null: not wanted
    float* dbias;           // likewise
    float* dscale;          // likewise
    const bf16* dy;
    const bf16* dresidual;  // null is 0
    const bf16* x;
    const bf16* branch;     // read where dscale is wanted
    const RowStats* stats;  // [tokens], of the forward pass
    const float* gain;      // [width]; null is 1
    const float* scale;     // [width]; null is 1
    const float* keep;      // [tokens]; null is 1
    const int* live;        // rows from *live on are not read and are written as zeros; null: all are live
    int64_t dx_stride;
    int64_t dbranch_stride;
    int64_t dy_stride;
    int64_t dresidual_stride;
    int64_t x_stride;
    int64_t branch_stride;
    int tokens;
    int width;              // a multiple of 8
    int layer_norm;         // 0: RMSNorm
};

// The sums of the partials: out[i] [width], null where not wanted.
struct NormSums {
    const float* partial[3]; // [count, width]
    float* out[3];
    const int* accumulate;   // or null: overwrite
    int count;
    int width;
};

namespace norms {

// Adds up the groups of a block in order and writes the block's row of partial sums. Shared memory: GROUPS rows
// from `staging`. Collective for the block.
template <int WARPS, int GROUPS, int CHUNKS>
DEVICE void store_partial(float* partial, const float (&sum)[CHUNKS][8], Shared<float> staging, int width)
{
    constexpr int lanes = 32 * WARPS;
    constexpr int columns = 8 * lanes * CHUNKS;
    if (partial == nullptr) return;
    int thread = int(threadIdx.x) % lanes;
    int group = int(threadIdx.x) / lanes;
    Global<float> out(partial);
    int64_t row = int64_t(blockIdx.x) * width;
    ptx::barrier();
    UNROLL
    for (int c = 0; c < CHUNKS; c++) {
        int column = 8 * (c * lanes + thread);
        UNROLL
        for (int half = 0; half < 2; half++) {
            Vec16 packed;
            UNROLL
            for (int i = 0; i < 4; i++) packed.word[i] = float_to_bits(sum[c][4 * half + i]);
            if (GROUPS > 1) {
                staging.store_16(group * columns + column + 4 * half, packed);
            } else if (column < width) {
                out.store_16(row + column + 4 * half, packed);
            }
        }
    }
    if (GROUPS == 1) return;
    ptx::barrier();
    for (int column = int(threadIdx.x); column < width; column += lanes * GROUPS) {
        float total = staging.load(column);
        UNROLL
        for (int g = 1; g < GROUPS; g++) total += staging.load(g * columns + column);
        out.store(row + column, total);
    }
}

// Shared memory: for each group 4 ROWS WARPS floats, then GROUPS rows of 256 WARPS CHUNKS where GROUPS > 1.
template <int WARPS, int GROUPS, int CHUNKS, int ROWS>
DEVICE void backward(const NormBackward& p)
{
    constexpr int lanes = 32 * WARPS;
    constexpr int sums_of_group = 4 * ROWS * WARPS;
    int thread = int(threadIdx.x) % lanes;
    int group = int(threadIdx.x) / lanes;
    begin_dependent();
    int live = live_rows(p.live, p.tokens);
    bool wants_branch = p.dscale != nullptr;
    Shared<float> shared(ptx::shared_base());
    Global<const bf16> dy(p.dy), dresidual(p.dresidual), x(p.x), branch(p.branch);
    Global<bf16> dx(p.dx), dbranch(p.dbranch);
    Global<const RowStats> stats(p.stats);
    float scale_of_mean = 1.0f / float(p.width);

    float dgain[CHUNKS][8] = {}, dbias[CHUNKS][8] = {}, dscale[CHUNKS][8] = {};
    // Sums over a row alternate between two places, so that one barrier a turn is enough: who writes a place for
    // the second time has met everybody who read it at the barrier between.
    uint32_t place = ptx::shared_base() + uint32_t(group * sums_of_group) * sizeof(float);
    uint32_t other = place + sums_of_group / 2 * uint32_t(sizeof(float));
    int step = int(gridDim.x) * GROUPS * ROWS;
    for (int first = (int(blockIdx.x) * GROUPS + group) * ROWS; first < p.tokens; first += step) {
        Vec16 packed_dy[ROWS][CHUNKS], packed_x[ROWS][CHUNKS], added[ROWS][CHUNKS], factor[ROWS][CHUNKS];
        RowStats row_stats[ROWS];
        float keep[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            int row = first + r;
            bool is_live = row < live;
            row_stats[r] = is_live ? stats.load(row) : RowStats{0.0f, 0.0f};
            keep[r] = is_live ? row_keep(p.keep, row) : 0.0f;
            UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                int column = 8 * (c * lanes + thread);
                bool valid = is_live && column < p.width;
                packed_dy[r][c] = valid ? dy.load_16(row * p.dy_stride + column) : zero_vector();
                packed_x[r][c] = valid ? x.load_16(row * p.x_stride + column) : zero_vector();
                bool adds = valid && p.dresidual != nullptr;
                added[r][c] = adds ? dresidual.load_16(row * p.dresidual_stride + column) : zero_vector();
                bool scales = valid && wants_branch;
                factor[r][c] = scales ? branch.load_16(row * p.branch_stride + column) : zero_vector();
            }
        }

        // Sums of g and of g n, row by row; columns beyond the width hold 0.
        float sums[2 * ROWS] = {};
        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            int column = 8 * (c * lanes + thread);
            float gain[8];
            load_8(gain, column < p.width ? p.gain : nullptr, column, 1.0f);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                float grad[8], row[8];
                unpack_8(grad, packed_dy[r][c]);
                unpack_8(row, packed_x[r][c]);
                UNROLL
                for (int i = 0; i < 8; i++) {
                    float normalised = (row[i] - row_stats[r].mean) * row_stats[r].rstd;
                    float g = grad[i] * gain[i];
                    dgain[c][i] = ptx::fused_multiply_add(grad[i], normalised, dgain[c][i]);
                    dbias[c][i] += grad[i];
                    sums[2 * r] += g;
                    sums[2 * r + 1] = ptx::fused_multiply_add(g, normalised, sums[2 * r + 1]);
                }
            }
        }
        sum_over_row<2 * ROWS, WARPS>(sums, Shared<float>(place), uint32_t(group) + 1);
        uint32_t last = place;
        place = other;
        other = last;

        UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            int column = 8 * (c * lanes + thread);
            if (column >= p.width) continue;
            // The gain is read again, from the L1 cache: kept over the barrier it would cost eight registers.
            float gain[8];
            load_8(gain, p.gain, column, 1.0f);
            Vec16 whole[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                int row_index = first + r;
                float mean_g = p.layer_norm != 0 ? sums[2 * r] * scale_of_mean : 0.0f;
                float mean_gn = sums[2 * r + 1] * scale_of_mean;
                float grad[8], row[8], sum[8];
                unpack_8(grad, still_packed(packed_dy[r][c]));
                unpack_8(row, still_packed(packed_x[r][c]));
                unpack_8(sum, added[r][c]);
                UNROLL
                for (int i = 0; i < 8; i++) {
                    float normalised = (row[i] - row_stats[r].mean) * row_stats[r].rstd;
                    float centred = grad[i] * gain[i] - mean_g - normalised * mean_gn;
                    sum[i] = ptx::fused_multiply_add(row_stats[r].rstd, centred, sum[i]);
                }
                // A dead row has a statistic of 0, so its gradient is 0.
                whole[r] = pack_8(sum);
                if (row_index >= p.tokens) continue;
                dx.store_16(row_index * p.dx_stride + column, row_index < live ? whole[r] : zero_vector());
            }
            if (p.dbranch == nullptr) continue;
            float scale[8];
            load_8(scale, p.scale, column, 1.0f);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                int row_index = first + r;
                Vec16 of_branch = branch_gradient(dscale[c], whole[r], factor[r][c], scale, keep[r]);
                if (row_index >= p.tokens) continue;
                Vec16 stored = row_index < live ? of_branch : zero_vector();
                dbranch.store_16(row_index * p.dbranch_stride + column, stored);
            }
        }
    }

    Shared<float> staging(shared.address + uint32_t(GROUPS * sums_of_group * sizeof(float)));
    store_partial<WARPS, GROUPS>(p.dgain, dgain, staging, p.width);
    store_partial<WARPS, GROUPS>(p.dbias, dbias, staging, p.width);
    store_partial<WARPS, GROUPS>(p.dscale, dscale, staging, p.width);
}

// Grid: x 32 columns, y which of the sums. Shared memory: WARPS x 32 floats.
template <int WARPS>
DEVICE void sums(const NormSums& p)
{
    begin_dependent();
    int which = int(blockIdx.y);
    float* out = which == 0 ? p.out[0] : which == 1 ? p.out[1] : p.out[2];
    if (out == nullptr) return;
    const float* partial = which == 0 ? p.partial[0] : which == 1 ? p.partial[1] : p.partial[2];
    sum_rows<WARPS>(SumRowsParams{partial, out, p.accumulate, p.count, p.width});
}

} // namespace norms
