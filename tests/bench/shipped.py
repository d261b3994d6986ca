"""Train the checkpoint that comes with yolonas: n at 320 px on BCCD, from random weights, in half an hour of one core.

    OMP_NUM_THREADS=1 python tests/bench/shipped.py FOLDER [--shared ../shared]

FOLDER keeps the run, so it may be stopped and started again. The best evaluation on the validation images chooses the
weights; the test images choose nothing. Writes python/yolonas/shipped/yolo_nas_n_bccd.safetensors in float16, after
measuring that file.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

from measuring import REPOSITORY, processor_slug
from yolonas import Detector, checkpoint
from yolonas.data.readers import read_dataset
from yolonas.evaluation import evaluate
from yolonas.training.recipe import Recipe
from yolonas.training.report import EpochReport
from yolonas.training.trainer import train

FILE = REPOSITORY / "python" / "yolonas" / "shipped" / "yolo_nas_n_bccd.safetensors"
EPOCHS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    options = parser.parse_args()
    parts = {name: read_dataset(options.shared / "data" / "bccd", name) for name in ("train", "val", "test")}
    choices = {"image_size": 320, "epochs": EPOCHS, "plain_share": 0.15, "average_best": 5}
    recipe = Recipe.auto(parts["train"], "n", val=parts["val"], **choices)

    def tell(report: EpochReport) -> None:
        if report.ap is not None:
            left = f"{report.seconds_left / 60:.0f} minutes left"
            print(f"epoch {report.epoch}: AP {report.ap:.4f}, AP50 {report.ap50:.4f}, {left}", flush=True)

    result = train(
        parts["train"], parts["val"], recipe=recipe, out_dir=options.folder, variant="n", resume=True, on_epoch=tell
    )
    made = checkpoint.load(result.best)
    FILE.parent.mkdir(exist_ok=True)
    checkpoint.save(made, FILE, half=True)
    stored = checkpoint.load(FILE)
    metrics = {name: evaluate(Detector(stored, "cpu"), parts[name]).to_dict() for name in ("val", "test")}
    stored.record |= {
        "data": "BCCD (Shenggan/BCCD_Dataset, MIT): 205 training, 87 validation, 72 test images",
        "command": "tests/bench/shipped.py",
        "processor": processor_slug(),
        "date": str(date.today()),
        "metrics": metrics["val"],
        "test_metrics": metrics["test"],
    }
    checkpoint.save(stored, FILE, half=True)
    for name, values in metrics.items():
        print(f"{name}: AP {values['ap']:.4f}, AP50 {values['ap50']:.4f}, per class {values['per_class']}")
    print(f"{FILE}: {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
