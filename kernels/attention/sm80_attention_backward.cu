// Packed attention with QK-norm and rotary position embedding, backward, for every GPU since Ampere.
//
// For head h of each image, with q^, k^ and lse as in the forward pass and delta_i = dout_i out_i:
//   p_ij = exp(scale q^_i k^_j - lse_i)        dp_ij = dout_i v_j        ds_ij = p_ij (dp_ij - delta_i)
//   dv_j = sum_i p_ij dout_i    dk^_j = scale sum_i ds_ij q^_i    dq^_i = scale sum_j ds_ij k^_j
// and, for a normalised row y = n gain + bias with n = (x - mean) rstd and g = dy gain,
//   dx = rstd (g - mean(g) - n mean(g n)), without mean(g) for RMS;   dgain = sum dy n,   dbias = sum dy.
// Scores and sums are f32; p and ds are rounded to Element for their products.
//
// A warp owns 16 or 32 rows, its gradients in registers, and streams over the rows of the other side in
// steps of 32. Both passes do the same:
//   keys:    owns (k^, v), streams (q^, dout): scores are s^T = k^ q^T, so that p^T and ds^T come out of mma
//            in the layout of operand a for dv += p^T dout and dk^ += ds^T q^
//   queries: owns (q^, dout), streams (k^, v): dq^ += ds k^
// Short schedule: the keys of an (image, head) are owned by the warps of one block, or of half or a quarter
// of it. ds^T also goes to shared memory, and after the one barrier of a step the warps split dq^ of its 32
// queries, all keys at once. dq^ takes the place of the q^ and dout that it was made from, in f32.
// Long schedule: a tile of keys, and apart from it a tile of queries, streams the whole image.
// Gradients of gains and biases are summed per block and head in `partial`, which attention_backward_sum adds
// up in one order. Nothing is added atomically.
//
// With a rotation, R of rope.cuh, y = R(n gain + bias): dy is rotated back before all that. Where heads of queries share
// one of keys and values, each makes dk and dv of it, through the norm, and sum_groups adds these up in the order of the
// heads.
#include "backward_finish.cuh"
#include "backward_owner.cuh"
#include "schedule.cuh"

namespace attention_backward {

// What an item is made of: rows of the image that its group owns, as keys, as queries, or all of them as both.
enum Kind : int { NOTHING = 0, KEYS = 1, QUERIES = 2, BOTH = KEYS | QUERIES };

// One head of one image, or a tile of its keys or queries, from row `first` of the image on: owned by a group
// of `warps` warps, in the shared memory from `shared` on. Each warp keeps it in shared memory and reads of it
// what it needs, when it needs it: registers are full of gradients.
struct alignas(16) Item {
    Head head;
    int first;
    int warps;
    uint32_t shared;
    int number;
    int kind;
};

// Items of the warps: the first bytes of shared memory.
constexpr int HEADER_BYTES = WARPS * sizeof(Item);

DEVICE Shared<Item> item_of_warp()
{
    return Shared<Item>(ptx::shared_base() + ptx::unknown(threadIdx.x) / 32 * sizeof(Item));
}

// Collective.
DEVICE void hand_out(const Item& item)
{
    ptx::warp_sync();
    if (ptx::unknown(threadIdx.x) % 32 == 0) item_of_warp().store(0, item);
    ptx::warp_sync();
}

// Bytes of shared memory that a group needs beside the rows of both sides: lse and delta of a query, its
// places in two steps of ds^T.
constexpr int QUERY_BYTES = 8;
constexpr int KEY_BYTES = 2 * 2 * STEP;

// Bytes of a row of both sides of a short image.
template <int D>
DEVICE constexpr int short_row_bytes()
{
    return 4 * HeadRows<D>::ROW_BYTES + QUERY_BYTES + KEY_BYTES;
}

// Most rows of one of `groups` groups that share the room of `rows` rows.
DEVICE constexpr int rows_of_group(int rows, int groups)
{
    return rows / groups / STEP * STEP;
}

// Shared memory of a group: both sides; lse and delta of the queries, made negative, lse times log2(e); ds^T of
// two steps in turn.
template <int D>
struct Memory {
    Pair<D> own;
    Pair<D> stream;
    Shared<float> lse;
    Shared<float> delta;
    uint32_t ds;

