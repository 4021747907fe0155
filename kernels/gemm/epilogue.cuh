// What becomes of a tile of a b in registers.
//
// The accumulators of mma lie two columns to a lane; memory wants 16 bytes to a lane. So each warp turns its
// part of the tile around in shared memory of its own, 16 rows at a time, in f32: nothing is rounded before the
// last operation, and every lane then holds 8 columns of a row (4 where the result is f32) and always the same
// columns, so that bias and LayerScale are read once.
//
// Rows of WN floats lie in chunks of 16 bytes; chunk c of row r lies at c ^ turn(c, r), such that neither the
// pairs written by mma's layout nor the rows read back meet in a bank (rows of 16 floats meet in pairs).
#pragma once

#include "../common/reduce.cuh"
#include "../common/vector.cuh"
#include "params.cuh"

// Where a warp's part of the tile lies.
struct GemmPlace {
    uint32_t staging;  // shared memory of this warp, 16 x WN floats
    uint32_t columns;  // shared memory of the block, [warps along m][BN] floats
    int row;           // first row of this warp in the result
    int column;        // first column
    int tile_m;        // number of the block's tile along m
    int tile_column;   // first column of the block's tile
    int warp_m;        // number of the warp along m in the block
    int live;          // rows of the result that are computed; the others are zeros
    int end;           // rows from here on are not this block's
    int split;         // number of the slice of k
    int splits;        // how many there are
};

struct alignas(8) GemmPair {
    float x[2];
};

struct alignas(16) GemmQuad {
    float x[4];
};

template <int WN>
struct GemmStaging {
    static constexpr int ROWS = 16;
    static constexpr int BYTES = ROWS * WN * 4;

    // Byte offset of chunk `c`, four columns, of row `r`.
    static DEVICE uint32_t offset(uint32_t r, uint32_t c)
    {
        if (WN == 16) return r * (WN * 4) + ((c ^ ((r >> 1) & 3)) << 4);
        uint32_t turn = WN == 64 ? c >> 3 : r & 1;
        return r * (WN * 4) + ((c ^ ((r & 3) << 1) ^ turn) << 4);
    }

    // Writes 16 rows of accumulators.
    template <int N>
    static DEVICE void write(uint32_t base, const float (&acc)[N][4], uint32_t lane)
    {
        UNROLL
        for (int n = 0; n < N; n++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                uint32_t place = offset(lane / 4 + 8 * half, 2 * n + lane % 4 / 2) + lane % 2 * 8;
                Shared<GemmPair>(base + place).store(0, GemmPair{{acc[n][2 * half], acc[n][2 * half + 1]}});
            }
        }
    }

    // Columns 4 c to 4 c + 3 of row `r`.
    static DEVICE GemmQuad read(uint32_t base, uint32_t r, uint32_t c)
    {
        return Shared<GemmQuad>(base + offset(r, c)).load(0);
    }
};

// The two halves of a warp's walk over 16 staged rows: COLUMNS columns to a lane, STEP rows at a time.
template <int WN, int COLUMNS>
struct GemmLanes {
    static constexpr int LANES = WN / COLUMNS;
    static constexpr int STEP = 32 / LANES;
    static constexpr int COUNT = GemmStaging<WN>::ROWS / STEP;
};

// Eight f32 from `source`, or `otherwise` where it is null or the columns lie outside.
DEVICE void gemm_load_row(float (&x)[8], const float* source, int column, bool valid, float otherwise)
{
    UNROLL
    for (int i = 0; i < 8; i++) x[i] = otherwise;
    if (source == nullptr || !valid) return;
    UNROLL
    for (int i = 0; i < 2; i++) {
        Vec16 four = Global<const float>(source).load_16(column + 4 * i);
        UNROLL
        for (int j = 0; j < 4; j++) x[4 * i + j] = bits_to_float(four.word[j]);
    }
}

