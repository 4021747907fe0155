// What long images need before Hopper's kernels take them: see sm80_attention_prepare.cu.
#pragma once

#include "rope.cuh"
#include "schedule.cuh"

struct AttentionPrepare {
    const Element* q;
    const Element* k;
    const Element* out;
    const Element* dout;
    Element* q_norm; // q^ of long images, [tokens, heads * head_dim]; null where nobody wants it
    Element* k_norm; // k^, [tokens, kv_heads * head_dim], likewise
    float* delta;    // dout out, [tokens, heads]; null where nobody wants it
    int32_t* turns;  // set to 0; null where there are none
    const int32_t* cu_seqlens;
    const int32_t* schedule;
    const float* rope; // [tokens, head_dim / 2, 2]; null: none
    QkNorm norm;
    QkStatistics statistics; // of the rows that are normalised
    int64_t q_stride;
    int64_t k_stride;
    int64_t out_stride;
    int64_t dout_stride;
    int32_t tokens;
    int32_t slots;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t rope_kind;
    int32_t tile_rows; // of the schedule
    int32_t turn_count;
};
