// Instructions that only compute capability 9.0 has, behind named wrappers: clusters, mbarriers, bulk copies by the
// tensor memory accelerator, and what goes with them. For kernels of the sm90 tier; the matrix instructions are in
// wgmma.cuh. On the emulator the same names run on its threads (kernels/emulator/hopper.h).
//
// Shared memory is reached by two proxies. Threads read and write it through the generic proxy; bulk copies and wgmma
// go through the asynchronous one. What threads wrote is there for that proxy after a fence_proxy_async of the
// writer and a barrier; what it wrote is there for threads that have waited for it.
//
// Collectives (marked so) must be reached by all 32 lanes of the warp.
#pragma once

#include "view.cuh"

// A CUtensorMap: base, sizes, strides, box and swizzle of a tensor, made on the host. Part of a kernel's constant
// arguments, never copied on the device.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

#ifdef TRENCADIS_EMULATOR
#include "../emulator/hopper.h"
#else

namespace ptx {

// ---- Clusters ----

// Number of this block in its cluster.
DEVICE uint32_t cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Blocks of the cluster.
DEVICE uint32_t cluster_size()
{
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// Barrier of all threads of the cluster in two halves: what was written before the first is there for whoever comes
// out of the second. A block whose shared memory others reach ends after such a barrier alone. Collective.
DEVICE void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

DEVICE void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Both halves. Collective.
DEVICE void cluster_barrier()
{
    cluster_arrive();
    cluster_wait();
}

// The address at which block `rank` of the cluster has what this block has at `address`. For the peer functions.
DEVICE uint32_t peer_address(uint32_t address, uint32_t rank)
{
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// Loads and stores in the shared memory of a block of the cluster, 4 or 16 bytes, aligned so.
DEVICE uint32_t peer_load(uint32_t address)
{
    uint32_t x;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

DEVICE Vec16 peer_load_16(uint32_t address)
{
    Vec16 x;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "r"(address)
                 : "memory");
    return x;
}

DEVICE void peer_store(uint32_t address, uint32_t x)
{
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

DEVICE void peer_store_16(uint32_t address, Vec16 x)
{
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.word[0]), "r"(x.word[1]),
                 "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
}

// ---- Threads ----

// True in one lane of the warp, always the same. Collective.
DEVICE bool elect()
{
    uint32_t elected;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(elected));
    return elected != 0;
}

// Comes to named barrier `id` (1 to 15) of `threads` threads and goes on; those that wait there by barrier(id,
// threads) see what was written before. Collective.
DEVICE void barrier_arrive(uint32_t id, uint32_t threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Takes registers that other warpgroups of the block have given up, or gives up some: `count` a thread from then on,
// a multiple of 8 from 24 to 256. All four warps of a warpgroup. Collective.
template <uint32_t count>
DEVICE void increase_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <uint32_t count>
DEVICE void decrease_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Stores 8x8 matrices of 16-bit elements, the inverse of ldmatrix: lane 8j + r gives the shared address of row r of
// matrix j (16-byte aligned), r[j] is M_j[lane / 4][2 (lane % 4) + {0, 1}]. Collective.
DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// The same with each matrix transposed: r[j] is M_j[2 (lane % 4) + {0, 1}][lane / 4]. Collective.
DEVICE void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// Two matrices; lanes 0 to 15 give the row addresses, the others are ignored (give a valid one). Collective.
DEVICE void stmatrix_x2(uint32_t address, const uint32_t (&r)[2])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
}

DEVICE void stmatrix_x2_trans(uint32_t address, const uint32_t (&r)[2])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]),
                 "r"(r[1])
                 : "memory");
}

// ---- mbarriers ----

// An mbarrier, 8 bytes of shared memory, aligned so. Each phase ends when `arrivals` have come and all bytes that were
// expected have been copied; the next begins at once. Those who use it do so after a barrier, copies and peers after
// fence_mbarrier_init as well.
DEVICE void mbarrier_init(uint32_t address, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
}

// Frees the 8 bytes for other use.
DEVICE void mbarrier_invalidate(uint32_t address)
{
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(address) : "memory");
}

// Shows the mbarriers that this thread has initialised to copies and to the cluster.
DEVICE void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives `count` times.
DEVICE void mbarrier_arrive(uint32_t address, uint32_t count = 1)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(count) : "memory");
}

// Arrives once at an mbarrier of a block of the cluster, by its peer_address.
DEVICE void mbarrier_arrive_peer(uint32_t address)
{
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// `count` times, by a thread that has only read: what it wrote need not be there for the other block, which spares the
// wait for its writes to global memory.
DEVICE void mbarrier_free_peer(uint32_t address, uint32_t count = 1)
{
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(address), "r"(count) : "memory");
}

// Expects `bytes` more bytes in this phase, then arrives once.
DEVICE void mbarrier_arrive_expect(uint32_t address, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

// Expects `bytes` more bytes in this phase.
DEVICE void mbarrier_expect(uint32_t address, uint32_t bytes)
{
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

// Whether the phase of this parity is over: that of the current phase is not, that of the one before is. A new
// mbarrier is in phase 0.
DEVICE bool mbarrier_test(uint32_t address, uint32_t parity)
{
    uint32_t over;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(over)
                 : "r"(address), "r"(parity)
                 : "memory");
    return over != 0;
}

// The same for whoever has other work to do: where the phase is not over, mbarrier_test may sleep until it is, or for a
// while.
DEVICE bool mbarrier_peek(uint32_t address, uint32_t parity)
{
    uint32_t over;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(over)
                 : "r"(address), "r"(parity)
                 : "memory");
    return over != 0;
}

