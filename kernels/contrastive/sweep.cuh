// A block's way over the vectors of the other side: tiles of both come by cp.async through a ring in shared memory, and
// mma.m16n8k16 makes of them a warp's 16 rows of scores, [OWN, OTHER] a block.
#pragma once

#include "../common/tile.cuh"
#include "params.cuh"

namespace contrastive {

constexpr int THREADS = 128;
constexpr int STAGES = 3;
// Columns of a step.
constexpr int STEP = 64;
constexpr int ROW_BYTES = 2 * STEP;
using Layout = Tile<ROW_BYTES>;
constexpr int OWN_BYTES = OWN * ROW_BYTES;
constexpr int STAGE_BYTES = OWN_BYTES + OTHER * ROW_BYTES;
// Fragments of mma: columns of scores, 16 of them, columns of a step.
constexpr int SCORES = OTHER / 8;
constexpr int PAIRS = OTHER / 16;
constexpr int COLUMNS = STEP / 8;

// What is known of a vector of the other side, in shared memory.
struct Column {
    float inverse; // 0: it does not count
    float log_sum;
    float weight;  // half of weight times scale of the loss for softmax, all of it for sigmoid
};

// Shared memory: the ring, two lists of columns, a number or two of each warp.
constexpr int COLUMNS_AT = STAGES * STAGE_BYTES;
constexpr int SCRATCH_AT = COLUMNS_AT + 2 * OTHER * 16;

// Copies a step at a time, STAGES - 1 steps ahead: for each tile of the other side the columns of both for the scores,
// then, for the gradient, those of the other side once more. Rows that do not count are zeros and not read: what lies
// there may be anything.
template <bool GRADIENT>
struct Copies {
    Side own;
    Side other;
    int pairs;
    int width;
    int own_first;
    int tile;
    int end;
    int column; // first of the next step
    bool again; // for the gradient
    uint32_t own_counts;   // a bit for each row that this thread copies
    uint32_t other_counts;
    uint32_t writing; // shared address of the next stage
    uint32_t reading;
    uint32_t row;
    uint32_t chunk;

    static constexpr int ROWS = THREADS / Layout::CHUNKS;

    DEVICE Copies(const ContrastiveParams& p, int side, int own_tile, Range range)
        : own(side_of(p, side)), other(side_of(p, 1 - side)), pairs(p.pairs), width(p.width),
          own_first(own_tile * OWN), tile(range.first), end(range.end), column(0), again(false),
          writing(ptx::shared_base()), reading(writing), row(threadIdx.x / Layout::CHUNKS),
          chunk(threadIdx.x % Layout::CHUNKS)
    {
        own_counts = counts<OWN>(own, own_first);
        other_counts = counts<OTHER>(other, tile * OTHER);
        for (int i = 0; i < STAGES - 1; i++) next();
    }

    template <int N>
    DEVICE uint32_t counts(const Side& side, int first) const
    {
        uint32_t bits = 0;
        UNROLL
        for (int i = 0; i < N / ROWS; i++) {
            int at = first + int(row) + i * ROWS;
            if (at < pairs && side.inverse.load(at) != 0.0f) bits |= 1u << i;
        }
        return bits;
    }

    template <int N>
    DEVICE void copy(uint32_t base, const Side& side, int first, uint32_t bits) const
    {
        uint32_t to = base + Layout::offset(row, chunk);
        int64_t from = (first + int64_t(row)) * side.stride + column + int(chunk) * 8;
        UNROLL
        for (int i = 0; i < N / ROWS; i++) {
            ptx::cp_async_16(Layout::rows(to, i * ROWS), side.rows.at(from), (bits >> i & 1) != 0);
            from += ROWS * side.stride;
        }
    }

    static DEVICE uint32_t after(uint32_t stage)
    {
        uint32_t base = ptx::shared_base();
        return stage + STAGE_BYTES < base + STAGES * STAGE_BYTES ? stage + STAGE_BYTES : base;
    }

    // Begins to copy the next step, if there is one.
    DEVICE void next()
    {
        if (tile < end) {
            bool inside = column + int(chunk) * 8 < width;
            if (!again) copy<OWN>(writing, own, own_first, inside ? own_counts : 0);
            copy<OTHER>(writing + OWN_BYTES, other, tile * OTHER, inside ? other_counts : 0);
            writing = after(writing);
            column += STEP;
            if (column >= width) {
                column = 0;
                again = GRADIENT && !again;
                if (!again) {
                    tile++;
                    other_counts = counts<OTHER>(other, tile * OTHER);
                }
            }
        }
        ptx::cp_async_commit();
    }

