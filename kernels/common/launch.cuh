// How a kernel begins under programmatic dependent launch. A dependent launch may begin while the launch before it on the
// stream still runs: its blocks take what room that one leaves on the multiprocessors, and wait there for its end. What
// makes that right for a whole stream of launches, dependent or not:
//   - no thread touches global memory, not even to read what no launch writes, before it has waited for the launch
//     before, or has met a thread that has at a barrier of the block;
//   - no thread ends before that either. So a launch ends after the one before it, that one after the one before it, and
//     so on: who has waited for one launch has waited for all.
// The emulator reports whatever breaks these rules. When the next launch may begin is a matter of speed alone.
#pragma once

#include "ptx.cuh"

// Waits for the launch before, and lets the next one begin once all blocks of this one have come so far: none of them
// is kept from a multiprocessor by it. For kernels that have nothing worth setting up before they read.
DEVICE void begin_dependent()
{
    ptx::dependency_wait();
    ptx::launch_dependents();
}
