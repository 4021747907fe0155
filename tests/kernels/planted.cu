// Kernels of the emulator's own tests: small ones with known answers, and pairs of one that is right and one
// with a bug (BUG) that the emulator must report. Compiled for the emulator alone.
#include "common/view.cuh"

namespace planted {

// What the arrays hold is each kernel's own affair.
struct Params {
    const void* a;
    const void* b;
    void* c;
    int32_t n;
    int32_t variant;
};

DEVICE Global<const float> floats(const void* p)
{
    return Global<const float>(static_cast<const float*>(p));
}

DEVICE Global<float> floats(void* p)
{
    return Global<float>(static_cast<float*>(p));
}

DEVICE Global<uint32_t> words(void* p)
{
    return Global<uint32_t>(static_cast<uint32_t*>(p));
}

// ---- Known answers ----

// c = a bᵀ for one warp: a, b [64, 64] of bf16, c [64, 64] of f32. The bug exchanges two registers of b.
template <bool BUG>
DEVICE void matmul(const Params& p)
{
    constexpr int size = 64;
    Global<const bf16> a(static_cast<const bf16*>(p.a)), b(static_cast<const bf16*>(p.b));
    uint32_t shared_a = ptx::shared_base(), shared_b = shared_a + size * size * 2;
    uint32_t lane = ptx::lane_id();
    for (uint32_t i = lane; i < size * size / 8; i += 32) {
        ptx::cp_async_16(shared_a + 16 * i, a.at(8 * i), true);
        ptx::cp_async_16(shared_b + 16 * i, b.at(8 * i), true);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::barrier();
    for (int rows = 0; rows < size; rows += 32) {
        float d[2][8][4] = {};
        for (int k = 0; k < size; k += 16) {
            uint32_t fragment_a[2][4], fragment_b[8][2];
            for (int m = 0; m < 2; m++) {
                uint32_t row = rows + 16 * m + lane % 16;
                ptx::ldmatrix_x4(fragment_a[m], shared_a + (row * size + k + 8 * (lane / 16)) * 2);
            }
            for (int n = 0; n < 8; n += 2) {
                uint32_t r[4], row = 8 * n + 8 * (lane / 16) + lane % 8;
                ptx::ldmatrix_x4(r, shared_b + (row * size + k + 8 * (lane / 8 % 2)) * 2);
                fragment_b[n][0] = r[BUG ? 1 : 0];
                fragment_b[n][1] = r[BUG ? 0 : 1];
                fragment_b[n + 1][0] = r[2];
                fragment_b[n + 1][1] = r[3];
            }
            ptx::mma_tiles(d, fragment_a, fragment_b);
        }
        for (int m = 0; m < 2; m++) {
            for (int n = 0; n < 8; n++) {
                for (int i = 0; i < 4; i++) {
                    int row = rows + 16 * m + lane / 4 + 8 * (i >> 1), column = 8 * n + 2 * (lane % 4) + (i & 1);
                    floats(p.c).store(row * size + column, d[m][n][i]);
                }
            }
        }
    }
}

// c[variant] of the three forms of mma with the same operands: a [16, 16], b [8, 16] of E, c [3, 16, 8].
template <class E>
DEVICE void mma_forms(const Params& p)
{
    Global<const E> a(static_cast<const E*>(p.a)), b(static_cast<const E*>(p.b));
    uint32_t lane = ptx::lane_id();
    uint32_t fragment_a[1][4], fragment_b[1][2];
    for (int i = 0; i < 4; i++) {
        fragment_a[0][i] = a.load_pair((lane / 4 + 8 * (i & 1)) * 16 + 2 * (lane % 4) + 8 * (i >> 1));
    }
    for (int i = 0; i < 2; i++) fragment_b[0][i] = b.load_pair(lane / 4 * 16 + 2 * (lane % 4) + 8 * i);
    for (int form = 0; form < 3; form++) {
        float d[1][1][4] = {{{1.0f, 1.0f, 1.0f, 1.0f}}};
        if (form == 0) ptx::mma<E>(d[0][0], fragment_a[0], fragment_b[0]);
        if (form == 1) ptx::mma_row<E>(d[0], fragment_a[0], fragment_b);
        if (form == 2) ptx::mma_tiles<E>(d, fragment_a, fragment_b);
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
            floats(p.c).store((form * 16 + row) * 8 + column, d[0][0][i]);
        }
    }
}

// c [4, 4, 32]: the registers of ldmatrix x4, x4 transposed, x2, x2 transposed over 32 rows of 8 numbers, which
// count up from 0.
DEVICE void ldmatrix(const Params& p)
{
    uint32_t lane = ptx::lane_id(), base = ptx::shared_base();
    Shared<uint16_t> matrix(base);
    for (uint32_t i = 0; i < 8; i++) matrix.store(lane * 8 + i, uint16_t(lane * 8 + i));
    ptx::warp_sync();
    uint32_t r[4][4] = {};
    uint32_t two[2][2];
    ptx::ldmatrix_x4(r[0], base + lane * 16);
    ptx::ldmatrix_x4_trans(r[1], base + lane * 16);
    ptx::ldmatrix_x2(two[0], base + lane % 16 * 16);
    ptx::ldmatrix_x2_trans(two[1], base + lane % 16 * 16);
    for (int form = 0; form < 4; form++) {
        for (int j = 0; j < 4; j++) {
            uint32_t x = form < 2 ? r[form][j] : j < 2 ? two[form - 2][j] : 0;
            words(p.c).store((form * 4 + j) * 32 + lane, x);
        }
    }
}

// c [8, threads]: what each thread gets from the exchanges of its warp.
DEVICE void exchanges(const Params& p)
{
    uint32_t lane = ptx::lane_id(), thread = threadIdx.x;
    uint32_t results[8] = {
        ptx::shuffle_xor(thread, 5),
        ptx::shuffle(thread, (lane + 3) % 32),
        ptx::shuffle_up(thread, 2),
        ptx::ballot(lane % 3 == 0),
        ptx::warp_id(),
        float_to_bits(ptx::shuffle_xor(float(thread), 1)),
        float_to_bits(ptx::shuffle(float(thread), 7)),
        lane,
    };
    for (int i = 0; i < 8; i++) words(p.c).store(i * blockDim.x + thread, results[i]);
}

// c[thread] = 16 bytes' worth of a where thread < n, else zeros. Each thread copies and reads its own.
DEVICE void copy_zero_fill(const Params& p)
{
    uint32_t thread = threadIdx.x, own = ptx::shared_base() + 16 * thread;
    Global<const float> a = floats(p.a);
    ptx::cp_async_16(own, a.at(4 * int64_t(thread)), int(thread) < p.n);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    floats(p.c).store_16(4 * thread, Shared<float>(own).load_16(0));
}

// c = a in four stages through a ring of three, each thread its own 16 bytes: groups are waited for in order.
DEVICE void copy_ring(const Params& p)
{
    uint32_t thread = threadIdx.x, base = ptx::shared_base() + 16 * thread;
    Global<const float> a = floats(p.a);
    auto at = [&](int stage) { return 4 * (stage * int64_t(blockDim.x) + thread); };
    for (int stage = 0; stage < 2; stage++) {
        ptx::cp_async_16(base + 16 * blockDim.x * stage, a.at(at(stage)), true);
        ptx::cp_async_commit();
    }
    for (int stage = 0; stage < 4; stage++) {
        if (stage + 2 < 4) ptx::cp_async_16(base + 16 * blockDim.x * ((stage + 2) % 3), a.at(at(stage + 2)), true);
        ptx::cp_async_commit();
        ptx::cp_async_wait<2>();
        floats(p.c).store_16(at(stage), Shared<float>(base + 16 * blockDim.x * (stage % 3)).load_16(0));
    }
}

// Two pairs of warps, each behind a barrier of its own, several times: c[thread] = sum of the other warp's
// numbers of the pair.
DEVICE void named_barriers(const Params& p)
{
    uint32_t thread = threadIdx.x, pair = thread / 64;
    Shared<uint32_t> slots(ptx::shared_base());
    uint32_t sum = 0;
    for (uint32_t round = 0; round < 3; round++) {
        slots.store(thread, thread + 1000 * round);
        ptx::barrier(1 + pair, 64);
        sum += slots.load(thread ^ 32);
        ptx::barrier(1 + pair, 64);
    }
    words(p.c).store(thread, sum);
}

// The last block to come adds up what all of them wrote: a [blocks] of int, b a counter that begins at 0,
// c [blocks + 1] with the sum at the end.
DEVICE void last_block(const Params& p)
{
    if (threadIdx.x != 0) return;
    Global<int> c(static_cast<int*>(p.c));
    c.store(blockIdx.x, Global<const int>(static_cast<const int*>(p.a)).load(blockIdx.x));
    ptx::fence_device();
    int before = ptx::atomic_add(static_cast<int*>(const_cast<void*>(p.b)), 1);
    if (before + 1 != int(gridDim.x)) return;
    int sum = 0;
    for (uint32_t i = 0; i < gridDim.x; i++) sum += c.load_coherent(i);
    c.store(gridDim.x, sum);
}

// Every block waits for the one after it, the last for nobody: c [blocks] of flags that begin at 0. All must be
// resident at once where the order is the natural one.
DEVICE void wait_for_next(const Params& p)
{
    Global<int> flags(static_cast<int*>(p.c));
    if (threadIdx.x == 0 && blockIdx.x + 1 < gridDim.x) {
        while (flags.load_coherent(blockIdx.x + 1) == 0) {}
    }
    ptx::barrier();
    if (threadIdx.x == 0) flags.store(blockIdx.x, 1);
}

// c[i, 0] = a[i] and -a[i] as f16, c[i, 1] the former in f32 again.
DEVICE void conversions_f16(const Params& p)
{
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
        float x = floats(p.a).load(i);
        uint32_t pair = pack_f16(x, -x);
        words(p.c).store(2 * i, pair);
        floats(p.c).store(2 * i + 1, to_float(f16{uint16_t(pair)}));
    }
}

