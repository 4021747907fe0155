// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), bit for bit that of
// src/rng.rs: a number is addressed by what it is for, (seed, epoch, sample, purpose, index), so that host and
// device agree and neither the slot of an image nor the order of blocks matters.
#pragma once

#include "types.cuh"

// 128 bits: a counter, and what becomes of it.
struct Philox {
    uint32_t word[4];
};

// One block of random bits for a counter and a key.
DEVICE Philox philox(Philox counter, uint32_t key_low, uint32_t key_high)
{
    UNROLL
    for (int round = 0; round < 10; round++) {
        uint64_t a = uint64_t(0xd2511f53u) * counter.word[0];
        uint64_t b = uint64_t(0xcd9e8d57u) * counter.word[2];
        counter = Philox{{uint32_t(b >> 32) ^ counter.word[1] ^ key_low, uint32_t(b),
                          uint32_t(a >> 32) ^ counter.word[3] ^ key_high, uint32_t(a)}};
        key_low += 0x9e3779b9u;
        key_high += 0xbb67ae85u;
    }
    return counter;
}

// Purposes of src/rng.rs that the device draws for; residual branch l has purpose_drop_path + l.
constexpr uint32_t purpose_drop_path = 0x1000;

// Block `index` of a stream, numbers 4 index to 4 index + 3 of it.
DEVICE Philox random_block(uint64_t seed, uint64_t epoch, uint64_t sample, uint32_t purpose, uint32_t index)
{
    Philox counter{{index, purpose, uint32_t(sample), uint32_t(sample >> 32) ^ uint32_t(epoch)}};
    return philox(counter, uint32_t(seed), uint32_t(seed >> 32));
}
