// Position embedding added to the embedded tokens in one pass: out[t] = x[t] + e(row_t, column_t), with
//   single    e = sum_rc w_r v_c table[row r, column c]      one table, flat or joint
//   sum       e = sum_r w_r rows[r] + sum_c v_c columns[c]
//   stack     e = [sum_r w_r rows[r] | sum_c v_c columns[c]], tables of half the width
//   product   e = sum_r w_r rows[r] * sum_c v_c columns[c], element by element
//   fourier   e = [sin 2 pi B p | cos 2 pi B p], B [width / 2, 2], p = (y, x)
// Prefix tokens keep x, rows after the last image become zeros. The tables are the f32 masters; one rounding.
//
// Memory-bound. A block owns 256 tokens and 64 columns: the part of the tables that it reads, some kilobytes, is
// then read from the L1 cache for all its tokens, where rows of f32 tables would otherwise be more traffic than x
// and out. First every thread finds what one token reads, then eight lanes take a row, four rows under way.
#include "places.cuh"

struct PositionForward {
    bf16* out;       // rows of out_stride elements
    const bf16* x;   // rows of x_stride elements; null: zeros. May be `out`
    const float* table[2]; // the table, or those of the rows and the columns, or B and null
    int64_t out_stride;
    int64_t x_stride;
    PositionPlaces places;
    int width;       // multiple of 8; of 16 for stack and fourier
    int fractional;  // for fourier: coordinates are divided by the image's sides
};

