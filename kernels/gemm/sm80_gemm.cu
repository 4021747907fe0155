// C = A op B with bf16 operands and f32 accumulators: mma.m16n8k16 fed by ldmatrix from a ring of tiles that
// cp.async fills.
//
//   NT   A [m, k], B [n, k]   y = x wᵀ
//   NN   A [m, k], B [k, n]   dx = dy w
//   TN   A [k, m], B [k, n]   dw = dyᵀ x
//
// All row-major with any stride between rows; an operand whose rows are k is transposed on its way from shared
// memory to registers. m is free, and k for TN; every other extent is a multiple of 8.
//
// A block computes BM x BN of C, a warp WM x WN of it, in steps of BK along k. Tiles of `stages` steps lie in
// shared memory: while one is multiplied the others are on their way. Fragments are double-buffered in
// registers: those of the next 16 k are read before the present ones are multiplied.
//
// Blocks walk down `group` columns of tiles before they go on to the next group, so that the blocks that run at
// the same time read a nearly square part of A and B, which L2 holds.
//
// With `live`, the rows of the batch from *live on hold anything, NaN even: they are rows of A for NT and NN
// (never read, and the result's rows are zeros), and the last of k for TN (never read).
//
// Grid: x tiles of C, y slices of k (f32 results alone).
//
// Where rows come or go in chunks, blocks stay for every (grid)th tile; shards.cuh tells of flags and order.
#include "../common/tile.cuh"
#include "epilogue.cuh"
#include "shards.cuh"

struct GemmShardedParams {
    GemmParams gemm;
    GemmShards shards;
};

// One operand: EXTENT rows or columns of C and BK of k make a tile.
template <bool ROWS_ARE_K, int EXTENT, int BK, int THREADS>
struct GemmOperand {
    static constexpr int ROWS = ROWS_ARE_K ? BK : EXTENT;
    static constexpr int ROW_BYTES = 2 * (ROWS_ARE_K ? EXTENT : BK);
    static constexpr int BYTES = ROWS * ROW_BYTES;
    using Copy = TileCopy<ROWS, ROW_BYTES, THREADS>;

    Copy copy;
    Global<const bf16> source;
    int64_t stride;
    int64_t index;  // of this thread's first chunk in the next tile
    int bound;      // rows of the tile that exist; where rows are k: not 0 if this thread's columns exist

    // `first` is the tile's first row or column of C, `end` how many there are, `k` where to begin.
    DEVICE GemmOperand(const bf16* source, int64_t stride, int first, int end, int k)
        : copy(threadIdx.x), source(source), stride(stride)
    {
        int chunk = int(copy.chunk) * 8;
        if (ROWS_ARE_K) {
            index = (k + int64_t(copy.row)) * stride + first + chunk;
            bound = first + chunk < end;
        } else {
            index = (first + int64_t(copy.row)) * stride + k + chunk;
            bound = end - first;
        }
    }

    // Begins to copy the next tile, of which `left` of k exist.
    DEVICE void load(uint32_t base, int left)
    {
        if (ROWS_ARE_K) {
            copy.copy(base, source, index, stride, bound != 0 ? left : 0);
            index += BK * stride;
        } else {
            copy.copy(base, source, index, stride, int(copy.chunk) * 8 < left ? bound : 0);
            index += BK;
        }
    }
};

// Waits until at most `stages - 2` of the groups of copies are under way: the next tile has arrived.
DEVICE void gemm_wait(int stages)
{
    if (stages == 3) {
        ptx::cp_async_wait<1>();
    } else if (stages == 4) {
        ptx::cp_async_wait<2>();
    } else if (stages == 5) {
        ptx::cp_async_wait<3>();
    } else {
        ptx::cp_async_wait<4>();
    }
}

// A tile of C and a slice of its k.
struct GemmTile {
    int chunk;            // of rows, where they are in some
    int tile_m;           // number along m
    int first_m, first_n; // first row and column
    int end;              // rows from here on are another tile's
    int live;             // those from here on are zeros
    int split, splits;
    int first_k, end_k;   // no k where the tile has no live row
};

