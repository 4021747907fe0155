// A small matrix product of the emulator's own tests, made as those for Hopper are: a warp that copies, two
// warpgroups that multiply, clusters of two blocks that share half of what they copy. Compiled for sm_90a as well.
#include "common/wgmma.cuh"

namespace hopper_gemm {

struct Params {
    TensorMap a; // [M, K] bf16, boxes of 128 x 64
    TensorMap b; // [N, K] bf16, boxes of 64 x 64
    TensorMap c; // [M, N] f32, boxes of 64 x 32
    int32_t depth;
    int32_t fill;
};

enum class Bug {
    none,
    early_release,   // a stage is given back while it is read
    no_last_barrier, // a block ends while its peer may still arrive at its mbarriers
    own_bytes,       // what the peer copies is not counted
    no_proxy_fence,  // the copy out may not see the result
};

constexpr int stages = 3;
constexpr uint32_t a_bytes = 128 * 128; // 128 rows of 64 bf16
constexpr uint32_t half_b_bytes = 64 * 128;
constexpr uint32_t stage_bytes = a_bytes + 2 * half_b_bytes;
constexpr uint32_t slab_bytes = 64 * 128; // 64 rows of 32 f32

struct Layout {
    uint32_t full, empty, first, out;

    DEVICE Layout()
    {
        full = ptx::shared_base();
        empty = full + 8 * stages;
        first = full + 1024;
        out = first + stages * stage_bytes;
    }
};

template <Bug BUG>
DEVICE void copy(const Params& p, const Layout& shared, uint32_t rank)
{
    int m = int(blockIdx.x) * 128, n = int(blockIdx.y) * 128 + int(rank) * 64;
    int i = 0;
    for (int k = 0; k < p.depth; k += 64, i++) {
        uint32_t stage = i % stages, parity = i / stages % 2, full = shared.full + 8 * stage;
        uint32_t a = shared.first + stage * stage_bytes;
        ptx::mbarrier_wait(shared.empty + 8 * stage, parity ^ 1);
        ptx::mbarrier_arrive_expect(full, BUG == Bug::own_bytes ? a_bytes + half_b_bytes : stage_bytes);
        ptx::tensor_load(a, p.a, {k, m}, full);
        ptx::tensor_load_multicast(a + a_bytes + rank * half_b_bytes, p.b, {k, n}, full, 3);
    }
}

// Gives a stage back to those who fill it, in both blocks.
DEVICE void release(const Layout& shared, uint32_t stage)
{
    uint32_t thread = threadIdx.x % 128;
    if (thread < 2) ptx::mbarrier_free_peer(ptx::peer_address(shared.empty + 8 * stage, thread));
}

template <Bug BUG>
DEVICE void multiply(const Params& p, const Layout& shared, uint32_t group)
{
    float d[64];
    int i = 0;
    for (int k = 0; k < p.depth; k += 64, i++) {
        uint32_t stage = i % stages, start = shared.first + stage * stage_bytes;
        ptx::mbarrier_wait(shared.full + 8 * stage, i / stages % 2);
        uint64_t a = ptx::wgmma_matrix(start + group * 64 * 128, 16, 1024, Swizzle::bytes_128);
        uint64_t b = ptx::wgmma_matrix(start + a_bytes, 16, 1024, Swizzle::bytes_128);
        ptx::wgmma_fence(d);
        UNROLL
        for (int step = 0; step < 4; step++) {
            ptx::wgmma<bf16, 128>(d, ptx::wgmma_advance(a, 32 * step), ptx::wgmma_advance(b, 32 * step), i + step > 0);
        }
        ptx::wgmma_commit();
        if (BUG == Bug::early_release) {
            release(shared, stage);
        } else {
            // The products of the stage before have been computed.
            ptx::wgmma_wait<1>(d);
            if (i > 0) release(shared, (i - 1) % stages);
        }
    }
    ptx::wgmma_wait<0>(d);
    if (BUG != Bug::early_release) release(shared, (i - 1) % stages);

    uint32_t thread = threadIdx.x % 128, out = shared.out + group * 4 * slab_bytes;
    UNROLL
    for (int j = 0; j < 64; j += 2) {
        uint32_t row = 16 * (thread / 32) + thread % 32 / 4 + 8 * ((j >> 1) & 1);
        uint32_t column = 8 * (j >> 2) + 2 * (thread % 4);
        uint32_t offset = row * 128 + (((column % 32 / 4) ^ row % 8) << 4) + column % 4 * 4;
        Shared<float> pair(out + column / 32 * slab_bytes + offset);
        pair.store(0, d[j]);
        pair.store(1, d[j + 1]);
    }
    if (BUG != Bug::no_proxy_fence) ptx::fence_proxy_async();
    ptx::barrier(1 + group, 128);
    if (thread == 0) {
        for (int slab = 0; slab < 4; slab++) {
            ptx::tensor_store(p.c, {int(blockIdx.y) * 128 + 32 * slab, int(blockIdx.x) * 128 + int(group) * 64},
                              out + slab * slab_bytes);
        }
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
    }
}

// c = a bᵀ, a tile of 128 x 128 a block. Clusters of two along x, which are two tiles of rows.
template <Bug BUG = Bug::none>
DEVICE void gemm(const Params& p)
{
    Layout shared;
    uint32_t group = ptx::warp_id() / 4, rank = ptx::cluster_rank();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < stages; stage++) {
            ptx::mbarrier_init(shared.full + 8 * stage, 1);
            // One for each warpgroup of both blocks.
            ptx::mbarrier_init(shared.empty + 8 * stage, 4);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_barrier();
    if (group == 2) {
        ptx::decrease_registers<40>();
        if (ptx::warp_id() == 8 && ptx::elect()) copy<BUG>(p, shared, rank);
    } else {
        ptx::increase_registers<232>();
        multiply<BUG>(p, shared, group);
    }
    if (BUG != Bug::no_last_barrier) ptx::cluster_barrier();
}

} // namespace hopper_gemm
