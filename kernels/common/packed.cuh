// The packed batch as kernels see it: where images begin, which one a row belongs to, what is no patch.
#pragma once

#include "vector.cuh"

// Position of a prefix token (cls, registers): row and column 0xffff.
constexpr uint32_t prefix_position = 0xffffffffu;

// Start of image i, held within 0..tokens.
DEVICE int image_start(const int* cu_seqlens, int i, int tokens)
{
    return live_rows(cu_seqlens + i, tokens);
}

// Image of a token row below cu_seqlens[images]: the last one that begins at or before it.
DEVICE int image_of(const int* cu_seqlens, int images, int token)
{
    Global<const int> starts(cu_seqlens);
    int low = 0;
    int high = images;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (starts.load(middle) <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}
