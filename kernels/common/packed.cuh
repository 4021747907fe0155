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

// The same for a thread that asks of tokens in ascending order: `image` is that of the one before, or below 0 at
// the first, and becomes that of this one.
DEVICE void advance_image(const int* cu_seqlens, int images, int token, int& image)
{
    if (image < 0) {
        image = image_of(cu_seqlens, images, token);
    } else {
        Global<const int> starts(cu_seqlens);
        while (image + 1 < images && starts.load(image + 1) <= token) image++;
    }
}
