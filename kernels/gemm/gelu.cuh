// GELU and its slope, to the precision of bf16, with one instruction of the special-function unit each: that
// unit handles 16 lanes a cycle where the multipliers handle 128, and an epilogue waits for it.
//
// Both formulas are x T(x) with T(-x) = 1 - T(x): T is the normal distribution function Phi, or
// (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (Hendrycks & Gimpel 2016). So the lower tail says all. With
// a = |x|, held at 6 where what is left of the tail no longer counts (a T(-a) < 6e-9):
//
//   gelu(x)  = max(x, 0) - a T(-a),   T(-a) = 2^q(a)
//   gelu'(x) = g for x < 0, 1 - g for x >= 0,   g = T(-a) r(a)
//
// q and r are polynomials fitted for this purpose on [0, 6]: q minimax in the relative error of the tail (erf:
// 7e-6; tanh, weighted towards 0: 2e-4 up to 3, 1e-3 up to 5), r in the error of g (erf 3e-6, tanh 3e-5), all as
// evaluated in f32. A formula is thus a row of coefficients, not code of its own.
#pragma once

#include "../common/ptx.cuh"

// Which formula; the numbers are those of the constant arguments.
enum Gelu : int {
    GELU_NONE = 0,
    GELU_ERF = 1,
    GELU_TANH = 2,
};

// Coefficients from the highest power down.
struct GeluCurve {
    float q[8];
    float r[6];
};

DEVICE GeluCurve gelu_curve(int kind)
{
    constexpr float erf_q[8] = {-1.83483163e-6f, 6.15986864e-5f, -9.30527816e-4f, 8.50790189e-3f,
                                -5.39600896e-2f, -0.458464376f,  -1.15125105f,    -0.999995294f};
    constexpr float erf_r[6] = {-1.68397729e-3f, 1.98905064e-2f, -0.108237606f,
                                -0.637358623f,   -0.797725969f,  0.999995277f};
    constexpr float tanh_q[8] = {-4.73758963e-5f, 1.08090583e-3f, -9.09590896e-3f, 2.93097291e-2f,
                                 -7.63665379e-2f, -0.445906165f,  -1.15375024f,    -0.9999144f};
    constexpr float tanh_r[6] = {-7.16946141e-3f, 2.60146229e-2f, -0.102060176f,
                                 -0.642603096f,   -0.796404566f,  0.999950323f};
    GeluCurve curve;
    UNROLL
    for (int i = 0; i < 8; i++) curve.q[i] = kind == GELU_ERF ? erf_q[i] : tanh_q[i];
    UNROLL
    for (int i = 0; i < 6; i++) curve.r[i] = kind == GELU_ERF ? erf_r[i] : tanh_r[i];
    return curve;
}

template <int N>
DEVICE float gelu_polynomial(const float (&c)[N], float a)
{
    float y = c[0];
    UNROLL
    for (int i = 1; i < N; i++) y = ptx::fused_multiply_add(y, a, c[i]);
    return y;
}

// |x|, at most 6.
DEVICE float gelu_distance(float x)
{
    float a = x < 0.0f ? -x : x;
    return a < 6.0f ? a : 6.0f;
}

DEVICE float gelu(const GeluCurve& curve, float x)
{
    float a = gelu_distance(x);
    float positive = x < 0.0f ? 0.0f : x; // NaN stays NaN
    return ptx::fused_multiply_add(-a, ptx::exp2(gelu_polynomial(curve.q, a)), positive);
}

DEVICE float gelu_slope(const GeluCurve& curve, float x)
{
    float a = gelu_distance(x);
    float g = ptx::exp2(gelu_polynomial(curve.q, a)) * gelu_polynomial(curve.r, a);
    return x < 0.0f ? g : 1.0f - g;
}