    DEVICE Memory(uint32_t base, int own_rows, int stream_rows, int queries)
        : own(base, own_rows), stream(base + own_rows * 2 * HeadRows<D>::ROW_BYTES, stream_rows),
          lse(base + (own_rows + stream_rows) * 2 * HeadRows<D>::ROW_BYTES), delta(lse.address + queries * 4),
          ds(delta.address + queries * 4)
    {
    }
};

// Numbers of an item that branches depend on, known to be the same in all lanes.
struct Span {
    int length; // rows of the image
    int first;  // that is owned
    int owned;
    Group group;

    // Owned rows that have a place in shared memory.
    DEVICE int rows() const
    {
        return round_up(owned, STEP);
    }
};

// That of this warp's item. Collective.
DEVICE Span span_of_warp(const AttentionBackward& p)
{
    const Item item = item_of_warp().load(0);
    const int length = uniform(item.head.length);
    const int first = uniform(item.first);
    const int left = length - first;
    const bool all = uniform(item.kind) == BOTH || left < p.tile_rows;
    return Span{length, first, all ? left : p.tile_rows, Group{uniform(item.warps)}};
}

// The norm of q or of k, of a head of queries or that of the keys which it has.
DEVICE HeadNorm norm_of(const AttentionBackward& p, bool q, int head)
{
    const float* const gain = ptx::unknown(q ? p.norm.q_gain : p.norm.k_gain);
    const float* const bias = ptx::unknown(q ? p.norm.q_bias : p.norm.k_bias);
    return head_norm(p.norm, gain, bias, q ? head : kv_head(p, head), p.head_dim);
}

template <int D, int M, int G, Kind KIND>
struct Run {
    static constexpr int ROW_BYTES = HeadRows<D>::ROW_BYTES;
    static constexpr bool WHOLE = KIND == BOTH;
    static constexpr bool OWNS_QUERIES = KIND == QUERIES;

    const AttentionBackward& p;
    const Span span;

    static DEVICE Item item()
    {
        return item_of_warp().load(0);
    }

    static DEVICE Head head()
    {
        return item().head;
    }

    // First row of the image that is owned, how many are, and how many have a place in shared memory.
    static DEVICE int first()
    {
        return WHOLE ? 0 : item().first;
    }

    DEVICE int owned() const
    {
        return WHOLE ? span.length : span.owned;
    }

    DEVICE int own_rows() const
    {
        return round_up(owned(), STEP);
    }

    DEVICE Group group() const
    {
        return WHOLE ? span.group : Group{WARPS};
    }

    DEVICE Memory<D> memory() const
    {
        const int own_rows = this->own_rows();
        const int stream_rows = WHOLE ? own_rows : STAGES * STEP;
        return Memory<D>(item().shared, own_rows, stream_rows, OWNS_QUERIES ? own_rows : stream_rows);
    }

    // ds^T of a step.
    DEVICE uint32_t ds_of(int step) const
    {
        return memory().ds + step % 2 * ptx::unknown(own_rows()) * 2 * STEP;
    }

    static DEVICE int place(int step)
    {
        return (WHOLE ? step : step % STAGES) * STEP;
    }

    // Copies rows of q and dout, or of k and v, from row `from` of the image on.
    DEVICE void load(bool q, Pair<D> to, int row, int from, int rows, int valid) const
    {
        const Group group = this->group();
        const int thread = group.thread();
        const HeadRows<D> first(to.first.base + row * ROW_BYTES);
        const HeadRows<D> second(to.second.base + row * ROW_BYTES);
        const Head of = q ? head() : kv_of(p, head());
        const Rows a = q ? rows_of(p, p.q, p.q_stride, of, from) : rows_of(p, p.k, p.k_stride, of, from);
        const Rows b = q ? rows_of(p, p.dout, p.dout_stride, of, from) : rows_of(p, p.v, p.v_stride, of, from);
        first.load(a.p, a.stride, rows, valid, p.head_dim, thread, group.threads());
        second.load(b.p, b.stride, rows, valid, p.head_dim, thread, group.threads());
    }

    DEVICE void load_step(int step) const
    {
        load(!OWNS_QUERIES, memory().stream, place(step), step * STEP, STEP, span.length - step * STEP);
    }

