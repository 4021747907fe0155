// Packed attention with QK-norm, forward, for every GPU since Ampere.
//
// For head h of each image, over the rows of that image alone:
//   q^ = norm(q), k^ = norm(k)   rounded to bf16, as the backward pass makes them again
//   s_ij = scale q^_i k^_j,  p_ij = exp(s_ij - max_j s_ij),  out_i = sum_j p_ij v_j / sum_j p_ij
//   lse_i = ln sum_j exp(s_ij)
// Scores and sums are f32, p is rounded to bf16 for its product with v. The exponential is base 2: scale and
// log2(e) are one factor in the multiply-add before it. Keys come in steps with a running maximum; the last
// step computes only the 16-key groups that hold keys and masks within the last of them, so that images
// of both schedules are computed by the same operations in the same order: the same bits.
//
// Short schedule: a block has all keys and values of an (image, head) in shared memory, normalised once; its
// warps walk query tiles with no barrier in between. Very short images share a block, two or four heads each.
// Long schedule: a block has one query tile a warp and streams keys and values through two buffers; each
// step of keys is normalised after it arrived.
// Queries go from global memory to registers: a quad of lanes has a row of them.
#include "own_rows.cuh"
#include "schedule.cuh"

struct AttentionForward {
    const bf16* q;
    const bf16* k;
    const bf16* v;
    bf16* out;
    float* lse; // [tokens, heads]
    const int32_t* cu_seqlens;
    const int32_t* schedule;
    QkNorm norm;
    QkStatistics statistics;
    int64_t q_stride;
    int64_t k_stride;
    int64_t v_stride;
    int64_t out_stride;
    int32_t tokens;
    int32_t slots;
    int32_t heads;
    int32_t head_dim;
    float scale;
    int32_t unused;
};

namespace attention_forward {

constexpr int WARPS = 4;
// Rows of keys that a thread normalises at a time where it has many.
constexpr int ROWS_AT_A_TIME = 2;
constexpr float LOG2_E = 1.44269504088896f;
constexpr float LN_2 = 0.693147180559945f;

DEVICE float infinity()
{
    return bits_to_float(0x7f800000);
}

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

// The rows of one image that belong to one head.
struct Head {
    int64_t start;
    int length;
    int head;
};

DEVICE Head head_of(const AttentionForward& p, int image, int head)
{
    const Global<const int32_t> cu_seqlens(p.cu_seqlens);
    const int start = ptx::shuffle(uint32_t(cu_seqlens.load(image)), 0);
    const int end = ptx::shuffle(uint32_t(cu_seqlens.load(image + 1)), 0);
    return Head{start, end - start, head};
}

// Keys or values of a head from row `row` on.
DEVICE const bf16* rows_of(const bf16* x, int64_t stride, const AttentionForward& p, Head head, int row)
{
    return x + (head.start + row) * stride + head.head * p.head_dim;
}

// The statistics of k from row `row` on, where they are wanted.
DEVICE float* statistics_of(float* x, const AttentionForward& p, Head head, int row, bool wanted)
{
    return x && wanted ? x + (head.start + row) * p.heads + head.head : nullptr;
}

DEVICE HeadNorm key_norm(const AttentionForward& p, Head head)
{
    return head_norm(p.norm, p.norm.k_gain, p.norm.k_bias, head.head, p.head_dim);
}

// Normalises the first `valid` rows of `k`, keys from row `row` of the image on, R at a time.
template <int R, int D>
DEVICE void normalise_keys(const AttentionForward& p, HeadRows<D> k, const OwnRows<HeadRows<D>>& own,
                           const typename OwnRows<HeadRows<D>>::Affine& affine, Head head, int row, int valid, bool keep)
{
    own.template normalise<R>(k, key_norm(p, head), affine, valid, p.head_dim,
                              statistics_of(p.statistics.k_mean, p, head, row, keep),
                              statistics_of(p.statistics.k_rstd, p, head, row, keep), p.heads);
}

// 16 M query rows of one warp, which attend to KEYS keys at a time. Rows lane / 4 + 8 half of each 16 belong
// to this lane's quad. M = 2 shares each operand read from shared memory between two products; M and KEYS
// are what registers allow, see src/kernels/attention/instances.rs.
template <int D, int M, int KEYS>
struct Queries {
    static constexpr int GROUPS = KEYS / 16;
    static constexpr int CHUNKS = HeadRows<D>::CHUNKS;
    static constexpr int STEPS = HeadRows<D>::STEPS;
    static constexpr int QUAD_CHUNKS = ceil_div(CHUNKS, 4);

