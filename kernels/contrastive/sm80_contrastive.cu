// Losses of pairs of images and texts, with gradients, of which no more than [OWN, OTHER] scores a block are ever held:
//   s_ij = e^scale x_i y_j / (|x_i| |y_j|) + bias
//   softmax   loss_i = (lse_j s_ij - s_ii) / 2 + (lse_j s_ji - s_ii) / 2
//   sigmoid   loss_i = sum_j ln(1 + e^(-z_ij s_ij)),   z_ii = 1, z_ij = -1
//
// prepare      lengths, and how many pairs there are
// statistics   of every row of scores, and for softmax of every column: largest score and sum relative to it
// losses       from these the loss of each pair and the log-sums
// gradient     makes the scores again and of them ds; dx^_i = sum_j ds_ij y^_j, as a product of tiles
// finish       dx = (dx^ - x^ (x^ dx^)) / |x|, gradients of scale and bias, ranks
//
// Images against texts and texts against images are the same code, one side the rows ("own") and the other streamed past
// it: every sum is over the columns of a block's own rows and no two blocks write one number. A row's columns are shared
// out over `splits` blocks whose partial results are joined in their order; columns that come from elsewhere could be
// one split more.
//
// A warp has 16 rows of scores in registers, as mma leaves them. Rounded to bf16, ds over the length of the other vector
// is the operand of the product for the gradient as it lies there. Its sums are kept in f32 in global memory, in which a
// block adds to its own rows once a tile.
#include "sweep.cuh"

