// Gradients rotated back while they lie as mma and wgmma leave them: a quad of lanes has a row, of chunk c of which lane j
// has columns 8 c + 2 j and the next one. Pairs of neighbours are in one lane; so are the halves of a head of a multiple of
// 16 columns, else they lie two lanes apart.
#pragma once

#include "backward_quads.cuh"

namespace attention_backward {

// A number that is known beforehand.
template <int N>
struct Constant {
    DEVICE constexpr operator int() const
    {
        return N;
    }
};

// Cosine and sine of a pair of a row of the rotation; those of no angle where the row does not exist.
DEVICE FloatPair angle_of(const Rope& rope, int row, int length, int pair)
{
    if (row >= length) return FloatPair{1.0f, 0.0f};
    return Global<const FloatPair>(reinterpret_cast<const FloatPair*>(rope.from(row).table)).load(pair);
}

// Rotates this warp's 16 rows from `row` on back, those below `length`; get(c) and put(c, four) are what this lane has of
// chunk c. `half` is half of a head, in columns; where it is a Constant, chunks may be in registers. Collective.
template <class Get, class Put, class Half>
DEVICE void rotate_quads_back(Get get, Put put, Half half, int row, int length, const Rope& rope)
{
    const int j = ptx::lane_id() % 4;
    const int r = row + ptx::lane_id() / 4;
    const int apart = half / 8;
    if (rope.kind == ROPE_INTERLEAVED) {
        UNROLL
        for (int c = 0; c < half / 4; c++) {
            FragmentFour x = get(c);
            UNROLL
            for (int i = 0; i < 4; i += 2)
                turn(x.x[i], x.x[i + 1], angle_of(rope, r + 4 * i, length, 4 * c + j), true);
            put(c, x);
        }
        return;
    }
    if (half % 8 == 0) {
        UNROLL
        for (int c = 0; c < apart; c++) {
            FragmentFour x = get(c);
            FragmentFour y = get(c + apart);
            UNROLL
            for (int i = 0; i < 4; i++)
                turn(x.x[i], y.x[i], angle_of(rope, r + i / 2 * 8, length, 8 * c + 2 * j + i % 2), true);
            put(c, x);
            put(c + apart, y);
        }
        return;
    }
    // Lanes 0 and 1 have chunk `left`, lanes 2 and 3 chunk `right`, the ones the partners of the others.
    const bool is_right = j >= 2;
    auto exchange = [&](int left, int right, bool is_first, int pair) {
        const FragmentFour own = is_right ? get(right) : get(left);
        FragmentFour result;
        UNROLL
        for (int i = 0; i < 4; i++) {
            const FloatPair angle = angle_of(rope, r + i / 2 * 8, length, pair + i % 2);
            float x = own.x[i];
            float y = ptx::shuffle_xor(x, 2);
            if (is_first)
                turn(x, y, angle, true);
            else
                turn(y, x, angle, true);
            result.x[i] = x;
        }
        if (is_right)
            put(right, result);
        else
            put(left, result);
    };
    // The first half ends in the middle of chunk `apart`.
    UNROLL
    for (int c = 0; c <= apart; c++) exchange(c, c + apart, !is_right, 8 * c + 2 * (j % 2));
    UNROLL
    for (int c = 0; c < apart; c++) exchange(c + apart + 1, c, is_right, 8 * c + 4 + 2 * (j % 2));
}

// The same with all chunks in registers, four of each. DIM is the widest head that is looked for, first the width of the
// kernel; the narrowest is that behind the next smaller width of src/kernels/attention/instances.rs. Collective.
template <int DIM, int N>
DEVICE void rotate_registers_back(float (&x)[N], int row, int length, const Rope& rope)
{
    constexpr int D = 2 * N;
    constexpr int NARROWEST = D == 64 ? 8 : D == 128 ? 120 : D;
    if constexpr (DIM > NARROWEST) {
        if (rope.head_dim < DIM) return rotate_registers_back<DIM - 8>(x, row, length, rope);
    }
    auto get = [&](int c) { return FragmentFour{{x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]}}; };
    auto put = [&](int c, const FragmentFour& four) {
        UNROLL
        for (int i = 0; i < 4; i++) x[4 * c + i] = four.x[i];
    };
    rotate_quads_back(get, put, Constant<DIM / 2>{}, row, length, rope);
}

} // namespace attention_backward
