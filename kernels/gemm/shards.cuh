// Rows that come or go in chunks while a product is computed: src/kernels/gemm/sharded mirrors the arguments.
//
// The rows of a and of the result are `chunks` chunks of `rows` rows. All tiles of a chunk come before those of the
// next, in the order that is given, and no tile has rows of two chunks.
//
//   ready   all-gather into the product: whoever brings a chunk raises its flag. No row of it is read before.
//   done    product into reduce-scatter: each warp that has written its part of a tile counts it. A chunk is whole once
//           so many have been counted as it has tiles, times the warps of one.
//
// Flags are raised by what is no block of this launch, perhaps not even a kernel, so both are of the scope of the system.
//
// The block that ends last waits for the flags that nobody had to wait for, as no row of their chunks lives, and lowers
// all. So when the launch has ended every chunk has come, the flags are as they were before, and the same launch may be
// repeated with the same arguments, as a captured graph does.
#pragma once

#include "params.cuh"
#include "../common/view.cuh"

constexpr int GEMM_MOST_CHUNKS = 64;

struct GemmShards {
    int* ready;    // [chunks] 0, or not 0 where the rows are there; or null: all are
    int* ended;    // blocks that have ended, where there is `ready`; 0 before
    int* done;     // [chunks], counted up; or null
    int rows;      // of a chunk
    int chunks;    // m = chunks x rows
    int order[GEMM_MOST_CHUNKS]; // chunks as they come
};

// A product all of whose rows are there.
struct GemmWhole {
    static constexpr bool SHARDED = false;
};

// One whose rows come or go in chunks.
struct GemmSharded {
    static constexpr bool SHARDED = true;
    const GemmShards& p;

    // One thread: waits for the rows of a chunk.
    DEVICE void await(int chunk) const
    {
        if (p.ready == nullptr) return;
        Global<int> ready(p.ready);
        while (ready.load_system(chunk) == 0) {}
    }

    // One thread of a warp that has written its part of a tile, after a warp_sync.
    DEVICE void count(int chunk) const
    {
        if (p.done != nullptr) ptx::atomic_add_release_system(p.done + chunk, 1);
    }

    // One thread of each block, after all its waits.
    DEVICE void end() const
    {
        if (p.ready == nullptr || ptx::atomic_add(p.ended, 1) + 1 != int(gridDim.x)) return;
        Global<int> ready(p.ready);
        for (int chunk = 0; chunk < p.chunks; chunk++) {
            await(chunk);
            ready.store(chunk, 0);
        }
        Global<int>(p.ended).store(0, 0);
    }
};

// A tile among those of `tiles_m` rows and `tiles_n` columns of them, `group` columns of which are walked down at a time.
struct GemmStep {
    int m, n;

    DEVICE GemmStep(int number, int group, int tiles_m, int tiles_n)
    {
        int before = number / (group * tiles_m) * group;
        int width = tiles_n - before < group ? tiles_n - before : group;
        int inside = number - before * tiles_m;
        m = inside / width;
        n = before + inside % width;
    }
};
