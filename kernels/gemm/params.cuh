// Constant arguments of the GEMM kernels; src/kernels/gemm mirrors them.
#pragma once

#include "../common/types.cuh"

#include "gelu.cuh"

enum class GemmLayout {
    NT,
    NN,
    TN,
};

struct GemmParams {
    const bf16* a;          // NT, NN: [m, k]; TN: [k, m]
    const bf16* b;          // NT: [n, k]; NN, TN: [k, n]
    bf16* out;              // [m, n], where the result is bf16
    float* sum;             // [m, n], where it is f32
    const int* live;        // number of live rows of the batch, or null: all of them
    const float* bias;      // [n] or null
    bf16* pre;              // [m, n], the result before GELU is written here; or null
    const bf16* side;       // [m, n], residual, or the pre-activation of the gradient of GELU; or null
    const float* gamma;     // [n], LayerScale, or null: 1
    const float* keep;      // [m], drop-path factor of a row, or null: 1
    float* workspace;       // slices [splits, m, n] of split-K, or column sums [tiles of m, n]; or null
    double* squares;        // of `sum` where k is one slice, GemmSum::store_squares; or null
    const int* accumulate;  // whether `sum` is added to (not 0) or overwritten (0, or null)
    int64_t lda;            // elements between rows, of a
    int64_t ldb;            // of b
    int64_t ldc;            // of out or sum
    int64_t ld_pre;         // of pre
    int64_t ld_side;        // of side
    int m;
    int n;
    int k;
    int gelu;               // Gelu
    int stages;             // of the ring of tiles in shared memory, 3 to 6
    int group;              // columns of tiles that are walked down together
};
