"""The crate as a library (examples/torch_bridge), loaded with ctypes."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


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


class TrainingRun(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_double)
        for name in ("seconds", "tokens", "images", "flops", "idle", "first_loss", "loss")
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
        count, run = ctypes.c_uint64, ctypes.POINTER(TrainingRun)
        signatures["trencadis_training_open"] = (pointer, [ctypes.c_char_p, ctypes.c_char_p, count, count])
        signatures["trencadis_training_close"] = (None, [pointer])
        signatures["trencadis_training_describe"] = (number, [pointer, ctypes.c_char_p, count])
        signatures["trencadis_training_batch"] = (
            number, [pointer, count, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_uint16)],
        )
        signatures["trencadis_training_run"] = (number, [pointer, count, run])
        for name in ("schedule", "forward", "backward"):
            signatures[f"trencadis_attention_{name}"] = (number, [pointer, pointer, ctypes.POINTER(AttentionCall)])
        for name, (result, arguments) in signatures.items():
            function = getattr(self.dll, name)
            function.restype, function.argtypes = result, arguments
        for which, struct in enumerate((GemmCall, AttentionCall, AttentionSizes, TrainingRun)):
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


class Training:
    """A training of a recipe, one batch a step, over batches of random pixels."""

    def __init__(self, library, recipe, sets, classes, batches):
        self.library, self.count = library, batches
        lines = "\n".join(sets)
        self.handle = library.dll.trencadis_training_open(recipe.encode(), lines.encode(), classes, batches)
        if not self.handle:
            raise RuntimeError(f"{recipe}: {library.error()}")
        text = ctypes.create_string_buffer(1 << 16)
        length = self.call("describe", text, len(text))
        self.described = json.loads(text.raw[:length])

    def call(self, name, *arguments):
        result = getattr(self.library.dll, f"trencadis_training_{name}")(self.handle, *arguments)
        if result < 0:
            raise RuntimeError(f"training {name}: {self.library.error()}")
        return result

    def batch(self, at):
        """(starts of the images, [row, column] of every token up to the budget) of a batch."""
        slots, tokens = self.described["slots"], self.described["recipe"]["packing"]["tokens"]
        starts, positions = (ctypes.c_int32 * (slots + 1))(), (ctypes.c_uint16 * (2 * tokens))()
        images = self.call("batch", at, starts, positions)
        flat = list(positions)
        return list(starts)[: images + 1], list(map(list, zip(flat[::2], flat[1::2])))

    def run(self, steps):
        run = TrainingRun()
        self.call("run", steps, ctypes.byref(run))
        return run

    def close(self):
        self.library.dll.trencadis_training_close(self.handle)


def library_path(given):
    """The library, built unless it is given."""
    if given:
        return given
    subprocess.run(["cargo", "build", "--release", "--example", "torch_bridge"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "release" / "examples" / "libtorch_bridge.so"
