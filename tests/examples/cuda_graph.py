"""A network and its post-processing as one CUDA graph: a frame costs one launch, and the host waits for nothing.

    python cuda_graph.py

`decode_nms` has outputs of fixed size and takes its workspace from torch's caching allocator, so it is captured with
the network. `counts` stays on the device, like all the rest, until you read it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from yolonas import ops


class Pipeline:
    """Images -> Decoded, replayed from a graph; both lie in the same memory at every call."""

    def __init__(
        self, network: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]], images: Tensor, threshold: float = 0.25
    ) -> None:
        self.images = images.clone()

        def run() -> ops.Decoded:
            class_logits, box_logits = network(self.images)
            return ops.decode_nms(class_logits, box_logits, (8, 16, 32), score_threshold=threshold, iou_threshold=0.7)

        with torch.inference_mode():
            side = torch.cuda.Stream()  # libraries set themselves up in the first calls, which may not be captured
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.decoded = run()

    def __call__(self, images: Tensor) -> ops.Decoded:
        self.images.copy_(images)
        self.graph.replay()
        return self.decoded  # overwritten by the next call: clone what you keep


class Head(nn.Module):
    """Stands for a network: raw maps of strides 8, 16 and 32 from random weights."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.classes = nn.ModuleList(nn.Conv2d(3, classes, s, s) for s in (8, 16, 32))
        self.boxes = nn.ModuleList(nn.Conv2d(3, 68, s, s) for s in (8, 16, 32))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [level(images) for level in self.classes], [level(images) for level in self.boxes]


if __name__ == "__main__":
    network = Head().cuda().eval()
    pipeline = Pipeline(network, torch.rand(8, 3, 640, 640, device="cuda"), threshold=0.5)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    frames = torch.rand(8, 3, 640, 640, device="cuda")
    start.record()
    for _ in range(100):
        decoded = pipeline(frames)
    end.record()
    end.synchronize()
    print(f"{start.elapsed_time(end) / 100:.3f} ms for 8 images; boxes of each: {decoded.counts.tolist()}")
