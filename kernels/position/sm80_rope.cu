// Table of the rotary position embedding, which attention turns queries and keys by: [tokens, pairs, 2], cos and sin
// of the coordinate of a token on the axis of each pair of columns times the pair's frequency. Prefix tokens and
// rows after the last image get (1, 0).
//
// A coordinate is a quotient of two numbers that f32 holds exactly, as long as the offset is a small multiple of 1/2,
// and a frequency is given in turns of 2 pi as the sum of two f32. So whole turns are taken off before anything is
// rounded, and what remains is known to some 2^-24 of a turn however often the angle goes round: cos and sin are
// within 1e-6.
#include "places.cuh"

// A pair of columns of a head.
struct alignas(16) RopePair {
    float turns; // at coordinate 1
    float rest;  // what rounding took off them
    int axis;    // 0: rows, 1: columns
    int unused;
};

struct RopeTable {
    float* out;                // [tokens, pairs, 2], all rows written
    const uint16_t* positions; // [tokens, 2]
    const uint16_t* grids;     // [images, 2]
    const int* cu_seqlens;     // [images + 1]
    const RopePair* pair;      // [pairs]
    int tokens;
    int images;
    int pairs;                 // even
    int coordinate;            // of position::Coordinate
    float offset;              // added to indices
    int unused;
};

namespace position {

// What index i of an axis of L patches becomes: i + offset, (i + offset) / L, 2 (i + 1/2 + offset) / L - 1 with the
// axis's own L, that of the longer and that of the shorter axis, or L numbers from -1 to 1.
enum Coordinate : int { absolute, fractional, centred, centred_longer, centred_shorter, ends };

struct Quotient {
    float numerator;
    float denominator;
};

DEVICE Quotient coordinate_of(int kind, float offset, int index, int side, int other)
{
    float at = float(index) + offset;
    if (kind == absolute) return {at, 1.0f};
    if (kind == fractional) return {at, float(side)};
    if (kind == ends) return side > 1 ? Quotient{float(2 * index - (side - 1)), float(side - 1)} : Quotient{-1.0f, 1.0f};
    if (kind == centred_longer) side = max(side, other);
    if (kind == centred_shorter) side = min(side, other);
    return {2.0f * at + float(1 - side), float(side)};
}

// Turns of an angle without the whole ones: from -1/2 to 1/2, or little more.
DEVICE float part_of_turn(const Quotient& at, float turns, float rest)
{
    float coordinate = at.numerator / at.denominator;
    float lost = ptx::fused_multiply_add(-coordinate, at.denominator, at.numerator) / at.denominator;
    float whole = nearest(coordinate * turns);
    float part = ptx::fused_multiply_add(coordinate, turns, -whole);
    part = ptx::fused_multiply_add(coordinate, rest, part);
    return ptx::fused_multiply_add(lost, turns, part);
}

// Block = 256 times two pairs of a token.
DEVICE void rope_table(const RopeTable& p)
{
    begin_dependent();
    uint32_t halves = uint32_t(p.pairs) / 2;
    uint32_t item = blockIdx.x * blockDim.x + threadIdx.x;
    int token = int(item / halves);
    if (token >= p.tokens) return;
    int first = 2 * int(item % halves);
    Vec16 values{{float_to_bits(1.0f), 0, float_to_bits(1.0f), 0}};
    uint32_t place = prefix_position;
    if (token < live_rows(p.cu_seqlens + p.images, p.tokens)) {
        place = Global<const uint32_t>(reinterpret_cast<const uint32_t*>(p.positions)).load(token);
    }
    if (place != prefix_position) {
        uint32_t sides = 0x00010001u;
        if (p.coordinate != absolute) {
            int image = image_of(p.cu_seqlens, p.images, token);
            sides = Global<const uint32_t>(reinterpret_cast<const uint32_t*>(p.grids)).load(image);
        }
        UNROLL
        for (int i = 0; i < 2; i++) {
            Vec16 pair = Global<const RopePair>(p.pair).load_16(first + i);
            bool rows = pair.word[2] == 0;
            int index = rows ? int(place & 0xffff) : int(place >> 16);
            int side = max(rows ? int(sides & 0xffff) : int(sides >> 16), 1);
            int other = max(rows ? int(sides >> 16) : int(sides & 0xffff), 1);
            Quotient at = coordinate_of(p.coordinate, p.offset, index, side, other);
            float part = part_of_turn(at, bits_to_float(pair.word[0]), bits_to_float(pair.word[1]));
            values.word[2 * i] = float_to_bits(sin_turns(part, 0.25f));
            values.word[2 * i + 1] = float_to_bits(sin_turns(part, 0.0f));
        }
    }
    Global<float>(p.out).store_16(2 * (int64_t(token) * p.pairs + first), values);
}

} // namespace position
