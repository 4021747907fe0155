// Masked attention pooling, backward; names as in attention.cuh. With delta_i = dout_i . out_i and
// ds_ij = scale p_ij (dout_i . v_j - delta_i):
//   dv_j = sum_i p_ij dout_i
//   g_j = sum_i ds_ij a_i;  dk_j = rstd_j (g_j - mean(g_j) - n_j mean(g_j n_j)), without mean(g) for RMS;
//         mean(g n) = sum_i ds_ij (a_i . n_j) / Dh, whose products are the scores: no further reduction
//   w_i = sum_j ds_ij n_j over the tokens of all images; then
//   dq^_i = gk w_i,  dgk = sum_i q^_i w_i,  dbk = 0 (it shifts all scores of a softmax alike),
//   dgq = sum_i dq^_i n_q,i,  dbq = sum_i dq^_i,  dq by the norm's rule.
// So w is all that the tokens give to the parameters: a partial per piece, summed in order by sum_rows.
#include "../common/reduce.cuh"
#include "attention.cuh"

struct PoolAttentionBackward {
    bf16* dk; // rows of dk_stride elements
    bf16* dv;
    float* partial; // [tokens / chunk + images + 1, heads, queries, head_dim]
    float* sums;    // [heads, queries, head_dim], of the partials
    const bf16* dout;
    const bf16* out;
    const float* lse;
    const bf16* k;
    const bf16* v;
    PoolAttentionQuery query;
    bf16* dq;               // as q, written; may be null, as all that follow
    float* dq_f32;          // as q, written or added to
    float* dq_gain;         // as q_gain, written or added to, as all that follow
    float* dq_bias;
    float* dk_gain;
    float* dk_bias;
    const int* accumulate;  // whether to add; null is not
    const int* cu_seqlens;
    int* error;
    int64_t dk_stride;
    int64_t dv_stride;
    int64_t k_stride;
    int64_t v_stride;
    PoolAttentionShape shape;
};

