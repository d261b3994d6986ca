"""Another detector's NMS, replaced. `nms` and `batched_nms` take what torchvision's take, in its order:

    from torchvision.ops import batched_nms   ->   from yolonas.ops import batched_nms

That is all where a project calls torchvision's, as detectron2 does, and YOLOX and Segment Anything, whose classes are
floats. The result is exact at any scale of coordinates: no class is shifted by an offset, which makes torchvision's
lose boxes.

`detections` below is the whole post-processing of a YOLOv8-like head, of one map [B, 4 + C, A], and does not loop over
images: a label that tells images apart as well as classes makes it one call for the batch.
"""

import torch
from torch import Tensor

from yolonas.ops import batched_nms


def detections(
    prediction: Tensor, score_threshold: float = 0.25, iou_threshold: float = 0.7, max_detections: int = 300
) -> list[Tensor]:
    """Prediction [B, 4 + C, A], cx cy w h and a score of each class -> of each image [n, 6]: xyxy, score, label."""
    images, channels, _ = prediction.shape
    classes = channels - 4
    image, label, anchor = (prediction[:, 4:] > score_threshold).nonzero(as_tuple=True)
    score = prediction[image, 4 + label, anchor]
    center, size = prediction[image, :4, anchor].split(2, 1)
    boxes = torch.cat([center - size / 2, center + size / 2], 1)

    keep = batched_nms(boxes, score, image * classes + label, iou_threshold)

    rows = torch.cat([boxes, score[:, None], label[:, None]], 1)[keep]  # descending by score
    return [rows[image[keep] == i][:max_detections] for i in range(images)]
