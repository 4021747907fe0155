// The matrix instructions of a warpgroup: d (+)= a b for a of [64, 16] and b of [16, N], N a multiple of 8 up to 256,
// E (bf16 or f16) in and f32 out. a comes from shared memory or registers, b from shared memory. All four warps of a
// warpgroup together; they run on while the tensor cores work:
//
//   wgmma_fence(d);                          registers before are done with
//   wgmma<E, N>(d, a, b, false); ...         any number into the same d
//   wgmma_commit();                          closes the group
//   wgmma_wait<0>(d);                        d may be touched, operands overwritten
//
// Element i of d of thread t of the warpgroup: row 16 (t/32) + (t%32)/4 + 8 ((i>>1)&1), column 8 (i>>2) + 2 (t%4) +
// (i&1). Columns 16 j to 16 j + 15 of d, rounded to E and packed in pairs, are the fragment of a for k = 16 j.
//
// Collectives (marked so) must be reached by all 128 threads of the warpgroup.
#pragma once

#include "hopper.cuh"

// How rows of 8 x 16 bytes, 8 x 32, 8 x 64 or 8 x 128 are laid out: chunk of 16 bytes c of row r at c ^ r of the bits
// that count, as Tile of tile.cuh has it and the tensor map with the swizzle of the same width.
enum class Swizzle : uint32_t { none = 0, bytes_128 = 1, bytes_64 = 2, bytes_32 = 3 };

namespace ptx {

// A matrix in shared memory, as wgmma takes it. Of width W bytes (16 where there is no swizzle), begin at a multiple
// of 8 W:
//   K-major, 8 rows (m or n) of W bytes follow one another: `stride` bytes from 8 rows to the next 8; k + 16 is 32
//     bytes on. Not swizzled, a row is 8 k and `leading` bytes lie between k and k + 8; else `leading` counts for
//     nothing.
//   MN-major ("transposed"), 8 rows (k) of W bytes follow one another: `stride` bytes from 8 k to the next 8, `leading`
//     from W/2 elements of m or n to the next. Not swizzled, the two change places.
DEVICE uint64_t wgmma_matrix(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle)
{
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t((leading & 0x3ffff) >> 4) << 16
        | uint64_t((stride & 0x3ffff) >> 4) << 32 | uint64_t(swizzle) << 62;
}

// The same matrix, `bytes` further on.
DEVICE uint64_t wgmma_advance(uint64_t matrix, uint32_t bytes)
{
    return matrix + (bytes >> 4);
}

} // namespace ptx

#ifndef TRENCADIS_EMULATOR

// Names of the first registers of d in an instruction, and the registers.
#define WGMMA_NAMES_4 "%0, %1, %2, %3"
#define WGMMA_NAMES_8 WGMMA_NAMES_4 ", %4, %5, %6, %7"
#define WGMMA_NAMES_12 WGMMA_NAMES_8 ", %8, %9, %10, %11"
#define WGMMA_NAMES_16 WGMMA_NAMES_12 ", %12, %13, %14, %15"
#define WGMMA_NAMES_20 WGMMA_NAMES_16 ", %16, %17, %18, %19"
#define WGMMA_NAMES_24 WGMMA_NAMES_20 ", %20, %21, %22, %23"
#define WGMMA_NAMES_28 WGMMA_NAMES_24 ", %24, %25, %26, %27"
#define WGMMA_NAMES_32 WGMMA_NAMES_28 ", %28, %29, %30, %31"
#define WGMMA_NAMES_36 WGMMA_NAMES_32 ", %32, %33, %34, %35"
#define WGMMA_NAMES_40 WGMMA_NAMES_36 ", %36, %37, %38, %39"
#define WGMMA_NAMES_44 WGMMA_NAMES_40 ", %40, %41, %42, %43"
#define WGMMA_NAMES_48 WGMMA_NAMES_44 ", %44, %45, %46, %47"
#define WGMMA_NAMES_52 WGMMA_NAMES_48 ", %48, %49, %50, %51"
#define WGMMA_NAMES_56 WGMMA_NAMES_52 ", %52, %53, %54, %55"
#define WGMMA_NAMES_60 WGMMA_NAMES_56 ", %56, %57, %58, %59"
#define WGMMA_NAMES_64 WGMMA_NAMES_60 ", %60, %61, %62, %63"
#define WGMMA_NAMES_68 WGMMA_NAMES_64 ", %64, %65, %66, %67"
#define WGMMA_NAMES_72 WGMMA_NAMES_68 ", %68, %69, %70, %71"
#define WGMMA_NAMES_76 WGMMA_NAMES_72 ", %72, %73, %74, %75"
#define WGMMA_NAMES_80 WGMMA_NAMES_76 ", %76, %77, %78, %79"
#define WGMMA_NAMES_84 WGMMA_NAMES_80 ", %80, %81, %82, %83"
#define WGMMA_NAMES_88 WGMMA_NAMES_84 ", %84, %85, %86, %87"
#define WGMMA_NAMES_92 WGMMA_NAMES_88 ", %88, %89, %90, %91"
#define WGMMA_NAMES_96 WGMMA_NAMES_92 ", %92, %93, %94, %95"
#define WGMMA_NAMES_100 WGMMA_NAMES_96 ", %96, %97, %98, %99"
#define WGMMA_NAMES_104 WGMMA_NAMES_100 ", %100, %101, %102, %103"
#define WGMMA_NAMES_108 WGMMA_NAMES_104 ", %104, %105, %106, %107"
#define WGMMA_NAMES_112 WGMMA_NAMES_108 ", %108, %109, %110, %111"
#define WGMMA_NAMES_116 WGMMA_NAMES_112 ", %112, %113, %114, %115"
#define WGMMA_NAMES_120 WGMMA_NAMES_116 ", %116, %117, %118, %119"
#define WGMMA_NAMES_124 WGMMA_NAMES_120 ", %120, %121, %122, %123"
#define WGMMA_NAMES_128 WGMMA_NAMES_124 ", %124, %125, %126, %127"

