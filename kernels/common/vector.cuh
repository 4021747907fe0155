// Eight columns at a time: 16 bytes of bf16 beside f32 parameters, as the kernels that work on rows hold them.
#pragma once

#include "view.cuh"

DEVICE Vec16 zero_vector()
{
    return Vec16{{0, 0, 0, 0}};
}

DEVICE void unpack_8(float (&x)[8], const Vec16& packed)
{
    UNROLL
    for (int i = 0; i < 4; i++) {
        x[2 * i] = low(packed.word[i]);
        x[2 * i + 1] = high(packed.word[i]);
    }
}

DEVICE Vec16 pack_8(const float (&x)[8])
{
    Vec16 packed;
    UNROLL
    for (int i = 0; i < 4; i++) packed.word[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    return packed;
}

// Eight elements of a parameter from `column`, a multiple of 8; `missing` where there is no parameter.
DEVICE void load_8(float (&x)[8], const float* parameter, int column, float missing)
{
    if (parameter == nullptr) {
        UNROLL
        for (int i = 0; i < 8; i++) x[i] = missing;
        return;
    }
    Global<const float> memory(parameter);
    UNROLL
    for (int half = 0; half < 2; half++) {
        Vec16 packed = memory.load_16(column + 4 * half);
        UNROLL
        for (int i = 0; i < 4; i++) x[4 * half + i] = bits_to_float(packed.word[i]);
    }
}

// Rows that hold anything: *live, within 0..rows whatever it says; all where it is null.
DEVICE int live_rows(const int* live, int rows)
{
    if (live == nullptr) return rows;
    int given = Global<const int>(live).load(0);
    return given < 0 ? 0 : given < rows ? given : rows;
}
