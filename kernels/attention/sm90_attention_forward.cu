// Packed attention with QK-norm, forward, on Hopper: wgmma fed by a ring of keys and values. Operands and results as in
// sm80_attention_forward.cu.
//
// A block stays on its multiprocessor for many items and is one warpgroup that copies and normalises keys, and CONSUMERS
// that multiply. An item is a head of a short image, or a tile of 64 CONSUMERS queries of one of a long image; long ones
// come first. Each has all keys of the image in stages of 64 keys and their values.
//
//   short   all stages of an item fit the ring. They are copied and normalised once and stay for as long as it takes;
//           the next item's follow as they are given back.
//   long    keys were normalised beforehand (sm80_attention_prepare.cu) and pass by, a row block of queries for each
//           warpgroup.
//
// Row blocks of 64 queries are dealt to the warpgroups in turn, on and on over the items, so that images of one block
// keep all of them busy. What a block computes does not depend on who does it.
//
// Queries are in registers, as the left operand of wgmma, and so are the exponentials. The scores of the next 64 keys
// are computed while the tensor cores add up the values of those before. The last stage of an image takes 16, 32, 48 or
// 64 keys, of which those that do not exist are masked.
//
// Where an image is up to 16 rows longer than a multiple of 64, three quarters or more of a row block would be empty.
// These rows are left to mma, which takes 16 rows: each warp of the warpgroup attends to 16 keys of every stage, and
// what the four found is put together in the end. That is so by the length of the image alone, and with it the order of
// all sums: an image has the same bits in either list, on any grid and beside any neighbours.
//
// Where a head has an odd number of chunks, the upper half of the last step of depth is zeros in the queries. On the
// side of the keys the plane behind it is read, which is the first one of the values: finite wherever results are.
#include "../common/ring.cuh"
#include "core_rows.cuh"
#include "forward_rows.cuh"
#include "own_rows.cuh"
#include "schedule.cuh"

namespace attention_forward {

// Queries of a head, as many as the image has or a tile takes, and all keys.
template <int TILE_ROWS>
struct HopperItem {
    Head head;
    int tile; // its first row, or -1 where the item is all of a short image

    DEVICE bool is_long() const
    {
        return tile >= 0;
    }

    DEVICE int first() const
    {
        return is_long() ? tile : 0;
    }

    DEVICE int rows() const
    {
        const int rest = head.length - first();
        return is_long() && rest > TILE_ROWS ? TILE_ROWS : rest;
    }
};

// The items of a block, one after another. Each lane looks up one of the next 32, so that nobody waits for it often.
template <int TILE_ROWS>
struct HopperItems {
    int given = 0;
    int start, length, head, tile; // the lane's; length is 0 where there is no item

    // False after the last one. Collective.
    DEVICE bool next(HopperItem<TILE_ROWS>& item, const AttentionForward& p)
    {
        const int lane = given % 32;
        if (lane == 0) look_up(p, int(blockIdx.x) + (given + int(ptx::lane_id())) * int(gridDim.x));
        given++;
        item.head.start = int(ptx::shuffle(uint32_t(start), lane));
        item.head.length = ptx::shuffle(uint32_t(length), lane);
        item.head.head = ptx::shuffle(uint32_t(head), lane);
        item.tile = ptx::shuffle(uint32_t(tile), lane);
        return item.head.length != 0;
    }

