// Kernels of the emulator's own tests: mbarriers between warps, named barriers that not all wait at, registers that
// move between warpgroups, and clusters. Compiled for sm_90a as well.
#include "common/hopper.cuh"

namespace hopper_meetings {

struct Params {
    void* y;
    int32_t n;
    int32_t variant;
};

DEVICE Global<uint32_t> words(void* p)
{
    return Global<uint32_t>(static_cast<uint32_t*>(p));
}

enum class Bug {
    none,
    wrong_parity,  // the consumer is one phase ahead
    no_arrival,    // the consumer never frees a stage
    no_warp_sync,  // one lane tells of what others have not read yet
    no_full_wait,  // the consumer does not wait
    no_empty_wait, // the producer does not
};

// Warp 0 hands n numbers a lane to warp 1 through a ring of two stages; y[lane] is their sum.
template <Bug BUG = Bug::none>
DEVICE void ring(const Params& p)
{
    uint32_t full = ptx::shared_base(), empty = full + 16, data = full + 32;
    uint32_t lane = ptx::lane_id(), warp = ptx::warp_id();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < 2; stage++) {
            ptx::mbarrier_init(full + 8 * stage, 32);
            ptx::mbarrier_init(empty + 8 * stage, 1);
        }
    }
    ptx::barrier();
    uint32_t sum = 0;
    for (int i = 0; i < p.n; i++) {
        uint32_t stage = i % 2, parity = i / 2 % 2;
        Shared<uint32_t> slots(data + 128 * stage);
        if (warp == 0) {
            if (BUG != Bug::no_empty_wait) ptx::mbarrier_wait(empty + 8 * stage, parity ^ 1);
            slots.store(lane, 100 * i + lane);
            ptx::mbarrier_arrive(full + 8 * stage);
        } else {
            if (BUG != Bug::no_full_wait) {
                ptx::mbarrier_wait(full + 8 * stage, BUG == Bug::wrong_parity ? parity ^ 1 : parity);
            }
            sum += slots.load(31 - lane);
            if (BUG != Bug::no_warp_sync) ptx::warp_sync();
            if (BUG != Bug::no_arrival && ptx::elect()) ptx::mbarrier_arrive(empty + 8 * stage);
        }
    }
    if (warp == 1) words(p.y).store(lane, sum);
}

// Warp 0 writes and goes on, warp 1 waits and reads: y[lane] = 7 lane.
template <bool BUG>
DEVICE void hand_over(const Params& p)
{
    Shared<uint32_t> slots(ptx::shared_base());
    uint32_t lane = ptx::lane_id();
    if (ptx::warp_id() == 0) {
        if (!BUG) slots.store(lane, 7 * lane);
        ptx::barrier_arrive(1, 64);
        if (BUG) slots.store(lane, 7 * lane);
    } else {
        ptx::barrier(1, 64);
        words(p.y).store(lane, slots.load(lane));
    }
}

// y[0..32) and y[32..64): 64 numbers as 8x8 matrices in and out again, by x4 and back by ldmatrix; transposed twice.
DEVICE void matrices(const Params& p)
{
    uint32_t lane = ptx::lane_id(), base = ptx::shared_base();
    uint32_t in[4], out[4], two[2] = {lane, 100 + lane};
    for (uint32_t i = 0; i < 4; i++) in[i] = 1000 * i + 2 * lane + (1000 * i + 2 * lane + 1) * 65536;
    ptx::stmatrix_x4(base + lane * 16, in);
    ptx::warp_sync();
    ptx::ldmatrix_x4(out, base + lane * 16);
    for (uint32_t i = 0; i < 4; i++) words(p.y).store(i * 32 + lane, out[i] ^ in[i]);
    ptx::warp_sync();
    ptx::stmatrix_x4_trans(base + lane * 16, in);
    ptx::warp_sync();
    ptx::ldmatrix_x4_trans(out, base + lane * 16);
    for (uint32_t i = 0; i < 4; i++) words(p.y).store((4 + i) * 32 + lane, out[i] ^ in[i]);
    // As it lies: row lane / 4 of matrix 0 transposed, pair lane % 4.
    words(p.y).store(8 * 32 + lane, Shared<uint32_t>(base).load(lane));
    ptx::warp_sync();
    ptx::stmatrix_x2(base + lane % 16 * 16, two);
    ptx::warp_sync();
    words(p.y).store(9 * 32 + lane, Shared<uint32_t>(base + 128).load(lane));
    ptx::warp_sync();
    ptx::stmatrix_x2_trans(base + lane % 16 * 16, two);
    ptx::warp_sync();
    uint32_t back[2];
    ptx::ldmatrix_x2_trans(back, base + lane % 16 * 16);
    words(p.y).store(10 * 32 + lane, back[1]);
}

