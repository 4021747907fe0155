// bf16 and its conversions; vectors of 16 bytes.
#pragma once

#include "kernel.cuh"

#include <string.h>

// The upper half of an f32. Arithmetic happens in f32.
struct bf16 {
    uint16_t bits;
};

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

DEVICE bf16 to_bf16(float x)
{
    return bf16{uint16_t(pack_bf16(x, 0.0f))};
}

DEVICE constexpr int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

DEVICE constexpr int round_up(int a, int b)
{
    return ceil_div(a, b) * b;
}
