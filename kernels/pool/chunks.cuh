// How the images of a packed batch become work for blocks: pieces of at most `chunk_tokens` pooled tokens,
// counted from the image's own first pooled token, so that an image's bits do not depend on its place.
//
// Piece c of image i has the number floor(cu_seqlens[i] / chunk_tokens) + i + c. An image of L tokens
// owns floor((start + L) / chunk) - floor(start / chunk) + 1 >= ceil(L / chunk) numbers, so every piece
// has one of its own, numbers grow with the image, and whoever knows a number finds the image by a search
// of a few steps; numbers beyond its pieces have no work. A grid of floor(T / chunk) + N numbers serves any
// batch, and one more where the rows from cu_seqlens[N] to T, which count as image N, are written as zeros.
#pragma once

#include "../common/vector.cuh"

namespace pool {

constexpr int chunk_tokens = 512;

// What is written to `error` for a cu_seqlens that is no list of images.
enum Fault : int { fault_start = 1, fault_decrease = 2, fault_end = 3 };

// One piece of work.
struct Piece {
    int image;       // N for the rows that belong to no image
    int index;       // within the image
    int count;       // pieces of the image; 0 where no token is left to pool
    int image_start; // first token row of the image, prefix tokens counted
    int first_row;   // first pooled token row of the piece
    int rows;        // pooled rows of the piece; 0 where it has none
    int pooled;      // pooled rows of the whole image
};

// cu_seqlens[i] held within 0..T: whatever the array says, no row beyond the tensors is touched.
DEVICE int row_start(Global<const int> cu_seqlens, int i, int tokens)
{
    int start = cu_seqlens.load(i);
    return start < 0 ? 0 : start < tokens ? start : tokens;
}

// Rows and pieces of image `i`, or of the rows after the last image for i = `images`.
DEVICE Piece image_at(Global<const int> cu_seqlens, int i, int images, int tokens, int skip)
{
    Piece piece;
    piece.image = i;
    piece.index = 0;
    piece.image_start = row_start(cu_seqlens, i, tokens);
    int end = i < images ? row_start(cu_seqlens, i + 1, tokens) : tokens;
    int left_out = i < images ? skip : 0;
    int length = end > piece.image_start ? end - piece.image_start : 0;
    piece.first_row = piece.image_start + (left_out < length ? left_out : length);
    piece.pooled = length > left_out ? length - left_out : 0;
    piece.count = ceil_div(piece.pooled, chunk_tokens);
    piece.rows = piece.pooled < chunk_tokens ? piece.pooled : chunk_tokens;
    return piece;
}

// Number of the first piece of image `i`.
DEVICE int first_piece(Global<const int> cu_seqlens, int i, int tokens)
{
    return row_start(cu_seqlens, i, tokens) / chunk_tokens + i;
}

// The piece with number `number`. Collective over the warp: 32 candidates are looked at in each step.
DEVICE Piece find_piece(Global<const int> cu_seqlens, int number, int images, int tokens, int skip)
{
    // The image is in low..low + span - 1; first_piece(low) <= number throughout.
    int low = 0;
    int span = images + 1;
    while (span > 1) {
        int step = ceil_div(span, 32);
        int candidate = low + int(ptx::lane_id()) * step;
        bool below = candidate < low + span && first_piece(cu_seqlens, candidate, tokens) <= number;
        uint32_t votes = ptx::ballot(below);
        // Lanes in order: the last one that votes. An array that decreases may leave gaps, which do no harm.
        int last = 0;
        for (uint32_t rest = votes >> 1; rest != 0; rest >>= 1) last++;
        int end = low + span;
        low += last * step;
        span = step < end - low ? step : end - low;
    }
    Piece piece = image_at(cu_seqlens, low, images, tokens, skip);
    piece.index = number - first_piece(cu_seqlens, low, tokens);
    int before = piece.index * chunk_tokens;
    if (piece.index < 0 || before >= piece.pooled) {
        piece.rows = 0;
    } else {
        piece.first_row += before;
        piece.rows = piece.pooled - before < chunk_tokens ? piece.pooled - before : chunk_tokens;
    }
    return piece;
}

// One block looks at the whole array and reports what is wrong with it.
DEVICE void check_cu_seqlens(const int* cu_seqlens, int* error, int images, int tokens)
{
    if (blockIdx.x != 0 || error == nullptr) return;
    Global<const int> starts(cu_seqlens);
    int fault = 0;
    for (int i = int(threadIdx.x); i < images; i += int(blockDim.x)) {
        int start = starts.load(i);
        int end = starts.load(i + 1);
        if (i == 0 && start != 0) fault = fault_start;
        if (end < start) fault = fault_decrease;
        if (i + 1 == images && end > tokens) fault = fault_end;
    }
    if (fault != 0) Global<int>(error).store(0, fault);
}

// Sum over the `lanes` neighbouring lanes of a group, in all of them. Collective.
template <int lanes>
DEVICE float group_sum(float x)
{
    UNROLL
    for (uint32_t mask = lanes / 2; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    return x;
}

// The same for several values, whose shuffles then overlap. Collective.
template <int lanes, int n>
DEVICE void group_sums(float (&x)[n])
{
    UNROLL
    for (uint32_t mask = lanes / 2; mask > 0; mask /= 2) {
        UNROLL
        for (int i = 0; i < n; i++) x[i] += ptx::shuffle_xor(x[i], mask);
    }
}

} // namespace pool
