// Sums and GELU of whole tensors that no other kernel takes along:
//   add         out = a + b            two gradients of one activation meet, or a residual without a product
//   add_row     out = x + row          a parameter added to every row
//   accumulate  out (+)= x             the gradient of an activation that is a parameter, of bf16 or few numbers of f32
//   gelu        out = gelu(x)          a hidden activation made again from the pre-activation that is kept
// Memory-bound: 16 bytes of bf16 to an access, four accesses of a thread under way. Rows from *live on are
// zeros whatever lies in the operands. `out` may be the first operand.
#include "../common/packed.cuh"
#include "../common/reduce.cuh"
#include "../gemm/gelu.cuh"

struct ElementwiseAdd {
    bf16* out;      // [rows, width]
    const bf16* a;  // likewise
    const bf16* b;  // likewise; null: `row` is added
    const float* row; // [width]
    const int* live; // rows that hold anything, or null: all
    int rows;
    int width;      // a multiple of 8
};

struct ElementwiseAccumulate {
    float* out;            // [size]
    const bf16* x;         // [size]
    const int* accumulate; // or null: overwrite
    int64_t size;          // a multiple of 8
};

struct ElementwiseAccumulateSingle {
    float* out;            // [size]
    const float* x;        // [size]
    const int* accumulate; // or null: overwrite
    int64_t size;
};

struct ElementwiseGelu {
    bf16* out;       // [rows, width]
    const bf16* x;   // likewise
    const int* live; // rows that hold anything, or null: all
    int rows;
    int width;       // a multiple of 8
    int gelu;        // enum Gelu, not GELU_NONE
};

namespace elementwise {

constexpr int threads = 256;
constexpr int unroll = 4;

template <bool ROW>
DEVICE void add(const ElementwiseAdd& p)
{
    begin_dependent();
    int64_t size = int64_t(p.rows) * p.width;
    int64_t live = int64_t(live_rows(p.live, p.rows)) * p.width;
    int64_t first = (int64_t(blockIdx.x) * threads * unroll + threadIdx.x) * 8;
    Global<const bf16> a(p.a);
    Global<const bf16> b(p.b);
    Vec16 left[unroll];
    Vec16 right[unroll];
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int64_t i = first + u * threads * 8;
        left[u] = i < live ? a.load_16(i) : zero_vector();
        if (!ROW) right[u] = i < live ? b.load_16(i) : zero_vector();
    }
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int64_t i = first + u * threads * 8;
        if (i >= size) return;
        float x[8];
        float y[8] = {};
        unpack_8(x, left[u]);
        if (!ROW) unpack_8(y, right[u]);
        if (ROW && i < live) load_8(y, p.row, int(i % p.width), 0.0f);
        UNROLL
        for (int j = 0; j < 8; j++) x[j] += y[j];
        Global<bf16>(p.out).store_16(i, pack_8(x));
    }
}

DEVICE void gelu(const ElementwiseGelu& p)
{
    begin_dependent();
    int64_t size = int64_t(p.rows) * p.width;
    int64_t live = int64_t(live_rows(p.live, p.rows)) * p.width;
    int64_t first = (int64_t(blockIdx.x) * threads * unroll + threadIdx.x) * 8;
    Global<const bf16> x(p.x);
    Vec16 packed[unroll];
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int64_t i = first + u * threads * 8;
        packed[u] = i < live ? x.load_16(i) : zero_vector();
    }
    GeluCurve curve = gelu_curve(p.gelu);
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int64_t i = first + u * threads * 8;
        if (i >= size) return;
        float y[8];
        unpack_8(y, packed[u]);
        UNROLL
        for (int j = 0; j < 8; j++) y[j] = ::gelu(curve, y[j]);
        Global<bf16>(p.out).store_16(i, pack_8(y));
    }
}

DEVICE void accumulate(const ElementwiseAccumulate& p)
{
    begin_dependent();
    int64_t i = (int64_t(blockIdx.x) * threads + threadIdx.x) * 8;
    if (i >= p.size) return;
    float x[8];
    unpack_8(x, Global<const bf16>(p.x).load_16(i));
    if (accumulates(p.accumulate)) {
        float sum[8];
        load_8(sum, p.out + i, 0, 0.0f);
        UNROLL
        for (int j = 0; j < 8; j++) x[j] += sum[j];
    }
    Global<float> out(p.out);
    UNROLL
    for (int half = 0; half < 2; half++) {
        Vec16 packed;
        UNROLL
        for (int j = 0; j < 4; j++) packed.word[j] = float_to_bits(x[4 * half + j]);
        out.store_16(i + 4 * half, packed);
    }
}

DEVICE void accumulate_single(const ElementwiseAccumulateSingle& p)
{
    begin_dependent();
    int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= p.size) return;
    Global<float> out(p.out);
    float x = Global<const float>(p.x).load(i);
    out.store(i, accumulates(p.accumulate) ? out.load(i) + x : x);
}

} // namespace elementwise
