"""Packed attention as a function of PyTorch, on a GPU or by the emulator."""

import torch


class PackedAttention(torch.autograd.Function):
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] in bf16, `cu` the starts of the images and the end of the
    last one, `rope` cosine and sine of each pair of neighbouring columns, [T, head_dim / 2, 2]."""

    @staticmethod
    def forward(ctx, library, kernels, q, k, v, cu, rope):
        q, k, v = (x.contiguous() for x in (q, k, v))
        (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
        # The library sees addresses alone.
        for name, x, dtype, shape in (
            ("q", q, torch.bfloat16, q.shape),
            ("k", k, torch.bfloat16, (tokens, kv_heads, head_dim)),
            ("v", v, torch.bfloat16, k.shape),
            ("cu", cu, torch.int32, cu.shape),
            ("rope", rope, torch.float32, (tokens, head_dim // 2, 2)),
        ):
            if x.dtype != dtype or x.shape != shape or x.device != q.device or not x.is_contiguous():
                raise ValueError(f"{name} must be {dtype} {tuple(shape)}, contiguous, on {q.device}")
        call = library.struct(
            "attention", tokens=tokens, slots=len(cu) - 1, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            rope_kind=library.numbers["TRENCADIS_ROPE_INTERLEAVED"], rope=rope.data_ptr(), cu_seqlens=cu.data_ptr(),
        )
        sizes = library.struct("attention_sizes")
        library.call("attention_plan", kernels, call, sizes)
        words = [
            torch.zeros(count, dtype=torch.int32, device=q.device)
            for count in (sizes.forward_schedule_words, sizes.backward_schedule_words)
        ]
        room = max(sizes.forward_workspace_bytes, sizes.backward_workspace_bytes)
        workspace = torch.empty(room, dtype=torch.uint8, device=q.device)
        out, lse = torch.empty_like(q), torch.empty(tokens, heads, device=q.device)
        call.forward_schedule, call.backward_schedule = (x.data_ptr() for x in words)
        call.workspace, call.workspace_bytes = workspace.data_ptr(), room
        call.q, call.k, call.v, call.out, call.lse = (x.data_ptr() for x in (q, k, v, out, lse))
        # A model makes the schedule once for a batch, before its layers.
        library.call("attention_schedule", kernels, stream_of(q), call)
        library.call("attention_forward", kernels, stream_of(q), call)
        ctx.save_for_backward(q, k, v, out, lse, cu, rope, workspace, *words)  # Memory that `call` names.
        ctx.call, ctx.library, ctx.kernels = call, library, kernels
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors[:3]
        dout, gradients, call = dout.contiguous(), [torch.empty_like(x) for x in (q, k, v)], ctx.call
        call.dq, call.dk, call.dv = (x.data_ptr() for x in gradients)
        call.dout = dout.data_ptr()
        ctx.library.call("attention_backward", ctx.kernels, stream_of(q), call)
        return None, None, *gradients, None, None


def stream_of(x):
    return torch.cuda.current_stream().cuda_stream if x.is_cuda else None
