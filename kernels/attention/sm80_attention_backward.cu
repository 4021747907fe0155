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
#include "common.cuh"
#include "schedule.cuh"

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
    int32_t long_rows; // of a tile of the long schedule
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

// 16-row tiles that a warp owns, and 16-row groups of the streamed side that it takes at a time: what the
// registers hold.
DEVICE constexpr int tiles_of_warp(int width)
{
    return width <= 80 ? 2 : 1;
}

DEVICE constexpr int groups_of_step(int width)
{
    return width == 64 || width > 80 ? 2 : 1;
}

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
    int index;
    int warps;
    int warp;
    int thread;

    DEVICE int threads() const
    {
        return 32 * warps;
    }

    DEVICE void barrier() const
    {
        ptx::barrier(1 + index, threads());
    }
};

// Rows of one side in shared memory: k^ and v, or q^ and dout. Where a pair has been used up, an f32 row of D
// columns takes the place of its two bf16 rows.
template <int D>
struct Pair {
    Tile<D> first;
    Tile<D> second;

    DEVICE Pair(uint32_t base, int rows) : first(base), second(base + rows * Tile<D>::ROW_BYTES) {}

    // Chunk of 4 f32 columns.
    DEVICE uint32_t f32_address(int row, int chunk) const
    {
        constexpr int CHUNKS = Tile<D>::CHUNKS;
        return chunk < CHUNKS ? first.address(row, chunk) : second.address(row, chunk - CHUNKS);
    }

    // Two neighbouring elements of the result of an mma: n-tile `tile`, this lane's columns.
    DEVICE void store_f32(int row, int tile, float x, float y) const
    {
        const int lane = ptx::lane_id();
        const uint32_t address = f32_address(row, 2 * tile + lane % 4 / 2) + lane % 2 * 8;
        Shared<FloatPair>(address).store(0, FloatPair{x, y});
    }
};

// Rows of one head in global memory, from some token on.
struct Rows {
    const bf16* p;
    int64_t stride;
};

struct Head {
    int64_t start;
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
    return Rows{x + (head.start + row) * stride + head.head * p.head_dim, stride};
}

DEVICE bf16* rows_of(const AttentionBackward& p, bf16* x, int64_t stride, Head head, int row)
{
    return x + (head.start + row) * stride + head.head * p.head_dim;
}