    // Rows of the tile from row `row` on, which are those of the image from row `from` on.
    DEVICE void normalise_rows(bool q, HeadRows<D> tile, int row, int from, int valid) const
    {
        const HeadRows<D> rows(tile.base + row * ROW_BYTES);
        if (p.rope)
            rotate_rows(rows, norm_of(p, q, head().head), rope_of(p), head().start + from, valid, group());
        else if (p.norm.kind != NORM_NONE)
            normalise(rows, norm_of(p, q, head().head), valid, p.head_dim, group());
    }

    DEVICE void normalise_step(int step) const
    {
        const int left = span.length - step * STEP;
        normalise_rows(!OWNS_QUERIES, memory().stream.first, place(step), step * STEP, left < STEP ? left : STEP);
    }

    DEVICE FloatPair statistics(int query) const
    {
        if (query >= span.length) return FloatPair{-infinity(), 0.0f};
        const int64_t at = int64_t(head().start + query) * p.heads + head().head;
        return FloatPair{Global<const float>(p.lse).load(at) * -LOG2_E, -Global<const float>(p.delta).load(at)};
    }

    DEVICE void keep(int query, FloatPair x) const
    {
        const Memory<D> memory = this->memory();
        memory.lse.store(query, x.first);
        memory.delta.store(query, x.second);
    }

    // delta of all queries of a short image.
    DEVICE void make_delta() const
    {
        constexpr int LANES = HeadRows<D>::LANES;
        constexpr int R = rows_at_once<D>();
        const int thread = group().thread();
        const int apart = group().warps * (32 / LANES);
        const Rows out = rows_of(p, p.out, p.out_stride, head(), 0);
        const Rows dout = rows_of(p, p.dout, p.dout_stride, head(), 0);
        const Global<const float> lse(p.lse);
        for (int first = 0; first < own_rows(); first += R * apart) {
            const int row = first + thread / LANES;
            float x[R];
            UNROLL
            for (int r = 0; r < R; r++) {
                const int query = row + r * apart;
                const int64_t at = int64_t(head().start + query) * p.heads + head().head;
                x[r] = query < span.length ? lse.load(at) * -LOG2_E : -infinity();
            }
            float delta[R];
            row_deltas<D>(delta, out, dout, row, apart, span.length, p.head_dim, thread);
            UNROLL
            for (int r = 0; r < R; r++) {
                const int query = row + r * apart;
                if (thread % LANES == 0 && query < own_rows()) keep(query, FloatPair{x[r], -delta[r]});
            }
        }
    }

    // Loads the own rows and two steps, and makes ready the first of them.
    DEVICE void begin() const
    {
        const int thread = group().thread();
        load(OWNS_QUERIES, memory().own, 0, first(), own_rows(), owned());
        load_step(0);
        ptx::cp_async_commit();
        if (span.length > STEP) load_step(1);
        ptx::cp_async_commit();
        if (WHOLE) {
            make_delta();
        } else if (OWNS_QUERIES) {
            for (int row = thread; row < own_rows(); row += group().threads())
                keep(row, statistics(first() + row));
        } else if (thread < STEP) {
            keep(thread, statistics(thread));
        }
        ptx::cp_async_wait<1>();
        normalise_rows(OWNS_QUERIES, memory().own.first, 0, first(), owned());
        normalise_step(0);
        group().barrier();
    }

    // One step of the own rows, 16 G streamed rows at a time.
    DEVICE void take(Owner<D, M, G, OWNS_QUERIES>& owner, int step) const
    {
        const Memory<D> memory = this->memory();
        const int row = group().warp() * 16 * M;
        const int rows = own_rows();
        if (row >= rows) return;
        const uint32_t ds = WHOLE ? ds_of(step) : 0;
        for (int sub = 0; sub < STEP / 16; sub += G) {
            const int streamed = place(step) + 16 * sub;
            const int query = 4 * (OWNS_QUERIES ? row : streamed);
            owner.take(memory.own, row, owned() - row, memory.stream, streamed,
                       span.length - step * STEP - 16 * sub, Shared<float>(memory.lse.address + query),
                       Shared<float>(memory.delta.address + query), p.scale * LOG2_E, ds, 2 * sub);
        }
    }

    DEVICE void take_queries(int step) const
    {
        const Memory<D> memory = this->memory();
        const int rows = own_rows();
        const uint32_t ds = ds_of(step);
        // At width 64 eight warps have work for one 16 x 16 tile each.
        if (D == 64 && group().warps == WARPS)
            query_gradient<D, 1>(memory.own.first, rows, ds, memory.stream, step * STEP, group());
        else
            query_gradient<D, 2>(memory.own.first, rows, ds, memory.stream, step * STEP, group());
    }

