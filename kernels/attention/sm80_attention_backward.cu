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
    int32_t tile_rows; // of the long schedule
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
    Tile<D> first;
    Tile<D> second;

    DEVICE Pair(uint32_t base, int rows) : first(base), second(base + rows * Tile<D>::ROW_BYTES) {}

    // Chunk of 4 f32 columns.
    DEVICE uint32_t f32_address(int row, int chunk) const
    {
        constexpr int CHUNKS = Tile<D>::CHUNKS;
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
    static constexpr int CHUNKS = Tile<D>::CHUNKS;
    static constexpr int TWISTS = Tile<D>::TWISTS;

    uint32_t lane;

    // From row `row` (a multiple of 8) of the tile on.
    DEVICE Reader(Tile<D> tile, int row, int lane)
        : lane(tile.address(lane % 16, lane / 16) + row * Tile<D>::ROW_BYTES)
    {
    }

    // Chunk 2 step + lane / 16 of the row `rows` (a multiple of 8) below: the twist acts on the low bits of a
    // chunk, where an even number is added without a carry.
    DEVICE uint32_t address(int rows, int step) const
    {
        constexpr int LOW = TWISTS - 1;
        return (lane ^ ((2 * step & LOW & ~1) * 16)) + (2 * step & ~(LOW & ~1)) * 16 + rows * Tile<D>::ROW_BYTES;
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
    constexpr int LANES = Tile<D>::LANES;
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < Tile<D>::LANE_CHUNKS; i++) {
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

// Normalises rows in place as Tile::normalise does, bit for bit, with fewer registers: gradients fill them.
template <int D>
DEVICE void normalise(Tile<D> tile, const HeadNorm& norm, int valid, int head_dim, int thread, int threads)
{
    constexpr int LANES = Tile<D>::LANES;
    constexpr int N = Tile<D>::LANE_CHUNKS;
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
        const int lane = ptx::unknown(ptx::lane_id());
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

    // x[g] += own rows times 16 streamed rows, the g-th, transposed.
    DEVICE void product(float (&x)[G][M][2][4], Reader<D> own, Reader<D> stream)
    {
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            uint32_t a[M][4];
            UNROLL
            for (int m = 0; m < M; m++) own.rows_as_a(a[m], 16 * m, step);
            UNROLL
            for (int g = 0; g < G; g++) {
                uint32_t b[2][2];
                stream.rows_as_b(b, 16 * g, step);
                ptx::mma_tiles<M, 2>(x[g], a, b);
            }
        }
    }

    // sum += a times the streamed rows.
    DEVICE void accumulate(float (&sum)[STEPS][M][2][4], const uint32_t (&a)[G][M][4], Reader<D> stream)
    {
        UNROLL
        for (int g = 0; g < G; g++) {
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                uint32_t b[2][2];
                stream.columns_as_b(b, 16 * g, step);
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

    // A number of each query, `x`[0] that of the first one of this warp's tile of scores, for each of its scores.
    static DEVICE void spread(float (&to)[G][M][2][4], Shared<float> x, int lane)
    {
        UNROLL
        for (int i = 0; i < G * M * 4; i++) {
            float(&four)[4] = to[i / (M * 4)][i / 4 % M][i / 2 % 2];
            if (QUERIES) {
                four[i % 2 * 2] = four[i % 2 * 2 + 1] = x.load(16 * (i / 4 % M) + 8 * (i % 2) + lane / 4);
            } else if (i % 2 == 0) {
                const int column = 16 * (i / (M * 4)) + 8 * (i / 2 % 2) + 2 * (lane % 4);
                const FloatPair two = Shared<FloatPair>(x.address).load(column / 2);
                four[0] = four[2] = two.first;
                four[1] = four[3] = two.second;
            }
        }
    }

    // Takes the 16 G streamed rows from `streamed` on. `owned` of this warp's rows and `arrived` of the streamed
    // ones exist. `lse` (times -log2 e) and `delta` (negative) begin at the first query of this warp's scores.
    // Keys write ds^T of their rows to chunks `chunk`.. of `ds` if that is not 0. Collective.
    DEVICE void take(Pair<D> own, int row, int owned, Pair<D> stream, int streamed, int arrived, Shared<float> lse,
                     Shared<float> delta, float factor, uint32_t ds, int chunk)
    {
        const int lane = ptx::unknown(ptx::lane_id());
        const Reader<D> first_stream(stream.first, streamed, lane);
        const Reader<D> second_stream(stream.second, streamed, lane);
        float s[G][M][2][4];
        UNROLL
        for (int i = 0; i < G * M * 8; i++) s[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] = 0.0f;
        product(s, Reader<D>(own.first, row, lane), first_stream);
        float t[G][M][2][4];
        spread(t, lse, lane);
        UNROLL
        for (int i = 0; i < G * M * 8; i++) {
            float& x = s[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4];
            x = ptx::exp2(ptx::fused_multiply_add(x, factor, t[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4]));
        }
        // Keys that do not exist have no part in the sums; queries that do not have an lse of infinity.
        if (QUERIES ? arrived < 16 * G : owned < 16 * M) {
            UNROLL
            for (int i = 0; i < G * M * 8; i++) {
                const int g = i / (M * 8), m = i / 8 % M, h = i / 4 % 2, e = i % 4;
                const int own_row = 16 * m + e / 2 * 8 + lane / 4;
                const int column = 16 * g + 8 * h + lane % 4 * 2 + e % 2;
                if (QUERIES ? column >= arrived : own_row >= owned) s[g][m][h][e] = 0.0f;
            }
        }
        spread(t, delta, lane);
        product(t, Reader<D>(own.second, row, lane), second_stream);
        UNROLL
        for (int i = 0; i < G * M * 8; i++)
            t[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4] *= s[i / (M * 8)][i / 8 % M][i / 4 % 2][i % 4];
        uint32_t a[G][M][4];
        if (!QUERIES) {
            pack(a, s);
            accumulate(second_sum(), a, second_stream);
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
        accumulate(first, a, first_stream);
    }

    DEVICE float (&second_sum())[STEPS][M][2][4]
    {
        static_assert(!QUERIES || STEPS > 0, "");
        return reinterpret_cast<float(&)[STEPS][M][2][4]>(second);
    }

    // Puts a sum into this warp's own rows, f32.
    static DEVICE void store(const float (&sum)[STEPS][M][2][4], Pair<D> own, int row)
    {
        const int lane = ptx::unknown(ptx::lane_id());
        UNROLL
        for (int i = 0; i < STEPS * M * 4; i++) {
            const int step = i / (M * 4), m = i / 4 % M, h = i / 2 % 2, half = i % 2;
            if (2 * step + h >= CHUNKS) continue;
            const float(&four)[4] = sum[step][m][h];
            const int r = row + 16 * m + 8 * half + lane / 4;
            own.store_f32(r, 2 * step + h, lane, four[2 * half], four[2 * half + 1]);
        }
    }
};

// dq^ (before the scale) of the 32 queries from `row` on from ds^T over `keys` keys (a multiple of 32), to the
// place of their q^ and dout. A warp takes 16 M queries by 16 columns at a time. Collective of the group.
template <int D, int M>
DEVICE void query_gradient(Tile<D> k, int keys, uint32_t ds, Pair<D> q, int row, Group group)
{
    constexpr int STEPS = Tile<D>::STEPS;
    const int lane = ptx::unknown(ptx::lane_id());
    const Reader<D> keys_of(k, 0, lane);
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
                keys_of.columns_as_b(b, first, step);
                ptx::mma_tiles<M, 2>(sum[half], a, b);
            }
        }
        UNROLL
        for (int i = 0; i < M * 4; i++) {
            const int m = i / 4, h = i / 2 % 2, e = i % 2 * 2;
            if (2 * step + h >= Tile<D>::CHUNKS) continue;
            const int r = row + 16 * (tile + m) + 4 * e + lane / 4;
            q.store_f32(r, 2 * step + h, lane, sum[0][m][h][e] + sum[1][m][h][e],
                        sum[0][m][h][e + 1] + sum[1][m][h][e + 1]);
        }
    }
}

// One head of one image, or a tile of its keys or queries, from row `first` of the image on: owned by a group
// of `warps` warps. Each warp keeps it in shared memory and reads of it what it needs, when it needs it:
// registers are full of gradients.
struct alignas(16) Item {
    Head head;
    int first;
    int warps;
    uint32_t shared;
    int unused[2];
};

// The items of the warps begin at byte 128 of shared memory.
DEVICE Shared<Item> item_of_warp()
{
    return Shared<Item>(ptx::shared_base() + 128 + ptx::unknown(threadIdx.x) / 32 * sizeof(Item));
}

DEVICE void hand_out(const Item& item)
{
    if (threadIdx.x % 32 == 0) item_of_warp().store(0, item);
    ptx::warp_sync();
}

// Bytes of shared memory that a group needs beside the rows of both sides: lse and delta of a query, its
// places in two steps of ds^T.
constexpr int HEADER_BYTES = 128 + WARPS * sizeof(Item); // of a block: the number of its item, the items
constexpr int QUERY_BYTES = 8;
constexpr int KEY_BYTES = 2 * 2 * STEP;

// Shared memory of a group: both sides; lse and delta of the queries, made negative, lse times log2(e); ds^T of
// two steps in turn.
template <int D>
struct Memory {
    Pair<D> own;
    Pair<D> stream;
    Shared<float> lse;
    Shared<float> delta;
    uint32_t ds;

    DEVICE Memory(uint32_t base, int own_rows, int stream_rows, int queries)
        : own(base, own_rows), stream(base + own_rows * 2 * Tile<D>::ROW_BYTES, stream_rows),
          lse(base + (own_rows + stream_rows) * 2 * Tile<D>::ROW_BYTES), delta(lse.address + queries * 4),
          ds(delta.address + queries * 4)
    {
    }
};

// `WHOLE`: all keys are owned and dq^ is made here.
template <int D, int M, int G, bool QUERIES, bool WHOLE>
struct Run {
    static constexpr int ROW_BYTES = Tile<D>::ROW_BYTES;

    const AttentionBackward& p;

    static DEVICE Item item()
    {
        return item_of_warp().load(0);
    }

    static DEVICE Head head()
    {
        return item().head;
    }

    // First row of the image that is owned, and how many are.
    static DEVICE int first()
    {
        return WHOLE ? 0 : item().first;
    }

    DEVICE int owned() const
    {
        if (WHOLE) return head().length;
        const int left = head().length - first();
        return left < p.tile_rows ? left : p.tile_rows;
    }

    DEVICE int own_rows() const
    {
        return round_up(owned(), STEP);
    }

    DEVICE Memory<D> memory() const
    {
        const int own_rows = this->own_rows();
        const int stream_rows = WHOLE ? own_rows : STAGES * STEP;
        return Memory<D>(item().shared, own_rows, stream_rows, QUERIES ? own_rows : stream_rows);
    }

    DEVICE Group group() const
    {
        return Group(WHOLE ? item().warps : WARPS);
    }

    static DEVICE int place(int step)
    {
        return (WHOLE ? step : step % STAGES) * STEP;
    }

    DEVICE HeadNorm norm_of(bool q) const
    {
        const float* const gain = ptx::unknown(q ? p.norm.q_gain : p.norm.k_gain);
        const float* const bias = ptx::unknown(q ? p.norm.q_bias : p.norm.k_bias);
        return head_norm(p.norm, gain, bias, head().head, p.head_dim);
    }

    // Copies rows of q and dout, or of k and v, from row `from` of the image on.
    DEVICE void load(bool q, Pair<D> to, int row, int from, int rows, int valid) const
    {
        const Group group = this->group();
        const Tile<D> first(to.first.base + row * ROW_BYTES);
        const Tile<D> second(to.second.base + row * ROW_BYTES);
        const Rows a = q ? rows_of(p, p.q, p.q_stride, head(), from) : rows_of(p, p.k, p.k_stride, head(), from);
        const Rows b = q ? rows_of(p, p.dout, p.dout_stride, head(), from)
                         : rows_of(p, p.v, p.v_stride, head(), from);
        first.load(a.p, a.stride, rows, valid, p.head_dim, group.thread, group.threads());
        second.load(b.p, b.stride, rows, valid, p.head_dim, group.thread, group.threads());
    }

    DEVICE void load_step(int step) const
    {
        load(!QUERIES, memory().stream, place(step), step * STEP, STEP, head().length - step * STEP);
    }

    DEVICE void normalise_rows(bool q, Tile<D> tile, int row, int valid) const
    {
        if (p.norm.kind == NORM_NONE) return;
        const Group group = this->group();
        const Tile<D> rows(tile.base + row * ROW_BYTES);
        normalise(rows, norm_of(q), valid, p.head_dim, group.thread, group.threads());
    }

    DEVICE void normalise_step(int step) const
    {
        const int left = head().length - step * STEP;
        normalise_rows(!QUERIES, memory().stream.first, place(step), left < STEP ? left : STEP);
    }

    DEVICE FloatPair statistics(int query) const
    {
        if (query >= head().length) return FloatPair{-infinity(), 0.0f};
        const int64_t at = int64_t(head().start + query) * p.heads + head().head;
        return FloatPair{Global<const float>(p.lse).load(at) * -LOG2_E, -Global<const float>(p.delta).load(at)};
    }

    DEVICE void keep(int query, FloatPair x) const
    {
        const Memory<D> memory = this->memory();
        memory.lse.store(query, x.first);
        memory.delta.store(query, x.second);
    }

    // delta of all queries of a short image.
    DEVICE void make_delta() const
    {
        constexpr int LANES = Tile<D>::LANES;
        const Group group = this->group();
        const Rows out = rows_of(p, p.out, p.out_stride, head(), 0);
        const Rows dout = rows_of(p, p.dout, p.dout_stride, head(), 0);
        for (int row = group.thread / LANES; row < own_rows(); row += group.threads() / LANES) {
            const bool exists = row < head().length;
            const float delta = row_delta<D>(out, dout, row, exists, p.head_dim, group.thread);
            const int64_t at = int64_t(head().start + row) * p.heads + head().head;
            const float lse = exists ? Global<const float>(p.lse).load(at) * -LOG2_E : -infinity();
            if (group.thread % LANES == 0) keep(row, FloatPair{lse, -delta});
        }
    }

    // Loads the own rows and two steps, and makes ready the first of them.
    DEVICE void begin() const
    {
        const Group group = this->group();
        load(QUERIES, memory().own, 0, first(), own_rows(), owned());
        load_step(0);
        ptx::cp_async_commit();
        if (head().length > STEP) load_step(1);
        ptx::cp_async_commit();
        if (WHOLE) {
            make_delta();
        } else if (QUERIES) {
            for (int row = group.thread; row < own_rows(); row += group.threads())
                keep(row, statistics(first() + row));
        } else if (group.thread < STEP) {
            keep(group.thread, statistics(group.thread));
        }
        ptx::cp_async_wait<1>();
        normalise_rows(QUERIES, memory().own.first, 0, owned());
        normalise_step(0);
        group.barrier();
    }

    // One step of the own rows, 16 G streamed rows at a time.
    DEVICE void take(Owner<D, M, G, QUERIES>& owner, int step) const
    {
        const Memory<D> memory = this->memory();
        const int row = group().warp * 16 * M;
        const int rows = own_rows();
        if (row >= rows) return;
        const uint32_t ds = WHOLE ? memory.ds + step % 2 * rows * 2 * STEP : 0;
        for (int sub = 0; sub < STEP / 16; sub += G) {
            const int streamed = place(step) + 16 * sub;
            const int query = 4 * (QUERIES ? row : streamed);
            owner.take(memory.own, row, owned() - row, memory.stream, streamed,
                       head().length - step * STEP - 16 * sub, Shared<float>(memory.lse.address + query),
                       Shared<float>(memory.delta.address + query), p.scale * LOG2_E, ds, 2 * sub);
        }
    }

    DEVICE void take_queries(int step) const
    {
        const Memory<D> memory = this->memory();
        const int rows = own_rows();
        const uint32_t ds = memory.ds + step % 2 * rows * 2 * STEP;
        // At width 64 eight warps have work for one 16 x 16 tile each.
        if (D == 64 && item().warps == WARPS)
            query_gradient<D, 1>(memory.own.first, rows, ds, memory.stream, step * STEP, group());
        else
            query_gradient<D, 2>(memory.own.first, rows, ds, memory.stream, step * STEP, group());
    }

    // Writes this warp's rows of dq or dk from f32 in shared memory, and adds to the gradients of gain and bias.
    DEVICE void finish(bool q, Pair<D> tile, int length) const
    {
        const Group group = this->group();
        const int row = group.warp * 16 * M;
        const int64_t stride = q ? p.dq_stride : p.dk_stride;
        bf16* const target = rows_of(p, q ? p.dq : p.dk, stride, head(), first());
        const Rows source = q ? rows_of(p, p.q, p.q_stride, head(), first())
                              : rows_of(p, p.k, p.k_stride, head(), first());
        const bool active = row < own_rows();
        ColumnSums<D> sums;
        if (p.norm.kind == NORM_NONE) {
            if (active)
                finish_rows<D, false>(tile, row, 16 * M, length, p.scale, p.head_dim, target, stride, source,
                                      norm_of(q), sums);
            return;
        }
        if (active)
            finish_rows<D, true>(tile, row, 16 * M, length, p.scale, p.head_dim, target, stride, source, norm_of(q),
                                 sums);
        // Through what is no longer read: ds^T, or the streamed side.
        const uint32_t scratch = WHOLE ? memory().ds : memory().stream.first.base;
        if (p.partial) sums.add_to(p, head().head, q ? Q_GAIN : K_GAIN, scratch, group);
    }

    DEVICE void finish_values(Pair<D> tile) const
    {
        ColumnSums<D> none;
        bf16* const target = rows_of(p, p.dv, p.dv_stride, head(), first());
        finish_rows<D, false>(tile, group().warp * 16 * M, 16 * M, owned(), 1.0f, p.head_dim, target, p.dv_stride,
                              Rows{}, HeadNorm{}, none);
    }

    DEVICE void run() const
    {
        begin();
        Owner<D, M, G, QUERIES> owner;
        for (int step = 0; step * STEP < head().length; step++) {
            const int left = head().length - step * STEP;
            // The place of step + 2 was that of step - 1, which all warps have left.
            if (left > 2 * STEP) load_step(step + 2);
            ptx::cp_async_commit();
            FloatPair next{};
            const bool fetch = !WHOLE && !QUERIES && left > STEP && int(threadIdx.x) < STEP;
            if (fetch) next = statistics((step + 1) * STEP + threadIdx.x);
            take(owner, step);
            if (left > STEP) {
                ptx::cp_async_wait<1>();
                normalise_step(step + 1);
            }
            if (fetch) keep(place(step + 1) + threadIdx.x, next);
            group().barrier();
            if (WHOLE) take_queries(step);
        }
        // All warps have read k^ and written dq^.
        if (WHOLE) group().barrier();

        const Memory<D> memory = this->memory();
        const int row = group().warp * 16 * M;
        if (row < own_rows()) {
            if (!QUERIES) {
                owner.store(owner.second_sum(), memory.own, row);
                ptx::warp_sync();
                finish_values(memory.own);
                ptx::warp_sync();
            }
            owner.store(owner.first, memory.own, row);
            ptx::warp_sync();
        }
        finish(QUERIES, memory.own, owned());
        if (WHOLE) finish(true, memory.stream, head().length);
    }
};

// Gradients of q, k and v. Tiles of long images come first, they take longest. A warp owns 16 M rows and takes
// 16 G rows of the other side at a time: what the registers hold.
template <int D, int M, int G>
DEVICE void gradients(const AttentionBackward& p)
{
    const Schedule schedule{p.schedule, p.slots, p.heads};
    if (p.partial) {
        const Global<float> partial(p.partial);
        const int64_t values = int64_t(p.heads) * AFFINE * p.head_dim;
        for (int64_t i = threadIdx.x; i < values; i += blockDim.x) partial.store(blockIdx.x * values + i, 0.0f);
    }
    // The number of the item waits in shared memory, not in a register.
    const Shared<int> number(ptx::shared_base());
    if (threadIdx.x == 0) number.store(0, int(blockIdx.x) - int(gridDim.x));
    for (;;) {
        // All threads have left the item before: shared memory and `partial` are free.
        ptx::barrier();
        if (threadIdx.x == 0) number.store(0, number.load(0) + gridDim.x);
        ptx::barrier();
        const int i = number.load(0);
        const int long_items = schedule.long_items();
        if (i >= 2 * long_items + schedule.short_items()) return;
        const uint32_t shared = ptx::shared_base() + HEADER_BYTES;
        if (i < 2 * long_items) {
            const LongItem at = schedule.long_item(i % long_items);
            hand_out(Item{head_of(p, at.image, at.head), at.tile * p.tile_rows, WARPS, shared, {}});
            if (i < long_items)
                Run<D, M, G, false, false>{p}.run();
            else
                Run<D, M, G, true, false>{p}.run();
        } else {
            const ShortItem at = schedule.short_item(i - 2 * long_items);
            const int warps = WARPS / at.heads;
            const int group = Group(warps).index();
            const Head head = head_of(p, at.image, at.head + group);
            if (head.head >= p.heads) continue;
            const int bytes = round_up(head.length, STEP) * (4 * Tile<D>::ROW_BYTES + QUERY_BYTES + KEY_BYTES);
            hand_out(Item{head, 0, warps, shared + group * bytes, {}});
            Run<D, M, G, false, true>{p}.run();
        }
    }
}

// What needs no score: zeros in the rows that belong to no image, and delta of the rows of long images. A warp
// has a token at a time, a few heads together.
DEVICE void prepare(const AttentionBackward& p)
{
    constexpr int D = 128; // and any below
    constexpr int LANES = Tile<D>::LANES;
    const Schedule schedule{p.schedule, p.slots, p.heads};
    const int used = schedule.rows();
    const int width = p.heads * p.head_dim;
    zero_rows(p.dq, p.dq_stride, width, used, p.tokens);
    zero_rows(p.dk, p.dk_stride, width, used, p.tokens);
    zero_rows(p.dv, p.dv_stride, width, used, p.tokens);

    const int lane = ptx::lane_id();
    const int warps = blockDim.x / 32;
    const int items = schedule.long_items() / p.heads;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const LongItem at = schedule.long_item(i * p.heads);
        const Head image = head_of(p, at.image, 0);
        const int first = at.tile * p.tile_rows;
        const int end = first + p.tile_rows < image.length ? first + p.tile_rows : image.length;
        for (int row = first + int(ptx::warp_id()); row < end; row += warps) {
            for (int head = 0; head < p.heads; head += 32 / LANES) {
                const Head one{image.start, image.length, head + lane / LANES};
                const bool exists = one.head < p.heads;
                const float delta = row_delta<D>(rows_of(p, p.out, p.out_stride, one, 0),
                                                 rows_of(p, p.dout, p.dout_stride, one, 0), row, exists, p.head_dim,
                                                 lane);
                if (exists && lane % LANES == 0)
                    Global<float>(p.delta).store(int64_t(image.start + row) * p.heads + one.head, delta);
            }
        }
    }
}

} // namespace attention_backward

