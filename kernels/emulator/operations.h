// What the wrappers of ptx.h and hopper.h stand on: one function for each kind of operation.
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

struct MatrixStore {
    const uint32_t* registers;
    uint32_t address;
};

struct MatrixProduct {
    float* d;          // [tiles_m][tiles_n][4]
    const uint32_t* a; // [tiles_m][4]
    const uint32_t* b; // [tiles_n][2]
    int tiles_m, tiles_n;
    bool f16; // a and b; else bf16
};

uint32_t exchange(Collective collective, uint32_t x, uint32_t operand, Site site);
void load_matrices(uint32_t* registers, uint32_t address, uint32_t count, bool transposed, Site site);
void store_matrices(const uint32_t* registers, uint32_t address, uint32_t count, bool transposed, Site site);
void multiply(MatrixProduct product, Site site);
void product(float* p, const float* a, const float* b, int rows, int columns);
void block_barrier(uint32_t id, uint32_t threads, bool wait, Site site);
void order_warp(Site site);
void copy_issue(uint32_t destination, const void* source, bool valid, Site site);
void copy_commit();
void copy_wait(uint32_t pending_groups);
int add_to_global(int* counter, int x, Site site);

// ---- Hopper ----

// A wgmma as a lane brings it.
struct WarpgroupProduct {
    float* d;
    const uint32_t* a; // fragment; null: `a_matrix`
    uint64_t a_matrix, b_matrix;
    uint32_t n;
    bool a_transposed, b_transposed; // MN-major
    bool accumulate;
    bool f16; // a and b; else bf16
};

// An accumulator as a lane names it to a wait.
struct Registers {
    float* first;
    uint32_t count;
};

struct WarpgroupWait {
    const Registers* accumulators;
    uint32_t count;
    uint32_t pending;
};

bool elect(Site site);
void mbarrier_init(uint32_t address, uint32_t count, Site site);
void mbarrier_invalidate(uint32_t address, Site site);
void mbarrier_publish();
void mbarrier_arrive(uint32_t address, uint32_t count, uint32_t bytes, bool peer, Site site);
void mbarrier_expect(uint32_t address, uint32_t bytes, Site site);
bool mbarrier_test(uint32_t address, uint32_t parity, Site site);
void mbarrier_wait(uint32_t address, uint32_t parity, Site site);
void proxy_fence();

void tensor_load(uint32_t destination, const void* map, const int* at, uint32_t rank, uint32_t mbarrier,
                 uint32_t blocks, Site site);
void tensor_store(uint32_t source, const void* map, const int* at, uint32_t rank, bool add, Site site);
void tensor_prefetch(const void* map, Site site);
void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier, Site site);
void peer_copy(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t mbarrier, Site site);
void bulk_store(void* destination, uint32_t source, uint32_t bytes, bool add, Site site);
void bulk_commit();
void bulk_wait(uint32_t pending_groups, bool read_only);

void wgmma_fence(Site site);
void wgmma_multiply(WarpgroupProduct product, Site site);
void wgmma_commit(Site site);
void wgmma_wait(WarpgroupWait wait, Site site);
void set_registers(uint32_t count, bool more, Site site);

uint32_t peer_address(uint32_t address, uint32_t rank, Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
void read_peer(void* value, uint32_t address, uint32_t bytes, Site site);
void write_peer(const void* value, uint32_t address, uint32_t bytes, Site site);

} // namespace emulator
