// Packed attention with QK-norm and rotary position embedding, forward, on Hopper: wgmma fed by a ring of keys and values.
// Operands and results as in sm80_attention_forward.cu.
//
// A block stays on its multiprocessor for many items. One of its warpgroups copies, normalises and rotates keys, CONSUMERS
// multiply. An item is a head of a short image, or a tile of 64 CONSUMERS queries of one of a long image; long ones come
// first. Each has all keys of the image in stages of 64 keys and their values.
//
//   short   all stages of an item fit the ring. They are copied and normalised once and stay for as long as it takes;
//           the next item's follow as they are given back.
//   long    keys were normalised beforehand (sm80_attention_prepare.cu) and pass by, a row block of queries for each
//           warpgroup.
//
// Blocks may be pairs, clusters of two. The two have neighbouring tiles of a long image, or one of them none, and each
// reads half of the keys and values for both. What they share they give back to both; short items each has for itself,
// and begins as soon as its long ones are done.
//
// Row blocks of 64 queries are dealt to the warpgroups in turn, on and on over the items, so that images of one block
// keep all of them busy. What a block computes does not depend on who does it.
//
// Where a long image has a block for each of them, warpgroups may take turns at the tensor cores: one makes
// exponentials while others multiply. What they compute is the same.
//
// Queries are in registers, as the left operand of wgmma, and so are the exponentials. The scores of the next 64 keys
// are computed while the tensor cores add up the values of those before. The last stage of an image takes 16, 32, 48 or
// 64 keys, of which those that do not exist are masked.
//
// Where an image is up to 16 rows longer than a multiple of 64, three quarters or more of a row block would be empty.
// These rows are left to mma, which takes 16 rows: each warp of the warpgroup attends to 16 keys of every stage, and
// what the four found is put together in the end. That is so by the length of the image alone, and with it the order of
// all sums: an image has the same bits in either list, on any grid and beside any neighbours.
#include "hopper_copies.cuh"

namespace attention_forward {

// A warpgroup that multiplies.
template <int D, int CONSUMERS>
struct HopperQueries {
    using Stages = HopperStages<D, CONSUMERS>;
    using Tile = typename Stages::Tile;
    using Items = typename Stages::Items;
    using Item = typename Stages::Item;
    using Ring = typename Stages::Ring;
    static constexpr int KEYS = Stages::KEYS;
    static constexpr int THREADS = Stages::THREADS;

    // A row block of 64 queries of a head, or its tail.
    struct Block {
        Head head;
        int row;
        int skip;    // stages of items before it of which this warpgroup has no block
        bool exists;
        bool is_new; // the first of its item that this warpgroup has
        bool is_last;
        bool by_turns;

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
                if (next.is_new) next.skip += Stages::stages_of(item.head);
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
            next.by_turns = p.turns != 0 && item.is_long() && item.rows() > 64 * (CONSUMERS - 1) + 16;
            return next;
        }
    };

    const AttentionForward& p;
    Stages stages;
    int group;
    int warp;
    float factor;
    bool has_turned = false;
    Ring at; // the first stage of the item
    Queries<Tile, 1> rows;

