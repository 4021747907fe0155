// Rotary position embedding: rows of q and k are rotated after their norm, before they are rounded; rows of their
// gradients are rotated back before they go through the norm.
//
// Two columns are a pair, a neighbour and the next ("interleaved") or one of the first half of a head and one as far
// in the second ("halves"). Pair (a, b) becomes (a cos - b sin, b cos + a sin) with the angle of its token, the same in all
// heads. Four aligned columns have their partners among themselves, or in four aligned columns: heads are multiples of 8.
//
// Whoever has a row spread over lanes takes partners from where the row came from, not from the other lanes.
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

    // First of the four columns that are the partners of those from `column`, a multiple of 4, on.
    DEVICE int partner(int column) const
    {
        if (kind == ROPE_INTERLEAVED) return column;
        return 2 * column < head_dim ? column + head_dim / 2 : column - head_dim / 2;
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

// Four columns of a row as they lie in memory.
struct alignas(8) Four {
    uint32_t word[2];
};

DEVICE Four load_columns(const Element* columns)
{
    return Global<const Four>(reinterpret_cast<const Four*>(columns)).load(0);
}

// What four columns are multiplied by, and what their partners are.
struct Rotation {
    float own[4];
    float other[4];

    // Of columns `column`.. of the first row of `rope`; `back` undoes it.
    DEVICE Rotation(const Rope& rope, int column, bool back)
    {
        const Global<const float> table(rope.table);
        const bool interleaved = rope.kind == ROPE_INTERLEAVED;
        const bool second = !interleaved && 2 * column >= rope.head_dim;
        const int first = interleaved ? column : 2 * (second ? column - rope.head_dim / 2 : column);
        const Vec16 two = table.load_16(first);
        const Vec16 next = interleaved ? two : table.load_16(first + 4);
        UNROLL
        for (int c = 0; c < 4; c++) {
            // Two neighbours have one angle, or each column has its own.
            const Vec16& angles = c < 2 ? two : next;
            own[c] = bits_to_float(interleaved ? two.word[c / 2 * 2] : angles.word[c % 2 * 2]);
            const float sine = bits_to_float(interleaved ? two.word[c / 2 * 2 + 1] : angles.word[c % 2 * 2 + 1]);
            other[c] = (interleaved ? c % 2 != 0 : second) != back ? sine : -sine;
        }
    }

    // Four columns and their partners, rotated.
    DEVICE void apply(float (&x)[4], const float (&partner)[4], bool interleaved) const
    {
        float y[4];
        UNROLL
        for (int c = 0; c < 4; c++)
            y[c] = ptx::fused_multiply_add(interleaved ? x[c ^ 1] : partner[c], other[c], x[c] * own[c]);
        UNROLL
        for (int c = 0; c < 4; c++) x[c] = y[c];
    }
};

// Normalises columns `column`.. as normalise_four does, but for the rounding.
DEVICE void normal_four(float (&y)[4], const Four& x, int column, const HeadNorm& norm, RowStatistics row)
{
    float gain[4];
    float bias[4];
    load_four(gain, norm.gain, column, 1.0f);
    load_four(bias, norm.bias, column, 0.0f);
    UNROLL
    for (int c = 0; c < 4; c++) {
        const float value = c % 2 ? high(x.word[c / 2]) : low(x.word[c / 2]);
        y[c] = ptx::fused_multiply_add((value - row.mean) * row.rstd, gain[c], bias[c]);
    }
}

// Normalises and rotates the chunk that begins with column `column` of the first row of `rope`; four(c) are the columns
// from c on as they were read.
template <class Read>
DEVICE void rotate_chunk(Vec16& x, int column, Read four, const HeadNorm& norm, RowStatistics row, const Rope& rope)
{
    UNROLL
    for (int w = 0; w < 4; w += 2) {
        const int first = column + 2 * w;
        float y[4];
        float partner[4] = {};
        normal_four(y, Four{{x.word[w], x.word[w + 1]}}, first, norm, row);
        const int other = rope.partner(first);
        if (other != first) normal_four(partner, four(other), other, norm, row);
        Rotation(rope, first, false).apply(y, partner, other == first);
        x.word[w] = pack_pair(y[0], y[1]);
        x.word[w + 1] = pack_pair(y[2], y[3]);
    }
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
