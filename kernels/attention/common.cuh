// What the attention kernels share: rows of one head in shared memory, the operands of mma read from them,
// and QK-norm of rows spread over lanes.
//
// Rows. Head h of token t begins at element t * stride + h * head_dim of q, k, v, out or a gradient of one;
// pointers and row strides are multiples of 16 bytes. A chunk is 16 bytes, 8 columns, of a row. k and v may have fewer
// heads, of which each serves as many neighbouring heads of q.
//
// Instances. A kernel is compiled for widths D of 64, 72, 80, 88, 96, 104, 112 and 128 columns; a head of
// fewer columns runs on the next width, its missing columns zero in shared memory and in registers. The
// depth of mma is 16: where D / 8 is odd the last step has zeros in the upper half of both operands.
//
// QK-norm. y = (x - mean) rstd gain + bias, rounded to Element, with rstd = 1 / sqrt(mean((x - mean)^2) + eps)
// over the head's columns and mean = 0 for RMS. Statistics are f32, two passes over a row in registers.
#pragma once

#include "mma_rows.cuh"

enum NormKind : int32_t { NORM_NONE = 0, NORM_RMS = 1, NORM_LAYER = 2 };

// Two neighbouring f32.
struct alignas(8) FloatPair {
    float first;
    float second;
};

// QK-norm of all heads. Gains and biases are [heads, head_dim], those of k [kv_heads, head_dim], or [head_dim] where
// `per_head` is 0; null gains are 1, null biases 0. Pointers are 16-byte aligned.
struct QkNorm {
    const float* q_gain;
    const float* k_gain;
    const float* q_bias;
    const float* k_bias;
    int32_t kind;
    int32_t per_head;
    float eps;
    int32_t unused;
};

// Statistics of the rows of q, [tokens, heads], and k, [tokens, kv_heads]; null where nobody wants them.
struct QkStatistics {
    float* q_mean;
    float* q_rstd;
    float* k_mean;
    float* k_rstd;
};

// The norm of q or of k for one head.
struct HeadNorm {
    const float* gain;
    const float* bias;
    int kind;
    float eps;
};

DEVICE HeadNorm head_norm(const QkNorm& norm, const float* gain, const float* bias, int head, int head_dim)
{
    const int first = norm.per_head ? head * head_dim : 0;
    return HeadNorm{gain ? gain + first : nullptr, bias ? bias + first : nullptr, norm.kind, norm.eps};
}

// The head of k and v that head `head` of q has, which it may share with its neighbours. What a division needs of the
// divisor is made where it is needed: kept, it would take registers.
template <class Params>
DEVICE int kv_head(const Params& p, int head)
{
    return p.kv_heads == p.heads ? head : head * p.kv_heads / ptx::unknown(p.heads);
}

// Whether it is the first of those that share it.
template <class Params>
DEVICE bool leads_group(const Params& p, int head)
{
    return p.kv_heads == p.heads || head * p.kv_heads % ptx::unknown(p.heads) == 0;
}

struct RowStatistics {
    float mean;
    float rstd;
};

// Sums over LANES neighbouring lanes, the same in all of them: R at a time, for each has to wait for its
// shuffles. Collective.
template <int LANES, int R>
DEVICE void sums_of_lanes(float (&x)[R])
{
    UNROLL
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        UNROLL
        for (int r = 0; r < R; r++) x[r] += ptx::shuffle_xor(x[r], mask);
    }
}

template <int LANES>
DEVICE float sum_of_lanes(float x)
{
    float sum[1] = {x};
    sums_of_lanes<LANES>(sum);
    return sum[0];
}

// Maximum over LANES neighbouring lanes. Collective.
template <int LANES>
DEVICE float max_of_lanes(float x)
{
    UNROLL
    for (int mask = 1; mask < LANES; mask *= 2) x = max(x, ptx::shuffle_xor(x, mask));
    return x;
}

// Sum over the chunks of one lane. Chunks are halved, then lanes: chunk c meets c + 8, then c + 4, c + 2 and
// c + 1, however many lanes share a row. So q^ and k^ have the same bits wherever they are made.
template <int N>
DEVICE float sum_of_chunks(float (&x)[N])
{
    static_assert(N <= 4, "a row is at most 16 chunks over 4 lanes");
    UNROLL
    for (int half = 2; half > 0; half /= 2) {
        UNROLL
        for (int i = 0; i < half; i++) {
            if (i + half < N) x[i] += x[i + half];
        }
    }
    return x[0];
}

// What a chunk is measured from: columns from head_dim on, zeros, stay zeros.
DEVICE float centre_of(float mean, int chunk, int head_dim)
{
    return 8 * chunk < head_dim ? mean : 0.0f;
}

