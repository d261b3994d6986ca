"""What the dashboard learns of a real Label Studio."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from dashboard_state import region
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.overview import Overview, Seen
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.settings import UNTRAINED
from real_label_studio import Studio, wait

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(600)]

CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="RBC"/></RectangleLabels></View>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def known(studio: Studio, folder: Path) -> tuple[int, ProjectRegistry]:
    """A project of Label Studio's that the backend knows, with a version."""
    state = studio.client.create_project("Overview", CONFIG, sampling="Uncertainty sampling")
    created = int(datetime.fromisoformat(state["created_at"]).timestamp())
    project = Registry(folder).register(studio.url, f"{state['id']}.{created}", CONFIG)
    project.ensure_start(UNTRAINED, ["RBC"])
    return int(state["id"]), project


def look(overview: Overview, key: str) -> Seen:
    wait(lambda: overview.get(key).when is not None or overview.get(key).error is not None, 60, "Label Studio's answer")
    return overview.get(key)


def test_the_next_tasks_come_in_the_order_of_the_scores_of_the_version_that_serves(
    label_studio: Studio, tmp_path: Path
) -> None:
    client = label_studio.client
    number, project = known(label_studio, tmp_path)
    version = project.current().name
    tasks = client.import_tasks(number, [{"image": PIXEL}] * 7)
    boxes = [region("a", "RBC", (10, 10, 20, 20), 0.5)]
    made = [
        client.create_prediction(task, boxes, score, version)
        for task, score in zip(tasks[:5], (0.9, 0.2, 0.5, 0.1, 0.7), strict=True)
    ]
    client.create_prediction(tasks[0], boxes, 0.01, "another")  # of another version, and says nothing
    client.patch_project(number, model_version=version)
    client.create_annotation(tasks[3], made[3]["result"], lead_time=12.5, parent_prediction=made[3]["id"])
    client.create_annotation(tasks[5], [], was_cancelled=True)
    with LabelStudio(label_studio.url, label_studio.token) as own:
        overview = Overview(Registry(tmp_path), own)
        seen = look(overview, project.key)
        assert seen.error is None
        assert (seen.title, seen.tasks, seen.labelled, seen.sampling) == ("Overview", 7, 1, "Uncertainty sampling")
        assert seen.next_tasks is not None
        scored = [task["id"] for task in seen.next_tasks if task["predictions"]]
        assert scored == [tasks[1], tasks[2], tasks[4], tasks[0]]
        assert {task["id"] for task in seen.next_tasks} == {*tasks} - {tasks[3], tasks[5]}  # labelled, and skipped
        assert seen.rounds is not None
        (work,) = seen.rounds
        assert (work.name, work.tasks, work.edits.kept, work.edits.total, work.seconds) == (version, 1, 1, 0, 12.5)
        assert len(seen.problems) == 1
        assert seen.problems[0].startswith("No backend of this project in Label Studio is this one: run")

        client.create_annotation(tasks[1], [], lead_time=3.0, parent_prediction=made[1]["id"])
        overview.forget()
        (work,) = look(overview, project.key).rounds or ()
        assert (work.tasks, work.edits.removed) == (2, 1)
        overview.close()


def test_what_is_wrong_with_the_token_is_said(label_studio: Studio, tmp_path: Path) -> None:
    _, project = known(label_studio, tmp_path)
    overview = Overview(Registry(tmp_path), LabelStudio(label_studio.url, "0" * 40, retries=0))
    assert overview.get(project.key) == Seen(), "nobody waits for Label Studio"
    seen = look(overview, project.key)
    assert seen.when is None
    assert seen.error is not None
    assert "YOLONAS_LABEL_STUDIO_TOKEN" in seen.error
    overview.close()
