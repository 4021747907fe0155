// LAMB in two passes, because a tensor's step depends on the norms of all of it:
//   u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
//   p -= lr r u,  r = |p| / |u| of the tensor, 1 where either is 0 or where the tensor does not adapt
// The first pass leaves u where the gradient was, so that no further arena is needed. Where several ranks have slices
// of the tensors, each sums the squares of its own between the passes, and the rates take them of all ranks.
#include "update.cuh"

namespace optim {

// Block = chunk: moments, u, and the squares of the chunk.
DEVICE void lamb_update(const OptimUpdate& p)
{
    begin_dependent();
    OptimizerFactors f = read_factors(p.state);
    Eight own = own_elements(p);
    if (f.skip != 0) return;
    double sums[2] = {0.0, 0.0};
    if (own.active) {
        float x[8];
        float g[8];
        float m[8];
        float v[8];
        load(x, p.params, own.at);
        load(g, p.grads, own.at);
        load(m, p.m, own.at);
        load(v, p.v, own.at);
        float decay = float(read(p.tensors[own.tensor].weight_decay));
        adam(g, m, v, f, f.inverse1);
        UNROLL
        for (int i = 0; i < 8; i++) g[i] = ptx::fused_multiply_add(decay, x[i], g[i]);
        store(p.m, own.at, m);
        store(p.v, own.at, v);
        store(p.grads, own.at, g);
        sums[0] = squares(x);
        sums[1] = squares(g);
    }
    block_sums(sums);
    if (threadIdx.x != 0) return;
    Global<double> partial(p.partial);
    partial.store(2 * int64_t(blockIdx.x), sums[0]);
    partial.store(2 * int64_t(blockIdx.x) + 1, sums[1]);
}

// Sums of `count` pairs, `stride` pairs apart, right in thread 0. Collective.
DEVICE void sum_pairs(double (&sums)[2], const double* pairs, int64_t first, int count, int64_t stride)
{
    Global<const double> memory(pairs);
    sums[0] = sums[1] = 0.0;
    for (int i = int(threadIdx.x); i < count; i += threads) {
        sums[0] += memory.load(2 * (first + i * stride));
        sums[1] += memory.load(2 * (first + i * stride) + 1);
    }
    block_sums(sums);
}

// Block = slice: its chunks.
DEVICE void lamb_squares(const OptimUpdate& p)
{
    begin_dependent();
    if (read(p.state->factors.skip) != 0) return;
    const OptimTensor& slice = p.tensors[blockIdx.x];
    int whole = read(slice.whole);
    if (whole < 0) return;
    double sums[2];
    sum_pairs(sums, p.partial, read(slice.first_chunk), read(slice.chunks), 1);
    if (threadIdx.x != 0) return;
    Global<double> squares(p.squares);
    squares.store(2 * int64_t(whole), sums[0]);
    squares.store(2 * int64_t(whole) + 1, sums[1]);
}

// Block = tensor: its chunks, or the squares of its slices on all ranks.
DEVICE void lamb_rates(const OptimUpdate& p)
{
    begin_dependent();
    if (read(p.state->factors.skip) != 0) return;
    const OptimTensor& tensor = p.tensors[blockIdx.x];
    double sums[2] = {0.0, 0.0};
    if (p.ranks == 0) {
        sum_pairs(sums, p.partial, read(tensor.first_chunk), read(tensor.chunks), 1);
    } else if (read(tensor.whole) >= 0) {
        sum_pairs(sums, p.squares, read(tensor.whole), p.ranks, p.wholes);
    }
    if (threadIdx.x != 0) return;
    bool adapts = read(tensor.adapts) != 0 && sums[0] > 0.0 && sums[1] > 0.0;
    double ratio = adapts ? sqrt(sums[0]) / sqrt(sums[1]) : 1.0;
    Global<float>(p.rates).store(blockIdx.x, float(read(p.state->lr) * ratio));
}

// Block = chunk.
DEVICE void lamb_apply(const OptimUpdate& p)
{
    begin_dependent();
    OptimizerFactors f = read_factors(p.state);
    Eight own = own_elements(p);
    if (f.skip != 0 || !own.active) return;
    float x[8];
    float u[8];
    float average[8] = {};
    load(x, p.params, own.at);
    load(u, p.grads, own.at);
    if (p.average != nullptr) load(average, p.average, own.at);
    float rate = Global<const float>(p.rates).load(own.tensor);
    UNROLL
    for (int i = 0; i < 8; i++) x[i] = ptx::fused_multiply_add(-rate, u[i], x[i]);
    publish(p, own.at, x, average, f);
}

} // namespace optim