namespace contrastive {

struct alignas(8) Two {
    float x[2];
};

constexpr int ROW_WARPS = 8;

DEVICE float sum_warp(float x)
{
    UNROLL
    for (uint32_t mask = 16; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    return x;
}


// The number of pairs to the last one that counts. One block; collective.
DEVICE void count_used(const ContrastiveParams& p)
{
    uint32_t used = 0;
    for (int i = int(threadIdx.x); i < p.pairs; i += 32 * ROW_WARPS) {
        if (Global<const float>(p.weights).load(i) != 0.0f) used = uint32_t(i) + 1;
    }
    auto larger = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
    UNROLL
    for (uint32_t mask = 16; mask > 0; mask /= 2) used = larger(used, ptx::shuffle_xor(used, mask));
    Shared<uint32_t> shares(ptx::shared_base());
    if (ptx::lane_id() == 0) shares.store(threadIdx.x / 32, used);
    ptx::barrier();
    if (threadIdx.x != 0) return;
    UNROLL
    for (int w = 0; w < ROW_WARPS; w++) used = larger(used, shares.load(w));
    Global<int>(p.used).store(0, int(used));
}

// A warp has a row; the last block counts pairs. Grid: x rows, y sides. Shared memory: a number of each warp.
DEVICE void prepare(const ContrastiveParams& p)
{
    begin_dependent();
    if (blockIdx.x == gridDim.x - 1) {
        if (blockIdx.y == 0) count_used(p);
        return;
    }
    int row = int(blockIdx.x) * ROW_WARPS + int(ptx::warp_id());
    if (row >= p.pairs) return;
    Side side = side_of(p, int(blockIdx.y));
    float inverse = 0.0f;
    if (Global<const float>(p.weights).load(row) != 0.0f) {
        float sum = 0.0f;
        for (int column = int(ptx::lane_id()) * 8; column < p.width; column += 256) {
            float x[8];
            unpack_8(x, side.rows.load_16(row * side.stride + column));
            UNROLL
            for (int i = 0; i < 8; i++) sum = ptx::fused_multiply_add(x[i], x[i], sum);
        }
        sum = sum_warp(sum);
        // What has no length in f32 must show, where 0 would leave the pair out.
        inverse = sum < infinity() ? ptx::rsqrt(sum + 1e-12f) : not_a_number();
    }
    if (ptx::lane_id() == 0) Global<float>(p.inverse).store(int64_t(blockIdx.y) * p.pairs + row, inverse);
}

// Joins a tile to a row's largest score and its sum, all to the base 2; scores that do not count are -infinity.
DEVICE void join(float& largest, float& sum, const float (&acc)[1][SCORES][4], int half)
{
    float top = largest;
    UNROLL
    for (int n = 0; n < SCORES; n++) {
        UNROLL
        for (int i = 0; i < 2; i++) top = acc[0][n][2 * half + i] > top ? acc[0][n][2 * half + i] : top;
    }
    if (top > largest) {
        sum *= ptx::exp2(largest - top);
        largest = top;
    }
    UNROLL
    for (int n = 0; n < SCORES; n++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            float score = acc[0][n][2 * half + i];
            // A row of NaN alone has no largest score.
            sum += score == -infinity() ? 0.0f : ptx::exp2(score - top);
        }
    }
}

// Grid: x tiles of own rows, y splits, z sides. Shared memory as sweep.cuh says.
template <Kind kind>
DEVICE void statistics(const ContrastiveParams& p)
{
    begin_dependent();
    int used = Global<const int>(p.used).load(0);
    int side = int(blockIdx.z);
    int first = int(blockIdx.x) * OWN;
    Range range = range_of(int(blockIdx.y), p.splits, used);
    if (first >= used || range.first >= range.end) return;
    Copies<false> copies(p, side, int(blockIdx.x), range);
    Row rows[2];
    own_rows(rows, p, copies.own, first);
    float bias = bias_of(p);
    float largest[2] = {-infinity(), -infinity()};
    float sum[2] = {0.0f, 0.0f};

    for (int tile = range.first; tile < range.end; tile++) {
        // The log-sums are yet to come.
        Shared<float> columns = write_columns<sigmoid>(p, copies.other, tile);
        float acc[1][SCORES][4];
        multiply(acc, copies, p.width);
        UNROLL
        for (int n = 0; n < SCORES; n++) {
            UNROLL
            for (int i = 0; i < 2; i++) {
                int place = n * 8 + int(ptx::lane_id()) % 4 * 2 + i;
                float inverse = read_column(columns, place).inverse;
                UNROLL
                for (int half = 0; half < 2; half++) {
                    const Row& row = rows[half];
                    float& x = acc[0][n][2 * half + i];
                    bool counts = row.inverse != 0.0f && inverse != 0.0f;
                    x = counts ? score_of(x, row, inverse, bias) : -infinity();
                    bool own = row.at == tile * OTHER + place;
                    if (own && counts && side == 0) Global<float>(p.score).store(row.at, x);
                    if (kind == sigmoid && counts) {
                        float against = own ? -x : x;
                        float small = ptx::exp2(against > 0.0f ? -against : against);
                        sum[half] += (against > 0.0f ? against : 0.0f) * ln_2 + log_1p(small);
                    }
                }
            }
        }
        if (kind == softmax) {
            UNROLL
            for (int half = 0; half < 2; half++) join(largest[half], sum[half], acc, half);
        }
    }

    Global<Two> partial(reinterpret_cast<Two*>(p.partial));
    UNROLL
    for (int half = 0; half < 2; half++) {
        UNROLL
        for (uint32_t mask = 1; mask < 4; mask *= 2) {
            float other_largest = ptx::shuffle_xor(largest[half], mask);
            float other_sum = ptx::shuffle_xor(sum[half], mask);
            if (kind == softmax) {
                float top = other_largest > largest[half] ? other_largest : largest[half];
                // Nothing on either side: -infinity less -infinity is no number.
                float from = top == -infinity() ? 0.0f : top;
                sum[half] = sum[half] * ptx::exp2(largest[half] - from) + other_sum * ptx::exp2(other_largest - from);
                largest[half] = top;
            } else {
                sum[half] += other_sum;
            }
        }
        if (ptx::lane_id() % 4 == 0 && rows[half].at < p.pairs) {
            int64_t at = (int64_t(side) * p.splits + int(blockIdx.y)) * p.pairs + rows[half].at;
            partial.store(at, Two{{largest[half], sum[half]}});
        }
    }
}

// Log-sum of a row or column to the base 2, and what it is beyond the score of the pair, without a difference of large
// numbers.
struct LogSum {
    float whole;
    float beyond;
};

DEVICE LogSum log_sum_of(const ContrastiveParams& p, int side, int row, int splits, float score)
{
    Global<const Two> partial(reinterpret_cast<const Two*>(p.partial));
    int64_t first = int64_t(side) * p.splits * p.pairs + row;
    float largest = -infinity();
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) {
        Two next = partial.load(first + int64_t(s) * p.pairs);
        float top = next.x[0] > largest ? next.x[0] : largest;
        float from = top == -infinity() ? 0.0f : top;
        sum = sum * ptx::exp2(largest - from) + next.x[1] * ptx::exp2(next.x[0] - from);
        largest = top;
    }
    float log_sum = ptx::log2(sum);
    return LogSum{largest + log_sum, (largest - score) + log_sum};
}

