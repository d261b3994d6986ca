"""What `predict` gives."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class PredictionValue(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_version: Any = None
    score: float | None = 0.0
    result: list[dict[str, Any]] | None


class ModelResponse(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_version: str | None = None
    predictions: list[list[PredictionValue] | PredictionValue]

    def set_version(self, version: str) -> None:
        for one in self.predictions:
            for prediction in one if isinstance(one, list) else [one]:
                prediction.model_version = prediction.model_version or version
