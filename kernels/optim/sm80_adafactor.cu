// Adafactor (Shazeer & Stern, ICML 2018) as Vision Transformers are trained with it (Zhai et al., CVPR 2022;
// src/cpu/optim/adafactor.rs has the formulas): of the second moments of a matrix the means over rows and over columns
// are kept, on every rank for whole parameters, and the momentum is bf16. A step is
//   squares   a tile of gradients: sums of its squares over each of its rows and columns
//   sums      of all tiles, into the places of rows and columns of whole parameters
//   (ranks    add their sums)
//   moments   v of whole parameters, and what gradients are multiplied by
//   lines     the same in the order of the rows and columns that lie in this arena
//   apply     p and m
// All sums have a fixed order. Within a tile they are f32: 8 rows of a warp, 8 columns of a thread, and trees.
#include "update.cuh"

// How a tensor of the arena lies in its matrix; mirror of src/kernels/optim/adafactor/tables.rs. A line is one of the
// tensor's rows or columns, or one of its elements where each has its own second moment.
struct alignas(16) OptimFactored {
    int64_t base;     // element of the matrix at place 0 of the arena
    int64_t first;    // elements of the matrix that the tensor has
    int64_t last;
    int columns;      // of the matrix
    int rows;         // that the tensor has elements of
    int row;          // the first of them
    int tile_columns; // tiles beside one another
    int first_tile;
    int first_line;   // a multiple of `threads`
    int column_lines; // where lines of columns begin after it, a multiple of 8
    int kind;         // 0: nothing, between tensors; 1: every element has its own; 2: factored
    int unused[2];    // a power of two is read at once
};

// What is kept of a whole parameter, from place `first` on: rows, then columns; without rows every element.
struct OptimWhole {
    int first;
    int rows;
    int columns;
    int unused;
};

struct OptimAdafactor {
    OptimUpdate update; // without moments and LAMB's
    bf16* m;
    float* v;      // [places]
    float* sums;   // [places], of squared gradients
    float* factors;      // [places]
    float* line_factors; // [lines]
    float* partial;      // [tiles][tile_rows + tile_columns]
    const OptimFactored* tensors;
    const OptimWhole* wholes;
    const int* tile_tensors; // the tensor of each tile
    const int* line_tensors; // and of each `threads` lines
    const int* places;       // of each line; negative: of none
    int counted;             // tensors that this rank counts, from the first
    int unused;
};

