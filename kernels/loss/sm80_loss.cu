// Softmax and sigmoid cross-entropy of logits z [images, classes], loss and gradient in one pass:
//   target    t_k = kept y_k + floor, with y the class or the soft target, kept = 1 - s, floor = s / classes
//   softmax   loss = sum_k t_k (lse(z) - z_k),                          dz_k = softmax(z)_k sum t - t_k
//   sigmoid   loss = sum_k max(z_k, 0) - z_k t_k + ln(1 + e^-|z_k|),    dz_k = sigmoid(z_k) - t_k
// where a softmax is that of sharpness z. Loss and gradient are multiplied by unit and slope, and by the image's
// weight, the gradient by scale too. An image of weight 0 gives
// zeros, whatever its logits and targets are.
//
// A block owns a row and goes over it in tiles that it holds in registers: thread i has columns 8 i to 8 i + 7 of
// a tile, then those 8 threads further on. For softmax a first pass finds maximum and sums, which threads and
// tiles join as (maximum, sums relative to it); the second pass makes the gradient, from the last tile to the
// first, so that a row of one tile is read once and the others are read again from the L2 cache. Logits are taken
// relative to the largest everywhere, so that no large numbers are subtracted.
#include "../common/numbers.cuh"

struct LossParams {
    float* loss;           // [images], weight times loss
    bf16* dlogits;         // rows of dlogits_stride, written to classes rounded up to 8: zeros beyond classes
    int* rank;             // [images], classes ahead of the target's, -1 at weight 0; may be null
    const void* logits;    // rows of logits_stride, readable to classes rounded up to 8
    const int* labels;     // [images] class targets, or null
    const float* soft;     // [images, classes] soft targets, or null
    const float* weights;  // [images]
    const float* scale;    // one number; null is 1
    int* error;            // set to 1 where a label is no class; may be null
    int64_t logits_stride; // multiples of 8
    int64_t dlogits_stride;
    float kept;
    float floor;
    float sharpness;       // of a softmax, 1 / temperature
    float unit;
    float slope;
    int images;
    int classes;
};

namespace loss {

using namespace numbers;

enum Kind { softmax, sigmoid };

DEVICE float widen(bf16 x)
{
    return to_float(x);
}

DEVICE float widen(float x)
{
    return x;
}

// Eight logits, bf16 or f32.
DEVICE void unpack(float (&z)[8], const Vec16 (&packed)[1])
{
    UNROLL
    for (int i = 0; i < 4; i++) {
        z[2 * i] = low(packed[0].word[i]);
        z[2 * i + 1] = high(packed[0].word[i]);
    }
}

DEVICE void unpack(float (&z)[8], const Vec16 (&packed)[2])
{
    UNROLL
    for (int i = 0; i < 8; i++) z[i] = bits_to_float(packed[i / 4].word[i % 4]);
}

// What a row is compared with.
struct Target {
    const float* soft; // null: a class
    int64_t first;     // of the row within `soft`
    int classes;
    int label;
    float kept;
    float floor;
};

// Targets of eight columns after smoothing; those beyond the row mean nothing.
DEVICE void load_targets(float (&t)[8], const Target& row, int column)
{
    if (row.soft == nullptr) {
        UNROLL
        for (int i = 0; i < 8; i++) t[i] = row.floor + (column + i == row.label ? row.kept : 0.0f);
        return;
    }
    Global<const float> soft(row.soft);
    if (row.classes % 4 == 0) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            Vec16 packed = {};
            if (column + 4 * half < row.classes) packed = soft.load_16(row.first + column + 4 * half);
            UNROLL
            for (int i = 0; i < 4; i++) t[4 * half + i] = bits_to_float(packed.word[i]);
        }
    } else {
        UNROLL
        for (int i = 0; i < 8; i++) t[i] = column + i < row.classes ? soft.load(row.first + column + i) : 0.0f;
    }
    UNROLL
    for (int i = 0; i < 8; i++) t[i] = ptx::fused_multiply_add(row.kept, t[i], row.floor);
}

// Shares of a softmax row of sharpened logits: the maximum, and relative to it the sum of exponentials and of targets times logits.
struct Softmax {
    enum { max, sum, targets, dot, words };

    static DEVICE void neutral(float (&x)[words])
    {
        x[max] = -infinity();
        x[sum] = x[targets] = x[dot] = 0.0f;
    }

    static DEVICE void shift(float (&x)[words], float to)
    {
        // Infinities must not meet; a share without targets has nothing to shift.
        if (x[max] == to) return;
        x[sum] *= ptx::exp2((x[max] - to) * log2_e);
        if (x[targets] != 0.0f) x[dot] += x[targets] * (x[max] - to);
        x[max] = to;
    }

    static DEVICE void join(float (&x)[words], float (&y)[words])
    {
        float larger = y[max] > x[max] ? y[max] : x[max];
        shift(x, larger);
        shift(y, larger);
        x[sum] += y[sum];
        x[targets] += y[targets];
        x[dot] += y[dot];
    }
};

