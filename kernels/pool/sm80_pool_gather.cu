// One token of every image, such as its cls token:
//   forward   out[i] = x[start_i + offset], 0 where the image has no such token
//   backward  dx[start_i + offset] = dout[i], and 0 at all other rows
// Memory-bound; backward writes rows in the pieces of chunks.cuh.
#include "chunks.cuh"

struct PoolGather {
    bf16* out;      // forward: [images, width], backward: rows of stride elements
    const bf16* x;  // forward: rows of stride elements, backward: [images, width]
    const int* cu_seqlens; // [images + 1]
    int* error;     // set where cu_seqlens is bad; may be null
    int64_t stride;
    int tokens;
    int images;
    int width;      // multiple of 8
    int offset;
};

namespace pool {

constexpr int gather_threads = 256;

// A thread owns eight columns of one image.
DEVICE void gather_forward(const PoolGather& p)
{
    begin_dependent();
    check_cu_seqlens(p.cu_seqlens, p.error, p.images, p.tokens);
    int chunks = p.width / 8;
    int64_t i = int64_t(blockIdx.x) * gather_threads + threadIdx.x;
    if (i >= int64_t(p.images) * chunks) return;
    int image = int(i / chunks);
    Global<const int> cu_seqlens(p.cu_seqlens);
    int row = row_start(cu_seqlens, image, p.tokens) + p.offset;
    bool there = row < row_start(cu_seqlens, image + 1, p.tokens);
    Vec16 packed = zero_vector();
    if (there) packed = Global<const bf16>(p.x).load_16(row * p.stride + i % chunks * 8);
    Global<bf16>(p.out).store_16(i * 8, packed);
}

// Block = (piece, 64 columns).
DEVICE void gather_backward(const PoolGather& p)
{
    constexpr int lanes = 8; // of a row: 64 columns
    constexpr int groups = gather_threads / lanes;
    begin_dependent();
    check_cu_seqlens(p.cu_seqlens, p.error, p.images, p.tokens);
    int slabs = ceil_div(p.width, 8 * lanes);
    Piece piece =
        find_piece(Global<const int>(p.cu_seqlens), int(blockIdx.x) / slabs, p.images, p.tokens, 0);
    int column = int(blockIdx.x) % slabs * 8 * lanes + 8 * (int(threadIdx.x) % lanes);
    if (column >= p.width) return;
    Global<bf16> dx(p.out);
    for (int r = int(threadIdx.x) / lanes; r < piece.rows; r += groups) {
        int row = piece.first_row + r;
        bool gathered = piece.image < p.images && row == piece.image_start + p.offset;
        Vec16 packed = zero_vector();
        if (gathered) packed = Global<const bf16>(p.x).load_16(int64_t(piece.image) * p.width + column);
        dx.store_16(row * p.stride + column, packed);
    }
}

} // namespace pool