// c[i] of the functions at a[i].
DEVICE void functions(const Params& p)
{
    if (int(threadIdx.x) >= p.n) return;
    float x = floats(p.a).load(threadIdx.x);
    float results[4] = {ptx::exp2(x), ptx::log2(x), ptx::rsqrt(x), ptx::reciprocal(x)};
    for (int i = 0; i < 4; i++) floats(p.c).store(i * p.n + int(threadIdx.x), results[i]);
}

// ---- Pairs ----

// c = a reversed, through shared memory. The bug: nobody waits until it is there.
template <bool BUG>
DEVICE void reverse(const Params& p)
{
    uint32_t i = threadIdx.x;
    Shared<float> shared(ptx::shared_base());
    shared.store(i, floats(p.a).load(i));
    if (!BUG) ptx::barrier();
    floats(p.c).store(i, shared.load(blockDim.x - 1 - i));
}

// The same within a warp, with warp_sync.
template <bool BUG>
DEVICE void reverse_lanes(const Params& p)
{
    uint32_t i = threadIdx.x;
    Shared<float> shared(ptx::shared_base());
    shared.store(i, floats(p.a).load(i));
    if (!BUG) ptx::warp_sync();
    floats(p.c).store(i, shared.load(i ^ 31));
}

enum class CopyBug {
    none,
    no_wait,            // read by the issuing thread
    too_few_waited_for, // the group is still allowed to be under way
    no_barrier,         // read by another thread
    overwritten_source,
    overwritten_destination,
};

