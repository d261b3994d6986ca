"""What each process of test_distributed.py does: a short training into the folder it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rectangles import draw
from yolonas.training import distributed, trainer
from yolonas.training.network import Network
from yolonas.training.recipe import Recipe


def main(folder: Path) -> None:
    data = [draw(folder / f"{part}{distributed.rank()}", count, seed=seed) for part, count, seed in
            (("train", 6, 0), ("val", 5, 9))]  # fmt: skip
    recipe = Recipe(
        image_size=64, batch=4, epochs=2, lr=2e-3, warmup_steps=2, evaluate_every=2, precision="float32", seed=1
    )
    # In float64, as a hundred batch norms turn float32's rounding into differences that move some assignments.
    first_model, single = trainer.first_model, Network.prepare
    trainer.first_model = lambda *arguments: first_model(*arguments).double()
    run = trainer._Run(*data, recipe, folder, torch.device("cpu"), None, None, "n", {})
    Network.prepare = lambda self, canvases: single(self, canvases).double()
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    losses = [run.run_epoch() for _ in range(recipe.epochs)]
    Network.prepare = single
    run.ema.model.float()
    metrics = run.evaluate_and_save()
    if distributed.rank() == 0:
        torch.save({"before": before, "after": run.model.state_dict()}, folder / "weights.pt")
        report = {"losses": torch.stack(losses).tolist(), "metrics": metrics.to_dict(), "steps": run.schedule.step}
        boxes = [one.boxes.tolist() for one in run.validation.detections]
        (folder / "result.json").write_text(json.dumps({**report, "boxes": boxes, "processes": distributed.size()}))


with distributed.processes():
    main(Path(sys.argv[1]))
