#!/usr/bin/env python3
"""Writes tests/fuzz/files: small files of weights by the libraries that people save them with.

    pip install torch==2.15.0 numpy ml_dtypes onnx==1.23.2 safetensors
    python tools/make_weight_files.py

`numpy.npz` and `numpy_compressed.npz` hold the same arrays, `numpy.safetensors` what they must be read as. The others
are refused by what they are: two ages of torch.save, an ONNX graph, a lone array.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import torch
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fuzz" / "files"


def main():
    FOLDER.mkdir(exist_ok=True)
    random = np.random.default_rng(5)
    values = random.standard_normal((3, 4)).astype(np.float32)
    arrays = {
        "params/embedding/kernel": random.standard_normal((2, 3, 4)).astype(np.float32),
        "params/embedding/bias": values[0],
        "params/half": values.astype(np.float16),
        "params/brain": values.astype(ml_dtypes.bfloat16),
        "params/double": values.astype(np.float64),
        "params/fortran": np.asfortranarray(random.standard_normal((2, 3, 4)).astype(np.float32)),
        "params/scalar": np.float32(2.5),
        "params/empty": np.zeros((0, 3), np.float32),
    }
    np.savez(FOLDER / "numpy.npz", **arrays)
    np.savez_compressed(FOLDER / "numpy_compressed.npz", **arrays)
    expected = {name: np.ascontiguousarray(np.asarray(array).astype(np.float32)) for name, array in arrays.items()}
    expected["params/scalar"] = np.asarray(np.float32(2.5))
    save_file(expected, FOLDER / "numpy.safetensors")
    np.savez(FOLDER / "integers.npz", **{"params/kernel": values, "step": np.int64(3)})
    np.save(FOLDER / "array.npy", values)
    state = {"model": {"head.weight": torch.ones(2, 3)}}
    torch.save(state, FOLDER / "zip.pth")
    torch.save(state, FOLDER / "legacy.pth", _use_new_zipfile_serialization=False)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([node], "graph", [x], [y])
    onnx.save(onnx.helper.make_model(graph, producer_name="tools"), FOLDER / "graph.onnx")


main()