    DEVICE void look_up(const AttentionForward& p, int number)
    {
        const Schedule schedule{p.schedule, p.slots, p.heads};
        const int long_items = schedule.long_items();
        int image = 0;
        start = length = head = tile = 0;
        if (number < long_items) {
            const HeadTile item = schedule.head_tile(number, p.cu_seqlens, TILE_ROWS);
            image = item.image;
            head = item.head;
            tile = item.tile * TILE_ROWS;
        } else if (number - long_items < schedule.short_items()) {
            const ShortItem item = schedule.short_item(number - long_items);
            image = item.image;
            head = item.head;
            tile = -1;
        } else {
            return;
        }
        const Global<const int32_t> starts(p.cu_seqlens);
        start = starts.load(image);
        length = starts.load(image + 1) - start;
    }
};

template <int D, int CONSUMERS>
struct HopperForward {
    using Tile = CoreRows<D, 64>;
    using Items = HopperItems<64 * CONSUMERS>;
    using Item = HopperItem<64 * CONSUMERS>;
    static constexpr int KEYS = 64; // of a stage
    static constexpr int THREADS = 128;
    // A thread's, of those that multiply and those that copy: together as many as the launch gives them.
    static constexpr uint32_t MULTIPLY_REGISTERS = CONSUMERS == 3 ? 136 : D <= 96 ? 176 : 192;
    static constexpr uint32_t COPY_REGISTERS = (CONSUMERS == 3 ? 512 : 504) - CONSUMERS * MULTIPLY_REGISTERS;
    static constexpr uint32_t STAGE_BYTES = 2 * Tile::BYTES;
    // What a block is launched with, as in sm90_gemm.cu.
    static constexpr uint32_t SHARED_BYTES = 231424;
    static constexpr uint32_t MBARRIER_BYTES = 256;
    // Where the warps of a tail hand over results: 8 rows of 8 columns of three warps, or as many such as there is room
    // for; and before, the highest scores and sums of 16 rows of four warps.
    static constexpr uint32_t UNIT_BYTES = 3 * 8 * 8 * 4;
    static_assert(UNIT_BYTES >= 4 * 16 * 8, "");
    static constexpr int STAGES = (SHARED_BYTES - MBARRIER_BYTES - CONSUMERS * UNIT_BYTES) / STAGE_BYTES;
    static_assert(16 * STAGES <= MBARRIER_BYTES, "");
    static constexpr int ROOM = (SHARED_BYTES - MBARRIER_BYTES - STAGES * STAGE_BYTES) / (CONSUMERS * UNIT_BYTES);
    static constexpr int UNITS = ROOM < Tile::CHUNKS ? ROOM : Tile::CHUNKS;
    // Stages that are under way at a time.
    static constexpr int AHEAD = STAGES - 2 < 8 ? STAGES - 2 : 8;
    using Ring = HopperRing<STAGES>;

    const AttentionForward& p;
    uint32_t ring, full, empty, exchange;

    DEVICE explicit HopperForward(const AttentionForward& p) : p(p)
    {
        ring = ptx::shared_base();
        full = ring + STAGES * STAGE_BYTES;
        empty = full + 8 * STAGES;
        exchange = full + MBARRIER_BYTES;
    }

    DEVICE void initialise() const
    {
        for (int stage = 0; stage < STAGES; stage++) {
            ptx::mbarrier_init(full + 8 * stage, THREADS);
            // Each warp that multiplies.
            ptx::mbarrier_init(empty + 8 * stage, 4 * CONSUMERS);
        }
    }

    DEVICE Tile keys_of(uint32_t stage) const
    {
        return Tile(ring + stage * STAGE_BYTES);
    }

    DEVICE Tile values_of(uint32_t stage) const
    {
        return Tile(ring + stage * STAGE_BYTES + Tile::BYTES);
    }

    static DEVICE int stages_of(const Head& head)
    {
        return ceil_div(head.length, KEYS);
    }

    // ---- The warpgroup that copies ----

    // Stages that are under way, oldest first: lane i has the one that was begun as the (32 n + i)th.
    struct UnderWay {
        int begun = 0;
        int completed = 0;
        int token = 0; // of the first key
        int keys = 0;  // that are to be normalised, from the token on
        int head = 0;

        DEVICE int count() const
        {
            return begun - completed;
        }

        DEVICE void push(int token_, int keys_, int head_)
        {
            if (int(ptx::lane_id()) == begun % 32) token = token_, keys = keys_, head = head_;
            begun++;
        }
    };

    // Copies stage after stage as long as the ring has room, and meanwhile completes those that have come.
    DEVICE void copy() const
    {
        Items items;
        Item item{};
        Ring to_copy, to_complete;
        UnderWay under_way;
        int key = 0;
        bool more = true;
        for (;;) {
            if (more && key >= item.head.length) {
                key = 0;
                more = items.next(item, p);
            }
            const int count = under_way.count();
            if (more && count < AHEAD && (count == 0 || is_free(to_copy))) {
                copy_stage(item, key, to_copy, under_way);
                to_copy.next();
                key += KEYS;
            } else if (count > 0) {
                complete_stage(to_complete, under_way);
                to_complete.next();
            } else {
                break;
            }
        }
        // The next launch may take the multiprocessors that run out of work; it waits before it reads results.
        ptx::launch_dependents();
    }

    // Of the warpgroup. Whoever asks makes what follows from it anew, there are no registers to keep it.
    static DEVICE int thread()
    {
        return ptx::unknown(threadIdx.x) % THREADS;
    }

