// Every instruction that C++ has no word for, behind a named wrapper. On the emulator the same names run
// on its threads (kernels/emulator/ptx.h); a wrapper that is missing there does not compile.
//
// Collectives (marked so) must be reached by all 32 lanes of the warp, or by all named threads.
#pragma once

#include "types.cuh"

#ifdef TRENCADIS_EMULATOR
#include "../emulator/ptx.h"
#else

namespace ptx {

// Shared memory is addressed by 32-bit byte addresses. All of it is dynamic and begins here.
DEVICE uint32_t shared_base()
{
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    return uint32_t(__cvta_generic_to_shared(dynamic_shared));
}

DEVICE uint32_t lane_id()
{
    return threadIdx.x % 32;
}

// Same in all lanes, and known to be: the compiler may keep it in a uniform register.
DEVICE uint32_t warp_id()
{
    return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}

// x, whose origin the compiler does not see from here on: what is computed from it in a loop is computed there,
// not before the loop, where it would keep a register.
DEVICE int unknown(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

// The same for an address in global memory, which the compiler still knows to be one: it reads what lies there
// with the instructions for global memory, not with the generic ones.
template <class T>
DEVICE T* unknown(T* x)
{
    size_t address = __cvta_generic_to_global(x);
    asm volatile("" : "+l"(address));
    return static_cast<T*>(__cvta_global_to_generic(address));
}

// Barrier of the whole block. Collective.
DEVICE void barrier()
{
    __syncthreads();
}

// Named barrier `id` (1 to 15) of `threads` threads, a multiple of 32. Collective.
DEVICE void barrier(uint32_t id, uint32_t threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders the memory accesses of the lanes of a warp. Collective.
DEVICE void warp_sync()
{
    __syncwarp();
}

// Value of lane `lane ^ mask`. Collective.
DEVICE float shuffle_xor(float x, uint32_t mask)
{
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

DEVICE uint32_t shuffle_xor(uint32_t x, uint32_t mask)
{
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Value of lane `lane`. Collective.
DEVICE float shuffle(float x, uint32_t lane)
{
    return __shfl_sync(0xffffffffu, x, lane);
}

DEVICE uint32_t shuffle(uint32_t x, uint32_t lane)
{
    return __shfl_sync(0xffffffffu, x, lane);
}

// Value of lane `lane - delta`; the own value in the first `delta` lanes. Collective.
DEVICE uint32_t shuffle_up(uint32_t x, uint32_t delta)
{
    return __shfl_up_sync(0xffffffffu, x, delta);
}

// One bit a lane. Collective.
DEVICE uint32_t ballot(bool predicate)
{
    return __ballot_sync(0xffffffffu, predicate);
}

// Loads four 8x8 matrices of 16-bit elements: lane 8j + r gives the shared address of row r of matrix j
// (16-byte aligned); r[j] is then M_j[lane / 4][2 (lane % 4) + {0, 1}]. Collective.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same with each matrix transposed: r[j] is M_j[2 (lane % 4) + {0, 1}][lane / 4]. Collective.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Two 8x8 matrices; lanes 0 to 15 give the row addresses, the others are ignored (give a valid one).
// Collective.
DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

// d += a b with mma.m16n8k16, E (bf16 or f16) in, f32 out. Collective. Element i of lane l:
//   a: row l/4 + 8 ((i>>1)&1), column 2 (l%4) + (i&1) + 8 (i>>2), i < 8, two to a register
//   b: k 2 (l%4) + (i&1) + 8 (i>>1), n l/4, i < 4
//   d: row l/4 + 8 (i>>1), column 2 (l%4) + (i&1), i < 4
template <class E = bf16>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    if constexpr (is_f16<E>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// d[m][n] += a[m] b[n] over M x N tiles of mma: one meeting of the lanes on the emulator. Collective.
template <class E = bf16, int M, int N>
DEVICE void mma_tiles(float (&d)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2])
{
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) mma<E>(d[m][n], a[m], b[n]);
    }
}

// One row of tiles: d[n] += a b[n]. Collective.
template <class E = bf16, int N>
DEVICE void mma_row(float (&d)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2])
{
    UNROLL
    for (int n = 0; n < N; n++) mma<E>(d[n], a, b[n]);
}

// Copies 16 bytes from global to shared memory, both 16-byte aligned, or writes 16 zeros where `valid`
// is false (the source is then not read). Complete for this thread after cp_async_wait, for others after
// a barrier that follows it.
DEVICE void cp_async_16(uint32_t destination, const void* source, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes the group of this thread's copies since the last commit.
DEVICE void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
DEVICE void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Brings the part of global memory around `source` to the L2 cache, where it may be read soon. A hint: nothing
// waits for it.
DEVICE void prefetch_l2(const void* source)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(source)));
}

// 2^x, relative error 2^-22; 0 for -infinity.
DEVICE float exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(x), absolute error 2^-22 near 1, relative elsewhere.
DEVICE float log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1/sqrt(x), relative error 2^-22.
DEVICE float rsqrt(float x)
{
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1/x, one ulp.
DEVICE float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float fused_multiply_add(float a, float b, float c)
{
    return __fmaf_rn(a, b, c);
}

// Adds to a counter in global memory and returns what it was.
DEVICE int atomic_add(int* counter, int x)
{
    return atomicAdd(counter, x);
}

// Adds to a counter in global memory once this thread's writes are there for whoever loads it coherently.
DEVICE void atomic_add_release(int* counter, int x)
{
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(counter)), "r"(x)
                 : "memory");
}

// The same for whoever looks from outside the device's kernels: copies, operations of streams on memory, other devices.
DEVICE void atomic_add_release_system(int* counter, int x)
{
    asm volatile("red.release.sys.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(counter)), "r"(x)
                 : "memory");
}

// Makes this thread's writes to global memory visible to the device before those that follow.
DEVICE void fence_device()
{
    __threadfence();
}

// Programmatic dependent launch: waits for the kernel this one depends on; lets the next one start.
// Both do nothing below sm_90.
DEVICE void dependency_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void launch_dependents()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

} // namespace ptx

#endif
