// The work lists of attention (schedule.cuh) from cu_seqlens, on the device, by one block.
//
// Images are sorted by length, longest first, in bins of 16 rows; images of one bin stay in the order of their
// slots. It is a stable counting sort: each warp counts its own run of slots, an exclusive sum over (bin,
// warp) gives the places, each warp places its slots in order. O(slots + long tiles), no atomics, so the
// lists are the same from run to run. Limits are multiples of 16 rows: the images of a kind are a range of
// bins. Lengths from 16,368 rows on share the last bin.
//
// cu_seqlens is checked first. Where it does not begin at 0, decreases, ends beyond the token rows, or has a
// longer image than was promised, the error word is set (1, 2, 3, 4), the lists are empty and no row counts
// as used: nothing is read out of bounds, and no image is passed over.
#include "schedule.cuh"

struct AttentionSchedule {
    const int32_t* cu_seqlens; // [slots + 1]
    int32_t* words;
    int32_t* error; // set, never cleared; may be null
    int32_t slots;
    int32_t tokens;
    int32_t short_limit;   // longest image of the short schedule
    int32_t half_limit;    // longest image whose heads have half a block each
    int32_t quarter_limit; // longest image whose heads have a quarter
    int32_t tile_rows;     // rows of a long item
    int32_t longest;       // most rows of an image
    int32_t unused;
};

namespace attention_schedule {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int BIN_BITS = 10;
constexpr int BINS = 1 << BIN_BITS;
constexpr int BINS_OF_THREAD = BINS / THREADS;

// Shared memory: counts, later places, [WARPS, BINS]; then one word a warp.
DEVICE Shared<uint32_t> counts(int warp)
{
    return Shared<uint32_t>(ptx::shared_base() + warp * BINS * 4);
}

DEVICE Shared<uint32_t> of_warps()
{
    return Shared<uint32_t>(ptx::shared_base() + WARPS * BINS * 4);
}

DEVICE int bin_of(int length)
{
    const int bin = ceil_div(length, 16);
    return bin < BINS ? bin : BINS - 1;
}

// Sum of x over the threads before this one; `total` over all threads.
DEVICE uint32_t exclusive_sum(uint32_t x, uint32_t& total)
{
    const uint32_t lane = ptx::lane_id();
    const uint32_t warp = ptx::warp_id();
    uint32_t sum = x;
    UNROLL
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = ptx::shuffle_up(sum, step);
        if (lane >= step) sum += other;
    }
    ptx::barrier();
    if (lane == 31) of_warps().store(warp, sum);
    ptx::barrier();
    uint32_t before = 0;
    total = 0;
    for (uint32_t w = 0; w < WARPS; w++) {
        if (w == warp) before = total;
        total += of_warps().load(w);
    }
    return before + sum - x;
}

// What is wrong with cu_seqlens, the same in all threads; 0 where nothing is.
DEVICE int check(const AttentionSchedule& p)
{
    const Global<const int32_t> cu_seqlens(p.cu_seqlens);
    bool decreases = false;
    bool too_long = false;
    for (int i = threadIdx.x; i < p.slots; i += THREADS) {
        const int64_t length = int64_t(cu_seqlens.load(i + 1)) - cu_seqlens.load(i);
        if (length < 0) decreases = true;
        if (length > p.longest) too_long = true;
    }
    uint32_t falls;
    uint32_t beyond;
    exclusive_sum(decreases ? 1 : 0, falls);
    exclusive_sum(too_long ? 1 : 0, beyond);
    if (cu_seqlens.load(0) != 0) return 1;
    if (falls != 0) return 2;
    if (cu_seqlens.load(p.slots) > p.tokens) return 3;
    return beyond != 0 ? 4 : 0;
}

