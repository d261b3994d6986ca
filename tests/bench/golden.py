"""Weights that are a pure function of their names, the rule of the reference vectors: scores spread over 0..1."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from yolonas.model import YoloNAS


def golden(model: YoloNAS) -> YoloNAS:
    """Fill in the weights of the reference vectors' rule; scores then spread over 0..1."""
    state = {}
    for key, value in model.state_dict().items():
        shape, r = tuple(value.shape), np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            array = np.zeros(shape)
        elif key.endswith("running_var"):
            array = r.uniform(3, 5, shape) if key.endswith("post_bn.running_var") else r.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean") or (key.endswith(".bias") and len(shape) == 1):
            array = 0.1 * r.standard_normal(shape)
        elif key.endswith(".alpha"):
            array = r.uniform(0.3, 0.8, shape)
        elif len(shape) == 1:
            array = r.uniform(0.8, 1.2, shape)
        else:
            array = 1.3 * r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(array)).to(value.dtype)
    model.load_state_dict(state)
    return model.eval()
