// Products that are rounded by themselves. The compiler fuses a plain product with the sum that follows it, which rounds
// once where the host rounds twice.
#pragma once

#include "kernel.cuh"

namespace ptx {

// a b, rounded to nearest.
DEVICE float rounded_product(float a, float b)
{
#ifdef TRENCADIS_EMULATOR
    // Compiled without fusing.
    return a * b;
#else
    return __fmul_rn(a, b);
#endif
}

} // namespace ptx
