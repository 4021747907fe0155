// C = A op B with bf16 operands and f32 accumulators on Hopper: wgmma fed by a ring of tiles that the tensor memory
// accelerator fills. Layouts, operands and results as in sm80_gemm.cu; an operand whose rows are k is taken as it is.
//
// A block is three warpgroups and stays for many tiles. One thread of the first copies stage after stage, tile after
// tile, as fast as the others give stages back. The other two multiply:
//
//   cooperative   both have half the rows of each tile
//   ping-pong     each has every other tile, so that one writes its result while the other multiplies
//
// Ping-pong they multiply by turns. Were one to look ahead to a tile whose stages hold another's still, it would take a
// parity of two phases ago for that of its own; and the tensor cores are better used by one of them at its full rate.
//
// Clusters are two blocks whose tiles lie next to each other, along m or (where SHARE_A) along n: what both need, each
// copies half of for both. At an edge one of them has a tile outside the result; it copies its share, and what it
// would compute is zeros that nobody writes.
//
// Items of work are pairs of tiles, and slices of k for f32 results. Pairs are walked down `group` columns at a time,
// as in sm80_gemm.cu.
//
// Rows of the batch that do not live are never used: they only reach dead rows of the result, which become zeros, and
// where they are the last of k (TN) they are cleared in shared memory.
//
// Where rows come or go in chunks (shards.cuh), pairs are those of a chunk, and the tensor map of a has three
// dimensions: rows behind the end of a chunk are outside and so zeros, rather than those of a chunk that may not be there.
#include "../common/ring.cuh"
#include "../common/wgmma.cuh"
#include "epilogue.cuh"
#include "shards.cuh"

struct HopperGemmParams {
    TensorMap a; // boxes of 64 k by BM rows (half of them, where shared), or of 64 columns by 64 k
    TensorMap b; // the same with BN
    GemmParams gemm;
    int splits; // slices of k
    int clusters;
};

struct HopperGemmShardedParams {
    HopperGemmParams whole; // `a` with boxes of 64 k by BM rows (or half of them) by one chunk
    GemmShards shards;
};

