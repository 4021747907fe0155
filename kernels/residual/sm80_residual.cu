// The residual connection where neither a product's epilogue nor a norm takes it, and the factors of stochastic
// depth:
//   forward    out = x + keep scale branch
//   backward   dbranch = keep scale dout,  dscale = sum over rows of keep dout branch
//   keep       for each residual branch and token: 0 or 1 / (1 - rate), one draw an image
// Memory-bound: four vectors of 16 bytes of every operand under way in each thread.
#include "../common/philox.cuh"
#include "residual.cuh"

struct ResidualForward {
    bf16* out;          // [tokens] rows, all written; may be x
    const bf16* x;
    const bf16* branch;
    const float* scale; // [width]; null is 1
    const float* keep;  // [tokens]; null is 1
    const int* live;    // rows from *live on are not read and are written as zeros; null: all are live
    int64_t out_stride;
    int64_t x_stride;
    int64_t branch_stride;
    int tokens;
    int width;          // a multiple of 8
};

struct ResidualBackward {
    bf16* dbranch;      // [tokens] rows, all written; may be dout
    float* dscale;      // [slices, width], written; null: not wanted
    const bf16* dout;
    const bf16* branch; // read where dscale is wanted
    const float* scale; // [width]; null is 1
    const float* keep;  // [tokens]; null is 1
    const int* live;    // as in the forward pass
    int64_t dbranch_stride;
    int64_t dout_stride;
    int64_t branch_stride;
    int tokens;
    int width;          // a multiple of 8
    int rows;           // of a slice
};

// What the host has made of a rate: an image is left out where the 24 bits of its number are below `threshold`.
struct alignas(8) DropPathRate {
    uint32_t threshold;
    float kept; // factor of the images that stay
};

struct DropPathKeep {
    float* keep;                // [branches, tokens], all written
    const DropPathRate* rates;  // [branches]
    const uint64_t* seed;       // one
    const uint64_t* epochs;     // [images]
    const uint64_t* sample_ids; // [images]
    const int* cu_seqlens;      // [images + 1]
    int tokens;
    int images;
    int first_branch;           // number of branch 0
};

