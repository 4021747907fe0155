// Rows of the backward pass of attention: a pair of them in shared memory, as operands and as f32 results, and
// the way of finished gradients through the norm to global memory.
#pragma once

#include "common.cuh"

struct AttentionBackward {
    const bf16* q;
    const bf16* k;
    const bf16* v;
    const bf16* out;
    const bf16* dout;
    bf16* dq;
    bf16* dk;
    bf16* dv;
    const float* lse; // [tokens, heads]
    float* delta;     // [tokens, heads]: dout out, of the rows of long images
    float* partial;   // [blocks, heads, 4, head_dim] in the order of Affine; null where nobody wants it
    const int32_t* cu_seqlens;
    const int32_t* schedule;
    QkNorm norm;
    int64_t q_stride;
    int64_t k_stride;
    int64_t v_stride;
    int64_t out_stride;
    int64_t dout_stride;
    int64_t dq_stride;
    int64_t dk_stride;
    int64_t dv_stride;
    int32_t tokens;
    int32_t slots;
    int32_t heads;
    int32_t head_dim;
    int32_t short_rows; // that fit shared memory
    int32_t tile_rows;  // of the long schedule
    int32_t unused;
    float scale;
};

namespace attention_backward {

constexpr int WARPS = 8;
constexpr int STEP = 32;
// Steps of the streamed side that are in shared memory at a time, long schedule: one computed with, one being
// normalised, one arriving.
constexpr int STAGES = 3;
constexpr float LOG2_E = 1.44269504088896f;

// Rows of a head of the gradients of gains and biases.
enum Affine : int { Q_GAIN = 0, Q_BIAS = 1, K_GAIN = 2, K_BIAS = 3, AFFINE = 4 };

struct alignas(8) FloatPair {
    float first;
    float second;
};

DEVICE float infinity()
{
    return bits_to_float(0x7f800000);
}

// The warps that share one head.
struct Group {
    int warps;
    int warp;
    int thread;

    // Groups of `warps` warps, a power of two.
    DEVICE explicit Group(int warps)
        : warps(warps), warp(ptx::unknown(threadIdx.x) / 32 & (warps - 1)),
          thread(ptx::unknown(threadIdx.x) & (32 * warps - 1))
    {
    }

    DEVICE int index() const
    {
        return ptx::unknown(threadIdx.x) / 32 / warps;
    }

    DEVICE int threads() const
    {
        return 32 * warps;
    }

    DEVICE void barrier() const
    {
        ptx::barrier(1 + index(), threads());
    }
};

// Rows of one side in shared memory: k^ and v, or q^ and dout. Where a pair has been used up, an f32 row of D
// columns takes the place of its two bf16 rows.
template <int D>
struct Pair {
    HeadRows<D> first;
    HeadRows<D> second;

    DEVICE Pair(uint32_t base, int rows) : first(base), second(base + rows * HeadRows<D>::ROW_BYTES) {}

    // Chunk of 4 f32 columns.
    DEVICE uint32_t f32_address(int row, int chunk) const
    {
        constexpr int CHUNKS = HeadRows<D>::CHUNKS;
        return chunk < CHUNKS ? first.address(row, chunk) : second.address(row, chunk - CHUNKS);
    }

    // Two neighbouring elements of the result of an mma: n-tile `tile`, columns of lane `lane`.
    DEVICE void store_f32(int row, int tile, int lane, float x, float y) const
    {
        const uint32_t address = f32_address(row, 2 * tile + lane % 4 / 2) + lane % 2 * 8;
        Shared<FloatPair>(address).store(0, FloatPair{x, y});
    }
};

// Addresses of this lane for ldmatrix of 16 rows by 2 chunks: row lane % 16, chunk lane / 16. They are the
// same for operands a and b, transposed or not, so that an address a tile is all that stays in registers.
template <int D>
struct Reader {
    static constexpr int CHUNKS = HeadRows<D>::CHUNKS;
    static constexpr int TWISTS = HeadRows<D>::TWISTS;

    uint32_t lane;