// A tile of one operand in shared memory: EXTENT rows or columns of C by 64 k. K-major it is one box; where rows are k
// it is boxes of 64 columns, one after another.
template <bool ROWS_ARE_K, int EXTENT, bool SHARED>
struct HopperOperand {
    static constexpr int BOXES = ROWS_ARE_K ? (EXTENT + 63) / 64 : 1;
    static constexpr uint32_t BOX_BYTES = ROWS_ARE_K ? 64 * 128 : EXTENT * 128;
    static constexpr uint32_t BYTES = BOXES * BOX_BYTES;
    static_assert(BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");

    // Begins to copy the tile at `first`, or of what the cluster shares the half of this block.
    static DEVICE void load(uint32_t address, const TensorMap& map, int first, int k, uint32_t mbarrier, uint32_t rank)
    {
        if constexpr (!SHARED) {
            UNROLL
            for (int i = 0; i < BOXES; i++) {
                uint32_t box = address + i * BOX_BYTES;
                if constexpr (ROWS_ARE_K) {
                    ptx::tensor_load(box, map, {first + 64 * i, k}, mbarrier);
                } else {
                    ptx::tensor_load(box, map, {k, first}, mbarrier);
                }
            }
        } else if constexpr (ROWS_ARE_K) {
            UNROLL
            for (int i = 0; i < BOXES; i++) {
                if (uint32_t(i % 2) != rank) continue;
                ptx::tensor_load_multicast(address + i * BOX_BYTES, map, {first + 64 * i, k}, mbarrier, 3);
            }
        } else {
            ptx::tensor_load_multicast(address + rank * (BYTES / 2), map, {k, first + int(rank) * (EXTENT / 2)},
                                       mbarrier, 3);
        }
    }

    // The same of rows `first` on of a chunk.
    static DEVICE void load_chunk(uint32_t address, const TensorMap& map, int first, int k, int chunk,
                                  uint32_t mbarrier, uint32_t rank)
    {
        static_assert(!ROWS_ARE_K, "chunks are of rows of the result");
        if constexpr (SHARED) {
            ptx::tensor_load_multicast(address + rank * (BYTES / 2), map, {k, first + int(rank) * (EXTENT / 2), chunk},
                                       mbarrier, 3);
        } else {
            ptx::tensor_load(address, map, {k, first, chunk}, mbarrier);
        }
    }

    // The operand of wgmma from row or column `first` of the tile on, at the first 16 k.
    static DEVICE uint64_t matrix(uint32_t address, uint32_t first)
    {
        uint32_t begin = address + first / 64 * (64 * 128);
        return ptx::wgmma_matrix(begin, ROWS_ARE_K ? BOX_BYTES : 16, 1024, Swizzle::bytes_128);
    }

    // Bytes to the next 16 k.
    static constexpr uint32_t STEP = ROWS_ARE_K ? 16 * 128 : 32;

    // Clears k from `valid` on, by `threads` threads.
    static DEVICE void clear(uint32_t address, int valid, uint32_t thread, uint32_t threads)
    {
        for (uint32_t i = thread; i < uint32_t(BOXES * 64 * 8); i += threads) {
            if (int(i / 8 % 64) >= valid) {
                Shared<Vec16>(address + i / 512 * BOX_BYTES + i % 512 * 16).store(0, Vec16{{0, 0, 0, 0}});
            }
        }
    }
};

template <GemmLayout LAYOUT, int BM, int BN, bool PINGPONG, class Epilogue, class Rows>
struct HopperGemm {
    static constexpr bool SHARDED = Rows::SHARDED;
    static_assert(!SHARDED || LAYOUT != GemmLayout::TN, "the rows of a are those of the result");
    static constexpr bool A_ROWS_ARE_K = LAYOUT == GemmLayout::TN;
    static constexpr bool B_ROWS_ARE_K = LAYOUT != GemmLayout::NT;
    static constexpr bool SHARE_A = BM > BN;
    static constexpr uint32_t CONSUMERS = 2;                       // warpgroups that multiply
    static constexpr int GROUP_M = PINGPONG ? BM : BM / 2;         // rows of a tile that one of them has
    static constexpr int BLOCKS = GROUP_M / 64;                    // of 64 rows
    static constexpr uint32_t GIVERS = PINGPONG ? 2 : 4;           // of a stage, in both blocks
    using A = HopperOperand<A_ROWS_ARE_K, BM, SHARE_A>;
    using B = HopperOperand<B_ROWS_ARE_K, BN, !SHARE_A>;
    static constexpr uint32_t STAGE_BYTES = A::BYTES + B::BYTES;
    // Of each warp that multiplies, 16 rows of 64 f32; and column sums.
    static constexpr uint32_t STAGING_BYTES = 16 * 64 * 4;
    static constexpr uint32_t COLUMN_BYTES = Epilogue::COLUMN_SUMS ? CONSUMERS * 4 * BN * 4 : 0;
    static constexpr uint32_t MBARRIER_BYTES = 1024;
    static constexpr uint32_t REST_BYTES = MBARRIER_BYTES + CONSUMERS * 4 * STAGING_BYTES + COLUMN_BYTES;
    // What a block is launched with: a KiB less than there is, in case that the system's own counts.
    static constexpr uint32_t SHARED_BYTES = 231424;
    static constexpr int STAGES = int((SHARED_BYTES - 1024 - REST_BYTES) / STAGE_BYTES);
    static_assert(STAGES >= 3, "a shorter ring hides nothing");
    static_assert(BM % 128 == 0 && BN % 16 == 0, "");

    // An item of work as this block sees it.
    struct Work {
        int tile_m, tile_n, split;
        int chunk; // and where it begins
        int first_m;
        int first_k, end_k;
        int steps; // of 64 k
    };

    const HopperGemmParams& p;
    Rows rows;
    uint32_t rank;
    uint32_t full, empty, staging, columns, ring;
    int pairs_m, pairs_n, items;
    int live_m, live_k;

    DEVICE HopperGemm(const HopperGemmParams& p, Rows rows) : p(p), rows(rows), rank(ptx::cluster_rank())
    {
        // The ring begins where the swizzle does.
        ring = (ptx::shared_base() + 1023) / 1024 * 1024;
        full = ring + STAGES * STAGE_BYTES;
        empty = full + 8 * STAGES;
        staging = full + MBARRIER_BYTES;
        columns = staging + CONSUMERS * 4 * STAGING_BYTES;
        const GemmParams& g = p.gemm;
        int tiles_m = ceil_div(chunk_rows(), BM);
        int tiles_n = ceil_div(g.n, BN);
        pairs_m = SHARE_A ? tiles_m : ceil_div(tiles_m, 2);
        pairs_n = SHARE_A ? ceil_div(tiles_n, 2) : tiles_n;
        items = pairs_m * pairs_n * p.splits;
        if constexpr (SHARDED) items *= rows.p.chunks;
    }

    // Rows of the result among which a pair of tiles lies.
    DEVICE int chunk_rows() const
    {
        if constexpr (SHARDED) {
            return rows.p.rows;
        } else {
            return p.gemm.m;
        }
    }

