// What the lanes of a warp do together; the last lane to come works for all.
#include "operations.h"

#include "../common/types.cuh"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace emulator {

uint32_t exchange(Collective collective, uint32_t x, uint32_t operand, Site site)
{
    Exchange own{x, operand};
    if (!meet(collective, &own, site)) return own.x;
    Warp& warp = *current->warp;
    const Thread* threads = &warp.block->threads[warp.id * 32];
    Exchange* lanes[32];
    uint32_t values[32];
    uint32_t votes = 0;
    for (uint32_t l = 0; l < 32; l++) {
        lanes[l] = static_cast<Exchange*>(warp.arguments[l]);
        values[l] = lanes[l]->x;
        votes |= uint32_t(values[l] != 0) << l;
    }
    for (uint32_t l = 0; l < 32; l++) {
        uint32_t from = lanes[l]->operand;
        if (__builtin_expect(from >= 32, 0)) {
            blamed = &threads[l];
            fail(site, "shuffles by %u: a warp has 32 lanes", from);
        }
        switch (collective) {
        case Collective::shuffle: lanes[l]->x = values[from]; break;
        case Collective::shuffle_xor: lanes[l]->x = values[l ^ from]; break;
        case Collective::shuffle_up: lanes[l]->x = values[l >= from ? l - from : l]; break;
        case Collective::ballot: lanes[l]->x = votes; break;
        default: lanes[l]->x = values[0];
        }
    }
    part();
    return own.x;
}

void load_matrices(uint32_t* registers, uint32_t address, uint32_t count, bool transposed, Site site)
{
    MatrixLoad own{registers, address};
    if (!meet(Collective::ldmatrix, &own, site)) return;
    Warp& warp = *current->warp;
    const Thread* threads = &warp.block->threads[warp.id * 32];
    uint32_t rows[4][8][4];
    for (uint32_t l = 0; l < 8 * count; l++) {
        blamed = &threads[l];
        uint32_t row = static_cast<const MatrixLoad*>(warp.arguments[l])->address;
        read_shared<16>(rows[l / 8][l % 8], row, 16, true, site);
    }
    blamed = nullptr;
    for (uint32_t l = 0; l < 32; l++) {
        uint32_t* r = static_cast<const MatrixLoad*>(warp.arguments[l])->registers;
        for (uint32_t j = 0; j < count; j++) {
            if (!transposed) {
                r[j] = rows[j][l / 4][l % 4];
                continue;
            }
            // Column l / 4 of rows 2 (l % 4) and the one below.
            uint32_t shift = 16 * (l / 4 % 2);
            uint32_t upper = rows[j][2 * (l % 4)][l / 8] >> shift & 0xffff;
            uint32_t lower = rows[j][2 * (l % 4) + 1][l / 8] >> shift & 0xffff;
            r[j] = upper | lower << 16;
        }
    }
    part();
}

void store_matrices(const uint32_t* registers, uint32_t address, uint32_t count, bool transposed, Site site)
{
    MatrixStore own{registers, address};
    if (!meet(Collective::stmatrix, &own, site)) return;
    Warp& warp = *current->warp;
    const Thread* threads = &warp.block->threads[warp.id * 32];
    for (uint32_t l = 0; l < 8 * count; l++) {
        uint32_t j = l / 8, row = l % 8;
        uint32_t values[4];
        for (uint32_t pair = 0; pair < 4; pair++) {
            auto of = [&](uint32_t lane) {
                return static_cast<const MatrixStore*>(warp.arguments[lane])->registers[j];
            };
            if (!transposed) {
                values[pair] = of(4 * row + pair);
                continue;
            }
            // Elements (2 pair, row) and (2 pair + 1, row), which lanes of other rows hold.
            uint32_t shift = 16 * (row % 2);
            uint32_t left = of(8 * pair + row / 2) >> shift & 0xffff;
            uint32_t right = of(8 * pair + 4 + row / 2) >> shift & 0xffff;
            values[pair] = left | right << 16;
        }
        blamed = &threads[l];
        write_shared<16>(static_cast<const MatrixStore*>(warp.arguments[l])->address, values, 16, site);
    }
    blamed = nullptr;
    part();
}

bool elect(Site site)
{
    bool own = false;
    if (!meet(Collective::elect, &own, site)) return own;
    Warp& warp = *current->warp;
    // Always the same lane, but nobody may rely on which.
    uint64_t seed = warp.block->launch->arguments.seed;
    *static_cast<bool*>(warp.arguments[seed * 7 % 32]) = true;
    part();
    return own;
}