    // Whether a stage was given back. The same in all lanes of a warp. Collective.
    DEVICE bool is_free(const Ring& at) const
    {
        return ptx::shuffle(uint32_t(ptx::mbarrier_test(empty + 8 * at.stage, at.parity ^ 1)), 0) != 0;
    }

    // Begins to copy the keys of an item from `key` on, and their values.
    DEVICE void copy_stage(const Item& item, int key, const Ring& to, UnderWay& under_way) const
    {
        const OwnRows<Tile> own(thread(), THREADS);
        const Head& head = item.head;
        const int keys = head.length - key < KEYS ? head.length - key : KEYS;
        const int rows = round_up(keys, 16);
        const bool normed = p.norm.kind != NORM_NONE;
        const bool from_norm = normed && item.is_long();
        const int64_t k_stride = from_norm ? p.heads * p.head_dim : p.k_stride;
        const bf16* k = rows_of(from_norm ? p.k_norm : p.k, k_stride, p, head, key);
        ptx::mbarrier_wait(empty + 8 * to.stage, to.parity ^ 1);
        own.copy(keys_of(to.stage), k, k_stride, rows, keys, p.head_dim);
        own.copy(values_of(to.stage), rows_of(p.v, p.v_stride, p, head, key), p.v_stride, rows, keys, p.head_dim);
        ptx::cp_async_commit();
        prefetch_queries(item, key);
        under_way.push(int(head.start) + key, normed && !from_norm ? keys : 0, head.head);
    }

    // Brings 64 queries of an item from row `row` of it on to the cache, 64 bytes a thread.
    DEVICE void prefetch_queries(const Item& item, int row) const
    {
        constexpr int LANES = D <= 64 ? 2 : 4;
        const int own = thread();
        const int column = own % LANES * 32;
        const int end = item.rows() - row < KEYS ? item.rows() - row : KEYS;
        if (column >= p.head_dim) return;
        for (int r = own / LANES; r < end; r += THREADS / LANES) {
            const bf16* q = rows_of(p.q, p.q_stride, p, item.head, item.first() + row + r);
            ptx::prefetch_l2(Global<const bf16>(q).at(column));
        }
    }

    // Waits for the oldest stage that is under way, normalises its keys and hands it over. Collective.
    DEVICE void complete_stage(const Ring& at, UnderWay& under_way) const
    {
        const int lane = under_way.completed % 32;
        const int keys = ptx::shuffle(uint32_t(under_way.keys), lane);
        if (keys > 0) {
            const Head head{int(ptx::shuffle(uint32_t(under_way.token), lane)), keys,
                            int(ptx::shuffle(uint32_t(under_way.head), lane))};
            const HeadNorm norm = key_norm(p, head);
            const OwnRows<Tile> own(thread(), THREADS);
            wait_for_copies(under_way.count() - 1);
            own.template normalise<1>(keys_of(at.stage), norm, keys, p.head_dim,
                                      statistics_of(p.statistics.k_mean, p, head, 0, true),
                                      statistics_of(p.statistics.k_rstd, p, head, 0, true), p.heads);
        } else {
            wait_for_copies(under_way.count() - 1);
        }
        under_way.completed++;
        ptx::fence_proxy_async();
        ptx::mbarrier_arrive(full + 8 * at.stage);
    }

    static DEVICE void wait_for_copies(int pending)
    {
        switch (pending) {
        case 0: return ptx::cp_async_wait<0>();
        case 1: return ptx::cp_async_wait<1>();
        case 2: return ptx::cp_async_wait<2>();
        case 3: return ptx::cp_async_wait<3>();
        case 4: return ptx::cp_async_wait<4>();
        case 5: return ptx::cp_async_wait<5>();
        case 6: return ptx::cp_async_wait<6>();
        default: return ptx::cp_async_wait<7>();
        }
    }

    // ---- A warpgroup that multiplies ----

    // A row block of 64 queries of a head, or its tail.
    struct Block {
        Head head;
        int row;
        int skip;    // stages of items before it of which this warpgroup has no block
        bool exists;
        bool is_new; // the first of its item that this warpgroup has
        bool is_last;

        DEVICE bool is_tail() const
        {
            return head.length - row <= 16;
        }
    };

    // The blocks of warpgroup `group`, one after another.
    struct Blocks {
        Items items;
        Item item{};
        int group;
        int turn = 0;  // whose the first block of the next item is
        int block = 0; // of the item
        int count = 0; // blocks of the item

