"""Packed attention beside cuDNN, torch's varlen attention and FlashAttention 3."""

import ctypes
import math
import random
import sys

from .library import AttentionCall, AttentionSizes
from .measure import check, seconds, sets_for, stream_of

HEADS = [(16, 64), (16, 80), (8, 128)]
TOKENS = 32768
LENGTHS = [64, 196, 256, 577, 1024, 4096]
MIXES = [256, 512]


def peers_of(torch):
    """Name -> functions (forward, backward or None), each over packed q, k, v [T, H, Dh]."""
    peers = {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        def varlen(q, k, v, cu, longest, scale):
            return varlen_attn(q, k, v, cu, cu, longest, longest)

        peers["torch varlen"] = (varlen, "autograd")
    except ImportError as reason:
        print(f"torch varlen not run: {reason}", file=sys.stderr)
    aten = torch.ops.aten
    if hasattr(aten, "_cudnn_attention_forward") and hasattr(aten, "_cudnn_attention_backward"):

        def cudnn(q, k, v, cu, longest, scale):
            return aten._cudnn_attention_forward(
                q, k, v, None, cu, cu, longest, longest, True, 0.0, False, False, scale=scale
            )

        def cudnn_backward(dout, q, k, v, results, cu, longest, scale):
            return aten._cudnn_attention_backward(
                dout, q, k, v, results[0], results[1], results[6], results[7], None, cu, cu, longest, longest,
                0.0, False, scale=scale,
            )

        peers["cuDNN varlen"] = (cudnn, cudnn_backward)
    try:
        from fa3_fwd_interface import flash_attn_varlen_func

        def fa3(q, k, v, cu, longest, scale):
            out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, softmax_scale=scale)
            return out[0] if isinstance(out, tuple) else out

        peers["FA3"] = (fa3, None)
    except ImportError as reason:
        print(f"FA3 not run: {reason}", file=sys.stderr)
    return peers


def mix(high, tokens):
    """NaViT's images: side uniform in [64, high], aspect 1:2 to 2:1, patch 16."""
    rng, lengths = random.Random(0), []
    while True:
        side, aspect = rng.uniform(64, high) / 16, math.exp(rng.uniform(-math.log(2), math.log(2)))
        length = max(1, round(side * math.sqrt(aspect))) * max(1, round(side / math.sqrt(aspect)))
        if sum(lengths) + length > tokens:
            return lengths
        lengths.append(length)


