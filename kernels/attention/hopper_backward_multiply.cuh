// A warpgroup that multiplies, Hopper's backward pass of attention: 64 keys of a block, whose dk and dv it holds in
// registers, by the query stages as they come.
#pragma once

#include "hopper_backward_memory.cuh"
#include "rope_quads.cuh"

namespace hopper_backward {

// Named barriers: of a warpgroup alone; where ds of both is there for the one that makes dq of it, and where it has.
DEVICE uint32_t own_barrier(uint32_t group)
{
    return 1 + group;
}

DEVICE uint32_t ready_barrier(uint32_t group)
{
    return 3 + group;
}

DEVICE uint32_t free_barrier(uint32_t group)
{
    return 5 + group;
}

template <int D>
struct Multiplier {
    using Layout = Memory<D>;
    using Keys = typename Layout::Keys;
    using Queries = typename Layout::Queries;
    static constexpr int CHUNKS = D / 8;
    static constexpr int STEPS = Keys::STEPS;
    // Queries at a time, and columns of dq: as many as dk and dv leave registers for.
    static constexpr int WIDTH = D <= 96 ? 64 : 32;
    static constexpr int DQ_COLUMNS = D <= 104 ? D : D / 2;

    const AttentionBackwardHopper& hopper;
    const AttentionBackward& p;
    const Layout memory;
    const uint32_t group;

    float dk[D / 2];
    float dv[D / 2];

    DEVICE Multiplier(const AttentionBackwardHopper& hopper, uint32_t group)
        : hopper(hopper), p(hopper.all), group(group)
    {
    }

    // Computed where it is wanted, here and below: what depends on nothing else in a loop would be computed before it and
    // keep registers.
    static DEVICE int thread()
    {
        return ptx::unknown(threadIdx.x % 128);
    }

    static DEVICE int warp()
    {
        return thread() / 32;
    }

    // Before step `step` of a key block writes ds, or behind the last one: waits until dq of that of the step before has
    // been made, by the other warpgroup or by all warps of this one. Collective.
    DEVICE void settle(bool pair, int step) const
    {
        if (!pair && step > 0 && !is_own(step - 1))
            ptx::barrier(free_barrier(1 - group), 256);
        else
            ptx::barrier(own_barrier(group), 128);
    }

    // Whether this warpgroup makes dq of a step that both work on.
    DEVICE bool is_own(int step) const
    {
        return step % 2 == int(group);
    }

    // By each warp, when it has read all of it.
    DEVICE void release(uint32_t mbarrier) const
    {
        ptx::warp_sync();
        if (ptx::lane_id() == 0) ptx::mbarrier_arrive(mbarrier);
    }

    // x = own rows of a tile of keys times N queries, transposed.
    template <int N>
    DEVICE void product(float (&x)[N / 2], Keys keys, Queries queries, int query) const
    {
        const int row = KEYS_OF_GROUP * group;
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            ptx::wgmma<Element, N>(x, keys.rows_matrix(row, step, memory.zeros()),
                                   queries.rows_matrix(query, step, memory.zeros()), step > 0);
        }
        ptx::wgmma_commit();
    }

    // sum += a times N queries.
    template <int N>
    DEVICE void accumulate(float (&sum)[D / 2], uint32_t (&a)[N / 16][4], Queries queries, int query) const
    {
        // a is complete before the fence.
        UNROLL
        for (int i = 0; i < N / 4; i++) a[i / 4][i % 4] = ptx::unknown(int(a[i / 4][i % 4]));
        ptx::wgmma_fence(sum);
        UNROLL
        for (int k = 0; k < N / 16; k++)
            ptx::wgmma<Element, D, true>(sum, a[k], queries.columns_matrix(query + 16 * k), true);
        ptx::wgmma_commit();
    }

    template <int N>
    static DEVICE void pack(uint32_t (&a)[N / 16][4], const float (&x)[N / 2])
    {
        UNROLL
        for (int i = 0; i < N / 4; i++) a[i / 4][i % 4] = pack_pair(x[2 * i], x[2 * i + 1]);
    }

