"""Writes tests/optim/goldens.safetensors: steps of SGD by torch.optim.SGD, and of Adafactor by optax.

`python tools/optim_goldens.py`; needs jax, optax, ml_dtypes, torch, numpy and safetensors.

Adafactor is big_vision's `scale_by_adafactor`: `optax.scale_by_factored_rms` with matrices factored from 32 rows and
columns on, a step keeping min(cap, 1 - t^-0.8) of the second moments; no clipping of the update; `optax.ema` in bf16
without bias correction; decoupled weight decay, multiplied by the learning rate. What optax multiplies in bf16 (the old
momentum by its decay) is multiplied in f32 here, as in this crate: the generator checks that both agree to what bf16
can tell.
"""

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import torch
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
LR, DECAY, MOMENTUM = 0.05, 0.3, 0.9
# Steps 1 and 2 keep less than this of the second moments, steps 3 and 4 would keep more.
CAP, POWER = 0.5, 0.8
SHAPES = {"tall": (40, 33), "wide": (32, 35), "narrow": (31, 12), "vector": (7,)}


def adafactor(start, grads):
    """Parameter, momentum and second moments (rows, then columns, or all) after each step's gradients."""

    def keep(count, power):
        return jnp.minimum(CAP, 1.0 - (jnp.asarray(count, jnp.float32) + 1.0) ** -power)

    rms = optax.scale_by_factored_rms(
        decay_rate=POWER, min_dim_size_to_factor=32, epsilon=1e-30, decay_rate_fn=keep)
    ema = optax.ema(MOMENTUM, debias=False, accumulator_dtype=jnp.bfloat16)
    p, m = start.astype(np.float64), np.zeros(start.shape, ml_dtypes.bfloat16)
    state, ema_state = rms.init(jnp.asarray(start)), ema.init(jnp.asarray(start))
    for grad in grads:
        u, state = rms.update(jnp.asarray(grad), state, jnp.asarray(start))
        theirs, ema_state = ema.update(u, ema_state)
        new = np.float64(MOMENTUM) * m.astype(np.float64) + (1 - MOMENTUM) * np.asarray(u, np.float64)
        assert np.abs(np.asarray(theirs, np.float64) - new).max() <= 2.0**-6 * np.abs(new).max()
        p -= LR * (new + DECAY * p)
        m = new.astype(np.float32).astype(ml_dtypes.bfloat16)
    if min(start.shape) < 32 or start.ndim < 2:
        v = np.asarray(state.v).ravel()
    else:
        # optax's rows are what is left by a mean over the longer side.
        longer_first = start.shape[0] > start.shape[1]
        sides = [state.v_col, state.v_row] if longer_first else [state.v_row, state.v_col]
        assert [len(side) for side in sides] == list(start.shape)
        v = np.concatenate([np.asarray(side) for side in sides])
    return {"p": p.astype(np.float32), "m": m.astype(np.float32), "v": v.astype(np.float32)}


def sgd(start, grads, nesterov):
    p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=LR, momentum=MOMENTUM, nesterov=nesterov)
    for grad in grads:
        # Decoupled: torch's own weight decay would go through the momentum.
        decay = LR * DECAY * p.detach()
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        p.data -= decay
    m = optimizer.state[p]["momentum_buffer"]
    return {"p": p.detach().numpy().astype(np.float32), "m": m.numpy().astype(np.float32)}


def main():
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        start = random.standard_normal(shape).astype(np.float32)
        # Rows and columns of different sizes, and one row without any gradient.
        scale = np.exp(random.standard_normal(shape[:1]))[(slice(None),) + (None,) * (len(shape) - 1)]
        grads = (random.standard_normal((STEPS, *shape)) * scale * 1e-3).astype(np.float32)
        grads[:, 1] = 0
        tensors |= {f"{name}.start": start, f"{name}.grads": grads}
        results = {"adafactor": adafactor(start, grads), "sgd": sgd(start, grads, False),
                   "nesterov": sgd(start, grads, True)}
        for rule, result in results.items():
            tensors |= {f"{name}.{rule}.{key}": value for key, value in result.items()}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()},
              ROOT / "tests/optim/goldens.safetensors")


if __name__ == "__main__":
    main()