    // dv, which is final, goes to global memory; dq and dk to the place of the rows they belong to.
    DEVICE void run() const
    {
        begin();
        Owner<D, M, G, OWNS_QUERIES> owner;
        for (int step = 0; step * STEP < span.length; step++) {
            const int left = span.length - step * STEP;
            // The place of step + 2 was that of step - 1, which all warps have left.
            if (left > 2 * STEP) load_step(step + 2);
            ptx::cp_async_commit();
            FloatPair next{};
            const bool fetch = KIND == KEYS && left > STEP && int(threadIdx.x) < STEP;
            if (fetch) next = statistics((step + 1) * STEP + threadIdx.x);
            take(owner, step);
            if (left > STEP) {
                ptx::cp_async_wait<1>();
                normalise_step(step + 1);
            }
            if (fetch) keep(place(step + 1) + threadIdx.x, next);
            group().barrier();
            if (WHOLE) take_queries(step);
        }
        // All warps have read k^ and written dq^.
        if (WHOLE) group().barrier();

        const int row = group().warp() * 16 * M;
        if (row >= own_rows()) return;
        if (!OWNS_QUERIES) {
            Element* const target = rows_of(p, p.dv, p.dv_stride, head(), first());
            write_rows<D, M>(owner.second, row, owned(), p.head_dim, target, p.dv_stride);
        }
        owner.store(owner.first, memory().own, row);
        ptx::warp_sync();
    }
};

// Writes this warp's rows of dk and dq from f32 in shared memory, and adds to the gradients of gains and biases.
template <int D, int M>
DEVICE void finish(const AttentionBackward& p)
{
    const Span span = span_of_warp(p);
    const int kind = uniform(item_of_warp().load(0).kind);
    const int row = span.group.warp() * 16 * M;
    const int rows = span.rows();
    const bool active = row < rows;
    // Once for both, so that there is one copy of the code.
    for (int q = kind & KEYS ? 0 : 1; q <= (kind & QUERIES ? 1 : 0); q++) {
        const Item item = item_of_warp().load(0);
        // The queries of a short image lie behind its keys.
        const uint32_t before = q && kind == BOTH ? rows * 2 * HeadRows<D>::ROW_BYTES : 0;
        const Pair<D> tile(item.shared + before, rows);
        const int64_t stride = q ? p.dq_stride : p.dk_stride;
        Element* const target = rows_of(p, ptx::unknown(q ? p.dq : p.dk), stride, item.head, span.first);
        const Element* const from = ptx::unknown(q ? p.q : p.k);
        const Head of = q ? item.head : kv_of(p, item.head);
        const Rows source = rows_of(p, from, q ? p.q_stride : p.k_stride, of, span.first);
        const HeadNorm norm = norm_of(p, q, item.head.head);
        if (p.rope && active)
            rotate_rows_back<D, M>(tile, row, span.owned, rope_of(p).from(item.head.start + span.first));
        ColumnSums<D, M> sums;
        if (p.norm.kind == NORM_NONE) {
            if (active)
                finish_rows<D, M, false>(tile, row, span.owned, p.scale, p.head_dim, target, stride, source, norm,
                                         sums);
            continue;
        }
        if (active) {
            finish_rows<D, M, true>(tile, row, span.owned, p.scale, p.head_dim, target, stride, source, norm,
                                    sums);
            if (p.partial) sums.store(tile, row);
        }
        if (!p.partial) continue;
        span.group.barrier();
        sums.add(p, tile, rows, item.head.head, q ? Q_GAIN : K_GAIN, span.group);
    }
}

// Gradients of q, k and v. Tiles of long images come first, they take longest. A warp owns 16 M rows and takes
// 16 G rows of the other side at a time: what the registers hold.
template <int D, int M, int G>
DEVICE void gradients(const AttentionBackward& p)
{
    begin_dependent();
    const Schedule schedule{p.schedule, p.slots, p.heads};
    if (p.partial) {
        const Global<float> partial(p.partial);
        const int64_t values = int64_t(p.heads) * AFFINE * p.head_dim;
        for (int64_t i = threadIdx.x; i < values; i += blockDim.x) partial.store(blockIdx.x * values + i, 0.0f);
    }
    hand_out(Item{{}, 0, 0, 0, int(blockIdx.x) - int(gridDim.x), 0});
    for (;;) {
        const Item before = item_of_warp().load(0);
        const int number = uniform(before.number) + gridDim.x;
        const int long_items = uniform(schedule.long_items());
        if (number >= 2 * long_items + uniform(schedule.short_items())) return;
        Item item{{}, 0, WARPS, ptx::shared_base() + HEADER_BYTES, number, number < long_items ? KEYS : QUERIES};
        if (number < 2 * long_items) {
            const LongItem at = schedule.long_item(number % long_items);
            item.head = head_of(p, at.image, at.head);
            item.first = at.tile * p.tile_rows;
        } else {
            const ShortItem at = schedule.short_item(number - 2 * long_items);
            item.warps = WARPS / at.heads;
            const int group = Group{item.warps}.index();
            item.head = head_of(p, at.image, at.head + group);
            item.shared += group * rows_of_group(p.short_rows, at.heads) * short_row_bytes<D>();
            item.kind = item.head.head < p.heads ? BOTH : NOTHING;
        }
        const Group group = Group{uniform(item.warps)};
        const int kind = uniform(item.kind);
        // The item before has left shared memory and `partial`. As long as groups stay what they are, each
        // goes its own way: one loads while another multiplies. Head h is always that of group h % groups.
        if (group.warps == uniform(before.warps))
            group.barrier();
        else
            ptx::barrier();
        hand_out(item);
        if (kind == NOTHING) continue;
        if (kind == KEYS)
            Run<D, M, G, KEYS>{p, span_of_warp(p)}.run();
        else if (kind == QUERIES)
            Run<D, M, G, QUERIES>{p, span_of_warp(p)}.run();
        else
            Run<D, M, G, BOTH>{p, span_of_warp(p)}.run();
        finish<D, M>(p);
    }
}

// What needs no score: zeros in the rows that belong to no image, and delta of the rows of long images. A warp
// has a token at a time, a few heads together.
DEVICE void prepare(const AttentionBackward& p)
{
    constexpr int D = 128; // and any below
    constexpr int LANES = HeadRows<D>::LANES;
    begin_dependent();
    const Schedule schedule{p.schedule, p.slots, p.heads};
    const int used = schedule.rows();
    const int width = p.heads * p.head_dim;
    zero_rows(p.dq, p.dq_stride, width, used, p.tokens);
    zero_rows(p.dk, p.dk_stride, width, used, p.tokens);
    zero_rows(p.dv, p.dv_stride, width, used, p.tokens);

    const int lane = ptx::lane_id();
    const int warps = blockDim.x / 32;
    const int items = schedule.long_items() / p.heads;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const LongItem at = schedule.long_item(i * p.heads);
        const Head image = head_of(p, at.image, 0);
        const int first = at.tile * p.tile_rows;
        const int end = first + p.tile_rows < image.length ? first + p.tile_rows : image.length;
        for (int row = first + int(ptx::warp_id()); row < end; row += warps) {
            for (int head = 0; head < p.heads; head += 32 / LANES) {
                const Head one{image.start, image.length, head + lane / LANES};
                const bool exists = one.head < p.heads;
                const Rows out = rows_of(p, p.out, p.out_stride, one, 0);
                const Rows dout = rows_of(p, p.dout, p.dout_stride, one, 0);
                float delta[1];
                row_deltas<D>(delta, out, dout, row, 0, exists ? image.length : 0, p.head_dim, lane);
                if (exists && lane % LANES == 0)
                    Global<float>(p.delta).store(int64_t(image.start + row) * p.heads + one.head, delta[0]);
            }
        }
    }
}

} // namespace attention_backward