// `again` tells the tile once more when it has been computed, so that nothing of it needs a register meanwhile.
template <GemmLayout LAYOUT, int BM, int BN, int BK, int WM, int WN, class Epilogue, class Rows, class Again>
DEVICE void gemm_tile(const GemmParams& p, const GemmTile& tile, Again again)
{
    constexpr bool A_ROWS_ARE_K = LAYOUT == GemmLayout::TN;
    constexpr bool B_ROWS_ARE_K = LAYOUT != GemmLayout::NT;
    constexpr int WARPS_M = BM / WM;
    constexpr int WARPS_N = BN / WN;
    constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    constexpr int STEPS = BK / 16;
    constexpr int M = WM / 16;
    constexpr int N = WN / 8;
    using A = GemmOperand<A_ROWS_ARE_K, BM, BK, THREADS>;
    using B = GemmOperand<B_ROWS_ARE_K, BN, BK, THREADS>;
    using TileA = Tile<A::ROW_BYTES>;
    using TileB = Tile<B::ROW_BYTES>;
    constexpr int STAGE = A::BYTES + B::BYTES;
    static_assert(STEPS % 2 == 0, "the buffers of fragments alternate");

    int tiles = tile.first_k < tile.end_k ? ceil_div(tile.end_k - tile.first_k, BK) : 0;
    A a(p.a, p.lda, tile.first_m, tile.live, tile.first_k);
    B b(p.b, p.ldb, tile.first_n, p.n, tile.first_k);
    uint32_t shared = ptx::shared_base();
    uint32_t lane = ptx::lane_id();
    uint32_t warp = ptx::warp_id();
    uint32_t warp_m = warp / WARPS_N;
    uint32_t warp_n = warp % WARPS_N;

    // The first fragments of this lane, in stage 0.
    uint32_t first_a = A_ROWS_ARE_K ? TileA::transposed_a(shared, 0, warp_m * WM / 8, lane)
                                    : TileA::row_major_a(shared, warp_m * WM, 0, lane);
    uint32_t first_b = B_ROWS_ARE_K ? TileB::row_major_b(shared + A::BYTES, 0, warp_n * WN / 8, lane)
                                    : TileB::column_major_b(shared + A::BYTES, warp_n * WN, 0, lane);

    float acc[M][N][4];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) {
            UNROLL
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
        }
    }

    uint32_t fragment_a[2][M][4];
    uint32_t fragment_b[2][N][2];
    auto read = [&](uint32_t stage, int step, int buffer) {
        uint32_t from_a = first_a + stage * STAGE;
        uint32_t from_b = first_b + stage * STAGE;
        UNROLL
        for (int m = 0; m < M; m++) {
            if constexpr (A_ROWS_ARE_K) {
                ptx::ldmatrix_x4_trans(fragment_a[buffer][m],
                                       TileA::rows(from_a, step * 16) ^ TileA::chunks(m * 2));
            } else {
                ptx::ldmatrix_x4(fragment_a[buffer][m], TileA::rows(from_a, m * 16) ^ TileA::chunks(step * 2));
            }
        }
        UNROLL
        for (int n = 0; n < N; n += 2) {
            uint32_t two[4];
            if constexpr (B_ROWS_ARE_K) {
                ptx::ldmatrix_x4_trans(two, TileB::rows(from_b, step * 16) ^ TileB::chunks(n));
            } else {
                ptx::ldmatrix_x4(two, TileB::rows(from_b, n * 8) ^ TileB::chunks(step * 2));
            }
            fragment_b[buffer][n][0] = two[0];
            fragment_b[buffer][n][1] = two[1];
            fragment_b[buffer][n + 1][0] = two[2];
            fragment_b[buffer][n + 1][1] = two[3];
        }
    };

    // Fills all stages but one. Every thread closes a group per tile, be there one or not.
    int left = tile.end_k - tile.first_k;
    for (int stage = 0; stage < p.stages - 1; stage++) {
        if (stage < tiles) {
            a.load(shared + stage * STAGE, left);
            b.load(shared + stage * STAGE + A::BYTES, left);
            left -= BK;
        }
        ptx::cp_async_commit();
    }
    uint32_t reading = 0;
    uint32_t writing = p.stages - 1;
    if (tiles > 0) {
        gemm_wait(p.stages);
        ptx::barrier();
        read(0, 0, 0);
    }

    for (int step_k = 0; step_k < tiles; step_k++) {
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            // The stage that is written was read for the last time before the barrier of the tile before.
            if (step == 0) {
                if (step_k + p.stages - 1 < tiles) {
                    a.load(shared + writing * STAGE, left);
                    b.load(shared + writing * STAGE + A::BYTES, left);
                    left -= BK;
                }
                ptx::cp_async_commit();
                writing = reading;
            }
            if (step < STEPS - 1) {
                read(reading, step + 1, (step + 1) % 2);
            } else if (step_k + 1 < tiles) {
                gemm_wait(p.stages);
                ptx::barrier();
                reading = int(reading) + 1 < p.stages ? reading + 1 : 0;
                read(reading, 0, 0);
            }
            ptx::mma_tiles(acc, fragment_a[step % 2], fragment_b[step % 2]);
        }
    }
    if (!Rows::SHARDED) ptx::launch_dependents();

    // The epilogue has the shared memory to itself.
    ptx::cp_async_wait<0>();
    ptx::barrier();
    GemmTile at = again();
    GemmPlace place;
    place.staging = shared + warp * GemmStaging<WN>::BYTES;
    place.columns = shared + WARPS_M * WARPS_N * GemmStaging<WN>::BYTES;
    place.row = at.first_m + int(warp_m) * WM;
    place.column = at.first_n + int(warp_n) * WN;
    place.tile_m = at.tile_m;
    place.tile_column = at.first_n;
    place.warp_m = int(warp_m);
    place.live = at.live;
    place.end = at.end;
    place.split = at.split;
    place.splits = at.splits;
    Epilogue::template run<BN, WARPS_M, WN>(p, place, acc);
}

