// dq of long images from the sums that Hopper's backward pass of attention has made over their key blocks: times the
// scale, rotated back, through the norm of q, rounded to Element.
//
// Half of a block takes a tile of 64 queries, its threads what those of a warpgroup have left. Each half has a row of the
// partial sums of gains and biases to itself.
#include "hopper_backward.cuh"
#include "rope_quads.cuh"

namespace hopper_backward {

DEVICE void finish(const AttentionBackwardHopper& hopper)
{
    constexpr int D = 128; // and any below
    constexpr int GROUPS = 2;
    begin_dependent();
    const AttentionBackward& p = hopper.all;
    const Schedule schedule{p.schedule, p.slots, p.heads};
    const int group = threadIdx.x / 128;
    const int thread = threadIdx.x % 128;
    const int warp = thread / 32;
    const int row_of_sums = GROUPS * (hopper.blocks + blockIdx.x);
    const bool summed = p.partial && p.norm.kind != NORM_NONE;
    if (p.partial) clear_partial(p, row_of_sums);
    ptx::barrier();
    const Shared<float> sums(ptx::shared_base() + group * 4 * 2 * D * 4);
    const int units = 2 * schedule.long_items();
    for (int unit = GROUPS * blockIdx.x + group; unit < units; unit += GROUPS * gridDim.x) {
        const HeadTile at = schedule.head_tile(unit / 2, p.cu_seqlens, p.tile_rows);
        const Head head = head_of(p, at.image, at.head);
        const int tile = 2 * at.tile + unit % 2;
        const int first = tile * QUERIES_OF_STAGE;
        const int left = head.length - first;
        if (left <= 0) continue;
        const int64_t place = (2 * int64_t(at.first) + tile) * p.heads + at.head;
        const Global<FragmentFour> sum(
            reinterpret_cast<FragmentFour*>(hopper.dq_sum + place * QUERIES_OF_STAGE * hopper.width));
        auto at_chunk = [&](int c) { return FragmentTile<D>::place(c, thread); };
        if (p.rope)
            rotate_quads_back([&](int c) { return sum.load(at_chunk(c)); },
                              [&](int c, const FragmentFour& four) { sum.store(at_chunk(c), four); }, p.head_dim / 2,
                              16 * warp, left, rope_of(p).from(head.start + first));
        FragmentFour fours[D / 8];
        UNROLL
        for (int c = 0; c < D / 8; c++)
            fours[c] = 8 * c < hopper.width ? sum.load(at_chunk(c)) : FragmentFour{};
        const HeadNorm norm = head_norm(p.norm, p.norm.q_gain, p.norm.q_bias, head.head, p.head_dim);
        Element* const target = rows_of(p, p.dq, p.dq_stride, head, first);
        finish_quads<D>([&](int c) { return fours[c]; }, 16 * warp, left, p.scale, p.head_dim, target, p.dq_stride,
                        rows_of(p, p.q, p.q_stride, head, first), norm, summed,
                        Shared<float>(sums.address + warp * 2 * D * 4));
        if (!summed) continue;
        ptx::barrier(1 + group, 128);
        add_sums<D>(p, sums, row_of_sums + group, head.head, Q_GAIN, thread);
        // The sums are read before those of the next rows come.
        ptx::barrier(1 + group, 128);
    }
}

} // namespace hopper_backward
