// What Hopper's backward pass of attention and the kernel that finishes dq of long images share.
#pragma once

#include "backward_rows.cuh"
#include "schedule.cuh"

struct AttentionBackwardHopper {
    // `partial` is [rows, heads, 4, head_dim] with two rows a block, one for each warpgroup that multiplies, and behind
    // them two a block of attention_backward_finish.
    AttentionBackward all;
    const Element* q_norm; // q^ of long images, [tokens, heads * head_dim]; q where it is as it was
    const Element* k_norm;
    float* dq_sum;    // of long images, [tile, head, 64 D]: see FragmentTile
    int32_t* turns;   // [tile, head]: key blocks that have added to it
    int64_t q_norm_stride;
    int64_t k_norm_stride;
    int32_t width;  // D
    int32_t blocks; // of the launch that made dq_sum
};

namespace hopper_backward {

using namespace attention_backward;

constexpr int KEYS_OF_BLOCK = 128;
constexpr int QUERIES_OF_STAGE = 64;
// Of a warpgroup.
constexpr int KEYS_OF_GROUP = 64;

// f32 of 64 queries as wgmma leaves them in the registers of a warpgroup: 16 bytes of thread t, its part of chunk c, at
// 128 c + t. Threads touch nothing but their own.
template <int D>
struct FragmentTile {
    static constexpr uint32_t BYTES = QUERIES_OF_STAGE * D * 4;

    DEVICE static uint32_t place(int chunk, int thread)
    {
        return chunk * 128 + thread;
    }
};

} // namespace hopper_backward
