// What the lanes of a warp do together; the last lane to come works for all.
#include "operations.h"

#include "../common/types.cuh"

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

namespace {

typedef float Vector __attribute__((vector_size(32)));

// p = a b for a of [rows, 16] and b of [16, columns], the sum over k in order and without contraction, so
// that every host gives the same bits.
template <int width>
[[gnu::always_inline]] inline void product_columns(float* p, const float* a, const float* b, int rows, int columns,
                                                   int first)
{
    for (int m = 0; m < rows; m++) {
        Vector sum[width] = {};
        for (int k = 0; k < 16; k++) {
            float x = a[m * 16 + k];
            for (int j = 0; j < width; j++) {
                Vector y;
                memcpy(&y, b + k * columns + first + 8 * j, sizeof y);
                sum[j] += x * y;
            }
        }
        for (int j = 0; j < width; j++) memcpy(p + m * columns + first + 8 * j, &sum[j], sizeof sum[j]);
    }
}

[[gnu::always_inline]] inline void product_any(float* p, const float* a, const float* b, int rows, int columns)
{
    int n = 0;
    for (; n + 32 <= columns; n += 32) product_columns<4>(p, a, b, rows, columns, n);
    for (; n < columns; n += 8) product_columns<1>(p, a, b, rows, columns, n);
}

void product_plain(float* p, const float* a, const float* b, int rows, int columns)
{
    product_any(p, a, b, rows, columns);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void product_avx2(float* p, const float* a, const float* b, int rows, int columns)
{
    product_any(p, a, b, rows, columns);
}

void product(float* p, const float* a, const float* b, int rows, int columns)
{
    static const bool avx2 = __builtin_cpu_supports("avx2");
    (avx2 ? product_avx2 : product_plain)(p, a, b, rows, columns);
}
#else
void product(float* p, const float* a, const float* b, int rows, int columns)
{
    product_plain(p, a, b, rows, columns);
}
#endif

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
    for (int l = 0; l < 32; l++) {
        const MatrixProduct& lane = *static_cast<const MatrixProduct*>(warp.arguments[l]);
        if (lane.tiles_m != tiles_m || lane.tiles_n != tiles_n) fail(site, "the lanes of a warp multiply different tiles");
        for (int m = 0; m < tiles_m; m++) {
            for (int i = 0; i < 4; i++) {
                uint32_t pair = lane.a[4 * m + i];
                float* at = a + (16 * m + l / 4 + 8 * (i & 1)) * 16 + 2 * (l % 4) + 8 * (i >> 1);
                at[0] = low(pair);
                at[1] = high(pair);
            }
        }
        for (int n = 0; n < tiles_n; n++) {
            for (int i = 0; i < 2; i++) {
                uint32_t pair = lane.b[2 * n + i];
                float* at = b + (2 * (l % 4) + 8 * i) * columns + 8 * n + l / 4;
                at[0] = low(pair);
                at[columns] = high(pair);
            }
        }
    }
    product(p, a, b, rows, columns);
    for (int l = 0; l < 32; l++) {
        float* d = static_cast<const MatrixProduct*>(warp.arguments[l])->d;
        for (int m = 0; m < tiles_m; m++) {
            const float* upper = p + (16 * m + l / 4) * columns + 2 * (l % 4);
            const float* lower = upper + 8 * columns;
            for (int n = 0; n < tiles_n; n++, d += 4) {
                d[0] += upper[8 * n];
                d[1] += upper[8 * n + 1];
                d[2] += lower[8 * n];
                d[3] += lower[8 * n + 1];
            }
        }
    }
    part();
}

} // namespace emulator