    // Takes N queries of a stage, from `query` on; `keys` of this warpgroup's exist. Puts ds into shared memory. The
    // products into dv and dk are under way when it is done.
    template <int N>
    DEVICE void take(uint32_t slot, uint32_t stage, bool pair, int step, int query, int keys)
    {
        const int lane = thread() % 32;
        float s[N / 2];
        float t[N / 2];
        ptx::wgmma_fence(s, t);
        product<N>(s, memory.keys(slot), memory.queries(stage), query);
        product<N>(t, memory.values(slot), memory.dout(stage), query);
        const Shared<FloatPair> lse(memory.lse(stage) + 4 * query);
        const Shared<FloatPair> delta(memory.delta(stage) + 4 * query);
        const float factor = p.scale * LOG2_E;
        ptx::wgmma_wait<1>(s);
        UNROLL
        for (int c = 0; c < N / 8; c++) {
            const FloatPair two = lse.load(4 * c + lane % 4);
            UNROLL
            for (int i = 4 * c; i < 4 * c + 4; i++)
                s[i] = ptx::exp2(ptx::fused_multiply_add(s[i], factor, i % 2 ? two.second : two.first));
        }
        // Keys that do not exist have no part in the sums; queries that do not have an lse of infinity.
        if (keys < KEYS_OF_GROUP) {
            const int row = 16 * warp() + lane / 4;
            UNROLL
            for (int i = 0; i < N / 2; i++) {
                if (row + i / 2 % 2 * 8 >= keys) s[i] = 0.0f;
            }
        }
        uint32_t a[N / 16][4];
        pack<N>(a, s);
        accumulate<N>(dv, a, memory.dout(stage), query);
        ptx::wgmma_wait<1>(t);
        UNROLL
        for (int c = 0; c < N / 8; c++) {
            const FloatPair two = delta.load(4 * c + lane % 4);
            UNROLL
            for (int i = 4 * c; i < 4 * c + 4; i++) t[i] = s[i] * (t[i] + (i % 2 ? two.second : two.first));
        }
        uint32_t b[N / 16][4];
        pack<N>(b, t);
        accumulate<N>(dk, b, memory.queries(stage), query);
        // The first queries of a stage have to wait.
        if (query == 0) settle(pair, step);
        const int row = KEYS_OF_GROUP * group + 16 * warp() + lane % 16;
        UNROLL
        for (int k = 0; k < N / 16; k++)
            ptx::stmatrix_x4(memory.scores().address(row, query / 8 + 2 * k + lane / 16), b[k]);
        ptx::wgmma_wait<0>(dv, dk);
    }

    // The queries of a stage, `left` of which exist.
    DEVICE void take_stage(uint32_t slot, uint32_t stage, bool pair, int step, int keys, int left)
    {
        if constexpr (WIDTH == 64) {
            if (left > 48)
                take<64>(slot, stage, pair, step, 0, keys);
            else if (left > 32)
                take<48>(slot, stage, pair, step, 0, keys);
            else if (left > 16)
                take<32>(slot, stage, pair, step, 0, keys);
            else
                take<16>(slot, stage, pair, step, 0, keys);
        } else {
            for (int query = 0; query < QUERIES_OF_STAGE && query < left; query += 32) {
                if (left - query > 16)
                    take<32>(slot, stage, pair, step, query, keys);
                else
                    take<16>(slot, stage, pair, step, query, keys);
            }
        }
    }