#define WGMMA_REGISTERS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define WGMMA_REGISTERS_8 WGMMA_REGISTERS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WGMMA_REGISTERS_12 WGMMA_REGISTERS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define WGMMA_REGISTERS_16 WGMMA_REGISTERS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_REGISTERS_20 WGMMA_REGISTERS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define WGMMA_REGISTERS_24 WGMMA_REGISTERS_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define WGMMA_REGISTERS_28 WGMMA_REGISTERS_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_REGISTERS_36 WGMMA_REGISTERS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define WGMMA_REGISTERS_40 WGMMA_REGISTERS_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define WGMMA_REGISTERS_44 WGMMA_REGISTERS_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define WGMMA_REGISTERS_52 WGMMA_REGISTERS_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define WGMMA_REGISTERS_56 WGMMA_REGISTERS_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define WGMMA_REGISTERS_60 WGMMA_REGISTERS_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA_REGISTERS_68 WGMMA_REGISTERS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define WGMMA_REGISTERS_72 WGMMA_REGISTERS_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define WGMMA_REGISTERS_76 WGMMA_REGISTERS_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define WGMMA_REGISTERS_84 WGMMA_REGISTERS_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define WGMMA_REGISTERS_88 WGMMA_REGISTERS_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define WGMMA_REGISTERS_92 WGMMA_REGISTERS_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define WGMMA_REGISTERS_100 WGMMA_REGISTERS_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define WGMMA_REGISTERS_104 WGMMA_REGISTERS_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define WGMMA_REGISTERS_108 WGMMA_REGISTERS_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define WGMMA_REGISTERS_112 WGMMA_REGISTERS_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define WGMMA_REGISTERS_116 WGMMA_REGISTERS_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define WGMMA_REGISTERS_120 WGMMA_REGISTERS_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define WGMMA_REGISTERS_124 WGMMA_REGISTERS_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// N, registers of d, and the numbers of the operands that follow them.
#define WGMMA_SIZES(X) \
    X(8, 4, 4, 5, 6, 7, 8, 9, 10) \
    X(16, 8, 8, 9, 10, 11, 12, 13, 14) \
    X(24, 12, 12, 13, 14, 15, 16, 17, 18) \
    X(32, 16, 16, 17, 18, 19, 20, 21, 22) \
    X(40, 20, 20, 21, 22, 23, 24, 25, 26) \
    X(48, 24, 24, 25, 26, 27, 28, 29, 30) \
    X(56, 28, 28, 29, 30, 31, 32, 33, 34) \
    X(64, 32, 32, 33, 34, 35, 36, 37, 38) \
    X(72, 36, 36, 37, 38, 39, 40, 41, 42) \
    X(80, 40, 40, 41, 42, 43, 44, 45, 46) \
    X(88, 44, 44, 45, 46, 47, 48, 49, 50) \
    X(96, 48, 48, 49, 50, 51, 52, 53, 54) \
    X(104, 52, 52, 53, 54, 55, 56, 57, 58) \
    X(112, 56, 56, 57, 58, 59, 60, 61, 62) \
    X(120, 60, 60, 61, 62, 63, 64, 65, 66) \
    X(128, 64, 64, 65, 66, 67, 68, 69, 70) \
    X(136, 68, 68, 69, 70, 71, 72, 73, 74) \
    X(144, 72, 72, 73, 74, 75, 76, 77, 78) \
    X(152, 76, 76, 77, 78, 79, 80, 81, 82) \
    X(160, 80, 80, 81, 82, 83, 84, 85, 86) \
    X(168, 84, 84, 85, 86, 87, 88, 89, 90) \
    X(176, 88, 88, 89, 90, 91, 92, 93, 94) \
    X(184, 92, 92, 93, 94, 95, 96, 97, 98) \
    X(192, 96, 96, 97, 98, 99, 100, 101, 102) \
    X(200, 100, 100, 101, 102, 103, 104, 105, 106) \
    X(208, 104, 104, 105, 106, 107, 108, 109, 110) \
    X(216, 108, 108, 109, 110, 111, 112, 113, 114) \
    X(224, 112, 112, 113, 114, 115, 116, 117, 118) \
    X(232, 116, 116, 117, 118, 119, 120, 121, 122) \
    X(240, 120, 120, 121, 122, 123, 124, 125, 126) \
    X(248, 124, 124, 125, 126, 127, 128, 129, 130) \
    X(256, 128, 128, 129, 130, 131, 132, 133, 134)