        DEVICE explicit Blocks(int group) : group(group) {}

        // Collective.
        DEVICE Block next(const AttentionForward& p)
        {
            Block next{};
            block += CONSUMERS;
            while (block >= count) {
                if (next.is_new) next.skip += stages_of(item.head);
                next.is_new = true;
                if (!items.next(item, p)) return next;
                count = ceil_div(item.rows(), 64);
                block = group - turn + (group < turn ? CONSUMERS : 0);
                turn = (turn + count) % CONSUMERS;
            }
            next.head = item.head;
            next.row = item.first() + 64 * block;
            next.exists = true;
            next.is_last = block + CONSUMERS >= count;
            return next;
        }
    };

    struct Consumer {
        const HopperForward& f;
        const AttentionForward& p;
        int group;
        int warp;
        float factor;
        Ring at; // the first stage of the item
        Queries<Tile, 1> rows;

        DEVICE Consumer(const HopperForward& f, int group)
            : f(f), p(f.p), group(group), warp(int(ptx::warp_id()) % 4), factor(f.p.scale * LOG2_E)
        {
        }

        DEVICE void run()
        {
            Blocks blocks(group);
            Block block = blocks.next(p);
            load(block);
            while (block.exists) {
                skip(block.skip);
                rows.begin(p, block.head, first_row(block));
                bool has_rows = true;
                if (block.is_tail())
                    has_rows = attend_tail(block);
                else
                    attend(block);
                if (block.is_last) at.skip(stages_of(block.head));
                const Block next = blocks.next(p);
                load(next);
                if (has_rows) rows.store(p, block.head, first_row(block), factor);
                block = next;
            }
            skip(block.skip);
        }

        // Of the 16 rows that this warp has of a block; all have the same of a tail.
        DEVICE int first_row(const Block& block) const
        {
            return block.row + (block.is_tail() ? 0 : 16 * warp);
        }

        DEVICE void load(const Block& block)
        {
            rows.load(p, block.head, first_row(block));
        }

        DEVICE void wait(const Ring& stage) const
        {
            ptx::mbarrier_wait(f.full + 8 * stage.stage, stage.parity);
        }

        // Gives a stage back: for this warp, or for all four, after a wgmma_wait of theirs.
        DEVICE void release(const Ring& stage, int warps) const
        {
            if ((warps == 1 ? threadIdx.x % 32 : threadIdx.x % THREADS) == 0)
                ptx::mbarrier_arrive(f.empty + 8 * stage.stage, warps);
        }

        // Passes by stages that nobody here reads. They are waited for all the same: whoever did not see a phase of an
        // mbarrier would take a later one for it.
        DEVICE void skip(int stages)
        {
            for (int i = 0; i < stages; i++, at.next()) {
                wait(at);
                release(at, 1);
            }
        }

        // ---- A row block: wgmma ----

        template <int N>
        using Scores = float[N / 16][1][2][4];
        template <int N>
        using Operand = uint32_t[N / 16][4]; // exponentials

        template <int N>
        static DEVICE float (&all(Scores<N>& s))[N / 2]
        {
            return reinterpret_cast<float(&)[N / 2]>(s);
        }

        DEVICE float (&out())[D / 2]
        {
            return reinterpret_cast<float(&)[D / 2]>(rows.out);
        }

        // Begins to compute the scores of N keys.
        template <int N>
        DEVICE void score(Scores<N>& s, const Ring& stage)
        {
            const uint64_t matrix = f.keys_of(stage.stage).rows_matrix(0, 0, 0);
            UNROLL
            for (int step = 0; step < Tile::STEPS; step++)
                ptx::wgmma<N>(all<N>(s), rows.q[step][0], ptx::wgmma_advance(matrix, step * 2 * Tile::PITCH), step != 0);
            ptx::wgmma_commit();
        }

        // Begins to add up the values of N keys.
        template <int N>
        DEVICE void add(const Operand<N>& a, const Ring& stage)
        {
            const uint64_t matrix = f.values_of(stage.stage).columns_matrix(0);
            UNROLL
            for (int g = 0; g < N / 16; g++)
                ptx::wgmma<D, true>(out(), a[g], ptx::wgmma_advance(matrix, g * 16 * Tile::ROW_BYTES), true);
            ptx::wgmma_commit();
        }

