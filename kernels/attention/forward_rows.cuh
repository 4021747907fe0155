// What the forward kernels of attention share: their constant arguments, the rows of a head, and queries in registers
// that attend to keys in shared memory by mma.
#pragma once

#include "rope.cuh"

struct AttentionForward {
    const Element* q;
    const Element* k;
    const Element* v;
    const Element* k_norm; // k^ of long images, [tokens, kv_heads * head_dim], where Hopper's kernel wants it; else null
    Element* out;
    float* lse; // [tokens, heads]
    const int32_t* cu_seqlens;
    const int32_t* schedule;
    const float* rope; // [tokens, head_dim / 2, 2], see rope.cuh; null: none
    QkNorm norm;
    QkStatistics statistics;
    int64_t q_stride;
    int64_t k_stride;
    int64_t v_stride;
    int64_t out_stride;
    int32_t tokens;
    int32_t slots;
    int32_t heads;
    int32_t kv_heads; // a divisor of heads
    int32_t head_dim;
    int32_t rope_kind;
    float scale;
    int32_t turns; // not 0: Hopper's warpgroups take turns at the tensor cores where an image is long
    int32_t pairs; // not 0: Hopper's blocks are clusters of two, which share keys and values where an image is long
    int32_t unused;
};

namespace attention_forward {

constexpr float LOG2_E = 1.44269504088896f;
constexpr float LN_2 = 0.693147180559945f;

DEVICE float infinity()
{
    return bits_to_float(0x7f800000);
}

// The rows of one image that belong to one head.
struct Head {
    int64_t start;
    int length;
    int head;
};

DEVICE Head head_of(const AttentionForward& p, int image, int head)
{
    const Global<const int32_t> cu_seqlens(p.cu_seqlens);
    const int start = ptx::shuffle(uint32_t(cu_seqlens.load(image)), 0);
    const int end = ptx::shuffle(uint32_t(cu_seqlens.load(image + 1)), 0);
    return Head{start, end - start, head};
}

// Zeros in all that is written, for the token rows that belong to no image; all blocks and threads take part.
DEVICE void zero_unused(const AttentionForward& p, int used)
{
    zero_rows(p.out, p.out_stride, p.heads * p.head_dim, used, p.tokens);
    zero_rows(p.lse, p.heads, used, p.tokens);
    if (p.statistics.q_mean) {
        zero_rows(p.statistics.q_mean, p.heads, used, p.tokens);
        zero_rows(p.statistics.q_rstd, p.heads, used, p.tokens);
        zero_rows(p.statistics.k_mean, p.kv_heads, used, p.tokens);
        zero_rows(p.statistics.k_rstd, p.kv_heads, used, p.tokens);
    }
}

// Rows of a head from row `row` on.
DEVICE const Element* rows_of(const Element* x, int64_t stride, const AttentionForward& p, Head head, int row)
{
    return x + (head.start + row) * stride + head.head * p.head_dim;
}

// The head of keys and values that a head of queries has.
DEVICE Head kv_of(const AttentionForward& p, Head head)
{
    return Head{head.start, head.length, kv_head(p, head.head)};
}

// The statistics of keys from row `row` on, where they are wanted.
DEVICE float* statistics_of(float* x, const AttentionForward& p, Head keys, int row, bool wanted)
{
    return x && wanted ? x + (keys.start + row) * p.kv_heads + keys.head : nullptr;
}

DEVICE HeadNorm key_norm(const AttentionForward& p, Head keys)
{
    return head_norm(p.norm, p.norm.k_gain, p.norm.k_bias, keys.head, p.head_dim);
}

// 16 M query rows of one warp, which attend to keys and values in rows of Tile. Rows lane / 4 + 8 half of each 16
// belong to this lane's quad. M = 2 shares each operand read from shared memory between two products; M and the keys of
// a step are what registers allow, see src/kernels/attention/instances.rs.
template <class Tile, int M>
struct Queries {
    static constexpr int CHUNKS = Tile::CHUNKS;
    static constexpr int STEPS = Tile::STEPS;
    static constexpr int QUAD_CHUNKS = ceil_div(CHUNKS, 4);

    Vec16 raw[2 * M][QUAD_CHUNKS]; // of rows 8 apart
    uint32_t q[STEPS][M][4];
    float out[STEPS][M][2][4];
    float highest[M][2]; // score before the factor
    float sum[M][2];     // of this lane's columns