// bf16 results. `GRADIENT` false:
//
//   v = a b + bias;   pre = v;   v = gelu(v);   out = side + keep[row] gamma[column] v
//
// each step where it is asked for. `GRADIENT` true, with the column sums of the unrounded result, which are
// the gradient of the bias, to row `tile_m` of the workspace where there is one:
//
//   out = (a b) gelu'(side)
//
// GELU is taken of the unrounded v. Rows from `live` on become zeros, in `pre` too; what lies there in `side`
// is not read.
template <bool GRADIENT>
struct GemmOut {
    static constexpr bool COLUMN_SUMS = GRADIENT;
    static constexpr bool SQUARES = false;

    // What a lane keeps of its eight columns on its way down the rows.
    struct Columns {
        int column;
        bool inside;
        GeluCurve curve;
        float bias[8], gamma[8], sums[8];

        DEVICE Columns(const GemmParams& p, int column)
            : column(column), inside(column < p.n), curve(gelu_curve(p.gelu))
        {
            if constexpr (GRADIENT) {
                UNROLL
                for (int i = 0; i < 8; i++) sums[i] = 0.0f;
            } else {
                gemm_load_row(bias, p.bias, column, inside, 0.0f);
                gemm_load_row(gamma, p.gamma, column, inside, 1.0f);
            }
        }
    };

    // The columns of this lane, of WN from `first` on.
    template <int WN>
    static DEVICE Columns columns(const GemmParams& p, const GemmPlace&, int first)
    {
        return Columns(p, first + int(ptx::lane_id() % GemmLanes<WN, 8>::LANES) * 8);
    }

    // What a lane needs of `side` for 16 rows.
    template <int WN>
    struct Ahead {
        Vec16 side[GemmLanes<WN, 8>::COUNT];
    };

    // Reads it, for WN columns from `column` and the 16 rows from `first` on.
    template <int WN>
    static DEVICE Ahead<WN> read(const GemmParams& p, const GemmPlace& place, int column, int first)
    {
        using Lanes = GemmLanes<WN, 8>;
        uint32_t lane = ptx::lane_id();
        column += int(lane % Lanes::LANES) * 8;
        Ahead<WN> ahead;
        UNROLL
        for (int i = 0; i < Lanes::COUNT; i++) {
            int row = first + i * Lanes::STEP + int(lane / Lanes::LANES);
            ahead.side[i] = Vec16{{0, 0, 0, 0}};
            if (p.side != nullptr && column < p.n && row < place.live) {
                ahead.side[i] = Global<const bf16>(p.side).load_16(row * p.ld_side + column);
            }
        }
        return ahead;
    }

    // The 16 rows from `first` on, for which `ahead` was read.
    template <int WN, int N>
    static DEVICE void rows(const GemmParams& p, const GemmPlace& place, Columns& c, int first,
                            const Ahead<WN>& ahead, const float (&acc)[N][4])
    {
        using Lanes = GemmLanes<WN, 8>;
        using Staging = GemmStaging<WN>;
        uint32_t lane = ptx::lane_id();
        uint32_t chunk = lane % Lanes::LANES;
        Staging::write(place.staging, acc, lane);
        ptx::warp_sync();
        UNROLL
        for (int i = 0; i < Lanes::COUNT; i++) {
            uint32_t r = i * Lanes::STEP + lane / Lanes::LANES;
            int row = first + int(r);
            GemmQuad lower = Staging::read(place.staging, r, 2 * chunk);
            GemmQuad upper = Staging::read(place.staging, r, 2 * chunk + 1);
            float v[8] = {lower.x[0], lower.x[1], lower.x[2], lower.x[3],
                          upper.x[0], upper.x[1], upper.x[2], upper.x[3]};
            if (!c.inside || row >= place.end) continue;
            bool live = row < place.live;
            if constexpr (GRADIENT) {
                slope(c.curve, v, ahead.side[i]);
                UNROLL
                for (int j = 0; j < 8; j++) {
                    v[j] = live ? v[j] : 0.0f;
                    c.sums[j] += v[j];
                }
            } else {
                forward(p, c.curve, v, ahead.side[i], c.bias, c.gamma, row, c.column, live);
            }
            Vec16 packed = pack_8(v);
            Global<bf16>(p.out).store_16(row * p.ldc + c.column, packed);
        }
        ptx::warp_sync();
    }