    // dq (before the scale) of a stage from ds of 32 TWOS keys or fewer, of which there are places, from `row` on: its
    // columns from `chunk` on.
    template <int TWOS>
    DEVICE void query_gradient(float (&dq)[DQ_COLUMNS / 2], uint32_t slot, int row, int count, int chunk) const
    {
        if constexpr (TWOS > 1) {
            if (count <= 32 * (TWOS - 1)) return query_gradient<TWOS - 1>(dq, slot, row, count, chunk);
        }
        ptx::wgmma_fence(dq);
        UNROLL
        for (int i = 0; i < 2 * TWOS; i++) {
            const int key = row + 16 * i;
            ptx::wgmma<Element, DQ_COLUMNS, true, true>(dq, memory.scores().columns_matrix(key),
                                                        memory.keys(slot).columns_matrix(key, chunk), i > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(dq);
    }

    DEVICE Shared<FragmentFour> fragment(uint32_t tile) const
    {
        return Shared<FragmentFour>(memory.room(tile));
    }

    // Makes dq of a stage and puts it into room, where `add` onto what this thread has left there. When it is done, ds may
    // be overwritten.
    DEVICE void make_dq(uint32_t slot, int row, int count, uint32_t tile, bool add) const
    {
        const int lane = thread();
        UNROLL
        for (int first = 0; first < CHUNKS; first += DQ_COLUMNS / 8) {
            float dq[DQ_COLUMNS / 2];
            query_gradient<4>(dq, slot, row, count, first);
            UNROLL
            for (int c = 0; c < DQ_COLUMNS / 8; c++) {
                FragmentFour four{{dq[4 * c], dq[4 * c + 1], dq[4 * c + 2], dq[4 * c + 3]}};
                const uint32_t place = FragmentTile<D>::place(first + c, lane);
                if (add) {
                    const FragmentFour before = fragment(tile).load(place);
                    UNROLL
                    for (int i = 0; i < 4; i++) four.x[i] += before.x[i];
                }
                fragment(tile).store(place, four);
            }
        }
    }

    // Rotates dq of 64 queries of an image in room back, from `first` on; each thread its own. Collective.
    DEVICE void rotate_queries(uint32_t tile, Head head, int first) const
    {
        const int lane = thread();
        auto at = [&](int c) { return FragmentTile<D>::place(c, lane); };
        rotate_quads_back([&](int c) { return fragment(tile).load(at(c)); },
                          [&](int c, const FragmentFour& four) { fragment(tile).store(at(c), four); }, p.head_dim / 2,
                          16 * warp(), head.length - first, rope_of(p).from(head.start + first));
    }

    // Rotates dk back, `length` rows of which exist, from `first` of the image on. Collective.
    DEVICE void rotate_keys(Head head, int first, int length)
    {
        rotate_registers_back<D>(dk, 16 * warp(), length, rope_of(p).from(head.start + first));
    }

    // Writes 64 rows of a gradient of q or k, `length` of which exist, from `first` of the image on. Collective of the
    // warpgroup.
    template <class Four>
    DEVICE void finish(Four four, bool q, Head of, int first, int length) const
    {
        const Head head{ptx::unknown(of.start), of.length, ptx::unknown(of.head)};
        const bool summed = p.partial && p.norm.kind != NORM_NONE;
        const int64_t stride = q ? p.dq_stride : p.dk_stride;
        Element* const target = rows_of(p, q ? p.dq : p.dk, stride, head, first);
        const Head of_source = q ? head : kv_of(p, head);
        const Rows source = rows_of(p, q ? p.q : p.k, q ? p.q_stride : p.k_stride, of_source, first);
        const HeadNorm norm = head_norm(p.norm, q ? p.norm.q_gain : p.norm.k_gain, q ? p.norm.q_bias : p.norm.k_bias,
                                        of_source.head, p.head_dim);
        finish_quads<D>(four, 16 * warp(), length, p.scale, p.head_dim, target, stride, source, norm, summed,
                        memory.sums(4 * group + warp()));
        if (!summed) return;
        ptx::barrier(own_barrier(group), 128);
        add_sums<D>(p, memory.sums(4 * group), 2 * blockIdx.x + group, head.head, q ? Q_GAIN : K_GAIN, thread());
        // The sums are read before those of the next rows come.
        ptx::barrier(own_barrier(group), 128);
    }

    // dv as it is.
    DEVICE void write_values(Head of, int first, int length) const
    {
        const Head head{ptx::unknown(of.start), of.length, ptx::unknown(of.head)};
        HeadNorm none{nullptr, nullptr, NORM_NONE, 0.0f};
        Element* const target = rows_of(p, p.dv, p.dv_stride, head, first);
        auto four = [&](int c) { return FragmentFour{{dv[4 * c], dv[4 * c + 1], dv[4 * c + 2], dv[4 * c + 3]}}; };
        finish_quads<D>(four, 16 * warp(), length, 1.0f, p.head_dim, target, p.dv_stride, Rows{}, none, false,
                        memory.sums(0));
    }

    // The key block in a slot as this warpgroup sees it.
    struct Work {
        int kind;
        Head head;
        int key;       // first key of the block
        int keys;      // of the block
        int own_key;   // first key of this warpgroup
        int own_keys;  // 0: there are none
        int tiles;     // stages
        int first;     // tile of the first one
        bool last;     // whether the stages may go

        DEVICE bool pair() const
        {
            return kind == PAIR;
        }
    };

    DEVICE Work work(uint32_t slot) const
    {
        const KeyBlock block = memory.block(slot).load(0);
        Work w;
        w.kind = uniform(block.kind);
        w.head = Head{block.start, uniform(block.length), block.head + (w.pair() ? int(group) : 0)};
        w.key = uniform(block.key);
        const int left = w.head.length - w.key;
        w.keys = left < KEYS_OF_BLOCK ? left : KEYS_OF_BLOCK;
        w.own_key = w.key + (w.pair() ? 0 : KEYS_OF_GROUP * int(group));
        const int left_own = w.head.length - w.own_key;
        const bool none = left_own <= 0 || (w.pair() && int(group) >= uniform(block.heads));
        w.own_keys = none ? 0 : left_own < KEYS_OF_GROUP ? left_own : KEYS_OF_GROUP;
        w.tiles = w.pair() ? uniform(block.heads) : ceil_div(w.head.length, QUERIES_OF_STAGE);
        w.first = block.first;
        w.last = w.kind != WHOLE || left <= KEYS_OF_BLOCK;
        return w;
    }

    // Reads it again where registers are so full of gradients that it cannot be kept.
    DEVICE void remember(Work& w, uint32_t slot) const
    {
        if (D > 96) w = work(slot);
    }

    // Meets the other warpgroup, or this one alone, where ds of a stage is complete; whether this one makes dq of it.
    DEVICE bool meet(bool pair, int step) const
    {
        const bool mine = pair || is_own(step);
        ptx::fence_proxy_async();
        if (pair)
            ptx::barrier(own_barrier(group), 128);
        else if (mine)
            ptx::barrier(ready_barrier(group), 256);
        else
            ptx::barrier_arrive(ready_barrier(1 - group), 256);
        return mine;
    }

    // One stage of a key block.
    DEVICE void step(Work& w, uint32_t slot, uint32_t stage, const HopperRing<Layout::ROOM>& room, int step)
    {
        remember(w, slot);
        if (w.own_keys > 0)
            take_stage(slot, stage, w.pair(), step, w.own_keys, w.head.length - tile_of(w, step) * QUERIES_OF_STAGE);
        else
            settle(w.pair(), step);
        remember(w, slot);
        const bool mine = meet(w.pair(), step);
        // The products into dv and dk have read the stage.
        if (w.last) release(memory.stage_empty(stage));
        if (!mine) return;
        const bool is_long = w.kind == LONG;
        const uint32_t place = is_long ? room.stage : uint32_t(step);
        if (is_long) ptx::mbarrier_wait(memory.room_empty(place), room.parity ^ 1);
        make_dq(slot, w.pair() ? KEYS_OF_GROUP * int(group) : 0, w.keys, place, w.kind == WHOLE && w.key > 0);
        remember(w, slot);
        if (!w.pair()) ptx::barrier_arrive(free_barrier(group), 256);
        if (w.kind == LONG) {
            ptx::fence_proxy_async();
            release(memory.room_filled(place));
        } else if (w.last) {
            const int first = tile_of(w, step) * QUERIES_OF_STAGE;
            if (p.rope) {
                rotate_queries(place, w.head, first);
                remember(w, slot);
            }
            // Read twice, where otherwise all of it would be kept in registers.
            auto four = [&](int c) { return fragment(place).load(FragmentTile<D>::place(c, thread())); };
            finish(four, true, w.head, first, w.head.length - first);
        }
    }

    // Waits until nothing of a long image is left in room on its way to global memory.
    DEVICE void wait_for_room(const HopperRing<Layout::ROOM>& room) const
    {
        for (uint32_t i = 0; i < Layout::ROOM; i++)
            ptx::mbarrier_wait(memory.room_empty(i), i < room.stage ? room.parity : room.parity ^ 1);
    }

    static DEVICE int tile_of(const Work& w, int step)
    {
        const int tile = w.first + step;
        return w.pair() ? 0 : tile < w.tiles ? tile : tile - w.tiles;
    }

    DEVICE void run()
    {
        HopperRing<Layout::SLOTS> slot;
        HopperRing<Layout::STAGES> stage;
        HopperRing<Layout::ROOM> room;
        for (;; slot.next()) {
            ptx::mbarrier_wait(memory.slot_filled(slot.stage), slot.parity);
            Work w = work(slot.stage);
            if (w.kind == END) break;
            if (w.kind != LONG) wait_for_room(room);
            UNROLL
            for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.0f;
            int i = 0;
            for (;; i++) {
                remember(w, slot.stage);
                if (i == w.tiles) break;
                HopperRing<Layout::STAGES> at = stage;
                at.skip(i);
                ptx::mbarrier_wait(memory.stage_filled(at.stage), at.parity);
                if (w.pair() && i != int(group))
                    release(memory.stage_empty(at.stage));
                else
                    step(w, slot.stage, at.stage, room, i);
                remember(w, slot.stage);
                if (w.kind == LONG) room.next();
            }
            if (w.last) stage.skip(i);
            release(memory.slot_empty(slot.stage));
            if (w.own_keys > 0) {
                write_values(w.head, w.own_key, w.own_keys);
                if (p.rope) rotate_keys(w.head, w.own_key, w.own_keys);
                auto four = [&](int c) {
                    return FragmentFour{{dk[4 * c], dk[4 * c + 1], dk[4 * c + 2], dk[4 * c + 3]}};
                };
                finish(four, false, w.head, w.own_key, w.own_keys);
            }
            settle(w.pair(), w.tiles);
        }
    }
};

} // namespace hopper_backward
