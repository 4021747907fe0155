// Packed attention with QK-norm, backward, for every GPU since Ampere.
//
// For head h of each image, with q^, k^ and lse as in the forward pass and delta_i = dout_i out_i:
//   p_ij = exp(scale q^_i k^_j - lse_i)        dp_ij = dout_i v_j        ds_ij = p_ij (dp_ij - delta_i)
//   dv_j = sum_i p_ij dout_i    dk^_j = scale sum_i ds_ij q^_i    dq^_i = scale sum_j ds_ij k^_j
// and, for a normalised row y = n gain + bias with n = (x - mean) rstd and g = dy gain,
//   dx = rstd (g - mean(g) - n mean(g n)), without mean(g) for RMS;   dgain = sum dy n,   dbias = sum dy.
// Scores and sums are f32; p and ds are rounded to bf16 for their products.
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
#include "backward_owner.cuh"
#include "schedule.cuh"

namespace attention_backward {

// One head of one image, or a tile of its keys or queries, from row `first` of the image on: owned by a group
// of `warps` warps, in the shared memory from `shared` on. Each warp keeps it in shared memory and reads of it
// what it needs, when it needs it: registers are full of gradients.
struct alignas(16) Item {
    Head head;
    int first;
    int warps;
    uint32_t shared;
    int number;
    int unused;
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
    if (threadIdx.x % 32 == 0) item_of_warp().store(0, item);
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

// `WHOLE`: all keys are owned and dq^ is made here.
template <int D, int M, int G, bool QUERIES, bool WHOLE>
struct Run {
    static constexpr int ROW_BYTES = HeadRows<D>::ROW_BYTES;

    const AttentionBackward& p;

    static DEVICE Item item()
    {
        return item_of_warp().load(0);
    }

    static DEVICE Head head()
    {
        return item().head;
    }

    // First row of the image that is owned, and how many are.
    static DEVICE int first()
    {
        return WHOLE ? 0 : item().first;
    }

    DEVICE int owned() const
    {
        if (WHOLE) return head().length;
        const int left = head().length - first();
        return left < p.tile_rows ? left : p.tile_rows;
    }

    DEVICE int own_rows() const
    {
        return round_up(owned(), STEP);
    }

    DEVICE Memory<D> memory() const
    {
        const int own_rows = this->own_rows();
        const int stream_rows = WHOLE ? own_rows : STAGES * STEP;
        return Memory<D>(item().shared, own_rows, stream_rows, QUERIES ? own_rows : stream_rows);
    }

    DEVICE Group group() const
    {
        return Group(WHOLE ? item().warps : WARPS);
    }

    static DEVICE int place(int step)
    {
        return (WHOLE ? step : step % STAGES) * STEP;
    }

    DEVICE HeadNorm norm_of(bool q) const
    {
        const float* const gain = ptx::unknown(q ? p.norm.q_gain : p.norm.k_gain);
        const float* const bias = ptx::unknown(q ? p.norm.q_bias : p.norm.k_bias);
        return head_norm(p.norm, gain, bias, head().head, p.head_dim);
    }

    // Copies rows of q and dout, or of k and v, from row `from` of the image on.
    DEVICE void load(bool q, Pair<D> to, int row, int from, int rows, int valid) const
    {
        const Group group = this->group();
        const HeadRows<D> first(to.first.base + row * ROW_BYTES);
        const HeadRows<D> second(to.second.base + row * ROW_BYTES);
        const Rows a = q ? rows_of(p, p.q, p.q_stride, head(), from) : rows_of(p, p.k, p.k_stride, head(), from);
        const Rows b = q ? rows_of(p, p.dout, p.dout_stride, head(), from)
                         : rows_of(p, p.v, p.v_stride, head(), from);
        first.load(a.p, a.stride, rows, valid, p.head_dim, group.thread, group.threads());
        second.load(b.p, b.stride, rows, valid, p.head_dim, group.thread, group.threads());
    }

    DEVICE void load_step(int step) const
    {
        load(!QUERIES, memory().stream, place(step), step * STEP, STEP, head().length - step * STEP);
    }

    DEVICE void normalise_rows(bool q, HeadRows<D> tile, int row, int valid) const
    {
        if (p.norm.kind == NORM_NONE) return;
        const Group group = this->group();
        const HeadRows<D> rows(tile.base + row * ROW_BYTES);
        normalise(rows, norm_of(q), valid, p.head_dim, group.thread, group.threads());
    }

    DEVICE void normalise_step(int step) const
    {
        const int left = head().length - step * STEP;
        normalise_rows(!QUERIES, memory().stream.first, place(step), left < STEP ? left : STEP);
    }

