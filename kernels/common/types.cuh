// bf16 and f16 and their conversions; vectors of 16 bytes.
#pragma once

#include "kernel.cuh"

#include <string.h>

// The upper half of an f32. Arithmetic happens in f32.
struct bf16 {
    uint16_t bits;
};

// The 16-bit number of IEEE 754.
struct f16 {
    uint16_t bits;
};

template <class E>
constexpr bool is_f16 = false;

template <>
constexpr bool is_f16<f16> = true;

// 16 bytes, the widest access of a thread: 8 bf16 or 4 f32.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

DEVICE float bits_to_float(uint32_t bits)
{
#ifdef TRENCADIS_EMULATOR
    float x;
    memcpy(&x, &bits, 4);
    return x;
#else
    return __uint_as_float(bits);
#endif
}

DEVICE uint32_t float_to_bits(float x)
{
#ifdef TRENCADIS_EMULATOR
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
#else
    return __float_as_uint(x);
#endif
}

// Bits that are set.
DEVICE uint32_t count_bits(uint32_t x)
{
#ifdef TRENCADIS_EMULATOR
    return uint32_t(__builtin_popcount(x));
#else
    return uint32_t(__popc(x));
#endif
}

DEVICE float to_float(bf16 x)
{
    return bits_to_float(uint32_t(x.bits) << 16);
}

DEVICE float to_float(f16 x)
{
#ifdef TRENCADIS_EMULATOR
    const uint32_t bits = uint32_t(x.bits & 0x8000) << 16 | uint32_t(x.bits & 0x7fff) << 13;
    if ((x.bits & 0x7c00) == 0x7c00) return bits_to_float(bits | 0x7f800000u);
    // The exponents of f32 begin 112 lower; the product makes subnormal numbers normal, too.
    return bits_to_float(bits) * 0x1p112f;
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

// The lower element of a packed pair, the one at the lower address.
DEVICE float low(uint32_t pair)
{
    return bits_to_float(pair << 16);
}

DEVICE float high(uint32_t pair)
{
    return bits_to_float(pair & 0xffff0000u);
}

// Rounds to nearest, ties to even; NaN becomes the canonical NaN 0x7fff, as the hardware does.
DEVICE uint32_t pack_bf16(float lower, float upper)
{
#ifdef TRENCADIS_EMULATOR
    auto round = [](float x) -> uint32_t {
        uint32_t bits = float_to_bits(x);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
        return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    };
    return round(lower) | (round(upper) << 16);
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
#endif
}

// The same for f16: what rounds to 2^16 or more is infinite.
DEVICE uint32_t pack_f16(float lower, float upper)
{
#ifdef TRENCADIS_EMULATOR
    auto round = [](float x) -> uint32_t {
        const uint32_t sign = float_to_bits(x) >> 16 & 0x8000u;
        const uint32_t magnitude = float_to_bits(x) & 0x7fffffffu;
        if (magnitude > 0x7f800000u) return 0x7fff;
        // Below 2^-14, multiples of 2^-24: those are the last places of 1/2, whose addition rounds to them.
        const float half = 0.5f;
        if (magnitude < 0x38800000u)
            return sign | (float_to_bits(bits_to_float(magnitude) + half) - float_to_bits(half));
        // Exponents begin 112 lower.
        const uint32_t rounded = ((magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13) - (112u << 10);
        return sign | (rounded < 0x7c00u ? rounded : 0x7c00u);
    };
    return round(lower) | (round(upper) << 16);
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
#endif
}

DEVICE bf16 to_bf16(float x)
{
    return bf16{uint16_t(pack_bf16(x, 0.0f))};
}

// What sources that are compiled for f16 as well are written in: there it is f16, and low() and high() are of f16.
using Element = bf16;

DEVICE uint32_t pack_pair(float lower, float upper)
{
    return pack_bf16(lower, upper);
}

DEVICE constexpr int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

DEVICE constexpr int round_up(int a, int b)
{
    return ceil_div(a, b) * b;
}
