"""Packed attention with grouped key-value heads and rotary positions, beside PyTorch's own:

    tools/c-library --emulator /opt/trencadis
    python examples/python/attention.py /opt/trencadis/lib/libtrencadis.so

on GPU 0 where PyTorch sees one, else on tensors of the host by the emulator.
"""

import math
import sys

import torch
import torch.nn.functional as F
from packed_attention import PackedAttention
from trencadis import Library


def reference(q, k, v, starts, rope):
    """The same by PyTorch, image by image."""

    def rotate(x):
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], rope[:, None, :, 0], rope[:, None, :, 1]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (rotate(k), v))
    images = [[x[a:b].transpose(0, 1) for x in (rotate(q), k, v)] for a, b in zip(starts, starts[1:])]
    own = lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v  # noqa: E731
    attend = getattr(F, "scaled_dot_product_attention", own)  # PyTorch 2.0 has it.
    return torch.cat([attend(*image).transpose(0, 1) for image in images])


def main(path):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(1, device=device)  # Makes the context current that the library joins.
    library = Library(path)
    kernels = library.open(emulator=device == "cpu")
    starts, heads, kv_heads, head_dim = [0, 3, 20, 45], 4, 2, 64

    def normal(count):
        return torch.randn(starts[-1], count, head_dim, device=device).bfloat16()

    inputs, dout = [normal(count).requires_grad_() for count in (heads, kv_heads, kv_heads)], normal(heads)
    angles = 6 * torch.rand(starts[-1], head_dim // 2, device=device)
    rope, cu = torch.stack((angles.cos(), angles.sin()), -1), torch.tensor(starts, dtype=torch.int32, device=device)
    out = PackedAttention.apply(library, kernels, *inputs, cu, rope)
    found = [out, *torch.autograd.grad(out, inputs, dout)]

    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = reference(*exact, starts, rope.double())
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dout.double())]
    worst = 0.0
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted):
        apart = float((x.double() - y).norm() / y.norm())
        print(f"{name} of torch {torch.__version__} and this library on {device}: {apart:.1e} of its length apart")
        worst = max(worst, apart)
    library.call("close", kernels)
    return 0 if worst < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
