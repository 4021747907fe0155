// From the targets of sm80_view_resize to normalised patches:
//   mean     of every picture with ops that need it, its mean luma before each of them
//   patches  out[t, c P^2 + p] = x a[c] + b[c], where x is the pixel after the ops of its picture, mixed with that of
//            its partner; zeros in rows without a patch and in the columns from C P^2 to the row stride
// The values are those of Pillow and of the host: 8 bits after each op, f32 in the same order between.
//
// mean: a block has a picture and walks over its pixels once for each mean, redoing the ops before it in registers: no op
// writes an image of its own. patches: a block has a token row; the patch goes through shared memory, since neighbouring
// pixels of a picture are neighbours in the patch, and neighbouring channels are P^2 apart.
#include "view.cuh"

struct ViewPatches {
    const int* records;   // [pictures, record_words]
    const int* counts;    // pictures, tiles of all of them
    const int* rows;      // [tokens, 3]: picture, counted from 1, row and column of the patch's first pixel; picture 0: none
    const uint8_t* pixels;
    int* means;           // [pictures, most_ops]
    const float* factors; // [channels, 2]: a, b
    bf16* out;            // rows of out_stride elements
    int64_t out_stride;   // a multiple of 8, at least channels times plane
    int side;             // P
};

namespace view {

// A mean that this block has made.
struct OwnMeans {
    DEVICE int load(int op) const
    {
        return Shared<int>(ptx::shared_base()).load(op);
    }
};

// Those of a picture.
struct Means {
    const int* means;
    int64_t first;

    DEVICE int load(int op) const
    {
        return Global<const int>(means).load(first + op);
    }
};

// Sum over the block, in thread 0. Shared memory: a word a warp behind the means. Collective.
DEVICE uint64_t sum_of_block(uint32_t x)
{
    UNROLL
    for (uint32_t mask = 16; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    Shared<uint32_t> sums(ptx::shared_base() + 4 * most_ops);
    if (ptx::lane_id() == 0) sums.store(threadIdx.x / 32, x);
    ptx::barrier();
    uint64_t sum = 0;
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < threads / 32; warp++) sum += sums.load(warp);
    }
    return sum;
}

template <int C>
DEVICE void mean(const ViewPatches& p)
{
    begin_dependent();
    int picture = int(blockIdx.x);
    if (picture >= Global<const int>(p.counts).load(0)) return;
    int count = field(p.records, picture, ops);
    int size = field(p.records, picture, height) * field(p.records, picture, width);
    int64_t from = bytes(field(p.records, picture, pixels));
    Shared<int> means(ptx::shared_base());
    for (int op = 0; op < count; op++) {
        if (field(p.records, picture, first_op + 2 * op) != blend_mean) continue;
        uint32_t sum = 0;
        for (int i = int(threadIdx.x); i < size; i += threads) {
            int colour[C];
            load_colour(colour, p.pixels, from + int64_t(i) * C);
            recolour(colour, p.records, picture, op, OwnMeans());
            sum += uint32_t(luma(colour));
        }
        uint64_t total = sum_of_block(sum);
        if (threadIdx.x == 0) {
            // The mean rounded to the nearest.
            int value = int((2 * total + uint64_t(size)) / (2 * uint64_t(size)));
            means.store(op, value);
            Global<int>(p.means).store(int64_t(picture) * most_ops + op, value);
        }
        ptx::barrier();
    }
}

// The pixel at column x and row y of a target after its ops.
template <int C>
DEVICE void load_pixel(int (&colour)[C], const ViewPatches& p, int picture, int x, int y)
{
    int64_t pixel = int64_t(y) * field(p.records, picture, width) + x;
    load_colour(colour, p.pixels, bytes(field(p.records, picture, pixels)) + pixel * C);
    Means means{p.means, int64_t(picture) * most_ops};
    recolour(colour, p.records, picture, field(p.records, picture, ops), means);
}

// The same, mixed with that of the partner.
template <int C>
DEVICE void load_mixed(int (&colour)[C], const ViewPatches& p, int picture, int x, int y)
{
    auto of = [&](int word) { return field(p.records, picture, word); };
    int other = of(partner) - 1;
    bool whole = of(box_top) == of(box_bottom);
    bool inside = !whole && y >= of(box_top) && y < of(box_bottom) && x >= of(box_left) && x < of(box_right);
    if (other < 0 || !inside) load_pixel(colour, p, picture, x, y);
    if (other < 0 || !(whole || inside)) return;
    int mixed[C];
    load_pixel(mixed, p, other, x, y);
    float own = bits_to_float(uint32_t(of(share)));
    UNROLL
    for (int c = 0; c < C; c++) {
        colour[c] = inside ? mixed[c]
                           : to_byte(ptx::rounded_product(own, float(colour[c]))
                                     + ptx::rounded_product(1.0f - own, float(mixed[c])) + 0.5f);
    }
}

// Block = token row. Shared memory: the patch in f32.
template <int C>
DEVICE void patches(const ViewPatches& p)
{
    begin_dependent();
    int token = int(blockIdx.x);
    Global<const int> rows(p.rows);
    int picture = rows.load(3 * int64_t(token)) - 1;
    int plane = p.side * p.side;
    Shared<float> patch(ptx::shared_base());
    if (picture >= 0) {
        int top = rows.load(3 * int64_t(token) + 1);
        int left = rows.load(3 * int64_t(token) + 2);
        Global<const float> factors(p.factors);
        for (int i = int(threadIdx.x); i < plane; i += threads) {
            int colour[C];
            load_mixed(colour, p, picture, left + i % p.side, top + i / p.side);
            UNROLL
            for (int c = 0; c < C; c++) {
                float a = factors.load(2 * c);
                float b = factors.load(2 * c + 1);
                patch.store(c * plane + i, ptx::fused_multiply_add(float(colour[c]), a, b));
            }
        }
    }
    ptx::barrier();
    Global<bf16> out(p.out);
    for (int64_t column = threadIdx.x * 8; column < p.out_stride; column += threads * 8) {
        float x[8];
        UNROLL
        for (int i = 0; i < 8; i++) {
            bool holds = picture >= 0 && column + i < C * plane;
            x[i] = holds ? patch.load(uint32_t(column + i)) : 0.0f;
        }
        out.store_16(token * p.out_stride + column, pack_8(x));
    }
}

} // namespace view