// Gradients of gains and biases from the partial sums of the blocks, [blocks, heads, 4, head_dim].
struct AttentionBackwardSum {
    const float* partial;
    float* q_gain; // [heads, head_dim], or [head_dim]: the sum over heads; null where nobody wants it
    float* q_bias;
    float* k_gain; // [kv_heads, head_dim], each the sum over the heads of q that share one, or [head_dim]
    float* k_bias;
    const int32_t* accumulate; // not 0: the sums are added to what is there; null: they replace it
    int32_t blocks;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t per_head;
    int32_t unused;
};

namespace attention_backward {

// `partial` is a matrix of [blocks, heads, 4, head_dim] where each head has gains of its own, else of
// [blocks heads, 4, head_dim], and what is wanted are sums of its columns. A block takes 8 of them, a sector of
// memory to a row: a lane every 4 WARPSth row. Shared memory: WARPS x 8 floats.
DEVICE void sum(const AttentionBackwardSum& p)
{
    constexpr int COLUMNS = 8;
    constexpr int LANES = 32 / COLUMNS;
    begin_dependent();
    const int lane = ptx::lane_id();
    const int of_head = AFFINE * p.head_dim;
    const int columns = (p.per_head ? p.heads : 1) * of_head;
    const int rows = p.blocks * (p.per_head ? 1 : p.heads);
    // head_dim is a multiple of 8: all columns of a block exist, and are of one gradient.
    const int column = blockIdx.x * COLUMNS + lane % COLUMNS;
    const int affine = column % of_head / p.head_dim;
    // Heads that share a gain of k are summed where the first of them is.
    const bool shared = p.per_head && affine >= K_GAIN;
    if (shared && !leads_group(p, column / of_head)) return;
    const int group = shared ? p.heads / p.kv_heads : 1;
    const Global<const float> partial(p.partial);
    float total = 0.0f;
    for (int row = threadIdx.x / COLUMNS; row < rows; row += WARPS * LANES) {
        for (int head = 0; head < group; head++)
            total += partial.load(int64_t(row) * columns + column + head * of_head);
    }
    total += ptx::shuffle_xor(total, COLUMNS);
    total += ptx::shuffle_xor(total, 2 * COLUMNS);
    const Shared<float> totals(ptx::shared_base());
    if (lane < COLUMNS) totals.store(threadIdx.x / 32 * COLUMNS + lane, total);
    ptx::barrier();
    if (threadIdx.x >= COLUMNS) return;
    for (int warp = 1; warp < WARPS; warp++) total += totals.load(warp * COLUMNS + lane);
    float* const target = affine == Q_GAIN   ? p.q_gain
                          : affine == Q_BIAS ? p.q_bias
                          : affine == K_GAIN ? p.k_gain
                                             : p.k_bias;
    if (!target) return;
    const int head = shared ? kv_head(p, column / of_head) : column / of_head;
    const int at = head * p.head_dim + column % p.head_dim;
    const bool accumulate = p.accumulate && Global<const int32_t>(p.accumulate).load(0) != 0;
    const Global<float> result(target);
    result.store(at, accumulate ? result.load(at) + total : total);
}

} // namespace attention_backward

