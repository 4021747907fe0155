// Kernels of the emulator's own tests: matrix instructions of a warpgroup. Compiled for sm_90a as well, to show that
// the wrappers are what nvcc takes.
#include "common/wgmma.cuh"

namespace hopper_wgmma {

struct Params {
    TensorMap a; // boxes of 64 x 64
    TensorMap b;
    float* c;        // [64, N]
    int32_t variant; // bit 0: a is MN-major, bit 1: b is, bit 2: a comes from registers
    int32_t depth;   // k, a multiple of 64
};

constexpr uint32_t panel_bytes = 64 * 128; // 64 rows of 64 bf16, swizzled by 128 bytes

enum class Bug {
    none,
    no_fence,            // no wgmma_fence
    read_before_wait,    // the accumulator is read while it is under way
    written_before_wait, // or written
    overwritten_operand, // shared memory is written while it is read
    unnamed,             // the wait does not name the accumulator
    no_wait,             // the block ends
    wrong_swizzle,       // the descriptor swizzles otherwise than the copy
    misaligned,          // a descriptor that begins inside the pattern
    past_end,            // a descriptor whose matrix leaves shared memory
    half_a_group,        // two of four warps
    generic_operand,     // a thread writes an operand without a proxy fence
    other_shape,         // half of an accumulator that is under way
};

// Writes d of the warpgroup to c.
template <int N>
DEVICE void write(float* c, const float (&d)[N / 2])
{
    uint32_t t = threadIdx.x % 128;
    UNROLL
    for (int i = 0; i < N / 2; i++) {
        uint32_t row = 16 * (t / 32) + t % 32 / 4 + 8 * ((i >> 1) & 1), column = 8 * (i >> 2) + 2 * (t % 4) + (i & 1);
        Global<float>(c).store(int64_t(row) * N + column, d[i]);
    }
}

// 64 of k: four steps of 16.
template <class E, int N, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEVICE void multiply_64(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate)
{
    UNROLL
    for (int k = 0; k < 4; k++) {
        ptx::wgmma<E, N, A_TRANSPOSED, B_TRANSPOSED>(d, ptx::wgmma_advance(a, k * (A_TRANSPOSED ? 2048 : 32)),
                                                     ptx::wgmma_advance(b, k * (B_TRANSPOSED ? 2048 : 32)),
                                                     accumulate || k > 0);
    }
}

// c = a bᵀ for a warpgroup: a [64, depth] and b [N, depth], or their transposes where MN-major, in panels of 64 x 64
// that are copied by the tensor memory accelerator.
template <int N, Bug BUG = Bug::none, class E = bf16>
DEVICE void product(const Params& p)
{
    constexpr int panels = (N + 63) / 64;
    uint32_t base = ptx::shared_base(), thread = threadIdx.x;
    uint32_t full = base, tile_a = base + 1024, tile_b = tile_a + panel_bytes;
    bool a_transposed = p.variant & 1, b_transposed = p.variant & 2, fragments = p.variant & 4;
    if (thread == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::fence_mbarrier_init();
    }
    ptx::barrier();
    // K-major, 8 rows are 1024 bytes; MN-major, 8 of k are, and 64 of m or n a panel.
    constexpr Swizzle pattern = BUG == Bug::wrong_swizzle ? Swizzle::bytes_64 : Swizzle::bytes_128;
    uint32_t start = tile_a + (BUG == Bug::misaligned ? 128 : BUG == Bug::past_end ? 0x20000 : 0);
    uint64_t a = ptx::wgmma_matrix(start, panel_bytes, 1024, pattern);
    uint64_t b = ptx::wgmma_matrix(tile_b, panel_bytes, 1024, Swizzle::bytes_128);
    float d[N / 2];
    for (int k = 0; k < p.depth; k += 64) {
        if (thread == 0) {
            ptx::mbarrier_arrive_expect(full, (1 + panels) * panel_bytes);
            ptx::tensor_load(tile_a, p.a, {a_transposed ? 0 : k, a_transposed ? k : 0}, full);
            for (int n = 0; n < panels; n++) {
                ptx::tensor_load(tile_b + n * panel_bytes, p.b,
                                 {b_transposed ? 64 * n : k, b_transposed ? k : 64 * n}, full);
            }
        }
        ptx::mbarrier_wait(full, k / 64 % 2);
        if (BUG == Bug::generic_operand) {
            if (thread == 0) Shared<uint32_t>(tile_a).store(0, 0);
            ptx::barrier();
        }
        if (BUG == Bug::half_a_group && thread < 64) return;
        if (BUG != Bug::no_fence) ptx::wgmma_fence(d);
        if (fragments) {
            for (int step = 0; step < 4; step++) {
                uint32_t lane = thread % 32, fragment[4];
                uint32_t row = thread / 32 * 16 + lane % 16, chunk = 2 * step + lane / 16;
                ptx::ldmatrix_x4(fragment, tile_a + row * 128 + ((chunk ^ row % 8) << 4));
                ptx::wgmma_fence(d);
                if (b_transposed) {
                    ptx::wgmma<E, N, true>(d, fragment, ptx::wgmma_advance(b, step * 2048), k + step > 0);
                } else {
                    ptx::wgmma<E, N>(d, fragment, ptx::wgmma_advance(b, step * 32), k + step > 0);
                }
                ptx::wgmma_commit();
                ptx::wgmma_wait<0>(d);
            }
        } else if (a_transposed && b_transposed) {
            multiply_64<E, N, true, true>(d, a, b, k > 0);
        } else if (a_transposed) {
            multiply_64<E, N, true, false>(d, a, b, k > 0);
        } else if (b_transposed) {
            multiply_64<E, N, false, true>(d, a, b, k > 0);
        } else {
            multiply_64<E, N, false, false>(d, a, b, k > 0);
        }
        ptx::wgmma_commit();
        if (BUG == Bug::read_before_wait) write<N>(p.c, d);
        if (BUG == Bug::written_before_wait && thread == 77) d[0] = 0.0f;
        if (BUG == Bug::overwritten_operand && thread == 5) Shared<float>(tile_a).store(0, 0.0f);
        if constexpr (BUG == Bug::other_shape) {
            float(&half)[N / 4] = reinterpret_cast<float(&)[N / 4]>(d);
            ptx::wgmma<E, N / 2>(half, a, b, true);
        }
        if (BUG == Bug::no_wait) return;
        if (BUG == Bug::unnamed) {
            ptx::wgmma_wait<0>();
        } else {
            ptx::wgmma_wait<0>(d);
        }
        // All have read their operands.
        ptx::barrier();
    }
    if (BUG != Bug::read_before_wait) write<N>(p.c, d);
}

// c = a bᵀ for a and b of [64, 64], or their transposes where TRANSPOSED, in every way that a matrix can lie: in
// boxes of 64 rows, as wide as the swizzle.
template <Swizzle PATTERN, bool TRANSPOSED>
DEVICE void patterns(const Params& p)
{
    constexpr uint32_t width = PATTERN == Swizzle::none ? 16
        : PATTERN == Swizzle::bytes_32                  ? 32
        : PATTERN == Swizzle::bytes_64                  ? 64
                                                        : 128;
    constexpr uint32_t elements = width / 2, box = 64 * width;
    uint32_t full = ptx::shared_base(), tile_a = full + 1024, tile_b = tile_a + panel_bytes;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(full, 2 * panel_bytes);
        for (uint32_t i = 0; i < 64 / elements; i++) {
            ptx::tensor_load(tile_a + i * box, p.a, {int(i * elements), 0}, full);
            ptx::tensor_load(tile_b + i * box, p.b, {int(i * elements), 0}, full);
        }
    }
    ptx::barrier();
    ptx::mbarrier_wait(full, 0);
    constexpr bool exchanged = PATTERN == Swizzle::none && TRANSPOSED;
    constexpr uint32_t leading = exchanged ? 8 * width : box, stride = exchanged ? box : 8 * width;
    float d[32];
    ptx::wgmma_fence(d);
    UNROLL
    for (uint32_t k = 0; k < 64; k += 16) {
        uint32_t at = TRANSPOSED ? k * width : k / elements * box + k % elements * 2;
        ptx::wgmma<bf16, 64, TRANSPOSED, TRANSPOSED>(d, ptx::wgmma_matrix(tile_a + at, leading, stride, PATTERN),
                                                     ptx::wgmma_matrix(tile_b + at, leading, stride, PATTERN), k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    write<64>(p.c, d);
}

} // namespace hopper_wgmma