    // Reads how many rows live; after the wait for the launch before.
    DEVICE void read_live()
    {
        const GemmParams& g = p.gemm;
        live_m = g.m;
        live_k = g.k;
        if (g.live == nullptr) return;
        int live = Global<const int>(g.live).load(0);
        if (A_ROWS_ARE_K) {
            live_k = live < live_k ? live : live_k;
        } else {
            live_m = live < live_m ? live : live_m;
        }
    }

    DEVICE Work work(int item) const
    {
        Work w;
        int pairs = pairs_m * pairs_n;
        int number = item / pairs;
        GemmStep pair(item - number * pairs, p.gemm.group, pairs_m, pairs_n);
        w.split = SHARDED ? 0 : number;
        w.chunk = 0;
        if constexpr (SHARDED) w.chunk = rows.p.order[number];
        w.first_m = SHARDED ? w.chunk * chunk_rows() : 0;
        w.tile_m = SHARE_A ? pair.m : 2 * pair.m + int(rank);
        w.tile_n = SHARE_A ? 2 * pair.n + int(rank) : pair.n;
        int slice = ceil_div(ceil_div(live_k, 64), p.splits) * 64;
        w.first_k = w.split * slice;
        w.end_k = w.first_k + slice < live_k ? w.first_k + slice : live_k;
        // Both blocks of the cluster must come to the same number.
        int first_m = (SHARE_A ? pair.m : 2 * pair.m) * BM;
        w.steps = w.first_m + first_m < live_m && w.first_k < w.end_k ? ceil_div(w.end_k - w.first_k, 64) : 0;
        return w;
    }

    // One thread: copies.
    DEVICE void copy()
    {
        HopperRing<STAGES> at;
        for (int item = int(blockIdx.x) / 2; item < items; item += p.clusters) {
            Work w = work(item);
            int k = w.first_k;
            if constexpr (SHARDED) {
                if (w.steps > 0) {
                    rows.await(w.chunk);
                    ptx::fence_proxy_async_global();
                }
            }
            for (int step = 0; step < w.steps; step++, k += 64, at.next()) {
                uint32_t mbarrier = full + 8 * at.stage;
                uint32_t address = ring + at.stage * STAGE_BYTES;
                ptx::mbarrier_wait(empty + 8 * at.stage, at.parity ^ 1);
                ptx::mbarrier_arrive_expect(mbarrier, STAGE_BYTES);
                if constexpr (SHARDED) {
                    A::load_chunk(address, p.a, w.tile_m * BM, k, w.chunk, mbarrier, rank);
                } else {
                    A::load(address, p.a, w.tile_m * BM, k, mbarrier, rank);
                }
                B::load(address + A::BYTES, p.b, w.tile_n * BN, k, mbarrier, rank);
            }
        }
        if constexpr (SHARDED) rows.end();
        // The next launch may take the multiprocessors that run out of work; it waits before it reads results.
        ptx::launch_dependents();
    }

    // Gives a stage back to both blocks that fill it.
    DEVICE void release(uint32_t stage, uint32_t thread) const
    {
        if (thread < 2) ptx::mbarrier_free_peer(ptx::peer_address(empty + 8 * stage, thread));
    }

    // A warpgroup: multiplies and writes results.
    DEVICE void multiply(uint32_t group)
    {
        uint32_t thread = threadIdx.x % 128;
        HopperRing<STAGES> at;
        uint32_t turn = 0;
        for (int item = int(blockIdx.x) / 2; item < items; item += p.clusters, turn ^= 1) {
            Work w = work(item);
            if (PINGPONG && turn != group) {
                at.skip(w.steps);
                continue;
            }
            float d[BLOCKS][BN / 2];
            UNROLL
            for (int i = 0; i < BLOCKS; i++) {
                UNROLL
                for (int j = 0; j < BN / 2; j++) d[i][j] = 0.0f;
            }
            if (PINGPONG && item >= p.clusters) ptx::barrier(turn_of(group), 256);
            uint32_t before = 0;
            for (int step = 0; step < w.steps; step++, at.next()) {
                uint32_t address = ring + at.stage * STAGE_BYTES;
                ptx::mbarrier_wait(full + 8 * at.stage, at.parity);
                if constexpr (A_ROWS_ARE_K) clear_dead(address, w.end_k - w.first_k - 64 * step, group, thread);
                uint32_t row = PINGPONG ? 0 : group * GROUP_M;
                fence(d);
                UNROLL
                for (int i = 0; i < 4; i++) {
                    uint64_t b = ptx::wgmma_advance(B::matrix(address + A::BYTES, 0), i * B::STEP);
                    UNROLL
                    for (int j = 0; j < BLOCKS; j++) {
                        uint64_t a = ptx::wgmma_advance(A::matrix(address, row + 64 * j), i * A::STEP);
                        ptx::wgmma<bf16, BN, A_ROWS_ARE_K, B_ROWS_ARE_K>(d[j], a, b, true);
                    }
                }
                ptx::wgmma_commit();
                // The products of the step before have been computed.
                wait<1>(d);
                if (step > 0) release(before, thread);
                before = at.stage;
            }
            if (PINGPONG && item + p.clusters < items) ptx::barrier_arrive(turn_of(group ^ 1), 256);
            wait<0>(d);
            if (w.steps > 0) release(before, thread);
            write(w, group, d);
        }
    }