// A thread has a pair.
template <Kind kind>
DEVICE void losses(const ContrastiveParams& p)
{
    begin_dependent();
    int row = int(blockIdx.x) * 32 * ROW_WARPS + int(threadIdx.x);
    if (row >= p.pairs) return;
    Global<float> per_pair(p.per_pair);
    float weight = Global<const float>(p.weights).load(row);
    if (weight == 0.0f) {
        per_pair.store(row, 0.0f);
        return;
    }
    int splits = live_splits(p.splits, Global<const int>(p.used).load(0));
    if (kind == softmax) {
        float score = Global<const float>(p.score).load(row);
        LogSum by_image = log_sum_of(p, 0, row, splits, score);
        LogSum by_text = log_sum_of(p, 1, row, splits, score);
        Global<float>(p.log_sum).store(row, by_image.whole);
        Global<float>(p.log_sum).store(int64_t(p.pairs) + row, by_text.whole);
        per_pair.store(row, weight * (0.5f * ln_2 * (by_image.beyond + by_text.beyond)));
    } else {
        Global<const Two> partial(reinterpret_cast<const Two*>(p.partial));
        float sum = 0.0f;
        for (int s = 0; s < splits; s++) sum += partial.load(int64_t(s) * p.pairs + row).x[1];
        per_pair.store(row, weight * sum);
    }
}

// What a lane sums up over the tiles of a split.
struct Sums {
    float weighted;
    float plain;
    uint32_t ahead[2];
};

// Makes ds of the products of a tile, and of it the operand of the product with the other side's vectors.
template <Kind kind>
DEVICE void derive(uint32_t (&ds)[PAIRS][1][4], Sums& sums, const float (&acc)[1][SCORES][4],
                   const ContrastiveParams& p, const Row (&rows)[2], const Column (&own)[2], const float (&score)[2],
                   Shared<float> columns, int tile, float bias)
{
    int side = int(blockIdx.z);
    UNROLL
    for (int n = 0; n < SCORES; n++) {
        float x[4];
        UNROLL
        for (int i = 0; i < 2; i++) {
            int place = n * 8 + int(ptx::lane_id()) % 4 * 2 + i;
            int at = tile * OTHER + place;
            Column column = read_column(columns, place);
            UNROLL
            for (int half = 0; half < 2; half++) {
                const Row& row = rows[half];
                x[2 * half + i] = 0.0f;
                if (row.inverse == 0.0f || column.inverse == 0.0f) continue;
                bool pair = row.at == at;
                float s = score_of(acc[0][n][2 * half + i], row, column.inverse, bias);
                float d;
                if (kind == softmax) {
                    float target = pair ? 1.0f : 0.0f;
                    d = own[half].weight * (ptx::exp2(s - own[half].log_sum) - target) +
                        column.weight * (ptx::exp2(s - column.log_sum) - target);
                } else {
                    float sign = pair ? -1.0f : 1.0f;
                    float against = sign * s;
                    float small = ptx::exp2(against > 0.0f ? -against : against);
                    float probability = (against < 0.0f ? small : 1.0f) * ptx::reciprocal(1.0f + small);
                    d = (side == 0 ? own[half].weight : column.weight) * sign * probability;
                }
                // Written as "not smaller", so that a comparison with NaN counts against the image.
                bool behind = s < score[half] || (s == score[half] && at > row.at);
                sums.ahead[half] += !pair && !behind ? 1 : 0;
                sums.weighted = ptx::fused_multiply_add(d, s - bias, sums.weighted);
                sums.plain += d;
                x[2 * half + i] = d * column.inverse;
            }
        }
        ds[n / 2][0][n % 2 * 2] = pack_bf16(x[0], x[1]);
        ds[n / 2][0][n % 2 * 2 + 1] = pack_bf16(x[2], x[3]);
    }
}

