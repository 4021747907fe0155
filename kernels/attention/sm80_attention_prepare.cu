// What long images need before Hopper's kernels take them, whose blocks meet every row of an image again and again:
// normalised rows of q and k, and delta. Made once here, of long images alone.
//
// Eight lanes have a row of a head, a warp the same row of four heads: what it reads of a token lies together.
#include "backward_rows.cuh"
#include "prepare.cuh"

namespace attention_prepare {

constexpr int WIDTH = 128; // and any head below
constexpr int LANES = HeadRows<WIDTH>::LANES;
constexpr int CHUNKS = HeadRows<WIDTH>::LANE_CHUNKS;
constexpr int HEADS = 32 / LANES; // of a warp

// Rows of one head, as many as the image has from the first of the tile on, of which this warp has some.
struct Part {
    int64_t start; // first token of the tile
    int rows;
    int head;
    bool exists;
};

// Normalises rows of q or k. Collective.
DEVICE void normalise(const AttentionPrepare& p, const Part& part, const bf16* from, int64_t stride, bf16* to,
                      const float* gain, const float* bias, float* mean, float* rstd)
{
    const int j = ptx::lane_id() % LANES;
    const HeadNorm norm = head_norm(p.norm, gain, bias, part.exists ? part.head : 0, p.head_dim);
    const LaneAffine<LANES, CHUNKS> affine(norm, j, p.head_dim);
    const Global<const bf16> source(from);
    const Global<bf16> target(to);
    for (int row = ptx::warp_id(); row < part.rows; row += blockDim.x / 32) {
        const int64_t token = part.start + row;
        Vec16 x[CHUNKS];
        UNROLL
        for (int i = 0; i < CHUNKS; i++) {
            const int column = 8 * (i * LANES + j);
            const bool inside = part.exists && column < p.head_dim;
            x[i] = inside ? source.load_16(token * stride + part.head * p.head_dim + column) : Vec16{};
        }
        const RowStatistics statistics = row_statistics<LANES>(x, j, p.head_dim, norm);
        normalise_row(x, affine, statistics, j, p.head_dim);
        if (!part.exists) continue;
        UNROLL
        for (int i = 0; i < CHUNKS; i++) {
            const int column = 8 * (i * LANES + j);
            if (column < p.head_dim)
                target.store_16((token * p.heads + part.head) * p.head_dim + column, x[i]);
        }
        if (mean && j == 0) {
            Global<float>(mean).store(token * p.heads + part.head, statistics.mean);
            Global<float>(rstd).store(token * p.heads + part.head, statistics.rstd);
        }
    }
}

// Collective.
DEVICE void make_delta(const AttentionPrepare& p, const Part& part)
{
    const int64_t column = part.exists ? part.head * p.head_dim : 0;
    const attention_backward::Rows out{p.out + part.start * p.out_stride + column, p.out_stride};
    const attention_backward::Rows dout{p.dout + part.start * p.dout_stride + column, p.dout_stride};
    const int rows = part.exists ? part.rows : 0;
    for (int row = ptx::warp_id(); row < part.rows; row += blockDim.x / 32) {
        float delta[1];
        attention_backward::row_deltas<WIDTH>(delta, out, dout, row, 0, rows, p.head_dim, ptx::lane_id());
        if (part.exists && ptx::lane_id() % LANES == 0)
            Global<float>(p.delta).store((part.start + row) * p.heads + part.head, delta[0]);
    }
}

DEVICE void run(const AttentionPrepare& p)
{
    const Global<int32_t> turns(p.turns);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; p.turns && i < p.turn_count; i += gridDim.x * blockDim.x)
        turns.store(i, 0);

    const Schedule schedule{p.schedule, p.slots, p.heads};
    const Global<const int32_t> starts(p.cu_seqlens);
    const int tiles = schedule.long_items() / p.heads;
    const int groups = ceil_div(p.heads, HEADS);
    const QkStatistics& statistics = p.statistics;
    for (int item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
        const LongItem at = schedule.long_item(item / groups * p.heads);
        const int first = at.tile * p.tile_rows;
        const int start = starts.load(at.image) + first;
        const int left = starts.load(at.image + 1) - start;
        const int head = item % groups * HEADS + int(ptx::lane_id()) / LANES;
        const Part part{start, left < p.tile_rows ? left : p.tile_rows, head, head < p.heads};
        if (p.q_norm)
            normalise(p, part, p.q, p.q_stride, p.q_norm, p.norm.q_gain, p.norm.q_bias, statistics.q_mean,
                      statistics.q_rstd);
        if (p.k_norm)
            normalise(p, part, p.k, p.k_stride, p.k_norm, p.norm.k_gain, p.norm.k_bias, statistics.k_mean,
                      statistics.k_rstd);
        if (p.delta) make_delta(p, part);
    }
}

} // namespace attention_prepare