// c = a reversed by fours, copied asynchronously.
template <CopyBug BUG>
DEVICE void copy_reverse(const Params& p)
{
    uint32_t i = threadIdx.x, base = ptx::shared_base();
    float* a = static_cast<float*>(const_cast<void*>(p.a));
    ptx::cp_async_16(base + 16 * i, a + 4 * i, true);
    ptx::cp_async_commit();
    if (BUG == CopyBug::overwritten_source && i == 5) Global<float>(a).store(4 * i, -1.0f);
    if (BUG == CopyBug::overwritten_destination && i == 5) Shared<float>(base).store(4 * i, -1.0f);
    if (BUG == CopyBug::too_few_waited_for) {
        ptx::cp_async_wait<1>();
    } else if (BUG != CopyBug::no_wait) {
        ptx::cp_async_wait<0>();
    }
    if (BUG != CopyBug::no_barrier) ptx::barrier();
    bool own = BUG == CopyBug::no_wait;
    floats(p.c).store_16(4 * i, Shared<float>(base).load_16(4 * (own ? i : blockDim.x - 1 - i)));
}

// Warp 1 reads what warp 0 then writes anew. In the natural order warp 1, which comes to the barrier last, goes
// on first, and the result is right; in the other order it is not. c [32] gets the first contents.
template <bool BUG>
DEVICE void write_after_read(const Params& p)
{
    uint32_t lane = ptx::lane_id(), warp = ptx::warp_id();
    Shared<uint32_t> shared(ptx::shared_base());
    if (warp == 0) shared.store(lane, lane);
    ptx::barrier();
    if (warp == 1) words(p.c).store(lane, shared.load(31 - lane));
    if (!BUG) ptx::barrier();
    if (warp == 0) shared.store(lane, 100 + lane);
}

