// Makes f16 of Element. The source of f16 is that of bf16 once more, in a namespace of its own:
//
//   #include "../common/f16.cuh"
//
//   namespace f16_kernels {
//   #include "sm80_attention_forward.cu"
//   }
//   using namespace f16_kernels;
//
// A namespace, since functions of the same name and parameters in two objects of the emulator are one to the linker,
// which keeps either. What such a source includes and is no part of it, is included here, in the global namespace, where
// both share it: there everything that depends on the element has it as a type or template argument.
#pragma once

#include "ring.cuh"
#include "wgmma.cuh"

namespace f16_kernels {

using Element = f16;

DEVICE float low(uint32_t pair)
{
    return to_float(f16{uint16_t(pair)});
}

DEVICE float high(uint32_t pair)
{
    return to_float(f16{uint16_t(pair >> 16)});
}

DEVICE uint32_t pack_pair(float lower, float upper)
{
    return pack_f16(lower, upper);
}

// A source of both elements that names one of them is wrong.
void pack_bf16(float, float) = delete;
struct bf16;

} // namespace f16_kernels
