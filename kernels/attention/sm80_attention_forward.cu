// Packed attention with QK-norm and rotary position embedding, forward, for every GPU since Ampere.
//
// For head h of each image, over the rows of that image alone, with keys and values of head h kv_heads / heads and the
// rotation R of rope.cuh:
//   q^ = R(norm(q)), k^ = R(norm(k))   rounded to Element, as the backward pass makes them again
//   s_ij = scale q^_i k^_j,  p_ij = exp(s_ij - max_j s_ij),  out_i = sum_j p_ij v_j / sum_j p_ij
//   lse_i = ln sum_j exp(s_ij)
// Scores and sums are f32, p is rounded to Element for its product with v. The exponential is base 2: scale and
// log2(e) are one factor in the multiply-add before it. Keys come in steps with a running maximum; the last
// step computes only the 16-key groups that hold keys and masks within the last of them, so that images
// of both schedules are computed by the same operations in the same order: the same bits.
//
// Short schedule: a block has all keys and values of an (image, head) in shared memory, normalised once; its
// warps walk query tiles with no barrier in between. Very short images share a block, two or four heads each.
// Long schedule: a block has one query tile a warp and streams keys and values through two buffers; each
// step of keys is normalised after it arrived. Neighbouring heads that share keys and values load them each for itself; the
// first of them keeps their statistics.
// Queries go from global memory to registers: a quad of lanes has a row of them.
#include "forward_rows.cuh"
#include "own_rows.cuh"
#include "schedule.cuh"

namespace attention_forward {

constexpr int WARPS = 4;
// Rows of keys that a thread normalises at a time where it has many.
constexpr int ROWS_AT_A_TIME = 2;

// The part of this thread in a block whose warps `heads` heads share in groups: 1, 2 or 4.
struct Share {
    int warps; // of a group
    int warp;  // in its group
    int group;
    int thread; // in its group

    DEVICE explicit Share(int heads)
        : warps(heads == 1 ? WARPS : heads == 2 ? WARPS / 2 : WARPS / 4), warp(ptx::warp_id()),
          group(heads == 1 ? 0 : heads == 2 ? warp / (WARPS / 2) : warp / (WARPS / 4)),
          thread(threadIdx.x & (32 * warps - 1))
    {
        warp &= warps - 1;
    }

    DEVICE int threads() const
    {
        return 32 * warps;
    }
};

// Normalises the first `valid` rows of `k`, keys from row `row` of the image on, R at a time.
template <int R, int D>
DEVICE void normalise_keys(const AttentionForward& p, HeadRows<D> k, const OwnRows<HeadRows<D>>& own,
                           const typename OwnRows<HeadRows<D>>::Affine& affine, Head keys, int row, int valid, bool keep)
{
    own.template normalise<R>(k, key_norm(p, keys), affine, valid, p.head_dim,
                              statistics_of(p.statistics.k_mean, p, keys, row, keep),
                              statistics_of(p.statistics.k_rstd, p, keys, row, keep), p.kv_heads);
}

// The same, and rotates them.
template <int D>
DEVICE void rotate_keys(const AttentionForward& p, HeadRows<D> k, const OwnRows<HeadRows<D>>& own, Head keys, int row,
                        int valid, bool keep)
{
    own.rotate(k, key_norm(p, keys), rope_of(p).from(keys.start + row), valid,
               statistics_of(p.statistics.k_mean, p, keys, row, keep),
               statistics_of(p.statistics.k_rstd, p, keys, row, keep), p.kv_heads);
}

// Brings the rows of q, k and v of a head to the cache, 64 bytes a thread at a time.
template <int D>
DEVICE void prefetch(const AttentionForward& p, Head head, int thread, int threads)
{
    constexpr int LANES = D <= 64 ? 2 : 4;
    const int column = thread % LANES * 32;
    if (column >= p.head_dim) return;
    const Head keys = kv_of(p, head);
    for (int row = thread / LANES; row < head.length; row += threads / LANES) {
        ptx::prefetch_l2(Global<const Element>(rows_of(p.k, p.k_stride, p, keys, row)).at(column));
        ptx::prefetch_l2(Global<const Element>(rows_of(p.q, p.q_stride, p, head, row)).at(column));
        ptx::prefetch_l2(Global<const Element>(rows_of(p.v, p.v_stride, p, keys, row)).at(column));
    }
}

template <int D, int M, int KEYS>
DEVICE void short_images(const AttentionForward& p)
{
    begin_dependent();
    const Schedule schedule{p.schedule, p.slots, p.heads};
    zero_unused(p, schedule.rows());
    const float factor = p.scale * LOG2_E;
    const int items = schedule.short_items();
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const ShortItem item = schedule.short_item(i);
        // As many as there are heads: a power of two, the same in all lanes.
        const Share share(ptx::shuffle(uint32_t(item.heads), 0));
        const int warps = share.warps;
        const int warp = share.warp;
        const Head head = head_of(p, item.image, item.head + share.group);
        const int rows = round_up(head.length, 16);
        const HeadRows<D> k(ptx::shared_base() + 2 * share.group * rows * HeadRows<D>::ROW_BYTES);
        const HeadRows<D> v(k.base + rows * HeadRows<D>::ROW_BYTES);
        // The keys and values of the item before have been read.
        ptx::barrier();
        if (head.head >= p.heads) continue;

        const Head keys = kv_of(p, head);
        const bool keep = leads_group(p, head.head);
        const OwnRows<HeadRows<D>> own(share.thread, share.threads());
        own.copy(k, rows_of(p.k, p.k_stride, p, keys, 0), p.k_stride, rows, head.length, p.head_dim);
        ptx::cp_async_commit();
        own.copy(v, rows_of(p.v, p.v_stride, p, keys, 0), p.v_stride, rows, head.length, p.head_dim);
        ptx::cp_async_commit();
        Queries<HeadRows<D>, M> queries;
        queries.load(p, head, warp * 16 * M);
        // The item after this one is read while the rows of this one are under way, each word before what waits
        // for it, and its rows come to the cache while this one is worked on. Nothing of it is kept.
        const bool more = i + int(gridDim.x) < items;
        const ShortItem next = more ? schedule.short_item(i + gridDim.x) : item;
        if (p.rope) {
            ptx::cp_async_wait<1>();
            rotate_keys(p, k, own, keys, 0, head.length, keep);
        } else if (p.norm.kind != NORM_NONE) {
            const typename OwnRows<HeadRows<D>>::Affine affine(key_norm(p, keys), own.j, p.head_dim);
            ptx::cp_async_wait<1>();
            normalise_keys<ROWS_AT_A_TIME>(p, k, own, affine, keys, 0, head.length, keep);
        }
        const Head later = head_of(p, next.image, next.head + Share(next.heads).group);
        ptx::cp_async_wait<0>();
        ptx::barrier(1 + share.group, share.threads());
        if (more && later.head < p.heads) {
            const Share share(next.heads);
            prefetch<D>(p, later, share.thread, share.threads());
        }

        for (int row = warp * 16 * M; row < head.length; row += warps * 16 * M) {
            queries.begin(p, head, row);
            int key = 0;
            for (; key + KEYS <= head.length; key += KEYS)
                queries.template attend<KEYS, false>(k, v, key, KEYS, factor);
            if (key < head.length) queries.template attend<KEYS, true>(k, v, key, head.length - key, factor);
            queries.load(p, head, row + warps * 16 * M);
            queries.store(p, head, row, factor);
        }
    }
}

