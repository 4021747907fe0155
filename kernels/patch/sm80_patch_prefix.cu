// Prefix tokens (cls, registers): learned vectors, the same for all images, that stand in the first rows of
// every image, over whatever the embedding left there.
//   forward   x[start_i + r] = tokens[r]                    for every image i and r < min(prefix, length_i)
//   backward  dtokens[r] += sum over i of dx[start_i + r],  then dx[start_i + r] = 0
// Both work in place and touch no other row. The sum over images: a block adds up 128 images, 32 groups of lanes
// four images each, then the groups in order; sum_f32_rows adds the blocks.
#include "../common/packed.cuh"

struct PatchPrefix {
    bf16* x;             // token rows of x_stride elements: written at prefix rows
    const float* tokens; // [prefix, width]
    float* partial;      // [ceil(images / 128), prefix, width], written; or null: no gradient is wanted
    const int* cu_seqlens; // [images + 1]
    int64_t x_stride;
    int rows;            // token rows
    int images;
    int prefix;
    int width;           // a multiple of 8
};

namespace patch {

constexpr int prefix_threads = 256;
constexpr int prefix_lanes = 8; // of a row: 64 columns
constexpr int prefix_groups = prefix_threads / prefix_lanes;
constexpr int prefix_columns = 8 * prefix_lanes;
constexpr int prefix_unroll = 4;
constexpr int prefix_images = prefix_groups * prefix_unroll;

// Row of token r of image i, or -1 where the image is shorter.
DEVICE int prefix_row(const PatchPrefix& p, int image, int r)
{
    int row = image_start(p.cu_seqlens, image, p.rows) + r;
    return row < image_start(p.cu_seqlens, image + 1, p.rows) ? row : -1;
}

// A thread owns eight columns of one row.
DEVICE void prefix_write(const PatchPrefix& p)
{
    begin_dependent();
    int chunks = p.width / 8;
    int64_t i = int64_t(blockIdx.x) * prefix_threads + threadIdx.x;
    if (i >= int64_t(p.images) * p.prefix * chunks) return;
    int column = int(i % chunks) * 8;
    int number = int(i / chunks);
    int row = prefix_row(p, number / p.prefix, number % p.prefix);
    if (row < 0) return;
    float token[8];
    load_8(token, p.tokens + int64_t(number % p.prefix) * p.width, column, 0.0f);
    Global<bf16>(p.x).store_16(row * p.x_stride + column, pack_8(token));
}

// Block = (64 columns, row r of the prefix, 128 images).
DEVICE void prefix_grad(const PatchPrefix& p)
{
    begin_dependent();
    int lane = int(threadIdx.x) % prefix_lanes;
    int group = int(threadIdx.x) / prefix_lanes;
    int first_column = int(blockIdx.x) * prefix_columns;
    int column = first_column + 8 * lane;
    int r = int(blockIdx.y);
    Global<bf16> x(p.x);
    Vec16 packed[prefix_unroll];
    int64_t at[prefix_unroll];
    UNROLL
    for (int u = 0; u < prefix_unroll; u++) {
        int image = int(blockIdx.z) * prefix_images + u * prefix_groups + group;
        int row = image < p.images && column < p.width ? prefix_row(p, image, r) : -1;
        at[u] = row < 0 ? -1 : row * p.x_stride + column;
        packed[u] = row < 0 ? zero_vector() : x.load_16(at[u]);
    }
    float sum[8] = {};
    UNROLL
    for (int u = 0; u < prefix_unroll; u++) {
        float row[8];
        unpack_8(row, packed[u]);
        UNROLL
        for (int i = 0; i < 8; i++) sum[i] += row[i];
        if (at[u] >= 0) x.store_16(at[u], zero_vector());
    }
    if (p.partial == nullptr) return;
    // A column more keeps the groups of a warp in different banks.
    constexpr int pitch = prefix_columns + 1;
    Shared<float> sums(ptx::shared_base());
    UNROLL
    for (int i = 0; i < 8; i++) sums.store(group * pitch + 8 * lane + i, sum[i]);
    ptx::barrier();
    int own = int(threadIdx.x);
    if (own >= prefix_columns || first_column + own >= p.width) return;
    float total = 0.0f;
    for (int g = 0; g < prefix_groups; g++) total += sums.load(g * pitch + own);
    int64_t slice = int64_t(blockIdx.z) * p.prefix + r;
    Global<float>(p.partial).store(slice * p.width + first_column + own, total);
}

} // namespace patch
