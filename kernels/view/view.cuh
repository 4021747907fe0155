// Pictures of a batch as the host describes them, and what becomes of their colours.
//
// What is of one picture lies in one piece of `data`, each part at a multiple of 16 bytes: for every row of the target a
// tap, for every column a tap, the weights of both, and the pixels of the source, rows of `pitch` bytes. A tap is two
// words: the first pixel of the source that counts and, 16 bits higher, how many do; and where their weights begin.
#pragma once

#include "../common/packed.cuh"
#include "../common/rounded.cuh"

namespace view {

// Words of a record.
enum Field {
    height,       // of the target in pixels
    width,
    pitch,        // bytes from row to row of the source, a multiple of 16
    first_tile,   // tiles of the pictures before this one
    tile_columns, // of a tile
    row_taps,     // where these lie in `data`, in units of 16 bytes
    column_taps,
    weights,
    source,
    pixels,       // where the target lies among the targets, in units of 16 bytes
    row_shift,    // binary places of the weights
    column_shift,
    ops,          // how many there are
    partner,      // the picture that is mixed into this one, counted from 1; 0: none
    share,        // f32: how much is this picture's own, where the box is empty
    box_top,      // the box in which all is the partner's
    box_bottom,
    box_left,
    box_right,
    first_op,     // most_ops times kind and parameter
};

constexpr int most_ops = 8;
constexpr int record_words = first_op + 2 * most_ops;

enum Kind {
    blend_black, // with black by an f32
    blend_mean,  // with the mean luma by an f32
    blend_luma,  // with the pixel's luma by an f32; 0 is grey
    solarize,    // values from the parameter on are inverted
    mask,        // bits that stay
    add,         // to values below 128
};

constexpr int threads = 256;

DEVICE int field(const int* records, int picture, int word)
{
    return Global<const int>(records).load(int64_t(picture) * record_words + word);
}

// Bytes before a part that begins at so many units.
DEVICE int64_t bytes(int units)
{
    return int64_t(units) * 16;
}

// The fraction cut off, held within 0..255.
DEVICE int to_byte(float x)
{
    return x <= 0.0f ? 0 : x >= 255.0f ? 255 : int(x);
}

// `factor` of the value, the rest of `other`; rounded twice, as the host does.
DEVICE int blend(int other, int value, float factor)
{
    return to_byte(float(other) + ptx::rounded_product(factor, float(value) - float(other)));
}

// BT.601 in 16-bit fixed point; grey is its own luma.
template <int C>
DEVICE int luma(const int (&colour)[C])
{
    if constexpr (C == 3) {
        return (19595 * colour[0] + 38470 * colour[1] + 7471 * colour[2] + 0x8000) >> 16;
    } else {
        return colour[0];
    }
}

template <int C>
DEVICE void load_colour(int (&colour)[C], const uint8_t* pixels, int64_t at)
{
    Global<const uint8_t> memory(pixels);
    UNROLL
    for (int c = 0; c < C; c++) colour[c] = memory.load(at + c);
}

// Changes a colour by the first `count` ops of a picture; `means` holds the mean luma before each that needs it.
template <int C, class Means>
DEVICE void recolour(int (&colour)[C], const int* records, int picture, int count, const Means& means)
{
    for (int op = 0; op < count; op++) {
        int kind = field(records, picture, first_op + 2 * op);
        int parameter = field(records, picture, first_op + 2 * op + 1);
        if (kind <= blend_luma) {
            int other = kind == blend_black ? 0 : kind == blend_mean ? means.load(op) : luma(colour);
            float factor = bits_to_float(uint32_t(parameter));
            UNROLL
            for (int c = 0; c < C; c++) colour[c] = blend(other, colour[c], factor);
        } else {
            UNROLL
            for (int c = 0; c < C; c++) {
                int x = colour[c];
                colour[c] = kind == solarize ? (x < parameter ? x : 255 - x)
                            : kind == mask   ? x & parameter
                                             : (x < 128 ? min(255, x + parameter) : x);
            }
        }
    }
}

} // namespace view
