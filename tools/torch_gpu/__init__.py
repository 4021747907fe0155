"""The GPU mode of compare_torch.py: this crate's kernels and training steps beside PyTorch's in one process.

The crate comes as a library (examples/torch_bridge), loaded with ctypes. For kernels, PyTorch owns context, memory
and stream; the library gets addresses. Every result is first compared with a reference in f64. Then both sides are
timed in the same way: operands are random and rotate through more than three times the L2 cache, a CUDA graph
of one pass over them is replayed, and the median over replays is taken by events. Training steps (steps.py) run in
the same context, one side after the other.

--dry-run does what needs neither a GPU nor PyTorch: it loads the library and checks that both sides agree on
every struct and entry point, that a missing device is told in one sentence, and what verdicts come of made-up times.
"""

import sys

from . import attention, gemm, steps, targets
from .library import Library, Training, library_path
from .measure import CACHES, REPLAYS, driver_and_clocks, table

PARTS = ("steps", "gemm", "attention")


def dry_run(path):
    library = Library(path)
    try:
        library.call("close", library.open())
        print("the library sees a CUDA context and opens its kernels")
    except RuntimeError as reason:
        print(f"the library loads, its structs agree; no kernels here: {reason}")
    for recipe, sets in (("no-such-recipe", []), ("digits", ["packing.tokens=x"]), ("digits", ["packing.tokens=1024"])):
        try:
            training = Training(library, recipe, sets, 10, 2)
        except RuntimeError as reason:
            print(reason)
            continue
        starts, positions = training.batch(0)
        loss = training.run(1).first_loss
        print(f"{recipe} trains: {starts[-1]} of {len(positions)} tokens, loss {loss:.2f}")
        training.close()
    print(f"the targets of attention tell {targets.self_check()} made-up rows apart")


def text_of(part, torch, library, kernels, options, write):
    """Hands the Markdown of a part to `write` as it grows."""
    if part == "steps":
        steps.compare(torch, library, options, write)
        return
    if part == "attention":
        attention.compare(torch, library, kernels, options, write)
        return
    done = []
    for row in gemm.rows(torch, library, kernels, options.quick):
        done.append(row)
        print(row, file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
        write(table("GEMM", done))


def main(options):
    path = options.library = library_path(options.library)
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
    try:
        kernels = library.open()
    except RuntimeError as reason:
        sys.exit(str(reason))
    if options.bits:
        attention.bits(torch, library, kernels)
        return
    properties = torch.cuda.get_device_properties(0)
    head = (
        f"# Kernels and training steps beside PyTorch on {properties.name}\n\n"
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; "
        f"{driver_and_clocks()}; `python tools/compare_torch.py {' '.join(sys.argv[1:])}`. Kernels in TFLOP/s, medians "
        f"of {REPLAYS} replays, random data, operands rotated through {CACHES} times the L2 cache. Fused products are "
        f"held against cuBLAS without what is fused to ours; attention is with RMS norm of q and k here and without it "
        f"there.\n"
    )
    texts = {}
    failed = False
    for part in options.only:

        def write(text, part=part):
            texts[part] = text
            # After every row, so that an interrupted run leaves what it has measured.
            if options.write:
                options.write.parent.mkdir(parents=True, exist_ok=True)
                options.write.write_text("\n".join([head, *texts.values()]))

        try:
            text_of(part, torch, library, kernels, options, write)
        except RuntimeError as reason:
            print(f"{part}: {reason}", file=sys.stderr)
            failed = True
        torch.cuda.empty_cache()
    print("\n".join([head, *texts.values()]))
    print(f"{driver_and_clocks()} (at the end)")
    library.call("close", kernels)
    if failed:
        sys.exit(1)