// Gradients of gains and biases from the partial sums of the blocks, [blocks, heads, 4, head_dim].
struct AttentionBackwardSum {
    const float* partial;
    float* q_gain; // [heads, head_dim], or [head_dim]: the sum over heads; null where nobody wants it
    float* q_bias;
    float* k_gain;
    float* k_bias;
    const int32_t* accumulate; // not 0: the sums are added to what is there; null: they replace it
    int32_t blocks;
    int32_t heads;
    int32_t head_dim;
    int32_t per_head;
};

namespace attention_backward {

// A warp sums one value, lane l the terms l, l + 32, ...
DEVICE void sum(const AttentionBackwardSum& p)
{
    const int lane = ptx::lane_id();
    const int values = (p.per_head ? p.heads : 1) * p.head_dim;
    const int value = blockIdx.x * (blockDim.x / 32) + ptx::warp_id();
    if (value >= values * AFFINE) return;
    const int affine = value / values;
    float* const target = affine == Q_GAIN   ? p.q_gain
                          : affine == Q_BIAS ? p.q_bias
                          : affine == K_GAIN ? p.k_gain
                                             : p.k_bias;
    if (!target) return;
    const int at = value % values;
    const int column = at % p.head_dim;
    const int terms = p.per_head ? p.blocks : p.blocks * p.heads;
    const Global<const float> partial(p.partial);
    float total = 0.0f;
    for (int i = lane; i < terms; i += 32) {
        // Term i is of block and head i / heads, i % heads, or of block i and this value's head.
        const int64_t row = p.per_head ? int64_t(i) * p.heads + at / p.head_dim : i;
        total += partial.load((row * AFFINE + affine) * p.head_dim + column);
    }
    total = sum_of_lanes<32>(total);
    if (lane != 0) return;
    const bool accumulate = p.accumulate && Global<const int32_t>(p.accumulate).load(0) != 0;
    const Global<float> result(target);
    result.store(at, accumulate ? result.load(at) + total : total);
}

} // namespace attention_backward