// Gradients of keys and values from those that each head of queries has made of the ones that it shares.
struct AttentionBackwardGroups {
    const Element* dk_of_heads; // [tokens, heads * head_dim]
    const Element* dv_of_heads;
    Element* dk;
    Element* dv;
    int64_t dk_stride;
    int64_t dv_stride;
    int32_t tokens;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
};

namespace attention_backward {

// A thread adds up a chunk of a head of a token, in the order of the heads. Rows of no image are zeros here as there.
DEVICE void sum_groups(const AttentionBackwardGroups& p)
{
    begin_dependent();
    const int chunks = p.kv_heads * p.head_dim / 8;
    const int group = p.heads / p.kv_heads;
    const int64_t all = 2 * int64_t(p.tokens) * chunks;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < all; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = i / (2 * chunks);
        const int place = int(i % (2 * chunks));
        const bool keys = place < chunks;
        const int column = 8 * (keys ? place : place - chunks);
        const int first = column / p.head_dim * group * p.head_dim + column % p.head_dim;
        const Global<const Element> from(keys ? p.dk_of_heads : p.dv_of_heads);
        float sum[8] = {};
        for (int head = 0; head < group; head++) {
            const Vec16 x = from.load_16(row * p.heads * p.head_dim + first + head * p.head_dim);
            UNROLL
            for (int w = 0; w < 4; w++) {
                sum[2 * w] += low(x.word[w]);
                sum[2 * w + 1] += high(x.word[w]);
            }
        }
        Vec16 y;
        UNROLL
        for (int w = 0; w < 4; w++) y.word[w] = pack_pair(sum[2 * w], sum[2 * w + 1]);
        const Global<Element> to(keys ? p.dk : p.dv);
        to.store_16(row * (keys ? p.dk_stride : p.dv_stride) + column, y);
    }
}

} // namespace attention_backward
