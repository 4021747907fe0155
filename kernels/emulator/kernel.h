// Twin of common/kernel.cuh: a kernel as a plain function that each emulated thread runs.
#pragma once

#include "machine.h"

#include <math.h>

namespace emulator {

// What the launch bounds leave to a thread, which is what a kernel that shifts registers between warpgroups has.
constexpr uint32_t registers_of(uint32_t threads, uint32_t min_blocks)
{
    uint32_t registers = 65536 / (threads * min_blocks) / 8 * 8;
    return registers < 256 ? registers : 256;
}

} // namespace emulator

// The built-in variables of CUDA.
#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::current->block->index)
#define gridDim (::emulator::current->block->launch->arguments.grid)
#define blockDim (::emulator::current->block->launch->block_size)

#define TRENCADIS_KERNEL(name, threads, min_blocks, Params, ...)                       \
    static void emulator_run_##name(const void* params)                                \
    {                                                                                  \
        __VA_ARGS__(*static_cast<const Params*>(params));                              \
    }                                                                                  \
    static const emulator::Kernel emulator_kernel_##name = {                           \
        #name, emulator_run_##name, sizeof(Params), threads, emulator::registers_of(threads, min_blocks)};

// The overloads that CUDA has in the global namespace.
inline int min(int a, int b)
{
    return a < b ? a : b;
}

inline int max(int a, int b)
{
    return a > b ? a : b;
}

inline uint32_t min(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

inline uint32_t max(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

inline int64_t min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

inline int64_t max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

inline float min(float a, float b)
{
    return fminf(a, b);
}

inline float max(float a, float b)
{
    return fmaxf(a, b);
}