namespace {

typedef float Four __attribute__((vector_size(16)));
typedef double Pairs __attribute__((vector_size(16)));

// p = a b for a of [rows, 16] and b of [16, columns], columns a multiple of 8. The sum over k is in order. The
// product of two bf16 or f16 is exact in f32, so a fused multiplication and addition gives the same bits as two steps.
void product_plain(float* p, const float* a, const float* b, int rows, int columns)
{
    for (int m = 0; m < rows; m++) {
        for (int n = 0; n < columns; n += 8) {
            float sum[8] = {};
            for (int k = 0; k < 16; k++) {
                for (int j = 0; j < 8; j++) sum[j] += a[m * 16 + k] * b[k * columns + n + j];
            }
            memcpy(p + m * columns + n, sum, sizeof sum);
        }
    }
}

#if defined(__x86_64__)
// Four rows by `width` vectors at a time, in registers.
template <int width>
__attribute__((target("avx2,fma"))) void product_columns(float* p, const float* a, const float* b, int rows,
                                                         int columns, int n)
{
    for (int m = 0; m < rows; m += 4) {
        __m256 sum[4][width];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#pragma GCC unroll 2
            for (int j = 0; j < width; j++) sum[i][j] = _mm256_setzero_ps();
        }
        for (int k = 0; k < 16; k++) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m256 x = _mm256_set1_ps(a[(m + i) * 16 + k]);
#pragma GCC unroll 2
                for (int j = 0; j < width; j++) {
                    sum[i][j] = _mm256_fmadd_ps(x, _mm256_loadu_ps(b + k * columns + n + 8 * j), sum[i][j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#pragma GCC unroll 2
            for (int j = 0; j < width; j++) _mm256_storeu_ps(p + (m + i) * columns + n + 8 * j, sum[i][j]);
        }
    }
}

__attribute__((target("avx2,fma"))) void product_fused(float* p, const float* a, const float* b, int rows,
                                                       int columns)
{
    int n = 0;
    for (; n + 16 <= columns; n += 16) product_columns<2>(p, a, b, rows, columns, n);
    if (n < columns) product_columns<1>(p, a, b, rows, columns, n);
}

} // namespace

void product(float* p, const float* a, const float* b, int rows, int columns)
{
    static const bool fused = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    (fused ? product_fused : product_plain)(p, a, b, rows, columns);
}
#else
} // namespace

void product(float* p, const float* a, const float* b, int rows, int columns)
{
    product_plain(p, a, b, rows, columns);
}
#endif

namespace {

// The operands of all lanes as f32: a [16 tiles_m, 16], b [16, 8 tiles_n].
template <class E>
void gather_operands(float* a, float* b, const MatrixProduct& own, Site site)
{
    const Warp& warp = *current->warp;
    int tiles_m = own.tiles_m, tiles_n = own.tiles_n, columns = 8 * tiles_n;
    for (int l = 0; l < 32; l++) {
        const MatrixProduct& lane = *static_cast<const MatrixProduct*>(warp.arguments[l]);
        if (lane.tiles_m != tiles_m || lane.tiles_n != tiles_n)
            fail(site, "the lanes of a warp multiply different numbers of tiles");
        for (int m = 0; m < tiles_m; m++) {
            for (int i = 0; i < 4; i++) {
                uint32_t pair = lane.a[4 * m + i];
                float* at = a + (16 * m + l / 4 + 8 * (i & 1)) * 16 + 2 * (l % 4) + 8 * (i >> 1);
                at[0] = to_float(E{uint16_t(pair)});
                at[1] = to_float(E{uint16_t(pair >> 16)});
            }
        }
        // Columns 2 q and 2 q + 1 of all tiles lie side by side: those are what lanes with l % 4 = q hold of d.
        float* column = b + l / 8 * 2 * tiles_n + l / 4 % 2;
        for (int n = 0; n < tiles_n; n++) {
            for (int i = 0; i < 2; i++) {
                uint32_t pair = lane.b[2 * n + i];
                float* at = column + (2 * (l % 4) + 8 * i) * columns + 2 * n;
                at[0] = to_float(E{uint16_t(pair)});
                at[columns] = to_float(E{uint16_t(pair >> 16)});
            }
        }
    }
}

} // namespace

void multiply(MatrixProduct own, Site site)
{
    if (!meet(Collective::mma, &own, site)) return;
    Warp& warp = *current->warp;
    int tiles_m = own.tiles_m, tiles_n = own.tiles_n;
    int rows = 16 * tiles_m, columns = 8 * tiles_n;
    std::vector<float>& scratch = warp.block->launch->scratch;
    size_t floats = size_t(rows) * 16 + size_t(columns) * 16 + size_t(rows) * columns;
    if (scratch.size() < floats) scratch.resize(floats);
    float* a = scratch.data();
    float* b = a + rows * 16;
    float* p = b + columns * 16;
    (own.f16 ? gather_operands<f16> : gather_operands<bf16>)(a, b, own, site);
    product(p, a, b, rows, columns);
    for (int l = 0; l < 32; l++) {
        float* d = static_cast<const MatrixProduct*>(warp.arguments[l])->d;
        for (int m = 0; m < tiles_m; m++) {
            const float* upper = p + (16 * m + l / 4) * columns + l % 4 * 2 * tiles_n;
            const float* lower = upper + 8 * columns;
            for (int n = 0; n < tiles_n; n++, d += 4) {
                double two[2]; // pairs of f32, moved as one
                memcpy(&two[0], upper + 2 * n, 8);
                memcpy(&two[1], lower + 2 * n, 8);
                Four sum;
                memcpy(&sum, d, sizeof sum);
                sum += Four(Pairs{two[0], two[1]});
                memcpy(d, &sum, sizeof sum);
            }
        }
    }
    part();
}

} // namespace emulator
