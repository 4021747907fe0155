"""The GPU mode of compare_torch.py: this crate's kernels beside PyTorch's in one process.

The kernels come as a library (examples/torch_bridge.rs), loaded with ctypes. PyTorch owns context, memory and
stream; the library gets addresses. Every result is first compared with a reference in f64. Then both sides are
timed in the same way: operands are random and rotate through more than three times the L2 cache, a CUDA graph
of one pass over them is replayed, and the median over replays is taken by events.

--dry-run does what needs neither a GPU nor PyTorch: it loads the library and checks that both sides agree on
every struct and that a missing device is told in one sentence.
"""

import ctypes
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHES = 3  # operands together are so many times the L2 cache
REPLAYS = 20

LAYOUTS = {"nt": 0, "nn": 1, "tn": 2}
FUSED = {"plain": 0, "gelu": 1, "residual": 2, "gelu_grad": 3, "sum": 4}

# Width and hidden width of the MLP, tokens.
GEMM_WIDTHS = [
    (192, 768, 16384), (384, 1536, 16384), (768, 3072, 16384), (1024, 4096, 16384), (1152, 4304, 16384),
    (1280, 5120, 16384), (1408, 6144, 16384), (1664, 8192, 16384), (6144, 24576, 8192),
]
ATTENTION_HEADS = [(16, 64), (16, 80), (8, 128)]
ATTENTION_TOKENS = 32768
ATTENTION_LENGTHS = [64, 196, 256, 577, 1024, 4096]
ATTENTION_MIXES = [256, 512]


class GemmCall(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("m", "n", "k")]
    _fields_ += [(name, ctypes.c_int32) for name in ("layout", "fused")]
    _fields_ += [
        (name, ctypes.c_uint64)
        for name in ("a", "b", "out", "bias", "side", "bias_grad", "workspace", "workspace_bytes")
    ]


class AttentionCall(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("tokens", "slots", "longest", "heads", "head_dim", "stride")
    ]
    _fields_ += [(name, ctypes.c_double) for name in ("scale", "eps")]
    _fields_ += [("norm", ctypes.c_int64)]
    _fields_ += [
        (name, ctypes.c_uint64)
        for name in (
            "q", "k", "v", "out", "lse", "q_gain", "k_gain", "cu_seqlens", "forward_schedule",
            "backward_schedule", "fault", "dout", "dq", "dk", "dv", "dq_gain", "dk_gain", "workspace",
        )
    ]


class AttentionSizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in ("forward_schedule", "backward_schedule", "workspace_bytes")
    ]


class Library:
    """The crate's kernels for the CUDA context that is current."""

    def __init__(self, path):
        self.dll = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        signatures = {
            "trencadis_open": (pointer, []),
            "trencadis_close": (None, [pointer]),
            "trencadis_error": (number, [ctypes.c_char_p, ctypes.c_uint64]),
            "trencadis_struct_bytes": (number, [ctypes.c_int32]),
            "trencadis_gemm_workspace": (number, [pointer, ctypes.POINTER(GemmCall)]),
            "trencadis_gemm": (number, [pointer, pointer, ctypes.POINTER(GemmCall)]),
            "trencadis_attention_sizes": (
                number, [pointer, ctypes.POINTER(AttentionCall), ctypes.POINTER(AttentionSizes)],
            ),
        }
        for name in ("schedule", "forward", "backward"):
            signatures[f"trencadis_attention_{name}"] = (number, [pointer, pointer, ctypes.POINTER(AttentionCall)])
        for name, (result, arguments) in signatures.items():
            function = getattr(self.dll, name)
            function.restype, function.argtypes = result, arguments
        for which, struct in enumerate((GemmCall, AttentionCall, AttentionSizes)):
            theirs = self.dll.trencadis_struct_bytes(which)
            if theirs != ctypes.sizeof(struct):
                sys.exit(f"{struct.__name__} has {ctypes.sizeof(struct)} bytes here and {theirs} in {path}")
        self.kernels = None

    def error(self):
        text = ctypes.create_string_buffer(1000)
        length = self.dll.trencadis_error(text, len(text))
        return text.raw[:length].decode(errors="replace")

    def open(self):
        self.kernels = self.dll.trencadis_open()
        return self.kernels is not None

    def call(self, name, *arguments):
        result = getattr(self.dll, f"trencadis_{name}")(self.kernels, *arguments)
        if result < 0:
            raise RuntimeError(f"{name}: {self.error()}")
        return result