        // Scores to exponentials; `shrink` is what was added up so far must be multiplied by.
        template <int N>
        DEVICE void soften(Scores<N>& s, float (&shrink)[2])
        {
            UNROLL
            for (int half = 0; half < 2; half++) shrink[half] = rows.template soften<false>(s, 0, half, N, factor);
        }

        // The exponentials as an operand, and what was added up so far to the same measure.
        template <int N>
        DEVICE void pack(Operand<N>& a, const Scores<N>& s, const float (&shrink)[2])
        {
            UNROLL
            for (int half = 0; half < 2; half++) rows.rescale(0, half, shrink[half]);
            UNROLL
            for (int g = 0; g < N / 16; g++) {
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const float(&tile)[4] = s[g][0][i / 2];
                    a[g][i] = pack_bf16(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
                }
            }
        }

        // The last keys of an image, more than N - 16 and up to N. Where they come AFTER others, the values of stage
        // `before` are still to be added up.
        template <int N, bool AFTER>
        DEVICE void attend_last(const Block& block, const Ring& stage, int keys, const Operand<KEYS>& a_before,
                                const Ring& before)
        {
            Scores<N> s = {};
            Operand<N> a;
            float shrink[2];
            ptx::wgmma_fence(all<N>(s), out());
            score<N>(s, stage);
            if constexpr (AFTER) {
                add<KEYS>(a_before, before);
                ptx::wgmma_wait<1>(all<N>(s));
            } else {
                ptx::wgmma_wait<0>(all<N>(s));
            }
            UNROLL
            for (int i = 0; i < 8; i++) {
                const int key = N - 16 + i / 4 * 8 + int(ptx::lane_id()) % 4 * 2 + i % 2;
                if (key >= keys) s[N / 16 - 1][0][i / 4][i % 4] = -infinity();
            }
            soften<N>(s, shrink);
            if constexpr (AFTER) {
                ptx::wgmma_wait<0>(out());
                if (block.is_last) release(before, 4);
            }
            pack<N>(a, s, shrink);
            ptx::wgmma_fence(out());
            add<N>(a, stage);
            ptx::wgmma_wait<0>(out());
            if (block.is_last) release(stage, 4);
        }

        template <bool AFTER>
        DEVICE void attend_last(const Block& block, const Ring& stage, int keys, const Operand<KEYS>& a,
                                const Ring& before)
        {
            if (block.is_new) wait(stage);
            if (keys > 48)
                attend_last<64, AFTER>(block, stage, keys, a, before);
            else if (keys > 32)
                attend_last<48, AFTER>(block, stage, keys, a, before);
            else if (keys > 16)
                attend_last<32, AFTER>(block, stage, keys, a, before);
            else
                attend_last<16, AFTER>(block, stage, keys, a, before);
        }

        DEVICE void attend(const Block& block)
        {
            const int last = stages_of(block.head) - 1;
            const int keys = block.head.length - KEYS * last;
            Ring stage = at;
            Operand<KEYS> a;
            if (last == 0) return attend_last<false>(block, stage, keys, a, stage);

            Scores<KEYS> s = {};
            float shrink[2];
            if (block.is_new) wait(stage);
            ptx::wgmma_fence(all<KEYS>(s));
            score<KEYS>(s, stage);
            ptx::wgmma_wait<0>(all<KEYS>(s));
            soften<KEYS>(s, shrink);
            pack<KEYS>(a, s, shrink);
            Ring before = stage;
            stage.next();
            for (int i = 1; i < last; i++) {
                if (block.is_new) wait(stage);
                ptx::wgmma_fence(all<KEYS>(s), out());
                score<KEYS>(s, stage);
                add<KEYS>(a, before);
                ptx::wgmma_wait<1>(all<KEYS>(s));
                soften<KEYS>(s, shrink);
                ptx::wgmma_wait<0>(out());
                if (block.is_last) release(before, 4);
                pack<KEYS>(a, s, shrink);
                before = stage;
                stage.next();
            }
            attend_last<true>(block, stage, keys, a, before);
        }

        // ---- A tail: mma ----

        // Whether this warp has the result.
        DEVICE bool attend_tail(const Block& block)
        {
            Ring stage = at;
            for (int key = 0; key < block.head.length; key += KEYS, stage.next()) {
                const int keys = block.head.length - key - 16 * warp;
                const Tile k = f.keys_of(stage.stage);
                const Tile v = f.values_of(stage.stage);
                if (block.is_new) wait(stage);
                if (keys >= 16)
                    rows.template attend<16, false>(k, v, 16 * warp, 16, factor);
                else if (keys > 0)
                    rows.template attend<16, true>(k, v, 16 * warp, keys, factor);
                if (!block.is_last) continue;
                ptx::warp_sync();
                release(stage, 1);
            }
            if (block.head.length > 16) put_together(block.head.length - block.row);
            return warp == 0;
        }

