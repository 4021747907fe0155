// Gradients of the position tables and of the Fourier map, in a fixed order and without atomics.
//
// Tables: dtable[r] += sum over tokens of w_tr dout[t], for a product w_tr dout[t] * (what the token reads of the
// other table). A warp is a block of its own: it owns 128 columns of up to 64 table rows, whose sums lie in its
// shared memory (32 KB), and walks one slice of the tokens in order. 32 tokens at a time, each lane finds what
// one token reads, a vote tells which of them touch these table rows, and only their rows of dout are read, eight
// under way. A lane owns four columns, so that nobody else adds to its sums: no atomics, no barriers, one order.
// Slices [slice, table row, column] are added by sum_f32_slices.
// Other ways were weighed. Lists of tokens by table row, sorted on the device, read dout as often and need memory
// for every tap there may be: with resampled joint tables some hundreds of a token. A table of the usual 64 rows
// is one tile here, so dout is read once an axis; the slices are a fraction of that (128 slices of [64, 768] f32
// against 65,536 rows of bf16: 25 of 101 MB). Tables of more rows are cut into tiles, each of which looks at all
// tokens but reads only its own.
//
// Fourier: dB[j] += 2 pi sum over tokens of (cos dout[j] - sin dout[j + width / 2]) p. A warp owns 128 rows of the
// map, four a lane, with its sums in registers; slices [slice, j, 2] are added by sum_f32_rows.
#include "places.cuh"

struct PositionGrad {
    float* partial;         // [slices, table rows, columns], written
    const bf16* dout;       // token rows of dout_stride elements, the first of `columns`
    const float* other;     // product: the other table; else null
    int64_t dout_stride;
    PositionPlaces places;
    int axis;               // of the table: 0, 1, or 2 for the one table of both
    int table_rows;
    int columns;            // of the table, a multiple of 4
    int slice;              // tokens of a slice, a multiple of 32
};

struct PositionFourierGrad {
    float* partial;         // [slices, width / 2, 2], written
    const bf16* dout;
    const float* map;       // [width / 2, 2]
    int64_t dout_stride;
    PositionPlaces places;
    int width;              // multiple of 8
    int fractional;
    int slice;              // tokens of a slice, a multiple of 32
};