// Two warps write the same place.
template <bool BUG>
DEVICE void write_after_write(const Params& p)
{
    uint32_t lane = ptx::lane_id(), warp = threadIdx.x / 32;
    Shared<uint32_t> shared(ptx::shared_base());
    if (warp == 0) shared.store(lane, lane);
    if (!BUG) ptx::barrier();
    if (warp == 1) shared.store(lane, 100 + lane);
    ptx::barrier();
    words(p.c).store(threadIdx.x, shared.load(lane));
}

// All lanes write the same place: the same value, which is allowed, or each its own.
template <bool BUG>
DEVICE void one_for_all(const Params& p)
{
    uint32_t lane = ptx::lane_id();
    Shared<uint32_t> shared(ptx::shared_base());
    shared.store(0, BUG ? lane : 7);
    ptx::warp_sync();
    words(p.c).store(lane, shared.load(0));
}

// Barriers that do not order what they seem to: warps 0 and 1 meet, then 2 and 3, and warp 3 reads what warp 0
// wrote. Without the bug warp 1 hands it on to warp 2.
template <bool BUG>
DEVICE void relay(const Params& p)
{
    uint32_t lane = ptx::lane_id(), warp = threadIdx.x / 32;
    Shared<uint32_t> shared(ptx::shared_base());
    if (warp == 0) shared.store(lane, lane);
    if (warp < 2) ptx::barrier(1, 64);
    if (!BUG && (warp == 1 || warp == 2)) ptx::barrier(2, 64);
    if (warp >= 2) ptx::barrier(3, 64);
    if (warp == 3) words(p.c).store(lane, shared.load(lane));
}

// ---- Accesses that must be refused ----

enum class Access {
    shared_read_past_end,
    shared_write_past_end,
    shared_below_begin,
    shared_misaligned,
    shared_unwritten,
    ldmatrix_past_end,
    ldmatrix_misaligned,
    ldmatrix_unwritten,
    copy_past_end,
    copy_misaligned,
    copy_from_past_end,
    copy_from_misaligned,
    global_read_past_end,
    global_write_past_end,
    global_before_begin,
    global_misaligned,
    global_pair_misaligned,
    global_null,
    atomic_past_end,
};

