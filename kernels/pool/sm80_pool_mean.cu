// Mean pooling per image over packed rows:
//   forward   out[i] = 1/n_i sum_t x[t], t over the image's tokens after the first `skip`; 0 where none remain
//   backward  dx[t] = dout[i] / n_i, and 0 at prefix tokens and at rows that belong to no image
// Memory-bound: a block owns one piece of an image (chunks.cuh) and 64 columns. Eight lanes read 128
// neighbouring bytes of a row, so a block of 256 threads has 32 rows under way, times the unrolling. Sums
// are f32: first each thread over its rows, then the 32 row groups in order, then the pieces in order.
#include "chunks.cuh"

struct PoolMeanForward {
    bf16* out;             // [images, width]
    float* partial;        // [tokens / chunk + images, width], sums of pieces
    const bf16* x;         // rows of x_stride elements
    const int* cu_seqlens; // [images + 1]
    int* error;            // set where cu_seqlens is bad; may be null
    int64_t x_stride;
    int tokens;
    int images;
    int width; // multiple of 8
    int skip;
};

struct PoolMeanBackward {
    bf16* dx;         // rows of dx_stride elements
    const bf16* dout; // [images, width]
    const int* cu_seqlens;
    int* error;
    int64_t dx_stride;
    int tokens;
    int images;
    int width;
    int skip;
};

namespace pool {

constexpr int mean_threads = 256;
constexpr int mean_lanes = 8; // of a row: 64 columns
constexpr int mean_groups = mean_threads / mean_lanes;
constexpr int mean_columns = 8 * mean_lanes;

// Block = (piece, 64 columns), columns fastest, so that blocks that run together read whole rows. An image
// of one piece is finished here.
DEVICE void mean_forward(const PoolMeanForward& p)
{
    constexpr int unroll = 4;
    begin_dependent();
    check_cu_seqlens(p.cu_seqlens, p.error, p.images, p.tokens);
    int slabs = ceil_div(p.width, mean_columns);
    int number = int(blockIdx.x) / slabs;
    Piece piece = find_piece(Global<const int>(p.cu_seqlens), number, p.images, p.tokens, p.skip);
    if (piece.rows == 0 || piece.image == p.images) return;

    int lane = int(threadIdx.x) % mean_lanes;
    int group = int(threadIdx.x) / mean_lanes;
    int first_column = int(blockIdx.x) % slabs * mean_columns;
    int column = first_column + 8 * lane;
    bool active = column < p.width;
    Global<const bf16> x(p.x);
    float sum[8] = {};
    for (int base = group; base < piece.rows; base += mean_groups * unroll) {
        Vec16 packed[unroll];
        UNROLL
        for (int u = 0; u < unroll; u++) {
            int row = base + u * mean_groups;
            bool valid = active && row < piece.rows;
            packed[u] = valid ? x.load_16((piece.first_row + row) * p.x_stride + column) : zero_vector();
        }
        UNROLL
        for (int u = 0; u < unroll; u++) {
            float row[8];
            unpack_8(row, packed[u]);
            UNROLL
            for (int i = 0; i < 8; i++) sum[i] += row[i];
        }
    }
    // A column more keeps the groups of a warp in different banks.
    constexpr int pitch = mean_columns + 1;
    Shared<float> sums(ptx::shared_base());
    UNROLL
    for (int i = 0; i < 8; i++) sums.store(group * pitch + 8 * lane + i, sum[i]);
    ptx::barrier();
    int own = int(threadIdx.x);
    if (own >= mean_columns || first_column + own >= p.width) return;
    float total = 0.0f;
    for (int g = 0; g < mean_groups; g++) total += sums.load(g * pitch + own);
    if (piece.count == 1) {
        int64_t at = int64_t(piece.image) * p.width + first_column + own;
        Global<bf16>(p.out).store(at, to_bf16(total / float(piece.pooled)));
    } else {
        Global<float>(p.partial).store(int64_t(number) * p.width + first_column + own, total);
    }
}

// Block = image: the images of no piece and of several.
DEVICE void mean_combine(const PoolMeanForward& p)
{
    begin_dependent();
    Global<const int> cu_seqlens(p.cu_seqlens);
    int image = int(blockIdx.x);
    Piece piece = image_at(cu_seqlens, image, p.images, p.tokens, p.skip);
    if (piece.count == 1) return;
    int first = first_piece(cu_seqlens, image, p.tokens);
    Global<const float> partial(p.partial);
    for (int column = int(threadIdx.x); column < p.width; column += int(blockDim.x)) {
        float total = 0.0f;
        for (int c = 0; c < piece.count; c++) total += partial.load(int64_t(first + c) * p.width + column);
        float mean = piece.count == 0 ? 0.0f : total / float(piece.pooled);
        Global<bf16>(p.out).store(int64_t(image) * p.width + column, to_bf16(mean));
    }
}

// Block = (piece, 64 columns). The first piece of an image also writes its prefix rows.
DEVICE void mean_backward(const PoolMeanBackward& p)
{
    begin_dependent();
    check_cu_seqlens(p.cu_seqlens, p.error, p.images, p.tokens);
    int slabs = ceil_div(p.width, mean_columns);
    int number = int(blockIdx.x) / slabs;
    Piece piece = find_piece(Global<const int>(p.cu_seqlens), number, p.images, p.tokens, p.skip);
    int group = int(threadIdx.x) / mean_lanes;
    int column = int(blockIdx.x) % slabs * mean_columns + 8 * (int(threadIdx.x) % mean_lanes);
    if (column >= p.width) return;
    Global<bf16> dx(p.dx);
    if (piece.index == 0) {
        for (int row = piece.image_start + group; row < piece.first_row; row += mean_groups) {
            dx.store_16(row * p.dx_stride + column, zero_vector());
        }
    }
    if (piece.rows == 0) return;
    Vec16 packed = zero_vector();
    if (piece.image < p.images) {
        float grad[8];
        unpack_8(grad, Global<const bf16>(p.dout).load_16(int64_t(piece.image) * p.width + column));
        UNROLL
        for (int i = 0; i < 8; i++) grad[i] /= float(piece.pooled);
        packed = pack_8(grad);
    }
    for (int row = group; row < piece.rows; row += mean_groups) {
        dx.store_16((piece.first_row + row) * p.dx_stride + column, packed);
    }
}

} // namespace pool
