"""One training over several processes, as `torchrun` starts them; without it every function is that of one process.

Each rank computes its share of every batch. Gradients are averaged over the ranks by DistributedDataParallel, and all
that a loss divides by is summed over them, so the result is that of one process with the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[None]:
    """Join the group of processes that the environment names (torchrun's variables), and leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks; it has no gradient."""
    if dist.is_initialized():
        value = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
    return value


def agree(*values: float) -> list[float]:
    """The numbers of rank 0: what the clock decides must be decided alike everywhere."""
    if not dist.is_initialized():
        return list(values)
    said = torch.tensor(values, dtype=torch.float64)  # on the CPU, so a GPU's work is not waited for
    dist.broadcast(said, 0)
    return [float(value) for value in said]


def share(items: Sequence[T]) -> list[T]:
    """Every size-th item: this rank's part of some work, to be put together by `gather`."""
    return list(items[rank() :: size()])


def gather(part: Sequence[T]) -> list[T]:
    """What all ranks made of their `share`, in the order of the whole, on every rank."""
    if not dist.is_initialized():
        return list(part)
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, list(part))
    whole: list[Any] = [None] * sum(len(one) for one in parts)
    for number, one in enumerate(parts):
        whole[number :: len(parts)] = one
    return whole


def spread(model: nn.Module) -> None:
    """Give a model on every rank the weights of rank 0."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The module whose backward pass averages gradients over the ranks; its batch norms see the whole batch."""
    if not dist.is_initialized():
        return model
    synchronise_batch_norms(model, device)
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, static_graph=True)


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Replace the batch norms of a model, in place, by such as take their statistics over all ranks."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SyncBatchNorm2d


class _SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over all ranks on the CPU, where torch's SyncBatchNorm does not run; plain in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.numel() // x.shape[1] * size()  # the ranks' shares are of one size
        mean = _sum_over_ranks(x.sum((0, 2, 3))) / count
        centred = x - mean.view(-1, 1, 1)
        variance = _sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            cast(Tensor, self.running_mean).lerp_(mean, cast(float, self.momentum))
            cast(Tensor, self.running_var).lerp_(variance * (count / max(count - 1, 1)), cast(float, self.momentum))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(input.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; so is its gradient, as every rank's loss depends on every rank's summand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return total(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0])


def _sum_over_ranks(value: Tensor) -> Tensor:
    summed: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]
    return summed
