// Rotary position embedding: rows of q and k are rotated after their norm, before they are rounded; rows of their
// gradients are rotated back before they go through the norm.
//
// Two columns are a pair, a neighbour and the next ("interleaved") or one of the first half of a head and one as far
// in the second ("halves"). Pair (a, b) becomes (a cos - b sin, b cos + a sin) with the angle of its token, the same in all
// heads. Two neighbours, from an even column on, are partners, or have two neighbours as partners: heads are multiples of 8.
// They are a word, and taken together.
//
// Whoever has a row in registers, spread over lanes, takes partners from where the row came from, not from the other lanes.
#pragma once

#include "common.cuh"

enum RopeKind : int32_t { ROPE_NONE = 0, ROPE_INTERLEAVED = 1, ROPE_HALVES = 2 };

// The angles of token rows.
struct Rope {
    const float* table; // of the first of the rows: [rows, head_dim / 2, 2], cos and sin; null: nothing is rotated
    int kind;
    int head_dim;

    // From row `row` on.
    DEVICE Rope from(int64_t row) const
    {
        return Rope{table ? table + row * head_dim : nullptr, kind, head_dim};
    }
};

template <class Params>
DEVICE Rope rope_of(const Params& p)
{
    return Rope{p.rope, p.rope_kind, p.head_dim};
}

// Whether rows of q and k are anything but what is read.
template <class Params>
DEVICE bool makes_rows(const Params& p)
{
    return p.norm.kind != NORM_NONE || p.rope;
}

// Rotates a pair by an angle, cosine and sine; or `back`.
DEVICE void turn(float& a, float& b, FloatPair angle, bool back)
{
    const float before = a;
    const float sine = back ? -angle.second : angle.second;
    a = ptx::fused_multiply_add(b, -sine, a * angle.first);
    b = ptx::fused_multiply_add(before, sine, b * angle.first);
}

// Rotates columns `column` and the next, in x, and those as far in the second half of the head, in y, by the angles of the
// first row of `rope`, or `back`.
DEVICE void rotate(FloatPair& x, FloatPair& y, int column, const Rope& rope, bool back)
{
    if (rope.kind == ROPE_INTERLEAVED) {
        const Global<const FloatPair> table(reinterpret_cast<const FloatPair*>(rope.table));
        turn(x.first, x.second, table.load(column / 2), back);
        turn(y.first, y.second, table.load(column / 2 + rope.head_dim / 4), back);
    } else {
        const Vec16 two = Global<const float>(rope.table).load_16(2 * column);
        turn(x.first, y.first, FloatPair{bits_to_float(two.word[0]), bits_to_float(two.word[1])}, back);
        turn(x.second, y.second, FloatPair{bits_to_float(two.word[2]), bits_to_float(two.word[3])}, back);
    }
}

// Normalises columns `column` and the next as normalise_four does, but for the rounding.
DEVICE FloatPair normal_two(uint32_t x, int column, const HeadNorm& norm, RowStatistics row)
{
    auto load = [&](const float* from, float otherwise) {
        if (!from) return FloatPair{otherwise, otherwise};
        return Global<const FloatPair>(reinterpret_cast<const FloatPair*>(from)).load(column / 2);
    };
    const FloatPair gain = load(norm.gain, 1.0f);
    const FloatPair bias = load(norm.bias, 0.0f);
    return FloatPair{ptx::fused_multiply_add((low(x) - row.mean) * row.rstd, gain.first, bias.first),
                     ptx::fused_multiply_add((high(x) - row.mean) * row.rstd, gain.second, bias.second)};
}

// Columns `column` and the next of the first row of `rope`, `x` as they were read, normalised and rotated; word(c) reads
// columns c and the next.
template <class Read>
DEVICE uint32_t rotated(uint32_t x, int column, Read word, const HeadNorm& norm, RowStatistics row, const Rope& rope)
{
    // Both partners are rotated, and one of them is kept.
    const int half = rope.head_dim / 2;
    const bool second = column >= half;
    const int other = second ? column - half : column + half;
    const FloatPair a = normal_two(x, column, norm, row);
    const FloatPair b = normal_two(word(other), other, norm, row);
    FloatPair lower = second ? b : a;
    FloatPair upper = second ? a : b;
    rotate(lower, upper, second ? other : column, rope, false);
    return second ? pack_pair(upper.first, upper.second) : pack_pair(lower.first, lower.second);
}

// Normalises and rotates a row, if it `exists`, with few registers: each of its LANES lanes has words of the first half of
// the head and those as far in the second, which nobody else reads, so that it may be in place. load(c) and store(c, x) are
// of column c and the next, `rope` is that of the row.
template <int LANES, class Load, class Store>
DEVICE void rotate_row(Load load, Store store, bool exists, int j, const HeadNorm& norm, RowStatistics row,
                       const Rope& rope)
{
    const int half = rope.head_dim / 2;
    // Lanes stay together.
    ROLLED
    for (int first = 0; first < half; first += 2 * LANES) {
        const int column = first + 2 * j;
        if (!exists || column >= half) continue;
        FloatPair x = normal_two(load(column), column, norm, row);
        FloatPair y = normal_two(load(column + half), column + half, norm, row);
        rotate(x, y, column, rope, false);
        store(column, pack_pair(x.first, x.second));
        store(column + half, pack_pair(y.first, y.second));
    }
}

// The same of row `row` of a tile in shared memory in place.
template <int LANES, class Tile>
DEVICE void rotate_in_tile(Tile tile, int row, bool exists, int j, const HeadNorm& norm, RowStatistics statistics,
                           const Rope& rope)
{
    auto at = [&](int column) { return Shared<uint32_t>(tile.address(row, column / 8) + column % 8 * 2); };
    rotate_row<LANES>([&](int column) { return at(column).load(0); },
                      [&](int column, uint32_t x) { at(column).store(0, x); }, exists, j, norm, statistics, rope);
}

// As rows_statistics; without a norm those that leave a row as it is. Collective.
template <int LANES, int R, int N>
DEVICE void statistics_or_none(RowStatistics (&statistics)[R], const Vec16 (&x)[R][N], int j, int head_dim,
                               const HeadNorm& norm)
{
    if (norm.kind != NORM_NONE) return rows_statistics<LANES>(statistics, x, j, head_dim, norm);
    UNROLL
    for (int r = 0; r < R; r++) statistics[r] = RowStatistics{0.0f, 1.0f};
}