template <GemmLayout LAYOUT, int BM, int BN, int BK, int WM, int WN, class Epilogue>
DEVICE void gemm(const GemmParams& p)
{
    constexpr bool A_ROWS_ARE_K = LAYOUT == GemmLayout::TN;
    ptx::dependency_wait();
    GemmStep step(int(blockIdx.x), p.group, ceil_div(p.m, BM), ceil_div(p.n, BN));
    int live_m = p.m;
    int live_k = p.k;
    if (p.live != nullptr) {
        int live = Global<const int>(p.live).load(0);
        if (A_ROWS_ARE_K) {
            live_k = live < live_k ? live : live_k;
        } else {
            live_m = live < live_m ? live : live_m;
        }
    }
    int slice = ceil_div(ceil_div(live_k, BK), int(gridDim.y)) * BK;
    GemmTile tile;
    tile.chunk = 0;
    tile.tile_m = step.m;
    tile.first_m = step.m * BM;
    tile.first_n = step.n * BN;
    tile.end = p.m;
    tile.live = live_m;
    tile.split = int(blockIdx.y);
    tile.splits = int(gridDim.y);
    tile.first_k = int(blockIdx.y) * slice;
    tile.end_k = tile.first_k + slice < live_k ? tile.first_k + slice : live_k;
    if (tile.first_m >= live_m) tile.end_k = 0;
    gemm_tile<LAYOUT, BM, BN, BK, WM, WN, Epilogue, GemmWhole>(p, tile, [&] { return tile; });
}

// The tile of an item of work, where `live` rows of the batch live.
template <int BM, int BN>
DEVICE GemmTile gemm_chunk_tile(const GemmShardedParams& p, int item, int live)
{
    int tiles_m = ceil_div(p.shards.rows, BM);
    int tiles_n = ceil_div(p.gemm.n, BN);
    int number = item / (tiles_m * tiles_n);
    GemmStep step(item - number * (tiles_m * tiles_n), p.gemm.group, tiles_m, tiles_n);
    GemmTile tile;
    tile.chunk = p.shards.order[number];
    tile.tile_m = step.m;
    tile.first_m = tile.chunk * p.shards.rows + step.m * BM;
    tile.first_n = step.n * BN;
    tile.end = (tile.chunk + 1) * p.shards.rows;
    tile.live = live < tile.end ? live : tile.end;
    tile.split = 0;
    tile.splits = 1;
    tile.first_k = 0;
    tile.end_k = tile.first_m < tile.live ? p.gemm.k : 0;
    return tile;
}

template <GemmLayout LAYOUT, int BM, int BN, int BK, int WM, int WN, class Epilogue>
DEVICE void gemm_sharded(const GemmShardedParams& p)
{
    static_assert(LAYOUT != GemmLayout::TN, "the rows of a are those of the result");
    ptx::dependency_wait();
    const GemmShards& shards = p.shards;
    GemmSharded rows{shards};
    int live = p.gemm.live == nullptr ? p.gemm.m : Global<const int>(p.gemm.live).load(0);
    int tiles = ceil_div(shards.rows, BM) * ceil_div(p.gemm.n, BN);
    for (int item = int(blockIdx.x); item < shards.chunks * tiles; item += int(gridDim.x)) {
        GemmTile tile = gemm_chunk_tile<BM, BN>(p, item, live);
        if (tile.end_k > 0 && threadIdx.x == 0) rows.await(tile.chunk);
        // Its rows are there for all threads, and shared memory is no longer that of the epilogue before.
        ptx::barrier();
        auto again = [&] { return gemm_chunk_tile<BM, BN>(p, ptx::unknown(item), live); };
        gemm_tile<LAYOUT, BM, BN, BK, WM, WN, Epilogue, GemmSharded>(p.gemm, tile, again);
        if (ptx::lane_id() == 0) rows.count(again().chunk);
    }
    if (threadIdx.x == 0) rows.end();
    ptx::launch_dependents();
}