// dout out of one row, the same in the LANES lanes that share it.
template <int D>
DEVICE float row_delta(Rows out, Rows dout, int row, bool exists, int head_dim)
{
    constexpr int LANES = Tile<D>::LANES;
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < Tile<D>::LANE_CHUNKS; i++) {
        const int column = 8 * (i * LANES + int(ptx::lane_id()) % LANES);
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

// Gradients of a gain and a bias, this lane's columns: chunks j, j + LANES, ...
template <int D>
struct ColumnSums {
    float gain[Tile<D>::LANE_CHUNKS][8];
    float bias[Tile<D>::LANE_CHUNKS][8];

    DEVICE ColumnSums()
    {
        UNROLL
        for (int i = 0; i < Tile<D>::LANE_CHUNKS * 8; i++) gain[i / 8][i % 8] = bias[i / 8][i % 8] = 0.0f;
    }

    // Adds the sums over the group to its head's rows `affine` and `affine` + 1 of the block's partial sums.
    // `scratch` holds 2 D floats a warp. Collective of the group.
    DEVICE void add_to(const AttentionBackward& p, int head, int affine, uint32_t scratch, Group group)
    {
        constexpr int LANES = Tile<D>::LANES;
        const int lane = ptx::lane_id();
        const Shared<float> sums(scratch);
        UNROLL
        for (int i = 0; i < Tile<D>::LANE_CHUNKS; i++) {
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
    constexpr int LANES = Tile<D>::LANES;
    constexpr int N = Tile<D>::LANE_CHUNKS;
    const int j = ptx::lane_id() % LANES;
    const Global<bf16> memory(target);
    for (int first = 0; first < rows; first += 32 / LANES) {
        const int r = row + first + ptx::lane_id() / LANES;
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
                    float gain[4] = {1.0f, 1.0f, 1.0f, 1.0f};
                    if (norm.gain) {
                        const Vec16 four = Global<const float>(norm.gain).load_16(column + 4 * half);
                        UNROLL
                        for (int c = 0; c < 4; c++) gain[c] = bits_to_float(four.word[c]);
                    }
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

// ds^T of one step in shared memory: a row of 32 queries a key, 4 chunks, turned so that neither the stores of
// mma's results nor ldmatrix meet a bank twice.
DEVICE uint32_t ds_address(uint32_t base, int key, int chunk)
{
    return base + key * (2 * STEP) + (chunk ^ (key / 2 % 4)) * 16;
}

// What a warp owns: 16 M rows of keys (and values), or of queries (and dout).
template <int D, int M, int G, bool QUERIES>
struct Owner {
    static constexpr int CHUNKS = Tile<D>::CHUNKS;
    static constexpr int STEPS = Tile<D>::STEPS;

    float first[STEPS][M][2][4];                 // dk^ or dq^ before the scale
    float second[QUERIES ? 1 : STEPS][M][2][4]; // dv

    DEVICE Owner()
    {
        UNROLL
        for (int i = 0; i < STEPS * M * 8; i++) {
            first[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
            if (!QUERIES) second[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
        }
    }

    // x[g] = own rows from `row` on times the 16 streamed rows from `streamed` + 16 g on, transposed.
    DEVICE void product(float (&x)[G][M][2][4], Tile<D> own, int row, Tile<D> stream, int streamed)
    {
        UNROLL
        for (int i = 0; i < G * M * 8; i++) x[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            uint32_t a[M][4];
            UNROLL
            for (int m = 0; m < M; m++) own.rows_as_a(a[m], row + 16 * m, step);
            UNROLL
            for (int g = 0; g < G; g++) {
                uint32_t b[2][2];
                stream.rows_as_b(b, streamed + 16 * g, step);
                ptx::mma_tiles<M, 2>(x[g], a, b);
            }
        }
    }

    // sum += a times the streamed rows.
    DEVICE void accumulate(float (&sum)[STEPS][M][2][4], const uint32_t (&a)[G][M][4], Tile<D> stream, int streamed)
    {
        UNROLL
        for (int g = 0; g < G; g++) {
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                uint32_t b[2][2];
                stream.columns_as_b(b, streamed + 16 * g, step);
                if (2 * step + 1 < CHUNKS) {
                    ptx::mma_tiles<M, 2>(sum[step], a[g], b);
                } else {
                    UNROLL
                    for (int m = 0; m < M; m++) ptx::mma(sum[step][m][0], a[g][m], b[0]);
                }
            }
        }
    }

    static DEVICE void pack(uint32_t (&a)[G][M][4], const float (&x)[G][M][2][4])
    {
        UNROLL
        for (int i = 0; i < G * M * 4; i++) {
            const float(&four)[4] = x[i / (M * 4)][i / 4 % M][i / 2 % 2];
            a[i / (M * 4)][i / 4 % M][i % 4] = pack_bf16(four[i % 2 * 2], four[i % 2 * 2 + 1]);
        }
    }

    // Takes the 16 G streamed rows from `streamed` on. `owned` of this warp's rows and `arrived` of the streamed
    // ones exist. `lse` (times log2 e) and `delta` begin at the first query of this warp's tile of scores.
    // Keys write ds^T of their rows to chunks `chunk`.. of `ds` if that is not 0. Collective.
    DEVICE void take(Pair<D> own, int row, int owned, Pair<D> stream, int streamed, int arrived, Shared<float> lse,
                     Shared<float> delta, float factor, uint32_t ds, int chunk)
    {
        const int lane = ptx::lane_id();
        float s[G][M][2][4];
        product(s, own.first, row, stream.first, streamed);
        UNROLL
        for (int i = 0; i < G * M * 8; i++) {
            const int g = i / (M * 8), m = i / 8 % M, h = i / 4 % 2, e = i % 4;
            const int own_row = 16 * m + e / 2 * 8 + lane / 4;
            const int column = 16 * g + 8 * h + lane % 4 * 2 + e % 2;
            float& x = s[g][m][h][e];
            x = ptx::exp2(ptx::fused_multiply_add(x, factor, -lse.load(QUERIES ? own_row : column)));
        }
        // Keys that do not exist; queries that do not have an lse of infinity.
        if (QUERIES ? arrived < 16 * G : owned < 16 * M) {
            UNROLL
            for (int i = 0; i < G * M * 8; i++) {
                const int g = i / (M * 8), m = i / 8 % M, h = i / 4 % 2, e = i % 4;
                const int own_row = 16 * m + e / 2 * 8 + lane / 4;
                const int column = 16 * g + 8 * h + lane % 4 * 2 + e % 2;
                if (QUERIES ? column >= arrived : own_row >= owned) s[g][m][h][e] = 0.0f;
            }
        }
        float t[G][M][2][4];
        product(t, own.second, row, stream.second, streamed);
        UNROLL
        for (int i = 0; i < G * M * 8; i++) {
            const int g = i / (M * 8), m = i / 8 % M, h = i / 4 % 2, e = i % 4;
            const int own_row = 16 * m + e / 2 * 8 + lane / 4;
            const int column = 16 * g + 8 * h + lane % 4 * 2 + e % 2;
            float& x = t[g][m][h][e];
            x = s[g][m][h][e] * (x - delta.load(QUERIES ? own_row : column));
        }
        uint32_t a[G][M][4];
        if (!QUERIES) {
            pack(a, s);
            accumulate(second_sum(), a, stream.second, streamed);
        }
        pack(a, t);
        if (!QUERIES && ds) {
            UNROLL
            for (int i = 0; i < G * M * 4; i++) {
                const int g = i / (M * 4), m = i / 4 % M, w = i % 4;
                const int key = row + 16 * m + w % 2 * 8 + lane / 4;
                const uint32_t address = ds_address(ds, key, chunk + 2 * g + w / 2);
                Shared<uint32_t>(address).store(lane % 4, a[g][m][w]);
            }
        }
        accumulate(first, a, stream.first, streamed);
    }

    DEVICE float (&second_sum())[STEPS][M][2][4]
    {
        static_assert(!QUERIES || STEPS > 0, "");
        return reinterpret_cast<float(&)[STEPS][M][2][4]>(second);
    }

    // Puts a sum into this warp's own rows, f32.
    static DEVICE void store(const float (&sum)[STEPS][M][2][4], Pair<D> own, int row)
    {
        UNROLL
        for (int i = 0; i < STEPS * M * 4; i++) {
            const int step = i / (M * 4), m = i / 4 % M, h = i / 2 % 2, half = i % 2;
            if (2 * step + h >= CHUNKS) continue;
            const float(&four)[4] = sum[step][m][h];
            const int r = row + 16 * m + 8 * half + int(ptx::lane_id()) / 4;
            own.store_f32(r, 2 * step + h, four[2 * half], four[2 * half + 1]);
        }
    }
};

// dq^ (before the scale) of the 32 queries from `row` on from ds^T over `keys` keys (a multiple of 32), to the
// place of their q^ and dout. A warp takes 16 M queries by 16 columns at a time. Collective of the group.
template <int D, int M>
DEVICE void query_gradient(Tile<D> k, int keys, uint32_t ds, Pair<D> q, int row, Group group)
{
    constexpr int STEPS = Tile<D>::STEPS;
    const int lane = ptx::lane_id();
    for (int unit = group.warp; unit < STEPS * (2 / M); unit += group.warps) {
        const int step = unit % STEPS;
        const int tile = unit / STEPS * M;
        // Two sums, so that neighbouring products do not wait for each other.
        float sum[2][M][2][4];
        UNROLL
        for (int i = 0; i < 2 * M * 8; i++) sum[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
        for (int key = 0; key < keys; key += 32) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int first = key + 16 * half;
                uint32_t a[M][4];
                UNROLL
                for (int m = 0; m < M; m++) {
                    const int chunk = 2 * (tile + m) + lane / 8 % 2;
                    ptx::ldmatrix_x4_trans(a[m], ds_address(ds, first + lane / 16 * 8 + lane % 8, chunk));
                }
                uint32_t b[2][2];
                k.columns_as_b(b, first, step);
                ptx::mma_tiles<M, 2>(sum[half], a, b);
            }
        }
        UNROLL
        for (int i = 0; i < M * 4; i++) {
            const int m = i / 4, h = i / 2 % 2, e = i % 2 * 2;
            if (2 * step + h >= Tile<D>::CHUNKS) continue;
            const int r = row + 16 * (tile + m) + 4 * e + lane / 4;
            q.store_f32(r, 2 * step + h, sum[0][m][h][e] + sum[1][m][h][e],
                        sum[0][m][h][e + 1] + sum[1][m][h][e + 1]);
        }
    }
}

// One head of one image, or a tile of its keys or queries: rows `first` to `first` + `owned` of the image
// are owned by the group.
struct Item {
    Head head;
    int first;
    int owned;
    Group group;
    uint32_t shared;
};

// `WHOLE`: all keys are owned and dq^ is made here.
template <int D, bool QUERIES, bool WHOLE>
DEVICE void run(const AttentionBackward& p, const Item& item)
{
    constexpr int M = tiles_of_warp(D);
    constexpr int G = groups_of_step(D);
    constexpr int ROW_BYTES = Tile<D>::ROW_BYTES;
    const Head head = item.head;
    const Group group = item.group;
    const int lane = ptx::lane_id();
    const int row = group.warp * 16 * M;
    const int steps = ceil_div(head.length, STEP);

    // Shared memory: both sides; lse and delta of the queries; ds^T, two steps of it.
    const int own_rows = round_up(item.owned, 32);
    const int stream_rows = WHOLE ? own_rows : STAGES * STEP;
    const int queries = QUERIES ? own_rows : stream_rows;
    const Pair<D> own(item.shared, own_rows);
    const Pair<D> stream(own.second.base + own_rows * ROW_BYTES, stream_rows);
    const Shared<float> lse(stream.second.base + stream_rows * ROW_BYTES);
    const Shared<float> delta(lse.address + queries * 4);
    const uint32_t ds = delta.address + queries * 4;
    auto place = [](int step) { return (WHOLE ? step : step % STAGES) * STEP; };

    const HeadNorm q_norm = head_norm(p.norm, p.norm.q_gain, p.norm.q_bias, head.head, p.head_dim);
    const HeadNorm k_norm = head_norm(p.norm, p.norm.k_gain, p.norm.k_bias, head.head, p.head_dim);
    const HeadNorm& own_norm = QUERIES ? q_norm : k_norm;
    const HeadNorm& stream_norm = QUERIES ? k_norm : q_norm;

    auto load = [&](Tile<D> tile, const bf16* x, int64_t stride, int from, int rows, int valid) {
        tile.load(rows_of(p, x, stride, head, from).p, stride, rows, valid, p.head_dim, group.thread,
                  group.threads());
    };
    auto load_step = [&](int step) {
        const int valid = head.length - step * STEP;
        const Tile<D> a(stream.first.base + place(step) * ROW_BYTES);
        const Tile<D> b(stream.second.base + place(step) * ROW_BYTES);
        load(a, QUERIES ? p.k : p.q, QUERIES ? p.k_stride : p.q_stride, step * STEP, STEP, valid);
        load(b, QUERIES ? p.v : p.dout, QUERIES ? p.v_stride : p.dout_stride, step * STEP, STEP, valid);
    };
    auto normalise_step = [&](int step) {
        if (p.norm.kind == NORM_NONE) return;
        const int left = head.length - step * STEP;
        const Tile<D> tile(stream.first.base + place(step) * ROW_BYTES);
        tile.normalise(stream_norm, left < STEP ? left : STEP, p.head_dim, group.thread, group.threads(), nullptr,
                       nullptr, 0);
    };
    // lse and delta of a query of the long schedule.
    auto statistics = [&](int query) {
        if (query >= head.length) return FloatPair{infinity(), 0.0f};
        const int64_t at = (head.start + query) * p.heads + head.head;
        return FloatPair{Global<const float>(p.lse).load(at) * LOG2_E, Global<const float>(p.delta).load(at)};
    };
    auto keep = [&](int at, FloatPair x) {
        lse.store(at, x.first);
        delta.store(at, x.second);
    };

    load(own.first, QUERIES ? p.q : p.k, QUERIES ? p.q_stride : p.k_stride, item.first, own_rows, item.owned);
    load(own.second, QUERIES ? p.dout : p.v, QUERIES ? p.dout_stride : p.v_stride, item.first, own_rows,
         item.owned);
    load_step(0);
    ptx::cp_async_commit();
    if (steps > 1) load_step(1);
    ptx::cp_async_commit();
    if (WHOLE) {
        constexpr int LANES = Tile<D>::LANES;
        const Rows out = rows_of(p, p.out, p.out_stride, head, 0);
        const Rows dout = rows_of(p, p.dout, p.dout_stride, head, 0);
        for (int r = group.thread / LANES; r < own_rows; r += group.threads() / LANES) {
            const bool exists = r < head.length;
            const float x = row_delta<D>(out, dout, r, exists, p.head_dim);
            const int64_t at = (head.start + r) * p.heads + head.head;
            const float y = exists ? Global<const float>(p.lse).load(at) * LOG2_E : infinity();
            if (lane % LANES == 0) keep(r, FloatPair{y, x});
        }
    } else if (QUERIES) {
        for (int r = group.thread; r < own_rows; r += group.threads()) keep(r, statistics(item.first + r));
    } else if (group.thread < STEP) {
        keep(group.thread, statistics(group.thread));
    }
    ptx::cp_async_wait<1>();
    if (p.norm.kind != NORM_NONE)
        own.first.normalise(own_norm, item.owned, p.head_dim, group.thread, group.threads(), nullptr, nullptr, 0);
    normalise_step(0);
    group.barrier();

    const bool active = row < own_rows;
    const float factor = p.scale * LOG2_E;
    Owner<D, M, G, QUERIES> owner;
    for (int step = 0; step < steps; step++) {
        // The place of step + 2 was that of step - 1, which all warps have left.
        if (step + 2 < steps) load_step(step + 2);
        ptx::cp_async_commit();
        FloatPair next{};
        const bool fetch = !WHOLE && !QUERIES && step + 1 < steps && group.thread < STEP;
        if (fetch) next = statistics((step + 1) * STEP + group.thread);
        const uint32_t ds_step = WHOLE ? ds + step % 2 * own_rows * 2 * STEP : 0;
        if (active) {
            for (int sub = 0; sub < STEP / 16; sub += G) {
                const int streamed = place(step) + 16 * sub;
                const int query = 4 * (QUERIES ? row : streamed);
                owner.take(own, row, item.owned - row, stream, streamed, head.length - step * STEP - 16 * sub,
                           Shared<float>(lse.address + query), Shared<float>(delta.address + query), factor, ds_step,
                           2 * sub);
            }
        }
        if (step + 1 < steps) {
            ptx::cp_async_wait<1>();
            normalise_step(step + 1);
        }
        if (fetch) keep(place(step + 1) + group.thread, next);
        group.barrier();
        if (WHOLE) {
            // At width 64 eight warps have work for one 16 x 16 tile each.
            if (D == 64 && group.warps == WARPS)
                query_gradient<D, 1>(own.first, own_rows, ds_step, stream, step * STEP, group);
            else
                query_gradient<D, 2>(own.first, own_rows, ds_step, stream, step * STEP, group);
        }
    }
    // All warps have read k^, and written dq^.
    if (WHOLE) group.barrier();

    const bool norm = p.norm.kind != NORM_NONE;
    const bool sums_wanted = norm && p.partial;
    // What is no longer read: ds^T, or the streamed side.
    const uint32_t scratch = WHOLE ? ds : stream.first.base;
    auto finish = [&](Pair<D> tile, int length, bool q, ColumnSums<D>& sums) {
        const Rows source = q ? rows_of(p, p.q, p.q_stride, head, item.first)
                              : rows_of(p, p.k, p.k_stride, head, item.first);
        bf16* const target = q ? rows_of(p, p.dq, p.dq_stride, head, item.first)
                               : rows_of(p, p.dk, p.dk_stride, head, item.first);
        const int64_t stride = q ? p.dq_stride : p.dk_stride;
        if (norm)
            finish_rows<D, true>(tile, row, 16 * M, length, p.scale, p.head_dim, target, stride, source,
                                 q ? q_norm : k_norm, sums);
        else
            finish_rows<D, false>(tile, row, 16 * M, length, p.scale, p.head_dim, target, stride, source,
                                  q ? q_norm : k_norm, sums);
    };
    ColumnSums<D> sums;
    if (active) {
        if (!QUERIES) {
            owner.store(owner.second_sum(), own, row);
            ptx::warp_sync();
            bf16* const dv = rows_of(p, p.dv, p.dv_stride, head, item.first);
            finish_rows<D, false>(own, row, 16 * M, item.owned, 1.0f, p.head_dim, dv, p.dv_stride, Rows{}, k_norm,
                                  sums);
            ptx::warp_sync();
        }
        owner.store(owner.first, own, row);
        ptx::warp_sync();
        finish(own, item.owned, QUERIES, sums);
    }
    if (sums_wanted) sums.add_to(p, head.head, QUERIES ? Q_GAIN : K_GAIN, scratch, group);
    if (WHOLE) {
        ColumnSums<D> q_sums;
        if (active) finish(stream, head.length, true, q_sums);
        if (sums_wanted) q_sums.add_to(p, head.head, Q_GAIN, scratch, group);
    }
}

// Gradients of q, k and v. Tiles of long images come first, they take longest.
template <int D>
DEVICE void gradients(const AttentionBackward& p)
{
    const Schedule schedule{p.schedule, p.slots, p.heads};
    if (p.partial) {
        const Global<float> partial(p.partial);
        const int64_t values = int64_t(p.heads) * AFFINE * p.head_dim;
        for (int64_t i = threadIdx.x; i < values; i += blockDim.x) partial.store(blockIdx.x * values + i, 0.0f);
    }
    const int long_items = schedule.long_items();
    const int items = 2 * long_items + schedule.short_items();
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        // The item before has left shared memory and partial.
        ptx::barrier();
        if (i < 2 * long_items) {
            const LongItem at = schedule.long_item(i % long_items);
            const Head head = head_of(p, at.image, at.head);
            const int first = at.tile * p.long_rows;
            const int left = head.length - first;
            const Group group{0, WARPS, int(ptx::warp_id()), int(threadIdx.x)};
            const Item item{head, first, left < p.long_rows ? left : p.long_rows, group, ptx::shared_base()};
            if (i < long_items)
                run<D, false, false>(p, item);
            else
                run<D, true, false>(p, item);
        } else {
            const ShortItem at = schedule.short_item(i - 2 * long_items);
            const int warps = WARPS / at.heads;
            const int warp = ptx::warp_id();
            const Group group{warp / warps, warps, warp % warps, int(threadIdx.x) % (32 * warps)};
            const Head head = head_of(p, at.image, at.head + group.index);
            if (head.head >= p.heads) continue;
            const int bytes = round_up(head.length, 32) * (4 * Tile<D>::ROW_BYTES + 8 + 4 * STEP);
            run<D, false, true>(p, Item{head, 0, head.length, group, ptx::shared_base() + group.index * bytes});
        }
    }
}

} // namespace attention_backward
