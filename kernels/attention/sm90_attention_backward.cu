// Packed attention with QK-norm and rotary position embedding, backward, on Hopper: wgmma fed by copies that run ahead.
// The maths, heads that share keys and values, the partial sums of gains and biases and the rows that belong to no
// image are as in sm80_attention_backward.cu.
//
// A block is three warpgroups, stays for many items, and has a multiprocessor for itself. The first warpgroup copies
// blocks of 128 keys (k^, v) and stages of 64 queries (q^, dout, lse, delta) into two rings. The other two multiply: each
// has 64 keys of a block, their dk and dv in registers. For each stage both make
//
//   s^T = k^ q^^T      dp^T = v dout^T      p^T = exp(..)      ds^T = p^T (dp^T - delta)
//
// whose rows are keys, so that p^T and ds^T, rounded to Element, are operands from registers for dv += p^T dout and
// dk += ds^T q^. ds^T goes to shared memory as well, where one of the two, by turns, makes dq = ds k^ of the stage over
// all keys of the block, while the other goes on.
//
//   short images  all stages stay in shared memory for one key block after another; dq of a tile is summed in shared
//                 memory, where each thread finds its own again. The warpgroup that copies normalises and rotates q
//                 and k and makes delta.
//   up to 64 rows two heads share a block, one for each warpgroup
//   long images   an item is a key block of one head. dq is summed in global memory, f32, in the order of Window: the same
//                 bits in every run, without waiting for others as a rule. q^, k^ and delta come from
//                 attention_prepare, and attention_backward_finish makes dq of the sums.
//
// The order of a Window depends on the number of blocks where an image has more key blocks than that. All else depends on
// an image alone.
#include "hopper_backward_copy.cuh"
#include "hopper_backward_multiply.cuh"

namespace hopper_backward {

DEVICE void fill_zeros(uint32_t address, int bytes)
{
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) Shared<Vec16>(address).store(i, Vec16{});
}

template <int D>
DEVICE void gradients(const AttentionBackwardHopper& hopper)
{
    const AttentionBackward& p = hopper.all;
    const Memory<D> memory;
    // dq is made of 64 queries, whether there is ds of all or not.
    fill_zeros(memory.scores().base, Memory<D>::Scores::BYTES);
    fill_zeros(memory.zeros(), Memory<D>::Keys::ZERO_BYTES);
    if (threadIdx.x == 0) memory.begin();
    ptx::dependency_wait();
    const Schedule schedule{p.schedule, p.slots, p.heads};
    const int used = schedule.rows();
    const int width = p.heads * p.head_dim;
    zero_rows(p.dq, p.dq_stride, width, used, p.tokens);
    zero_rows(p.dk, p.dk_stride, width, used, p.tokens);
    zero_rows(p.dv, p.dv_stride, width, used, p.tokens);
    if (p.partial) clear_partial(p, 2 * blockIdx.x);
    ptx::fence_proxy_async();
    ptx::barrier();
    const uint32_t group = ptx::warp_id() / 4;
    if (group == 0) {
        ptx::decrease_registers<88>();
        if (ptx::warp_id() < COPIERS_OF_LONG)
            Copier<D, true>(hopper).run();
        else
            Mover<D>(hopper).run();
        Copier<D, false>(hopper).run();
        // The next launch may take the multiprocessors that run out of work; it waits before it reads results.
        ptx::launch_dependents();
    } else {
        ptx::increase_registers<208>();
        Multiplier<D>(hopper, group - 1).run();
    }
}

} // namespace hopper_backward
