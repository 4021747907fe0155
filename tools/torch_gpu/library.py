"""The crate as a library (examples/torch_bridge), loaded with ctypes."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples" / "python"))

from trencadis import Library as Functions  # noqa: E402


class TrainingRun(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_double)
        for name in ("seconds", "tokens", "images", "flops", "idle", "first_loss", "loss")
    ]


class Library(Functions):
    """The crate's kernels for the CUDA context that is current, and its training steps."""

    def __init__(self, path):
        super().__init__(path)
        pointer, number, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
        signatures = {
            "error": (number, [ctypes.c_char_p, count]),
            "training_run_bytes": (number, []),
            "training_open": (pointer, [ctypes.c_char_p, ctypes.c_char_p, count, count]),
            "training_close": (None, [pointer]),
            "training_describe": (number, [pointer, ctypes.c_char_p, count]),
            "training_batch": (
                number, [pointer, count, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_uint16)],
            ),
            "training_run": (number, [pointer, count, ctypes.POINTER(TrainingRun)]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.dll, f"trencadis_{name}")
            function.restype, function.argtypes = result, arguments
        theirs = self.dll.trencadis_training_run_bytes()
        if theirs != ctypes.sizeof(TrainingRun):
            sys.exit(f"TrainingRun has {ctypes.sizeof(TrainingRun)} bytes here and {theirs} in {path}")

    def error(self):
        """Why a function of training failed."""
        text = ctypes.create_string_buffer(1000)
        length = self.dll.trencadis_error(text, len(text))
        return text.raw[:length].decode(errors="replace")


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
    subprocess.run(["cargo", "build", "--release", "--features", "capi", "--example", "torch_bridge"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "release" / "examples" / "libtorch_bridge.so"