def rows(torch, library, quick):
    """(name, TFLOP/s ours with RMS norm of q and k, TFLOP/s of the peers without) forward and backward."""
    peers = peers_of(torch)
    for heads, head_dim in HEADS[:1] if quick else HEADS:
        batches = [(f"S {s}", [s] * (TOKENS // s)) for s in LENGTHS]
        batches += [(f"r~U(64,{high})", mix(high, TOKENS)) for high in MIXES]
        for name, lengths in batches:
            yield from pair(torch, library, peers, heads, head_dim, name, lengths)


def pair(torch, library, peers, heads, head_dim, name, lengths):
    tokens, longest, width = sum(lengths), max(lengths), heads * head_dim
    scale = head_dim**-0.5
    sets = sets_for(torch, 2 * 8 * tokens * width)
    random = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    qkv, dout = random(sets, tokens, 3, heads, head_dim), random(sets, tokens, heads, head_dim)
    out, dqkv = torch.empty_like(dout), torch.empty_like(qkv)
    lse = torch.empty(sets, tokens, heads, device="cuda")
    gains = 1 + 0.1 * torch.randn(2, width, device="cuda")
    dgains = torch.empty(2, width, device="cuda")
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    cu = torch.tensor(starts, device="cuda", dtype=torch.int32)
    fault = torch.zeros(1, device="cuda", dtype=torch.int32)
    call = AttentionCall(
        tokens=tokens, slots=len(lengths), longest=longest, heads=heads, head_dim=head_dim, stride=3 * width,
        scale=scale, eps=1e-6, norm=1, q_gain=gains[0].data_ptr(), k_gain=gains[1].data_ptr(),
        cu_seqlens=cu.data_ptr(), fault=fault.data_ptr(), dq_gain=dgains[0].data_ptr(),
        dk_gain=dgains[1].data_ptr(),
    )
    sizes = AttentionSizes()
    library.call("attention_sizes", ctypes.byref(call), ctypes.byref(sizes))
    words = [
        torch.empty(size, device="cuda", dtype=torch.int32)
        for size in (sizes.forward_schedule, sizes.backward_schedule)
    ]
    workspace = torch.empty(max(sizes.workspace_bytes, 16), device="cuda", dtype=torch.uint8)
    call.forward_schedule, call.backward_schedule = (x.data_ptr() for x in words)
    call.workspace = workspace.data_ptr()
    calls = []
    for i in range(sets):
        one = AttentionCall.from_buffer_copy(call)
        one.q, one.k, one.v = (qkv[i, 0, j].data_ptr() for j in range(3))
        one.dq, one.dk, one.dv = (dqkv[i, 0, j].data_ptr() for j in range(3))
        one.out, one.dout, one.lse = out[i].data_ptr(), dout[i].data_ptr(), lse[i].data_ptr()
        calls.append(one)
    library.call("attention_schedule", stream_of(torch), ctypes.byref(calls[0]))

    def ours(i):
        library.call("attention_forward", stream_of(torch), ctypes.byref(calls[i]))

    def ours_backward(i):
        library.call("attention_backward", stream_of(torch), ctypes.byref(calls[i]))

    for i in range(sets):
        ours(i)
        ours_backward(i)
    torch.cuda.synchronize()
    if int(fault):
        raise RuntimeError(f"cu_seqlens was refused with {int(fault)}")
    check_images(torch, qkv[0], dout[0], out[0], dqkv[0], gains, starts, scale)
    operations = 4 * sum(length * length for length in lengths) * width / 1e12
    # Contiguous copies: what peers are given in practice.
    packed = [[x.contiguous().requires_grad_() for x in one.unbind(1)] for one in qkv]
    found, found_backward = {}, {}
    for peer, (forward, backward) in peers.items():
        try:
            with torch.no_grad():
                time = seconds(torch, lambda i: forward(*packed[i], cu, longest, scale), sets)
            found[peer] = operations / time
            if backward == "autograd":
                results = [forward(*one, cu, longest, scale) for one in packed]
                time = seconds(
                    torch,
                    lambda i: torch.autograd.grad(results[i], packed[i], dout[i], retain_graph=True),
                    sets,
                    capture=False,
                )
                found_backward[peer] = 2.5 * operations / time
            elif backward:
                with torch.no_grad():
                    results = [forward(*one, cu, longest, scale) for one in packed]
                    time = seconds(
                        torch,
                        lambda i: backward(dout[i], *packed[i], results[i], cu, longest, scale),
                        sets,
                    )
                found_backward[peer] = 2.5 * operations / time
        except (RuntimeError, TypeError, NotImplementedError) as reason:
            print(f"{peer} not run at {heads}x{head_dim} {name}: {str(reason).splitlines()[0]}", file=sys.stderr)
    label = f"{heads}x{head_dim} {name}"
    yield f"forward {label}", operations / seconds(torch, ours, sets), found
    yield f"backward {label}", 2.5 * operations / seconds(torch, ours_backward, sets), found_backward


def check_images(torch, qkv, dout, out, dqkv, gains, starts, scale):
    """The first, the longest and the last image against f64."""
    images = list(zip(starts, starts[1:]))
    chosen = {images[0], max(images, key=lambda image: image[1] - image[0]), images[-1]}
    for start, end in chosen:
        rows = qkv[start:end].double().requires_grad_()
        heads, head_dim = rows.shape[2:]
        q, k, v = rows.unbind(1)
        norm = lambda x, gain: (  # noqa: E731
            x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain.double().view(heads, head_dim)
        )
        scores = torch.einsum("ihd,jhd->hij", norm(q, gains[0]), norm(k, gains[1])) * scale
        wanted = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
        (gradient,) = torch.autograd.grad(wanted, rows, dout[start:end].double())
        check("attention forward", out[start:end], wanted, 2e-4)
        check("attention backward", dqkv[start:end], gradient, 1e-3)
