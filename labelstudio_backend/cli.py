"""The command `yolonas-labelstudio`."""

from __future__ import annotations

import difflib
import importlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from yolonas.errors import YolonasError


def _missing(error: ModuleNotFoundError) -> str | None:
    """What to say where the extra is not installed; None for a module of our own."""
    package = (error.name or "").partition(".")[0].replace("_", "-")
    if package in ("", "yolonas", "labelstudio-backend"):
        return None
    return f"yolonas-labelstudio needs {package}, which is not installed: pip install 'yolonas[labelstudio]'"


try:
    import click
    from pydantic import ValidationError

    from labelstudio_backend.settings import Settings
except ModuleNotFoundError as error:
    if (sentence := _missing(error)) is None:
        raise
    raise SystemExit(f"Error: {sentence}") from error

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from labelstudio_backend.registry import ProjectRegistry

_COMMANDS = {  # imported when called
    "connect": "labelstudio_backend.connect",
    "doctor": "labelstudio_backend.doctor",
    "jobs": "labelstudio_backend.jobs_command",
    "pull": "labelstudio_backend.pull",
    "push": "labelstudio_backend.push",
    "rank": "labelstudio_backend.rank",
    "up": "labelstudio_backend.up",
    "versions": "labelstudio_backend.versions_command",
    "worker": "labelstudio_backend.worker",
}


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What a person can mend is said in one sentence, with exit code 1."""
    try:
        yield
    except YolonasError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:
        raise  # the reader has seen enough: click ends without a word
    except OSError as error:
        system = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else ""
        raise click.ClickException(system or str(error) or repr(error)) from error
    except ModuleNotFoundError as error:
        if (sentence := _missing(error)) is None:
            raise
        raise click.ClickException(sentence) from error


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            with _one_sentence():
                command = getattr(importlib.import_module(_COMMANDS[cmd_name]), cmd_name)
            return command if isinstance(command, click.Command) else None
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole sentences, where click cuts them off."""
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(200)) for name, command in commands if command])

    def invoke(self, ctx: click.Context) -> Any:
        with _one_sentence():
            return super().invoke(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="yolonas")
def main() -> None:
    """YOLO-NAS as a Label Studio machine learning backend."""


@main.command()
@click.option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on.  [default: 9090]")
@click.option("--label-studio-url", help="Where Label Studio is, for example http://localhost:8080.")
@click.option("--label-studio-token", help="Its token; better in the environment, as YOLONAS_LABEL_STUDIO_TOKEN.")
@click.option("--weights", help="A checkpoint file, published weights by name, untrained-n, or auto.  [default: auto]")
@click.option("--device", help="auto, cpu, cuda, cuda:1.  [default: auto]")
@click.option("--state-dir", help="Folder of versions, jobs and cached images.")
def serve(**options: Any) -> None:
    """Run the backend until Ctrl-C.

    Every option, and more, can be set in the environment as YOLONAS_<NAME>; labelstudio_backend/README.md lists them.
    """
    settings = settings_from(**options)
    _usable(settings)
    import uvicorn

    from labelstudio_backend import logs
    from labelstudio_backend.app import create_app
    from labelstudio_backend.version import choose_weights

    logs.configure(settings.log_format)
    weights, sentence = choose_weights(settings.weights)
    os.environ["YOLONAS_WEIGHTS"] = weights
    settings = settings.model_copy(update={"weights": weights})
    for line in describe(settings, sentence):
        click.echo(line)
    app = create_app(settings)
    # a /predict may run for 80 s, and is asked again if it is cut off
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        log_config=None,  # its lines go where ours go
        access_log=False,
        timeout_graceful_shutdown=5,
    )


def _usable(settings: Settings) -> None:
    """Raise ClickException where the address, the state folder or the device that a server needs cannot be had."""
    try:
        address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(*address[:3]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            probe.bind(address[4])
    except OSError as error:
        raise click.ClickException(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose by --host and --port"
        ) from error
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.state_dir).close()
    except OSError as error:
        raise click.ClickException(
            f"cannot write into {settings.state_dir} ({error.strerror}); choose another folder by --state-dir"
        ) from error
    if settings.device not in ("auto", "cpu"):
        from yolonas.inference.device import resolve_device

        resolve_device(settings.device)


def settings_from(**options: Any) -> Settings:
    """Settings from the environment, into which the options that were given are written first."""
    for name, value in options.items():
        if value is not None:
            os.environ[f"YOLONAS_{name.upper()}"] = str(value)  # training processes read them there
    return read_settings()


