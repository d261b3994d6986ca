"""The base class: one instance for each request, `setup` in the constructor, texts kept for each project."""

from __future__ import annotations

from typing import Any

CACHE: dict[tuple[str, str], str] = {}


class LabelStudioMLBase:
    def __init__(self, project_id: str | None = None, label_config: str | None = None) -> None:
        self.project_id = project_id or ""
        if label_config is not None:
            self.set("label_config", label_config)
        if not self.get("model_version"):
            self.set("model_version", "0.0.1")
        self.setup()

    def setup(self) -> None:
        pass

    def get(self, key: str) -> str | None:
        return CACHE.get((self.project_id, key))

    def set(self, key: str, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"the cache of 2.x keeps texts, not {value!r}")
        CACHE[self.project_id, key] = value

    @property
    def label_config(self) -> str | None:
        return self.get("label_config")

    def fit(self, event: str, data: dict[str, Any], **_: Any) -> Any:
        raise NotImplementedError
