"""Weights by name: those that come with yolonas, and published ones, from a local file or a verified download."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from yolonas.atomic import atomic_file
from yolonas.errors import WeightsError

TIMEOUT_SECONDS = 30.0
MAX_BYTES = 2**30  # L with its optimizer would have 0.7 GB; a mirror that sends more is not sending weights
LICENSE_NOTICE = """\
The published YOLO-NAS weights belong to Deci and are not under this program's licence. Deci's terms (LICENSE.YOLONAS.md
at https://github.com/Deci-AI/super-gradients) exclude commercial and production use, redistribution, a managed service
for third parties, and models derived from the weights. Models trained from random weights are free of them.
"""


@dataclass(frozen=True)
class Published:
    """Published weights: the file's name, where to download it, its SHA-256, and under which names others offer it.

    Only files whose SHA-256 is known are downloaded. The other names are accepted where the user put such a file.
    """

    file: str
    urls: tuple[str, ...]
    sha256: str
    other_files: tuple[str, ...] = ()


# Deci's CDN; its older hosts (sghub.deci.ai, sg-hub-nv.s3.amazonaws.com) are gone. The digests are those that LibreYOLO
# 1.6.0 pins. Other files: Ultralytics' pickled modules, and safetensors copies.
PUBLISHED = {
    f"yolo_nas_{size}_coco": Published(
        file=f"yolo_nas_{size}_coco.pth",
        urls=(f"https://d2gjn4b69gu75n.cloudfront.net/models/yolo_nas_{size}_coco.pth",),
        sha256=sha256,
        other_files=(f"yolo_nas_{size}_coco.safetensors", f"yolo_nas_{size}.pt", f"yolo-nas-{size}.safetensors"),
    )
    for size, sha256 in {
        "s": "c1b1d9148ab8ae5d5984699547e850955ff9efccaf568c67b3d605acb4bfe1cb",
        "m": "b194fc7fa196f76161c6356558bedf04fb99a62325a74a36a4bec3ca8ba48250",
        "l": "91a06beaa1ce1a651d6691e3198061da996eafc8890503238dedacbd4c392a32",
    }.items()
}


# Trained here from random weights, so free of Deci's terms; `yolonas info` shows the record.
SHIPPED = ("yolo_nas_n_bccd",)


def resolve(name_or_path: str | Path, *, published: Mapping[str, Published] = PUBLISHED) -> Path:
    """The file of a checkpoint: an existing path itself, or the file of the weights of that name.

    Weights in `SHIPPED` are part of the package. Published weights are looked for in the current folder, in the folder
    $YOLONAS_WEIGHTS_DIR and in the cache, and otherwise downloaded into the cache if their SHA-256 is right. A name may
    carry a suffix (`yolo_nas_s.pt`). Raises WeightsError, with what to do, for a name that is not known and for weights
    that cannot be had.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.name == str(path) and path.stem in SHIPPED:
        return Path(__file__).parent / "shipped" / f"{path.stem}.safetensors"
    name = path.name.removesuffix(".pth").removesuffix(".pt").removesuffix("_coco") + "_coco"
    if path.name != str(path) or name not in published:
        hint = "a folder" if path.is_dir() else "not a file"
        raise WeightsError(f"{path} is {hint}, and no name of weights ({', '.join([*SHIPPED, *published])})")
    weights = published[name]
    places = [Path(), cache_folder()]
    if os.environ.get("YOLONAS_WEIGHTS_DIR"):
        places.insert(1, Path(os.environ["YOLONAS_WEIGHTS_DIR"]).expanduser())
    candidates = [place / file for place in places for file in (weights.file, *weights.other_files)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    show_license_once()
    return found or _download(name, weights)


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/yolonas/weights, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "yolonas" / "weights"


def show_license_once() -> None:
    """Print the terms of the published weights to stderr, unless a file in the cache says that it was done before."""
    marker = cache_folder() / "deci-license-shown"
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:  # no cache can be written: then the notice comes each time
        pass
    sys.stderr.write(LICENSE_NOTICE)


class _WrongFileError(Exception):
    """A mirror sent something else than the published weights."""


def _download(name: str, weights: Published) -> Path:
    target = cache_folder() / weights.file
    failures = []
    for url in weights.urls:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as stream:
                digest = _fetch(url, stream)
                if digest != weights.sha256:
                    raise _WrongFileError(f"the file has SHA-256 {digest} where {weights.sha256} is pinned")
            return target
        except (OSError, http.client.HTTPException, _WrongFileError) as error:  # URLError is an OSError
            failures.append(f"{url}: {error}")
    raise WeightsError(
        f"{name} could not be downloaded ({'; '.join(failures)}): get {weights.file} from {weights.urls[0]} on another "
        f"machine and put it into {target.parent} or the current folder, or give the path of a checkpoint of your own"
    )


def _fetch(url: str, stream: IO[bytes]) -> str:
    """Download into a stream, with a progress bar on a terminal; returns the SHA-256."""
    from tqdm import tqdm  # resolving a local file needs no progress bar

    request = urllib.request.Request(url, headers={"User-Agent": "yolonas"})
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(
            total=total, desc=url.rpartition("/")[2], unit="B", unit_scale=True, file=sys.stderr, disable=None
        ) as bar:
            while block := response.read(1 << 20):
                stream.write(block)
                digest.update(block)
                bar.update(len(block))
                if stream.tell() > MAX_BYTES:
                    raise _WrongFileError(f"the file is larger than {MAX_BYTES} bytes")
    if total is not None and stream.tell() != total:
        raise _WrongFileError(f"the connection ended after {stream.tell()} of {total} bytes")
    return digest.hexdigest()