        // Puts together in the first warp what all four have found out about `count` rows.
        DEVICE void put_together(int count)
        {
            const int lane = ptx::lane_id();
            const uint32_t place = f.exchange + group * UNITS * UNIT_BYTES;
            const Shared<float> found(place);
            UNROLL
            for (int half = 0; half < 2; half++) {
                const float sum = sum_of_lanes<4>(rows.sum[0][half]);
                const int row = 16 * warp + 8 * half + lane / 4;
                if (lane % 4 == 0) {
                    found.store(2 * row, rows.highest[0][half]);
                    found.store(2 * row + 1, sum);
                }
            }
            barrier();
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int row = 8 * half + lane / 4;
                float top = -infinity();
                UNROLL
                for (int w = 0; w < 4; w++) top = max(top, found.load(2 * (16 * w + row)));
                const float offset = -top * factor;
                rows.rescale(0, half, ptx::exp2(ptx::fused_multiply_add(rows.highest[0][half], factor, offset)));
                float sum = 0.0f;
                UNROLL
                for (int w = 0; w < 4; w++) {
                    const float highest = found.load(2 * (16 * w + row));
                    const float shrink = ptx::exp2(ptx::fused_multiply_add(highest, factor, offset));
                    sum = ptx::fused_multiply_add(found.load(2 * (16 * w + row) + 1), shrink, sum);
                }
                rows.highest[0][half] = top;
                // As store() wants it, spread over the lanes of a quad.
                rows.sum[0][half] = lane % 4 == 0 ? sum : 0.0f;
            }
            UNROLL
            for (int half = 0; half < 2; half++) {
                if (8 * half >= count) continue;
                UNROLL
                for (int chunk = 0; chunk < Tile::CHUNKS; chunk += UNITS) {
                    barrier();
                    exchange_units(place, half, chunk);
                }
            }
            // What the first warp has read may be overwritten.
            barrier();
        }

        // Adds what three warps have in UNITS chunks of 8 rows to what the first has.
        DEVICE void exchange_units(uint32_t place, int half, int chunk)
        {
            const int lane = ptx::lane_id();
            const Shared<float> units(place);
            auto at = [&](int w, int unit, int i) { return ((unit * 3 + w - 1) * 2 + i) * 32 + lane; };
            UNROLL
            for (int unit = 0; unit < UNITS; unit++) {
                if (warp == 0 || chunk + unit >= Tile::CHUNKS) continue;
                const float(&tile)[4] = rows.out[(chunk + unit) / 2][0][(chunk + unit) % 2];
                UNROLL
                for (int i = 0; i < 2; i++) units.store(at(warp, unit, i), tile[2 * half + i]);
            }
            barrier();
            UNROLL
            for (int unit = 0; unit < UNITS; unit++) {
                if (warp != 0 || chunk + unit >= Tile::CHUNKS) continue;
                float(&tile)[4] = rows.out[(chunk + unit) / 2][0][(chunk + unit) % 2];
                UNROLL
                for (int w = 1; w < 4; w++) {
                    UNROLL
                    for (int i = 0; i < 2; i++) tile[2 * half + i] += units.load(at(w, unit, i));
                }
            }
        }

        // Of this warpgroup.
        DEVICE void barrier() const
        {
            ptx::barrier(1 + group, THREADS);
        }
    };
};

template <int D, int CONSUMERS>
DEVICE void hopper(const AttentionForward& p)
{
    using Forward = HopperForward<D, CONSUMERS>;
    const Forward forward(p);
    if (threadIdx.x == 0) {
        forward.initialise();
        ptx::fence_mbarrier_init();
    }
    ptx::barrier();
    ptx::dependency_wait();
    zero_unused(p, Schedule{p.schedule, p.slots, p.heads}.rows());
    const int group = ptx::warp_id() / 4;
    if (group == 0) {
        ptx::decrease_registers<Forward::COPY_REGISTERS>();
        forward.copy();
    } else {
        ptx::increase_registers<Forward::MULTIPLY_REGISTERS>();
        typename Forward::Consumer consumer(forward, group - 1);
        consumer.run();
    }
}

} // namespace attention_forward
