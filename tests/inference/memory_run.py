"""A process of its own whose memory is watched while a Detector goes through images: MB at ten moments, as JSON.

python memory_run.py CHECKPOINT RUNTIME IMAGES FOLDER
"""

import json
import sys
from pathlib import Path

from yolonas import Detector


def resident() -> float:
    """Megabytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1e3


if __name__ == "__main__":
    weights, runtime, count, folder = sys.argv[1:]
    images, files, levels = int(count), sorted(Path(folder).glob("*.jpg")), []
    detector = Detector(weights, "cpu", runtime)
    for i, detections in enumerate(detector.stream([files[i % len(files)] for i in range(images)])):
        assert detections.image is not None
        if i % (images // 10) == 0:
            levels.append(round(resident(), 1))
    print(json.dumps(levels))