// One access by thread 3, or by all for ldmatrix; a and c have n floats, shared memory has 512 bytes.
DEVICE void access(const Params& p)
{
    uint32_t base = ptx::shared_base(), lane = ptx::lane_id();
    Shared<float> shared(base);
    Access access = static_cast<Access>(p.variant);
    if (access != Access::shared_unwritten && access != Access::ldmatrix_unwritten) {
        for (int i = 0; i < 4; i++) shared.store(32 * i + lane, 0.0f);
    }
    ptx::warp_sync();
    uint32_t r[4];
    if (access == Access::ldmatrix_past_end) ptx::ldmatrix_x4(r, base + 16 * (lane + 1));
    if (access == Access::ldmatrix_misaligned) ptx::ldmatrix_x4(r, base + 16 * (lane % 31) + 8);
    if (access == Access::ldmatrix_unwritten) ptx::ldmatrix_x4(r, base + 16 * lane);
    if (lane != 3) return;
    switch (access) {
    case Access::shared_read_past_end: shared.load(128); break;
    case Access::shared_write_past_end: shared.store(128, 0.0f); break;
    case Access::shared_below_begin: Shared<float>(0).load(0); break;
    case Access::shared_misaligned: shared.load_16(1); break;
    case Access::shared_unwritten: shared.load(3); break;
    case Access::copy_past_end: ptx::cp_async_16(base + 512, p.a, true); break;
    case Access::copy_misaligned: ptx::cp_async_16(base + 8, p.a, true); break;
    case Access::copy_from_past_end: ptx::cp_async_16(base, floats(p.a).at(p.n), true); break;
    case Access::copy_from_misaligned: ptx::cp_async_16(base, floats(p.a).at(1), true); break;
    case Access::global_read_past_end: floats(p.a).load(p.n); break;
    case Access::global_write_past_end: floats(p.c).store(p.n, 0.0f); break;
    case Access::global_before_begin: floats(p.a).load(-1); break;
    case Access::global_misaligned: floats(p.a).load_16(1); break;
    case Access::global_pair_misaligned: Global<const bf16>(static_cast<const bf16*>(p.a)).load_pair(1); break;
    case Access::global_null: floats(p.b).load(0); break;
    case Access::atomic_past_end: ptx::atomic_add(static_cast<int*>(p.c) + p.n, 1); break;
    default: break;
    }
}

// ---- Meetings that never happen ----

enum class Meeting {
    divergent_shuffle,   // two branches, two shuffles
    half_a_shuffle,      // half of the lanes have ended
    other_collective,    // a shuffle here, a warp_sync there
    half_a_barrier,      // a barrier that half of the lanes skip
    barrier_of_a_branch, // a barrier that one warp skips
    barrier_counts,      // warps that expect different numbers of threads
    barrier_too_large,   // more threads than there are
    barrier_number,      // a barrier that does not exist
    barrier_lanes,       // lanes that name different barriers
    shuffle_lane,        // a lane that does not exist
    endless_poll,        // a flag that nobody sets
    endless_poll_warp,   // the same with a vote in the loop
};

DEVICE void meeting(const Params& p)
{
    uint32_t thread = threadIdx.x, lane = ptx::lane_id();
    uint32_t x = thread;
    Global<const int> flag(static_cast<const int*>(p.a));
    switch (static_cast<Meeting>(p.variant)) {
    case Meeting::divergent_shuffle:
        if (lane < 16) {
            x = ptx::shuffle_xor(x, 1);
        } else {
            x = ptx::shuffle_xor(x, 2);
        }
        break;
    case Meeting::half_a_shuffle:
        if (lane >= 16) return;
        x = ptx::shuffle_xor(x, 1);
        break;
    case Meeting::other_collective:
        if (lane < 16) {
            x = ptx::shuffle_xor(x, 1);
        } else {
            ptx::warp_sync();
        }
        break;
    case Meeting::half_a_barrier:
        if (lane < 16) ptx::barrier();
        break;
    case Meeting::barrier_of_a_branch:
        if (thread < 32) ptx::barrier();
        break;
    case Meeting::barrier_counts: ptx::barrier(1, thread < 32 ? 64 : 32); break;
    case Meeting::barrier_too_large: ptx::barrier(1, 96); break;
    case Meeting::barrier_number: ptx::barrier(16, 64); break;
    case Meeting::barrier_lanes: ptx::barrier(1 + lane % 2, 64); break;
    case Meeting::shuffle_lane: x = ptx::shuffle(x, lane + 1); break;
    case Meeting::endless_poll:
        if (thread == 0) {
            while (flag.load_coherent(0) == 0) {}
        }
        ptx::barrier();
        break;
    case Meeting::endless_poll_warp:
        if (thread < 32) {
            while (ptx::ballot(lane == 0 && flag.load_coherent(0) != 0) == 0) {}
        }
        ptx::barrier();
        break;
    }
    words(p.c).store(thread, x);
}