    // From row `row` (a multiple of 8) of the tile on.
    DEVICE Reader(HeadRows<D> tile, int row, int lane)
        : lane(tile.address(lane % 16, lane / 16) + row * HeadRows<D>::ROW_BYTES)
    {
    }

    // Chunk 2 step + lane / 16 of the row `rows` (a multiple of 8) below: the twist acts on the low bits of a
    // chunk, where an even number is added without a carry.
    DEVICE uint32_t address(int rows, int step) const
    {
        constexpr int LOW = TWISTS - 1;
        const uint32_t chunk = (lane ^ ((2 * step & LOW & ~1) * 16)) + (2 * step & ~(LOW & ~1)) * 16;
        return chunk + rows * HeadRows<D>::ROW_BYTES;
    }

    DEVICE void rows_as_a(uint32_t (&a)[4], int rows, int step) const
    {
        if (2 * step + 1 < CHUNKS) {
            ptx::ldmatrix_x4(a, address(rows, step));
        } else {
            uint32_t r[2];
            ptx::ldmatrix_x2(r, address(rows, step));
            a[0] = r[0], a[1] = r[1], a[2] = 0, a[3] = 0;
        }
    }

    DEVICE void rows_as_b(uint32_t (&b)[2][2], int rows, int step) const
    {
        uint32_t a[4];
        rows_as_a(a, rows, step);
        b[0][0] = a[0], b[0][1] = a[2], b[1][0] = a[1], b[1][1] = a[3];
    }

    DEVICE void columns_as_b(uint32_t (&b)[2][2], int rows, int step) const
    {
        if (2 * step + 1 < CHUNKS) {
            uint32_t r[4];
            ptx::ldmatrix_x4_trans(r, address(rows, step));
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
        } else {
            uint32_t r[2];
            ptx::ldmatrix_x2_trans(r, address(rows, step));
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = 0, b[1][1] = 0;
        }
    }
};

// Rows of one head in global memory, from some token on.
struct Rows {
    const bf16* p;
    int64_t stride;
};

struct Head {
    int start;
    int length;
    int head;
};

DEVICE Head head_of(const AttentionBackward& p, int image, int head)
{
    const Global<const int32_t> cu_seqlens(p.cu_seqlens);
    const int start = cu_seqlens.load(image);
    return Head{start, cu_seqlens.load(image + 1) - start, head};
}

DEVICE Rows rows_of(const AttentionBackward& p, const bf16* x, int64_t stride, Head head, int row)
{
    return Rows{x + int64_t(head.start + row) * stride + head.head * p.head_dim, stride};
}

DEVICE bf16* rows_of(const AttentionBackward& p, bf16* x, int64_t stride, Head head, int row)
{
    return x + int64_t(head.start + row) * stride + head.head * p.head_dim;
}

// dout out of one row, the same in the LANES lanes that share it.
template <int D>
DEVICE float row_delta(Rows out, Rows dout, int row, bool exists, int head_dim, int lane)
{
    constexpr int LANES = HeadRows<D>::LANES;
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < HeadRows<D>::LANE_CHUNKS; i++) {
        const int column = 8 * (i * LANES + lane % LANES);
        if (!exists || column >= head_dim) continue;
        const Vec16 x = Global<const bf16>(out.p).load_16(row * out.stride + column);
        const Vec16 y = Global<const bf16>(dout.p).load_16(row * dout.stride + column);
        UNROLL
        for (int w = 0; w < 4; w++) {
            sum = ptx::fused_multiply_add(low(x.word[w]), low(y.word[w]), sum);
            sum = ptx::fused_multiply_add(high(x.word[w]), high(y.word[w]), sum);
        }
    }
    return sum_of_lanes<LANES>(sum);
}

// Four neighbouring gains or biases.
DEVICE void load_four(float (&x)[4], const float* source, int column, float otherwise)
{
    UNROLL
    for (int c = 0; c < 4; c++) x[c] = otherwise;
    if (!source) return;
    const Vec16 four = Global<const float>(source).load_16(column);
    UNROLL
    for (int c = 0; c < 4; c++) x[c] = bits_to_float(four.word[c]);
}

