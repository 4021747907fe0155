// Kernels of the emulator's own tests: bulk copies, mbarriers and proxies. Compiled for sm_90a as well.
#include "common/hopper.cuh"

namespace hopper_copies {

struct Params {
    TensorMap in;
    TensorMap out;
    const void* x;
    void* y;
    int32_t at[5];   // coordinates
    int32_t bytes;   // of a box
    int32_t variant;
};

constexpr uint32_t tile = 1024; // from the begin of shared memory; the mbarriers lie before

// Thread 0 makes an mbarrier for one arrival.
DEVICE uint32_t make_mbarrier()
{
    uint32_t full = ptx::shared_base();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::fence_mbarrier_init();
    }
    ptx::barrier();
    return full;
}

// y = the bytes of a box as they lie in shared memory.
template <int RANK>
DEVICE void load(const Params& p)
{
    uint32_t full = make_mbarrier(), box = ptx::shared_base() + tile;
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(p.in);
        int at[RANK];
        for (int i = 0; i < RANK; i++) at[i] = p.at[i];
        ptx::mbarrier_arrive_expect(full, p.bytes);
        ptx::tensor_load(box, p.in, at, full);
    }
    ptx::mbarrier_wait(full, 0);
    for (int i = threadIdx.x; i < p.bytes / 4; i += blockDim.x) {
        Global<uint32_t>(static_cast<uint32_t*>(p.y)).store(i, Shared<uint32_t>(box).load(i));
    }
}

enum class Bug {
    none,
    wrong_parity,         // waits for the phase before the first
    too_few_bytes,        // expects 16 bytes less than come
    too_many_bytes,       // or more
    no_wait,              // reads what is not there yet
    no_init_fence,        // the mbarrier is not shown to the copies
    no_init_barrier,      // nor to the other threads
    two_arrivals,         // one too many
    no_mbarrier,          // none was initialised
    init_twice,
    generic_write,        // over the mbarrier
    source_overwritten,   // while it is copied
    destination_written,  // while it is copied to
    unfenced_destination, // was written by a thread before
    no_store_fence,       // the copy out may not see what a thread wrote
    no_store_barrier,     // nor what the other threads wrote
    no_store_wait,        // the block ends while the copy reads
    store_overwritten,    // what the copy reads is overwritten
    exit_without_wait,    // the block ends while the copy writes
    misaligned,           // a box at a multiple of 16 bytes
    past_end,             // of shared memory
};

// out = in + 1 for a box of f32 out of rows of 60, by way of shared memory: in by a copy, on by threads, out by a
// copy, or added.
template <Bug BUG = Bug::none, bool ADD = false>
DEVICE void increment(const Params& p)
{
    uint32_t thread = threadIdx.x, full = ptx::shared_base(), box = full + tile;
    if (BUG == Bug::misaligned) box += 16;
    if (BUG == Bug::past_end) box += 0x10000;
    Shared<float> values(box);
    if (thread == 0) {
        if (BUG == Bug::unfenced_destination) values.store(5, 0.0f);
        if (BUG != Bug::no_mbarrier) ptx::mbarrier_init(full, 1);
        if (BUG == Bug::init_twice) ptx::mbarrier_init(full, 1);
        if (BUG != Bug::no_init_fence && BUG != Bug::unfenced_destination) ptx::fence_proxy_async();
        if (BUG == Bug::unfenced_destination) ptx::fence_mbarrier_init();
        if (BUG == Bug::generic_write) Shared<uint32_t>(full).store(1, 0);
    }
    if (BUG != Bug::no_init_barrier) ptx::barrier();
    if (thread == 0) {
        int wrong = BUG == Bug::too_few_bytes ? -16 : BUG == Bug::too_many_bytes ? 16 : 0;
        ptx::mbarrier_arrive_expect(full, p.bytes + wrong);
        ptx::tensor_load(box, p.in, {p.at[0], p.at[1]}, full);
        if (BUG == Bug::source_overwritten) {
            Global<float> source(static_cast<float*>(const_cast<void*>(p.x)));
            source.store(int64_t(p.at[1]) * 60 + p.at[0], 100.0f);
        }
        if (BUG == Bug::destination_written) values.store(0, 0.0f);
        if (BUG == Bug::two_arrivals) ptx::mbarrier_arrive(full);
    }
    if (BUG == Bug::exit_without_wait) return;
    if (BUG != Bug::no_wait) ptx::mbarrier_wait(full, BUG == Bug::wrong_parity ? 1 : 0);
    for (int i = thread; i < p.bytes / 4; i += blockDim.x) values.store(i, values.load(i) + 1.0f);
    if (BUG != Bug::no_store_fence) ptx::fence_proxy_async();
    if (BUG != Bug::no_store_barrier) ptx::barrier();
    if (thread == 0) {
        if (ADD) {
            ptx::tensor_add(p.out, {p.at[2], p.at[3]}, box);
        } else {
            ptx::tensor_store(p.out, {p.at[2], p.at[3]}, box);
        }
        ptx::bulk_commit();
        if (BUG == Bug::store_overwritten) values.store(1, 0.0f);
        if (BUG != Bug::no_store_wait) ptx::bulk_wait_read<0>();
    }
}

