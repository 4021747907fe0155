// Constant arguments of the contrastive kernels, and what of them concerns one side.
#pragma once

#include "../common/numbers.cuh"
#include "../common/vector.cuh"

struct ContrastiveParams {
    const bf16* images;      // [pairs, width], rows of images_stride
    const bf16* texts;       // likewise
    const float* weights;    // [pairs]; what has weight 0 takes part in nothing
    const float* scale;      // one number, the logarithm of the factor on the scores
    const float* bias;       // one number, or null: 0
    const float* loss_scale; // one number, or null: 1
    float* per_pair;         // [pairs], weight times loss
    bf16* dimages;           // [pairs, width], all rows written
    bf16* dtexts;            // likewise
    float* dscale;           // one number
    float* dbias;            // one number, or null
    int* rank;               // [pairs], texts ahead of the image's own, -1 at weight 0; or null
    // Workspace.
    float* inverse;          // [2, pairs], 1 / length; 0 at weight 0
    float* partial;          // [2, splits, pairs, 2]: largest score and sum relative to it; for sigmoid the loss
    float* score;            // [pairs], of each pair, times log2(e)
    float* log_sum;          // [2, pairs], to the base 2
    int* ahead;              // [splits, pairs]
    float* sums;             // [splits, tiles, 2]: sum of ds times score without bias, sum of ds
    float* dunit;            // [2, splits, pairs, width]
    int* used;               // one number: pairs to the last one that counts
    int64_t images_stride;   // multiples of 8
    int64_t texts_stride;
    int64_t dimages_stride;
    int64_t dtexts_stride;
    int pairs;
    int width;               // a multiple of 8
    int splits;              // parts of the other side, each by a block of its own
    int unused;
};

namespace contrastive {

using namespace numbers;

enum Kind { softmax, sigmoid };

// Rows of a tile, and rows of the other side that it meets at a time.
constexpr int OWN = 64;
constexpr int OTHER = 128;

// Vectors of images (0) or texts (1).
struct Side {
    Global<const bf16> rows;
    Global<const float> inverse;
    Global<const float> log_sum;
    int64_t stride;
};

DEVICE Side side_of(const ContrastiveParams& p, int side)
{
    int64_t first = int64_t(side) * p.pairs;
    return Side{Global<const bf16>(side == 0 ? p.images : p.texts), Global<const float>(p.inverse + first),
                Global<const float>(p.log_sum + first), side == 0 ? p.images_stride : p.texts_stride};
}

// Tiles of the other side from `first` to before `end`, which one split has. Those behind the last pair that counts are
// nobody's.
struct Range {
    int first;
    int end;
};

DEVICE Range range_of(int split, int splits, int used)
{
    int tiles = ceil_div(used, OTHER);
    int part = ceil_div(tiles, splits);
    int end = (split + 1) * part;
    return Range{split * part, end < tiles ? end : tiles};
}

// Splits that have any tile.
DEVICE int live_splits(int splits, int used)
{
    int tiles = ceil_div(used, OTHER);
    return tiles == 0 ? 0 : ceil_div(tiles, ceil_div(tiles, splits));
}

// e^scale.
DEVICE float factor_of(const ContrastiveParams& p)
{
    return ptx::exp2(Global<const float>(p.scale).load(0) * log2_e);
}

} // namespace contrastive
