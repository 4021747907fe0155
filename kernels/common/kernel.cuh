// How a kernel is declared. The instantiations are written by the build from src/kernels/registry.rs:
// for each entry it emits TRENCADIS_KERNEL(name, threads, min_blocks, Params, body), where `body` is a
// __device__ function (template) that takes the constant arguments by reference.
//
// A kernel file holds device code only and is compiled twice: by nvcc, and by a C++17 host compiler with
// TRENCADIS_EMULATOR defined, where every wrapper of ptx.cuh and view.cuh runs on the emulator.
#pragma once

#include <stdint.h>

#ifdef TRENCADIS_EMULATOR
#include "../emulator/kernel.h"
#else

#define TRENCADIS_KERNEL(name, threads, min_blocks, Params, ...)                                                 \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const __grid_constant__ Params params) \
    {                                                                                                             \
        __VA_ARGS__(params);                                                                                      \
    }

#endif

// Inlined wherever it is called, so that arrays passed by reference stay in registers.
#ifdef TRENCADIS_EMULATOR
#define DEVICE inline
#define UNROLL
#define ROLLED
#else
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
// A loop whose body stands once: copies of it would need more registers.
#define ROLLED _Pragma("unroll 1")
#endif