def library_path(given):
    """The library, built unless it is given."""
    if given:
        return given
    subprocess.run(["cargo", "build", "--release", "--example", "torch_bridge"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "release" / "examples" / "libtorch_bridge.so"


def dry_run(path):
    library = Library(path)
    if library.open():
        print("the library sees a CUDA context and opens its kernels")
        library.dll.trencadis_close(library.kernels)
    else:
        print(f"the library loads, its structs agree; no kernels here: {library.error()}")


def distance(x, y):
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


def check(what, ours, wanted, limit):
    found = distance(ours, wanted)
    if not found <= limit:
        raise RuntimeError(f"{what}: distance {found:.2e} from the reference, expected at most {limit:.0e}")


def sets_for(torch, bytes_of_set):
    properties = torch.cuda.get_device_properties(0)
    wanted = CACHES * properties.L2_cache_size // bytes_of_set + 2
    return max(2, min(wanted, properties.total_memory // 4 // bytes_of_set))


def seconds(torch, run, sets, capture=True):
    """Median seconds of run(set). One pass over the sets, or more, is a graph; autograd, which goes back to the
    stream of its forward pass, is queued as is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            run(i)
    torch.cuda.synchronize()
    passes = -(-16 // sets)

    def queue():
        for _ in range(passes):
            for i in range(sets):
                run(i)

    replay = queue
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            queue()
        replay = graph.replay
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (sets * passes))
    return statistics.median(times[3:])


def stream_of(torch):
    return torch.cuda.current_stream().cuda_stream


def gemm_rows(torch, library):
    """(name, TFLOP/s ours, TFLOP/s of cuBLAS for the product alone) of every product of a ViT's layers."""
    for d, hidden, tokens in GEMM_WIDTHS:
        products = []
        for inner, outer, forward, backward in (
            (d, 3 * d, "plain", "plain"), (d, d, "residual", "plain"), (d, hidden, "gelu", "plain"),
            (hidden, d, "residual", "gelu_grad"),
        ):
            products += [("nt", tokens, outer, inner, fused) for fused in ("plain", forward)]
            products += [("nn", tokens, inner, outer, fused) for fused in ("plain", backward)]
            products.append(("tn", outer, inner, tokens, "sum"))
        for product in dict.fromkeys(products):
            yield gemm_row(torch, library, *product)


def gemm_row(torch, library, layout, m, n, k, fused):
    wide = torch.float32 if fused == "sum" else torch.bfloat16
    shape_a = (k, m) if layout == "tn" else (m, k)
    shape_b = (n, k) if layout == "nt" else (k, n)
    sets = sets_for(torch, 2 * (m * k + n * k + 2 * m * n))
    random = lambda *shape: torch.randn(sets, *shape, device="cuda").bfloat16()  # noqa: E731
    a, b, side = random(*shape_a), random(*shape_b), random(m, n)
    kept = side.clone()
    out = torch.empty(sets, m, n, device="cuda", dtype=wide)
    bias, bias_grad = torch.randn(n, device="cuda"), torch.empty(n, device="cuda")
    calls = []
    for i in range(sets):
        call = GemmCall(m=m, n=n, k=k, layout=LAYOUTS[layout], fused=FUSED[fused])
        call.a, call.b, call.out, call.side = (x[i].data_ptr() for x in (a, b, out, side))
        call.bias = bias.data_ptr() if fused in ("gelu", "residual") else 0
        call.bias_grad = bias_grad.data_ptr()
        calls.append(call)
    size = library.call("gemm_workspace", ctypes.byref(calls[0]))
    workspace = torch.empty(max(size, 16), device="cuda", dtype=torch.uint8)
    for call in calls:
        call.workspace, call.workspace_bytes = workspace.data_ptr(), workspace.numel()

    def ours(i):
        library.call("gemm", stream_of(torch), ctypes.byref(calls[i]))

    views = [(x.mT if layout == "tn" else x, y.mT if layout == "nt" else y) for x, y in zip(a, b)]
    products = torch.empty_like(side)

    def cublas(i):
        torch.mm(*views[i], out=products[i])

    ours(0)
    # The reference is f32 without TF32: its rounding is far below that of bf16.
    wanted = views[0][0].float() @ views[0][1].float()
    if fused in ("gelu", "residual"):
        wanted += bias
    if fused == "gelu":
        check("gemm pre-activation", side[0], wanted, 1e-5)
        wanted = torch.nn.functional.gelu(wanted)
    elif fused == "residual":
        wanted += kept[0].float()
    elif fused == "gelu_grad":
        x = kept[0].float().requires_grad_()
        (slope,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
        wanted *= slope
        check("gemm bias gradient", bias_grad, wanted.sum(0), 1e-5)
    check(f"gemm {layout} {fused} {m}x{n}x{k}", out[0], wanted, 1e-5)
    del wanted
    operations = 2 * m * n * k / 1e12
    name = f"{layout} {fused} {m}x{n}x{k}"
    return name, operations / seconds(torch, ours, sets), {"cuBLAS": operations / seconds(torch, cublas, sets)}


def attention_peers(torch):
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
    import math
    import random

    rng, lengths = random.Random(0), []
    while True:
        side, aspect = rng.uniform(64, high) / 16, math.exp(rng.uniform(-math.log(2), math.log(2)))
        length = max(1, round(side * math.sqrt(aspect))) * max(1, round(side / math.sqrt(aspect)))
        if sum(lengths) + length > tokens:
            return lengths
        lengths.append(length)


def attention_rows(torch, library):
    """(name, TFLOP/s ours with RMS norm of q and k, TFLOP/s of the peers without) forward and backward."""
    peers = attention_peers(torch)
    for heads, head_dim in ATTENTION_HEADS:
        batches = [(f"S {s}", [s] * (ATTENTION_TOKENS // s)) for s in ATTENTION_LENGTHS]
        batches += [(f"r~U(64,{high})", mix(high, ATTENTION_TOKENS)) for high in ATTENTION_MIXES]
        for name, lengths in batches:
            yield from attention_pair(torch, library, peers, heads, head_dim, name, lengths)


def attention_pair(torch, library, peers, heads, head_dim, name, lengths):
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
    attention_check(torch, qkv[0], dout[0], out[0], dqkv[0], gains, starts, scale)
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


def attention_check(torch, qkv, dout, out, dqkv, gains, starts, scale):
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


def table(title, rows):
    lines = [f"## {title}", ""]
    peers = list(dict.fromkeys(peer for _, _, found in rows for peer in found))
    lines += [
        "| | ours | " + " | ".join(peers) + " | ours / best |",
        "|---|" + "---:|" * (len(peers) + 2),
    ]
    for name, ours, found in rows:
        cells = [f"{found[peer]:.0f}" if peer in found else "" for peer in peers]
        ratio = f"{ours / max(found.values()):.2f}" if found else ""
        lines.append(f"| {name} | {ours:.0f} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines) + "\n"


def driver_and_clocks():
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"],
            capture_output=True, text=True, check=True,
        )
        return f"{fields}: {done.stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return "driver and clocks unknown: no nvidia-smi"


def main(options):
    path = library_path(options.library)
    if options.dry_run:
        dry_run(path)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU; --dry-run checks what needs none")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.init()
    torch.empty(1, device="cuda")  # Makes the context current that the library joins.
    library = Library(path)
    if not library.open():
        sys.exit(library.error())
    properties = torch.cuda.get_device_properties(0)
    head = (
        f"# Kernels beside PyTorch on {properties.name}\n\n"
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; "
        f"{driver_and_clocks()}; `python tools/compare_torch.py --gpu`. TFLOP/s, medians of {REPLAYS} replays, "
        f"random data, operands rotated through {CACHES} times the L2 cache. Fused products are held against "
        f"cuBLAS without what is fused to ours; attention is with QK-norm here and without it there.\n"
    )
    text = head
    print(head, flush=True)
    for title, rows in (
        ("GEMM", gemm_rows(torch, library)), ("Packed attention", attention_rows(torch, library)),
    ):
        done = []
        for row in rows:
            done.append(row)
            print(row, file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
        part = "\n" + table(title, done)
        print(part, flush=True)
        text += part
    print(f"\n{driver_and_clocks()} (at the end)")
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    library.dll.trencadis_close(library.kernels)
