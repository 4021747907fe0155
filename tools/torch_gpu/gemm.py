"""Products of a ViT's layers beside cuBLAS."""

import ctypes

from .measure import check, seconds, sets_for, stream_of

EPILOGUES = {"plain": "STORE", "gelu": "STORE", "residual": "STORE", "gelu_grad": "GELU_GRAD", "sum": "SUM"}

# Width and hidden width of the MLP, tokens.
WIDTHS = [
    (192, 768, 16384), (384, 1536, 16384), (768, 3072, 16384), (1024, 4096, 16384), (1152, 4304, 16384),
    (1280, 5120, 16384), (1408, 6144, 16384), (1664, 8192, 16384), (6144, 24576, 8192),
]
QUICK_WIDTHS = [(768, 3072, 16384)]


def rows(torch, library, kernels, quick):
    """(name, TFLOP/s ours, TFLOP/s of cuBLAS for the product alone) of every product of a ViT's layers."""
    for d, hidden, tokens in QUICK_WIDTHS if quick else WIDTHS:
        products = []
        for inner, outer, forward, backward in (
            (d, 3 * d, "plain", "plain"), (d, d, "residual", "plain"), (d, hidden, "gelu", "plain"),
            (hidden, d, "residual", "gelu_grad"),
        ):
            products += [("nt", tokens, outer, inner, fused) for fused in ("plain", forward)]
            products += [("nn", tokens, inner, outer, fused) for fused in ("plain", backward)]
            products.append(("tn", outer, inner, tokens, "sum"))
        for product in dict.fromkeys(products):
            yield row(torch, library, kernels, *product)


def row(torch, library, kernels, layout, m, n, k, fused):
    wide = torch.float32 if fused == "sum" else torch.bfloat16
    shape_a = (k, m) if layout == "tn" else (m, k)
    shape_b = (n, k) if layout == "nt" else (k, n)
    sets = sets_for(torch, 2 * (m * k + n * k + 2 * m * n))
    random = lambda *shape: torch.randn(sets, *shape, device="cuda").bfloat16()  # noqa: E731
    a, b, side = random(*shape_a), random(*shape_b), random(m, n)
    kept = side.clone()
    out = torch.empty(sets, m, n, device="cuda", dtype=wide)
    bias, bias_grad = torch.randn(n, device="cuda"), torch.empty(n, device="cuda")
    calls = []
    for i in range(sets):
        call = library.struct(
            "gemm", m=m, n=n, k=k, layout=library.numbers[f"TRENCADIS_GEMM_LAYOUT_{layout.upper()}"],
            epilogue=library.numbers[f"TRENCADIS_GEMM_EPILOGUE_{EPILOGUES[fused]}"],
        )
        call.a, call.b, call.out = (x[i].data_ptr() for x in (a, b, out))
        if fused in ("gelu", "residual"):
            call.bias = bias.data_ptr()
        if fused in ("gelu", "gelu_grad"):
            call.pre, call.gelu = side[i].data_ptr(), library.numbers["TRENCADIS_GELU_ERF"]
        if fused == "residual":
            call.residual = side[i].data_ptr()
        if fused == "gelu_grad":
            call.bias_grad = bias_grad.data_ptr()
        calls.append(call)
    size = ctypes.c_uint64()
    library.call("gemm_plan", kernels, calls[0], size)
    workspace = torch.empty(max(size.value, 16), device="cuda", dtype=torch.uint8)
    for call in calls:
        call.workspace, call.workspace_bytes = workspace.data_ptr(), workspace.numel()

    def ours(i):
        library.call("gemm_launch", kernels, stream_of(torch), calls[i])

    views = [(x.mT if layout == "tn" else x, y.mT if layout == "nt" else y) for x, y in zip(a, b)]
    products = torch.empty_like(side)

    def cublas(i):
        torch.mm(*views[i], out=products[i])

    ours(0)
    # The reference is f32 without TF32: its rounding is far below that of bf16.
    wanted = views[0][0].float() @ views[0][1].float()
    if fused in ("gelu", "residual"):
        wanted += bias
    if fused == "gelu":
        check("gemm pre-activation", side[0], wanted, 1e-5)
        wanted = torch.nn.functional.gelu(wanted)
    elif fused == "residual":
        wanted += kept[0].float()
    elif fused == "gelu_grad":
        x = kept[0].float().requires_grad_()
        (slope,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
        wanted *= slope
        check("gemm bias gradient", bias_grad, wanted.sum(0), 1e-5)
    check(f"gemm {layout} {fused} {m}x{n}x{k}", out[0], wanted, 1e-5)
    del wanted
    operations = 2 * m * n * k / 1e12
    name = f"{layout} {fused} {m}x{n}x{k}"
    return name, operations / seconds(torch, ours, sets), {"cuBLAS": operations / seconds(torch, cublas, sets)}
