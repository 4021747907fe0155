// Kernels of the emulator's own tests.
#include "common/view.cuh"

namespace planted {

struct Params {
    const void* a;
    const void* b;
    void* c;
    int32_t n;
    int32_t variant;
};

// c = a b^T for one warp: a [64, 64], b [64, 64] of bf16, c [64, 64] of f32.
DEVICE void matmul(const Params& p)
{
    constexpr int size = 64;
    Global<const bf16> a(static_cast<const bf16*>(p.a)), b(static_cast<const bf16*>(p.b));
    Global<float> c(static_cast<float*>(p.c));
    uint32_t shared_a = ptx::shared_base(), shared_b = shared_a + size * size * 2;
    uint32_t lane = ptx::lane_id();
    for (uint32_t i = lane; i < size * size / 8; i += 32) {
        ptx::cp_async_16(shared_a + 16 * i, a.at(8 * i), true);
        ptx::cp_async_16(shared_b + 16 * i, b.at(8 * i), true);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::barrier();
    for (int rows = 0; rows < size; rows += 32) {
        float d[2][8][4] = {};
        for (int k = 0; k < size; k += 16) {
            uint32_t fragment_a[2][4], fragment_b[8][2];
            for (int m = 0; m < 2; m++) {
                uint32_t row = rows + 16 * m + lane % 16;
                ptx::ldmatrix_x4(fragment_a[m], shared_a + (row * size + k + 8 * (lane / 16)) * 2);
            }
            for (int n = 0; n < 8; n += 2) {
                uint32_t r[4], row = 8 * n + 8 * (lane / 16) + lane % 8;
                ptx::ldmatrix_x4(r, shared_b + (row * size + k + 8 * (lane / 8 % 2)) * 2);
                fragment_b[n][0] = r[0];
                fragment_b[n][1] = r[1];
                fragment_b[n + 1][0] = r[2];
                fragment_b[n + 1][1] = r[3];
            }
            ptx::mma_tiles(d, fragment_a, fragment_b);
        }
        for (int m = 0; m < 2; m++) {
            for (int n = 0; n < 8; n++) {
                for (int i = 0; i < 4; i++) {
                    int row = rows + 16 * m + lane / 4 + 8 * (i >> 1), column = 8 * n + 2 * (lane % 4) + (i & 1);
                    c.store(row * size + column, d[m][n][i]);
                }
            }
        }
    }
}

} // namespace planted
