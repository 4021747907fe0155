// The pixels of all pictures of a batch at the size of their targets, cut, mirrored and resized as their taps say:
//   middle[y, i] = clip((half + sum_k row_weight[y, k] source[row_first[y] + k, i]) >> row_shift)
//   target[y, x] = clip((half + sum_k column_weight[x, k] middle[y, column_first[x] + k]) >> column_shift)
// in 32-bit integers, half = 2^(shift - 1), clip to 0..255: rows first and 8 bits between the two passes, which is how
// fast_image_resize does it, so the bits are those of the host.
//
// Blocks stay and take tiles of 8 rows and up to 64 columns, numbered through all pictures. What the columns of a tile
// need of its 8 rows is made in shared memory, four neighbouring bytes to a thread; how many columns a tile has, the host
// decides so that this fits.
#include "view.cuh"

struct ViewResize {
    const int* records;   // [pictures, record_words]
    const int* counts;    // pictures, tiles of all of them
    const uint8_t* data;
    uint8_t* pixels;      // targets [height, width, channels]
};

namespace view {

constexpr int tile_rows = 8;
constexpr int middle_bytes = 3072; // of a row

// The picture that a tile is of: the last one that begins at or before it.
DEVICE int picture_of(const int* records, int pictures, int tile)
{
    int low = 0;
    int high = pictures;
    while (high - low > 1) {
        int between = (low + high) / 2;
        if (field(records, between, first_tile) <= tile) {
            low = between;
        } else {
            high = between;
        }
    }
    return low;
}

struct Tap {
    int first;
    int count;
    int weight;
};

DEVICE Tap load_tap(const uint8_t* data, int taps, int i)
{
    Global<const uint32_t> words(reinterpret_cast<const uint32_t*>(data + bytes(taps)));
    uint32_t word = words.load(2 * i);
    return Tap{int(word & 0xffff), int(word >> 16), int(words.load(2 * i + 1))};
}

DEVICE int clip(int sum, int shift)
{
    return max(0, min(255, sum >> shift));
}

// Bytes that the columns of a tile need of a row: from `base`, a multiple of 4, so many words.
struct Span {
    int base;
    int words;
};

// The same in all threads. Collective.
DEVICE Span span_of(const uint8_t* data, int taps, int left, int columns, int channels)
{
    uint32_t first = 0xffffffffu;
    uint32_t end = 0;
    for (int x = int(ptx::lane_id()); x < columns; x += 32) {
        Tap tap = load_tap(data, taps, left + x);
        first = min(first, uint32_t(tap.first));
        end = max(end, uint32_t(tap.first + tap.count));
    }
    UNROLL
    for (uint32_t mask = 16; mask > 0; mask /= 2) {
        first = min(first, ptx::shuffle_xor(first, mask));
        end = max(end, ptx::shuffle_xor(end, mask));
    }
    int base = int(first) * channels / 4 * 4;
    return Span{base, ceil_div(int(end) * channels - base, 4)};
}

template <int C>
DEVICE void resize(const ViewResize& p)
{
    begin_dependent();
    Global<const int> counts(p.counts);
    Global<uint8_t> pixels_out(p.pixels);
    Shared<uint32_t> middle(ptx::shared_base());
    Shared<uint16_t> halves(ptx::shared_base());
    int pictures = counts.load(0);
    int tiles = counts.load(1);
    for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
        int picture = picture_of(p.records, pictures, tile);
        auto of = [&](int word) { return field(p.records, picture, word); };
        int target_width = of(width);
        int across = ceil_div(target_width, of(tile_columns));
        int place = tile - of(first_tile);
        int top = place / across * tile_rows;
        int left = place % across * of(tile_columns);
        int rows = min(tile_rows, of(height) - top);
        int columns = min(of(tile_columns), target_width - left);
        int columns_at = of(column_taps);
        Span span = span_of(p.data, columns_at, left, columns, C);
        Global<const int16_t> weight(reinterpret_cast<const int16_t*>(p.data + bytes(of(weights))));

        Global<const uint32_t> from(reinterpret_cast<const uint32_t*>(p.data + bytes(of(source)) + span.base));
        int rows_at = of(row_taps);
        int stride = of(pitch) / 4;
        int shift = of(row_shift);
        for (int i = int(threadIdx.x); i < rows * span.words; i += threads) {
            int row = i / span.words;
            int word = i % span.words;
            Tap tap = load_tap(p.data, rows_at, top + row);
            int half = 1 << (shift - 1);
            int sum[4] = {half, half, half, half};
            for (int k = 0; k < tap.count; k++) {
                uint32_t four = from.load(int64_t(tap.first + k) * stride + word);
                int factor = weight.load(tap.weight + k);
                UNROLL
                for (int j = 0; j < 4; j++) sum[j] += factor * int((four >> (8 * j)) & 0xff);
            }
            uint32_t four = 0;
            UNROLL
            for (int j = 0; j < 4; j++) four |= uint32_t(clip(sum[j], shift)) << (8 * j);
            middle.store(row * (middle_bytes / 4) + word, four);
        }
        ptx::barrier();

        shift = of(column_shift);
        int64_t out = bytes(of(pixels));
        for (int i = int(threadIdx.x); i < rows * columns; i += threads) {
            int row = i / columns;
            int x = i % columns;
            Tap tap = load_tap(p.data, columns_at, left + x);
            int sum[C];
            UNROLL
            for (int c = 0; c < C; c++) sum[c] = 1 << (shift - 1);
            int at = row * middle_bytes + tap.first * C - span.base;
            for (int k = 0; k < tap.count; k++) {
                int factor = weight.load(tap.weight + k);
                UNROLL
                for (int c = 0; c < C; c++, at++) {
                    sum[c] += factor * int((uint32_t(halves.load(at / 2)) >> (8 * (at % 2))) & 0xff);
                }
            }
            int64_t to = out + (int64_t(top + row) * target_width + left + x) * C;
            UNROLL
            for (int c = 0; c < C; c++) pixels_out.store(to + c, uint8_t(clip(sum[c], shift)));
        }
        // What is in shared memory has been read.
        ptx::barrier();
    }
}

} // namespace view
