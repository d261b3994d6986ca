"""Environment variables `YOLONAS_*` -> typed settings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from labelstudio_backend import redaction

UNTRAINED = "untrained-n"


def default_state_dir() -> Path:
    """`$XDG_DATA_HOME/yolonas`, by default `~/.local/share/yolonas`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "yolonas"


class Settings(BaseSettings):
    """Everything that can be set, each as an environment variable `YOLONAS_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix="YOLONAS_", extra="ignore", validate_default=True, hide_input_in_errors=True
    )

    state_dir: Path = Field(
        default_factory=default_state_dir, description="Folder of versions, jobs and cached images."
    )
    shared_dir: Path | None = Field(
        default=None,
        description="Folder of versions and jobs' files that several servers and workers share; by default the state "
        "folder.",
    )
    queue: SecretStr | None = Field(
        default=None,
        description="redis://HOST:PORT/DB of the queue of trainings that several servers and workers share; by default "
        "one server keeps its own.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = Field(default=9090, ge=0, le=65535, description="Port to listen on.")
    basic_auth_user: str = Field(default="", description="User name that every call but /health must bring, ...")
    basic_auth_pass: SecretStr | None = Field(default=None, description="... and the password; 8 characters or more.")
    secret: SecretStr | None = Field(
        default=None,
        description="Or a secret, as `Authorization: Bearer SECRET` or as the password of any user; 8 characters or "
        "more.",
    )
    max_body_bytes: int = Field(default=512 * 1024**2, ge=1024, description="A larger request is refused.")
    weights: str = Field(
        default="auto",
        description="What a new project starts from: a checkpoint file, the name of weights (`yolo_nas_n_bccd` comes "
        "with yolonas), `untrained-n`, or `auto` (yolo_nas_s_coco where it can be had, else untrained-n).",
    )
    device: str = Field(default="auto", description="Device of the models: auto, cpu, cuda, cuda:1.")
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = Field(
        default="auto",
        description="What runs the models: torch, onnxruntime, openvino, or auto (on a CPU OpenVINO where it is "
        "installed, else ONNX Runtime, else PyTorch; on a GPU PyTorch).",
    )
    precision: Literal["fp32", "int8"] = Field(
        default="fp32", description="Precision of newly trained versions: fp32, or int8 (openvino or onnxruntime)."
    )

    label_studio_url: str = Field(
        default="", description="Where this backend reaches Label Studio, with a sub-path if any."
    )
    label_studio_token: SecretStr | None = Field(
        default=None,
        description="Personal access token or legacy token of Label Studio; without it no uploads and no training.",
    )

    predict_seconds: float = Field(
        default=80.0, gt=0, description="Time for one /predict; Label Studio gives up after 100 s."
    )
    batch: int = Field(
        default=0,
        ge=0,
        description="Images in one forward pass; 0: one on a CPU, where more are no quicker, 8 on a GPU.",
    )
    max_detections: int = Field(default=300, ge=1, description="Most boxes on one image.")
    iou: float = Field(default=0.0, ge=0, le=1, description="IoU threshold of NMS; 0 means the checkpoint's own.")
    loaded_models: int = Field(
        default=3, ge=1, description="Models kept in memory, the least recently used goes first."
    )

    acquisition: Literal["mix", "uncertainty", "disagreement", "diversity", "balance", "random"] = Field(
        default="random",
        description="What the tasks' scores go by, lowest to be labelled first: mix, uncertainty, disagreement, "
        "diversity, balance, or random.",
    )

    media_hosts: str = Field(
        default="",
        description="Further hosts images may be fetched from, by commas (`images.example.org,cdn.example.org:8443`).",
    )
    media_folders: str = Field(
        default="",
        description="Folders on this machine that images are read from without HTTP, by colons (`/mnt/share:/data`).",
    )
    media_cache_bytes: int = Field(default=2 * 1024**3, ge=0, description="Bound of the cache of fetched images.")
    media_max_bytes: int = Field(default=100 * 1024**2, ge=1, description="An image file larger than this is refused.")
    media_max_pixels: int = Field(
        default=100_000_000, ge=1, description="An image that declares more pixels is refused before it is decoded."
    )
    media_seconds: float = Field(default=20.0, gt=0, description="Time-out of one image download.")

    video_rate: float = Field(
        default=5.0,
        gt=0,
        description="Frames of a video looked at for each of its seconds; between them tracks are interpolated.",
    )
    video_max_bytes: int = Field(
        default=512 * 1024**2, ge=1, description="A video file larger than this is refused; it is fetched into memory."
    )
    video_seconds: float = Field(default=60.0, gt=0, description="Time-out of one video download.")

    train_every: int = Field(
        default=20, ge=0, description="Start a training after this many newly corrected tasks; 0: never."
    )
    train_minutes: float = Field(default=10.0, gt=0, description="Time budget of one training.")
    held_out: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Part of the labelled tasks kept out of training, to judge a new version by.",
    )
    parallel_jobs: int = Field(
        default=1, ge=1, description="Trainings at a time over all projects; one project has one."
    )
    keep_versions: int = Field(
        default=10, ge=0, description="Trained versions of a project whose files are kept; 0: all of them."
    )
    image_size: int = Field(
        default=640, ge=32, multiple_of=32, description="Side of the square canvas that trainings use."
    )
    reconcile_seconds: float = Field(
        default=60.0, gt=0, description="How often the state is compared with Label Studio's."
    )

    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines for people (text), or one JSON object a line (json)."
    )

    @field_validator("shared_dir", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return None if value == "" else value  # else it would be the working directory

    @field_validator("state_dir", "shared_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("queue")
    @classmethod
    def _redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        text = value.get_secret_value().strip() if value is not None else ""
        if text and not text.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("give the address of Redis with its scheme, like redis://localhost:6379/0")
        return SecretStr(text) if text else None

    @field_validator("label_studio_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        value = value.strip().rstrip("/")
        if value and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is no address; give it with its scheme, like http://localhost:8080")
        if "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError("it has a user name or password in it; give it without, and set the token")
        return value

    @field_validator("label_studio_token", "basic_auth_pass", "secret")
    @classmethod
    def _stripped(cls, value: SecretStr | None) -> SecretStr | None:
        text = value.get_secret_value().strip() if value is not None else ""
        return SecretStr(text) if text else None

    @field_validator("basic_auth_pass", "secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value) < redaction.SHORTEST:
            raise ValueError(
                f"it has {len(value)} characters, and needs {redaction.SHORTEST} at least; `openssl rand -hex 20` "
                "makes one"
            )
        return value

    @field_validator("label_studio_token", "secret")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and re.fullmatch(r"[ -~]+", value.get_secret_value()) is None:
            raise ValueError("it has other characters than ASCII's letters, digits and signs, which no header can hold")
        return value

    @field_validator("basic_auth_user")
    @classmethod
    def _without_a_colon(cls, value: str) -> str:
        if ":" in value:
            raise ValueError("it has a colon, which ends a user name")
        return value

    @field_validator("basic_auth_user", "basic_auth_pass")
    @classmethod
    def _latin(cls, value: str | SecretStr | None) -> str | SecretStr | None:
        try:
            (value.get_secret_value() if isinstance(value, SecretStr) else value or "").encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError("it has characters beyond Latin-1, which Label Studio cannot send") from None
        return value

    @field_validator("media_hosts")
    @classmethod
    def _only_hosts(cls, value: str) -> str:
        for host in split(value, ","):
            if not re.fullmatch(r"[\w.-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?", host):
                raise ValueError(f"{host!r} is no host; name it without scheme and path, like images.example.org:8443")
        return value

    @field_validator("media_folders")
    @classmethod
    def _only_folders(cls, value: str) -> str:
        for folder in split(value, os.pathsep):
            if not Path(folder).is_absolute():
                raise ValueError(f"{folder!r} is no absolute path")
            if Path(folder) == Path("/"):
                raise ValueError("/ would let a task name every file of this machine; name the folders of the images")
        return value

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if bool(self.basic_auth_user) != bool(self.basic_auth_pass):
            raise ValueError("YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS are set together or not at all")
        if self.shared_dir and not self.queue:
            raise ValueError("YOLONAS_SHARED_DIR is for several servers: set YOLONAS_QUEUE, which they share too")
        secrets = [s.get_secret_value() for s in (self.label_studio_token, self.basic_auth_pass, self.secret) if s]
        login = f"{self.basic_auth_user}:{self.basic_auth_pass.get_secret_value()}" if self.basic_auth_pass else None
        redaction.hide(*secrets, login)
        return self

    @property
    def projects_dir(self) -> Path:
        """Folder of the registry: projects and their versions."""
        return (self.shared_dir or self.state_dir) / "projects"

    @property
    def jobs_dir(self) -> Path:
        """Folder of the jobs' own folders: logs, images, checkpoints."""
        return (self.shared_dir or self.state_dir) / "jobs"

    @property
    def token(self) -> str | None:
        """The token in the clear; never log it."""
        return self.label_studio_token.get_secret_value() if self.label_studio_token is not None else None

    @property
    def can_train(self) -> bool:
        """Whether annotations can be read: the URL and a token of Label Studio are set."""
        return bool(self.label_studio_url and self.label_studio_token)

    @property
    def protected(self) -> bool:
        """Whether callers must show who they are."""
        return self.basic_auth_pass is not None or self.secret is not None

    @property
    def extra_media_hosts(self) -> frozenset[str]:
        """`media_hosts` as lower-case `host` or `host:port` entries."""
        return frozenset(host.lower() for host in split(self.media_hosts, ","))

    @property
    def local_media_folders(self) -> tuple[Path, ...]:
        """`media_folders` as paths."""
        return tuple(map(Path, split(self.media_folders, os.pathsep)))


def split(value: str, separator: str) -> list[str]:
    """The parts of a list that are not empty, without the white space around them."""
    return [part.strip() for part in value.split(separator) if part.strip()]
