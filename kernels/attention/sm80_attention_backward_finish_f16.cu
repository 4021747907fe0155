// sm80_attention_backward_finish.cu of f16.
#include "../common/f16.cuh"

namespace f16_kernels {
#include "sm80_attention_backward_finish.cu"
}

using namespace f16_kernels;
