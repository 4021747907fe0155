// sm90_attention_forward.cu of f16.
#include "../common/f16.cuh"

namespace f16_kernels {
#include "sm90_attention_forward.cu"
}

using namespace f16_kernels;