// Adds the products of ds and the other side's vectors to the gradient of the own rows; `begun` where there is one.
template <class Copies>
DEVICE void multiply_gradient(Global<Two> dunit, const uint32_t (&ds)[PAIRS][1][4], const Row (&rows)[2],
                              const ContrastiveParams& p, Copies& copies, bool begun)
{
    uint32_t lane = ptx::lane_id();
    for (int column = 0; column < p.width; column += STEP) {
        uint32_t stage = copies.step();
        uint32_t first_b = Layout::row_major_b(stage + OWN_BYTES, 0, 0, lane);
        float acc[1][COLUMNS][4] = {};
        UNROLL
        for (int k = 0; k < PAIRS; k++) {
            uint32_t b[COLUMNS][2];
            UNROLL
            for (int n = 0; n < COLUMNS; n += 2) {
                uint32_t two[4];
                ptx::ldmatrix_x4_trans(two, Layout::rows(first_b, k * 16) ^ Layout::chunks(n));
                b[n][0] = two[0];
                b[n][1] = two[1];
                b[n + 1][0] = two[2];
                b[n + 1][1] = two[3];
            }
            ptx::mma_tiles(acc, ds[k], b);
        }
        UNROLL
        for (int half = 0; half < 2; half++) {
            if (rows[half].inverse == 0.0f) continue;
            UNROLL
            for (int n = 0; n < COLUMNS; n++) {
                if (column + n * 8 >= p.width) continue;
                int64_t at = (int64_t(rows[half].at) * p.width + column + n * 8) / 2 + lane % 4;
                Two sum = begun ? dunit.load(at) : Two{{0.0f, 0.0f}};
                sum.x[0] += acc[0][n][2 * half];
                sum.x[1] += acc[0][n][2 * half + 1];
                dunit.store(at, sum);
            }
        }
    }
}

// Grid and shared memory as those of the statistics, both sides in any case.
template <Kind kind>
DEVICE void gradient(const ContrastiveParams& p)
{
    begin_dependent();
    int used = Global<const int>(p.used).load(0);
    int side = int(blockIdx.z);
    int split = int(blockIdx.y);
    int first = int(blockIdx.x) * OWN;
    Range range = range_of(split, p.splits, used);
    if (first >= used || range.first >= range.end) return;
    Copies<true> copies(p, side, int(blockIdx.x), range);
    Row rows[2];
    own_rows(rows, p, copies.own, first);
    float bias = bias_of(p);
    float loss_scale = p.loss_scale == nullptr ? 1.0f : Global<const float>(p.loss_scale).load(0);
    Column own[2];
    float score[2];
    UNROLL
    for (int half = 0; half < 2; half++) {
        own[half] = Column{rows[half].inverse, 0.0f, 0.0f};
        score[half] = 0.0f;
        if (rows[half].inverse == 0.0f) continue;
        float weight = Global<const float>(p.weights).load(rows[half].at);
        own[half].weight = (kind == softmax ? 0.5f : 1.0f) * loss_scale * weight;
        if (kind == softmax) own[half].log_sum = copies.own.log_sum.load(rows[half].at);
        score[half] = Global<const float>(p.score).load(rows[half].at);
    }
    Global<Two> dunit(
        reinterpret_cast<Two*>(p.dunit + (int64_t(side) * p.splits + split) * p.pairs * int64_t(p.width)));
    Sums sums = {0.0f, 0.0f, {0, 0}};
    for (int tile = range.first; tile < range.end; tile++) {
        Shared<float> columns = write_columns<kind>(p, copies.other, tile);
        uint32_t ds[PAIRS][1][4];
        {
            float acc[1][SCORES][4];
            multiply(acc, copies, p.width);
            derive<kind>(ds, sums, acc, p, rows, own, score, columns, tile, bias);
        }
        multiply_gradient(dunit, ds, rows, p, copies, tile > range.first);
    }
    if (side != 0) return;

    UNROLL
    for (int half = 0; half < 2; half++) {
        uint32_t ahead = sums.ahead[half];
        ahead += ptx::shuffle_xor(ahead, 1);
        ahead += ptx::shuffle_xor(ahead, 2);
        if (ptx::lane_id() % 4 == 0 && rows[half].inverse != 0.0f) {
            Global<int>(p.ahead).store(int64_t(split) * p.pairs + rows[half].at, int(ahead));
        }
    }
    Two whole = {{sum_warp(sums.weighted), sum_warp(sums.plain)}};
    Shared<float> scratch(ptx::shared_base() + SCRATCH_AT);
    if (ptx::lane_id() == 0) {
        scratch.store(threadIdx.x / 16, whole.x[0]);
        scratch.store(threadIdx.x / 16 + 1, whole.x[1]);
    }
    ptx::barrier();
    if (threadIdx.x != 0) return;
    UNROLL
    for (int w = 1; w < THREADS / 32; w++) {
        whole.x[0] += scratch.load(2 * w);
        whole.x[1] += scratch.load(2 * w + 1);
    }
    Global<Two>(reinterpret_cast<Two*>(p.sums)).store(int64_t(split) * ceil_div(p.pairs, OWN) + int(blockIdx.x), whole);
}

