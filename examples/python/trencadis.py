"""The library of C for ctypes: structs, numbers and functions are read from its header, so they are those of the header."""

import ctypes
import re
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "include" / "trencadis.h"
NUMBERS = {
    "char": ctypes.c_char, "double": ctypes.c_double, "int32_t": ctypes.c_int32, "size_t": ctypes.c_size_t,
    "uint32_t": ctypes.c_uint32, "uint64_t": ctypes.c_uint64, "trencadis_status": ctypes.c_int,
}


class Library:
    """`structs`, `numbers` and `dll` have what the header has; calls that fail raise with the library's sentence."""

    def __init__(self, path, header=HEADER):
        text = re.sub(r"//[^\n]*", "", Path(header).read_text())
        self.dll = ctypes.CDLL(str(path))
        abi = int(re.search(r"define TRENCADIS_ABI_VERSION (\d+)", text)[1])
        self.dll.trencadis_abi_version.restype = ctypes.c_uint32
        if self.dll.trencadis_abi_version() != abi:  # Before a function is looked for that another one may not have.
            raise RuntimeError(f"{path} has interface {self.dll.trencadis_abi_version()}, the header {abi}")
        self.numbers = {name: int(number) for name, number in re.findall(r"\b(TRENCADIS_\w+) = (\d+)", text)}
        self.structs = {}
        for body, name in re.findall(r"typedef struct \{(.*?)\} trencadis_(\w+);", text, re.S):
            fields = [self.field(line) for line in body.split(";") if line.strip()]
            self.structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        for result, name, arguments in re.findall(r"^(\w[\w ]* \*?)(trencadis_\w+)\(([^;]*?)\);", text, re.M):
            function = getattr(self.dll, name)
            function.restype = ctypes.c_char_p if "char" in result else NUMBERS[result.strip()]
            given = [] if arguments == "void" else arguments.split(",")
            function.argtypes = [self.field(argument)[1] for argument in given]

    @staticmethod
    def field(declaration):
        """(name, type) of `const float *x`, `uint64_t x` or `char x[64]`."""
        kind, pointer, name, length = re.match(r"\s*(?:const )?(\w+) (\**)(\w+)(?:\[(\d+)\])?\s*$", declaration).groups()
        if pointer:
            return name, ctypes.c_void_p
        return name, NUMBERS[kind] * int(length) if length else NUMBERS[kind]

    def struct(self, name, **fields):
        """A struct with its size and these fields; the others are 0."""
        kind = self.structs[name]
        return kind(size=ctypes.sizeof(kind), **fields)

    def call(self, name, *arguments):
        """Calls trencadis_`name`, with structs by their address."""
        structs = [ctypes.byref(x) if isinstance(x, (ctypes.Structure, ctypes._SimpleCData)) else x for x in arguments]
        if getattr(self.dll, f"trencadis_{name}")(*structs) != 0:
            text = ctypes.create_string_buffer(self.dll.trencadis_last_error(None, 0) + 1)
            self.dll.trencadis_last_error(ctypes.addressof(text), len(text))
            raise RuntimeError(text.value.decode())

    def open(self, emulator=False):
        """Kernels of the current CUDA context, or of the emulator."""
        kernels = ctypes.c_void_p()
        if emulator:
            self.call("open_emulator", 0, kernels)
        else:
            self.call("open_current", kernels)
        return kernels.value
