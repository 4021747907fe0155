// What the update rules share: their operands, and what follows from new parameters. AdamW and LAMB (You et al., "Large
// batch optimization for deep learning", ICLR 2020) begin with Adam's moments, with the factors of the step:
//   g = grad_scale g,  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
// Every operation is that of src/cpu/optim.rs, in the same order and with the same fused multiplications, so that
// the same factors give the same bits.
#pragma once

#include "step.cuh"

struct OptimUpdate {
    float* params;
    float* grads; // LAMB leaves its update here
    float* m;
    float* v; // null: SGD
    bf16* weights;  // rounded parameters, or null
    float* average; // moving average, or null
    const OptimTensor* tensors;
    const OptimChunk* chunks;
    const OptimizerStep* step;
    const OptimizerState* state;
    double* partial;  // LAMB: [chunks][2], squares of parameters and of updates
    float* rates;     // LAMB: [tensors], lr times trust ratio
    double* squares;  // LAMB of slices: [ranks][wholes][2], or of this rank alone; those of parameters and updates
    int stochastic;   // whether `weights` are rounded randomly
    int ranks;        // that `squares` are of; 0: the arena has all of each tensor
    int wholes;       // tensors of which the arena has slices
    int nesterov;     // SGD: whether the step looks ahead by one momentum
};

namespace optim {

// The eight elements of this thread.
struct Eight {
    int tensor;
    int64_t at;
    bool active;
};

DEVICE Eight own_elements(const OptimUpdate& p)
{
    OptimChunk chunk = Global<const OptimChunk>(p.chunks).load(blockIdx.x);
    int first = 8 * int(threadIdx.x);
    return Eight{chunk.tensor, chunk.start + first, first < chunk.length};
}

// New moments; g becomes what is divided: m / (1 - beta1^t) times `factor` over the root of v's, where
// `factor` has the bias correction.
DEVICE void adam(float (&g)[8], float (&m)[8], float (&v)[8], const OptimizerFactors& f, float factor)
{
    UNROLL
    for (int i = 0; i < 8; i++) {
        float grad = g[i] * f.grad_scale;
        m[i] = ptx::fused_multiply_add(f.keep1, m[i], f.new1 * grad);
        v[i] = ptx::fused_multiply_add(f.keep2, v[i], f.new2 * grad * grad);
        g[i] = factor * m[i] / ptx::fused_multiply_add(sqrtf(v[i]), f.root2, f.eps);
    }
}

// Stores new parameters and what follows from them.
DEVICE void publish(const OptimUpdate& p, int64_t at, const float (&x)[8], float (&average)[8],
                    const OptimizerFactors& f)
{
    store(p.params, at, x);
    if (p.average != nullptr) {
        UNROLL
        for (int i = 0; i < 8; i++) {
            average[i] = ptx::fused_multiply_add(f.new_average, x[i] - average[i], average[i]);
        }
        store(p.average, at, average);
    }
    if (p.weights != nullptr) {
        bool stochastic = p.stochastic != 0;
        uint64_t seed = stochastic ? read(p.step->seed) : 0;
        uint64_t step = stochastic ? read(p.state->step) : 0;
        store_rounded(p.weights, at, x, stochastic, seed, step);
    }
}

} // namespace optim