namespace residual {

constexpr int threads = 256;
constexpr int unroll = 4;

// Vectors are counted over all rows: block b has `unroll` times 256 neighbouring ones. There are fewer than 2^31.
DEVICE void forward(const ResidualForward& p)
{
    begin_dependent();
    int live = live_rows(p.live, p.tokens);
    uint32_t vectors_of_row = uint32_t(p.width) / 8;
    uint32_t count = uint32_t(p.tokens) * vectors_of_row;
    Global<const bf16> x(p.x), branch(p.branch);
    Global<bf16> out(p.out);
    Vec16 base[unroll], added[unroll];
    UNROLL
    for (int u = 0; u < unroll; u++) {
        uint32_t i = (blockIdx.x * unroll + uint32_t(u)) * threads + threadIdx.x;
        int row = int(i / vectors_of_row);
        int column = 8 * int(i % vectors_of_row);
        bool valid = i < count && row < live;
        base[u] = valid ? x.load_16(row * p.x_stride + column) : zero_vector();
        added[u] = valid ? branch.load_16(row * p.branch_stride + column) : zero_vector();
    }
    UNROLL
    for (int u = 0; u < unroll; u++) {
        uint32_t i = (blockIdx.x * unroll + uint32_t(u)) * threads + threadIdx.x;
        if (i >= count) break;
        int row = int(i / vectors_of_row);
        int column = 8 * int(i % vectors_of_row);
        Vec16 sum = zero_vector();
        if (row < live) {
            float scale[8];
            load_8(scale, p.scale, column, 1.0f);
            sum = add_branch(base[u], added[u], scale, row_keep(p.keep, row));
        }
        out.store_16(row * p.out_stride + column, sum);
    }
}

constexpr int lanes = 8; // of a row: 64 columns, 128 bytes
constexpr int columns = 8 * lanes;
constexpr int groups = threads / lanes;

// Block = (64 columns, slice of rows); its groups of 8 lanes take every 32nd row, and their sums are added up in
// order. Grid: x columns, y slices. Shared memory: 32 x 64 floats.
DEVICE void backward(const ResidualBackward& p)
{
    begin_dependent();
    int live = live_rows(p.live, p.tokens);
    int lane = int(threadIdx.x) % lanes;
    int group = int(threadIdx.x) / lanes;
    int first_column = int(blockIdx.x) * columns;
    int column = first_column + 8 * lane;
    int begin = int(blockIdx.y) * p.rows;
    int end = p.tokens - begin < p.rows ? p.tokens : begin + p.rows;
    bool wants_branch = p.dscale != nullptr;
    Global<const bf16> dout(p.dout), branch(p.branch);
    Global<bf16> dbranch(p.dbranch);
    float dscale[8] = {};
    if (column < p.width) {
        float scale[8];
        load_8(scale, p.scale, column, 1.0f);
        for (int first = begin + group; first < end; first += groups * unroll) {
            Vec16 grad[unroll], factor[unroll];
            float keep[unroll];
            UNROLL
            for (int u = 0; u < unroll; u++) {
                int row = first + u * groups;
                bool valid = row < end && row < live;
                grad[u] = valid ? dout.load_16(row * p.dout_stride + column) : zero_vector();
                bool reads = valid && wants_branch;
                factor[u] = reads ? branch.load_16(row * p.branch_stride + column) : zero_vector();
                keep[u] = valid ? row_keep(p.keep, row) : 0.0f;
            }
            UNROLL
            for (int u = 0; u < unroll; u++) {
                int row = first + u * groups;
                if (row >= end) break;
                Vec16 of_branch = branch_gradient(dscale, grad[u], factor[u], scale, keep[u]);
                dbranch.store_16(row * p.dbranch_stride + column, row < live ? of_branch : zero_vector());
            }
        }
    }
    if (!wants_branch) return;
    Shared<float> sums(ptx::shared_base());
    UNROLL
    for (int half = 0; half < 2; half++) {
        Vec16 packed;
        UNROLL
        for (int i = 0; i < 4; i++) packed.word[i] = float_to_bits(dscale[4 * half + i]);
        sums.store_16(group * columns + 8 * lane + 4 * half, packed);
    }
    ptx::barrier();
    int own = int(threadIdx.x);
    if (own >= columns || first_column + own >= p.width) return;
    float total = sums.load(own);
    for (int g = 1; g < groups; g++) total += sums.load(g * columns + own);
    Global<float>(p.dscale).store(int64_t(blockIdx.y) * p.width + first_column + own, total);
}

// Block = (image, branch), and one image more for the rows that belong to none. Whatever cu_seqlens says, no row
// beyond the tensor is touched.
DEVICE void drop_path_keep(const DropPathKeep& p)
{
    begin_dependent();
    int image = int(blockIdx.x);
    int branch = int(blockIdx.y);
    Global<const int> cu_seqlens(p.cu_seqlens);
    int begin = cu_seqlens.load(image);
    int end = image < p.images ? cu_seqlens.load(image + 1) : p.tokens;
    float factor = 0.0f;
    if (image < p.images) {
        DropPathRate rate = Global<const DropPathRate>(p.rates).load(branch);
        uint64_t seed = Global<const uint64_t>(p.seed).load(0);
        uint64_t epoch = Global<const uint64_t>(p.epochs).load(image);
        uint64_t sample = Global<const uint64_t>(p.sample_ids).load(image);
        uint32_t purpose = purpose_drop_path + uint32_t(p.first_branch + branch);
        uint32_t number = random_block(seed, epoch, sample, purpose, 0).word[0] >> 8;
        factor = number < rate.threshold ? 0.0f : rate.kept;
    }
    Global<float> keep(p.keep);
    begin = begin < 0 ? 0 : begin;
    end = end < p.tokens ? end : p.tokens;
    for (int row = begin + int(threadIdx.x); row < end; row += int(blockDim.x)) {
        keep.store(int64_t(branch) * p.tokens + row, factor);
    }
}

} // namespace residual
