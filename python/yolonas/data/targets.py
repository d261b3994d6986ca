"""The ground truth of a batch, padded to one shape: the loss need not ask the device how many boxes there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Targets(NamedTuple):
    """Ground-truth boxes of B images, padded to the G of the image with the most; padding has `mask` False.

    labels [B, G] int64; boxes [B, G, 4] float32, xyxy canvas px; mask [B, G] bool.
    """

    labels: Tensor
    boxes: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> Targets:
        """Targets from each image's boxes [n, 4] xyxy canvas px and labels [n]; G is at least 1."""
        most = max([1, *(len(one) for one in labels)])
        padded = cls(
            torch.zeros(len(labels), most, dtype=torch.int64),
            torch.zeros(len(labels), most, 4),
            torch.zeros(len(labels), most, dtype=torch.bool),
        )
        for image, (one_boxes, one_labels) in enumerate(zip(boxes, labels, strict=True)):
            count = len(one_labels)
            padded.labels[image, :count] = torch.from_numpy(np.asarray(one_labels, dtype=np.int64))
            padded.boxes[image, :count] = torch.from_numpy(np.asarray(one_boxes, dtype=np.float32)).reshape(count, 4)
            padded.mask[image, :count] = True
        return padded

    def to(self, device: torch.device) -> Targets:
        """The same targets on `device`."""
        return Targets(*(tensor.to(device, non_blocking=True) for tensor in self))
