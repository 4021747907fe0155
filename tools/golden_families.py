"""More cases for tools/make_goldens.py: small networks of transformers, vit-pytorch, DINOv2 and big_vision.

`python tools/make_goldens.py families` writes these alone and leaves all others as they are.
"""

import math

import torch
import torch.nn.functional as F

from make_goldens import CLASSES, DEPTH, HEADS, PATCH, one_by_one, randomise, write

# Narrower than the networks of make_goldens.py: what these cases are about are names and positions.
DIM, MLP, GRID = 16, 32, 5


def case(name, model, text, logits, features=None, rename=lambda k: k, extra=None):
    """Writes a case; `extra` are tensors that only the file has."""
    state = model if isinstance(model, dict) else model.state_dict()
    state = {rename(k): v for k, v in state.items()} | (extra or {})

    class Held:
        def state_dict(self):
            return state

    write(name, Held(), text, logits, features)


def config(description, *lines):
    return "\n".join([f'description = "{description}"', "[model]", f"heads = {HEADS}", f"width = {DIM}", *lines])


# ---------------------------------------------------------------------------------------------
# transformers


def old_names(model):
    """How transformers writes files: its names from before version 5."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(folder + "/model.safetensors")


def hf_vit_cases(images):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    cfg = ViTConfig(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=MLP,
        image_size=GRID * PATCH, patch_size=PATCH, num_labels=CLASSES, attn_implementation="sdpa",
    )
    model = randomise(ViTForImageClassification(cfg), 60).double()
    logits = torch.cat([model(x[None], interpolate_pos_encoding=True).logits for x in images])
    case("hf_vit", {k: v for k, v in old_names(model).items()}, config("transformers ViTForImageClassification"), logits)

    # The names of transformers 5 in memory, and a pooler that the features do not pass.
    model = randomise(ViTModel(cfg), 61).double()
    hidden = [model(x[None], interpolate_pos_encoding=True).last_hidden_state for x in images]
    features = torch.cat([h[:, 0] for h in hidden])
    case("hf_vit_model", model, config("transformers ViTModel, names of version 5"), None, features)


def hf_dinov2_cases(images):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    size = dict(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, mlp_ratio=2, image_size=GRID * PATCH,
        patch_size=PATCH, attn_implementation="sdpa",
    )
    model = randomise(Dinov2Model(Dinov2Config(**size)), 62).double()
    features = torch.cat([model(x[None]).pooler_output for x in images])
    case("hf_dinov2", old_names(model), config("transformers Dinov2Model"), None, features)

    model = randomise(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=2, **size)), 63).double()
    features = torch.cat([model(x[None]).pooler_output for x in images])
    case("hf_dinov2_registers", model, config("transformers Dinov2WithRegistersModel"), None, features)


def hf_siglip_cases(images):
    from transformers import SiglipConfig, SiglipForImageClassification, SiglipVisionConfig, SiglipVisionModel

    size = dict(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=MLP,
        image_size=GRID * PATCH, patch_size=PATCH, attn_implementation="sdpa",
    )
    model = randomise(SiglipVisionModel(SiglipVisionConfig(**size)), 64).double()
    features = torch.cat([model(x[None], interpolate_pos_encoding=True).pooler_output for x in images])
    # As in a file of both towers.
    others = {"logit_scale": torch.tensor([2.0]), "text_model.final_layer_norm.weight": torch.ones(DIM)}
    case("hf_siglip", model, config("transformers SiglipVisionModel"), None, features, lambda k: "vision_model." + k, others)

    cfg = SiglipConfig(vision_config=size, num_labels=CLASSES)
    model = randomise(SiglipForImageClassification(cfg), 65).double()
    logits = torch.cat([model(x[None], interpolate_pos_encoding=True).logits for x in images])
    case("hf_siglip_classifier", model, config("transformers SiglipForImageClassification"), logits)


# ---------------------------------------------------------------------------------------------
# vit-pytorch


def vit_pytorch_cases(images):
    from vit_pytorch import SimpleViT, ViT
    from vit_pytorch.simple_vit import posemb_sincos_2d

    # Heads are wider together than the model; the table is read in order, whatever the grid.
    size = dict(
        image_size=8 * PATCH, patch_size=PATCH, num_classes=CLASSES, dim=DIM, depth=DEPTH, mlp_dim=MLP, heads=HEADS,
        dim_head=12,
    )
    for seed, pool in ((66, "cls"), (67, "mean")):
        model = randomise(ViT(pool=pool, **size), seed).double()
        # A parameter of no rows has no fan-in.
        logits = torch.cat([model(x[None]) for x in images])
        case(f"vit_pytorch_{pool}", model, config(f"vit-pytorch ViT, pool {pool}"), logits)

    model = randomise(SimpleViT(**size), 368).double()
    logits = []
    for x in images:
        # What the class computes for images of this size.
        model.pos_embedding = posemb_sincos_2d(x.shape[1] // PATCH, x.shape[2] // PATCH, DIM, dtype=torch.float64)
        logits.append(model(x[None]))
    case("vit_pytorch_simple", model, config("vit-pytorch SimpleViT"), torch.cat(logits))


# ---------------------------------------------------------------------------------------------
# timm, and DINOv2's own names


def timm_cases(images):
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    from timm.models.vision_transformer import VisionTransformer

    base = dict(
        patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0, num_classes=CLASSES,
        dynamic_img_size=True, img_size=GRID * PATCH,
    )
    cases = {
        "vit_map": dict(class_token=False, global_pool="map", act_layer="gelu_tanh"),
        "vit_cls_reg_qk": dict(reg_tokens=2, qk_norm=True, init_values=1e-5),
        "vit_cls_gap": dict(global_pool="avg", qkv_bias=False),
        "vit_headless": dict(num_classes=0, init_values=1e-5),
    }
    for seed, (name, options) in enumerate(cases.items(), 70):
        model = randomise(VisionTransformer(**(base | options)), seed).double()
        extra = ['gelu = "tanh"'] if name == "vit_map" else []
        if name == "vit_cls_gap":
            extra.append('pool = "mean"')
        logits, features = one_by_one(model, images)
        logits = None if name == "vit_headless" else logits
        case(name, model, config(f"timm VisionTransformer: {name}", *extra), logits, features)

    cases = {
        "naflex_none": dict(global_pool="avg", fc_norm=True, pos_embed="none", class_token=True, reg_tokens=1),
        "naflex_avg_norm": dict(global_pool="avg", fc_norm=False, pos_embed="factorized", class_token=True),
    }
    for seed, (name, options) in enumerate(cases.items(), 76):
        cfg = NaFlexVitCfg(
            patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0, pos_embed_grid_size=(5, 6),
            **options,
        )
        model = randomise(NaFlexVit(cfg, num_classes=CLASSES), seed).double()
        logits, features = one_by_one(model, images)
        case(name, model, config(f"timm NaFlexVit: {name}", 'pool = "mean"'), logits, features)

    # DINOv2's repository cannot be installed as a package. Its network is timm's with LayerScale; its table is resized
    # for the scale (L + 0.1) / L0, without antialiasing, and stands here as that of a network of the image's size.
    model = randomise(VisionTransformer(**(base | dict(num_classes=0, init_values=1e-5))), 79).double()
    cls, table = model.pos_embed[:, :1], model.pos_embed[:, 1:].reshape(1, GRID, GRID, DIM).permute(0, 3, 1, 2)
    features = []
    for x in images:
        h, w = x.shape[1] // PATCH, x.shape[2] // PATCH
        resized = table
        if h * w != GRID * GRID or h != w:
            scale = ((h + 0.1) / GRID, (w + 0.1) / GRID)
            resized = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=False)
        assert resized.shape[-2:] == (h, w)
        sized = VisionTransformer(
            **(base | dict(num_classes=0, init_values=1e-5, img_size=x.shape[1:], dynamic_img_size=False))
        )
        positions = torch.cat([cls, resized.flatten(2).transpose(1, 2)], 1)
        sized.double().eval().load_state_dict(model.state_dict() | {"pos_embed": positions})
        features.append(sized(x[None]))
    mask = {"mask_token": torch.ones(1, DIM)}
    case("dinov2", model, config("DINOv2's own names", 'position = { resample = "bicubic-offset" }'), None, torch.cat(features), extra=mask)


# ---------------------------------------------------------------------------------------------
# big_vision: no JAX here. The forward pass is written from its definition (flax LayerNorm with epsilon 1e-6, GELU with
# tanh, scores by 1 / sqrt(head_dim), positions before the cls token), on arrays as its npz files hold them.


class Flax:
    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)
        self.p = {}

    def add(self, name, *shape, around=0.0, std=None):
        std = std if std is not None else 1.2 / math.sqrt(math.prod(shape[:-1]) if len(shape) > 1 else 1)
        self.p[name] = (around + std * torch.randn(*shape, generator=self.g)).float().double()

    def norm(self, name, dim=DIM):
        self.add(f"{name}/scale", dim, around=1, std=0.3)
        self.add(f"{name}/bias", dim, std=0.3)

    def dense(self, name, *shape, bias=None):
        self.add(f"{name}/kernel", *shape)
        self.add(f"{name}/bias", *(bias or shape[-1:]), std=0.3)

    def attention(self, name):
        head = DIM // HEADS
        for part in ("query", "key", "value"):
            self.add(f"{name}/{part}/kernel", DIM, HEADS, head, std=1.2 / math.sqrt(DIM))
            self.add(f"{name}/{part}/bias", HEADS, head, std=0.3)
        self.add(f"{name}/out/kernel", HEADS, head, DIM, std=1.2 / math.sqrt(DIM))
        self.add(f"{name}/out/bias", DIM, std=0.3)

    def block(self, name, at):
        self.norm(f"{name}/LayerNorm_0")
        self.attention(f"{name}/MultiHeadDotProductAttention_{at[0]}")
        self.norm(f"{name}/LayerNorm_{at[1]}")
        self.dense(f"{name}/MlpBlock_{at[2]}/Dense_0", DIM, MLP)
        self.dense(f"{name}/MlpBlock_{at[2]}/Dense_1", MLP, DIM)

    # The pass.

    def ln(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.p[f"{name}/scale"], self.p[f"{name}/bias"], 1e-6)

    def attend(self, q, kv, name):
        part = lambda x, n: torch.einsum("td,dhk->thk", x, self.p[f"{name}/{n}/kernel"]) + self.p[f"{name}/{n}/bias"]
        q, k, v = part(q, "query"), part(kv, "key"), part(kv, "value")
        weights = (torch.einsum("qhk,thk->hqt", q, k) / math.sqrt(DIM // HEADS)).softmax(-1)
        out = torch.einsum("hqt,thk->qhk", weights, v)
        return torch.einsum("qhk,hkd->qd", out, self.p[f"{name}/out/kernel"]) + self.p[f"{name}/out/bias"]

    def mlp(self, x, name):
        x = x @ self.p[f"{name}/Dense_0/kernel"] + self.p[f"{name}/Dense_0/bias"]
        x = F.gelu(x, approximate="tanh")
        return x @ self.p[f"{name}/Dense_1/kernel"] + self.p[f"{name}/Dense_1/bias"]

    def encode(self, x, at):
        for n in range(DEPTH):
            name = f"Transformer/encoderblock_{n}"
            y = self.ln(x, f"{name}/LayerNorm_0")
            x = x + self.attend(y, y, f"{name}/MultiHeadDotProductAttention_{at[0]}")
            x = x + self.mlp(self.ln(x, f"{name}/LayerNorm_{at[1]}"), f"{name}/MlpBlock_{at[2]}")
        return self.ln(x, "Transformer/encoder_norm")

    def map(self, x):
        x = self.attend(self.p["MAPHead_0/probe"][0], x, "MAPHead_0/MultiHeadDotProductAttention_0")
        return x + self.mlp(self.ln(x, "MAPHead_0/LayerNorm_0"), "MAPHead_0/MlpBlock_0")


def resized(table, h, w, **kind):
    """[y, x, D] for an image of h x w patches."""
    if table.shape[:2] == (h, w):
        return table
    return F.interpolate(table.permute(2, 0, 1)[None], size=(h, w), **kind)[0].permute(1, 2, 0)


def sincos(h, w):
    omega = 10000.0 ** -(torch.arange(DIM // 4, dtype=torch.float64) / (DIM // 4 - 1))
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    y, x = y.flatten()[:, None] * omega, x.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)


def big_vision_cases(images):
    new, old = (0, 1, 0), (1, 2, 3)
    pixels = PATCH * PATCH * 3

    def run(net, pool, positions, naflex, at):
        logits = []
        for image in images:
            h, w = image.shape[1] // PATCH, image.shape[2] // PATCH
            # Rows, columns and channels of each patch in this order, as NHWC images have them.
            x = image.reshape(3, h, PATCH, w, PATCH).permute(1, 3, 2, 4, 0).reshape(h * w, pixels)
            if naflex:
                x = net.ln(x, "patchln_pre")
            x = x @ net.p["embedding/kernel"].reshape(pixels, DIM) + net.p["embedding/bias"]
            if naflex:
                x = net.ln(x, "patchln_post")
            x = x + positions(h, w)
            if "cls" in net.p:
                cls = net.p["cls"][0]
                if at is old:
                    cls = cls + net.p["Transformer/posembed_input/pos_embedding"][0, :1]
                x = torch.cat([cls, x])
            x = net.encode(x, at)
            x = net.map(x) if pool == "map" else x.mean(0, keepdim=True) if pool == "gap" else x[:1]
            logits.append(x @ net.p["head/kernel"] + net.p["head/bias"])
        return torch.cat(logits)

    def network(seed, pool, at=new, naflex=False):
        net = Flax(seed)
        if naflex:
            net.norm("patchln_pre", pixels)
            net.dense("embedding", pixels, DIM)
            net.norm("patchln_post")
        else:
            net.dense("embedding", PATCH, PATCH, 3, DIM)
        for n in range(DEPTH):
            net.block(f"Transformer/encoderblock_{n}", at)
        net.norm("Transformer/encoder_norm")
        if pool == "map":
            net.add("MAPHead_0/probe", 1, 1, DIM, std=1)
            net.attention("MAPHead_0/MultiHeadDotProductAttention_0")
            net.norm("MAPHead_0/LayerNorm_0")
            net.dense("MAPHead_0/MlpBlock_0/Dense_0", DIM, MLP)
            net.dense("MAPHead_0/MlpBlock_0/Dense_1", MLP, DIM)
        if pool == "tok":
            net.add("cls", 1, 1, DIM, std=0.7)
        net.dense("head", DIM, CLASSES)
        return net

    def text(description, *lines):
        return "\n".join([f'description = "{description}"', "[model]", 'gelu = "tanh"', *lines])

    corners = dict(mode="bilinear", align_corners=True)
    corner_line = 'position = { resample = "linear-align-corners" }'

    net = network(80, "tok")
    net.add("pos_embedding", 1, GRID * GRID, DIM, std=0.7)
    table = net.p["pos_embedding"].reshape(GRID, GRID, DIM)
    logits = run(net, "tok", lambda h, w: resized(table, h, w, **corners).reshape(-1, DIM), False, new)
    case("big_vision_tok", net.p, text("big_vision ViT with a cls token", corner_line), logits, None, lambda k: "params/" + k)

    net = network(81, "map")
    net.add("pos_embedding", 1, GRID * GRID, DIM, std=0.7)
    table2 = net.p["pos_embedding"].reshape(GRID, GRID, DIM)
    logits = run(net, "map", lambda h, w: resized(table2, h, w, **corners).reshape(-1, DIM), False, new)
    towers = {"params/t": torch.zeros(1), "params/txt/pos_embedding": torch.zeros(1, 4, DIM)}
    case("big_vision_map", net.p, text("big_vision ViT with a MAP head, of two towers", corner_line), logits, None,
         lambda k: "params/img/" + k, towers)

    net = network(82, "gap")
    logits = run(net, "gap", sincos, False, new)
    case("big_vision_sincos", net.p, text("big_vision ViT with fixed sines and cosines"), logits, None)

    net = network(83, "map", naflex=True)
    net.add("pos_embedding", GRID, GRID, DIM, std=0.7)
    filters = dict(mode="bilinear", align_corners=False, antialias=True)
    logits = run(net, "map", lambda h, w: resized(net.p["pos_embedding"], h, w, **filters).reshape(-1, DIM), True, new)
    # One array for all blocks, as flax scans over them.
    first = "Transformer/encoderblock_0/"
    scanned = {k: v for k, v in net.p.items() if "encoderblock_" not in k}
    for k in [k for k in net.p if k.startswith(first)]:
        blocks = [net.p[k.replace("encoderblock_0", f"encoderblock_{n}")] for n in range(DEPTH)]
        scanned[k.replace("encoderblock_0", "encoderblock")] = torch.stack(blocks)
    case("big_vision_naflex", scanned, text("big_vision NaFlex ViT", 'position = { resample = "bilinear" }'), logits, None,
         lambda k: "params/" + k)

    net = network(84, "tok", at=old)
    net.add("Transformer/posembed_input/pos_embedding", 1, 1 + GRID * GRID, DIM, std=0.7)
    table3 = net.p["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(GRID, GRID, DIM)
    logits = run(net, "tok", lambda h, w: resized(table3, h, w, **corners).reshape(-1, DIM), False, old)
    case("vit_jax", net.p, text("vision_transformer, AugReg", corner_line), logits)


def families(images):
    hf_vit_cases(images)
    hf_dinov2_cases(images)
    hf_siglip_cases(images)
    vit_pytorch_cases(images)
    timm_cases(images)
    big_vision_cases(images)
