// Twin of common/ptx.cuh: the same names and signatures, on emulated threads. The trailing `site` is filled
// in by the compiler: it says in a fault where the kernel stands.
#pragma once

#include "operations.h"

namespace emulator {

// Subnormal numbers are zero in the approximate instructions.
inline float flush(float x)
{
    return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x;
}

} // namespace emulator

namespace ptx {

using emulator::Collective;
using emulator::Site;

inline uint32_t shared_base()
{
    return emulator::shared_origin;
}

inline uint32_t lane_id()
{
    return emulator::current->lane;
}

inline uint32_t warp_id(Site site = Site::here())
{
    return emulator::exchange(Collective::warp_id, emulator::current->warp->id, 0, site);
}

inline int unknown(int x)
{
    return x;
}

template <class T>
T* unknown(T* x)
{
    return x;
}

inline void barrier(Site site = Site::here())
{
    emulator::block_barrier(0, blockDim.x, true, site);
}

inline void barrier(uint32_t id, uint32_t threads, Site site = Site::here())
{
    if (id < 1 || id >= emulator::barriers_of_a_block)
        emulator::fail(site, "named barrier %u does not exist: they are 1 to 15", id);
    emulator::block_barrier(id, threads, true, site);
}

inline void warp_sync(Site site = Site::here())
{
    emulator::order_warp(site);
}

inline uint32_t shuffle_xor(uint32_t x, uint32_t mask, Site site = Site::here())
{
    return emulator::exchange(Collective::shuffle_xor, x, mask, site);
}

inline float shuffle_xor(float x, uint32_t mask, Site site = Site::here())
{
    return bits_to_float(shuffle_xor(float_to_bits(x), mask, site));
}

inline uint32_t shuffle(uint32_t x, uint32_t lane, Site site = Site::here())
{
    return emulator::exchange(Collective::shuffle, x, lane, site);
}

inline float shuffle(float x, uint32_t lane, Site site = Site::here())
{
    return bits_to_float(shuffle(float_to_bits(x), lane, site));
}

inline uint32_t shuffle_up(uint32_t x, uint32_t delta, Site site = Site::here())
{
    return emulator::exchange(Collective::shuffle_up, x, delta, site);
}

inline uint32_t ballot(bool predicate, Site site = Site::here())
{
    return emulator::exchange(Collective::ballot, predicate, 0, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, Site site = Site::here())
{
    emulator::load_matrices(r, address, 4, false, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, Site site = Site::here())
{
    emulator::load_matrices(r, address, 4, true, site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address, Site site = Site::here())
{
    emulator::load_matrices(r, address, 2, false, site);
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address, Site site = Site::here())
{
    emulator::load_matrices(r, address, 2, true, site);
}

template <class E = bf16>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here())
{
    emulator::multiply({d, a, b, 1, 1, is_f16<E>}, site);
}

template <class E = bf16, int M, int N>
inline void mma_tiles(float (&d)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2],
                      Site site = Site::here())
{
    emulator::multiply({&d[0][0][0], &a[0][0], &b[0][0], M, N, is_f16<E>}, site);
}

template <class E = bf16, int N>
inline void mma_row(float (&d)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2], Site site = Site::here())
{
    emulator::multiply({&d[0][0], a, &b[0][0], 1, N, is_f16<E>}, site);
}

inline void cp_async_16(uint32_t destination, const void* source, bool valid, Site site = Site::here())
{
    emulator::copy_issue(destination, source, valid, site);
}

inline void cp_async_commit()
{
    emulator::copy_commit();
}

template <int pending>
inline void cp_async_wait()
{
    emulator::copy_wait(pending);
}

// There is no cache.
inline void prefetch_l2(const void*) {}

// The approximate functions are exact here, rounded once: through f64, so that they do not depend on the host.
inline float exp2(float x)
{
    return emulator::flush(float(::exp2(double(emulator::flush(x)))));
}

inline float log2(float x)
{
    return float(::log2(double(emulator::flush(x))));
}

inline float rsqrt(float x)
{
    return float(1.0 / ::sqrt(double(emulator::flush(x))));
}

inline float reciprocal(float x)
{
    return emulator::flush(1.0f / emulator::flush(x));
}

inline float fused_multiply_add(float a, float b, float c)
{
    return fmaf(a, b, c);
}

inline int atomic_add(int* counter, int x, Site site = Site::here())
{
    return emulator::add_to_global(counter, x, site);
}

inline void atomic_add_release(int* counter, int x, Site site = Site::here())
{
    atomic_add(counter, x, site);
}

inline void atomic_add_release_system(int* counter, int x, Site site = Site::here())
{
    atomic_add(counter, x, site);
}

// Memory is sequentially consistent here: nothing to do.
inline void fence_device() {}

// Launches follow one another here. Who did not wait is told so when it touches global memory.
inline void dependency_wait()
{
    const emulator::Thread& thread = *emulator::current;
    thread.warp->behind |= 1u << thread.lane;
}

inline void launch_dependents() {}

} // namespace ptx
