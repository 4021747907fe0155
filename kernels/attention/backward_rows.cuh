// Rows of the backward pass of attention: a pair of them in shared memory, as operands and as f32 results, and
// the norm and the deltas of rows.
#pragma once

#include "rope.cuh"

struct AttentionBackward {
    const Element* q;
    const Element* k;
    const Element* v;
    const Element* out;
    const Element* dout;
    Element* dq;
    Element* dk;
    Element* dv;
    const float* lse; // [tokens, heads]
    float* delta;     // [tokens, heads]: dout out, of the rows of long images
    float* partial;   // [blocks, heads, 4, head_dim] in the order of Affine; null where nobody wants it
    const int32_t* cu_seqlens;
    const int32_t* schedule;
    const float* rope; // [tokens, head_dim / 2, 2], see rope.cuh; null: none
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
    int32_t kv_heads; // a divisor of heads; dk and dv have `heads` heads all the same
    int32_t head_dim;
    int32_t short_rows; // that fit shared memory
    int32_t tile_rows;  // of the long schedule
    int32_t rope_kind;
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

DEVICE float infinity()
{
    return bits_to_float(0x7f800000);
}

// x, the same in all lanes, and from here on known to be: a branch on it does not part the lanes of a warp, and
// shuffles behind it need no other way for lanes that have parted. Collective.
DEVICE int uniform(int x)
{
    return int(ptx::shuffle(uint32_t(x), 0));
}

// The warps that share one head: `warps` of them, a power of two.
struct Group {
    int warps;

    // Collective of a warp.
    DEVICE int warp() const
    {
        return uniform(ptx::unknown(threadIdx.x) / 32) & (warps - 1);
    }

    DEVICE int thread() const
    {
        return ptx::unknown(threadIdx.x) & (threads() - 1);
    }

    DEVICE int index() const
    {
        return ptx::unknown(threadIdx.x) / 32 / warps;
    }

    DEVICE int threads() const
    {
        return 32 * ptx::unknown(warps);
    }

    // Named after the first warp of the group.
    DEVICE void barrier() const
    {
        ptx::barrier(1 + (ptx::unknown(threadIdx.x) / 32 & -warps), threads());
    }
};

// Rows of one side in shared memory: k^ and v, or q^ and dout. Where a pair has been used up, an f32 row of D
// columns takes the place of its two rows of elements.
template <int D>
struct Pair {
    HeadRows<D> first;
    HeadRows<D> second;

    DEVICE Pair(uint32_t base, int rows) : first(base), second(base + rows * HeadRows<D>::ROW_BYTES) {}

