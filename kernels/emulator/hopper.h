// Twin of common/hopper.cuh and common/wgmma.cuh: the same names and signatures, on emulated threads.
#pragma once

#include "operations.h"

namespace ptx {

// ---- Clusters ----

inline uint32_t cluster_rank()
{
    return emulator::current->block->rank;
}

inline uint32_t cluster_size()
{
    return emulator::current->block->launch->arguments.cluster;
}

inline void cluster_arrive(Site site = Site::here())
{
    emulator::cluster_arrive(site);
}

inline void cluster_wait(Site site = Site::here())
{
    emulator::cluster_wait(site);
}

inline void cluster_barrier(Site site = Site::here())
{
    emulator::cluster_arrive(site);
    emulator::cluster_wait(site);
}

inline uint32_t peer_address(uint32_t address, uint32_t rank, Site site = Site::here())
{
    return emulator::peer_address(address, rank, site);
}

inline uint32_t peer_load(uint32_t address, Site site = Site::here())
{
    uint32_t x;
    emulator::read_peer(&x, address, sizeof x, site);
    return x;
}

inline Vec16 peer_load_16(uint32_t address, Site site = Site::here())
{
    Vec16 x;
    emulator::read_peer(&x, address, sizeof x, site);
    return x;
}

inline void peer_store(uint32_t address, uint32_t x, Site site = Site::here())
{
    emulator::write_peer(&x, address, sizeof x, site);
}

inline void peer_store_16(uint32_t address, Vec16 x, Site site = Site::here())
{
    emulator::write_peer(&x, address, sizeof x, site);
}

// ---- Threads ----

inline bool elect(Site site = Site::here())
{
    return emulator::elect(site);
}

inline void barrier_arrive(uint32_t id, uint32_t threads, Site site = Site::here())
{
    if (id < 1 || id >= emulator::barriers_of_a_block)
        emulator::fail(site, "named barrier %u does not exist: they are 1 to 15", id);
    emulator::block_barrier(id, threads, false, site);
}

template <uint32_t count>
inline void increase_registers(Site site = Site::here())
{
    emulator::set_registers(count, true, site);
}

template <uint32_t count>
inline void decrease_registers(Site site = Site::here())
{
    emulator::set_registers(count, false, site);
}

inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4], Site site = Site::here())
{
    emulator::store_matrices(r, address, 4, false, site);
}

inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4], Site site = Site::here())
{
    emulator::store_matrices(r, address, 4, true, site);
}

inline void stmatrix_x2(uint32_t address, const uint32_t (&r)[2], Site site = Site::here())
{
    emulator::store_matrices(r, address, 2, false, site);
}

inline void stmatrix_x2_trans(uint32_t address, const uint32_t (&r)[2], Site site = Site::here())
{
    emulator::store_matrices(r, address, 2, true, site);
}

// ---- mbarriers ----

inline void mbarrier_init(uint32_t address, uint32_t arrivals, Site site = Site::here())
{
    emulator::mbarrier_init(address, arrivals, site);
}

inline void mbarrier_invalidate(uint32_t address, Site site = Site::here())
{
    emulator::mbarrier_invalidate(address, site);
}

inline void fence_mbarrier_init()
{
    emulator::mbarrier_publish();
}

inline void mbarrier_arrive(uint32_t address, uint32_t count = 1, Site site = Site::here())
{
    emulator::mbarrier_arrive(address, count, 0, false, site);
}

inline void mbarrier_arrive_peer(uint32_t address, Site site = Site::here())
{
    emulator::mbarrier_arrive(address, 1, 0, true, site);
}

inline void mbarrier_free_peer(uint32_t address, uint32_t count = 1, Site site = Site::here())
{
    emulator::mbarrier_arrive(address, count, 0, true, site);
}

inline void mbarrier_arrive_expect(uint32_t address, uint32_t bytes, Site site = Site::here())
{
    emulator::mbarrier_arrive(address, 1, bytes, false, site);
}

inline void mbarrier_expect(uint32_t address, uint32_t bytes, Site site = Site::here())
{
    emulator::mbarrier_expect(address, bytes, site);
}

inline bool mbarrier_test(uint32_t address, uint32_t parity, Site site = Site::here())
{
    return emulator::mbarrier_test(address, parity, site);
}

inline bool mbarrier_peek(uint32_t address, uint32_t parity, Site site = Site::here())
{
    return emulator::mbarrier_test(address, parity, site);
}

inline void mbarrier_wait(uint32_t address, uint32_t parity, Site site = Site::here())
{
    emulator::mbarrier_wait(address, parity, site);
}