    DEVICE HopperQueries(const AttentionForward& p, int group)
        : p(p), group(group), warp(int(ptx::warp_id()) % 4), factor(p.scale * LOG2_E)
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
            if (block.is_last) at.skip(Stages::stages_of(block.head));
            const Block next = blocks.next(p);
            load(next);
            if (has_rows) rows.store(p, block.head, first_row(block), factor);
            block = next;
        }
        skip(block.skip);
        if (has_turned && group == 0) ptx::barrier(turn_of(0), 2 * THREADS);
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
        ptx::mbarrier_wait(stages.full + 8 * stage.stage, stage.parity);
    }

    // Gives a stage back: for this warp, or for all four, after a wgmma_wait of theirs. Collective.
    DEVICE void release(const Ring& stage, int warps) const
    {
        const uint32_t thread = warps == 1 ? threadIdx.x % 32 : threadIdx.x % THREADS;
        const uint32_t owners = p.pairs != 0 ? 2 : 1;
        uint32_t owner = 0;
        if (thread < owners) owner = stages.owners().load(2 * stage.stage + thread);
        // This block is told after both have looked: then it may note others.
        ptx::warp_sync();
        if (thread < owners) ptx::mbarrier_free_peer(owner, warps);
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
        const Tile keys = stages.keys_of(stage.stage);
        UNROLL
        for (int step = 0; step < Tile::STEPS; step++)
            ptx::wgmma<Element, N>(all<N>(s), rows.q[step][0], keys.rows_matrix(0, step, stages.zeros()), step != 0);
        ptx::wgmma_commit();
    }

    // Begins to add up the values of N keys.
    template <int N>
    DEVICE void add(const Operand<N>& a, const Ring& stage)
    {
        const uint64_t matrix = stages.values_of(stage.stage).columns_matrix(0);
        UNROLL
        for (int g = 0; g < N / 16; g++)
            ptx::wgmma<Element, D, true>(out(), a[g], ptx::wgmma_advance(matrix, g * 16 * Tile::ROW_BYTES), true);
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
                a[g][i] = pack_pair(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
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
            ptx::compute_before_wait(rows.sum[0][0] + rows.sum[0][1], stages.exchange);
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

    // Turns go round and round, on from one item to the next. The very first one is the first warpgroup's, which in
    // the end takes the one that is left over.
    DEVICE void begin_turn(const Block& block)
    {
        if (!block.by_turns) return;
        if (has_turned || group != 0) ptx::barrier(turn_of(group), 2 * THREADS);
        has_turned = true;
    }

    DEVICE void end_turn(const Block& block) const
    {
        if (block.by_turns) ptx::barrier_arrive(turn_of(group == CONSUMERS - 1 ? 0 : group + 1), 2 * THREADS);
    }

    static DEVICE uint32_t turn_of(int group)
    {
        return 1 + CONSUMERS + group;
    }

    DEVICE void attend(const Block& block)
    {
        const int last = Stages::stages_of(block.head) - 1;
        const int keys = block.head.length - KEYS * last;
        Ring stage = at;
        Operand<KEYS> a;
        if (last == 0) return attend_last<false>(block, stage, keys, a, stage);

        Scores<KEYS> s = {};
        float shrink[2];
        if (block.is_new) wait(stage);
        begin_turn(block);
        ptx::wgmma_fence(all<KEYS>(s));
        score<KEYS>(s, stage);
        end_turn(block);
        ptx::wgmma_wait<0>(all<KEYS>(s));
        soften<KEYS>(s, shrink);
        pack<KEYS>(a, s, shrink);
        Ring before = stage;
        stage.next();
        for (int i = 1; i < last; i++) {
            if (block.is_new) wait(stage);
            begin_turn(block);
            ptx::wgmma_fence(all<KEYS>(s), out());
            score<KEYS>(s, stage);
            add<KEYS>(a, before);
            end_turn(block);
            ptx::wgmma_wait<1>(all<KEYS>(s));
            soften<KEYS>(s, shrink);
            ptx::compute_before_wait(rows.sum[0][0] + rows.sum[0][1], stages.exchange);
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
            const Tile k = stages.keys_of(stage.stage);
            const Tile v = stages.values_of(stage.stage);
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
        const uint32_t place = stages.exchange + group * Stages::UNITS * Stages::UNIT_BYTES;
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
            for (int chunk = 0; chunk < Tile::CHUNKS; chunk += Stages::UNITS) {
                barrier();
                exchange_units(place, half, chunk);
            }
        }
        // What the first warp has read may be overwritten.
        barrier();
    }

    // Adds what three warps have in Stages::UNITS chunks of 8 rows to what the first has.
    DEVICE void exchange_units(uint32_t place, int half, int chunk)
    {
        const int lane = ptx::lane_id();
        const Shared<float> units(place);
        auto at = [&](int w, int unit, int i) { return ((unit * 3 + w - 1) * 2 + i) * 32 + lane; };
        UNROLL
        for (int unit = 0; unit < Stages::UNITS; unit++) {
            if (warp == 0 || chunk + unit >= Tile::CHUNKS) continue;
            const float(&tile)[4] = rows.out[(chunk + unit) / 2][0][(chunk + unit) % 2];
            UNROLL
            for (int i = 0; i < 2; i++) units.store(at(warp, unit, i), tile[2 * half + i]);
        }
        barrier();
        UNROLL
        for (int unit = 0; unit < Stages::UNITS; unit++) {
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

template <int D, int CONSUMERS>
DEVICE void hopper(const AttentionForward& p)
{
    using Stages = HopperStages<D, CONSUMERS>;
    const bool pairs = p.pairs != 0;
    Stages().clear_zeros();
    if (threadIdx.x == 0) {
        Stages().initialise(pairs);
        ptx::fence_mbarrier_init();
    }
    if (pairs)
        ptx::cluster_barrier();
    else
        ptx::barrier();
    ptx::dependency_wait();
    zero_unused(p, Schedule{p.schedule, p.slots, p.heads}.rows());
    const int group = ptx::warp_id() / 4;
    if (group == 0) {
        ptx::decrease_registers<Stages::COPY_REGISTERS>();
        HopperCopies<D, CONSUMERS>(p).run();
    } else {
        ptx::increase_registers<Stages::MULTIPLY_REGISTERS>();
        HopperQueries<D, CONSUMERS>(p, group - 1).run();
    }
    // The peer may still send to this block, or give stages back.
    if (pairs) ptx::cluster_barrier();
}

} // namespace attention_forward