// ---- Blocks ----

// Every block writes its number to c[0], or to a place of its own.
template <bool BUG>
DEVICE void own_place(const Params& p)
{
    if (threadIdx.x == 0) words(p.c).store(BUG ? 0 : blockIdx.x, blockIdx.x);
}

// Block 1 reads c[0], which block 0 writes: by load, or by load_coherent as it must be.
template <bool BUG>
DEVICE void read_neighbour(const Params& p)
{
    if (threadIdx.x != 0) return;
    Global<uint32_t> c = words(p.c);
    if (blockIdx.x == 0) {
        c.store(0, 7);
        ptx::fence_device();
        c.store(1, 1);
    } else if (BUG) {
        if (c.load(0) != 0) c.store(2, 1);
    } else {
        while (c.load_coherent(1) == 0) {}
        c.store(2, c.load_coherent(0));
    }
}

// ---- Launches that begin before the one before them has ended ----

enum class Early {
    all_wait,      // none is early
    one_waits,     // and meets the others at a barrier
    read,          // before the wait, as what follows
    write,
    copy,
    atomic,
    of_other_warp, // the wait is one of the other warp, which this one has not met
    of_other_lane, // or of another lane
    end,           // a thread ends
};

// c = a, 64 words.
DEVICE void dependent(const Params& p)
{
    const Early early = static_cast<Early>(p.variant);
    uint32_t thread = threadIdx.x;
    switch (early) {
    case Early::read: floats(p.a).load(thread); break;
    case Early::write: words(p.c).store(thread, 0); break;
    case Early::copy: ptx::cp_async_16(ptx::shared_base() + 16 * thread, p.a, true); break;
    case Early::atomic: ptx::atomic_add(static_cast<int*>(p.c), 1); break;
    case Early::end:
        if (thread == 0) return;
        break;
    default: break;
    }
    bool one = early == Early::one_waits || early == Early::of_other_warp || early == Early::of_other_lane;
    if (!one || thread == 63) ptx::dependency_wait();
    if (early == Early::one_waits) ptx::barrier();
    if (early == Early::of_other_warp) ptx::barrier(1 + thread / 32, 32);
    if (early == Early::of_other_lane) ptx::warp_sync();
    float x = floats(p.a).load(thread);
    words(p.c).store(thread, float_to_bits(x));
}

// ---- What goes on beside a launch ----

// c = 64 words of a, once the flag at b is raised. The bug: without waiting.
template <bool BUG>
DEVICE void copy_when_ready(const Params& p)
{
    if (!BUG && threadIdx.x == 0) {
        while (Global<const uint32_t>(static_cast<const uint32_t*>(p.b)).load_system(0) == 0) {}
    }
    ptx::barrier();
    words(p.c).store(threadIdx.x, Global<const uint32_t>(static_cast<const uint32_t*>(p.a)).load(threadIdx.x));
}

// 64 words of a go to c, and each of two warps counts at b what it has written. The bug: what it is about to write.
template <bool BUG>
DEVICE void count_what_is_written(const Params& p)
{
    int* counter = static_cast<int*>(const_cast<void*>(p.b));
    if (BUG && ptx::lane_id() == 0) ptx::atomic_add_release_system(counter, 1);
    ptx::warp_sync();
    words(p.c).store(threadIdx.x, Global<const uint32_t>(static_cast<const uint32_t*>(p.a)).load(threadIdx.x));
    ptx::warp_sync();
    if (!BUG && ptx::lane_id() == 0) ptx::atomic_add_release_system(counter, 1);
}

} // namespace planted
