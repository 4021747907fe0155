// out = x + keep scale branch: scale is LayerScale, one f32 a column, keep the factor of stochastic depth of the
// row's image. One formula for the kernel of its own and for the one fused into the norm that follows, so that
// both give the same bits.
#pragma once

#include "../common/vector.cuh"

// Rounded to bf16.
DEVICE Vec16 add_branch(const Vec16& x, const Vec16& branch, const float (&scale)[8], float keep)
{
    float sum[8], added[8];
    unpack_8(sum, x);
    unpack_8(added, branch);
    UNROLL
    for (int i = 0; i < 8; i++) sum[i] = ptx::fused_multiply_add(keep * scale[i], added[i], sum[i]);
    return pack_8(sum);
}

// The gradient of branch, rounded to bf16, and that of scale, added to dscale, from the gradient of out.
DEVICE Vec16 branch_gradient(float (&dscale)[8], const Vec16& dout, const Vec16& branch, const float (&scale)[8],
                             float keep)
{
    float grad[8], added[8];
    unpack_8(grad, dout);
    unpack_8(added, branch);
    UNROLL
    for (int i = 0; i < 8; i++) {
        dscale[i] = ptx::fused_multiply_add(keep * grad[i], added[i], dscale[i]);
        grad[i] = keep * scale[i] * grad[i];
    }
    return pack_8(grad);
}

// Factor of a row; 1 without stochastic depth.
DEVICE float row_keep(const float* keep, int row)
{
    return keep == nullptr ? 1.0f : Global<const float>(keep).load(row);
}
