"""The command `yolonas-labelstudio`: what it says before it serves, and how it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from labelstudio_backend.cli import describe, main, read_settings
from labelstudio_backend.registry import Registry
from labelstudio_backend.settings import Settings


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("YOLONAS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("YOLONAS_STATE_DIR", str(tmp_path))
    for name in ("PORT", "WEIGHTS", "LABEL_STUDIO_URL"):  # so that what a command sets is undone
        monkeypatch.setenv(f"YOLONAS_{name}", "")
        monkeypatch.delenv(f"YOLONAS_{name}")


def test_a_value_that_does_not_fit_is_one_sentence() -> None:
    result = CliRunner().invoke(main, ["serve", "--port", "70000", "--label-studio-url", "localhost:8080"])
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert line.startswith("Error: YOLONAS_PORT")
    assert "give it with its scheme" in line


def test_weights_that_cannot_be_had_are_one_sentence() -> None:
    result = CliRunner().invoke(main, ["serve", "--weights", "no/such/file.pth"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "no/such/file.pth" in result.output
    assert "Traceback" not in result.output


def test_help_lists_both_ways_to_run() -> None:
    result = CliRunner().invoke(main, ["serve", "--help"])
    assert result.exit_code == 0
    assert "YOLONAS_LABEL_STUDIO_TOKEN" in result.output


def test_it_says_what_it_will_do(tmp_path: Path) -> None:
    Registry(tmp_path / "projects").register("http://ls", "5.1795289898").ensure_start("untrained-n", ["Car"])
    text = "\n".join(describe(read_settings(), "an untrained model"))
    assert "http://127.0.0.1:9090" in text
    assert "start from an untrained model" in text
    assert "No: set YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN" in text
    assert "cannot train" in text
    assert "Project        5 of http://ls serves yolonas-5-" in text


def test_a_label_studio_that_does_not_answer_is_said_and_not_fatal() -> None:
    token = "0123456789abcdef0123456789abcdef01234567"
    settings = Settings(label_studio_url="http://127.0.0.1:9", label_studio_token=token)
    text = "\n".join(describe(settings, "an untrained model"))
    assert "Not yet: no answer from Label Studio at http://127.0.0.1:9" in text
    assert token not in text
    assert token not in repr(settings)


def test_every_setting_is_documented() -> None:
    readme = Path(__file__).resolve().parents[2] / "labelstudio_backend" / "README.md"
    for name, setting in Settings.model_fields.items():
        assert setting.description
        assert f"`YOLONAS_{name.upper()}`" in readme.read_text(encoding="utf-8")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_URL", " http://ls:8080/sub/ ")
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_TOKEN", "")
    monkeypatch.setenv("YOLONAS_MEDIA_HOSTS", "a.example.org, B:8443,")
    settings = read_settings()
    assert settings.label_studio_url == "http://ls:8080/sub"
    assert not settings.can_train
    assert settings.extra_media_hosts == {"a.example.org", "b:8443"}
