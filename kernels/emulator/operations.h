// What the wrappers of ptx.h stand on: one function for each kind of operation.
#pragma once

#include "memory.h"

namespace emulator {

// What a lane brings to a shuffle or a vote: `x` is exchanged for the result.
struct Exchange {
    uint32_t x;
    uint32_t operand;
};

struct MatrixLoad {
    uint32_t* registers;
    uint32_t address;
};

struct MatrixProduct {
    float* d;          // [tiles_m][tiles_n][4]
    const uint32_t* a; // [tiles_m][4]
    const uint32_t* b; // [tiles_n][2]
    int tiles_m, tiles_n;
};

uint32_t exchange(Collective collective, uint32_t x, uint32_t operand, Site site);
void load_matrices(uint32_t* registers, uint32_t address, uint32_t count, bool transposed, Site site);
void multiply(MatrixProduct product, Site site);
void block_barrier(uint32_t id, uint32_t threads, Site site);
void order_warp(Site site);
void copy_issue(uint32_t destination, const void* source, bool valid, Site site);
void copy_commit();
void copy_wait(uint32_t pending_groups);
int add_to_global(int* counter, int x, Site site);

} // namespace emulator