    // Starts loading the rows from `row` on: lane j of a quad gets chunks j, j + 4, ...
    DEVICE void load(const AttentionForward& p, Head head, int row)
    {
        const Global<const Element> source(p.q);
        const int lane = ptx::lane_id();
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int r = row + 16 * m + 8 * half + lane / 4;
                const int64_t first = (head.start + r) * p.q_stride + head.head * p.head_dim;
                UNROLL
                for (int i = 0; i < QUAD_CHUNKS; i++) {
                    const int column = 8 * (4 * i + lane % 4);
                    const bool exists = r < head.length && column < p.head_dim;
                    raw[2 * m + half][i] = exists ? source.load_16(first + column) : Vec16{};
                }
            }
        }
    }

    // Normalises what was loaded and makes the operands; nothing has been attended to yet.
    DEVICE void begin(const AttentionForward& p, Head head, int row)
    {
        if (p.rope)
            rotate(p, head, row);
        else if (p.norm.kind != NORM_NONE)
            normalise(p, head, row);
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                UNROLL
                for (int i = 0; i < QUAD_CHUNKS; i++) {
                    Vec16& x = raw[2 * m + half][i];
                    transpose_quad(x);
                    UNROLL
                    for (int c = 0; c < 4; c++) {
                        if (4 * i + c < 2 * STEPS) q[2 * i + c / 2][m][half + c % 2 * 2] = x.word[c];
                    }
                }
                highest[m][half] = -infinity();
                sum[m][half] = 0.0f;
            }
        }
        UNROLL
        for (int s = 0; s < STEPS; s++) {
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int i = 0; i < 8; i++) out[s][m][i / 4][i % 4] = 0.0f;
            }
        }
    }

    DEVICE void normalise(const AttentionForward& p, Head head, int row)
    {
        const int j = ptx::lane_id() % 4;
        const HeadNorm norm = head_norm(p.norm, p.norm.q_gain, p.norm.q_bias, head.head, p.head_dim);
        const LaneAffine<4, QUAD_CHUNKS> affine(norm, j, p.head_dim);
        RowStatistics statistics[2 * M];
        rows_statistics<4>(statistics, raw, j, p.head_dim, norm);
        UNROLL
        for (int i = 0; i < 2 * M; i++) {
            normalise_row(raw[i], affine, statistics[i], j, p.head_dim);
            keep(p, head, row + 8 * i + ptx::lane_id() / 4, statistics[i]);
        }
    }

    // The statistics of row `row`.
    DEVICE void keep(const AttentionForward& p, Head head, int row, RowStatistics statistics) const
    {
        if (!p.statistics.q_mean || ptx::lane_id() % 4 != 0 || row >= head.length) return;
        const int64_t at = (head.start + row) * p.heads + head.head;
        Global<float>(p.statistics.q_mean).store(at, statistics.mean);
        Global<float>(p.statistics.q_rstd).store(at, statistics.rstd);
    }

    // Normalises and rotates; partners come from global memory again. One word after the other, for want of registers: that
    // in front, which then goes to the end.
    DEVICE void rotate(const AttentionForward& p, Head head, int row)
    {
        constexpr int WORDS = 4 * QUAD_CHUNKS;
        const int j = ptx::lane_id() % 4;
        const HeadNorm norm = head_norm(p.norm, p.norm.q_gain, p.norm.q_bias, head.head, p.head_dim);
        RowStatistics statistics[2 * M];
        statistics_or_none<4>(statistics, raw, j, p.head_dim, norm);
        ROLLED
        for (int i = 0; i < 2 * M; i++) {
            const int r = row + 8 * i + ptx::lane_id() / 4;
            keep(p, head, r, statistics[0]);
            const Global<const Element> source(rows_of(p.q, p.q_stride, p, head, r));
            const Rope rope = rope_of(p).from(head.start + r);
            auto word = [&](int column) { return source.load_pair(column); };
            ROLLED
            for (int w = 0; w < WORDS; w++) {
                const int column = 8 * (w / 4 * 4 + j) + 2 * (w % 4);
                uint32_t x = raw[0][0].word[0];
                if (r < head.length && column < p.head_dim) x = rotated(x, column, word, norm, statistics[0], rope);
                UNROLL
                for (int k = 0; k + 1 < WORDS; k++) raw[0][k / 4].word[k % 4] = raw[0][(k + 1) / 4].word[(k + 1) % 4];
                raw[0][QUAD_CHUNKS - 1].word[3] = x;
            }
            UNROLL
            for (int c = 0; c < QUAD_CHUNKS; c++) {
                const Vec16 done = raw[0][c];
                UNROLL
                for (int k = 0; k + 1 < 2 * M; k++) raw[k][c] = raw[k + 1][c];
                raw[2 * M - 1][c] = done;
            }
            UNROLL
            for (int k = 0; k + 1 < 2 * M; k++) statistics[k] = statistics[k + 1];
        }
    }

    // Attends to `keys` keys (KEYS, or fewer where PARTIAL) in the rows from `row` on of the tiles.
    template <int KEYS, bool PARTIAL>
    DEVICE void attend(Tile k, Tile v, int row, int keys, float factor)
    {
        constexpr int GROUPS = KEYS / 16;
        const int lane = ptx::lane_id();
        float s[GROUPS][M][2][4];
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int i = 0; i < 8; i++) s[g][m][i / 4][i % 4] = 0.0f;
            }
        }
        if (PARTIAL) {
            UNROLL
            for (int g = 0; g < GROUPS; g++) {
                if (16 * g >= keys) continue;
                UNROLL
                for (int step = 0; step < STEPS; step++) score(s[g], k, row + 16 * g, step);
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const int key = 16 * g + i / 2 * 8 + lane % 4 * 2 + i % 2;
                    if (key < keys) continue;
                    UNROLL
                    for (int m = 0; m < M; m++) s[g][m][i / 2][i % 2] = s[g][m][i / 2][i % 2 + 2] = -infinity();
                }
            }
        } else {
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                UNROLL
                for (int g = 0; g < GROUPS; g++) score(s[g], k, row + 16 * g, step);
            }
        }
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const float shrink = soften<PARTIAL>(s, m, half, keys, factor);
                rescale(m, half, shrink);
            }
        }
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            if (PARTIAL && 16 * g >= keys) continue;
            uint32_t a[M][4];
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const float(&tile)[4] = s[g][m][i / 2];
                    a[m][i] = pack_pair(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
                }
            }
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                uint32_t b[2][2];
                v.columns_as_b(b, row + 16 * g, step);
                if (2 * step + 1 < CHUNKS) {
                    ptx::mma_tiles<Element>(out[step], a, b);
                } else {
                    UNROLL
                    for (int m = 0; m < M; m++) ptx::mma<Element>(out[step][m][0], a[m], b[0]);
                }
            }
        }
    }

    DEVICE void score(float (&s)[M][2][4], Tile k, int row, int step)
    {
        uint32_t b[2][2];
        k.rows_as_b(b, row, step);
        ptx::mma_tiles<Element>(s, q[step], b);
    }

    // Scores of one row of the quad to exponentials, after the maximum of all keys so far. What they are added to is to
    // be multiplied by what is returned.
    template <bool PARTIAL, int GROUPS>
    DEVICE float soften(float (&s)[GROUPS][M][2][4], int m, int half, int keys, float factor)
    {
        float top = highest[m][half];
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            if (PARTIAL && 16 * g >= keys) continue;
            UNROLL
            for (int i = 0; i < 4; i++) top = max(top, s[g][m][i / 2][half * 2 + i % 2]);
        }
        top = max_of_lanes<4>(top);
        const float offset = -top * factor;
        const float shrink = ptx::exp2(ptx::fused_multiply_add(highest[m][half], factor, offset));
        highest[m][half] = top;
        float total = sum[m][half];
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
            if (PARTIAL && 16 * g >= keys) continue;
            UNROLL
            for (int i = 0; i < 4; i++) {
                float& x = s[g][m][i / 2][half * 2 + i % 2];
                x = ptx::exp2(ptx::fused_multiply_add(x, factor, offset));
                // Not left to the compiler, which may fuse it for whole steps of keys and not for part of one.
                total = g == 0 && i == 0 ? ptx::fused_multiply_add(total, shrink, x) : total + x;
            }
        }
        sum[m][half] = total;
        return shrink;
    }

    DEVICE void rescale(int m, int half, float shrink)
    {
        UNROLL
        for (int i = 0; i < 2 * CHUNKS; i++) out[i / 4][m][i / 2 % 2][half * 2 + i % 2] *= shrink;
    }

    DEVICE void store(const AttentionForward& p, Head head, int row, float factor)
    {
        const Global<Element> target(p.out);
        const int lane = ptx::lane_id();
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int r = row + 16 * m + 8 * half + lane / 4;
                const float total = sum_of_lanes<4>(sum[m][half]);
                const float share = ptx::reciprocal(total);
                const int64_t first = (head.start + r) * p.out_stride + head.head * p.head_dim;
                UNROLL
                for (int i = 0; i < QUAD_CHUNKS; i++) {
                    Vec16 x{};
                    UNROLL
                    for (int c = 0; c < 4; c++) {
                        if (4 * i + c >= CHUNKS) continue;
                        const float(&pair)[4] = out[2 * i + c / 2][m][c % 2];
                        x.word[c] = pack_pair(pair[2 * half] * share, pair[2 * half + 1] * share);
                    }
                    transpose_quad(x);
                    const int column = 8 * (4 * i + lane % 4);
                    if (r < head.length && column < p.head_dim) target.store_16(first + column, x);
                }
                if (lane % 4 == 0 && r < head.length) {
                    const float lse = ptx::fused_multiply_add(highest[m][half], factor, ptx::log2(total)) * LN_2;
                    Global<float>(p.lse).store((head.start + r) * p.heads + head.head, lse);
                }
            }
        }
    }
};

} // namespace attention_forward
