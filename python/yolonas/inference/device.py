"""Where the network runs."""

from __future__ import annotations

import torch

from yolonas.errors import OptionError


def resolve_device(device: str | int | torch.device = "auto") -> torch.device:
    """ "auto" (CUDA where there is a device, else the CPU), "cpu", "cuda", "cuda:1" or a CUDA number such as "1".

    Raises OptionError, a ValueError, for another name, and for a CUDA device that this machine does not have.
    """
    name = str(device).strip().lower()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.isdigit():
        name = f"cuda:{name}"
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise OptionError(f"device {str(device)!r} is not known: use auto, cpu, cuda, or cuda:0 and so on")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        has = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device that PyTorch can use"
        raise OptionError(f"device {str(device)!r} does not exist: this machine has {has}")
    return found
