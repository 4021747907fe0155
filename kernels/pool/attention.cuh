// What forward and backward of masked attention pooling share: the maths, constants, the query, the norm.
// Masked attention pooling (MAP) per image over packed rows, with QK-norm: Q learned queries, the same for
// all images, ask all tokens of an image but the first `skip`. Per head, query i, token j:
//   n_j = (k_j - mu_j) rstd_j, k^_j = n_j gk + bk      (RMS: mu = 0; no norm: n = k), q^ likewise
//   s_ij = scale q^_i . k^_j = scale (a_i . n_j + b_i), a = q^ gk, b = q^ . bk
//   out_i = sum_j p_ij v_j, p = softmax_j(s), lse_i = ln sum_j exp(s_ij)
//
// Memory-bound: k and v are read once for all queries. A block owns one piece of an image (chunks.cuh) and
// one head. A group of neighbouring lanes holds a row, 8 elements a lane: 8, 16 or 32 lanes for a head dim
// up to 64, 128 or 256. What belongs to a query (a, running maximum, sum, result) lives in shared memory, a
// copy per group, which keeps the number of queries free; it is touched once per `unroll` rows of a group.
// All arithmetic is f32 on the bf16 inputs.
#pragma once

#include "chunks.cuh"

struct PoolAttentionShape {
    float scale;
    float eps;
    int tokens;
    int images;
    int heads;
    int head_dim; // multiple of 8, at most 256
    int queries;  // 1 to max_queries
    int skip;
    int norm;     // 0 none, 1 RMS, 2 LayerNorm
    int per_head; // whether gains and biases are [heads, head_dim], not [head_dim]
};

// The query, bf16 or f32 (the other is null), and gains and biases: null is 1 and 0.
struct PoolAttentionQuery {
    const bf16* q; // [queries, heads * head_dim]
    const float* q_f32;
    const float* q_gain;
    const float* q_bias;
    const float* k_gain;
    const float* k_bias;
};

namespace pool {

constexpr int attention_threads = 256;
constexpr int max_queries = 8;
constexpr int max_per_lane = 8; // columns of a head that a lane holds where a warp holds a row
constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

DEVICE float minus_infinity()
{
    return bits_to_float(0xff800000u);
}

// mu and rstd of a row of `dim` elements spread over a group of lanes, which hold zeros beyond the row.
struct Statistics {
    float mean;
    float rstd;
};

// One head of one query, column lane + 32 i in element i: after normalisation, and after gain and bias.
struct QueryRow {
    float normed[max_per_lane];
    float value[max_per_lane];
    float rstd;
};

DEVICE float load_or(const float* p, int64_t i, float otherwise)
{
    return p == nullptr ? otherwise : Global<const float>(p).load(i);
}

// Collective over the warp.
DEVICE QueryRow load_query(const PoolAttentionQuery& query, const PoolAttentionShape& s, int q, int head)
{
    QueryRow row;
    int lane = int(ptx::lane_id());
    int64_t start = (int64_t(q) * s.heads + head) * s.head_dim;
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < max_per_lane; i++) {
        int d = lane + 32 * i;
        float x = 0.0f;
        if (d < s.head_dim) {
            x = query.q == nullptr ? Global<const float>(query.q_f32).load(start + d)
                                   : to_float(Global<const bf16>(query.q).load(start + d));
        }
        row.normed[i] = x;
        sum += x;
    }
    float mean = s.norm == 2 ? group_sum<32>(sum) / float(s.head_dim) : 0.0f;
    float squares = 0.0f;
    UNROLL
    for (int i = 0; i < max_per_lane; i++) {
        row.normed[i] = lane + 32 * i < s.head_dim ? row.normed[i] - mean : 0.0f;
        squares += row.normed[i] * row.normed[i];
    }
    row.rstd = s.norm == 0 ? 1.0f : ptx::rsqrt(group_sum<32>(squares) / float(s.head_dim) + s.eps);
    int64_t affine = s.per_head ? int64_t(head) * s.head_dim : 0;
    UNROLL
    for (int i = 0; i < max_per_lane; i++) {
        int d = lane + 32 * i;
        row.normed[i] *= row.rstd;
        row.value[i] = 0.0f;
        if (d < s.head_dim) {
            float gain = load_or(query.q_gain, affine + d, 1.0f);
            row.value[i] = row.normed[i] * gain + load_or(query.q_bias, affine + d, 0.0f);
        }
    }
    return row;
}

// Where column d of a row of 8 * group elements lies in shared memory: the lower halves of all lanes, then
// the upper halves, so that a group's 16-byte accesses are contiguous.
template <int group>
DEVICE int column_at(int d)
{
    return d % 8 / 4 * 4 * group + d / 8 * 4 + d % 4;
}

// The 8 columns of lane `lane` of the row at `start`.
template <int group>
DEVICE void load_columns(float (&x)[8], Shared<float> row, int start, int lane)
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        Vec16 words = row.load_16(uint32_t(start + half * 4 * group + lane * 4));
        UNROLL
        for (int i = 0; i < 4; i++) x[4 * half + i] = bits_to_float(words.word[i]);
    }
}

template <int group>
DEVICE void store_columns(const float (&x)[8], Shared<float> row, int start, int lane)
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        Vec16 words;
        UNROLL
        for (int i = 0; i < 4; i++) words.word[i] = float_to_bits(x[4 * half + i]);
        row.store_16(uint32_t(start + half * 4 * group + lane * 4), words);
    }
}

// Centres the rows x of a step and gives 1/sigma of each; without a norm they stay. Collective.
template <int group, int rows>
DEVICE void centre(float (&x)[rows][8], float (&rstd)[rows], const PoolAttentionShape& s, bool active)
{
    UNROLL
    for (int u = 0; u < rows; u++) rstd[u] = 1.0f;
    if (s.norm == 0) return;
    float inverse = 1.0f / float(s.head_dim);
    float sum[rows];
    if (s.norm == 2) {
        UNROLL
        for (int u = 0; u < rows; u++) {
            sum[u] = 0.0f;
            UNROLL
            for (int i = 0; i < 8; i++) sum[u] += x[u][i];
        }
        group_sums<group>(sum);
        UNROLL
        for (int u = 0; u < rows; u++) {
            float mean = active ? sum[u] * inverse : 0.0f;
            UNROLL
            for (int i = 0; i < 8; i++) x[u][i] -= mean;
        }
    }
    UNROLL
    for (int u = 0; u < rows; u++) {
        sum[u] = 0.0f;
        UNROLL
        for (int i = 0; i < 8; i++) sum[u] += x[u][i] * x[u][i];
    }
    group_sums<group>(sum);
    UNROLL
    for (int u = 0; u < rows; u++) rstd[u] = ptx::rsqrt(sum[u] * inverse + s.eps);
}

DEVICE float dot(const float (&a)[8], const float (&b)[8])
{
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    return sum;
}

} // namespace pool
