"""The best evaluated weights of a run, kept to be averaged at its end."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from yolonas.atomic import atomic_file


class Snapshots:
    """Files `<epoch>.safetensors` in a folder, at most `count` of them: those with the highest values."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def add(self, epoch: int, values: dict[int, float], state: dict[str, Tensor]) -> None:
        """Keep an epoch's weights if they are among the best; `values`: accuracy of each evaluated epoch, this too."""
        best = sorted(values, key=lambda e: (values[e], e), reverse=True)[: self.count]
        if epoch in best:
            self.folder.mkdir(exist_ok=True)
            with atomic_file(self._path(epoch)) as stream:
                stream.write(safetensors.torch.save({k: v.cpu().contiguous() for k, v in state.items()}))
        for other in self.epochs():
            if other not in best:
                self._path(other).unlink()

    def epochs(self) -> list[int]:
        """Epochs whose weights are kept."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors"))

    def mean(self) -> dict[str, Tensor]:
        """The mean of the kept weights."""
        states = [safetensors.torch.load_file(self._path(epoch)) for epoch in self.epochs()]
        return {
            key: torch.stack([state[key].double() for state in states]).mean(0).to(states[0][key].dtype)
            for key in states[0]
        }

    def clear(self) -> None:
        """Remove the files."""
        for epoch in self.epochs():
            self._path(epoch).unlink()
        if self.folder.exists():
            self.folder.rmdir()

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{epoch}.safetensors"
