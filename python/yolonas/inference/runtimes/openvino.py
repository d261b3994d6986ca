"""An exported network in OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from yolonas.exported import RAW_OUTPUT_NAMES, read_manifest
from yolonas.extras import require
from yolonas.inference.runtimes import Decoding, Found, decode


class OpenVino:
    """A `Runtime` that runs a raw .onnx or .xml file of `yolonas export` or `yolonas quantize`."""

    name = "openvino"
    device = "cpu"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        openvino = require("openvino", "openvino", "runtime 'openvino'")
        self.precision: str = read_manifest(path).precision
        core = openvino.Core()
        # float32 means float32: by itself OpenVINO takes bfloat16 where the processor multiplies it.
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = str(threads)
        self._compiled = core.compile_model(core.read_model(path), "CPU", config)

    def detect(self, canvases: npt.NDArray[np.uint8], decoding: Decoding) -> list[Found]:
        request = self._compiled.create_infer_request()
        request.infer({0: canvases}, share_inputs=True, share_outputs=True)
        return decode([request.get_tensor(name).data for name in RAW_OUTPUT_NAMES], decoding)