    Vec16 raw[2 * M][QUAD_CHUNKS]; // of rows 8 apart
    uint32_t q[STEPS][M][4];
    float out[STEPS][M][2][4];
    float highest[M][2]; // score before the factor
    float sum[M][2];     // of this lane's columns

    // Starts loading the rows from `row` on: lane j of a quad gets chunks j, j + 4, ...
    DEVICE void load(const AttentionForward& p, Head head, int row)
    {
        const Global<const bf16> source(p.q);
        const int lane = ptx::lane_id();
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int r = row + 16 * m + 8 * half + lane / 4;
                const int64_t first = (head.start + r) * p.q_stride + head.head * p.head_dim;
                UNROLL
                for (int i = 0; i < QUAD_CHUNKS; i++) {
                    const int column = 8 * (4 * i + lane % 4);
                    const bool exists = r < head.length && column < p.head_dim;
                    raw[2 * m + half][i] = exists ? source.load_16(first + column) : Vec16{};
                }
            }
        }
    }

    // Normalises what was loaded and makes the operands; nothing has been attended to yet.
    DEVICE void begin(const AttentionForward& p, Head head, int row)
    {
        if (p.norm.kind != NORM_NONE) normalise(p, head, row);
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                UNROLL
                for (int i = 0; i < QUAD_CHUNKS; i++) {
                    Vec16& x = raw[2 * m + half][i];
                    transpose_quad(x);
                    UNROLL
                    for (int c = 0; c < 4; c++) {
                        if (4 * i + c < 2 * STEPS) q[2 * i + c / 2][m][half + c % 2 * 2] = x.word[c];
                    }
                }
                highest[m][half] = -infinity();
                sum[m][half] = 0.0f;
            }
        }
        UNROLL
        for (int s = 0; s < STEPS; s++) {
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int i = 0; i < 8; i++) out[s][m][i / 4][i % 4] = 0.0f;
            }
        }
    }

    DEVICE void normalise(const AttentionForward& p, Head head, int row)
    {
        const int j = ptx::lane_id() % 4;
        const HeadNorm norm = head_norm(p.norm, p.norm.q_gain, p.norm.q_bias, head.head, p.head_dim);
        const LaneAffine<4, QUAD_CHUNKS> affine(norm, j, p.head_dim);
        RowStatistics statistics[2 * M];
        rows_statistics<4>(statistics, raw, j, p.head_dim, norm);
        UNROLL
        for (int i = 0; i < 2 * M; i++) {
            normalise_row(raw[i], affine, statistics[i], j, p.head_dim);
            const int r = row + 8 * i + ptx::lane_id() / 4;
            if (p.statistics.q_mean && j == 0 && r < head.length) {
                const int64_t at = (head.start + r) * p.heads + head.head;
                Global<float>(p.statistics.q_mean).store(at, statistics[i].mean);
                Global<float>(p.statistics.q_rstd).store(at, statistics[i].rstd);
            }
        }
    }

    // Attends to `keys` keys (KEYS, or fewer where PARTIAL) in the rows from `row` on of the tiles.
    template <bool PARTIAL>
    DEVICE void attend(HeadRows<D> k, HeadRows<D> v, int row, int keys, float factor)
    {
        const int lane = ptx::lane_id();
        float s[GROUPS][M][2][4];
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int i = 0; i < 8; i++) s[g][m][i / 4][i % 4] = 0.0f;
            }
        }
        if (PARTIAL) {
            UNROLL
            for (int g = 0; g < GROUPS; g++) {
                if (16 * g >= keys) continue;
                UNROLL
                for (int step = 0; step < STEPS; step++) score(s[g], k, row + 16 * g, step);
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const int key = 16 * g + i / 2 * 8 + lane % 4 * 2 + i % 2;
                    if (key < keys) continue;
                    UNROLL
                    for (int m = 0; m < M; m++) s[g][m][i / 2][i % 2] = s[g][m][i / 2][i % 2 + 2] = -infinity();
                }
            }
        } else {
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                UNROLL
                for (int g = 0; g < GROUPS; g++) score(s[g], k, row + 16 * g, step);
            }
        }
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) soften<PARTIAL>(s, m, half, keys, factor);
        }
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            if (PARTIAL && 16 * g >= keys) continue;
            uint32_t a[M][4];
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const float(&tile)[4] = s[g][m][i / 2];
                    a[m][i] = pack_bf16(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
                }
            }
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                uint32_t b[2][2];
                v.columns_as_b(b, row + 16 * g, step);
                if (2 * step + 1 < CHUNKS) {
                    ptx::mma_tiles<M, 2>(out[step], a, b);
                } else {
                    UNROLL
                    for (int m = 0; m < M; m++) ptx::mma(out[step][m][0], a[m], b[0]);
                }
            }
        }
    }

    DEVICE void score(float (&s)[M][2][4], HeadRows<D> k, int row, int step)
    {
        uint32_t b[2][2];
        k.rows_as_b(b, row, step);
        ptx::mma_tiles<M, 2>(s, q[step], b);
    }

    // Scores of one row of the quad to exponentials, after the maximum of all keys so far.
    template <bool PARTIAL>
    DEVICE void soften(float (&s)[GROUPS][M][2][4], int m, int half, int keys, float factor)
    {
        float top = highest[m][half];
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            if (PARTIAL && 16 * g >= keys) continue;
            UNROLL
            for (int i = 0; i < 4; i++) top = max(top, s[g][m][i / 2][half * 2 + i % 2]);
        }
        top = max_of_lanes<4>(top);
        const float offset = -top * factor;
        const float shrink = ptx::exp2(ptx::fused_multiply_add(highest[m][half], factor, offset));
        highest[m][half] = top;
        float total = sum[m][half];
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            if (PARTIAL && 16 * g >= keys) continue;
            UNROLL
            for (int i = 0; i < 4; i++) {
                float& x = s[g][m][i / 2][half * 2 + i % 2];
                x = ptx::exp2(ptx::fused_multiply_add(x, factor, offset));
                // Not left to the compiler, which may fuse it for whole steps of keys and not for part of one.
                total = g == 0 && i == 0 ? ptx::fused_multiply_add(total, shrink, x) : total + x;
            }
        }
        sum[m][half] = total;
        UNROLL
        for (int i = 0; i < 2 * CHUNKS; i++) out[i / 4][m][i / 2 % 2][half * 2 + i % 2] *= shrink;
    }

    DEVICE void store(const AttentionForward& p, Head head, int row, float factor)
    {
        const Global<bf16> target(p.out);
        const int lane = ptx::lane_id();
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int r = row + 16 * m + 8 * half + lane / 4;
                const float total = sum_of_lanes<4>(sum[m][half]);
                const float share = ptx::reciprocal(total);
                const int64_t first = (head.start + r) * p.out_stride + head.head * p.head_dim;
                UNROLL
                for (int i = 0; i < QUAD_CHUNKS; i++) {
                    Vec16 x{};
                    UNROLL
                    for (int c = 0; c < 4; c++) {
                        if (4 * i + c >= CHUNKS) continue;
                        const float(&pair)[4] = out[2 * i + c / 2][m][c % 2];
                        x.word[c] = pack_bf16(pair[2 * half] * share, pair[2 * half + 1] * share);
                    }
                    transpose_quad(x);
                    const int column = 8 * (4 * i + lane % 4);
                    if (r < head.length && column < p.head_dim) target.store_16(first + column, x);
                }
                if (lane % 4 == 0 && r < head.length) {
                    const float lse = ptx::fused_multiply_add(highest[m][half], factor, ptx::log2(total)) * LN_2;
                    Global<float>(p.lse).store((head.start + r) * p.heads + head.head, lse);
                }
            }
        }
    }
};

