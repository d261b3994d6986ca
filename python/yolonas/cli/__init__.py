"""The `yolonas` command. A subcommand's module is imported when it runs, so that `yolonas --help` is quick."""

from __future__ import annotations

import importlib
from typing import Any

try:
    import click
except ModuleNotFoundError as error:  # the base installation is the ops alone
    raise SystemExit(
        "Error: the yolonas command needs click, which is missing: pip install 'yolonas[detector]'"
    ) from error

from yolonas import __version__
from yolonas.errors import YolonasError

COMMANDS = {
    "predict": "Find objects in images and videos: pictures with boxes, tracks, JSON, COCO json, YOLO labels.",
    "val": "Measure a checkpoint on labelled images: COCO AP, per class.",
    "train": "Train or fine-tune on labelled images.",
    "export": "Write a checkpoint for ONNX Runtime, OpenVINO or torch.export.",
    "quantize": "Make a checkpoint INT8, and measure what that costs and gains.",
    "benchmark": "Measure speed and accuracy in every runtime and precision.",
    "info": "Show a model's size, classes and preprocessing.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"yolonas.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except YolonasError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "yolonas"):
                raise
            raise click.ClickException(f"this command needs {package}: pip install 'yolonas[detector]'") from error
        except ImportError as error:  # OpenCV without the system's libGL, see yolonas.inference._cv2
            raise click.ClickException(str(error)) from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """YOLO-NAS: detect objects, measure, train."""