    template <int BN, int WARPS_M, int WN, int M, int N>
    static DEVICE void run(const GemmParams& p, const GemmPlace& place, const float (&acc)[M][N][4])
    {
        Columns c = columns<WN>(p, place, place.column);
        UNROLL
        for (int m = 0; m < M; m++) {
            int first = place.row + m * 16;
            rows<WN>(p, place, c, first, read<WN>(p, place, place.column, first), acc[m]);
        }
        if constexpr (GRADIENT) {
            if (p.workspace != nullptr) column_sums<BN, WARPS_M, WN>(p, place, c.sums);
        }
    }

    static DEVICE void forward(const GemmParams& p, const GeluCurve& curve, float (&v)[8], const Vec16& side,
                               const float (&bias)[8], const float (&gamma)[8], int row, int column, bool live)
    {
        UNROLL
        for (int j = 0; j < 8; j++) v[j] = live ? v[j] + bias[j] : 0.0f;
        if (p.pre != nullptr) Global<bf16>(p.pre).store_16(row * p.ld_pre + column, pack_8(v));
        if (p.gelu != GELU_NONE) {
            UNROLL
            for (int j = 0; j < 8; j++) v[j] = gelu(curve, v[j]);
        }
        float keep = p.keep != nullptr && live ? Global<const float>(p.keep).load(row) : 1.0f;
        UNROLL
        for (int j = 0; j < 4; j++) {
            v[2 * j] = ptx::fused_multiply_add(keep * gamma[2 * j], v[2 * j], low(side.word[j]));
            v[2 * j + 1] = ptx::fused_multiply_add(keep * gamma[2 * j + 1], v[2 * j + 1], high(side.word[j]));
        }
    }

    static DEVICE void slope(const GeluCurve& curve, float (&v)[8], const Vec16& pre)
    {
        UNROLL
        for (int j = 0; j < 4; j++) {
            v[2 * j] *= gelu_slope(curve, low(pre.word[j]));
            v[2 * j + 1] *= gelu_slope(curve, high(pre.word[j]));
        }
    }

    // Sums of a warp's rows, by a tree over its lanes, to WN floats of shared memory from `first` on.
    template <int WN>
    static DEVICE void warp_sums(const Shared<float>& columns, int first, float (&sums)[8])
    {
        using Lanes = GemmLanes<WN, 8>;
        uint32_t lane = ptx::lane_id();
        UNROLL
        for (int j = 0; j < 8; j++) {
            UNROLL
            for (int mask = Lanes::LANES; mask < 32; mask *= 2) sums[j] += ptx::shuffle_xor(sums[j], mask);
        }
        if (lane < Lanes::LANES) {
            UNROLL
            for (int j = 0; j < 8; j++) columns.store(first + int(lane) * 8 + j, sums[j]);
        }
    }

    // Sums of the block's rows: of each warp, then over the warps one after the other.
    template <int BN, int WARPS_M, int WN>
    static DEVICE void column_sums(const GemmParams& p, const GemmPlace& place, float (&sums)[8])
    {
        Shared<float> columns(place.columns);
        warp_sums<WN>(columns, place.warp_m * BN + place.column - place.tile_column, sums);
        ptx::barrier();
        Global<float> workspace(p.workspace);
        for (int c = threadIdx.x; c < BN && place.tile_column + c < p.n; c += blockDim.x) {
            float sum = columns.load(c);
            UNROLL
            for (int w = 1; w < WARPS_M; w++) sum += columns.load(w * BN + c);
            workspace.store(int64_t(place.tile_m) * p.n + place.tile_column + c, sum);
        }
    }
};

using GemmStore = GemmOut<false>;
using GemmGeluGrad = GemmOut<true>;

// f32 results: one slice of k goes to `sum`, added to or overwritten as the flag in memory says; of several
// slices each goes to its own matrix in the workspace, and sum_slices adds them up.
struct GemmSum {
    static constexpr bool COLUMN_SUMS = false;
    static constexpr bool SQUARES = true;

    // Where the four columns of a lane go, and the sum of the squares of what it has written.
    struct Columns {
        Global<float> target;
        int64_t stride;
        int64_t origin;
        bool add;
        bool inside;
        bool squared;
        double squares;
    };

