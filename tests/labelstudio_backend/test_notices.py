from __future__ import annotations

import pytest

from labelstudio_backend import notices
from labelstudio_backend.notices import Notices


def test_a_noisy_project_pushes_out_its_own_oldest_sentences_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "KEPT", 3)
    said = Notices()
    said.note("quiet", "its webhook is missing")
    for number in range(5):
        said.note("noisy", f"task {number}")
        said.note("noisy", "again")
    assert [(notice.text, notice.count) for notice in said.recent("noisy")] == [
        ("again", 5),
        ("task 4", 1),
        ("task 3", 1),
    ]
    assert [notice.text for notice in said.recent("quiet")] == ["its webhook is missing"]
    assert said.recent("unknown") == []
