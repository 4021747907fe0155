// Masked attention pooling, forward. The maths is in attention.cuh; softmax is online, in base 2.
#include "attention.cuh"

struct PoolAttentionForward {
    bf16* out;      // [images, queries, heads * head_dim]
    float* lse;     // [images, queries, heads]
    float* partial; // [tokens / chunk + images, heads, queries, head_dim + 2]
    const bf16* k;  // rows of k_stride elements, heads one after another
    const bf16* v;
    PoolAttentionQuery query;
    const int* cu_seqlens; // [images + 1]
    int* error;            // set where cu_seqlens is bad; may be null
    int64_t k_stride;
    int64_t v_stride;
    PoolAttentionShape shape;
};

namespace pool {

// Block = (piece, head), heads fastest, so that blocks that run together read whole rows. An image of one
// piece is finished here. Shared memory, f32: a [queries][8 group]; per lane group and query the result
// [groups][queries][8 group], and maximum and sum [groups][queries][2]; b [queries].
template <int group>
DEVICE void attention_forward(const PoolAttentionForward& p)
{
    constexpr int unroll = 4;
    constexpr int groups = attention_threads / group;
    constexpr int row_floats = 8 * group;
    constexpr int rows_of_step = groups * unroll;
    const PoolAttentionShape& s = p.shape;
    begin_dependent();
    check_cu_seqlens(p.cu_seqlens, p.error, s.images, s.tokens);
    int head = int(blockIdx.x) % s.heads;
    int number = int(blockIdx.x) / s.heads;
    Piece piece = find_piece(Global<const int>(p.cu_seqlens), number, s.images, s.tokens, s.skip);
    if (piece.rows == 0 || piece.image == s.images) return;

    Shared<float> a(ptx::shared_base());
    Shared<float> result(a.address + uint32_t(4 * s.queries * row_floats));
    Shared<float> state(result.address + uint32_t(4 * groups * s.queries * row_floats));
    Shared<float> b(state.address + uint32_t(4 * 2 * groups * s.queries));
    int thread = int(threadIdx.x);
    int64_t affine = s.per_head ? int64_t(head) * s.head_dim : 0;
    for (int q = int(ptx::warp_id()); q < s.queries; q += attention_threads / 32) {
        QueryRow row = load_query(p.query, s, q, head);
        float bias = 0.0f;
        UNROLL
        for (int i = 0; i < group / 4; i++) {
            int d = int(ptx::lane_id()) + 32 * i;
            bool inside = d < s.head_dim;
            float gain = inside ? load_or(p.query.k_gain, affine + d, 1.0f) : 0.0f;
            bias += inside ? row.value[i] * load_or(p.query.k_bias, affine + d, 0.0f) : 0.0f;
            a.store(uint32_t(q * row_floats + column_at<group>(d)), row.value[i] * gain);
        }
        bias = group_sum<32>(bias);
        if (ptx::lane_id() == 0) b.store(uint32_t(q), bias);
    }
    for (int i = thread; i < groups * s.queries * row_floats; i += attention_threads) {
        result.store(uint32_t(i), 0.0f);
    }
    for (int i = thread; i < groups * s.queries; i += attention_threads) {
        state.store(uint32_t(2 * i), minus_infinity());
        state.store(uint32_t(2 * i + 1), 0.0f);
    }
    ptx::barrier();

    int lane = thread % group;
    int own = thread / group;
    int column = head * s.head_dim + 8 * lane;
    bool active = 8 * lane < s.head_dim;
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
        float x[unroll][8];
        float rstd[unroll];
        UNROLL
        for (int u = 0; u < unroll; u++) unpack_8(x[u], packed[u]);
        centre<group>(x, rstd, s, active);
        for (int q = 0; q < s.queries; q++) {
            int at = own * s.queries + q;
            float query[8];
            float score[unroll];
            load_columns<group>(query, a, q * row_floats, lane);
            UNROLL
            for (int u = 0; u < unroll; u++) score[u] = dot(query, x[u]);
            group_sums<group>(score);
            float before = state.load(uint32_t(2 * at));
            float sum = state.load(uint32_t(2 * at + 1));
            float bias = b.load(uint32_t(q));
            float max = before;
            UNROLL
            for (int u = 0; u < unroll; u++) {
                bool valid = base + u * groups + own < piece.rows;
                score[u] = valid ? factor * (score[u] * rstd[u] + bias) : minus_infinity();
                max = score[u] > max ? score[u] : max;
            }
            // A group that has seen no row yet subtracts 0: infinities must not meet.
            float shift = max == minus_infinity() ? 0.0f : max;
            float shrink = ptx::exp2(before - shift);
            float total[8];
            load_columns<group>(total, result, at * row_floats, lane);
            sum *= shrink;
            UNROLL
            for (int i = 0; i < 8; i++) total[i] *= shrink;
            UNROLL
            for (int u = 0; u < unroll; u++) {
                float weight = ptx::exp2(score[u] - shift);
                float value[8];
                unpack_8(value, values[u]);
                sum += weight;
                UNROLL
                for (int i = 0; i < 8; i++) total[i] += weight * value[i];
            }
            store_columns<group>(total, result, at * row_floats, lane);
            // All lanes have read the state before one of them replaces it.
            ptx::warp_sync();
            if (lane == 0) {
                state.store(uint32_t(2 * at), max);
                state.store(uint32_t(2 * at + 1), sum);
            }
            ptx::warp_sync();
        }
    }
    ptx::barrier();

