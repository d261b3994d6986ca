"""An exported network in OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yolonas.errors import CheckpointError
from yolonas.exported import OUTPUT_NAMES, read_manifest
from yolonas.extras import openvino_core
from yolonas.inference.runtimes.exported import Array, ExportedRuntime


class OpenVino(ExportedRuntime):
    """A `Runtime` that runs an .onnx or .xml file of `yolonas export` or `yolonas quantize`.

    precision "bf16" computes what is not quantized in bfloat16, "fp32" in float32, which "auto" means too: OpenVINO
    itself would take bfloat16 where the processor multiplies it. Requests are of one batch on all cores: on 2 cores
    streams that share the cores took 0 to 10 % less time, and a second compiled network.
    """

    name = "openvino"

    def __init__(self, path: Path, threads: int | None = None, precision: str = "auto") -> None:
        super().__init__(read_manifest(path), threads)
        half = precision == "bf16"
        self.precision: str = "bf16" if half and self.manifest.precision != "int8" else self.manifest.precision
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = str(threads)
        core = openvino_core()
        try:
            self._compiled = core.compile_model(core.read_model(path), "CPU", config)
        except RuntimeError as error:
            line = str(error).strip().rpartition("\n")[2][:200]
            raise CheckpointError(f"{path} cannot be loaded by OpenVINO ({line}): export it again") from error
        self._outputs: list[Any] = [self._compiled.output(name) for name in OUTPUT_NAMES[self.manifest.output]]

    def infer(self, images: Array) -> list[Array]:
        request = self._compiled.create_infer_request()  # of this call: its outputs lie in its memory
        request.infer({0: images}, share_inputs=True, share_outputs=True)
        return [request.get_tensor(output).data for output in self._outputs]