// Normalises rows in place as OwnRows::normalise does, bit for bit, with fewer registers: gradients fill them.
template <int D>
DEVICE void normalise(HeadRows<D> tile, const HeadNorm& norm, int valid, int head_dim, int thread, int threads)
{
    constexpr int LANES = HeadRows<D>::LANES;
    constexpr int N = HeadRows<D>::LANE_CHUNKS;
    const int j = thread % LANES;
    for (int first = 0; first + thread / 32 * (32 / LANES) < valid; first += threads / LANES) {
        const int row = first + thread / LANES;
        Vec16 x[N];
        UNROLL
        for (int i = 0; i < N; i++) {
            const int chunk = i * LANES + j;
            const bool inside = row < valid && 8 * chunk < head_dim;
            x[i] = inside ? Shared<bf16>(tile.address(row, chunk)).load_16(0) : Vec16{};
        }
        const RowStatistics statistics = row_statistics<LANES>(x, j, head_dim, norm);
        UNROLL
        for (int i = 0; i < N; i++) {
            const int chunk = i * LANES + j;
            if (row >= valid || 8 * chunk >= head_dim) continue;
            UNROLL
            for (int w = 0; w < 4; w += 2) {
                float gain[4];
                float bias[4];
                load_four(gain, norm.gain, 8 * chunk + 2 * w, 1.0f);
                load_four(bias, norm.bias, 8 * chunk + 2 * w, 0.0f);
                UNROLL
                for (int c = 0; c < 4; c += 2) {
                    uint32_t& pair = x[i].word[w + c / 2];
                    const float a = (low(pair) - statistics.mean) * statistics.rstd;
                    const float b = (high(pair) - statistics.mean) * statistics.rstd;
                    pair = pack_bf16(ptx::fused_multiply_add(a, gain[c], bias[c]),
                                     ptx::fused_multiply_add(b, gain[c + 1], bias[c + 1]));
                }
            }
            Shared<bf16>(tile.address(row, chunk)).store_16(0, x[i]);
        }
    }
}

// Gradients of a gain and a bias, this lane's columns: chunks j, j + LANES, ...
template <int D>
struct ColumnSums {
    float gain[HeadRows<D>::LANE_CHUNKS][8];
    float bias[HeadRows<D>::LANE_CHUNKS][8];

    DEVICE ColumnSums()
    {
        UNROLL
        for (int i = 0; i < HeadRows<D>::LANE_CHUNKS * 8; i++) gain[i / 8][i % 8] = bias[i / 8][i % 8] = 0.0f;
    }

    // Adds the sums over the group to its head's rows `affine` and `affine` + 1 of the block's partial sums.
    // `scratch` holds 2 D floats a warp. Collective of the group.
    DEVICE void add_to(const AttentionBackward& p, int head, int affine, uint32_t scratch, Group group)
    {
        constexpr int LANES = HeadRows<D>::LANES;
        const int lane = ptx::unknown(ptx::lane_id());
        const Shared<float> sums(scratch);
        UNROLL
        for (int i = 0; i < HeadRows<D>::LANE_CHUNKS; i++) {
            const int column = 8 * (i * LANES + lane % LANES);
            UNROLL
            for (int c = 0; c < 8; c++) {
                UNROLL
                for (int mask = LANES; mask < 32; mask *= 2) {
                    gain[i][c] += ptx::shuffle_xor(gain[i][c], mask);
                    bias[i][c] += ptx::shuffle_xor(bias[i][c], mask);
                }
                if (lane < LANES && column < D) {
                    sums.store(group.warp * 2 * D + column + c, gain[i][c]);
                    sums.store(group.warp * 2 * D + D + column + c, bias[i][c]);
                }
            }
        }
        group.barrier();
        const Global<float> partial(p.partial);
        const int64_t first = ((int64_t(blockIdx.x) * p.heads + head) * AFFINE + affine) * p.head_dim;
        for (int i = group.thread; i < 2 * p.head_dim; i += group.threads()) {
            const int column = i < p.head_dim ? i : i - p.head_dim + D;
            float sum = partial.load(first + i);
            for (int warp = 0; warp < group.warps; warp++) sum += sums.load(warp * 2 * D + column);
            partial.store(first + i, sum);
        }
        group.barrier();
    }
};