// The largest soft target, the last one where several are; a column fits a float.
struct Largest {
    enum { value, column, words };

    static DEVICE void neutral(float (&x)[words])
    {
        x[value] = -infinity();
        x[column] = 0.0f;
    }

    static DEVICE void join(float (&x)[words], float (&y)[words])
    {
        if (y[value] > x[value] || (y[value] == x[value] && y[column] > x[column])) {
            x[value] = y[value];
            x[column] = y[column];
        }
    }
};

// Loss and classes ahead, which fit a float.
struct Sums {
    enum { loss, ahead, words };

    static DEVICE void neutral(float (&x)[words])
    {
        x[loss] = x[ahead] = 0.0f;
    }

    static DEVICE void join(float (&x)[words], float (&y)[words])
    {
        x[loss] += y[loss];
        x[ahead] += y[ahead];
    }
};

template <class Share>
DEVICE void join_warp(float (&x)[Share::words])
{
    UNROLL
    for (uint32_t mask = 16; mask > 0; mask /= 2) {
        float other[Share::words];
        UNROLL
        for (int i = 0; i < Share::words; i++) other[i] = ptx::shuffle_xor(x[i], mask);
        Share::join(x, other);
    }
}

// Joins the shares of all threads in a fixed order, to all of them. `scratch` holds 32 shares. Collective.
template <class Share, int threads>
DEVICE void join_block(float (&x)[Share::words], Shared<float> scratch)
{
    uint32_t lane = ptx::lane_id();
    join_warp<Share>(x);
    UNROLL
    for (int i = 0; i < Share::words; i++) {
        if (lane == 0) scratch.store(threadIdx.x / 32 * Share::words + i, x[i]);
    }
    ptx::barrier();
    Share::neutral(x);
    UNROLL
    for (int i = 0; i < Share::words; i++) {
        if (lane < threads / 32) x[i] = scratch.load(lane * Share::words + i);
    }
    join_warp<Share>(x);
    // Lanes may differ in the last bit, for they add in another order.
    UNROLL
    for (int i = 0; i < Share::words; i++) x[i] = ptx::shuffle(x[i], 0);
}

// A tile of a row, as it lies in memory.
template <class T, int threads, int chunks>
struct Tile {
    static constexpr int columns = 8 * threads * chunks;
    static constexpr int words = sizeof(T) / 2;

    Vec16 packed[chunks][words];
    int column; // first one of this thread

    // All loads are under way before one is waited for.
    DEVICE void load(Global<const T> logits, int64_t row, int tile, int classes)
    {
        column = tile * columns + 8 * int(threadIdx.x);
        UNROLL
        for (int c = 0; c < chunks; c++) {
            UNROLL
            for (int i = 0; i < words; i++) {
                packed[c][i] = Vec16{};
                if (at(c) < classes) packed[c][i] = logits.load_16(row + at(c) + i * 8 / words);
            }
        }
    }

    DEVICE int at(int chunk) const
    {
        return column + 8 * threads * chunk;
    }
};

// Shares of a tile, joined to those of the tiles before.
template <class T, int threads, int chunks>
DEVICE void join_tile(float (&all)[Softmax::words], const Tile<T, threads, chunks>& tile, const Target& target,
                      float sharpness)
{
    float max = all[Softmax::max];
    UNROLL
    for (int c = 0; c < chunks; c++) {
        float z[8];
        unpack(z, tile.packed[c]);
        UNROLL
        for (int i = 0; i < 8; i++) {
            if (tile.at(c) + i < target.classes && z[i] * sharpness > max) max = z[i] * sharpness;
        }
    }
    Softmax::shift(all, max);
    UNROLL
    for (int c = 0; c < chunks; c++) {
        if (tile.at(c) >= target.classes) continue;
        float z[8];
        float t[8];
        unpack(z, tile.packed[c]);
        load_targets(t, target, tile.at(c));
        UNROLL
        for (int i = 0; i < 8; i++) {
            if (tile.at(c) + i >= target.classes) continue;
            float relative = z[i] * sharpness - max;
            all[Softmax::sum] += ptx::exp2(relative * log2_e);
            all[Softmax::targets] += t[i];
            all[Softmax::dot] += t[i] * relative;
        }
    }
}

// The column of the largest soft target. Collective.
template <int threads>
DEVICE int largest_target(const Target& target, Shared<float> scratch)
{
    float largest[Largest::words];
    Largest::neutral(largest);
    for (int column = 8 * int(threadIdx.x); column < target.classes; column += 8 * threads) {
        float t[8];
        load_targets(t, target, column);
        UNROLL
        for (int i = 0; i < 8; i++) {
            float candidate[Largest::words] = {t[i], float(column + i)};
            if (column + i < target.classes) Largest::join(largest, candidate);
        }
    }
    join_block<Largest, threads>(largest, scratch);
    return int(largest[Largest::column]);
}