    // The stage of the next step, once it is there. The stage that is written meanwhile was read before the barrier.
    DEVICE uint32_t step()
    {
        ptx::cp_async_wait<STAGES - 2>();
        ptx::barrier();
        next();
        uint32_t stage = reading;
        reading = after(reading);
        return stage;
    }
};

// Products of the warp's 16 vectors with all OTHER of the tile.
template <class Copies>
DEVICE void multiply(float (&acc)[1][SCORES][4], Copies& copies, int width)
{
    uint32_t lane = ptx::lane_id();
    UNROLL
    for (int n = 0; n < SCORES; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) acc[0][n][i] = 0.0f;
    }
    for (int column = 0; column < width; column += STEP) {
        uint32_t stage = copies.step();
        uint32_t first_a = Layout::row_major_a(stage, ptx::warp_id() * 16, 0, lane);
        uint32_t first_b = Layout::column_major_b(stage + OWN_BYTES, 0, 0, lane);
        UNROLL
        for (int k = 0; k < STEP / 16; k++) {
            uint32_t a[1][4];
            uint32_t b[SCORES][2];
            ptx::ldmatrix_x4(a[0], first_a ^ Layout::chunks(2 * k));
            UNROLL
            for (int n = 0; n < SCORES; n += 2) {
                uint32_t two[4];
                ptx::ldmatrix_x4(two, Layout::rows(first_b, n * 8) ^ Layout::chunks(2 * k));
                b[n][0] = two[0];
                b[n][1] = two[1];
                b[n + 1][0] = two[2];
                b[n + 1][1] = two[3];
            }
            ptx::mma_tiles(acc, a, b);
        }
    }
}

// Writes what is known of the columns of a tile; to be read after a barrier. Tiles take turns at two lists.
template <Kind kind>
DEVICE Shared<float> write_columns(const ContrastiveParams& p, const Side& other, int tile)
{
    Shared<float> list(ptx::shared_base() + COLUMNS_AT + (tile & 1) * OTHER * 16);
    int at = tile * OTHER + int(threadIdx.x);
    Vec16 column = zero_vector();
    if (at < p.pairs && other.inverse.load(at) != 0.0f) {
        float scale = p.loss_scale == nullptr ? 1.0f : Global<const float>(p.loss_scale).load(0);
        column.word[0] = float_to_bits(other.inverse.load(at));
        if (kind == softmax) column.word[1] = float_to_bits(other.log_sum.load(at));
        column.word[2] =
            float_to_bits((kind == softmax ? 0.5f : 1.0f) * scale * Global<const float>(p.weights).load(at));
    }
    list.store_16(threadIdx.x * 4, column);
    return list;
}

DEVICE Column read_column(Shared<float> list, int at)
{
    Vec16 column = list.load_16(uint32_t(at) * 4);
    return Column{bits_to_float(column.word[0]), bits_to_float(column.word[1]), bits_to_float(column.word[2])};
}

// A row of scores of this lane's quad.
struct Row {
    int at;         // number of the vector
    float inverse;  // 0: it does not count
    float factor;   // on products of vectors of length 1; to the base 2
};

// Rows lane / 4 and 8 below it, of the warp's 16.
DEVICE void own_rows(Row (&rows)[2], const ContrastiveParams& p, const Side& own, int first)
{
    float factor = factor_of(p) * log2_e;
    UNROLL
    for (int half = 0; half < 2; half++) {
        int at = first + int(ptx::warp_id()) * 16 + int(ptx::lane_id()) / 4 + 8 * half;
        float inverse = at < p.pairs ? own.inverse.load(at) : 0.0f;
        rows[half] = Row{at, inverse, factor};
    }
}

// A score to the base 2: the same bits in both sweeps, and whichever side the rows are of.
DEVICE float score_of(float product, const Row& row, float inverse, float bias)
{
    return ptx::fused_multiply_add(product, row.factor * (row.inverse * inverse), bias);
}

DEVICE float bias_of(const ContrastiveParams& p)
{
    return p.bias == nullptr ? 0.0f : Global<const float>(p.bias).load(0) * log2_e;
}

} // namespace contrastive
