// The optimiser over flat arenas (step.cuh): gradient norm and what follows from it, AdamW, SGD, zeros, bf16 copies.
#include "update.cuh"

struct OptimNorm {
    const float* grads;
    double* partial; // [blocks]
    const OptimizerStep* step;
    OptimizerState* state;
    int64_t size; // of the arena, a multiple of 8
    int blocks;   // of optim_squares
    int unused;
};

// The gradients that nobody has squared yet, and sums of the squares of the others.
struct OptimRest {
    const float* grads;
    const OptimChunk* chunks; // [chunk_count]
    const double* squares;    // [square_count]
    double* partial;          // [blocks]
    const OptimizerStep* step;
    int64_t square_count;
    int chunk_count;
    int unused;
};

struct OptimZero {
    float* out;
    const OptimizerStep* step; // null: zeros in any case
    int64_t size; // a multiple of 8
};

struct OptimCast {
    bf16* out;
    const float* x;
    const OptimizerStep* step;   // null: to nearest
    const OptimizerState* state; // null: to nearest
    int64_t size;                // a multiple of 8
};

struct OptimAdd {
    float* out;
    const float* x;
    int64_t size; // a multiple of 8
};

namespace optim {

// Squares of the gradients, a partial sum a block: a thread takes every (8 threads of the grid)th eight.
DEVICE void sum_squares(const OptimNorm& p)
{
    constexpr int unroll = 4;
    begin_dependent();
    if (read(p.step->unfinished) != 0) return;
    int64_t stride = int64_t(gridDim.x) * threads * 8;
    double sum[1] = {0.0};
    int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * 8;
    for (int64_t base = first; base < p.size; base += unroll * stride) {
        float x[unroll][8];
        UNROLL
        for (int u = 0; u < unroll; u++) {
            UNROLL
            for (int i = 0; i < 8; i++) x[u][i] = 0.0f;
            if (base + u * stride < p.size) load(x[u], p.grads, base + u * stride);
        }
        UNROLL
        for (int u = 0; u < unroll; u++) sum[0] += squares(x[u]);
    }
    block_sums(sum);
    if (threadIdx.x == 0) Global<double>(p.partial).store(blockIdx.x, sum[0]);
}

// The same of the chunks and of what was summed before: a block takes every so manieth chunk, a thread every so manieth
// sum.
DEVICE void rest_squares(const OptimRest& p)
{
    begin_dependent();
    if (read(p.step->unfinished) != 0) return;
    double sum[1] = {0.0};
    for (int c = int(blockIdx.x); c < p.chunk_count; c += int(gridDim.x)) {
        OptimChunk chunk = Global<const OptimChunk>(p.chunks).load(c);
        int first = 8 * int(threadIdx.x);
        if (first >= chunk.length) continue;
        float x[8];
        load(x, p.grads, chunk.start + first);
        sum[0] += squares(x);
    }
    Global<const double> summed(p.squares);
    int64_t stride = int64_t(gridDim.x) * threads;
    for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < p.square_count; i += stride) {
        sum[0] += summed.load(i);
    }
    block_sums(sum);
    if (threadIdx.x == 0) Global<double>(p.partial).store(blockIdx.x, sum[0]);
}

// x^n, the same bits whenever: no running product, so that a resumed run goes on as if it had never stopped.
DEVICE double power(double x, uint64_t n)
{
    double result = 1.0;
    for (; n != 0; n >>= 1) {
        if (n & 1) result *= x;
        x *= x;
    }
    return result;
}

// One block: the norm, whether the step is taken, and its factors.
DEVICE void finish(const OptimNorm& p)
{
    begin_dependent();
    if (read(p.step->unfinished) != 0) {
        if (threadIdx.x == 0) write(p.state->factors.skip, 1);
        return;
    }
    Global<const double> partial(p.partial);
    double sum[1] = {0.0};
    for (int i = int(threadIdx.x); i < p.blocks; i += threads) sum[0] += partial.load(i);
    block_sums(sum);
    if (threadIdx.x != 0) return;
    const OptimizerStep& step = *p.step;
    OptimizerState& state = *p.state;
    double images = read(step.images);
    double scale = images > 0.0 ? 1.0 / images : 1.0;
    double norm = scale * sqrt(sum[0]);
    // Infinity minus itself is NaN, as NaN is.
    bool finite = norm - norm == 0.0;
    write(state.norm, norm);
    write(state.factors.skip, finite ? 0 : 1);
    if (!finite) {
        write(state.skipped, read(state.skipped) + 1);
        return;
    }
    uint64_t t = read(state.step) + 1;
    double lr = read(step.lr);
    double beta1 = read(step.beta1);
    double beta2 = read(step.beta2);
    double clip = read(step.clip);
    double correction1 = 1.0 - power(beta1, t);
    double correction2 = 1.0 - power(beta2, t);
    OptimizerFactors& f = state.factors;
    write(state.step, t);
    write(state.lr, lr);
    write(f.grad_scale, float(clip > 0.0 && norm > clip ? scale * (clip / norm) : scale));
    write(f.inverse1, float(1.0 / correction1));
    write(f.rate, float(lr / correction1));
    write(f.root2, float(1.0 / sqrt(correction2)));
    write(f.keep1, float(beta1));
    write(f.new1, float(1.0 - beta1));
    write(f.keep2, float(beta2));
    write(f.new2, float(1.0 - beta2));
    write(f.eps, float(read(step.eps)));
    write(f.new_average, float(1.0 - read(step.ema_decay)));
}