    DEVICE FloatPair statistics(int query) const
    {
        if (query >= head().length) return FloatPair{-infinity(), 0.0f};
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
        const Group group = this->group();
        const Rows out = rows_of(p, p.out, p.out_stride, head(), 0);
        const Rows dout = rows_of(p, p.dout, p.dout_stride, head(), 0);
        for (int row = group.thread / LANES; row < own_rows(); row += group.threads() / LANES) {
            const bool exists = row < head().length;
            const float delta = row_delta<D>(out, dout, row, exists, p.head_dim, group.thread);
            const int64_t at = int64_t(head().start + row) * p.heads + head().head;
            const float lse = exists ? Global<const float>(p.lse).load(at) * -LOG2_E : -infinity();
            if (group.thread % LANES == 0) keep(row, FloatPair{lse, -delta});
        }
    }

    // Loads the own rows and two steps, and makes ready the first of them.
    DEVICE void begin() const
    {
        const Group group = this->group();
        load(QUERIES, memory().own, 0, first(), own_rows(), owned());
        load_step(0);
        ptx::cp_async_commit();
        if (head().length > STEP) load_step(1);
        ptx::cp_async_commit();
        if (WHOLE) {
            make_delta();
        } else if (QUERIES) {
            for (int row = group.thread; row < own_rows(); row += group.threads())
                keep(row, statistics(first() + row));
        } else if (group.thread < STEP) {
            keep(group.thread, statistics(group.thread));
        }
        ptx::cp_async_wait<1>();
        normalise_rows(QUERIES, memory().own.first, 0, owned());
        normalise_step(0);
        group.barrier();
    }

    // One step of the own rows, 16 G streamed rows at a time.
    DEVICE void take(Owner<D, M, G, QUERIES>& owner, int step) const
    {
        const Memory<D> memory = this->memory();
        const int row = group().warp * 16 * M;
        const int rows = own_rows();
        if (row >= rows) return;
        const uint32_t ds = WHOLE ? memory.ds + step % 2 * rows * 2 * STEP : 0;
        for (int sub = 0; sub < STEP / 16; sub += G) {
            const int streamed = place(step) + 16 * sub;
            const int query = 4 * (QUERIES ? row : streamed);
            owner.take(memory.own, row, owned() - row, memory.stream, streamed,
                       head().length - step * STEP - 16 * sub, Shared<float>(memory.lse.address + query),
                       Shared<float>(memory.delta.address + query), p.scale * LOG2_E, ds, 2 * sub);
        }
    }

    DEVICE void take_queries(int step) const
    {
        const Memory<D> memory = this->memory();
        const int rows = own_rows();
        const uint32_t ds = memory.ds + step % 2 * rows * 2 * STEP;
        // At width 64 eight warps have work for one 16 x 16 tile each.
        if (D == 64 && item().warps == WARPS)
            query_gradient<D, 1>(memory.own.first, rows, ds, memory.stream, step * STEP, group());
        else
            query_gradient<D, 2>(memory.own.first, rows, ds, memory.stream, step * STEP, group());
    }

    // Writes this warp's rows of dq or dk from f32 in shared memory, and adds to the gradients of gain and bias.
    DEVICE void finish(bool q, Pair<D> tile, int length) const
    {
        const Group group = this->group();
        const int row = group.warp * 16 * M;
        const int64_t stride = q ? p.dq_stride : p.dk_stride;
        bf16* const target = rows_of(p, q ? p.dq : p.dk, stride, head(), first());
        const Rows source = q ? rows_of(p, p.q, p.q_stride, head(), first())
                              : rows_of(p, p.k, p.k_stride, head(), first());
        const bool active = row < own_rows();
        ColumnSums<D> sums;
        if (p.norm.kind == NORM_NONE) {
            if (active)
                finish_rows<D, false>(tile, row, 16 * M, length, p.scale, p.head_dim, target, stride, source,
                                      norm_of(q), sums);
            return;
        }
        if (active)
            finish_rows<D, true>(tile, row, 16 * M, length, p.scale, p.head_dim, target, stride, source,
                                 norm_of(q), sums);
        // Through what is no longer read: ds^T, or the streamed side.
        const uint32_t scratch = WHOLE ? memory().ds : memory().stream.first.base;
        if (p.partial) sums.add_to(p, head().head, q ? Q_GAIN : K_GAIN, scratch, group);
    }

    DEVICE void finish_values(Pair<D> tile) const
    {
        ColumnSums<D> none;
        bf16* const target = rows_of(p, p.dv, p.dv_stride, head(), first());
        finish_rows<D, false>(tile, group().warp * 16 * M, 16 * M, owned(), 1.0f, p.head_dim, target, p.dv_stride,
                              Rows{}, HeadNorm{}, none);
    }

