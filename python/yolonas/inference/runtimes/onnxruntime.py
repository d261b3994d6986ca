"""An exported network in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from yolonas.errors import CheckpointError
from yolonas.exported import INPUT_NAME, OUTPUT_NAMES, read_manifest
from yolonas.extras import require
from yolonas.inference.runtimes.exported import Array, ExportedRuntime


class OnnxRuntime(ExportedRuntime):
    """A `Runtime` that runs an .onnx file of `yolonas export` or `yolonas quantize` in its own precision."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        onnxruntime = require("onnxruntime", "onnx", "runtime 'onnxruntime'")
        super().__init__(read_manifest(path), threads)
        self.precision: str = self.manifest.precision
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors: its warnings are about the graph, and tell the user nothing to do
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes share no base but Exception
            raise CheckpointError(
                f"{path} cannot be loaded by ONNX Runtime ({_line(error)}): export it again"
            ) from error
        self._outputs = list(OUTPUT_NAMES[self.manifest.output])

    def infer(self, images: Array) -> list[Array]:
        outputs: list[Array] = self._session.run(self._outputs, {INPUT_NAME: images})
        return outputs


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
