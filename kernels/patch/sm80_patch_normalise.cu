// Patches as the batch has them become rows of bf16:
//   u8   out[t, c P^2 + p] = x[t, c P^2 + p] a[c] + b[c],  a = 1 / (255 std), b = -mean / std
//   f32  out = x
// and zeros in the rows of prefix tokens, in the rows after the last image, and in the columns from the
// patch's width to the row stride of `out`, a multiple of 8: a width such as 3 14^2 = 588 is none, and the
// matrix product that follows wants rows of whole 16 bytes. Its weight then has the same stride; whatever lies
// in the weight's last columns is multiplied by zeros, and the gradient there is zero.
//
// Memory-bound. A block owns 64 rows and 128 columns; a thread owns eight columns, whose factors stay in
// registers, and four rows, whose loads are all under way together. Rows of u8 begin at multiples of the width,
// so the widest load is what divides the width: 8, 4 or 1 bytes.
#include "../common/packed.cuh"

struct PatchNormalise {
    bf16* out;           // rows of out_stride elements
    const void* patches; // [tokens, width], u8 or f32
    const float* factors; // [channels, 2]: a, b; not read for f32
    const uint16_t* positions; // [tokens, 2]
    const int* live;     // cu_seqlens[N], or null: all rows
    int64_t out_stride;  // a multiple of 8, at least width
    int tokens;
    int width;           // channels times plane
    int plane;           // pixels of a channel
};

namespace patch {

constexpr int threads = 256;
constexpr int lanes = 16;            // of a row: 128 columns
constexpr int rows_at_once = threads / lanes;
constexpr int unroll = 4;
constexpr int block_rows = rows_at_once * unroll;

// Eight pixels from element `at`, of which those from `left` on are zeros, as they lie in memory.
template <int BYTES>
DEVICE void load_pixels(uint32_t (&x)[2], const void* patches, int64_t at, int left)
{
    if (BYTES == 8) {
        // Whole eights: the width is a multiple.
        uint64_t word = Global<const uint64_t>(static_cast<const uint64_t*>(patches)).load(at / 8);
        x[0] = uint32_t(word);
        x[1] = uint32_t(word >> 32);
    } else if (BYTES == 4) {
        Global<const uint32_t> words(static_cast<const uint32_t*>(patches));
        UNROLL
        for (int half = 0; half < 2; half++) x[half] = 4 * half < left ? words.load(at / 4 + half) : 0;
    } else {
        Global<const uint8_t> bytes(static_cast<const uint8_t*>(patches));
        UNROLL
        for (int i = 0; i < 8; i++) {
            uint32_t byte = i < left ? bytes.load(at + i) : 0;
            x[i / 4] |= byte << (8 * (i % 4));
        }
    }
}

// The same of f32, four at a time or each alone.
template <int BYTES>
DEVICE void load_values(float (&x)[8], const void* patches, int64_t at, int left)
{
    Global<const float> values(static_cast<const float*>(patches));
    if (BYTES == 16) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            Vec16 packed = 4 * half < left ? values.load_16(at + 4 * half) : zero_vector();
            UNROLL
            for (int i = 0; i < 4; i++) x[4 * half + i] = bits_to_float(packed.word[i]);
        }
    } else {
        UNROLL
        for (int i = 0; i < 8; i++) x[i] = i < left ? values.load(at + i) : 0.0f;
    }
}

// Block = (64 rows, 128 columns), columns fastest. BYTES: width of a load.
template <bool U8, int BYTES>
DEVICE void normalise(const PatchNormalise& p)
{
    begin_dependent();
    int slabs = ceil_div(int(p.out_stride), 8 * lanes);
    int column = int(blockIdx.x) % slabs * 8 * lanes + int(threadIdx.x) % lanes * 8;
    if (column >= p.out_stride) return;
    int first = int(blockIdx.x) / slabs * block_rows + int(threadIdx.x) / lanes;
    int live = live_rows(p.live, p.tokens);
    int left = p.width - column;
    Global<const uint32_t> positions(reinterpret_cast<const uint32_t*>(p.positions));

    Vec16 result[unroll];
    bool holds[unroll];
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int row = first + u * rows_at_once;
        holds[u] = left > 0 && row < live && positions.load(row) != prefix_position;
    }
    if (U8) {
        uint32_t pixels[unroll][2];
        UNROLL
        for (int u = 0; u < unroll; u++) {
            pixels[u][0] = 0;
            pixels[u][1] = 0;
            int64_t at = int64_t(first + u * rows_at_once) * p.width + column;
            if (holds[u]) load_pixels<BYTES>(pixels[u], p.patches, at, left);
        }
        // A zero factor and summand where there is no patch any more.
        float a[8];
        float b[8];
        UNROLL
        for (int i = 0; i < 8; i++) {
            Global<const float> factors(p.factors);
            int channel = (column + i) / p.plane;
            a[i] = i < left ? factors.load(2 * channel) : 0.0f;
            b[i] = i < left ? factors.load(2 * channel + 1) : 0.0f;
        }
        UNROLL
        for (int u = 0; u < unroll; u++) {
            float x[8];
            UNROLL
            for (int i = 0; i < 8; i++) {
                float pixel = float((pixels[u][i / 4] >> (8 * (i % 4))) & 0xff);
                x[i] = ptx::fused_multiply_add(pixel, a[i], b[i]);
            }
            result[u] = holds[u] ? pack_8(x) : zero_vector();
        }
    } else {
        float x[unroll][8] = {};
        UNROLL
        for (int u = 0; u < unroll; u++) {
            int64_t at = int64_t(first + u * rows_at_once) * p.width + column;
            if (holds[u]) load_values<BYTES>(x[u], p.patches, at, left);
        }
        UNROLL
        for (int u = 0; u < unroll; u++) result[u] = pack_8(x[u]);
    }

    Global<bf16> out(p.out);
    UNROLL
    for (int u = 0; u < unroll; u++) {
        int row = first + u * rows_at_once;
        if (row < p.tokens) out.store_16(row * p.out_stride + column, result[u]);
    }
}

} // namespace patch