// Calls visit(slot, bin, rank, same) for the slots of this warp in their order, all lanes together; bin is 0
// where a slot holds no image. `same` lanes of this step have the same bin, `rank` of them before this one.
template <class Visit>
DEVICE void for_each_image(const AttentionSchedule& p, Visit visit)
{
    const Global<const int32_t> cu_seqlens(p.cu_seqlens);
    const uint32_t lane = ptx::lane_id();
    const int share = round_up(ceil_div(p.slots, WARPS), 32);
    const int begin = int(ptx::warp_id()) * share;
    const int end = begin + share < p.slots ? begin + share : p.slots;
    for (int first = begin; first < end; first += 32) {
        const int slot = first + int(lane);
        const int bin = slot < end ? bin_of(cu_seqlens.load(slot + 1) - cu_seqlens.load(slot)) : 0;
        uint32_t equal = 0xffffffffu;
        UNROLL
        for (int bit = 0; bit < BIN_BITS; bit++) {
            const bool set = bin >> bit & 1;
            const uint32_t lanes = ptx::ballot(set);
            equal &= set ? lanes : ~lanes;
        }
        visit(slot, bin, count_bits(equal & ((1u << lane) - 1)), count_bits(equal));
        ptx::warp_sync();
    }
}

DEVICE void run(const AttentionSchedule& p)
{
    begin_dependent();
    const Global<int32_t> words(p.words);
    const int fault = check(p);
    if (threadIdx.x < SCHEDULE_HEADER) words.store(threadIdx.x, 0);
    if (fault != 0) {
        if (threadIdx.x == 0 && p.error) Global<int32_t>(p.error).store(0, fault);
        return;
    }

    const Shared<uint32_t> own = counts(ptx::warp_id());
    for (int i = threadIdx.x; i < WARPS * BINS; i += THREADS) counts(0).store(i, 0);
    ptx::barrier();
    for_each_image(p, [&](int, int bin, uint32_t rank, uint32_t same) {
        // The last of the equal lanes counts them all.
        if (bin != 0 && rank + 1 == same) own.store(bin, own.load(bin) + same);
    });
    ptx::barrier();

    // Counts to places, from the last bin to the first.
    const int top = BINS - 1 - int(threadIdx.x) * BINS_OF_THREAD;
    uint32_t sum = 0;
    for (int i = 0; i < BINS_OF_THREAD * WARPS; i++) sum += counts(i % WARPS).load(top - i / WARPS);
    uint32_t images;
    uint32_t place = exclusive_sum(sum, images);
    for (int i = 0; i < BINS_OF_THREAD * WARPS; i++) {
        const uint32_t count = counts(i % WARPS).load(top - i / WARPS);
        counts(i % WARPS).store(top - i / WARPS, place);
        place += count;
    }
    ptx::barrier();

    // The first place of a bin is the number of images in longer bins.
    const int long_images = counts(0).load(p.short_limit / 16);
    const int to_half = counts(0).load(p.half_limit / 16);
    const int to_quarter = counts(0).load(p.quarter_limit / 16);
    ptx::barrier();
    // Long images are kept where short ones leave room, until their tiles are listed.
    const int long_list = SCHEDULE_HEADER + p.slots - long_images;
    for_each_image(p, [&](int slot, int bin, uint32_t rank, uint32_t same) {
        const uint32_t first = own.load(bin);
        ptx::warp_sync();
        if (bin == 0) return;
        const int at = int(first + rank);
        words.store(at < long_images ? long_list + at : SCHEDULE_HEADER + at - long_images, slot);
        if (rank + 1 == same) own.store(bin, first + same);
    });
    ptx::barrier();

    const Global<const int32_t> cu_seqlens(p.cu_seqlens);
    uint32_t items = 0;
    for (int first = 0; first < long_images; first += THREADS) {
        const int at = first + int(threadIdx.x);
        const int slot = at < long_images ? words.load(long_list + at) : 0;
        const int length = at < long_images ? cu_seqlens.load(slot + 1) - cu_seqlens.load(slot) : 0;
        const uint32_t tiles = ceil_div(length, p.tile_rows);
        uint32_t total;
        const uint32_t before = items + exclusive_sum(tiles, total);
        for (uint32_t tile = 0; tile < tiles; tile++) {
            const int64_t word = SCHEDULE_HEADER + p.slots + 2 * int64_t(before + tile);
            words.store(word, slot);
            words.store(word + 1, tile);
        }
        items += total;
    }
    if (threadIdx.x == 0) {
        words.store(SCHEDULE_ROWS, cu_seqlens.load(p.slots));
        words.store(SCHEDULE_WHOLE, to_half - long_images);
        words.store(SCHEDULE_HALF, to_quarter - to_half);
        words.store(SCHEDULE_QUARTER, int(images) - to_quarter);
        words.store(SCHEDULE_LONG, items);
    }
}

} // namespace attention_schedule