template <int D, int M, int KEYS>
DEVICE void long_images(const AttentionForward& p)
{
    constexpr int TILE_BYTES = KEYS * HeadRows<D>::ROW_BYTES;
    // Rows of keys that a thread normalises at a time: it has KEYS / 32, and queries and results beside them.
    constexpr int LONG_ROWS = OwnRows<HeadRows<D>>::N <= 2 ? KEYS / 32 : 1;
    begin_dependent();
    const Schedule schedule{p.schedule, p.slots, p.heads};
    const float factor = p.scale * LOG2_E;
    // Their number is read again for each, it would keep a register.
    for (int i = blockIdx.x; i < schedule.long_items(); i += gridDim.x) {
        const LongItem item = schedule.long_item(i);
        const Head head = head_of(p, item.image, item.head);
        const int row = (item.tile * WARPS + int(ptx::warp_id())) * 16 * M;
        auto k_tile = [](int key) { return HeadRows<D>(ptx::shared_base() + key / KEYS % 2 * 2 * TILE_BYTES); };
        auto v_tile = [](int key) {
            return HeadRows<D>(ptx::shared_base() + (key / KEYS % 2 * 2 + 1) * TILE_BYTES);
        };
        auto load = [&](int key) {
            const int keys = head.length - key < KEYS ? head.length - key : KEYS;
            const int rows = round_up(keys, 16);
            const OwnRows<HeadRows<D>> own(ptx::unknown(threadIdx.x), 32 * WARPS);
            const Head kv = kv_of(p, head);
            own.copy(k_tile(key), rows_of(p.k, p.k_stride, p, kv, key), p.k_stride, rows, keys, p.head_dim);
            own.copy(v_tile(key), rows_of(p.v, p.v_stride, p, kv, key), p.v_stride, rows, keys, p.head_dim);
            ptx::cp_async_commit();
        };
        // The keys and values of the item before have been read.
        ptx::barrier();
        load(0);
        Queries<HeadRows<D>, M> queries;
        queries.load(p, head, row);
        queries.begin(p, head, row);
        for (int key = 0; key < head.length; key += KEYS) {
            const int keys = head.length - key < KEYS ? head.length - key : KEYS;
            // The first tile keeps them.
            const bool keep = row < 16 * M * WARPS && leads_group(p, head.head);
            if (p.rope) {
                const OwnRows<HeadRows<D>> own(ptx::unknown(threadIdx.x), 32 * WARPS);
                ptx::cp_async_wait<0>();
                rotate_keys(p, k_tile(key), own, kv_of(p, head), key, keys, keep);
            } else if (p.norm.kind != NORM_NONE) {
                const OwnRows<HeadRows<D>> own(ptx::unknown(threadIdx.x), 32 * WARPS);
                const Head kv = kv_of(p, head);
                const typename OwnRows<HeadRows<D>>::Affine affine(key_norm(p, kv), own.j, p.head_dim);
                ptx::cp_async_wait<0>();
                normalise_keys<LONG_ROWS>(p, k_tile(key), own, affine, kv, key, keys, keep);
            }
            ptx::cp_async_wait<0>();
            ptx::barrier();
            // All warps have left the step before: its buffers are free.
            if (key + KEYS < head.length) load(key + KEYS);
            if (row >= head.length) continue;
            if (keys == KEYS)
                queries.template attend<KEYS, false>(k_tile(key), v_tile(key), 0, KEYS, factor);
            else
                queries.template attend<KEYS, true>(k_tile(key), v_tile(key), 0, keys, factor);
        }
        queries.store(p, head, row, factor);
    }
}

} // namespace attention_forward