    // Named barriers: of a warpgroup alone (of both, cooperative), and where it waits for its turn to multiply.
    static DEVICE uint32_t own(uint32_t group) { return PINGPONG ? 1 + group : 1; }
    static DEVICE uint32_t turn_of(uint32_t group) { return 3 + group; }

    static DEVICE void fence(float (&d)[BLOCKS][BN / 2])
    {
        if constexpr (BLOCKS == 1) {
            ptx::wgmma_fence(d[0]);
        } else {
            ptx::wgmma_fence(d[0], d[1]);
        }
    }

    template <int PENDING>
    static DEVICE void wait(float (&d)[BLOCKS][BN / 2])
    {
        if constexpr (BLOCKS == 1) {
            ptx::wgmma_wait<PENDING>(d[0]);
        } else {
            ptx::wgmma_wait<PENDING>(d[0], d[1]);
        }
    }

    // Clears the rows of k that do not live, of which the stage has some behind `valid`.
    DEVICE void clear_dead(uint32_t address, int valid, uint32_t group, uint32_t thread) const
    {
        if (valid >= 64 || live_k == p.gemm.k) return;
        constexpr uint32_t THREADS = PINGPONG ? 128 : 256;
        uint32_t first = PINGPONG ? thread : group * 128 + thread;
        A::clear(address, valid, first, THREADS);
        B::clear(address + A::BYTES, valid, first, THREADS);
        ptx::fence_proxy_async();
        ptx::barrier(own(group), THREADS);
    }

    // Writes the part of a tile that this warpgroup has.
    DEVICE void write(const Work& w, uint32_t group, const float (&d)[BLOCKS][BN / 2]) const
    {
        uint32_t warp = threadIdx.x % 128 / 32;
        GemmPlace place;
        place.staging = staging + (group * 4 + warp) * STAGING_BYTES;
        // Ping-pong, each warpgroup sums columns of its own tile.
        place.columns = columns + (PINGPONG ? group * 4 : 0) * BN * 4;
        place.row = w.first_m + w.tile_m * BM + (PINGPONG ? 0 : int(group) * GROUP_M) + int(warp) * 16;
        place.column = w.tile_n * BN;
        place.tile_m = w.tile_m;
        place.tile_column = place.column;
        place.warp_m = PINGPONG ? int(warp) : int(group * 4 + warp);
        place.live = live_m;
        place.end = w.first_m + chunk_rows();
        place.split = w.split;
        place.splits = p.splits;
        slice<0>(place, d, Epilogue::template read<WIDTH<0>>(p.gemm, place, place.column, place.row));
        if constexpr (Epilogue::COLUMN_SUMS) {
            if (p.gemm.workspace != nullptr) column_sums(place, group);
        }
        if constexpr (SHARDED) {
            bool inside = w.tile_m * BM < chunk_rows() && place.column < p.gemm.n;
            if (inside && ptx::lane_id() == 0) rows.count(w.chunk);
        }
    }

    // Columns of the slice at COLUMN. Beside many accumulators there are registers for half of the usual 64, and beside
    // the most none for what is read ahead.
    static constexpr int WIDEST = BLOCKS * BN >= 320 ? 32 : 64;
    static constexpr bool READS_AHEAD = BLOCKS * BN <= 320;
    template <int COLUMN>
    static constexpr int WIDTH = BN - COLUMN >= WIDEST ? WIDEST : BN - COLUMN >= 32 ? 32 : 16;

