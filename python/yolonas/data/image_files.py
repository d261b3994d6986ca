"""Where the images that a json file names may lie, and reading that json file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolonas.errors import DataError


def read_json(path: Path) -> Any:
    """The content of a json file in UTF-8, with or without a byte order mark; raises DataError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file: save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from error
    except ValueError as error:  # a number of more than 4300 digits
        raise DataError(f"{path} holds a number of thousands of digits") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to be a data set") from error


def image_folders(path: Path) -> list[Path]:
    """Where the images of a json file may lie: beside it, in images/, in a folder of its name, one level up."""
    stem, here, above = path.stem, path.parent, path.parent.parent
    short = stem.removeprefix("instances_")
    return list(
        dict.fromkeys(
            [here, here / "images", here / stem, here / "images" / stem]
            + [folder / short for folder in (here, above, above / "images")]
            + [above / "images", above]
        )
    )


def locate(names: Sequence[str], folders: Sequence[Path]) -> Path | None:
    """The first of the names, as written or by its last part alone, that is a file in one of the folders."""
    relative = [Path(name.replace("\\", "/")) for name in names]
    # The bare name last: exporters write paths of the machine that they ran on.
    candidates = [folder / name for name in (*relative, *(Path(n.name) for n in relative)) for folder in folders]
    return next((candidate for candidate in candidates if _is_file(candidate)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:
        return True  # perhaps; reading it will say so
    except OSError:  # a name too long for the file system
        return False
