// The sum of one vector of every rank, where ranks share a device and reach one another's memory:
//   out[i] = parts[0][i] + parts[1][i] + ...
// Summed in f32 in the order of the ranks, whichever rank does it, and rounded once: every rank has the same bits, and
// those of f32 are the host's. Memory-bound: 16 bytes to an access, four parts of a thread under way.
#include "../common/vector.cuh"

constexpr int most_ranks = 64;

struct CollectiveSumRanks {
    void* out;                     // [size]; may be one of the parts
    int64_t size;
    int ranks;                     // 1 to most_ranks
    int aligned;                   // whether every address is one of 16 bytes
    const void* parts[most_ranks]; // [size] each
};

namespace collective {

constexpr int threads = 256;
constexpr int unroll = 4;

DEVICE float load_one(const float* p, int64_t i)
{
    return Global<const float>(p).load(i);
}

DEVICE float load_one(const bf16* p, int64_t i)
{
    return to_float(Global<const bf16>(p).load(i));
}

DEVICE void store_one(float* p, int64_t i, float x)
{
    Global<float>(p).store(i, x);
}

DEVICE void store_one(bf16* p, int64_t i, float x)
{
    Global<bf16>(p).store(i, to_bf16(x));
}

DEVICE void unpack(float (&x)[4], const Vec16& packed)
{
    UNROLL
    for (int i = 0; i < 4; i++) x[i] = bits_to_float(packed.word[i]);
}

DEVICE void unpack(float (&x)[8], const Vec16& packed)
{
    unpack_8(x, packed);
}

DEVICE Vec16 pack(const float (&x)[4])
{
    Vec16 packed;
    UNROLL
    for (int i = 0; i < 4; i++) packed.word[i] = float_to_bits(x[i]);
    return packed;
}

DEVICE Vec16 pack(const float (&x)[8])
{
    return pack_8(x);
}

template <class T>
DEVICE void sum_ranks(const CollectiveSumRanks& p)
{
    begin_dependent();
    constexpr int width = 16 / sizeof(T);
    int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * width;
    if (first >= p.size) return;
    auto part = [&](int rank) { return static_cast<const T*>(p.parts[rank]); };
    T* out = static_cast<T*>(p.out);
    if (!p.aligned || first + width > p.size) {
        int64_t end = first + width < p.size ? first + width : p.size;
        for (int64_t i = first; i < end; i++) {
            float sum = load_one(part(0), i);
            for (int rank = 1; rank < p.ranks; rank++) sum += load_one(part(rank), i);
            store_one(out, i, sum);
        }
        return;
    }
    float sum[width];
    unpack(sum, Global<const T>(part(0)).load_16(first));
    for (int rank = 1; rank < p.ranks; rank += unroll) {
        Vec16 next[unroll];
        UNROLL
        for (int u = 0; u < unroll; u++) {
            if (rank + u < p.ranks) next[u] = Global<const T>(part(rank + u)).load_16(first);
        }
        UNROLL
        for (int u = 0; u < unroll; u++) {
            if (rank + u >= p.ranks) continue;
            float x[width];
            unpack(x, next[u]);
            UNROLL
            for (int j = 0; j < width; j++) sum[j] += x[j];
        }
    }
    Global<T>(out).store_16(first, pack(sum));
}

} // namespace collective
