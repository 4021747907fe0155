// The packed batch as kernels see it: which rows hold tokens, which image a row belongs to; rows of bf16 in
// registers, eight elements to 16 bytes.
#pragma once

#include "view.cuh"

// Position of a prefix token (cls, registers): row and column 0xffff.
constexpr uint32_t prefix_position = 0xffffffffu;

// *live held within 0..rows: whatever it says, no row beyond the tensors is touched. Null: all rows.
DEVICE int live_rows(const int* live, int rows)
{
    if (live == nullptr) return rows;
    return min(max(Global<const int>(live).load(0), 0), rows);
}

// Start of image i, held within 0..tokens.
DEVICE int image_start(const int* cu_seqlens, int i, int tokens)
{
    return live_rows(cu_seqlens + i, tokens);
}

// Image of a token row below cu_seqlens[images]: the last one that begins at or before it.
DEVICE int image_of(const int* cu_seqlens, int images, int token)
{
    Global<const int> starts(cu_seqlens);
    int low = 0;
    int high = images;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (starts.load(middle) <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

DEVICE void unpack_bf16(float (&x)[8], const Vec16& packed)
{
    UNROLL
    for (int i = 0; i < 4; i++) {
        x[2 * i] = low(packed.word[i]);
        x[2 * i + 1] = high(packed.word[i]);
    }
}

DEVICE Vec16 pack_bf16(const float (&x)[8])
{
    Vec16 packed;
    UNROLL
    for (int i = 0; i < 4; i++) packed.word[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    return packed;
}

// Eight f32 from element i, which is 16-byte aligned.
DEVICE void load_8(float (&x)[8], Global<const float> source, int64_t i)
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        Vec16 packed = source.load_16(i + 4 * half);
        UNROLL
        for (int j = 0; j < 4; j++) x[4 * half + j] = bits_to_float(packed.word[j]);
    }
}

DEVICE Vec16 zeros_16()
{
    return Vec16{{0, 0, 0, 0}};
}