    // The slice at COLUMN and those that follow. What is read for 16 rows is asked for while the 16 before are worked
    // on; `ahead` is that for the first.
    template <int COLUMN>
    DEVICE void slice(const GemmPlace& place, const float (&d)[BLOCKS][BN / 2],
                      typename Epilogue::template Ahead<WIDTH<COLUMN>> ahead) const
    {
        constexpr int WN = WIDTH<COLUMN>;
        constexpr int NEXT = COLUMN + WN;
        auto lane = Epilogue::template columns<WN>(p.gemm, place, place.column + COLUMN);
        typename Epilogue::template Ahead<WIDTH<(NEXT < BN ? NEXT : COLUMN)>> next = {};
        auto read_more = [&](int i) {
            if (i + 1 < BLOCKS) {
                ahead = Epilogue::template read<WN>(p.gemm, place, place.column + COLUMN, place.row + 64 * (i + 1));
            } else if constexpr (NEXT < BN) {
                next = Epilogue::template read<WIDTH<NEXT>>(p.gemm, place, place.column + NEXT, place.row);
            }
        };
        UNROLL
        for (int i = 0; i < BLOCKS; i++) {
            auto own = ahead;
            if (READS_AHEAD) read_more(i);
            float acc[WN / 8][4];
            UNROLL
            for (int j = 0; j < WN / 2; j++) acc[j / 4][j % 4] = d[i][COLUMN / 2 + j];
            Epilogue::template rows<WN>(p.gemm, place, lane, place.row + 64 * i, own, acc);
            if (!READS_AHEAD) read_more(i);
        }
        if constexpr (Epilogue::COLUMN_SUMS) {
            if (p.gemm.workspace != nullptr) {
                Epilogue::template warp_sums<WN>(Shared<float>(place.columns), place.warp_m * BN + COLUMN,
                                                 lane.sums);
            }
        }
        if constexpr (Epilogue::SQUARES) {
            // Of two clustered tiles one may lie behind the last row.
            constexpr int WARPS = PINGPONG ? 4 : 8;
            // What the host counts the sums by.
            static_assert(WN == 64, "squares are left of 64 columns at a time");
            if (place.tile_m * BM < p.gemm.m) {
                Epilogue::template store_squares<WARPS, WN>(p.gemm, place, place.column + COLUMN, lane);
            }
        }
        if constexpr (NEXT < BN) slice<NEXT>(place, d, next);
    }

    // Adds up what the warps of a tile have summed, and gives the memory back.
    DEVICE void column_sums(const GemmPlace& place, uint32_t group) const
    {
        constexpr uint32_t THREADS = PINGPONG ? 128 : 256;
        constexpr int WARPS = THREADS / 32;
        ptx::barrier(own(group), THREADS);
        Shared<float> sums(place.columns);
        Global<float> workspace(p.gemm.workspace);
        int first = PINGPONG ? int(threadIdx.x % 128) : int(group * 128 + threadIdx.x % 128);
        bool inside = place.tile_m * BM < p.gemm.m;
        for (int c = first; c < BN && place.tile_column + c < p.gemm.n && inside; c += THREADS) {
            float sum = sums.load(c);
            UNROLL
            for (int w = 1; w < WARPS; w++) sum += sums.load(w * BN + c);
            workspace.store(int64_t(place.tile_m) * p.gemm.n + place.tile_column + c, sum);
        }
        ptx::barrier(own(group), THREADS);
    }
};

// What all threads of a block do.
template <class Gemm>
DEVICE void hopper_gemm(const HopperGemmParams& p, Gemm gemm)
{
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(p.a);
        ptx::prefetch_tensor_map(p.b);
        for (int stage = 0; stage < Gemm::STAGES; stage++) {
            ptx::mbarrier_init(gemm.full + 8 * stage, 1);
            // Of both blocks, each warpgroup that reads the stage.
            ptx::mbarrier_init(gemm.empty + 8 * stage, Gemm::GIVERS);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_barrier();
    ptx::dependency_wait();
    gemm.read_live();
    uint32_t group = ptx::warp_id() / 4;
    if (group == 0) {
        ptx::decrease_registers<24>();
        if (ptx::warp_id() == 0 && ptx::elect()) gemm.copy();
    } else {
        ptx::increase_registers<240>();
        gemm.multiply(group - 1);
    }
    // The peer may still give stages back to this block.
    ptx::cluster_barrier();
}

template <GemmLayout LAYOUT, int BM, int BN, bool PINGPONG, class Epilogue>
DEVICE void hopper_gemm(const HopperGemmParams& p)
{
    hopper_gemm(p, HopperGemm<LAYOUT, BM, BN, PINGPONG, Epilogue, GemmWhole>(p, {}));
}

template <GemmLayout LAYOUT, int BM, int BN, bool PINGPONG, class Epilogue>
DEVICE void hopper_gemm_sharded(const HopperGemmShardedParams& p)
{
    hopper_gemm(p.whole, HopperGemm<LAYOUT, BM, BN, PINGPONG, Epilogue, GemmSharded>(p.whole, {p.shards}));
}