// Gradients of scale and bias. One warp.
DEVICE void finish_sums(const ContrastiveParams& p, int used, int splits)
{
    Global<const Two> sums(reinterpret_cast<const Two*>(p.sums));
    int tiles = ceil_div(used, OWN);
    Two whole = {{0.0f, 0.0f}};
    for (int s = 0; s < splits; s++) {
        for (int tile = int(ptx::lane_id()); tile < tiles; tile += 32) {
            Two next = sums.load(int64_t(s) * ceil_div(p.pairs, OWN) + tile);
            whole.x[0] += next.x[0];
            whole.x[1] += next.x[1];
        }
    }
    whole.x[0] = sum_warp(whole.x[0]);
    whole.x[1] = sum_warp(whole.x[1]);
    if (ptx::lane_id() != 0) return;
    Global<float>(p.dscale).store(0, whole.x[0] * ln_2);
    if (p.dbias != nullptr) Global<float>(p.dbias).store(0, whole.x[1]);
}

// A warp has a row, the last block the sums. Grid: x rows, y sides.
DEVICE void finish(const ContrastiveParams& p)
{
    begin_dependent();
    int used = Global<const int>(p.used).load(0);
    int splits = live_splits(p.splits, used);
    int side = int(blockIdx.y);
    if (blockIdx.x == gridDim.x - 1) {
        if (side == 0 && ptx::warp_id() == 0) finish_sums(p, used, splits);
        return;
    }
    int row = int(blockIdx.x) * ROW_WARPS + int(ptx::warp_id());
    if (row >= p.pairs) return;
    int lane = int(ptx::lane_id());
    Side own = side_of(p, side);
    Global<bf16> out(side == 0 ? p.dimages : p.dtexts);
    int64_t out_first = row * (side == 0 ? p.dimages_stride : p.dtexts_stride);
    float inverse = own.inverse.load(row);
    bool ranked = side == 0 && p.rank != nullptr && lane == 0;
    if (inverse == 0.0f) {
        for (int column = lane * 8; column < p.width; column += 256) out.store_16(out_first + column, zero_vector());
        if (ranked) Global<int>(p.rank).store(row, -1);
        return;
    }
    if (ranked) {
        float score = Global<const float>(p.score).load(row);
        int ahead = 0;
        for (int s = 0; s < splits; s++) ahead += Global<const int>(p.ahead).load(int64_t(s) * p.pairs + row);
        // An image whose own score is NaN retrieves nothing.
        Global<int>(p.rank).store(row, score == score ? ahead : 0x7fffffff);
    }
    float factor = factor_of(p);
    Global<const float> dunit(p.dunit);
    // The vector and the gradient by its direction.
    auto load = [&](float(&unit)[8], float(&d)[8], int column) {
        unpack_8(unit, own.rows.load_16(row * own.stride + column));
        UNROLL
        for (int i = 0; i < 8; i++) {
            unit[i] *= inverse;
            d[i] = 0.0f;
        }
        for (int s = 0; s < splits; s++) {
            int64_t at = ((int64_t(side) * p.splits + s) * p.pairs + row) * p.width + column;
            UNROLL
            for (int half = 0; half < 2; half++) {
                Vec16 four = dunit.load_16(at + 4 * half);
                UNROLL
                for (int i = 0; i < 4; i++) d[4 * half + i] += bits_to_float(four.word[i]);
            }
        }
    };
    float along = 0.0f;
    for (int column = lane * 8; column < p.width; column += 256) {
        float unit[8];
        float d[8];
        load(unit, d, column);
        UNROLL
        for (int i = 0; i < 8; i++) along = ptx::fused_multiply_add(unit[i], d[i], along);
    }
    along = sum_warp(along);
    for (int column = lane * 8; column < p.width; column += 256) {
        float unit[8];
        float d[8];
        load(unit, d, column);
        UNROLL
        for (int i = 0; i < 8; i++) d[i] = (d[i] - unit[i] * along) * (inverse * factor);
        out.store_16(out_first + column, pack_8(d));
    }
}

} // namespace contrastive
