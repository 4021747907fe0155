// What long images need before Hopper's kernels take them, whose blocks meet every row of an image again and again:
// normalised and rotated rows of q and k, and delta. Made once here, of long images alone.
//
// Eight lanes have a row of a head, a warp the same row of four heads: what it reads of a token lies together.
#include "backward_rows.cuh"
#include "prepare.cuh"

namespace attention_prepare {

constexpr int WIDTH = 128; // and any head below
constexpr int LANES = HeadRows<WIDTH>::LANES;
constexpr int CHUNKS = HeadRows<WIDTH>::LANE_CHUNKS;
constexpr int HEADS = 32 / LANES; // of a warp
// Of a warp, on their way from memory at a time: the 16 warps of a multiprocessor ask for 32 KiB or more.
constexpr int ROWS = 4;
constexpr int ROTATED_ROWS = 1; // where they are rotated: what registers allow

// Rows of one head, as many as the image has from the first of the tile on, of which this warp has some.
struct Part {
    int64_t start; // first token of the tile
    int rows;
    int head;
    bool exists;
};

// Normalises rows of q or k, of which there are `heads` heads, R of a warp at a time, and rotates them where ROTATED.
// Collective.
template <int R, bool ROTATED>
DEVICE void normalise(const AttentionPrepare& p, const Part& part, int heads, const Element* from, int64_t stride,
                      Element* to, const float* gains, const float* biases, float* mean, float* rstd)
{
    const int j = ptx::lane_id() % LANES;
    const HeadNorm norm = head_norm(p.norm, gains, biases, part.exists ? part.head : 0, p.head_dim);
    const Global<const Element> source(from);
    const Global<Element> target(to);
    const int apart = blockDim.x / 32;
    for (int first = ptx::warp_id(); first < part.rows; first += R * apart) {
        Vec16 x[R][CHUNKS];
        UNROLL
        for (int i = 0; i < R * CHUNKS; i++) {
            const int row = first + i / CHUNKS * apart;
            const int column = 8 * (i % CHUNKS * LANES + j);
            const int64_t at = (part.start + row) * stride + part.head * p.head_dim + column;
            const bool inside = part.exists && row < part.rows && column < p.head_dim;
            x[i / CHUNKS][i % CHUNKS] = inside ? source.load_16(at) : Vec16{};
        }
        RowStatistics statistics[R];
        statistics_or_none<LANES>(statistics, x, j, p.head_dim, norm);
        UNROLL
        for (int r = 0; r < R && ROTATED; r++) {
            const int row = first + r * apart;
            const int64_t at = (part.start + row) * stride + part.head * p.head_dim;
            Element* const out = to + ((part.start + row) * heads + part.head) * p.head_dim;
            rotate_row<LANES>([&](int column) { return source.load_pair(at + column); },
                              [&](int column, uint32_t x) { Global<Element>(out).store_pair(column, x); },
                              part.exists && row < part.rows, j, norm, statistics[r],
                              rope_of(p).from(part.start + row));
        }
        UNROLL
        for (int i = 0; i < CHUNKS && !ROTATED; i++) {
            const int chunk = i * LANES + j;
            if (8 * chunk >= p.head_dim) continue;
            UNROLL
            for (int w = 0; w < 4; w += 2) {
                float gain[4];
                float bias[4];
                load_four(gain, norm.gain, 8 * chunk + 2 * w, 1.0f);
                load_four(bias, norm.bias, 8 * chunk + 2 * w, 0.0f);
                UNROLL
                for (int r = 0; r < R; r++) normalise_four(x[r][i], w, gain, bias, statistics[r]);
            }
            UNROLL
            for (int r = 0; r < R; r++) {
                const int row = first + r * apart;
                const int64_t at = (part.start + row) * heads + part.head;
                if (part.exists && row < part.rows) target.store_16(at * p.head_dim + 8 * chunk, x[r][i]);
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) {
            const int row = first + r * apart;
            if (!mean || j != 0 || !part.exists || row >= part.rows) continue;
            const int64_t at = (part.start + row) * heads + part.head;
            Global<float>(mean).store(at, statistics[r].mean);
            Global<float>(rstd).store(at, statistics[r].rstd);
        }
    }
}

// Those of q and k that are wanted. Collective.
template <int R, bool ROTATED>
DEVICE void normalise(const AttentionPrepare& p, const Part& part)
{
    const QkStatistics& statistics = p.statistics;
    if (p.q_norm)
        normalise<R, ROTATED>(p, part, p.heads, p.q, p.q_stride, p.q_norm, p.norm.q_gain, p.norm.q_bias,
                              statistics.q_mean, statistics.q_rstd);
    const Part keys{part.start, part.rows, part.head, part.head < p.kv_heads};
    // A warp may have heads of q that are none of k.
    if (p.k_norm && ptx::ballot(keys.exists) != 0)
        normalise<R, ROTATED>(p, keys, p.kv_heads, p.k, p.k_stride, p.k_norm, p.norm.k_gain, p.norm.k_bias,
                              statistics.k_mean, statistics.k_rstd);
}

// Collective.
DEVICE void make_delta(const AttentionPrepare& p, const Part& part)
{
    const int64_t column = part.exists ? part.head * p.head_dim : 0;
    const attention_backward::Rows out{p.out + part.start * p.out_stride + column, p.out_stride};
    const attention_backward::Rows dout{p.dout + part.start * p.dout_stride + column, p.dout_stride};
    const int rows = part.exists ? part.rows : 0;
    const int apart = blockDim.x / 32;
    for (int first = ptx::warp_id(); first < part.rows; first += 2 * apart) {
        float delta[2];
        attention_backward::row_deltas<WIDTH>(delta, out, dout, first, apart, rows, p.head_dim, ptx::lane_id());
        UNROLL
        for (int r = 0; r < 2; r++) {
            const int row = first + r * apart;
            if (row < rows && ptx::lane_id() % LANES == 0)
                Global<float>(p.delta).store((part.start + row) * p.heads + part.head, delta[r]);
        }
    }
}

DEVICE void run(const AttentionPrepare& p)
{
    ptx::dependency_wait();
    const Global<int32_t> turns(p.turns);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; p.turns && i < p.turn_count; i += gridDim.x * blockDim.x)
        turns.store(i, 0);

    const Schedule schedule{p.schedule, p.slots, p.heads};
    const Global<const int32_t> starts(p.cu_seqlens);
    const int tiles = schedule.long_items() / p.heads;
    const int groups = ceil_div(p.heads, HEADS);
    for (int item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
        const LongItem at = schedule.long_item(item / groups * p.heads);
        const int first = at.tile * p.tile_rows;
        const int start = starts.load(at.image) + first;
        const int left = starts.load(at.image + 1) - start;
        const int head = item % groups * HEADS + int(ptx::lane_id()) / LANES;
        const Part part{start, left < p.tile_rows ? left : p.tile_rows, head, head < p.heads};
        if (p.rope)
            normalise<ROTATED_ROWS, true>(p, part);
        else
            normalise<ROWS, false>(p, part);
        if (p.delta) make_delta(p, part);
    }
    // What takes the rows may find its multiprocessors meanwhile; it waits before it reads.
    ptx::launch_dependents();
}

} // namespace attention_prepare
