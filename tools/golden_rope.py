"""More cases for tools/make_goldens.py: rotary positions, of timm and transformers.

`python tools/make_goldens.py rope` writes these alone and leaves all others as they are.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from make_goldens import CLASSES, DEPTH, DIM, HEADS, PATCH, ROOT, one_by_one, randomise, write_weights


def fuse_qkv(weights, parts, to):
    """Stacks the projections `parts` of queries, keys and values; those without a bias get zeros."""
    matrices = [weights.pop(f"{part}.weight") for part in parts]
    weights[f"{to}.weight"] = torch.cat(matrices)
    zeros = [torch.zeros(len(x)) for x in matrices]
    weights[f"{to}.bias"] = torch.cat([weights.pop(f"{part}.bias", x) for part, x in zip(parts, zeros)])


# What this crate's own names do not tell.
GROUPED = """
kv_heads = 2
shape = ""
depth = 2
mlp = 64
patch = 4
norm_bias = true
qk_norm = "layernorm-bias"
qk_norm_per_head = false
qkv_bias = true
proj_bias = true
registers = 1
pool = "map"
pool_mlp = true
pool_qk_norm = false
position = { coordinate = "fractional", combination = "sum", rows = 5, columns = 6 }
[resolution]
min = 16
max = 32"""


def grouped_in_own_names(weights):
    """Names of this crate for a NaFlexVit with shared keys and values, which the tables of names do not know."""
    own = {}
    for key, value in weights.items():
        if key == "embeds.proj.weight":
            value = value.unflatten(1, (PATCH, PATCH, 3)).permute(0, 3, 1, 2).flatten(1)
        elif key.startswith(("embeds.pos_embed", "embeds.reg_token", "attn_pool.latent")):
            value = value[0]
        for old, new in (
            ("embeds.proj", "patch_embed"), ("embeds.reg_token", "prefix"), ("embeds.pos_embed_y", "position.row"),
            ("embeds.pos_embed_x", "position.column"), ("attn_pool.latent", "pool.query"),
            ("attn_pool.norm", "pool.norm_mlp"), ("attn_pool", "pool"),
        ):
            key = key.replace(old, new)
        if "norm" in key:
            key = key.replace(".weight", ".gain")
        own[key] = value
    return own


def naflex_rope_cases(images):
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    cases = {
        "naflex_rope": (
            dict(rope_type="axial", rope_temperature=50.0, pos_embed="none", qk_norm=True, class_token=True,
                 global_pool="token"),
            'rope = { kind = "interleaved", theta = 50.0 }',
        ),
        "naflex_rope_reference": (
            dict(rope_type="axial", rope_ref_feat_shape=(3, 6), rope_grid_indexing="xy", rope_grid_offset=1.0,
                 rope_rotate_half=True, pos_embed="none", global_pool="avg", fc_norm=True),
            'rope = { kind = "halves", coordinate = "fractional", rows = 3, columns = 6, offset = 1.0, '
            'order = "columns" }',
        ),
        "naflex_rope_grouped": (
            dict(rope_type="dinov3", rope_temperature=100.0, rope_rotate_half=True, num_heads=4, num_kv_heads=2,
                 qkv_fused=False, qk_norm=True, pos_embed="factorized", reg_tokens=1, global_pool="map"),
            'rope = { kind = "halves", frequencies = "turns", theta = 100.0, coordinate = "centered" }' + GROUPED,
        ),
    }
    for seed, (case, (options, rope)) in enumerate(cases.items(), 60):
        options = dict(num_heads=HEADS, mlp_ratio=2.0, pos_embed_grid_size=(5, 6)) | options
        cfg = NaFlexVitCfg(patch_size=PATCH, embed_dim=DIM, depth=DEPTH, **options)
        model = randomise(NaFlexVit(cfg, num_classes=CLASSES), seed).double()
        logits, features = one_by_one(model, images)
        weights = model.state_dict()
        for n in range(DEPTH if not cfg.qkv_fused else 0):
            fuse_qkv(weights, [f"blocks.{n}.attn.{x}_proj" for x in "qkv"], f"blocks.{n}.attn.qkv")
        if cfg.num_kv_heads:
            weights = grouped_in_own_names(weights)
        config = f'description = "timm NaFlexVit: {case}"\n[model]\nheads = {cfg.num_heads}\nwidth = {DIM}\n{rope}'
        write_weights(case, weights, config, logits, features)


DINOV3 = """
description = "transformers DINOv3ViTModel"
[model]
shape = ""
width = 32
depth = 2
mlp = 64
heads = 2
patch = 4
norm_bias = true
norm_eps = 1e-5
qk_norm = "none"
qkv_bias = true
proj_bias = true
layer_scale = 1.0
class_token = true
registers = 2
pool = "cls"
position = { basis = "none" }
rope = { kind = "halves", frequencies = "turns", theta = 100.0, coordinate = "centered" }
[resolution]
min = 16
max = 32
"""


def dinov3_case(images):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=DIM, intermediate_size=2 * DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        patch_size=PATCH, image_size=8 * PATCH, num_register_tokens=2,
    )
    model = randomise(DINOv3ViTModel(config), 70).double()
    pooled = torch.cat([model(x[None]).pooler_output for x in images])
    # This crate's own names.
    w = model.state_dict()
    own = {
        "patch_embed.weight": w["embeddings.patch_embeddings.weight"].flatten(1),
        "patch_embed.bias": w["embeddings.patch_embeddings.bias"],
        "prefix": torch.cat([w["embeddings.cls_token"][0], w["embeddings.register_tokens"][0]]),
        "norm.gain": w["norm.weight"],
        "norm.bias": w["norm.bias"],
        "head.weight": torch.eye(DIM),
        "head.bias": torch.zeros(DIM),
    }
    names = {
        "norm1.weight": "norm1.gain", "norm1.bias": "norm1.bias", "norm2.weight": "norm2.gain",
        "norm2.bias": "norm2.bias", "layer_scale1.lambda1": "scale1", "layer_scale2.lambda1": "scale2",
    }
    for kind in ("weight", "bias"):
        names |= {f"attention.{x}_proj.{kind}": f"attn.{x}.{kind}" for x in "qkv"}
        names |= {f"attention.o_proj.{kind}": f"attn.proj.{kind}"}
        names |= {f"mlp.up_proj.{kind}": f"mlp.fc1.{kind}", f"mlp.down_proj.{kind}": f"mlp.fc2.{kind}"}
    for key, value in w.items():
        if key.startswith("model.layer."):
            n, name = key.removeprefix("model.layer.").split(".", 1)
            own[f"blocks.{n}.{names[name]}"] = value
    for n in range(DEPTH):
        fuse_qkv(own, [f"blocks.{n}.attn.{x}" for x in "qkv"], f"blocks.{n}.attn.qkv")
    write_weights("dinov3", own, DINOV3, None, pooled)


def rope_cases():
    """Tables of many conventions, and attention that turns by them, as the implementations do it."""
    from timm.layers import pos_embed_sincos as timm_rope
    from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
    from transformers.models.kimi_k25 import modeling_kimi_k25 as kimi
    from transformers.models.pixtral import modeling_pixtral as pixtral
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

    head_dim, heads, (rows, columns) = 16, 2, (5, 7)
    g = torch.Generator().manual_seed(80)
    qkv = torch.randn(rows * columns, 3, heads, head_dim, generator=g)
    q, k, v = qkv.double().transpose(0, 2).unbind(1)
    tensors = {"qkv": qkv.flatten(1)}

    def add(name, cos, sin, q, k, halves):
        pick = (lambda x: x[:, : head_dim // 2]) if halves else (lambda x: x[:, ::2])
        tensors[f"{name}.table"] = torch.stack([pick(cos), pick(sin)], -1).float().contiguous()
        out = F.scaled_dot_product_attention(q, k, v)
        tensors[f"{name}.attention"] = out.transpose(0, 1).flatten(1).float().contiguous()

    def timm(name, module, half):
        sin, cos = module.get_embed([rows, columns]).chunk(2, -1)
        turned = [timm_rope.apply_rot_embed(x, sin.double(), cos.double(), half=half) for x in (q, k)]
        add(name, cos, sin, *turned, half)

    cat, v3 = timm_rope.RotaryEmbeddingCat, timm_rope.RotaryEmbeddingDinoV3
    timm("timm_axial", cat(head_dim, in_pixels=False, temperature=100.0), False)
    xy = dict(in_pixels=False, grid_indexing="xy", rotate_half=True)
    timm("timm_axial_xy", cat(head_dim, **xy), True)
    timm("timm_reference", cat(head_dim, in_pixels=False, ref_feat_shape=[3, 4], grid_offset=1.0), False)
    timm("timm_pixel", cat(head_dim, max_res=24), False)
    timm("timm_pixel_linear", cat(head_dim, max_res=24, linear_bands=True), False)
    timm("timm_dinov3_longer", v3(head_dim, normalize_coords="max"), True)
    timm("timm_dinov3_shorter", v3(head_dim, normalize_coords="min", rotate_half=False), False)

    size = dict(hidden_size=heads * head_dim, num_attention_heads=heads)
    module = dinov3.DINOv3ViTRopePositionEmbedding(dinov3.DINOv3ViTConfig(**size, patch_size=2, image_size=8)).eval()
    cos, sin = module(torch.zeros(1, 3, 2 * rows, 2 * columns))
    turned = dinov3.apply_rotary_pos_emb(q[None], k[None], cos.double(), sin.double())
    add("dinov3", cos, sin, *(x[0] for x in turned), True)

    ids = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    module = pixtral.PixtralVisionRotaryEmbedding(pixtral.PixtralVisionConfig(**size))
    cos, sin = module(q.float(), ids)
    turned = pixtral.apply_rotary_pos_emb(q, k, cos.double(), sin.double(), unsqueeze_dim=0)
    add("pixtral", cos, sin, *turned, True)
    for name, family, module in [
        ("qwen2_vl", qwen2_vl, qwen2_vl.Qwen2VLVisionRotaryEmbedding(
            qwen2_vl.Qwen2VLVisionConfig(embed_dim=heads * head_dim, num_heads=heads))),
        ("moonvit", kimi, kimi.Kimi_K25VisionRotaryEmbedding(kimi.Kimi_K25VisionConfig(**size))),
    ]:
        cos, sin = module(q.float(), ids)
        # Turned in f32, tokens first.
        turned = family.apply_rotary_pos_emb_vision(*(x.transpose(0, 1) for x in (q, k)), cos, sin)
        add(name, cos, sin, *(x.transpose(0, 1) for x in turned), True)
    save_file(tensors, ROOT / "rope.safetensors")
    print(f"rope: {len(tensors)} tensors")


def rotary(images):
    naflex_rope_cases(images)
    dinov3_case(images)
    rope_cases()