    // Chunk of 4 f32 columns. Even ones lie in the first tile and odd ones in the second, turned so that the
    // two that a row of mma's result touches at once, and those that neighbouring lanes read, are in different
    // banks.
    DEVICE uint32_t f32_address(int row, int chunk) const
    {
        constexpr int CHUNKS = HeadRows<D>::CHUNKS;
        constexpr int TURN = HeadRows<D>::TWISTS > 1 ? HeadRows<D>::TWISTS / 2 : 4;
        if (chunk % 2 == 0) return first.address(row, chunk / 2);
        const int turned = chunk / 2 + TURN;
        return second.address(row, turned < CHUNKS ? turned : turned - CHUNKS);
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
        return (lane ^ ((2 * step & LOW & ~1) * 16)) + (2 * step & ~(LOW & ~1)) * 16 + rows * HeadRows<D>::ROW_BYTES;
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
    const Element* p;
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

// The head of keys and values that a head of queries has.
DEVICE Head kv_of(const AttentionBackward& p, Head head)
{
    return Head{head.start, head.length, kv_head(p, head.head)};
}

DEVICE Rows rows_of(const AttentionBackward& p, const Element* x, int64_t stride, Head head, int row)
{
    return Rows{x + int64_t(head.start + row) * stride + head.head * p.head_dim, stride};
}

DEVICE Element* rows_of(const AttentionBackward& p, Element* x, int64_t stride, Head head, int row)
{
    return x + int64_t(head.start + row) * stride + head.head * p.head_dim;
}

// Rows that a thread loads before it works on them, where nothing else fills its registers.
template <int D>
DEVICE constexpr int rows_at_once()
{
    return HeadRows<D>::LANES == 8 ? 4 : 2;
}

// dout out of R rows, `apart` rows from each other, of which those below `length` exist: the same in the LANES
// lanes that share them. Collective.
template <int D, int R>
DEVICE void row_deltas(float (&delta)[R], Rows out, Rows dout, int row, int apart, int length, int head_dim,
                       int lane)
{
    constexpr int LANES = HeadRows<D>::LANES;
    constexpr int N = HeadRows<D>::LANE_CHUNKS;
    Vec16 x[R][N];
    Vec16 y[R][N];
    UNROLL
    for (int i = 0; i < R * N; i++) {
        const int64_t r = row + i / N * apart;
        const int column = 8 * (i % N * LANES + lane % LANES);
        const bool inside = r < length && column < head_dim;
        x[i / N][i % N] = inside ? Global<const Element>(out.p).load_16(r * out.stride + column) : Vec16{};
        y[i / N][i % N] = inside ? Global<const Element>(dout.p).load_16(r * dout.stride + column) : Vec16{};
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        delta[r] = 0.0f;
        UNROLL
        for (int i = 0; i < N * 4; i++) {
            const uint32_t a = x[r][i / 4].word[i % 4];
            const uint32_t b = y[r][i / 4].word[i % 4];
            delta[r] = ptx::fused_multiply_add(low(a), low(b), delta[r]);
            delta[r] = ptx::fused_multiply_add(high(a), high(b), delta[r]);
        }
    }
    sums_of_lanes<LANES>(delta);
}

// Chunks j, j + LANES, ... of row `row`, zeros where it does not exist.
template <int D, int N>
DEVICE void load_row(Vec16 (&x)[N], HeadRows<D> tile, int row, bool exists, int j, int head_dim)
{
    UNROLL
    for (int i = 0; i < N; i++) {
        const int chunk = i * HeadRows<D>::LANES + j;
        const bool inside = exists && 8 * chunk < head_dim;
        x[i] = inside ? Shared<Element>(tile.address(row, chunk)).load_16(0) : Vec16{};
    }
}

// Normalises and rotates rows in place as OwnRows::rotate does, bit for bit; `token` is that of the first of them. Lanes of
// a row take others of its columns than they have copied, after each one's own cp_async_wait. Collective of each warp.
template <int D>
DEVICE void rotate_rows(HeadRows<D> tile, const HeadNorm& norm, const Rope& rope, int token, int valid, Group group)
{
    constexpr int LANES = HeadRows<D>::LANES;
    const int ahead = group.warp() * (32 / LANES);
    ptx::warp_sync();
    ROLLED
    for (int first = 0; first + ahead < valid; first += group.warps * (32 / LANES)) {
        const int row = first + group.thread() / LANES;
        const int j = group.thread() % LANES;
        RowStatistics statistics{0.0f, 1.0f};
        if (norm.kind != NORM_NONE) {
            Vec16 x[HeadRows<D>::LANE_CHUNKS];
            load_row(x, tile, row, row < valid, j, rope.head_dim);
            statistics = row_statistics<LANES>(x, j, rope.head_dim, norm);
            // All lanes of the row have read what others rotate.
            ptx::warp_sync();
        }
        rotate_in_tile<LANES>(tile, row, row < valid, j, norm, statistics, rope.from(token + row));
    }
}

// Normalises rows in place as OwnRows::normalise does, bit for bit, with fewer registers: gradients fill them.
// Collective of each warp.
template <int D>
DEVICE void normalise(HeadRows<D> tile, const HeadNorm& norm, int valid, int head_dim, Group group)
{
    constexpr int LANES = HeadRows<D>::LANES;
    constexpr int N = HeadRows<D>::LANE_CHUNKS;
    const int j = group.thread() % LANES;
    const int ahead = group.warp() * (32 / LANES);
    // Lanes of a warp leave the loop together: a row beyond the last one takes part in its shuffles.
    for (int first = 0; first + ahead < valid; first += group.warps * (32 / LANES)) {
        const int row = first + group.thread() / LANES;
        Vec16 x[N];
        load_row(x, tile, row, row < valid, j, head_dim);
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
                normalise_four(x[i], w, gain, bias, statistics);
            }
            Shared<Element>(tile.address(row, chunk)).store_16(0, x[i]);
        }
    }
}

} // namespace attention_backward
