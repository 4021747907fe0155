// What a token reads of the position tables.
//
// A coordinate is one axis of a token's place in the patch grid of its image. Absolute: it reads the table row of
// its own number, with weight 1. Resampled to an axis of L patches: it reads the rows of filter (L, coordinate)
// of the bank, which holds the filters of all lengths, so that nothing of it changes from step to step:
//   filter (L, i), i < L: taps[start[s]] to taps[start[s + 1]] with s = L (L - 1) / 2 + i
// A grid that is the table's reads it as it is, whatever the bank holds for its sides.
#pragma once

#include "../common/packed.cuh"

// A table row and its weight.
struct alignas(8) PositionTap {
    uint32_t row;
    float weight;
};

// Filters of one axis; null pointers where coordinates are absolute.
struct PositionBank {
    const int* start;
    const PositionTap* taps;
};

// Where the tokens of a batch stand. Constants of a recipe but for what the pointers lead to.
struct PositionPlaces {
    const uint16_t* positions; // [tokens, 2]
    const uint16_t* grids;     // [images, 2]
    const int* cu_seqlens;     // [images + 1]
    PositionBank bank[2];      // of the rows, of the columns
    int tokens;
    int images;
    int rows;                  // of the table, or of the row axis
    int columns;
    int longest;               // L of the bank's last filters
    int aspect;                // 1: both axes are resampled to the longer side
    int flat;                  // 1: the table's rows are numbered in the order of the image's own grid
};

namespace position {

// Rows that are read on one axis: `count` taps of the bank from tap `first` on, or the row `first` where count
// is 0.
struct Span {
    int first;
    int count;
};

// What stands at a token row.
enum Place : int { place_dead = -2, place_prefix = -1 };

struct Spans {
    Span axis[2];

    // No patch: a prefix token, or a row after the last image.
    DEVICE bool empty() const
    {
        return axis[0].count < 0;
    }
};

// One axis of a coordinate. Bad numbers are held within the table and the bank.
DEVICE Span span_of(const PositionBank& bank, int coordinate, int table, int length, int longest)
{
    Span span = {min(coordinate, table - 1), 0};
    if (bank.start == nullptr) return span;
    length = min(max(length, 1), longest);
    int64_t slot = int64_t(length) * (length - 1) / 2 + min(coordinate, length - 1);
    Global<const int> start(bank.start);
    span.first = start.load(slot);
    span.count = start.load(slot + 1) - span.first;
    return span;
}

// Both axes of token row `token`; `live` rows hold tokens. `image` as for advance_image.
DEVICE Spans spans_of(const PositionPlaces& p, int token, int live, int& image)
{
    Spans spans;
    spans.axis[0] = {0, token < live ? place_prefix : place_dead};
    spans.axis[1] = {0, 0};
    if (token >= live) return spans;
    uint32_t pair = Global<const uint32_t>(reinterpret_cast<const uint32_t*>(p.positions)).load(token);
    if (pair == prefix_position) return spans;
    int at[2] = {int(pair & 0xffff), int(pair >> 16)};
    int grid[2] = {1, 1};
    if (p.flat || p.bank[0].start != nullptr) {
        advance_image(p.cu_seqlens, p.images, token, image);
        uint32_t sides = Global<const uint32_t>(reinterpret_cast<const uint32_t*>(p.grids)).load(image);
        grid[0] = int(sides & 0xffff);
        grid[1] = int(sides >> 16);
    }
    if (p.flat) {
        spans.axis[0] = {min(at[0] * grid[1] + at[1], p.rows * p.columns - 1), 0};
        return spans;
    }
    int longer = max(grid[0], grid[1]);
    int sides[2] = {p.aspect ? longer : grid[0], p.aspect ? longer : grid[1]};
    if (sides[0] == p.rows && sides[1] == p.columns) {
        spans.axis[0].first = min(at[0], p.rows - 1);
        spans.axis[1].first = min(at[1], p.columns - 1);
        spans.axis[0].count = 0;
        return spans;
    }
    spans.axis[0] = span_of(p.bank[0], at[0], p.rows, sides[0], p.longest);
    spans.axis[1] = span_of(p.bank[1], at[1], p.columns, sides[1], p.longest);
    return spans;
}

// The tap number `i` of a span.
DEVICE PositionTap tap_at(const PositionBank& bank, const Span& span, int i)
{
    if (span.count == 0) return PositionTap{uint32_t(span.first), 1.0f};
    return Global<const PositionTap>(bank.taps).load(span.first + i);
}

// Coordinates of a token for Fourier features: indices, or indices over the image's sides. False for rows of no
// patch.
DEVICE bool point_of(const PositionPlaces& p, int token, int live, int fractional, int& image, float& y, float& x)
{
    y = 0.0f;
    x = 0.0f;
    if (token >= live) return false;
    uint32_t pair = Global<const uint32_t>(reinterpret_cast<const uint32_t*>(p.positions)).load(token);
    if (pair == prefix_position) return false;
    y = float(pair & 0xffff);
    x = float(pair >> 16);
    if (!fractional) return true;
    advance_image(p.cu_seqlens, p.images, token, image);
    uint32_t sides = Global<const uint32_t>(reinterpret_cast<const uint32_t*>(p.grids)).load(image);
    int rows = int(sides & 0xffff);
    int columns = int(sides >> 16);
    int longer = max(rows, columns);
    y /= float(max(p.aspect ? longer : rows, 1));
    x /= float(max(p.aspect ? longer : columns, 1));
    return true;
}

// Nearest integer, ties to even, |x| < 2^22: the sum has no bits after the point.
DEVICE float nearest(float x)
{
    constexpr float shift = 12582912.0f;
    return (x + shift) - shift;
}

// sin(2 pi (x + shift)), `shift` 0 or 1/4: whole turns and then half turns are taken off exactly, and the Taylor
// series serves the quarter turn to either side that remains. Absolute error below 4e-7.
DEVICE float sin_turns(float x, float shift)
{
    float turn = x - nearest(x) + shift;
    turn -= nearest(turn);
    float half = nearest(2.0f * turn);
    float z = (turn - 0.5f * half) * 6.2831853f;
    float z2 = z * z;
    float sum = -2.5052108e-8f;
    sum = ptx::fused_multiply_add(sum, z2, 2.7557319e-6f);
    sum = ptx::fused_multiply_add(sum, z2, -1.984127e-4f);
    sum = ptx::fused_multiply_add(sum, z2, 8.333333e-3f);
    sum = ptx::fused_multiply_add(sum, z2, -1.6666667e-1f);
    sum = ptx::fused_multiply_add(sum, z2, 1.0f);
    return half == 0.0f ? z * sum : -z * sum;
}

} // namespace position