namespace pool {

constexpr int finish_threads = 512;

DEVICE void zero_rows(Global<bf16> x, int64_t stride, int column, int first, int end, int step)
{
    for (int row = first; row < end; row += step) x.store_16(row * stride + column, zero_vector());
}

// Block = (piece, head), as forward. dk and dv of the piece's rows, zeros in the prefix rows of an image's
// first piece and in the rows that belong to no image, and the piece's w. Shared memory, f32:
// a and dout [queries][8 group], w [groups][queries][8 group], and per query [4]: what is added to the
// score, delta, the mean of a.
template <int group>
DEVICE void attention_backward(const PoolAttentionBackward& p)
{
    constexpr int unroll = 2;
    constexpr int groups = attention_threads / group;
    constexpr int row_floats = 8 * group;
    constexpr int rows_of_step = groups * unroll;
    const PoolAttentionShape& s = p.shape;
    begin_dependent();
    check_cu_seqlens(p.cu_seqlens, p.error, s.images, s.tokens);
    int head = int(blockIdx.x) % s.heads;
    int number = int(blockIdx.x) / s.heads;
    Piece piece = find_piece(Global<const int>(p.cu_seqlens), number, s.images, s.tokens, s.skip);
    int thread = int(threadIdx.x);
    int lane = thread % group;
    int own = thread / group;
    int column = head * s.head_dim + 8 * lane;
    bool active = 8 * lane < s.head_dim;
    Global<bf16> dk(p.dk);
    Global<bf16> dv(p.dv);
    Global<float> partial(p.partial);
    int64_t part = (int64_t(number) * s.heads + head) * s.queries * s.head_dim;

    int zeros_first = piece.index == 0 ? piece.image_start : piece.first_row;
    int zeros_end = piece.first_row + (piece.image == s.images ? piece.rows : 0);
    if (active && piece.index >= 0) {
        zero_rows(dk, p.dk_stride, column, zeros_first + own, zeros_end, groups);
        zero_rows(dv, p.dv_stride, column, zeros_first + own, zeros_end, groups);
    }
    if (piece.rows == 0 || piece.image == s.images) {
        for (int i = thread; i < s.queries * s.head_dim; i += attention_threads) partial.store(part + i, 0.0f);
        return;
    }

    Shared<float> a(ptx::shared_base());
    Shared<float> dout(a.address + uint32_t(4 * s.queries * row_floats));
    Shared<float> w(dout.address + uint32_t(4 * s.queries * row_floats));
    Shared<float> scalars(w.address + uint32_t(4 * groups * s.queries * row_floats));
    int64_t affine = s.per_head ? int64_t(head) * s.head_dim : 0;
    for (int q = int(ptx::warp_id()); q < s.queries; q += attention_threads / 32) {
        QueryRow row = load_query(p.query, s, q, head);
        int64_t result = (int64_t(piece.image) * s.queries + q) * s.heads + head;
        float sums[3] = {};
        UNROLL
        for (int i = 0; i < group / 4; i++) {
            int d = int(ptx::lane_id()) + 32 * i;
            float value = 0.0f;
            float grad = 0.0f;
            if (d < s.head_dim) {
                value = row.value[i] * load_or(p.query.k_gain, affine + d, 1.0f);
                grad = to_float(Global<const bf16>(p.dout).load(result * s.head_dim + d));
                sums[0] += row.value[i] * load_or(p.query.k_bias, affine + d, 0.0f);
                sums[1] += grad * to_float(Global<const bf16>(p.out).load(result * s.head_dim + d));
                sums[2] += value;
            }
            a.store(uint32_t(q * row_floats + column_at<group>(d)), value);
            dout.store(uint32_t(q * row_floats + column_at<group>(d)), grad);
        }
        group_sums<32>(sums);
        if (ptx::lane_id() != 0) continue;
        float lse = Global<const float>(p.lse).load(result);
        scalars.store(uint32_t(4 * q), (s.scale * sums[0] - lse) * log2_e);
        scalars.store(uint32_t(4 * q + 1), sums[1]);
        scalars.store(uint32_t(4 * q + 2), s.norm == 2 ? sums[2] / float(s.head_dim) : 0.0f);
    }
    for (int i = thread; i < groups * s.queries * row_floats; i += attention_threads) {
        w.store(uint32_t(i), 0.0f);
    }
    ptx::barrier();

    float factor = s.scale * log2_e;
    Global<const bf16> k(p.k);
    Global<const bf16> v(p.v);
    for (int base = 0; base < piece.rows; base += rows_of_step) {
        Vec16 packed[unroll];
        Vec16 values[unroll];
        UNROLL
        for (int u = 0; u < unroll; u++) {
            int row = base + u * groups + own;
            bool valid = active && row < piece.rows;
            packed[u] = valid ? k.load_16((piece.first_row + row) * p.k_stride + column) : zero_vector();
            values[u] = valid ? v.load_16((piece.first_row + row) * p.v_stride + column) : zero_vector();
        }
        float n[unroll][8];
        float rstd[unroll];
        UNROLL
        for (int u = 0; u < unroll; u++) unpack_8(n[u], packed[u]);
        centre<group>(n, rstd, s, active);
        float grad_k[unroll][8];
        float grad_v[unroll][8];
        float along[unroll];
        float offset[unroll];
        UNROLL
        for (int u = 0; u < unroll; u++) {
            along[u] = 0.0f;
            offset[u] = 0.0f;
            UNROLL
            for (int i = 0; i < 8; i++) {
                n[u][i] *= rstd[u];
                grad_k[u][i] = 0.0f;
                grad_v[u][i] = 0.0f;
            }
        }
        for (int q = 0; q < s.queries; q++) {
            float query[8];
            float grad[8];
            float products[2 * unroll];
            load_columns<group>(query, a, q * row_floats, lane);
            load_columns<group>(grad, dout, q * row_floats, lane);
            UNROLL
            for (int u = 0; u < unroll; u++) {
                float value[8];
                unpack_8(value, values[u]);
                products[2 * u] = dot(query, n[u]);
                products[2 * u + 1] = dot(grad, value);
            }
            group_sums<group>(products);
            float added = scalars.load(uint32_t(4 * q));
            float delta = scalars.load(uint32_t(4 * q + 1));
            float mean = scalars.load(uint32_t(4 * q + 2));
            int at = (own * s.queries + q) * row_floats;
            float total[8];
            load_columns<group>(total, w, at, lane);
            UNROLL
            for (int u = 0; u < unroll; u++) {
                bool valid = base + u * groups + own < piece.rows;
                float weight = valid ? ptx::exp2(factor * products[2 * u] + added) : 0.0f;
                float ds = s.scale * weight * (products[2 * u + 1] - delta);
                along[u] += ds * products[2 * u];
                offset[u] += ds * mean;
                UNROLL
                for (int i = 0; i < 8; i++) {
                    total[i] += ds * n[u][i];
                    grad_k[u][i] += ds * query[i];
                    grad_v[u][i] += weight * grad[i];
                }
            }
            store_columns<group>(total, w, at, lane);
        }
        UNROLL
        for (int u = 0; u < unroll; u++) {
            int row = base + u * groups + own;
            if (!active || row >= piece.rows) continue;
            float mean_gn = s.norm == 0 ? 0.0f : along[u] / float(s.head_dim);
            UNROLL
            for (int i = 0; i < 8; i++) {
                grad_k[u][i] = rstd[u] * (grad_k[u][i] - offset[u] - n[u][i] * mean_gn);
            }
            dk.store_16((piece.first_row + row) * p.dk_stride + column, pack_8(grad_k[u]));
            dv.store_16((piece.first_row + row) * p.dv_stride + column, pack_8(grad_v[u]));
        }
    }
    ptx::barrier();
    for (int i = thread; i < s.queries * s.head_dim; i += attention_threads) {
        int q = i / s.head_dim;
        float total = 0.0f;
        for (int g = 0; g < groups; g++) {
            int at = (g * s.queries + q) * row_floats + column_at<group>(i % s.head_dim);
            total += w.load(uint32_t(at));
        }
        partial.store(part + i, total);
    }
}

// The gradients of the query and of gains and biases from w, one block; a warp takes every sixteenth head.
// Gains and biases that all heads share are summed over a warp's heads, then over the warps in order.
DEVICE void attention_finish(const PoolAttentionBackward& p)
{
    constexpr int warps = finish_threads / 32;
    const PoolAttentionShape& s = p.shape;
    begin_dependent();
    bool add = accumulates(p.accumulate);
    auto put = [&](float* grad, int64_t i, float x) {
        if (grad == nullptr) return;
        Global<float> view(grad);
        view.store(i, add ? view.load(i) + x : x);
    };
    int lane = int(ptx::lane_id());
    int warp = int(ptx::warp_id());
    float inverse = 1.0f / float(s.head_dim);
    Shared<float> shared(ptx::shared_base());
    float k_gain[max_per_lane] = {};
    float q_gain[max_per_lane] = {};
    float q_bias[max_per_lane] = {};
    for (int head = warp; head < s.heads; head += warps) {
        int64_t affine = s.per_head ? int64_t(head) * s.head_dim : 0;
        for (int q = 0; q < s.queries; q++) {
            QueryRow row = load_query(p.query, s, q, head);
            float g[max_per_lane];
            float means[2] = {};
            UNROLL
            for (int i = 0; i < max_per_lane; i++) {
                int d = lane + 32 * i;
                g[i] = 0.0f;
                if (d >= s.head_dim) continue;
                int64_t at = (int64_t(head) * s.queries + q) * s.head_dim + d;
                float w = Global<const float>(p.sums).load(at);
                float grad = w * load_or(p.query.k_gain, affine + d, 1.0f);
                k_gain[i] += row.value[i] * w;
                q_gain[i] += grad * row.normed[i];
                q_bias[i] += grad;
                g[i] = grad * load_or(p.query.q_gain, affine + d, 1.0f);
                means[0] += g[i];
                means[1] += g[i] * row.normed[i];
            }
            group_sums<32>(means);
            float mean = s.norm == 2 ? means[0] * inverse : 0.0f;
            float along = s.norm == 0 ? 0.0f : means[1] * inverse;
            UNROLL
            for (int i = 0; i < max_per_lane; i++) {
                int d = lane + 32 * i;
                if (d >= s.head_dim) continue;
                int64_t at = (int64_t(q) * s.heads + head) * s.head_dim + d;
                float dq = row.rstd * (g[i] - mean - row.normed[i] * along);
                put(p.dq_f32, at, dq);
                if (p.dq != nullptr) Global<bf16>(p.dq).store(at, to_bf16(dq));
            }
        }
        if (!s.per_head) continue;
        UNROLL
        for (int i = 0; i < max_per_lane; i++) {
            int d = lane + 32 * i;
            if (d < s.head_dim) {
                put(p.dk_gain, affine + d, k_gain[i]);
                put(p.dq_gain, affine + d, q_gain[i]);
                put(p.dq_bias, affine + d, q_bias[i]);
                put(p.dk_bias, affine + d, 0.0f);
            }
            k_gain[i] = q_gain[i] = q_bias[i] = 0.0f;
        }
    }
    if (s.per_head) return;
    UNROLL
    for (int i = 0; i < max_per_lane; i++) {
        uint32_t at = uint32_t(3 * warp * 32 * max_per_lane + lane + 32 * i);
        shared.store(at, k_gain[i]);
        shared.store(at + 32 * max_per_lane, q_gain[i]);
        shared.store(at + 2 * 32 * max_per_lane, q_bias[i]);
    }
    ptx::barrier();
    for (int d = int(threadIdx.x); d < s.head_dim; d += finish_threads) {
        float sums[3] = {};
        for (int i = 0; i < 3 * warps; i++) {
            sums[i % 3] += shared.load(uint32_t(i * 32 * max_per_lane + d));
        }
        put(p.dk_gain, d, sums[0]);
        put(p.dq_gain, d, sums[1]);
        put(p.dq_bias, d, sums[2]);
        put(p.dk_bias, d, 0.0f);
    }
}

} // namespace pool