namespace position {

enum Mode : int { single, sum, stack, product, fourier };

constexpr int threads = 256;
constexpr int lanes = 8; // of a row: 64 columns
constexpr int groups = threads / lanes;
constexpr int unroll = 4;

// e += sum over the taps of one axis, eight columns from `column` of rows of `width`.
DEVICE void add_axis(float (&e)[8], const float* table, int width, int column, const PositionBank& bank,
                     const Span& span)
{
    ROLLED
    for (int i = 0; i < max(span.count, 1); i++) {
        PositionTap tap = tap_at(bank, span, i);
        float row[8];
        load_8(row, table + int64_t(tap.row) * width, column, 0.0f);
        UNROLL
        for (int j = 0; j < 8; j++) e[j] = ptx::fused_multiply_add(tap.weight, row[j], e[j]);
    }
}

// e += sum over the pairs of taps of both axes.
DEVICE void add_joint(float (&e)[8], const PositionForward& p, int column, const Spans& spans)
{
    const PositionPlaces& places = p.places;
    ROLLED
    for (int i = 0; i < max(spans.axis[0].count, 1); i++) {
        PositionTap row = tap_at(places.bank[0], spans.axis[0], i);
        ROLLED
        for (int j = 0; j < max(spans.axis[1].count, 1); j++) {
            PositionTap tap = tap_at(places.bank[1], spans.axis[1], j);
            int64_t index = int64_t(row.row) * (places.flat ? 1 : places.columns) + tap.row;
            float x[8];
            load_8(x, p.table[0] + index * p.width, column, 0.0f);
            UNROLL
            for (int c = 0; c < 8; c++) e[c] = ptx::fused_multiply_add(row.weight * tap.weight, x[c], e[c]);
        }
    }
}

// e += the embedding, eight columns from `column`.
template <int MODE>
DEVICE void add_tables(float (&e)[8], const PositionForward& p, int column, const Spans& spans)
{
    const PositionBank(&bank)[2] = p.places.bank;
    if (MODE == single) {
        add_joint(e, p, column, spans);
    } else if (MODE == sum) {
        add_axis(e, p.table[0], p.width, column, bank[0], spans.axis[0]);
        add_axis(e, p.table[1], p.width, column, bank[1], spans.axis[1]);
    } else if (MODE == stack) {
        int half = p.width / 2;
        if (column < half) {
            add_axis(e, p.table[0], half, column, bank[0], spans.axis[0]);
        } else {
            add_axis(e, p.table[1], half, column - half, bank[1], spans.axis[1]);
        }
    } else {
        float row[8] = {};
        float other[8] = {};
        add_axis(row, p.table[0], p.width, column, bank[0], spans.axis[0]);
        add_axis(other, p.table[1], p.width, column, bank[1], spans.axis[1]);
        UNROLL
        for (int j = 0; j < 8; j++) e[j] += row[j] * other[j];
    }
}

// A token's Fourier features, eight columns from `column`.
DEVICE void add_fourier(float (&e)[8], const PositionForward& p, int column, float y, float x)
{
    int half = p.width / 2;
    int cosine = column >= half;
    int first = 2 * (column - cosine * half);
    UNROLL
    for (int part = 0; part < 2; part++) {
        float map[8];
        load_8(map, p.table[0], first + 8 * part, 0.0f);
        UNROLL
        for (int j = 0; j < 4; j++) {
            float phase = ptx::fused_multiply_add(map[2 * j], y, map[2 * j + 1] * x);
            e[4 * part + j] += sin_turns(phase, cosine ? 0.25f : 0.0f);
        }
    }
}

// Block = (256 tokens, 64 columns), columns fastest. Shared memory: 16 bytes a token.
template <int MODE>
DEVICE void forward(const PositionForward& p)
{
    begin_dependent();
    const PositionPlaces& places = p.places;
    int slabs = ceil_div(p.width, 8 * lanes);
    int first = int(blockIdx.x) / slabs * threads;
    int live = live_rows(places.cu_seqlens + places.images, places.tokens);
    Shared<uint32_t> shared(ptx::shared_base());
    {
        int token = first + int(threadIdx.x);
        int image = -1;
        Vec16 word;
        if (MODE == fourier) {
            float y;
            float x;
            bool there = point_of(places, token, live, p.fractional, image, y, x);
            int count = there ? 0 : token < live ? place_prefix : place_dead;
            word = Vec16{{float_to_bits(y), uint32_t(count), float_to_bits(x), 0}};
        } else {
            Spans spans = spans_of(places, token, live, image);
            word = Vec16{{uint32_t(spans.axis[0].first), uint32_t(spans.axis[0].count),
                          uint32_t(spans.axis[1].first), uint32_t(spans.axis[1].count)}};
        }
        shared.store_16(4 * threadIdx.x, word);
    }
    ptx::barrier();

    int column = int(blockIdx.x) % slabs * 8 * lanes + int(threadIdx.x) % lanes * 8;
    if (column >= p.width) return;
    Global<const bf16> x(p.x);
    Global<bf16> out(p.out);
    for (int base = int(threadIdx.x) / lanes; base < threads; base += groups * unroll) {
        Vec16 packed[unroll];
        UNROLL
        for (int u = 0; u < unroll; u++) {
            int token = first + base + u * groups;
            bool read = p.x != nullptr && token < live;
            packed[u] = read ? x.load_16(token * p.x_stride + column) : zero_vector();
        }
        // One row after the other, those that wait moving up.
        ROLLED
        for (int u = 0; u < unroll; u++) {
            int token = first + base + u * groups;
            if (token >= places.tokens) return;
            Vec16 row = packed[0];
            UNROLL
            for (int i = 1; i < unroll; i++) packed[i - 1] = packed[i];
            Vec16 word = shared.load_16(4 * (base + u * groups));
            Spans spans = {{{int(word.word[0]), int(word.word[1])}, {int(word.word[2]), int(word.word[3])}}};
            if (!spans.empty()) {
                float e[8];
                unpack_8(e, row);
                if (MODE == fourier) {
                    add_fourier(e, p, column, bits_to_float(word.word[0]), bits_to_float(word.word[2]));
                } else {
                    add_tables<MODE>(e, p, column, spans);
                }
                row = pack_8(e);
            }
            out.store_16(token * p.out_stride + column, row);
        }
    }
}

} // namespace position