// Waits for the end of the phase of this parity.
DEVICE void mbarrier_wait(uint32_t address, uint32_t parity)
{
    while (!mbarrier_test(address, parity)) {}
}

// The same, and what peers of the cluster stored here before they arrived is there.
DEVICE void mbarrier_wait_peers(uint32_t address, uint32_t parity)
{
    uint32_t over = 0;
    while (over == 0) {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}"
                     : "=r"(over)
                     : "r"(address), "r"(parity)
                     : "memory");
    }
}

// Orders what this thread wrote to shared memory, or has learned of, before what copies and wgmma do after a barrier
// that follows.
DEVICE void fence_proxy_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory, both ways: between what bulk copies have written, known to be there, and what tells others
// of it, and between being told and the bulk copies that follow.
DEVICE void fence_proxy_async_global()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// ---- Bulk copies: by one thread ----

// Brings a tensor map to where copies look for it. A hint.
DEVICE void prefetch_tensor_map(const TensorMap& map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box at the coordinates `at`, innermost first, which may lie outside in part or be negative: what lies
// outside is zeros. It is there for threads that have waited for the mbarrier, which counts the bytes of the whole
// box. The destination is aligned to 128 bytes, and to 8 rows of the swizzle where one is to be undone.
template <int RANK>
DEVICE void tensor_load(uint32_t destination, const TensorMap& map, const int (&at)[RANK], uint32_t mbarrier)
{
    static_assert(RANK >= 1 && RANK <= 5, "a tensor has 1 to 5 dimensions");
    if constexpr (RANK == 1) {
        asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2}], "
                     "[%3];" ::"r"(destination),
                     "l"(&map), "r"(at[0]), "r"(mbarrier)
                     : "memory");
    } else if constexpr (RANK == 2) {
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                     "%3}], [%4];" ::"r"(destination),
                     "l"(&map), "r"(at[0]), "r"(at[1]), "r"(mbarrier)
                     : "memory");
    } else if constexpr (RANK == 3) {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                     "%3, %4}], [%5];" ::"r"(destination),
                     "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(mbarrier)
                     : "memory");
    } else if constexpr (RANK == 4) {
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                     "%3, %4, %5}], [%6];" ::"r"(destination),
                     "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(mbarrier)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                     "%3, %4, %5, %6}], [%7];" ::"r"(destination),
                     "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(mbarrier)
                     : "memory");
    }
}

// The same to every block of the cluster whose bit is set: to the same place in its shared memory, counted by the
// mbarrier at the same place there. Rank 2 or 3.
template <int RANK>
DEVICE void tensor_load_multicast(uint32_t destination, const TensorMap& map, const int (&at)[RANK],
                                  uint32_t mbarrier, uint16_t blocks)
{
    static_assert(RANK == 2 || RANK == 3, "there is a multicast for 2 and 3 dimensions");
    if constexpr (RANK == 2) {
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(destination),
                     "l"(&map), "r"(at[0]), "r"(at[1]), "r"(mbarrier), "h"(blocks)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(destination),
                     "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(mbarrier), "h"(blocks)
                     : "memory");
    }
}

// Copies a box to global memory; what lies outside is left out. Rank 2 or 3.
template <int RANK>
DEVICE void tensor_store(const TensorMap& map, const int (&at)[RANK], uint32_t source)
{
    static_assert(RANK == 2 || RANK == 3, "there is a store for 2 and 3 dimensions");
    if constexpr (RANK == 2) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
                     "r"(at[0]), "r"(at[1]), "r"(source)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map),
                     "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(source)
                     : "memory");
    }
}

// Adds a box of f32 or bf16 to global memory, each element atomically. Rank 2 or 3.
template <int RANK>
DEVICE void tensor_add(const TensorMap& map, const int (&at)[RANK], uint32_t source)
{
    static_assert(RANK == 2 || RANK == 3, "there is an addition for 2 and 3 dimensions");
    if constexpr (RANK == 2) {
        asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                         &map),
                     "r"(at[0]), "r"(at[1]), "r"(source)
                     : "memory");
    } else {
        asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%1, %2, %3}], [%4];" ::
                         "l"(&map),
                     "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(source)
                     : "memory");
    }
}

// Copies `bytes` bytes, a multiple of 16, between addresses that are aligned to 16.
DEVICE void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     destination),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(mbarrier)
                 : "memory");
}

// Copies `bytes` bytes, a multiple of 16, of this block's shared memory to the peer_address `destination`, aligned to 16
// as `source` is; an mbarrier of that block counts them, by its peer_address. The source may be overwritten once somebody
// has told of its having been there.
DEVICE void peer_copy(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t mbarrier)
{
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     destination),
                 "r"(source), "r"(bytes), "r"(mbarrier)
                 : "memory");
}

DEVICE void bulk_store(void* destination, uint32_t source, uint32_t bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(destination)),
                 "r"(source), "r"(bytes)
                 : "memory");
}

// Adds f32.
DEVICE void bulk_add(float* destination, uint32_t source, uint32_t bytes)
{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(destination)),
                 "r"(source), "r"(bytes)
                 : "memory");
}

// Closes the group of this thread's stores and additions since the last commit.
DEVICE void bulk_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's groups are not written.
template <int pending>
DEVICE void bulk_wait()
{
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// Waits until at most `pending` of this thread's groups have not been read, so that their sources may be overwritten
// or the block may end.
template <int pending>
DEVICE void bulk_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

} // namespace ptx

#endif
