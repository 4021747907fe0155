"""Packed attention beside cuDNN, torch's varlen attention, FlashAttention 3 and 4; see peers.py and targets.py."""

import ctypes
import hashlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path

from . import targets
from .measure import check, seconds, sets_for, stream_of
from .peers import peers_of
from .targets import ONE_LONG, RATED, TINY, Row

TOKENS = 32768
RUNS = 100  # with the same bits


def mix(high, tokens):
    """NaViT's images: side uniform in [64, high], aspect 1:2 to 2:1, patch 16."""
    rng, lengths = random.Random(0), []
    while True:
        side, aspect = rng.uniform(64, high) / 16, math.exp(rng.uniform(-math.log(2), math.log(2)))
        length = max(1, round(side * math.sqrt(aspect))) * max(1, round(side / math.sqrt(aspect)))
        if sum(lengths) + length > tokens:
            return lengths
        lengths.append(length)


def batch_of(name):
    """Lengths of the images of a batch."""
    if name == ONE_LONG:
        # Amid the others, whatever order a schedule takes them in.
        return [64] * 500 + [16384] + [64] * 500
    if name == TINY:
        rng = random.Random(0)
        return [rng.randint(4, 16) for _ in range(8192)]
    if name.startswith("S "):
        length = int(name[2:])
        return [length] * (TOKENS // length)
    return mix(int(name.rpartition(",")[2][:-1]), TOKENS)


MIXES = ["r~U(64,256)", "r~U(64,512)"]
USUAL = ["S 64", "S 196", "S 256", *MIXES, "S 577", "S 1024", RATED]
# Heads, head dim and batches: the most important first, for time may run out.
SHAPES = [
    (16, 64, [*USUAL, ONE_LONG, TINY, "S 2048", "S 16384"]),
    (8, 128, [*USUAL, "S 2048", "S 16384"]),
    (16, 80, USUAL),
]
QUICK = [(16, 64, ["S 196", "S 256", MIXES[0], "S 1024", RATED, ONE_LONG, TINY])]


class Ours:
    """Operands of this crate's passes with RMS norm of q and k, on PyTorch's memory."""

    def __init__(self, torch, library, kernels, heads, head_dim, lengths, sets, generator=None):
        tokens, longest, width = sum(lengths), max(lengths), heads * head_dim
        self.torch, self.library, self.kernels, self.sets = torch, library, kernels, sets
        self.scale = head_dim**-0.5
        self.starts = [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
        device = generator.device if generator else "cuda"

        def normal(*shape):
            return torch.randn(*shape, device=device, generator=generator).cuda()

        self.qkv = normal(sets, tokens, 3, heads, head_dim).bfloat16()
        self.dout = normal(sets, tokens, heads, head_dim).bfloat16()
        self.gains = 1 + 0.1 * normal(2, width)
        self.out, self.dqkv = torch.empty_like(self.dout), torch.empty_like(self.qkv)
        self.lse = torch.empty(sets, tokens, heads, device="cuda")
        self.dgains = torch.empty(2, width, device="cuda")
        self.cu = torch.tensor(self.starts, device="cuda", dtype=torch.int32)
        call = library.struct(
            "attention", tokens=tokens, slots=len(lengths), longest=longest, heads=heads, head_dim=head_dim,
            scale=self.scale, eps=1e-6, norm=library.numbers["TRENCADIS_QK_NORM_RMS"], gain_per_head=1,
            q_gain=self.gains[0].data_ptr(), k_gain=self.gains[1].data_ptr(), cu_seqlens=self.cu.data_ptr(),
            dq_gain=self.dgains[0].data_ptr(), dk_gain=self.dgains[1].data_ptr(),
        )
        for name in ("q", "k", "v", "dq", "dk", "dv"):
            setattr(call, f"{name}_stride", 3 * width)
        sizes = library.struct("attention_sizes")
        library.call("attention_plan", kernels, call, sizes)
        words = [
            torch.zeros(size, device="cuda", dtype=torch.int32)
            for size in (sizes.forward_schedule_words, sizes.backward_schedule_words)
        ]
        room = max(sizes.forward_workspace_bytes, sizes.backward_workspace_bytes, 16)
        workspace = torch.empty(room, device="cuda", dtype=torch.uint8)
        call.forward_schedule, call.backward_schedule = (x.data_ptr() for x in words)
        call.workspace, call.workspace_bytes = workspace.data_ptr(), room
        self.memory = (words, workspace)
        self.calls = []
        for i in range(sets):
            one = type(call).from_buffer_copy(call)
            one.q, one.k, one.v = (self.qkv[i, 0, j].data_ptr() for j in range(3))
            one.dq, one.dk, one.dv = (self.dqkv[i, 0, j].data_ptr() for j in range(3))
            one.out, one.dout, one.lse = self.out[i].data_ptr(), self.dout[i].data_ptr(), self.lse[i].data_ptr()
            self.calls.append(one)
        library.call("attention_schedule", kernels, stream_of(torch), self.calls[0])
        for i in range(sets):
            self.forward(i)
            self.backward(i)
        torch.cuda.synchronize()
        library.call("attention_fault", int(words[0][-1]))

    def forward(self, i):
        self.library.call("attention_forward", self.kernels, stream_of(self.torch), self.calls[i])

    def backward(self, i):
        self.library.call("attention_backward", self.kernels, stream_of(self.torch), self.calls[i])


def rows(torch, library, kernels, peers, shapes):
    """A Row for each pass over each batch."""
    for heads, head_dim, names in shapes:
        for name in names:
            yield from pair(torch, library, kernels, peers, heads, head_dim, name)
            torch.cuda.empty_cache()


def pair(torch, library, kernels, peers, heads, head_dim, name):
    lengths = batch_of(name)
    sets = sets_for(torch, 2 * 8 * sum(lengths) * heads * head_dim)
    ours = Ours(torch, library, kernels, heads, head_dim, lengths, sets)
    compare_images("attention", reference(torch, ours, ours.gains), ours.out[0], ours.dqkv[0])
    wanted = reference(torch, ours, None)
    forward, backward = (
        Row(is_backward, heads, head_dim, name, lengths, math.nan, {}) for is_backward in (False, True)
    )
    # Contiguous copies: what peers are given in practice.
    packed = [[x.contiguous().requires_grad_() for x in one.unbind(1)] for one in ours.qkv]
    for label, peer in peers.items():
        try:
            time_peer(torch, label, peer, ours, packed, max(lengths), wanted, forward, backward)
        except Exception as reason:  # Compilers of peers raise whatever they like.
            first = (str(reason).splitlines() or [""])[0]
            print(f"{label} not run at {backward.name}: {type(reason).__name__}: {first}", file=sys.stderr)
        torch.cuda.empty_cache()
    forward.ours, backward.ours = seconds(torch, ours.forward, sets), seconds(torch, ours.backward, sets)
    yield forward
    yield backward


def time_peer(torch, label, peer, ours, packed, longest, wanted, forward, backward):
    """Adds what a peer takes to both rows, once its results are right."""
    arguments = (ours.cu, longest, ours.scale)
    tensor = lambda results: results[0] if isinstance(results, (tuple, list)) else results  # noqa: E731
    if not peer.deterministic:
        with torch.no_grad():
            run = lambda i: peer.forward(*packed[i], *arguments)  # noqa: E731
            compare_images(label, wanted, tensor(run(0)))
            forward.found[label] = timed(torch, run, ours.sets, forward, label)
    if peer.backward is None:
        return
    # Gradients are computed in the stream of the forward pass, which is to be the one that is captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.set_grad_enabled(peer.backward == "autograd"):
        results = [peer.forward(*one, *arguments) for one in packed]
    torch.cuda.synchronize()
    if peer.backward == "autograd":
        run = lambda i: torch.autograd.grad(results[i], packed[i], ours.dout[i], retain_graph=True)  # noqa: E731
    else:
        run = lambda i: peer.backward(ours.dout[i], *packed[i], results[i], *arguments)  # noqa: E731
    with peer.mode(), torch.set_grad_enabled(peer.backward == "autograd"):
        gradients = torch.stack([x.detach() for x in run(0)[:3]], 1)
        compare_images(label, wanted, tensor(results[0]), gradients)
        found = backward.deterministic if peer.deterministic else backward.found
        found[label] = timed(torch, run, ours.sets, backward, label, stream)


def timed(torch, run, sets, row, label, stream=None):
    """Seconds of a graph; where it cannot be captured, of launches by the host, which is told in the row."""
    try:
        return seconds(torch, run, sets, stream=stream)
    except RuntimeError as reason:
        print(f"{label} is not captured at {row.name}: {str(reason).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        row.queued.add(label)
        return seconds(torch, run, sets, capture=False, stream=stream)


def reference(torch, ours, gains):
    """(start, end, out, gradient of q, k, v) in f64 of the first, the longest and the last image of set 0; with RMS
    norm of q and k where there are gains. A head at a time: the scores of a long image fill gigabytes."""
    images = list(zip(ours.starts, ours.starts[1:]))
    chosen = {images[0], max(images, key=lambda image: image[1] - image[0]), images[-1]}
    found = []
    for start, end in chosen:
        rows = ours.qkv[0, start:end].double()
        out, gradient = torch.empty_like(rows[:, 0]), torch.empty_like(rows)
        for head in range(rows.shape[2]):
            one = rows[:, :, head].clone().requires_grad_()
            q, k, v = one.unbind(1)
            if gains is not None:
                of_head = gains.view(2, rows.shape[2], -1)[:, head].double()
                q, k = (
                    x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain for x, gain in zip((q, k), of_head)
                )
            result = ((q @ k.T) * ours.scale).softmax(-1) @ v
            (gradient[:, :, head],) = torch.autograd.grad(result, one, ours.dout[0, start:end, head].double())
            out[:, head] = result.detach()
        found.append((start, end, out, gradient))
    return found


def compare_images(name, wanted, out, gradient=None):
    for start, end, wanted_out, wanted_gradient in wanted:
        check(f"{name} forward", out[start:end], wanted_out, 2e-4)
        if gradient is not None:
            check(f"{name} backward", gradient[start:end], wanted_gradient, 1e-3)


def copy_bandwidth(torch):
    """Bytes a second of a copy, read and written."""
    x = torch.randn(2, 1 << 28, device="cuda").bfloat16()
    y = torch.empty_like(x)
    return 2 * x[0].numel() * x.element_size() / seconds(torch, lambda i: y[i].copy_(x[i]), 2)


def bits(torch, library, kernels):
    """Prints for a parent process whether RUNS runs of both passes had the same bits over ragged batches from one
    seed, and their hash."""
    lengths = [1, 64, 196, 17, 577, 257, 5, 1025, 63, 400, 2111, 90]
    generator = torch.Generator().manual_seed(0)
    digest, same = hashlib.sha256(), True
    for heads, head_dim in ((4, 64), (4, 80), (2, 128)):
        ours = Ours(torch, library, kernels, heads, head_dim, lengths, 1, generator)
        results = (ours.out, ours.lse, ours.dqkv, ours.dgains)
        first = [x.clone() for x in results]
        for _ in range(RUNS - 1):
            ours.forward(0)
            ours.backward(0)
            # As integers: a NaN is to equal itself.
            words = lambda x: x.view(torch.int16 if x.element_size() == 2 else torch.int32)  # noqa: E731
            same = same and all(torch.equal(words(x), words(y)) for x, y in zip(first, results))
        for x in first:
            x = x.cpu()
            digest.update(ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()))
    print(json.dumps({"runs": RUNS, "same": same, "hash": digest.hexdigest()}))


def two_processes(library_path):
    """The verdict on the bits of two processes, which run at a time."""
    script = Path(__file__).resolve().parent.parent / "compare_torch.py"
    command = [sys.executable, str(script), "--gpu", "--library", str(library_path), "--bits"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = []
    for process in [subprocess.Popen(command, **pipes) for _ in range(2)]:
        out, err = process.communicate()
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if process.returncode == 0 and lines:
            children.append(json.loads(lines[-1]))
        else:
            print(f"--bits: {(err.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
            children.append(None)
    return targets.determinism(children)


def compare(torch, library, kernels, options, write):
    """Hands the Markdown to `write` after every row."""
    peers, bandwidth = peers_of(torch), copy_bandwidth(torch)
    done, same_bits = [], None
    for shape in QUICK if options.quick else SHAPES:
        for row in rows(torch, library, kernels, peers, [shape]):
            done.append(row)
            print(f"{row.name}: {row.tflop / row.ours:.0f} TFLOP/s", file=sys.stderr, flush=True)
            write(targets.page(done, bandwidth, same_bits))
        if same_bits is None:
            # Not earlier, for it takes as long as a dozen rows.
            same_bits = two_processes(options.library)
            write(targets.page(done, bandwidth, same_bits))
    if same_bits.met is False:
        raise RuntimeError(f"{same_bits.target}: {same_bits.reached}")
