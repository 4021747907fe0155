// Constants and functions of f32 that no instruction computes.
#pragma once

#include "view.cuh"

namespace numbers {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

DEVICE float infinity()
{
    return bits_to_float(0x7f800000u);
}

DEVICE float not_a_number()
{
    return bits_to_float(0x7fc00000u);
}

// ln(1 + x) for 0 <= x <= 1: x times a polynomial for ln(1 + x) / x, interpolated at Chebyshev's nodes; relative
// error 2e-7, where a logarithm of the rounded 1 + x would lose what x contributes.
DEVICE float log_1p(float x)
{
    constexpr float coefficients[9] = {1.0f,          -0.499995023f, 0.333192706f,   -0.248443693f, 0.191114306f,
                                       -0.136747703f, 0.0783616677f, -0.0295885075f, 0.00525345793f};
    float sum = coefficients[8];
    UNROLL
    for (int i = 7; i >= 0; i--) sum = ptx::fused_multiply_add(sum, x, coefficients[i]);
    return x * sum;
}

} // namespace numbers