    // The columns of this lane, of WN from `first` on.
    template <int WN>
    static DEVICE Columns columns(const GemmParams& p, const GemmPlace& place, int first)
    {
        int column = first + int(ptx::lane_id() % GemmLanes<WN, 4>::LANES) * 4;
        bool sliced = place.splits > 1;
        return Columns{Global<float>(sliced ? p.workspace : p.sum), sliced ? int64_t(p.n) : p.ldc,
                       (sliced ? int64_t(place.split) * p.m * p.n : int64_t(0)) + column,
                       !sliced && accumulates(p.accumulate), column < p.n, !sliced && p.squares != nullptr, 0.0};
    }

    // What a lane needs for 16 rows of what it adds to.
    template <int WN>
    struct Ahead {
        Vec16 before[GemmLanes<WN, 4>::COUNT];
    };

    // Reads it, for WN columns from `column` and the 16 rows from `first` on.
    template <int WN>
    static DEVICE Ahead<WN> read(const GemmParams& p, const GemmPlace& place, int column, int first)
    {
        using Lanes = GemmLanes<WN, 4>;
        Columns c = columns<WN>(p, place, column);
        Ahead<WN> ahead;
        UNROLL
        for (int i = 0; i < Lanes::COUNT; i++) {
            int row = first + i * Lanes::STEP + int(ptx::lane_id() / Lanes::LANES);
            ahead.before[i] = Vec16{{0, 0, 0, 0}};
            if (c.add && c.inside && row < place.end) ahead.before[i] = c.target.load_16(c.origin + row * c.stride);
        }
        return ahead;
    }

    // The 16 rows from `first` on, for which `ahead` was read.
    template <int WN, int N>
    static DEVICE void rows(const GemmParams& p, const GemmPlace& place, Columns& c, int first,
                            const Ahead<WN>& ahead, const float (&acc)[N][4])
    {
        using Lanes = GemmLanes<WN, 4>;
        using Staging = GemmStaging<WN>;
        uint32_t lane = ptx::lane_id();
        uint32_t chunk = lane % Lanes::LANES;
        Staging::write(place.staging, acc, lane);
        ptx::warp_sync();
        UNROLL
        for (int i = 0; i < Lanes::COUNT; i++) {
            uint32_t r = i * Lanes::STEP + lane / Lanes::LANES;
            int row = first + int(r);
            GemmQuad v = Staging::read(place.staging, r, chunk);
            if (!c.inside || row >= place.end) continue;
            Vec16 after;
            float sum[4];
            UNROLL
            for (int j = 0; j < 4; j++) {
                float x = row < place.live ? v.x[j] : 0.0f;
                sum[j] = bits_to_float(ahead.before[i].word[j]) + x;
                after.word[j] = float_to_bits(sum[j]);
            }
            c.target.store_16(c.origin + row * c.stride, after);
            if (c.squared) c.squares += squares_of_four(sum);
        }
        ptx::warp_sync();
    }

    template <int BN, int WARPS_M, int WN, int M, int N>
    static DEVICE void run(const GemmParams& p, const GemmPlace& place, const float (&acc)[M][N][4])
    {
        Columns c = columns<WN>(p, place, place.column);
        UNROLL
        for (int m = 0; m < M; m++) {
            int first = place.row + m * 16;
            rows<WN>(p, place, c, first, read<WN>(p, place, place.column, first), acc[m]);
        }
        store_squares<WARPS_M, WN>(p, place, place.column, c);
    }

    // Stores the squares of the WN columns from `first` on that this warp has written, of WARPS_M warps along m: to
    // [tile of m, warp along m, part of n].
    template <int WARPS_M, int WN>
    static DEVICE void store_squares(const GemmParams& p, const GemmPlace& place, int first, const Columns& c)
    {
        if (!c.squared || first >= p.n) return;
        double sum = warp_sum(c.squares);
        int64_t row = int64_t(place.tile_m) * WARPS_M + place.warp_m;
        if (ptx::lane_id() == 0) Global<double>(p.squares).store(row * ceil_div(p.n, WN) + first / WN, sum);
    }
};
