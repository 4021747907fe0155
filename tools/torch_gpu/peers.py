"""Packed attention as others have it: cuDNN, torch's varlen attention (FlashAttention 2), FlashAttention 3 and 4."""

import contextlib
import sys
from typing import Any, Callable, NamedTuple


class Peer(NamedTuple):
    """Functions over packed q, k, v [T, H, Dh]; `backward` is a function, "autograd" or None."""

    forward: Callable
    backward: Any
    # What its backward pass runs in.
    mode: Callable = contextlib.nullcontext
    # Always the same bits: only its backward pass is another than that of the peer of that name without.
    deterministic: bool = False


def peers_of(torch):
    """Name -> peer, of those that are installed."""
    peers = {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        def varlen(q, k, v, cu, longest, scale):
            return varlen_attn(q, k, v, cu, cu, longest, longest)

        peers["torch varlen"] = Peer(varlen, "autograd")
        peers["torch varlen, deterministic"] = Peer(varlen, "autograd", lambda: deterministic(torch), True)
    except ImportError as reason:
        print(f"torch varlen not run: {reason}", file=sys.stderr)
    aten = torch.ops.aten
    if hasattr(aten, "_cudnn_attention_forward") and hasattr(aten, "_cudnn_attention_backward"):
        # By name: their order is not the same in every caller within PyTorch itself.
        def of_batch(q, k, v, cu, longest, scale):
            return dict(
                query=q, key=k, value=v, attn_bias=None, cum_seq_q=cu, cum_seq_k=cu, max_q=longest, max_k=longest,
                dropout_p=0.0, is_causal=False, scale=scale,
            )

        def cudnn(q, k, v, cu, longest, scale):
            return aten._cudnn_attention_forward(
                **of_batch(q, k, v, cu, longest, scale), compute_log_sumexp=True, return_debug_mask=False
            )

        def cudnn_backward(dout, q, k, v, results, cu, longest, scale):
            return aten._cudnn_attention_backward(
                **of_batch(q, k, v, cu, longest, scale), grad_out=dout, out=results[0], logsumexp=results[1],
                philox_seed=results[6], philox_offset=results[7],
            )

        peers["cuDNN varlen"] = Peer(cudnn, cudnn_backward)
    try:
        from fa3_fwd_interface import flash_attn_varlen_func as fa3_varlen

        def fa3(q, k, v, cu, longest, scale):
            return first(fa3_varlen(q, k, v, cu, cu, longest, longest, softmax_scale=scale))

        peers["FA3"] = Peer(fa3, None)
    except ImportError as reason:
        print(f"FA3 not run: {reason}", file=sys.stderr)
    try:
        from flash_attn.cute import flash_attn_varlen_func as fa4_varlen

        def fa4(same_bits):
            return lambda q, k, v, cu, longest, scale: first(
                fa4_varlen(
                    q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
                    softmax_scale=scale, deterministic=same_bits,
                )
            )

        peers["FA4"] = Peer(fa4(False), "autograd")
        peers["FA4, deterministic"] = Peer(fa4(True), "autograd", deterministic=True)
    except Exception as reason:  # It compiles while it is imported, and fails in ways of its own.
        print(f"FA4 not run: {type(reason).__name__}: {reason}", file=sys.stderr)
    return peers


def first(results):
    """Without lse, where it is returned too."""
    return results[0] if isinstance(results, (tuple, list)) else results


@contextlib.contextmanager
def deterministic(torch):
    """PyTorch's own mode; new memory is not filled, which would be measured too."""
    settings = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = filled