// Brings the rows of q, k and v of a head to the cache, 64 bytes a thread at a time.
template <int D>
DEVICE void prefetch(const AttentionForward& p, Head head, int thread, int threads)
{
    constexpr int LANES = D <= 64 ? 2 : 4;
    const int column = thread % LANES * 32;
    if (column >= p.head_dim) return;
    for (int row = thread / LANES; row < head.length; row += threads / LANES) {
        ptx::prefetch_l2(Global<const bf16>(rows_of(p.k, p.k_stride, p, head, row)).at(column));
        ptx::prefetch_l2(Global<const bf16>(rows_of(p.q, p.q_stride, p, head, row)).at(column));
        ptx::prefetch_l2(Global<const bf16>(rows_of(p.v, p.v_stride, p, head, row)).at(column));
    }
}

template <int D, int M, int KEYS>
DEVICE void short_images(const AttentionForward& p)
{
    const Schedule schedule{p.schedule, p.slots, p.heads};
    const int used = schedule.rows();
    zero_rows(p.out, p.out_stride, p.heads * p.head_dim, used, p.tokens);
    zero_rows(p.lse, p.heads, used, p.tokens);
    if (p.statistics.q_mean) {
        zero_rows(p.statistics.q_mean, p.heads, used, p.tokens);
        zero_rows(p.statistics.q_rstd, p.heads, used, p.tokens);
        zero_rows(p.statistics.k_mean, p.heads, used, p.tokens);
        zero_rows(p.statistics.k_rstd, p.heads, used, p.tokens);
    }

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

        const OwnRows<HeadRows<D>> own(share.thread, share.threads());
        own.copy(k, rows_of(p.k, p.k_stride, p, head, 0), p.k_stride, rows, head.length, p.head_dim);
        ptx::cp_async_commit();
        own.copy(v, rows_of(p.v, p.v_stride, p, head, 0), p.v_stride, rows, head.length, p.head_dim);
        ptx::cp_async_commit();
        Queries<D, M, KEYS> queries;
        queries.load(p, head, warp * 16 * M);
        // The item after this one is read while the rows of this one are under way, each word before what waits
        // for it, and its rows come to the cache while this one is worked on. Nothing of it is kept.
        const bool more = i + int(gridDim.x) < items;
        const ShortItem next = more ? schedule.short_item(i + gridDim.x) : item;
        if (p.norm.kind != NORM_NONE) {
            const typename OwnRows<HeadRows<D>>::Affine affine(key_norm(p, head), own.j, p.head_dim);
            ptx::cp_async_wait<1>();
            normalise_keys<ROWS_AT_A_TIME>(p, k, own, affine, head, 0, head.length, true);
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
            for (; key + KEYS <= head.length; key += KEYS) queries.template attend<false>(k, v, key, KEYS, factor);
            if (key < head.length) queries.template attend<true>(k, v, key, head.length - key, factor);
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
            own.copy(k_tile(key), rows_of(p.k, p.k_stride, p, head, key), p.k_stride, rows, keys, p.head_dim);
            own.copy(v_tile(key), rows_of(p.v, p.v_stride, p, head, key), p.v_stride, rows, keys, p.head_dim);
            ptx::cp_async_commit();
        };
        // The keys and values of the item before have been read.
        ptx::barrier();
        load(0);
        Queries<D, M, KEYS> queries;
        queries.load(p, head, row);
        queries.begin(p, head, row);
        for (int key = 0; key < head.length; key += KEYS) {
            const int keys = head.length - key < KEYS ? head.length - key : KEYS;
            if (p.norm.kind != NORM_NONE) {
                const OwnRows<HeadRows<D>> own(ptx::unknown(threadIdx.x), 32 * WARPS);
                const typename OwnRows<HeadRows<D>>::Affine affine(key_norm(p, head), own.j, p.head_dim);
                ptx::cp_async_wait<0>();
                normalise_keys<LONG_ROWS>(p, k_tile(key), own, affine, head, key, keys, item.tile == 0);
            }
            ptx::cp_async_wait<0>();
            ptx::barrier();
            // All warps have left the step before: its buffers are free.
            if (key + KEYS < head.length) load(key + KEYS);
            if (row >= head.length) continue;
            if (keys == KEYS)
                queries.template attend<false>(k_tile(key), v_tile(key), 0, KEYS, factor);
            else
                queries.template attend<true>(k_tile(key), v_tile(key), 0, keys, factor);
        }
        queries.store(p, head, row, factor);
    }
}

} // namespace attention_forward