namespace optim {

constexpr int tile_rows = 64;
constexpr int tile_columns = 256;
constexpr int tile_sums = tile_rows + tile_columns;
constexpr double adafactor_eps = 1e-30;

// Block = tile, a warp every eighth of its rows.
DEVICE void adafactor_squares(const OptimAdafactor& p)
{
    begin_dependent();
    OptimizerFactors f = read_factors(p.update.state);
    if (f.skip != 0) return;
    OptimFactored tensor = Global<const OptimFactored>(p.tensors).load(
        Global<const int>(p.tile_tensors).load(blockIdx.x));
    int tile = int(blockIdx.x) - tensor.first_tile;
    int warp = int(threadIdx.x) / 32;
    int lane = int(ptx::lane_id());
    int first_row = tile / tensor.tile_columns * tile_rows;
    int column = tile % tensor.tile_columns * tile_columns + lane;
    Global<const float> grads(p.update.grads);
    Global<float> partial(p.partial + int64_t(blockIdx.x) * tile_sums);
    float of_column[8] = {};
    for (int i = warp; i < tile_rows; i += threads / 32) {
        float sum = 0.0f;
        if (first_row + i < tensor.rows) {
            int64_t at = int64_t(tensor.row + first_row + i) * tensor.columns + column;
            float g[8];
            UNROLL
            for (int k = 0; k < 8; k++) {
                int64_t element = at + 32 * k;
                bool own = column + 32 * k < tensor.columns && element >= tensor.first && element < tensor.last;
                g[k] = own ? grads.load(element - tensor.base) * f.grad_scale : 0.0f;
            }
            UNROLL
            for (int k = 0; k < 8; k++) {
                of_column[k] += g[k] * g[k];
                sum += g[k] * g[k];
            }
            UNROLL
            for (uint32_t mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
        }
        if (lane == 0) partial.store(i, sum);
    }
    Shared<float> of_warps(ptx::shared_base());
    UNROLL
    for (int k = 0; k < 8; k++) of_warps.store(warp * tile_columns + lane + 32 * k, of_column[k]);
    ptx::barrier();
    float sum = 0.0f;
    for (int w = 0; w < threads / 32; w++) sum += of_warps.load(w * tile_columns + threadIdx.x);
    partial.store(tile_rows + threadIdx.x, sum);
}

// Thread = line of a tensor that this rank counts.
DEVICE void adafactor_sums(const OptimAdafactor& p)
{
    begin_dependent();
    if (read(p.update.state->factors.skip) != 0) return;
    int of_block = Global<const int>(p.line_tensors).load(blockIdx.x);
    int64_t line = int64_t(blockIdx.x) * threads + threadIdx.x;
    int place = Global<const int>(p.places).load(line);
    if (of_block >= p.counted || place < 0) return;
    OptimFactored tensor = Global<const OptimFactored>(p.tensors).load(of_block);
    Global<const float> partial(p.partial);
    int at = int(line - tensor.first_line);
    double sum = 0.0;
    if (at < tensor.column_lines) {
        int64_t tile = tensor.first_tile + int64_t(at / tile_rows) * tensor.tile_columns;
        for (int i = 0; i < tensor.tile_columns; i++) sum += partial.load((tile + i) * tile_sums + at % tile_rows);
    } else {
        int column = at - tensor.column_lines;
        int64_t tile = tensor.first_tile + column / tile_columns;
        int64_t first = tile * tile_sums + tile_rows + column % tile_columns;
        int64_t stride = int64_t(tensor.tile_columns) * tile_sums;
        for (int i = 0; i * tile_rows < tensor.rows; i++) sum += partial.load(first + i * stride);
    }
    Global<float>(p.sums).store(place, float(sum));
}

// Block = whole parameter.
DEVICE void adafactor_moments(const OptimAdafactor& p)
{
    begin_dependent();
    if (read(p.update.state->factors.skip) != 0) return;
    OptimWhole whole = Global<const OptimWhole>(p.wholes).load(blockIdx.x);
    const OptimizerStep& step = *p.update.step;
    double keep = 1.0 - pow(double(read(p.update.state->step)), -read(step.beta2_power));
    double most = read(step.beta2);
    if (keep > most) keep = most;
    Global<float> v(p.v + whole.first);
    Global<float> factors(p.factors + whole.first);
    Global<const float> sums(p.sums + whole.first);
    auto moment = [&](int i, int count) {
        double mean = double(sums.load(i)) / double(count);
        float moment = float(keep * double(v.load(i)) + (1.0 - keep) * (mean + adafactor_eps));
        v.store(i, moment);
        return double(moment);
    };
    double mean[1] = {0.0};
    for (int i = int(threadIdx.x); i < whole.rows; i += threads) mean[0] += moment(i, whole.columns);
    block_sums(mean);
    // Behind a sum for each warp.
    Shared<double> of_block(ptx::shared_base());
    if (threadIdx.x == 0) of_block.store(threads / 32, mean[0] / double(whole.rows > 0 ? whole.rows : 1));
    ptx::barrier();
    double of_rows = of_block.load(threads / 32);
    for (int i = int(threadIdx.x); i < whole.rows; i += threads) {
        factors.store(i, float(sqrt(of_rows / double(v.load(i)))));
    }
    for (int i = int(threadIdx.x); i < whole.columns; i += threads) {
        double own = moment(whole.rows + i, whole.rows > 0 ? whole.rows : 1);
        factors.store(whole.rows + i, float(sqrt(1.0 / own)));
    }
}

// Thread = line.
DEVICE void adafactor_lines(const OptimAdafactor& p)
{
    begin_dependent();
    if (read(p.update.state->factors.skip) != 0) return;
    int64_t line = int64_t(blockIdx.x) * threads + threadIdx.x;
    int place = Global<const int>(p.places).load(line);
    float factor = place < 0 ? 0.0f : Global<const float>(p.factors).load(place);
    Global<float>(p.line_factors).store(line, factor);
}

// What the eight gradients from `at` on are multiplied by: first for their rows, then for their columns.
DEVICE void line_factors(float (&of_row)[8], float (&of_column)[8], const OptimAdafactor& p,
                         const OptimFactored& tensor, int64_t at)
{
    Global<const float> lines(p.line_factors + tensor.first_line);
    bool factored = tensor.kind == 2;
    int64_t element = at + tensor.base;
    if (!factored || tensor.columns % 8 == 0) {
        int64_t row = factored ? element / tensor.columns : 0;
        int64_t column = element - row * tensor.columns;
        load(of_column, p.line_factors + tensor.first_line, tensor.column_lines + column);
        float factor = factored ? lines.load(row - tensor.row) : 1.0f;
        UNROLL
        for (int i = 0; i < 8; i++) of_row[i] = factor;
        return;
    }
    UNROLL
    for (int i = 0; i < 8; i++) {
        int64_t own = element + i < tensor.last ? element + i : tensor.last - 1;
        int64_t row = own / tensor.columns;
        of_row[i] = lines.load(row - tensor.row);
        of_column[i] = lines.load(tensor.column_lines + own - row * tensor.columns);
    }
}

// Block = chunk.
DEVICE void adafactor_apply(const OptimAdafactor& p)
{
    begin_dependent();
    OptimizerFactors f = read_factors(p.update.state);
    Eight own = own_elements(p.update);
    if (f.skip != 0 || !own.active) return;
    OptimFactored tensor = Global<const OptimFactored>(p.tensors).load(own.tensor);
    if (tensor.kind == 0) return;
    float x[8];
    float g[8];
    float of_row[8];
    float of_column[8];
    float average[8] = {};
    load(x, p.update.params, own.at);
    load(g, p.update.grads, own.at);
    Vec16 momentum = Global<const bf16>(p.m).load_16(own.at);
    if (p.update.average != nullptr) load(average, p.update.average, own.at);
    line_factors(of_row, of_column, p, tensor, own.at);
    double lr = read(p.update.state->lr);
    float rate = float(lr);
    float decay = float(lr * read(p.update.tensors[own.tensor].weight_decay));
    float m[8];
    UNROLL
    for (int i = 0; i < 8; i++) {
        uint32_t word = momentum.word[i / 2];
        float before = bits_to_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
        float u = g[i] * f.grad_scale * of_row[i] * of_column[i];
        m[i] = ptx::fused_multiply_add(f.keep1, before, f.new1 * u);
        x[i] -= ptx::fused_multiply_add(decay, x[i], rate * m[i]);
    }
    store_rounded(p.m, own.at, m, false, 0, 0);
    publish(p.update, own.at, x, average, f);
}

} // namespace optim