def read_settings() -> Settings:
    """Settings from the environment; a value that does not fit is one sentence, a name that is none a warning."""
    for sentence in _misspelt():
        click.echo(f"Warning: {sentence}", err=True)
    try:
        return Settings()
    except ValidationError as error:
        raise click.ClickException("; ".join(map(_problem, error.errors()))) from None


def _problem(error: ErrorDetails) -> str:
    name = "".join(f"YOLONAS_{name}: ".upper() for name in error["loc"])
    if error["type"] == "value_error":  # a sentence of ours
        return name + error["msg"].removeprefix("Value error, ")
    return f"{name}{error['input']!r} does not fit: {error['msg']}"


def _misspelt() -> Iterator[str]:
    """A sentence for each variable YOLONAS_* that nothing reads."""
    known = [*(name.upper() for name in Settings.model_fields), "CUDA", "WEIGHTS_DIR"]  # the build's, and yolonas's
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix("YOLONAS_")
        if variable.upper() != name and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            yield f"{variable} is no setting" + (f"; is YOLONAS_{near[0]} meant?" if near else ", and does nothing")


def describe(settings: Settings, start: str) -> list[str]:
    """What the server will do, in sentences: address, start weights, whether it can train, the projects it knows."""
    from labelstudio_backend.protection import access
    from labelstudio_backend.registry import Registry

    host = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{host}:{settings.port}"
    lines = [
        f"Address        {url}; open it in a browser to see how it goes. For a project of Label Studio:",
        f"               yolonas-labelstudio connect --project ID --url {url}",
        "               Label Studio 1.23.1 and later takes a loopback or private address only if it was started with "
        "USE_DEFAULT_BANNED_SUBNETS=false.",
        f"Access         {access(settings)}",
        f"Start          New projects start from {start}.",
        f"Training       {_training(settings)}",
        f"State          Versions, jobs and cached images are in {settings.state_dir}.",
        *_shared(settings),
    ]
    for folder in settings.local_media_folders:
        how = "are read from here, without HTTP" if folder.is_dir() else "cannot be read: there is no such folder"
        lines.append(f"Images         Those of {folder} {how}.")
    for project in Registry(settings.projects_dir).projects():
        host = "?"
        try:
            host = project.metadata().get("hostname") or host
            served = f"serves {project.current().name} of {len(project.versions())} versions"
        except YolonasError as error:
            served = str(error)
        lines.append(f"Project        {project.project_id} of {host} {served}.")
        lines += [f"               {line}" for line in _mapping(project)]
    return lines


def _shared(settings: Settings) -> list[str]:
    if settings.queue is None:
        return []
    return [
        f"               Versions and jobs' files are in {settings.projects_dir.parent}, for all servers and workers.",
        "Queue          Trainings wait in Redis for a worker: yolonas-labelstudio worker.",
    ]


def _mapping(project: ProjectRegistry) -> list[str]:
    """Which classes become which labels of a project, a line for each control, or why that is not known."""
    from labelstudio_backend.mapping import describe, mapped, served_controls
    from labelstudio_backend.version import RegistryError, class_names

    try:
        version = project.current()
    except RegistryError:
        return []
    try:
        controls = served_controls(project.label_config)
        return describe(mapped(controls, version, class_names), version)
    except YolonasError as error:
        return [f"no predictions: {error}"]


def _training(settings: Settings) -> str:
    from labelstudio_backend.client import LabelStudio

    if not settings.can_train:
        missing = " and ".join(
            name
            for name, value in (
                ("YOLONAS_LABEL_STUDIO_URL", settings.label_studio_url),
                ("YOLONAS_LABEL_STUDIO_TOKEN", settings.token),
            )
            if not value
        )
        return (
            f"No: set {missing}. Until then it predicts under a fixed version, cannot train, and cannot fetch files "
            "that Label Studio serves only to its users."
        )
    try:
        with LabelStudio(settings.label_studio_url, settings.token, read_seconds=5.0, retries=0) as client:
            count = len(client.projects())
    except YolonasError as error:
        return f"Not yet: {error}. It is tried again every {settings.reconcile_seconds:g} s."
    every = f", and after every {settings.train_every} corrected tasks" if settings.train_every else ""
    return (
        f"Yes, when asked for in Label Studio{every}, {settings.train_minutes:g} minutes each; the token sees {count} "
        f"project{'' if count == 1 else 's'} at {settings.label_studio_url}."
    )


if __name__ == "__main__":
    main()