    DEVICE void run() const
    {
        begin();
        Owner<D, M, G, QUERIES> owner;
        for (int step = 0; step * STEP < head().length; step++) {
            const int left = head().length - step * STEP;
            // The place of step + 2 was that of step - 1, which all warps have left.
            if (left > 2 * STEP) load_step(step + 2);
            ptx::cp_async_commit();
            FloatPair next{};
            const bool fetch = !WHOLE && !QUERIES && left > STEP && int(threadIdx.x) < STEP;
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

        const Memory<D> memory = this->memory();
        const int row = group().warp * 16 * M;
        if (row < own_rows()) {
            if (!QUERIES) {
                owner.store(owner.second, memory.own, row);
                ptx::warp_sync();
                finish_values(memory.own);
                ptx::warp_sync();
            }
            owner.store(owner.first, memory.own, row);
            ptx::warp_sync();
        }
        finish(QUERIES, memory.own, owned());
        if (WHOLE) finish(true, memory.stream, head().length);
    }
};

// Gradients of q, k and v. Tiles of long images come first, they take longest. A warp owns 16 M rows and takes
// 16 G rows of the other side at a time: what the registers hold.
template <int D, int M, int G>
DEVICE void gradients(const AttentionBackward& p)
{
    const Schedule schedule{p.schedule, p.slots, p.heads};
    if (p.partial) {
        const Global<float> partial(p.partial);
        const int64_t values = int64_t(p.heads) * AFFINE * p.head_dim;
        for (int64_t i = threadIdx.x; i < values; i += blockDim.x) partial.store(blockIdx.x * values + i, 0.0f);
    }
    hand_out(Item{{}, 0, 0, 0, int(blockIdx.x) - int(gridDim.x), 0});
    for (;;) {
        const Item before = item_of_warp().load(0);
        const int number = before.number + gridDim.x;
        const int long_items = schedule.long_items();
        if (number >= 2 * long_items + schedule.short_items()) return;
        Item item{{}, 0, WARPS, ptx::shared_base() + HEADER_BYTES, number, 0};
        if (number < 2 * long_items) {
            const LongItem at = schedule.long_item(number % long_items);
            item.head = head_of(p, at.image, at.head);
            item.first = at.tile * p.tile_rows;
        } else {
            const ShortItem at = schedule.short_item(number - 2 * long_items);
            item.warps = WARPS / at.heads;
            const int group = Group(item.warps).index();
            item.head = head_of(p, at.image, at.head + group);
            item.shared += group * rows_of_group(p.short_rows, at.heads) * short_row_bytes<D>();
        }
        // The item before has left shared memory and `partial`. As long as groups stay what they are, each
        // goes its own way: one loads while another multiplies. Head h is always that of group h % groups.
        if (item.warps == before.warps)
            Group(item.warps).barrier();
        else
            ptx::barrier();
        hand_out(item);
        if (number < long_items)
            Run<D, M, G, false, false>{p}.run();
        else if (number < 2 * long_items)
            Run<D, M, G, true, false>{p}.run();
        else if (item.head.head < p.heads)
            Run<D, M, G, false, true>{p}.run();
    }
}

// What needs no score: zeros in the rows that belong to no image, and delta of the rows of long images. A warp
// has a token at a time, a few heads together.
DEVICE void prepare(const AttentionBackward& p)
{
    constexpr int D = 128; // and any below
    constexpr int LANES = HeadRows<D>::LANES;
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
                const float delta = row_delta<D>(out, dout, row, exists, p.head_dim, lane);
                if (exists && lane % LANES == 0)
                    Global<float>(p.delta).store(int64_t(image.start + row) * p.heads + one.head, delta);
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
    float* k_gain;
    float* k_bias;
    const int32_t* accumulate; // not 0: the sums are added to what is there; null: they replace it
    int32_t blocks;
    int32_t heads;
    int32_t head_dim;
    int32_t per_head;
};

namespace attention_backward {

// A warp sums one value, lane l the terms l, l + 32, ...
DEVICE void sum(const AttentionBackwardSum& p)
{
    const int lane = ptx::lane_id();
    const int values = (p.per_head ? p.heads : 1) * p.head_dim;
    const int value = blockIdx.x * (blockDim.x / 32) + ptx::warp_id();
    if (value >= values * AFFINE) return;
    const int affine = value / values;
    float* const target = affine == Q_GAIN   ? p.q_gain
                          : affine == Q_BIAS ? p.q_bias
                          : affine == K_GAIN ? p.k_gain
                                             : p.k_bias;
    if (!target) return;
    const int at = value % values;
    const int column = at % p.head_dim;
    const int terms = p.per_head ? p.blocks : p.blocks * p.heads;
    const Global<const float> partial(p.partial);
    float total = 0.0f;
    for (int i = lane; i < terms; i += 32) {
        // Term i is of block and head i / heads, i % heads, or of block i and this value's head.
        const int64_t row = p.per_head ? int64_t(i) * p.heads + at / p.head_dim : i;
        total += partial.load((row * AFFINE + affine) * p.head_dim + column);
    }
    total = sum_of_lanes<32>(total);
    if (lane != 0) return;
    const bool accumulate = p.accumulate && Global<const int32_t>(p.accumulate).load(0) != 0;
    const Global<float> result(target);
    result.store(at, accumulate ? result.load(at) + total : total);
}

} // namespace attention_backward