// Statistics of R rows that LANES neighbouring lanes share: lane j holds chunks j, j + LANES, ..., zeros
// beyond head_dim. Collective.
template <int LANES, int R, int N>
DEVICE void rows_statistics(RowStatistics (&statistics)[R], const Vec16 (&x)[R][N], int j, int head_dim,
                            const HeadNorm& norm)
{
    const float share = ptx::reciprocal(float(head_dim));
    float mean[R];
    UNROLL
    for (int r = 0; r < R; r++) mean[r] = 0.0f;
    if (norm.kind == NORM_LAYER) {
        UNROLL
        for (int r = 0; r < R; r++) {
            float sum[N];
            UNROLL
            for (int i = 0; i < N; i++) {
                sum[i] = 0.0f;
                UNROLL
                for (int w = 0; w < 4; w++) sum[i] += low(x[r][i].word[w]) + high(x[r][i].word[w]);
            }
            mean[r] = sum_of_chunks(sum);
        }
        sums_of_lanes<LANES>(mean);
        UNROLL
        for (int r = 0; r < R; r++) mean[r] *= share;
    }
    float squares[R];
    UNROLL
    for (int r = 0; r < R; r++) {
        float sum[N];
        UNROLL
        for (int i = 0; i < N; i++) {
            sum[i] = 0.0f;
            const float centre = centre_of(mean[r], i * LANES + j, head_dim);
            UNROLL
            for (int w = 0; w < 4; w++) {
                const float a = low(x[r][i].word[w]) - centre;
                const float b = high(x[r][i].word[w]) - centre;
                sum[i] = ptx::fused_multiply_add(a, a, sum[i]);
                sum[i] = ptx::fused_multiply_add(b, b, sum[i]);
            }
        }
        squares[r] = sum_of_chunks(sum);
    }
    sums_of_lanes<LANES>(squares);
    UNROLL
    for (int r = 0; r < R; r++)
        statistics[r] = RowStatistics{mean[r], ptx::rsqrt(ptx::fused_multiply_add(squares[r], share, norm.eps))};
}

template <int LANES, int N>
DEVICE RowStatistics row_statistics(const Vec16 (&x)[N], int j, int head_dim, const HeadNorm& norm)
{
    Vec16 rows[1][N];
    UNROLL
    for (int i = 0; i < N; i++) rows[0][i] = x[i];
    RowStatistics statistics[1];
    rows_statistics<LANES>(statistics, rows, j, head_dim, norm);
    return statistics[0];
}

// Gains and biases of the columns of one lane, chunks as in row_statistics: loaded once for many rows.
template <int LANES, int N>
struct LaneAffine {
    float gain[N][8];
    float bias[N][8];

    DEVICE LaneAffine(const HeadNorm& norm, int j, int head_dim)
    {
        load(gain, norm.gain, 1.0f, j, head_dim);
        load(bias, norm.bias, 0.0f, j, head_dim);
    }

    DEVICE static void load(float (&x)[N][8], const float* source, float otherwise, int j, int head_dim)
    {
        UNROLL
        for (int i = 0; i < N; i++) {
            UNROLL
            for (int c = 0; c < 8; c++) x[i][c] = otherwise;
        }
        if (!source) return;
        const Global<const float> memory(source);
        UNROLL
        for (int i = 0; i < N; i++) {
            const int column = 8 * (i * LANES + j);
            if (column >= head_dim) continue;
            const Vec16 lower = memory.load_16(column);
            const Vec16 upper = memory.load_16(column + 4);
            UNROLL
            for (int c = 0; c < 4; c++) {
                x[i][c] = bits_to_float(lower.word[c]);
                x[i][c + 4] = bits_to_float(upper.word[c]);
            }
        }
    }
};