inline void mbarrier_wait_peers(uint32_t address, uint32_t parity, Site site = Site::here())
{
    emulator::mbarrier_wait(address, parity, site);
}

inline void fence_proxy_async()
{
    emulator::proxy_fence();
}

// Fences between proxies for global memory are not emulated.
inline void fence_proxy_async_global() {}

// ---- Bulk copies ----

inline void prefetch_tensor_map(const TensorMap& map, Site site = Site::here())
{
    emulator::tensor_prefetch(&map, site);
}

template <int RANK>
inline void tensor_load(uint32_t destination, const TensorMap& map, const int (&at)[RANK], uint32_t mbarrier,
                        Site site = Site::here())
{
    emulator::tensor_load(destination, &map, at, RANK, mbarrier, 0, site);
}

template <int RANK>
inline void tensor_load_multicast(uint32_t destination, const TensorMap& map, const int (&at)[RANK],
                                  uint32_t mbarrier, uint16_t blocks, Site site = Site::here())
{
    if (blocks == 0) emulator::fail(site, "a multicast to no block");
    emulator::tensor_load(destination, &map, at, RANK, mbarrier, blocks, site);
}

template <int RANK>
inline void tensor_store(const TensorMap& map, const int (&at)[RANK], uint32_t source, Site site = Site::here())
{
    emulator::tensor_store(source, &map, at, RANK, false, site);
}

template <int RANK>
inline void tensor_add(const TensorMap& map, const int (&at)[RANK], uint32_t source, Site site = Site::here())
{
    emulator::tensor_store(source, &map, at, RANK, true, site);
}

inline void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier,
                      Site site = Site::here())
{
    emulator::bulk_load(destination, source, bytes, mbarrier, site);
}

inline void peer_copy(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t mbarrier,
                      Site site = Site::here())
{
    emulator::peer_copy(destination, source, bytes, mbarrier, site);
}

inline void bulk_store(void* destination, uint32_t source, uint32_t bytes, Site site = Site::here())
{
    emulator::bulk_store(destination, source, bytes, false, site);
}

inline void bulk_add(float* destination, uint32_t source, uint32_t bytes, Site site = Site::here())
{
    emulator::bulk_store(destination, source, bytes, true, site);
}

inline void bulk_commit()
{
    emulator::bulk_commit();
}

template <int pending>
inline void bulk_wait()
{
    emulator::bulk_wait(pending, false);
}

template <int pending>
inline void bulk_wait_read()
{
    emulator::bulk_wait(pending, true);
}

// ---- Matrix instructions of a warpgroup ----

inline void wgmma_fence(Site site = Site::here())
{
    emulator::wgmma_fence(site);
}

template <int C>
inline void wgmma_fence(float (&)[C], Site site = Site::here())
{
    emulator::wgmma_fence(site);
}

template <int C, int E>
inline void wgmma_fence(float (&)[C], float (&)[E], Site site = Site::here())
{
    emulator::wgmma_fence(site);
}

template <class E, int N, bool A_TRANSPOSED = false, bool B_TRANSPOSED = false>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Site site = Site::here())
{
    emulator::wgmma_multiply({d, nullptr, a, b, N, A_TRANSPOSED, B_TRANSPOSED, accumulate, is_f16<E>}, site);
}

template <class E, int N, bool B_TRANSPOSED = false>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site = Site::here())
{
    emulator::wgmma_multiply({d, a, 0, b, N, false, B_TRANSPOSED, accumulate, is_f16<E>}, site);
}

inline void compute_before_wait(float, uint32_t) {}

inline void wgmma_commit(Site site = Site::here())
{
    emulator::wgmma_commit(site);
}

template <int pending>
inline void wgmma_wait(Site site = Site::here())
{
    emulator::wgmma_wait({nullptr, 0, pending}, site);
}

template <int pending, int C>
inline void wgmma_wait(float (&d)[C], Site site = Site::here())
{
    emulator::Registers named[] = {{d, C}};
    emulator::wgmma_wait({named, 1, pending}, site);
}

template <int pending, int C, int E>
inline void wgmma_wait(float (&d)[C], float (&e)[E], Site site = Site::here())
{
    emulator::Registers named[] = {{d, C}, {e, E}};
    emulator::wgmma_wait({named, 2, pending}, site);
}

template <int pending, int C, int E, int F>
inline void wgmma_wait(float (&d)[C], float (&e)[E], float (&f)[F], Site site = Site::here())
{
    emulator::Registers named[] = {{d, C}, {e, E}, {f, F}};
    emulator::wgmma_wait({named, 3, pending}, site);
}

} // namespace ptx
