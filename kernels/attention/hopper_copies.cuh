// The warpgroup of Hopper's forward kernel of attention that copies keys and values, and normalises keys.
//
// Of a stage that a pair shares, each block copies half of the rows, and once they have come sends them to the same
// place in the other block. It needs no leave to: what both share is given back to both, so that it is free there when
// it is free here.
#pragma once

#include "hopper_stages.cuh"
#include "own_rows.cuh"

namespace attention_forward {

template <int D, int CONSUMERS>
struct HopperCopies {
    using Stages = HopperStages<D, CONSUMERS>;
    using Tile = typename Stages::Tile;
    using Items = typename Stages::Items;
    using Item = typename Stages::Item;
    using Ring = typename Stages::Ring;
    static constexpr int KEYS = Stages::KEYS;
    static constexpr int THREADS = Stages::THREADS;
    // Stages that are under way at a time.
    static constexpr int AHEAD = Stages::STAGES - 2 < 8 ? Stages::STAGES - 2 : 8;
    // The same until the first one is there.
    static constexpr int FIRST = 2;
    // Rows that a thread normalises at a time, of the two that it has of a stage: what registers allow.
    static constexpr int ROWS = D == 64 || D == 88 || D == 96 ? 2 : 1;

    const AttentionForward& p;
    Stages stages;

    DEVICE explicit HopperCopies(const AttentionForward& p) : p(p) {}

    // Stages that are under way, oldest first: lane i has the one that was begun as the (32 n + i)th.
    struct UnderWay {
        uint32_t begun = 0;
        uint32_t completed = 0;
        int token = 0; // of the first key
        int keys = 0;  // that are to be normalised, from the token on; or minus the rows of which the peer gets half
        int head = 0;

        DEVICE int count() const
        {
            return int(begun - completed);
        }

        DEVICE void push(int token_, int keys_, int head_)
        {
            if (ptx::lane_id() == begun % 32) token = token_, keys = keys_, head = head_;
            begun++;
        }
    };

    // Copies stage after stage as long as the ring has room, and meanwhile completes those that have come.
    DEVICE void run() const
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
            // Those who multiply wait for the first one: it is not kept behind many others.
            const int ahead = under_way.completed == 0 ? FIRST : AHEAD;
            if (more && count < ahead && (count == 0 || is_free(to_copy))) {
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

    // Of the warpgroup, which is the first. Whoever asks makes what follows from it anew, there are no registers to keep it.
    static DEVICE int thread()
    {
        return ptx::unknown(threadIdx.x);
    }

    // Whether a stage was given back. The same in all lanes of a warp. Collective.
    DEVICE bool is_free(const Ring& at) const
    {
        return ptx::shuffle(uint32_t(ptx::mbarrier_peek(stages.empty + 8 * at.stage, at.parity ^ 1)), 0) != 0;
    }

    // Begins to copy the keys of an item from `key` on, and their values.
    DEVICE void copy_stage(const Item& item, int key, const Ring& to, UnderWay& under_way) const
    {
        const OwnRows<Tile> own(thread(), THREADS);
        const Head& head = item.head;
        const Head kv = kv_of(p, head);
        const int keys = head.length - key < KEYS ? head.length - key : KEYS;
        const int rows = round_up(keys, 16);
        const bool normed = makes_rows(p);
        const bool from_norm = normed && item.is_long();
        const int64_t k_stride = from_norm ? p.kv_heads * p.head_dim : p.k_stride;
        const bool shared = p.pairs != 0 && item.is_long();
        const int first = shared ? int(ptx::cluster_rank()) * (rows / 2) : 0;
        const int count = shared ? rows / 2 : rows;
        const Element* k = rows_of(from_norm ? p.k_norm : p.k, k_stride, p, kv, key + first);
        ptx::mbarrier_wait(stages.empty + 8 * to.stage, to.parity ^ 1);
        own.copy(stages.keys_of(to.stage).from(first), k, k_stride, count, keys - first, p.head_dim);
        const Element* v = rows_of(p.v, p.v_stride, p, kv, key + first);
        own.copy(stages.values_of(to.stage).from(first), v, p.v_stride, count, keys - first, p.head_dim);
        ptx::cp_async_commit();
        prefetch_queries(item, key);
        under_way.push(int(head.start) + key, shared ? -rows : normed && !from_norm ? keys : 0, head.head);
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
            const Element* q = rows_of(p.q, p.q_stride, p, item.head, item.first() + row + r);
            ptx::prefetch_l2(Global<const Element>(q).at(column));
        }
    }

    // Waits for the oldest stage that is under way, normalises its keys and hands it over. Collective.
    DEVICE void complete_stage(const Ring& at, UnderWay& under_way) const
    {
        const uint32_t lane = under_way.completed % 32;
        const int keys = int(ptx::shuffle(uint32_t(under_way.keys), lane));
        if (keys > 0) {
            const Head head{int(ptx::shuffle(uint32_t(under_way.token), lane)), keys,
                            int(ptx::shuffle(uint32_t(under_way.head), lane))};
            const Head kv = kv_of(p, head);
            const HeadNorm norm = key_norm(p, kv);
            const bool keep = leads_group(p, head.head);
            float* const mean = statistics_of(p.statistics.k_mean, p, kv, 0, keep);
            float* const rstd = statistics_of(p.statistics.k_rstd, p, kv, 0, keep);
            const OwnRows<Tile> own(thread(), THREADS);
            const Tile tile = stages.keys_of(at.stage);
            wait_for_copies(under_way.count() - 1);
            if (p.rope)
                own.rotate(tile, norm, rope_of(p).from(kv.start), keys, mean, rstd, p.kv_heads);
            else
                own.template normalise<ROWS>(tile, norm, keys, p.head_dim, mean, rstd, p.kv_heads);
        } else {
            wait_for_copies(under_way.count() - 1);
        }
        under_way.completed++;
        ptx::fence_proxy_async();
        if (p.pairs != 0 && thread() < 2) {
            const uint32_t rank = keys < 0 ? uint32_t(thread()) : ptx::cluster_rank();
            stages.owners().store(2 * at.stage + thread(), ptx::peer_address(stages.empty + 8 * at.stage, rank));
        }
        if (keys < 0)
            exchange(at, -keys);
        else
            ptx::mbarrier_arrive(stages.full + 8 * at.stage);
    }

    // Sends the half of a stage of `rows` rows that this block has copied, and hands the stage over with what the peer
    // sends.
    DEVICE void exchange(const Ring& at, int rows) const
    {
        // Planes of keys, and those of values behind.
        constexpr int PLANES = 2 * Tile::CHUNKS;
        static_assert(PLANES <= THREADS, "");
        const uint32_t full = stages.full + 8 * at.stage;
        const uint32_t half = rows / 2 * Tile::ROW_BYTES;
        ptx::barrier(1 + 2 * CONSUMERS, THREADS);
        // Each warp has a share of them, for lanes begin copies one after the other.
        const int plane = thread() % 32 * 4 + thread() / 32;
        if (plane < PLANES) {
            const uint32_t rank = ptx::cluster_rank();
            const uint32_t from = stages.keys_of(at.stage).address(rank * (rows / 2), plane);
            ptx::peer_copy(ptx::peer_address(from, rank ^ 1), from, half, ptx::peer_address(full, rank ^ 1));
        }
        // What the peer sends may have come before: the phase does not end without this block.
        if (thread() == 0)
            ptx::mbarrier_arrive_expect(full, PLANES * half);
        else
            ptx::mbarrier_arrive(full);
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
};

} // namespace attention_forward