// y = x in pieces of `bytes` through a ring of two stages: plain bytes, in and out. The bug reuses a stage whose last
// copy out may still read it.
template <bool BUG>
DEVICE void ring(const Params& p)
{
    uint32_t full = ptx::shared_base(), box = full + tile;
    if (threadIdx.x != 0) return;
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(full + 8, 1);
    ptx::fence_mbarrier_init();
    const char* x = static_cast<const char*>(p.x);
    char* y = static_cast<char*>(p.y);
    for (int i = 0; i < 6; i++) {
        uint32_t stage = i % 2, at = box + stage * p.bytes;
        // All but the last copy out have read.
        if (i >= 2 && !BUG) ptx::bulk_wait_read<1>();
        ptx::mbarrier_arrive_expect(full + 8 * stage, p.bytes);
        ptx::bulk_load(at, x + int64_t(i) * p.bytes, p.bytes, full + 8 * stage);
        while (!ptx::mbarrier_test(full + 8 * stage, i / 2 % 2)) {}
        ptx::bulk_store(y + int64_t(i) * p.bytes, at, p.bytes);
        ptx::bulk_commit();
    }
    ptx::bulk_wait<0>();
    ptx::mbarrier_invalidate(full);
    Shared<uint32_t>(full).store(0, 0);
}

// y[i] = what all blocks have added, each 1 to every element.
DEVICE void add_plain(const Params& p)
{
    uint32_t base = ptx::shared_base();
    for (int i = threadIdx.x; i < p.bytes / 4; i += blockDim.x) Shared<float>(base).store(i, 1.0f);
    ptx::fence_proxy_async();
    ptx::barrier();
    if (threadIdx.x != 0) return;
    ptx::bulk_add(static_cast<float*>(p.y), base, p.bytes);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
}

enum class Swap {
    good,
    no_fence,      // the copy may not see what the thread wrote
    overwritten,   // while the peer has not got it
    own_bytes,     // counts the bytes at home
    early,         // into a place that the peer still reads
};

// y = x, in pieces of `bytes` of which both blocks of a cluster have a use: each loads half of a piece and copies it to
// the other, which has it again once it has gone through `y`. y is [2][6 pieces], of both blocks.
template <Swap BUG = Swap::good>
DEVICE void swap(const Params& p)
{
    uint32_t base = ptx::shared_base(), full = base, empty = base + 8, piece = base + tile;
    uint32_t rank = ptx::cluster_rank(), peer = rank ^ 1;
    uint32_t half = p.bytes / 2, own = piece + rank * half;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(empty, 2);
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_barrier();
    const Global<const uint32_t> x(static_cast<const uint32_t*>(p.x));
    const Global<uint32_t> y(static_cast<uint32_t*>(p.y) + int64_t(rank) * 6 * p.bytes / 4);
    for (int i = 0; i < 6; i++) {
        if (threadIdx.x == 0) {
            // Nobody uses the piece before, here or there.
            if (i > 0 && BUG != Swap::early) ptx::mbarrier_wait_peers(empty, (i - 1) % 2);
            for (uint32_t w = 0; w < half / 4; w++)
                Shared<uint32_t>(own).store(w, x.load((i * p.bytes + rank * half) / 4 + w));
            if (BUG != Swap::no_fence) ptx::fence_proxy_async();
            ptx::mbarrier_arrive_expect(full, half);
            ptx::peer_copy(ptx::peer_address(own, peer), own, half,
                           ptx::peer_address(full, BUG == Swap::own_bytes ? rank : peer));
            if (BUG == Swap::overwritten) Shared<uint32_t>(own).store(0, 7);
        }
        ptx::mbarrier_wait_peers(full, i % 2);
        for (int w = threadIdx.x; w < p.bytes / 4; w += blockDim.x)
            y.store(i * p.bytes / 4 + w, Shared<uint32_t>(piece).load(w));
        ptx::warp_sync();
        if (threadIdx.x < 2) ptx::mbarrier_arrive_peer(ptx::peer_address(empty, threadIdx.x));
    }
    ptx::cluster_barrier();
}

} // namespace hopper_copies