// Writes `rows` gradient rows from row `row` on, f32 in shared memory, to `target`, those below `length`:
// times `factor`, and through the norm of the rows `source` if there is one. One warp. Collective.
template <int D, bool NORM>
DEVICE void finish_rows(Pair<D> tile, int row, int rows, int length, float factor, int head_dim, bf16* target,
                        int64_t target_stride, Rows source, const HeadNorm& norm, ColumnSums<D>& sums)
{
    constexpr int LANES = HeadRows<D>::LANES;
    constexpr int N = HeadRows<D>::LANE_CHUNKS;
    const int lane = ptx::unknown(ptx::lane_id());
    const int j = lane % LANES;
    const Global<bf16> memory(target);
    for (int first = 0; first < rows; first += 32 / LANES) {
        const int r = row + first + lane / LANES;
        const bool exists = r < length;
        float dy[N][8];
        UNROLL
        for (int i = 0; i < N; i++) {
            const int chunk = i * LANES + j;
            UNROLL
            for (int half = 0; half < 2; half++) {
                Vec16 four{};
                if (8 * chunk < head_dim) four = Shared<float>(tile.f32_address(r, 2 * chunk + half)).load_16(0);
                UNROLL
                for (int c = 0; c < 4; c++) dy[i][4 * half + c] = bits_to_float(four.word[c]) * factor;
            }
        }
        if (NORM) {
            Vec16 x[N];
            UNROLL
            for (int i = 0; i < N; i++) {
                const int column = 8 * (i * LANES + j);
                const bool inside = exists && column < head_dim;
                x[i] = inside ? Global<const bf16>(source.p).load_16(r * source.stride + column) : Vec16{};
            }
            const RowStatistics statistics = row_statistics<LANES>(x, j, head_dim, norm);
            float sum = 0.0f;
            float along = 0.0f;
            UNROLL
            for (int i = 0; i < N; i++) {
                const int column = 8 * (i * LANES + j);
                if (!exists || column >= head_dim) continue;
                UNROLL
                for (int half = 0; half < 2; half++) {
                    float gain[4];
                    load_four(gain, norm.gain, column + 4 * half, 1.0f);
                    UNROLL
                    for (int c = 0; c < 4; c++) {
                        const uint32_t pair = x[i].word[2 * half + c / 2];
                        const float n = ((c % 2 ? high(pair) : low(pair)) - statistics.mean) * statistics.rstd;
                        float& g = dy[i][4 * half + c];
                        float& dgain = sums.gain[i][4 * half + c];
                        dgain = ptx::fused_multiply_add(g, n, dgain);
                        sums.bias[i][4 * half + c] += g;
                        g *= gain[c];
                        sum += g;
                        along = ptx::fused_multiply_add(g, n, along);
                    }
                }
            }
            const float share = ptx::reciprocal(float(head_dim));
            const float offset = norm.kind == NORM_LAYER ? sum_of_lanes<LANES>(sum) * share : 0.0f;
            along = sum_of_lanes<LANES>(along) * share;
            UNROLL
            for (int i = 0; i < N; i++) {
                UNROLL
                for (int c = 0; c < 8; c++) {
                    const uint32_t pair = x[i].word[c / 2];
                    const float n = ((c % 2 ? high(pair) : low(pair)) - statistics.mean) * statistics.rstd;
                    const float rest = dy[i][c] - offset;
                    dy[i][c] = statistics.rstd * ptx::fused_multiply_add(-n, along, rest);
                }
            }
        }
        UNROLL
        for (int i = 0; i < N; i++) {
            const int column = 8 * (i * LANES + j);
            if (!exists || column >= head_dim) continue;
            Vec16 x;
            UNROLL
            for (int w = 0; w < 4; w++) x.word[w] = pack_bf16(dy[i][2 * w], dy[i][2 * w + 1]);
            memory.store_16(r * target_stride + column, x);
        }
    }
}

} // namespace attention_backward