namespace position {

constexpr int grad_rows = 64;     // of a table, in a warp
constexpr int grad_columns = 128; // 4 a lane
constexpr int grad_unroll = 8;

// Four bf16.
struct alignas(8) Quad {
    uint32_t word[2];
};

DEVICE Quad load_quad(const bf16* p, int64_t i)
{
    return Global<const Quad>(reinterpret_cast<const Quad*>(p)).load(i / 4);
}

DEVICE void unpack_quad(float (&x)[4], const Quad& quad)
{
    x[0] = low(quad.word[0]);
    x[1] = high(quad.word[0]);
    x[2] = low(quad.word[1]);
    x[3] = high(quad.word[1]);
}

// Number of the lowest set bit.
DEVICE uint32_t lowest(uint32_t bits)
{
    return count_bits((bits & (0u - bits)) - 1);
}

DEVICE Span from_lane(const Span& span, uint32_t lane)
{
    return {int(ptx::shuffle(uint32_t(span.first), lane)), int(ptx::shuffle(uint32_t(span.count), lane))};
}

DEVICE PositionTap from_lane(const PositionTap& tap, uint32_t lane)
{
    return {ptx::shuffle(tap.row, lane), ptx::shuffle(tap.weight, lane)};
}

// Table rows that are read, from the first to the last.
DEVICE int first_row(const PositionBank& bank, const Span& span)
{
    return int(tap_at(bank, span, 0).row);
}

DEVICE int last_row(const PositionBank& bank, const Span& span)
{
    return int(tap_at(bank, span, max(span.count, 1) - 1).row);
}

// Block = (128 columns, 64 table rows; slice). Shared memory: the sums.
template <bool PRODUCT>
DEVICE void grad(const PositionGrad& p)
{
    begin_dependent();
    const PositionPlaces& places = p.places;
    uint32_t lane = ptx::lane_id();
    int slabs = ceil_div(p.columns, grad_columns);
    int column = int(blockIdx.x) % slabs * grad_columns + 4 * int(lane);
    int tile = int(blockIdx.x) / slabs * grad_rows;
    int rows = min(grad_rows, p.table_rows - tile);
    bool active = column < p.columns;
    // One table of both axes; else the taps of the other axis are those of the product's other factor.
    bool joint = p.axis == 2;
    int own_axis = joint ? 0 : p.axis;
    PositionBank own_bank = own_axis == 0 ? places.bank[0] : places.bank[1];
    PositionBank other_bank = own_axis == 0 ? places.bank[1] : places.bank[0];
    int pitch = joint && !places.flat ? places.columns : 1;

    Shared<float> sums(ptx::shared_base());
    for (int r = 0; r < rows; r++) sums.store_16(r * grad_columns + 4 * lane, zero_vector());

    int live = live_rows(places.cu_seqlens + places.images, places.tokens);
    int begin = int(blockIdx.y) * p.slice;
    int end = min(begin + p.slice, live);
    int image = -1;
    for (int base = begin; base < end; base += 32) {
        Spans spans = spans_of(places, base + int(lane), end, image);
        Span own = own_axis == 0 ? spans.axis[0] : spans.axis[1];
        Span other = own_axis == 0 ? spans.axis[1] : spans.axis[0];
        // The first two taps wait in the lane: absolute coordinates have one, linear filters no more than two.
        PositionTap near[2] = {{0, 0.0f}, {0, 0.0f}};
        bool reads = false;
        if (!spans.empty()) {
            near[0] = tap_at(own_bank, own, 0);
            if (own.count > 1) near[1] = tap_at(own_bank, own, 1);
            int from = int(near[0].row) * pitch;
            int to = last_row(own_bank, own) * pitch;
            if (joint) {
                from += first_row(other_bank, other);
                to += last_row(other_bank, other);
            }
            reads = from < tile + rows && to >= tile;
        }
        uint32_t left = ptx::ballot(reads);
        while (left != 0) {
            uint32_t token[grad_unroll];
            Quad quad[grad_unroll];
            UNROLL
            for (int u = 0; u < grad_unroll; u++) {
                token[u] = left != 0 ? lowest(left) : 32;
                left &= left - 1;
                bool wanted = token[u] < 32 && active;
                quad[u] = Quad{{0, 0}};
                if (wanted) quad[u] = load_quad(p.dout, (base + int(token[u])) * p.dout_stride + column);
            }
            UNROLL
            for (int u = 0; u < grad_unroll; u++) {
                if (token[u] == 32) continue; // In all lanes alike.
                Span from_own = from_lane(own, token[u]);
                Span from_other = from_lane(other, token[u]);
                PositionTap first = from_lane(near[0], token[u]);
                PositionTap second = from_lane(near[1], token[u]);
                if (!active) continue;
                float dout[4];
                unpack_quad(dout, quad[u]);
                if (PRODUCT) {
                    float factor[4] = {};
                    for (int i = 0; i < max(from_other.count, 1); i++) {
                        PositionTap tap = tap_at(other_bank, from_other, i);
                        Vec16 row = Global<const float>(p.other).load_16(int64_t(tap.row) * p.columns + column);
                        UNROLL
                        for (int c = 0; c < 4; c++) {
                            factor[c] =
                                ptx::fused_multiply_add(tap.weight, bits_to_float(row.word[c]), factor[c]);
                        }
                    }
                    UNROLL
                    for (int c = 0; c < 4; c++) dout[c] *= factor[c];
                }
                int inner = joint ? max(from_other.count, 1) : 1;
                for (int i = 0; i < max(from_own.count, 1); i++) {
                    PositionTap tap = i == 0 ? first : i == 1 ? second : tap_at(own_bank, from_own, i);
                    for (int j = 0; j < inner; j++) {
                        int r = int(tap.row) * pitch - tile;
                        float weight = tap.weight;
                        if (joint) {
                            PositionTap across = tap_at(other_bank, from_other, j);
                            r += int(across.row);
                            weight *= across.weight;
                        }
                        if (r < 0 || r >= rows) continue;
                        uint32_t at = uint32_t(r) * grad_columns + 4 * lane;
                        Vec16 sum = sums.load_16(at);
                        UNROLL
                        for (int c = 0; c < 4; c++) {
                            float total = bits_to_float(sum.word[c]);
                            sum.word[c] = float_to_bits(ptx::fused_multiply_add(weight, dout[c], total));
                        }
                        sums.store_16(at, sum);
                    }
                }
            }
        }
    }
    if (!active) return;
    Global<float> partial(p.partial);
    int64_t first = int64_t(blockIdx.y) * p.table_rows + tile;
    for (int r = 0; r < rows; r++) {
        partial.store_16((first + r) * p.columns + column, sums.load_16(r * grad_columns + 4 * lane));
    }
}

// Block = (128 rows of the map; slice).
DEVICE void fourier_grad(const PositionFourierGrad& p)
{
    constexpr int unroll = 4;
    begin_dependent();
    const PositionPlaces& places = p.places;
    uint32_t lane = ptx::lane_id();
    int half = p.width / 2;
    int j = int(blockIdx.x) * grad_columns + 4 * int(lane);
    bool active = j < half;
    float map[8] = {};
    if (active) load_8(map, p.map, 2 * j, 0.0f);
    float sum[8] = {};

    int live = live_rows(places.cu_seqlens + places.images, places.tokens);
    int begin = int(blockIdx.y) * p.slice;
    int end = min(begin + p.slice, live);
    int image = -1;
    for (int base = begin; base < end; base += 32) {
        float y;
        float x;
        bool reads = point_of(places, base + int(lane), end, p.fractional, image, y, x);
        uint32_t left = ptx::ballot(reads);
        while (left != 0) {
            uint32_t token[unroll];
            Quad sines[unroll];
            Quad cosines[unroll];
            UNROLL
            for (int u = 0; u < unroll; u++) {
                token[u] = left != 0 ? lowest(left) : 32;
                left &= left - 1;
                sines[u] = Quad{{0, 0}};
                cosines[u] = Quad{{0, 0}};
                if (token[u] == 32 || !active) continue;
                int64_t at = (base + int(token[u])) * p.dout_stride + j;
                sines[u] = load_quad(p.dout, at);
                cosines[u] = load_quad(p.dout, at + half);
            }
            UNROLL
            for (int u = 0; u < unroll; u++) {
                if (token[u] == 32) continue; // In all lanes alike.
                float py = ptx::shuffle(y, token[u]);
                float px = ptx::shuffle(x, token[u]);
                float dsine[4];
                float dcosine[4];
                unpack_quad(dsine, sines[u]);
                unpack_quad(dcosine, cosines[u]);
                UNROLL
                for (int i = 0; i < 4; i++) {
                    float phase = ptx::fused_multiply_add(map[2 * i], py, map[2 * i + 1] * px);
                    float slope = dsine[i] * sin_turns(phase, 0.25f) - dcosine[i] * sin_turns(phase, 0.0f);
                    sum[2 * i] = ptx::fused_multiply_add(slope, py, sum[2 * i]);
                    sum[2 * i + 1] = ptx::fused_multiply_add(slope, px, sum[2 * i + 1]);
                }
            }
        }
    }
    if (!active) return;
    Global<float> partial(p.partial);
    int64_t first = (int64_t(blockIdx.y) * half + j) * 2;
    UNROLL
    for (int part = 0; part < 2; part++) {
        Vec16 packed;
        UNROLL
        for (int i = 0; i < 4; i++) packed.word[i] = float_to_bits(sum[4 * part + i] * 6.2831853f);
        partial.store_16(first + 4 * part, packed);
    }
}

} // namespace position
