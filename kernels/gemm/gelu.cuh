// GELU and its slope, exact to what bf16 can tell, on few instructions of the special-function unit: it
// handles 16 lanes a cycle where the multipliers handle 128, and an epilogue waits for it.
//
// With the error function (GELU as published): Phi(-a) = 2^q(a) for a >= 0, where q is a polynomial of degree
// 6 made for this purpose: relative error of 2^q below 4.5e-5 on [0, 6], which the symmetry
// Phi(a) = 1 - Phi(-a) carries over to all x:
//
//   gelu(x)  = max(x, 0) - a Phi(-a)                                                       a = |x|
//   gelu'(x) = g for x < 0, 1 - g for x >= 0, with g = Phi(-a) - a phi(a)
//
// Beyond 6 q falls further, more slowly than it should, where Phi(-a) < 1e-9 no longer counts; a is held at
// 12, past which the polynomial would turn.
//
// By tanh (Hendrycks & Gimpel 2016): with u = sqrt(2 / pi) (x + 0.044715 x^3) and s = 1 / (1 + exp(-2 u)),
//
//   gelu(x)  = x s                      since (1 + tanh u) / 2 = s
//   gelu'(x) = s + 2 x u' s (1 - s)
#pragma once

#include "../common/ptx.cuh"

// Which formula; the numbers are those of the constant arguments.
enum Gelu : int {
    GELU_NONE = 0,
    GELU_ERF = 1,
    GELU_TANH = 2,
};

// Phi(-a) for a in [0, 12].
DEVICE float gelu_tail(float a)
{
    float q = 2.29900588e-5f;
    q = ptx::fused_multiply_add(q, a, -6.11100178e-4f);
    q = ptx::fused_multiply_add(q, a, 7.19556817e-3f);
    q = ptx::fused_multiply_add(q, a, -5.11853517e-2f);
    q = ptx::fused_multiply_add(q, a, -4.61271890e-1f);
    q = ptx::fused_multiply_add(q, a, -1.15017429f);
    q = ptx::fused_multiply_add(q, a, -1.00006478f);
    return ptx::exp2(q);
}

// |x|, at most 12.
DEVICE float gelu_distance(float x)
{
    float a = x < 0.0f ? -x : x;
    return a < 12.0f ? a : 12.0f;
}

// s of the formula by tanh, from x and x^2: 2 u log2(e) = x (2.3022082 + 0.10294324 x^2).
DEVICE float gelu_sigmoid(float x, float x2)
{
    return ptx::reciprocal(1.0f + ptx::exp2(-x * ptx::fused_multiply_add(x2, 0.10294324f, 2.3022082f)));
}

DEVICE float gelu_erf(float x)
{
    float a = gelu_distance(x);
    float positive = x < 0.0f ? 0.0f : x; // NaN stays NaN
    return ptx::fused_multiply_add(-a, gelu_tail(a), positive);
}

DEVICE float gelu_tanh(float x)
{
    return x * gelu_sigmoid(x, x * x);
}

DEVICE float gelu_erf_slope(float x)
{
    float a = gelu_distance(x);
    // phi(a) = 2^(-a^2 log2(e) / 2 - log2(sqrt(2 pi)))
    float density = ptx::exp2(ptx::fused_multiply_add(a * a, -0.72134752f, -1.3257481f));
    float g = ptx::fused_multiply_add(-a, density, gelu_tail(a));
    return x < 0.0f ? g : 1.0f - g;
}

DEVICE float gelu_tanh_slope(float x)
{
    float x2 = x * x;
    float s = gelu_sigmoid(x, x2);
    // 2 u' = 1.5957691 (1 + 0.134145 x^2)
    float inner = x * ptx::fused_multiply_add(x2, 0.21406445f, 1.5957691f);
    return ptx::fused_multiply_add(inner * s, 1.0f - s, s);
}
