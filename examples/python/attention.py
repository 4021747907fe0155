"""Packed attention with grouped key-value heads and rotary positions as a function of PyTorch, beside PyTorch's own.

    tools/c-library --emulator /opt/trencadis
    python examples/python/attention.py /opt/trencadis/lib/libtrencadis.so

On GPU 0 where PyTorch sees one, else on tensors of the host by the emulator.
"""

import math
import sys

import torch
import torch.nn.functional as F
from trencadis import Library


class PackedAttention(torch.autograd.Function):
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] in bf16, `cu` the starts of the images and the end of the
    last one, `rope` cosine and sine of each pair of neighbouring columns, [T, head_dim / 2, 2]."""

    @staticmethod
    def forward(ctx, library, kernels, q, k, v, cu, rope):
        q, k, v = (x.contiguous() for x in (q, k, v))
        (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
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


def reference(q, k, v, cu, rope):
    """The same by PyTorch, image by image in f64."""

    def rotate(x):
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], rope[:, None, :, 0], rope[:, None, :, 1]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    shared = q.shape[1] // k.shape[1]
    q, k = rotate(q), rotate(k).repeat_interleave(shared, 1)
    parts = [[x[a:b].transpose(0, 1) for x in (q, k, v.repeat_interleave(shared, 1))] for a, b in zip(cu, cu[1:])]
    own = lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v  # noqa: E731
    attend = getattr(F, "scaled_dot_product_attention", own)  # Before PyTorch 2.0 there was none.
    return torch.cat([attend(*part).transpose(0, 1) for part in parts])


def main(path):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(1, device=device)  # Makes the context current that the library joins.
    library = Library(path)
    kernels = library.open(emulator=device == "cpu")
    starts, heads, kv_heads, head_dim = [0, 3, 20, 45], 4, 2, 64
    normal = lambda count: torch.randn(starts[-1], count, head_dim, device=device).bfloat16()  # noqa: E731
    inputs = [normal(count).requires_grad_() for count in (heads, kv_heads, kv_heads)]
    angles = torch.rand(starts[-1], head_dim // 2, device=device) * 6
    rope, cu = torch.stack((angles.cos(), angles.sin()), -1), torch.tensor(starts, dtype=torch.int32, device=device)
    dout = normal(heads)
    out = PackedAttention.apply(library, kernels, *inputs, cu, rope)
    found = [out, *torch.autograd.grad(out, inputs, dout)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = reference(*exact, starts, rope.double())
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dout.double())]
    worst = 0.0
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted):
        apart = float((x.double() - y).norm() / y.norm())
        print(f"{name}: {apart:.1e} of its length apart")
        worst = max(worst, apart)
    library.call("close", kernels)
    return 0 if worst < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
