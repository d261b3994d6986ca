"""An exported network in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from yolonas.exported import INPUT_NAME, RAW_OUTPUT_NAMES, read_manifest
from yolonas.extras import require
from yolonas.inference.runtimes import Decoding, Found, decode


class OnnxRuntime:
    """A `Runtime` that runs a raw .onnx file of `yolonas export` or `yolonas quantize`."""

    name = "onnxruntime"
    device = "cpu"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        onnxruntime = require("onnxruntime", "onnx", "runtime 'onnxruntime'")
        self.precision: str = read_manifest(path).precision
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def detect(self, canvases: npt.NDArray[np.uint8], decoding: Decoding) -> list[Found]:
        return decode(self._session.run(RAW_OUTPUT_NAMES, {INPUT_NAME: canvases}), decoding)