enum class Shift {
    good,       // as a GEMM does it
    half,       // by two warps of four
    too_many,   // more than there are
    no_decrease, // that nobody gives up
    backwards,  // an increase to less
};

// Registers of three warpgroups, 168 a thread at the start: y[thread] = thread once all have theirs.
template <Shift SHIFT>
DEVICE void registers(const Params& p)
{
    uint32_t thread = threadIdx.x;
    if (thread < 128) {
        if (SHIFT == Shift::half && thread >= 64) return;
        if (SHIFT != Shift::no_decrease) ptx::decrease_registers<24>();
    } else if (SHIFT == Shift::backwards) {
        ptx::increase_registers<160>();
    } else {
        ptx::increase_registers<SHIFT == Shift::too_many ? 248 : 240>();
    }
    words(p.y).store(thread, thread);
}

enum class Peer {
    good,
    exits,        // a block ends while another may read its shared memory
    no_barrier,   // nobody waits until it is written
    late_arrival, // an arrival at an mbarrier of a block that may have ended
    past_end,
    no_such_rank,
    arrive_twice,
};

// Every block writes its number to its shared memory, and reads that of the next in the cluster: y[block, lane].
template <Peer PEER>
DEVICE void exchange(const Params& p)
{
    uint32_t lane = threadIdx.x % 32, base = ptx::shared_base();
    uint32_t rank = ptx::cluster_rank(), next = (rank + 1) % ptx::cluster_size();
    Shared<uint32_t> own(base);
    own.store(lane, 100 * blockIdx.x + lane);
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(base + 128, ptx::cluster_size() - 1);
        ptx::fence_mbarrier_init();
    }
    if (PEER == Peer::arrive_twice) ptx::cluster_arrive();
    if (PEER != Peer::no_barrier) ptx::cluster_barrier();
    uint32_t there = ptx::peer_address(base, PEER == Peer::no_such_rank ? 7 : next);
    if (PEER == Peer::past_end) there += 4096;
    uint32_t x = ptx::peer_load(there + 4 * lane);
    Vec16 four = ptx::peer_load_16(there + 16 * (lane / 4));
    words(p.y).store(int64_t(blockIdx.x) * 32 + lane, x == four.word[lane % 4] ? x : 0);
    if (PEER != Peer::exits) ptx::cluster_barrier();
    // And the other way: into the next block, which learns of it by its mbarrier.
    if (PEER == Peer::good || PEER == Peer::late_arrival) {
        ptx::peer_store(ptx::peer_address(base + 256, next) + 4 * lane, 7 + rank);
        ptx::peer_store_16(ptx::peer_address(base + 384, next) + 16 * lane, Vec16{{rank, rank, rank, rank}});
        ptx::warp_sync();
        for (uint32_t r = 0; r < ptx::cluster_size(); r++) {
            if (r != rank && lane == 0) ptx::mbarrier_arrive_peer(ptx::peer_address(base + 128, r));
        }
        if (PEER == Peer::late_arrival) return;
        ptx::mbarrier_wait_peers(base + 128, 0);
        uint32_t before = (rank + ptx::cluster_size() - 1) % ptx::cluster_size();
        bool right = Shared<uint32_t>(base + 256).load(31 - lane) == 7 + before
            && Shared<uint32_t>(base + 384).load(127 - lane) == before;
        words(p.y).store(int64_t(gridDim.x + blockIdx.x) * 32 + lane, right);
        ptx::cluster_barrier();
    }
}

// Block 0 of each cluster writes to global memory, and the others read it after their barrier: y[0..blocks] and
// y[blocks..2 blocks]. The bug comes before the barrier.
template <bool BUG>
DEVICE void share(const Params& p)
{
    uint32_t first = blockIdx.x - ptx::cluster_rank();
    if (threadIdx.x == 0 && ptx::cluster_rank() == 0) words(p.y).store(first, 1000 + first);
    if (!BUG) ptx::cluster_barrier();
    if (threadIdx.x == 0) words(p.y).store(gridDim.x + blockIdx.x, words(p.y).load(first));
    if (BUG) ptx::cluster_barrier();
}

} // namespace hopper_meetings