// Applies the norm to a row spread over lanes as in rows_statistics. Columns from head_dim on have a gain of
// 1 and a bias of 0 in LaneAffine: they stay zero.
template <int LANES, int N>
DEVICE void normalise_row(Vec16 (&x)[N], const LaneAffine<LANES, N>& affine, RowStatistics row, int j,
                          int head_dim)
{
    UNROLL
    for (int i = 0; i < N; i++) {
        const float centre = centre_of(row.mean, i * LANES + j, head_dim);
        UNROLL
        for (int w = 0; w < 4; w++) {
            uint32_t& pair = x[i].word[w];
            const float a = (low(pair) - centre) * row.rstd;
            const float b = (high(pair) - centre) * row.rstd;
            pair = pack_pair(ptx::fused_multiply_add(a, affine.gain[i][2 * w], affine.bias[i][2 * w]),
                             ptx::fused_multiply_add(b, affine.gain[i][2 * w + 1], affine.bias[i][2 * w + 1]));
        }
    }
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

// Applies the norm to four columns of a chunk, its words `w` and `w` + 1.
DEVICE void normalise_four(Vec16& x, int w, const float (&gain)[4], const float (&bias)[4], RowStatistics row)
{
    UNROLL
    for (int c = 0; c < 4; c += 2) {
        uint32_t& pair = x.word[w + c / 2];
        const float a = (low(pair) - row.mean) * row.rstd;
        const float b = (high(pair) - row.mean) * row.rstd;
        pair = pack_pair(ptx::fused_multiply_add(a, gain[c], bias[c]),
                         ptx::fused_multiply_add(b, gain[c + 1], bias[c + 1]));
    }
}

// Rows of D columns of Element in shared memory, bare of padding. Chunk c of row r lies in place c ^ twist(r) of its
// row, so that the same chunk of 8 neighbouring rows lies in 8 different groups of 4 banks (ldmatrix reads
// it in one pass): with g = gcd(D / 8, 8), rows 8 / g apart begin in the same group, and the twist takes
// their g chunks apart.
template <int D>
struct HeadRows : MmaRows<HeadRows<D>, D> {
    static constexpr int CHUNKS = D / 8;
    static constexpr int ROW_BYTES = 2 * D;
    // Steps of 16 columns, the last one half where CHUNKS is odd.
    static constexpr int STEPS = ceil_div(CHUNKS, 2);
    // Lanes that share a row where rows are loaded and normalised, and chunks that each of them has.
    static constexpr int LANES = CHUNKS == 8 || CHUNKS > 12 ? 8 : 4;
    static constexpr int LANE_CHUNKS = ceil_div(CHUNKS, LANES);
    static constexpr int TWISTS = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;
    // Rows whose first four chunks meet none of each other's banks.
    static constexpr int APART = CHUNKS % 8 == 4 ? 1 : CHUNKS % 4 == 2 ? 2 : 4;

    uint32_t base;

    DEVICE explicit HeadRows(uint32_t base) : base(base) {}

    DEVICE static uint32_t twist(uint32_t row)
    {
        return row / (8 / TWISTS) % TWISTS;
    }

    DEVICE uint32_t address(uint32_t row, uint32_t chunk) const
    {
        return base + row * ROW_BYTES + (chunk ^ twist(row)) * 16;
    }

    // The same for row `row` + `inner` and chunk 2 `step` + `odd`, where `row` is a multiple of 8: what
    // depends on the lane, `inner` and `odd`, is computed once for all rows and steps.
    DEVICE uint32_t address(uint32_t row, uint32_t inner, uint32_t step, uint32_t odd) const
    {
        const uint32_t lane_place = (odd ^ twist(inner)) * 16;
        return base + inner * ROW_BYTES + (step * 32 ^ lane_place) + row * ROW_BYTES;
    }

    // Starts copying `rows` rows (a multiple of 16) of a head from global memory, of which the first `valid`
    // exist; the others, and columns from head_dim on, become zeros. `thread` of `threads` threads (whole
    // warps) take part. Does not commit.
    DEVICE void load(const Element* source, int64_t stride, int rows, int valid, int head_dim, int thread,
                     int threads) const
    {
        const int j = thread % LANES;
        for (int row = thread / LANES; row < rows; row += threads / LANES) {
            UNROLL
            for (int i = 0; i < LANE_CHUNKS; i++) {
                const int chunk = i * LANES + j;
                if (chunk < CHUNKS) {
                    const bool exists = row < valid && 8 * chunk < head_dim;
                    const int64_t from = exists ? row * stride + 8 * chunk : 0;
                    ptx::cp_async_16(address(row, chunk), Global<const Element>(source).at(from), exists);
                }
            }
        }
    }
};

// Transposes 4x4 words over the four lanes of a quad: word i of lane j becomes word j of lane i. It turns the
// chunks of a row, chunk j in lane j, into operand columns (lane j has pair j of chunk i), and back.
// Collective.
DEVICE void transpose_quad(Vec16& x)
{
    const int j = ptx::lane_id() % 4;
    UNROLL
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = j & bit;
        UNROLL
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const uint32_t other = ptx::shuffle_xor(upper ? x.word[i] : x.word[i + bit], bit);
            if (upper)
                x.word[i] = other;
            else
                x.word[i + bit] = other;
        }
    }
}

// Writes zeros to the `width` columns (a multiple of 8) of token rows first.. `tokens` of a [tokens, stride]
// matrix, all blocks and threads taking part.
DEVICE void zero_rows(Element* rows, int64_t stride, int width, int first, int tokens)
{
    const Global<Element> memory(rows);
    for (int row = first + blockIdx.x; row < tokens; row += gridDim.x) {
        for (int i = threadIdx.x; i < width / 8; i += blockDim.x) memory.store_16(row * stride + 8 * i, Vec16{});
    }
}

DEVICE void zero_rows(float* rows, int width, int first, int tokens)
{
    const Global<float> memory(rows);
    for (int row = first + blockIdx.x; row < tokens; row += gridDim.x) {
        for (int i = threadIdx.x; i < width; i += blockDim.x) memory.store(int64_t(row) * width + i, 0.0f);
    }
}
