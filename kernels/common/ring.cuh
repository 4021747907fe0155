// A ring of stages in shared memory that some warps fill and others empty.
#pragma once

#include "types.cuh"

// Where a place in the ring of stages is: its number, and the parity of the phase of its mbarriers.
template <int STAGES>
struct HopperRing {
    uint32_t stage = 0;
    uint32_t parity = 0;

    DEVICE void next()
    {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

    // `count` stages further on.
    DEVICE void skip(uint32_t count)
    {
        uint32_t to = stage + count;
        parity ^= to / STAGES % 2;
        stage = to % STAGES;
    }
};