    // The groups in order.
    for (int i = thread; i < s.queries * s.head_dim; i += attention_threads) {
        int q = i / s.head_dim;
        int d = i % s.head_dim;
        float max = minus_infinity();
        for (int g = 0; g < groups; g++) {
            float x = state.load(uint32_t(2 * (g * s.queries + q)));
            max = x > max ? x : max;
        }
        float sum = 0.0f;
        float total = 0.0f;
        for (int g = 0; g < groups; g++) {
            int at = g * s.queries + q;
            float weight = ptx::exp2(state.load(uint32_t(2 * at)) - max);
            sum += weight * state.load(uint32_t(2 * at + 1));
            total += weight * result.load(uint32_t(at * row_floats + column_at<group>(d)));
        }
        if (piece.count == 1) {
            int64_t row = int64_t(piece.image) * s.queries + q;
            Global<bf16>(p.out).store((row * s.heads + head) * s.head_dim + d, to_bf16(total / sum));
            if (d == 0) Global<float>(p.lse).store(row * s.heads + head, (max + ptx::log2(sum)) * ln_2);
        } else {
            Global<float> partial(p.partial);
            int64_t at = ((int64_t(number) * s.heads + head) * s.queries + q) * (s.head_dim + 2);
            partial.store(at + d, total);
            if (d == 0) {
                partial.store(at + s.head_dim, max);
                partial.store(at + s.head_dim + 1, sum);
            }
        }
    }
}

// Block = image: zeros for the images without pieces, the pieces in order for those of several.
DEVICE void attention_combine(const PoolAttentionForward& p)
{
    const PoolAttentionShape& s = p.shape;
    begin_dependent();
    Global<const int> cu_seqlens(p.cu_seqlens);
    int image = int(blockIdx.x);
    Piece piece = image_at(cu_seqlens, image, s.images, s.tokens, s.skip);
    if (piece.count == 1) return;
    int first = first_piece(cu_seqlens, image, s.tokens);
    Global<const float> partial(p.partial);
    for (int i = int(threadIdx.x); i < s.queries * s.heads * s.head_dim; i += int(blockDim.x)) {
        int q = i / (s.heads * s.head_dim);
        int head = i / s.head_dim % s.heads;
        int d = i % s.head_dim;
        auto part = [&](int c) {
            return ((int64_t(first + c) * s.heads + head) * s.queries + q) * (s.head_dim + 2);
        };
        float max = minus_infinity();
        for (int c = 0; c < piece.count; c++) {
            float x = partial.load(part(c) + s.head_dim);
            max = x > max ? x : max;
        }
        float sum = 0.0f;
        float total = 0.0f;
        for (int c = 0; c < piece.count; c++) {
            float weight = ptx::exp2(partial.load(part(c) + s.head_dim) - max);
            sum += weight * partial.load(part(c) + s.head_dim + 1);
            total += weight * partial.load(part(c) + d);
        }
        bool empty = piece.count == 0;
        int64_t row = int64_t(image) * s.queries + q;
        float mean = empty ? 0.0f : total / sum;
        Global<bf16>(p.out).store((row * s.heads + head) * s.head_dim + d, to_bf16(mean));
        if (d == 0) {
            float lse = empty ? 0.0f : (max + ptx::log2(sum)) * ln_2;
            Global<float>(p.lse).store(row * s.heads + head, lse);
        }
    }
}

} // namespace pool
