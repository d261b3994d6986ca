"""The command `yolonas-labelstudio`: what it says before it serves, and how it refuses."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click import ClickException
from click.testing import CliRunner

from labelstudio_backend.app import create_app
from labelstudio_backend.cli import describe, main, read_settings
from labelstudio_backend.models import Model
from labelstudio_backend.registry import Registry
from labelstudio_backend.settings import UNTRAINED, Settings
from labelstudio_backend.version import Version
from real_label_studio import wait
from yolonas.errors import YolonasError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLONAS_STATE_DIR", str(tmp_path))
    for name in ("YOLONAS_LABEL_STUDIO_ML_2", "YOLONAS_SCREENSHOTS"):  # no settings: each would be warned of
        monkeypatch.delenv(name, raising=False)


def test_a_value_that_does_not_fit_is_one_sentence() -> None:
    result = CliRunner().invoke(main, ["serve", "--port", "70000", "--label-studio-url", "localhost:8080"])
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert line.startswith("Error: YOLONAS_PORT")
    assert "give it with its scheme" in line


def test_a_misspelt_name_is_told_and_one_of_another_part_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLONAS_TRAIN_EVRY", "5")
    monkeypatch.setenv("YOLONAS_XYZ", "5")
    monkeypatch.setenv("YOLONAS_WEIGHTS_DIR", "/weights")
    monkeypatch.setenv("YOLONAS_PORT", "abc")
    result = CliRunner().invoke(main, ["jobs"])
    assert result.exit_code == 1
    first, second, third = result.output.strip().splitlines()
    assert first == "Warning: YOLONAS_TRAIN_EVRY is no setting; is YOLONAS_TRAIN_EVERY meant?"
    assert second == "Warning: YOLONAS_XYZ is no setting, and does nothing"
    assert third.startswith("Error: YOLONAS_PORT: 'abc' does not fit: ")


@pytest.mark.parametrize("command", ["serve", "jobs"])
def test_a_state_folder_that_cannot_be_one_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("YOLONAS_STATE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("YOLONAS_PORT", "0")
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert str(tmp_path / "file") in line
    assert "File exists" in line


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "--port", str(port)])
    assert result.exit_code == 1
    assert result.output.strip() == (
        f"Error: cannot listen on 127.0.0.1:{port} (Address already in use); choose by --host and --port"
    )


@pytest.mark.parametrize("name", ["current", "project.json", "versions/v0/record.json"])
def test_a_project_that_cannot_be_read_does_not_keep_the_server_from_starting(name: str, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, weights=UNTRAINED)
    projects = [Registry(settings.projects_dir).register("http://ls", f"{n}.1795289898", "<View/>") for n in (5, 6)]
    versions = [project.ensure_start(UNTRAINED, []) for project in projects]
    (projects[0].path / name).write_text("")
    lines = describe(settings, "it")
    assert any(line.startswith("Project        5 of ") and "cannot be read (it is damaged)" in line for line in lines)
    assert f"Project        6 of http://ls serves {versions[1].name} of 1 versions." in lines
    loaded: list[str] = []

    def load(version: Version) -> Model:
        loaded.append(version.name)
        raise YolonasError("none here")

    app = create_app(settings, load=load)
    app.state.start()
    try:
        wait(lambda: versions[1].name in loaded)
    finally:
        app.state.stop()


def test_a_device_that_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLONAS_DEVICE", "gpu")
    result = CliRunner().invoke(main, ["serve", "--port", "0"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: device 'gpu' is not known")


def test_weights_that_cannot_be_had_are_one_sentence() -> None:
    result = CliRunner().invoke(main, ["serve", "--weights", "no/such/file.pth"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "no/such/file.pth" in result.output
    assert "Traceback" not in result.output


def test_a_shared_folder_and_a_queue_are_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = read_settings()
    assert (settings.projects_dir, settings.jobs_dir) == (tmp_path / "projects", tmp_path / "jobs")
    monkeypatch.setenv("YOLONAS_SHARED_DIR", "")
    monkeypatch.setenv("YOLONAS_QUEUE", " ")
    assert (read_settings().shared_dir, read_settings().queue) == (None, None)
    monkeypatch.setenv("YOLONAS_SHARED_DIR", "/mnt/yolonas")
    with pytest.raises(ClickException, match="set YOLONAS_QUEUE"):
        read_settings()
    monkeypatch.setenv("YOLONAS_QUEUE", "redis://:opensesame@host/0")
    settings = read_settings()
    assert (settings.projects_dir, settings.jobs_dir) == (Path("/mnt/yolonas/projects"), Path("/mnt/yolonas/jobs"))
    assert "opensesame" not in repr(settings)
    assert "/mnt/yolonas" in "\n".join(describe(settings, "x"))
    monkeypatch.setenv("YOLONAS_QUEUE", "localhost:6379")
    result = CliRunner().invoke(main, ["jobs"])
    assert result.exit_code == 1
    assert "give the address of Redis with its scheme" in result.output


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


def test_it_says_which_classes_become_which_labels(tmp_path: Path) -> None:
    config = (
        '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
        '<Label value="Car" predicted_values="car,truck"/><Label value="Washer"/></RectangleLabels></View>'
    )
    registry = Registry(tmp_path / "projects")
    registry.register("http://ls", "5.1795289898", config).ensure_start("yolo_nas_s_coco", ["Car", "Washer"])
    own = registry.register("http://ls", "6.1795289898", config)
    own.ensure_start("yolo_nas_s_coco", ["Car", "Washer"])
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    own.publish(tmp_path / "best.safetensors", {"labels": ["Car"]})
    gone = registry.register("http://ls", "7.1795289898", config)
    (tmp_path / "start.pth").write_bytes(b"weights")
    gone.ensure_start(str(tmp_path / "start.pth"), ["Car"])
    (tmp_path / "start.pth").unlink()
    registry.register("http://ls", "8.1795289898", "<View>").ensure_start("yolo_nas_s_coco", [])
    registry.register("http://ls", "9.1795289898", config)
    lines = describe(read_settings(), "yolo_nas_s_coco")
    numbers = [number for number, line in enumerate(lines) if line.startswith("Project")]
    told = [[line.strip() for line in lines[a + 1 : b]] for a, b in zip(numbers, [*numbers[1:], None], strict=True)]
    foreign, trained, lost, broken, unset = told
    assert len(foreign) == len(trained) == 1
    assert foreign[0].startswith("<label> Car <- car + truck; not predicted: Washer (no class of that name;")
    assert trained == ["<label> Car <- Car; not predicted: Washer"]
    assert "start.pth does not exist" in lost[0]
    assert broken[0].startswith("no predictions: ")
    assert unset == []


def test_the_classes_of_a_start_file_are_read_from_it(tmp_path: Path) -> None:
    from yolonas import checkpoint
    from yolonas.model import YoloNAS

    model = YoloNAS("n", num_classes=2, class_names=["bolt", "nut"]).eval()
    checkpoint.save(checkpoint.Checkpoint(model=model), tmp_path / "start.safetensors")
    config = (
        '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
        '<Label value="Bolt"/><Label value="Car"/></RectangleLabels></View>'
    )
    project = Registry(tmp_path / "projects").register("http://ls", "5.1795289898", config)
    project.ensure_start(str(tmp_path / "start.safetensors"), ["Bolt", "Car"])
    assert "<label> Bolt <- bolt; not predicted: Car" in "\n".join(describe(read_settings(), "it"))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("pydantic_settings", ["--help"]), ("click", ["serve"]), ("fastapi", ["serve"]), ("httpx", ["--help"])],
)
def test_without_the_extra_it_is_one_sentence(module: str, arguments: list[str]) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from labelstudio_backend.cli import main; main({arguments!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    package = module.replace("_", "-")
    expected = f"Error: yolonas-labelstudio needs {package}, which is not installed: pip install 'yolonas[labelstudio]'"
    assert result.stderr.strip() == expected


def test_a_label_studio_that_does_not_answer_is_said_and_not_fatal() -> None:
    token = "0123456789abcdef0123456789abcdef01234567"
    settings = Settings(label_studio_url="http://127.0.0.1:9", label_studio_token=token)
    text = "\n".join(describe(settings, "an untrained model"))
    assert "Not yet: no answer from Label Studio at http://127.0.0.1:9" in text
    assert token not in text
    assert token not in repr(settings)


def test_every_setting_is_documented_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOLONAS_STATE_DIR")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    readme = Path(__file__).resolve().parents[2] / "labelstudio_backend" / "README.md"
    rows = re.findall(r"^\| `YOLONAS_(\w+)` \| (.+?) \| (.+?) \|$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: (default, meaning) for name, default, meaning in rows}
    fields = Settings.model_fields
    assert told == {name.upper(): (as_told(value), fields[name].description) for name, value in Settings()}


def as_told(value: object) -> str:
    """A default as the table writes it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, Path):
        return str(value).replace(str(Path.home()), "~")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (10**6, "million")):
            if value and value % unit == 0:
                return f"{value // unit} {name}"
    return str(value)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_URL", " http://ls:8080/sub/ ")
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_TOKEN", "")
    monkeypatch.setenv("YOLONAS_MEDIA_HOSTS", "a.example.org, B:8443,")
    settings = read_settings()
    assert settings.label_studio_url == "http://ls:8080/sub"
    assert not settings.can_train
    assert settings.extra_media_hosts == {"a.example.org", "b:8443"}
