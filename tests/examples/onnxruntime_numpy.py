"""Boxes out of an ONNX Runtime session's raw maps, with NumPy alone: no torch where the model is served.

    python onnxruntime_numpy.py model.onnx images.npy

The network gives six maps, class and box logits of strides 8, 16 and 32; everything after it is one call, so a model
exported once serves any threshold. Where torch is, a YoloNAS becomes such a model by

    torch.onnx.export(model.fused(), (images,), "model.onnx", input_names=["images"],
                      output_names=["class_8", "class_16", "class_32", "box_8", "box_16", "box_32"],
                      dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False)
"""

import sys

import numpy as np
import onnxruntime

from yolonas.ops import numpy as npops


def detect(
    session: onnxruntime.InferenceSession, images: np.ndarray, score_threshold: float = 0.25, iou_threshold: float = 0.7
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images [B, 3, H, W] float32 0..1 -> boxes [n, 4] xyxy canvas px, scores [n], labels [n] of each."""
    maps = session.run(None, {"images": images})
    decoded = npops.decode_nms(
        maps[:3], maps[3:], (8, 16, 32), score_threshold=score_threshold, iou_threshold=iou_threshold
    )
    # The arrays have room for `max_detections` boxes of each image; `counts` says how many there are.
    return [
        (boxes[:count], scores[:count], labels[:count])
        for boxes, scores, labels, count in zip(
            decoded.boxes, decoded.scores, decoded.labels, decoded.counts, strict=True
        )
    ]


if __name__ == "__main__":
    model, images = sys.argv[1:]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for number, (boxes, scores, labels) in enumerate(detect(session, np.load(images))):
        for box, score, label in zip(boxes, scores, labels, strict=True):
            print(number, label, f"{score:.3f}", *(f"{side:.1f}" for side in box))