// Block = image. Shared memory: 32 shares of each kind, 8 x 32 floats.
template <Kind kind, class T, int threads, int chunks>
DEVICE void cross_entropy(const LossParams& p)
{
    begin_dependent();
    int image = int(blockIdx.x);
    Global<const T> logits(static_cast<const T*>(p.logits));
    Global<bf16> dlogits(p.dlogits);
    int64_t row = image * p.logits_stride;
    int64_t out = image * p.dlogits_stride;
    Tile<T, threads, chunks> tile;
    int last_tile = (p.classes - 1) / tile.columns;
    int loaded = kind == softmax ? 0 : last_tile;
    tile.load(logits, row, loaded, p.classes);
    float weight = Global<const float>(p.weights).load(image);
    if (weight == 0.0f) {
        for (int column = 8 * int(threadIdx.x); column < p.classes; column += 8 * threads) {
            dlogits.store_16(out + column, Vec16{});
        }
        if (threadIdx.x == 0) Global<float>(p.loss).store(image, 0.0f);
        if (threadIdx.x == 0 && p.rank != nullptr) Global<int>(p.rank).store(image, -1);
        return;
    }
    float factor = weight * p.slope * (p.scale == nullptr ? 1.0f : Global<const float>(p.scale).load(0));

    Shared<float> scratch(ptx::shared_base());
    Target target = {p.soft, int64_t(image) * p.classes, p.classes, -1, p.kept, p.floor};
    if (p.soft == nullptr) {
        target.label = Global<const int>(p.labels).load(image);
        if (target.label < 0 || target.label >= p.classes) {
            if (p.error != nullptr && threadIdx.x == 0) Global<int>(p.error).store(0, 1);
            // Loss and gradient become NaN: nobody can take them for right.
            target.label = -1;
            target.floor = not_a_number();
        }
    } else if (p.rank != nullptr) {
        target.label = largest_target<threads>(target, Shared<float>(scratch.address + 4 * 32 * Softmax::words));
    }
    bool ranked = p.rank != nullptr && target.label >= 0;
    float own = ranked ? widen(logits.load(row + target.label)) : not_a_number();

    float all[Softmax::words];
    Softmax::neutral(all);
    if (kind == softmax) {
        for (int i = 0; i <= last_tile; i++) {
            if (i != loaded) tile.load(logits, row, i, p.classes);
            join_tile(all, tile, target, p.sharpness);
            loaded = i;
        }
        join_block<Softmax, threads>(all, scratch);
    }
    float ratio = all[Softmax::targets] / all[Softmax::sum];

    float sums[Sums::words];
    Sums::neutral(sums);
    for (int tile_index = last_tile; tile_index >= 0; tile_index--) {
        if (tile_index != loaded) tile.load(logits, row, tile_index, p.classes);
        loaded = tile_index;
        UNROLL
        for (int c = 0; c < chunks; c++) {
            if (tile.at(c) >= p.classes) continue;
            float z[8];
            float t[8];
            unpack(z, tile.packed[c]);
            load_targets(t, target, tile.at(c));
            UNROLL
            for (int i = 0; i < 8; i++) {
                int column = tile.at(c) + i;
                if (column >= p.classes) {
                    t[i] = 0.0f;
                    continue;
                }
                // Written as "not smaller", so that a comparison with NaN counts against the image.
                bool ahead = column != target.label && !(z[i] < own) && !(z[i] == own && column > target.label);
                sums[Sums::ahead] += ahead ? 1.0f : 0.0f;
                float probability;
                if (kind == softmax) {
                    probability = ptx::exp2((z[i] * p.sharpness - all[Softmax::max]) * log2_e) * ratio;
                } else {
                    float small = ptx::exp2((z[i] < 0.0f ? z[i] : -z[i]) * log2_e);
                    probability = (z[i] < 0.0f ? small : 1.0f) * ptx::reciprocal(1.0f + small);
                    sums[Sums::loss] += (z[i] > 0.0f ? z[i] : 0.0f) - z[i] * t[i] + log_1p(small);
                }
                t[i] = (probability - t[i]) * factor;
            }
            Vec16 gradient;
            UNROLL
            for (int i = 0; i < 4; i++) gradient.word[i] = pack_bf16(t[2 * i], t[2 * i + 1]);
            dlogits.store_16(out + tile.at(c), gradient);
        }
    }
    if (kind == sigmoid || p.rank != nullptr) {
        uint32_t offset = 4 * 32 * (Softmax::words + Largest::words);
        join_block<Sums, threads>(sums, Shared<float>(scratch.address + offset));
    }
    if (threadIdx.x != 0) return;
    float result = sums[Sums::loss];
    if (kind == softmax) {
        result = all[Softmax::targets] * (ptx::log2(all[Softmax::sum]) * ln_2) - all[Softmax::dot];
    }
    Global<float>(p.loss).store(image, weight * p.unit * result);
    if (p.rank != nullptr) {
        // A target whose own logit is NaN is never among the first.
        int last = p.classes > 5 ? p.classes : 5;
        Global<int>(p.rank).store(image, own == own ? int(sums[Sums::ahead]) : last);
    }
}

} // namespace loss