#define WGMMA_SHARED(elements, n, count, a_, b_, accumulate_, ta_, tb_, x_, y_)                                      \
    if constexpr (N == n) {                                                                                          \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_ ", 0;\n"                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." elements " {" WGMMA_NAMES_##count "}, %" #a_  \
                     ", %" #b_ ", p, 1, 1, %" #ta_ ", %" #tb_ ";\n}"                                                 \
                     : WGMMA_REGISTERS_##count                                                                       \
                     : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A_TRANSPOSED)), "n"(int(B_TRANSPOSED)));        \
    }

#define WGMMA_FRAGMENT(elements, n, count, a0_, a1_, a2_, a3_, b_, accumulate_, tb_)                                 \
    if constexpr (N == n) {                                                                                          \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_ ", 0;\n"                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." elements " {" WGMMA_NAMES_##count "}, {%" #a0_\
                     ", %" #a1_ ", %" #a2_ ", %" #a3_ "}, %" #b_ ", p, 1, 1, %" #tb_ ";\n}"                          \
                     : WGMMA_REGISTERS_##count                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),                     \
                       "n"(int(B_TRANSPOSED)));                                                                      \
    }

#define WGMMA_SHARED_BF16(...) WGMMA_SHARED("bf16.bf16", __VA_ARGS__)
#define WGMMA_SHARED_F16(...) WGMMA_SHARED("f16.f16", __VA_ARGS__)
#define WGMMA_FRAGMENT_BF16(...) WGMMA_FRAGMENT("bf16.bf16", __VA_ARGS__)
#define WGMMA_FRAGMENT_F16(...) WGMMA_FRAGMENT("f16.f16", __VA_ARGS__)

namespace ptx {

// Keeps the compiler from moving what is done to d across.
template <int C>
DEVICE void hold(float (&d)[C])
{
    UNROLL
    for (int i = 0; i < C; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Orders what was done to registers before the wgmma that follow. Needed before the first one, and whenever d or a
// fragment of a was touched since the last wait. Collective.
DEVICE void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

template <int C>
DEVICE void wgmma_fence(float (&d)[C])
{
    hold(d);
    wgmma_fence();
}

template <int C, int E>
DEVICE void wgmma_fence(float (&d)[C], float (&e)[E])
{
    hold(d);
    hold(e);
    wgmma_fence();
}

// d = a b, plus d where `accumulate`, with both operands in shared memory, K-major unless transposed. Collective.
template <class E, int N, bool A_TRANSPOSED = false, bool B_TRANSPOSED = false>
DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate)
{
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
    if constexpr (is_f16<E>) {
        WGMMA_SIZES(WGMMA_SHARED_F16)
    } else {
        WGMMA_SIZES(WGMMA_SHARED_BF16)
    }
}

// The same with the fragment of a in registers, which may be touched after the wait. Collective.
template <class E, int N, bool B_TRANSPOSED = false>
DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate)
{
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
    if constexpr (is_f16<E>) {
        WGMMA_SIZES(WGMMA_FRAGMENT_F16)
    } else {
        WGMMA_SIZES(WGMMA_FRAGMENT_BF16)
    }
}

// Before a wait that follows: x, which is not below 0, is computed by then. The compiler, which moves waits ahead of what
// does not need them to be over, must not leave for later what is to be computed beside the matrix instructions. `address`
// is any in shared memory; nothing is stored.
DEVICE void compute_before_wait(float x, uint32_t address)
{
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.u32 [%1], %1;\n}" ::"f"(x),
                 "r"(address)
                 : "memory");
}

// Closes the group of the wgmma since the last commit. Collective.
DEVICE void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` groups are under way; names every accumulator that this completes. Collective.
template <int pending>
DEVICE void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

template <int pending, int C>
DEVICE void wgmma_wait(float (&d)[C])
{
    wgmma_wait<pending>();
    hold(d);
}

template <int pending, int C, int E>
DEVICE void wgmma_wait(float (&d)[C], float (&e)[E])
{
    wgmma_wait<pending>();
    hold(d);
    hold(e);
}

template <int pending, int C, int E, int F>
DEVICE void wgmma_wait(float (&d)[C], float (&e)[E], float (&f)[F])
{
    wgmma_wait<pending>();
    hold(d);
    hold(e);
    hold(f);
}

} // namespace ptx

#undef WGMMA_SHARED
#undef WGMMA_SHARED_BF16
#undef WGMMA_SHARED_F16
#undef WGMMA_FRAGMENT
#undef WGMMA_FRAGMENT_BF16
#undef WGMMA_FRAGMENT_F16

#endif