// AdamW: p -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p). Block = chunk.
DEVICE void adamw(const OptimUpdate& p)
{
    begin_dependent();
    OptimizerFactors f = read_factors(p.state);
    Eight own = own_elements(p);
    if (f.skip != 0 || !own.active) return;
    float x[8];
    float g[8];
    float m[8];
    float v[8];
    float average[8] = {};
    load(x, p.params, own.at);
    load(g, p.grads, own.at);
    load(m, p.m, own.at);
    load(v, p.v, own.at);
    if (p.average != nullptr) load(average, p.average, own.at);
    float decay = float(read(p.state->lr) * read(p.tensors[own.tensor].weight_decay));
    adam(g, m, v, f, f.rate);
    // One rounding of a parameter: 1 - lr weight_decay is often 1 in f32.
    UNROLL
    for (int i = 0; i < 8; i++) x[i] -= ptx::fused_multiply_add(decay, x[i], g[i]);
    store(p.m, own.at, m);
    store(p.v, own.at, v);
    publish(p, own.at, x, average, f);
}

// SGD: m = beta1 m + g, p -= lr (m + weight_decay p), with Nesterov momentum p -= lr (g + beta1 m + weight_decay p).
// Block = chunk.
DEVICE void sgd(const OptimUpdate& p)
{
    begin_dependent();
    OptimizerFactors f = read_factors(p.state);
    Eight own = own_elements(p);
    if (f.skip != 0 || !own.active) return;
    float x[8];
    float g[8];
    float m[8];
    float average[8] = {};
    load(x, p.params, own.at);
    load(g, p.grads, own.at);
    load(m, p.m, own.at);
    if (p.average != nullptr) load(average, p.average, own.at);
    double lr = read(p.state->lr);
    float rate = float(lr);
    float decay = float(lr * read(p.tensors[own.tensor].weight_decay));
    UNROLL
    for (int i = 0; i < 8; i++) {
        float grad = g[i] * f.grad_scale;
        m[i] = ptx::fused_multiply_add(f.keep1, m[i], grad);
        float step = p.nesterov != 0 ? ptx::fused_multiply_add(f.keep1, m[i], grad) : m[i];
        x[i] -= ptx::fused_multiply_add(decay, x[i], rate * step);
    }
    store(p.m, own.at, m);
    publish(p, own.at, x, average, f);
}

constexpr int flat_unroll = 4;

// Zeros, eight elements a thread and unroll; nothing where the step continues.
DEVICE void zero(const OptimZero& p)
{
    begin_dependent();
    if (p.step != nullptr && read(p.step->continues) != 0) return;
    constexpr float zeros[8] = {};
    UNROLL
    for (int u = 0; u < flat_unroll; u++) {
        int64_t at = ((int64_t(blockIdx.x) * flat_unroll + u) * threads + threadIdx.x) * 8;
        if (at < p.size) store(p.out, at, zeros);
    }
}

// out += x, eight elements a thread and unroll.
DEVICE void add(const OptimAdd& p)
{
    begin_dependent();
    UNROLL
    for (int u = 0; u < flat_unroll; u++) {
        int64_t at = ((int64_t(blockIdx.x) * flat_unroll + u) * threads + threadIdx.x) * 8;
        if (at >= p.size) continue;
        float sum[8];
        float x[8];
        load(sum, p.out, at);
        load(x, p.x, at);
        UNROLL
        for (int i = 0; i < 8; i++) sum[i] += x[i];
        store(p.out, at, sum);
    }
}

// bf16 copy of an arena: the same bits as the update wrote in its last step, where seed and step are those of it.
DEVICE void cast(const OptimCast& p)
{
    begin_dependent();
    bool stochastic = p.step != nullptr && p.state != nullptr;
    uint64_t seed = stochastic ? read(p.step->seed) : 0;
    uint64_t step = stochastic ? read(p.state->step) : 0;
    float x[flat_unroll][8];
    auto place = [](int u) { return ((int64_t(blockIdx.x) * flat_unroll + u) * threads + threadIdx.x) * 8; };
    UNROLL
    for (int u = 0; u < flat_unroll; u++) {
        if (place(u) < p.size) load(x[u], p.x, place(u));
    }
    UNROLL
    for (int u = 0; u < flat_unroll; u++) {
        if (place(u) < p.size) store_rounded(p.out, place(u), x[u], stochastic, seed, step);
    }
}

} // namespace optim
