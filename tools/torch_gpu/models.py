"""The networks of plain and of packed recipes, such as vit-b16 and navit-b16, as one would write them in PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention, with RMS norm of q and k where `norm` says so; `attend` gets [..., H, Dh]."""

    def __init__(self, width, heads, bias, proj_bias, norm):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, proj_bias)
        gain = lambda: nn.Parameter(torch.ones(heads, self.head_dim)) if norm else None  # noqa: E731
        self.q_gain, self.k_gain = gain(), gain()

    def forward(self, x, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        if self.q_gain is not None:
            q, k = normed(q, self.q_gain), normed(k, self.k_gain)
        return self.proj(attend(q, k, v).flatten(-2))


def normed(x, gain):
    # Autocast may compute norms in f32.
    return (F.rms_norm(x, x.shape[-1:], eps=1e-6) * gain).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, width, hidden, gelu):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.approximate = "tanh" if gelu == "tanh" else "none"

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, model, drop_path):
        super().__init__()
        norm = lambda: nn.LayerNorm(width, eps=1e-6, bias=model["norm_bias"])  # noqa: E731
        self.norm1, self.norm2, self.mlp = norm(), norm(), Mlp(width, hidden, model["gelu"])
        self.attn = Attention(width, heads, model["qkv_bias"], model["proj_bias"], model["qk_norm"] == "rms")
        self.drop_path = drop_path

    def branch(self, x):
        """Stochastic depth, a decision an image [B, S, D]."""
        if self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)

    def forward(self, x, attend):
        x = x + self.branch(self.attn(self.norm1(x), attend))
        return x + self.branch(self.mlp(self.norm2(x)))


class Base(nn.Module):
    """Embedding of u8 patches, blocks and head of a recipe."""

    def __init__(self, described, classes):
        super().__init__()
        recipe, width = described["recipe"], described["width"]
        model, depth = recipe["model"], described["depth"]
        values = described["patch_dim"] // model["channels"]
        scale = lambda of: torch.tensor(recipe["data"][of]).repeat_interleave(  # noqa: E731
            values * model["channels"] // len(recipe["data"][of])
        )
        self.register_buffer("mean", 255 * scale("mean"), persistent=False)
        self.register_buffer("std", 255 * scale("std"), persistent=False)
        self.embed = nn.Linear(described["patch_dim"], width)
        rates = [model["drop_path"] * i / max(depth - 1, 1) for i in range(depth)]
        if not model["drop_path_linear"]:
            rates = [model["drop_path"]] * depth
        self.blocks = nn.ModuleList(
            Block(width, described["heads"], described["mlp"], model, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, bias=model["norm_bias"])
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.head.bias, model["head_init_bias"])

    def embedded(self, patches):
        return self.embed((patches.float() - self.mean) / self.std)


def dense(q, k, v):
    """Attention over [B, S, H, Dh]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class PlainViT(Base):
    """Squares of one size: patches [B, S, P], a position table, and a cls token or a query that pools them (MAP)."""

    def __init__(self, described, classes, patches):
        super().__init__(described, classes)
        width, model = described["width"], described["recipe"]["model"]
        self.position = nn.Parameter(0.02 * torch.randn(1, patches, width))
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pools = model["pool"] == "map"
        if self.pools:
            self.shape = (described["heads"], width // described["heads"])
            self.pool_q, self.pool_kv = (nn.Linear(width, n * width, model["qkv_bias"]) for n in (1, 2))
            self.pool_proj = nn.Linear(width, width, model["proj_bias"])
            self.pool_norm = nn.LayerNorm(width, eps=1e-6, bias=model["norm_bias"])
            self.pool_mlp = Mlp(width, described["mlp"], model["gelu"])

    def pooled(self, x):
        query = self.cls.to(x.dtype).expand(len(x), -1, -1)
        k, v = self.pool_kv(x).unflatten(-1, (2, *self.shape)).unbind(-3)
        x = self.pool_proj(dense(self.pool_q(query).unflatten(-1, self.shape), k, v).flatten(-2))[:, 0]
        return x + self.pool_mlp(self.pool_norm(x))

    def forward(self, patches):
        x = self.embedded(patches)
        x = x + self.position.to(x.dtype)
        if not self.pools:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, dense)
        x = self.norm(x)
        return self.head(self.pooled(x) if self.pools else x[:, 0])


class PackedNaViT(Base):
    """Images of any shape one after another: patches [T, P], row and column of each [T, 2], the image that it
    belongs to [T] (`slots` for padding) and where the sequences of attention begin [S + 1], none longer than
    `longest`."""

    def __init__(self, described, classes, varlen, longest):
        super().__init__(described, classes)
        width, model, heads = described["width"], described["recipe"]["model"], described["heads"]
        self.slots, self.varlen, self.longest = described["slots"], varlen, longest
        table = lambda rows: nn.Parameter(0.02 * torch.randn(rows, width))  # noqa: E731
        self.rows, self.columns = table(model["position"]["rows"]), table(model["position"]["columns"])
        self.query = nn.Parameter(0.02 * torch.randn(1, width))
        self.pool_q, self.pool_kv = (nn.Linear(width, n * width, model["qkv_bias"]) for n in (1, 2))
        self.shape = (heads, width // heads)
        gain = lambda: nn.Parameter(torch.ones(self.shape)) if model["qk_norm"] == "rms" else None  # noqa: E731
        self.pool_q_gain, self.pool_k_gain = gain(), gain()
        self.pool_proj = nn.Linear(width, width, model["proj_bias"])
        self.pool_norm = nn.LayerNorm(width, eps=1e-6, bias=model["norm_bias"])
        self.pool_mlp = Mlp(width, described["mlp"], model["gelu"])

    def pooled(self, x, image):
        """One learned query attends to the tokens of each image: a softmax over segments."""
        heads, head_dim = self.shape
        q = self.pool_q(self.query).unflatten(-1, (heads, head_dim))
        k, v = self.pool_kv(x).unflatten(-1, (2, heads, head_dim)).unbind(-3)
        if self.pool_q_gain is not None:
            q, k = normed(q, self.pool_q_gain), normed(k, self.pool_k_gain)
        scores = (q * k).float().sum(-1) * head_dim**-0.5
        if self.pool_q_gain is None:
            # Normalised q and k bound the scores; without a norm the maximum of each image is taken off.
            most = scores.new_full((self.slots + 1, heads), float("-inf"))
            most = most.index_reduce(0, image, scores.detach(), "amax")
            scores = scores - most[image]
        weights = scores.exp()
        total = weights.new_zeros(self.slots + 1, heads).index_add(0, image, weights)
        sums = weights.new_zeros(self.slots + 1, heads, head_dim).index_add(
            0, image, weights.unsqueeze(-1) * v.float()
        )
        x = self.pool_proj((sums / total.clamp(min=1e-9).unsqueeze(-1))[:-1].flatten(1).to(x.dtype))
        return x + self.pool_mlp(self.pool_norm(x))

    def forward(self, patches, positions, image, starts):
        x = self.embedded(patches)
        x = x + (self.rows[positions[:, 0]] + self.columns[positions[:, 1]]).to(x.dtype)
        attend = lambda q, k, v: self.varlen(q, k, v, starts, self.longest)  # noqa: E731
        for block in self.blocks:
            x = block(x, attend)
        return self.head(self.pooled(self.norm(x), image))
