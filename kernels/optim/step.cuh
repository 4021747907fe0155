// What a step of the optimiser is told and what it tells, in device memory; mirrors of src/kernels/optim/step.rs
// and arena.rs. And what all kernels of the family share: eight elements at a time, and sums in f64.
//
// Parameters, gradients and moments are flat f32 arenas of one layout: tensors begin at multiples of 64 elements,
// and what lies between them is 0 everywhere and stays 0, since every update of 0 by 0 is 0. So an arena is read
// 16 bytes at a time without a thought for where tensors end. Where a block must know the tensor, a table tells:
// a chunk is at most 2048 elements of one tensor, eight a thread.
#pragma once

#include "../common/philox.cuh"
#include "../common/sums.cuh"

// Written by the host before the step.
struct OptimizerStep {
    double lr;
    double beta1;
    double beta2;       // Adafactor: at most
    double beta2_power; // Adafactor: step t keeps 1 - t^-power of the second moments
    double eps;
    double clip;      // largest gradient norm; 0 does not clip
    double ema_decay; // of the moving average
    double images;    // the gradients are divided by it; 0: by 1
    uint64_t seed;    // key of stochastic rounding
    int continues;    // not 0: gradients are added to those of the batch before
    int unfinished;   // not 0: another batch follows, nothing is updated yet
};

// The step's numbers as the elements need them, rounded once from f64.
struct OptimizerFactors {
    int skip;         // not 0: nothing changes, as the gradients are not finite or not yet whole
    float grad_scale; // 1 / images, and clipping
    float inverse1;   // 1 / (1 - beta1^t)
    float rate;       // lr / (1 - beta1^t)
    float root2;      // 1 / sqrt(1 - beta2^t)
    float keep1;      // beta1
    float new1;       // 1 - beta1
    float keep2;
    float new2;
    float eps;
    float new_average; // 1 - ema_decay
    int unused;
};

// Written by optim_finish; the host sets `step` when it resumes, and reads.
struct OptimizerState {
    uint64_t step;    // t: steps taken, this one included
    uint64_t skipped; // steps left out because a gradient was not finite
    double norm;      // of the last gradients over images, before clipping
    double lr;
    OptimizerFactors factors; // 16-byte aligned
};

struct OptimTensor {
    double weight_decay;
    int first_chunk;
    int chunks;
    int adapts; // whether LAMB scales its update to the norm of the tensor
    int whole;  // the tensor that it is a slice of; negative: none
};

struct alignas(16) OptimChunk {
    int64_t start; // within the arenas, a multiple of 8
    int length;    // a multiple of 8
    int tensor;
};

namespace optim {

constexpr int threads = 256;

// Purpose of the random bits that round, of src/rng.rs.
constexpr uint32_t purpose_rounding = 6;

template <class T>
DEVICE T read(const T& x)
{
    return Global<const T>(&x).load(0);
}

template <class T>
DEVICE void write(T& x, T value)
{
    Global<T>(&x).store(0, value);
}

DEVICE OptimizerFactors read_factors(const OptimizerState* state)
{
    Global<const int> words(&state->factors.skip);
    Vec16 a = words.load_16(0);
    Vec16 b = words.load_16(4);
    Vec16 c = words.load_16(8);
    OptimizerFactors f;
    f.skip = int(a.word[0]);
    f.grad_scale = bits_to_float(a.word[1]);
    f.inverse1 = bits_to_float(a.word[2]);
    f.rate = bits_to_float(a.word[3]);
    f.root2 = bits_to_float(b.word[0]);
    f.keep1 = bits_to_float(b.word[1]);
    f.new1 = bits_to_float(b.word[2]);
    f.keep2 = bits_to_float(b.word[3]);
    f.new2 = bits_to_float(c.word[0]);
    f.eps = bits_to_float(c.word[1]);
    f.new_average = bits_to_float(c.word[2]);
    f.unused = 0;
    return f;
}

// Eight elements of an arena.
DEVICE void load(float (&x)[8], const float* arena, int64_t at)
{
    Global<const float> memory(arena);
    Vec16 packed[2] = {memory.load_16(at), memory.load_16(at + 4)};
    UNROLL
    for (int i = 0; i < 8; i++) x[i] = bits_to_float(packed[i / 4].word[i % 4]);
}

DEVICE void store(float* arena, int64_t at, const float (&x)[8])
{
    Global<float> memory(arena);
    UNROLL
    for (int half = 0; half < 2; half++) {
        Vec16 packed;
        UNROLL
        for (int i = 0; i < 4; i++) packed.word[i] = float_to_bits(x[4 * half + i]);
        memory.store_16(at + 4 * half, packed);
    }
}

// Rounds to one of the two neighbours in bf16, the nearer one more likely, so that the mean is x: 16 random bits
// are added to the 16 that go. Infinities and NaN are rounded to nearest.
DEVICE uint32_t round_randomly(float x, uint32_t bits)
{
    uint32_t own = float_to_bits(x);
    if ((own & 0x7f800000u) == 0x7f800000u) return pack_bf16(x, 0.0f);
    return (own + bits) >> 16;
}

// Stores eight elements as bf16. Each eight have their own 128 random bits, so that the result depends on seed,
// step and place alone.
DEVICE void store_rounded(bf16* out, int64_t at, const float (&x)[8], bool stochastic, uint64_t seed,
                          uint64_t step)
{
    Vec16 packed;
    if (stochastic) {
        Philox bits = random_block(seed, 0, step, purpose_rounding, uint32_t(at / 8));
        UNROLL
        for (int i = 0; i < 4; i++) {
            packed.word[i] = round_randomly(x[2 * i], bits.word[i] & 0xffffu)
                             | round_randomly(x[2 * i + 1], bits.word[i] >> 16) << 16;
        }
    } else {
        UNROLL
        for (int i = 0; i < 4; i++) packed.word[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    }
    Global<bf16>(out).store_16(at, packed);
}

// Sum of a thread's squares. Products of f32 are exact in f64, which neither overflow nor vanish there.
DEVICE double squares(const float (&x)[8])
{
    double even = 0.0;
    double odd = 0.0;
    UNROLL
    for (int i = 0; i < 4; i++) {
        even += double(x[2 * i]) * double(x[2 * i]);
        odd += double(x[2 * i + 1]) * double(x[2 * i + 1]);
    }
    return even + odd;
}

} // namespace optim
