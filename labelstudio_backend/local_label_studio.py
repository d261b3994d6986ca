"""A Label Studio of our own on this machine: installed once in a private environment, started on loopback, stopped."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from yolonas.atomic import atomic_file
from yolonas.errors import YolonasError

VERSION = "1.23.2"
INSTALL_PACKAGES = 115  # what pip collects for this version: the denominator of the progress line
START_SECONDS = 600.0
DATABASE = "label_studio.sqlite3"
QUIET = {
    "COLLECT_ANALYTICS": "false",
    "LATEST_VERSION_CHECK": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    "FEATURE_FLAGS_OFFLINE": "true",
    "DJANGO_DB": "sqlite",
}

# Run as `python -c`: asks Linux to end this process when its parent dies in whatever way, and becomes the command.
_DIE_WITH_PARENT = (
    "import ctypes,os,signal,sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


def environment_dir() -> Path:
    """Where the private environment lives: `label-studio-<version>` in yolonas' cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "yolonas" / f"label-studio-{VERSION}"


def install(report: Callable[[str], None] = lambda line: None) -> Path:
    """Install Label Studio in its private environment, once, and return its program.

    Two processes that ask at the same time install it once: the second waits for the first.

    Args:
        report: is given one short line of progress now and then.

    Raises:
        YolonasError: pip failed; the message names the log.
    """
    folder = environment_dir()
    program = folder / "bin" / "label-studio"
    complete = folder / "complete"
    if complete.exists() and program.exists():
        return program
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_name(folder.name + ".lock")):
        if complete.exists() and program.exists():
            return program
        report(f"Installing Label Studio {VERSION} in {folder} (once, 1 GB, about four minutes)")
        log = folder.with_name(folder.name + ".log")
        _run_logged([sys.executable, "-m", "venv", str(folder)], log, lambda line: None)
        collected = 0

        def progress(line: str) -> None:
            nonlocal collected
            if line.startswith("Collecting "):
                collected += 1
                if collected % 10 == 0:
                    report(f"  {collected} of about {INSTALL_PACKAGES} packages")
            elif line.startswith("Installing collected packages"):
                report("  unpacking")

        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
        _run_logged([*pip, f"label-studio=={VERSION}"], log, progress)
        complete.write_text(f"label-studio {VERSION}\n")
    return program


def empty_database() -> Path:
    """Label Studio's database with all tables and no rows, made once: its migrations take a minute of each first start.

    Raises:
        YolonasError: it could not be made; the message names the log.
    """
    folder = environment_dir()
    path = folder.with_name(f"{folder.name}-{DATABASE}")
    with _exclusive(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as data_dir:
                migrate = "from label_studio import server; server._setup_env(); server._apply_database_migrations()"
                environment = {**os.environ, **QUIET, "LABEL_STUDIO_BASE_DATA_DIR": data_dir}
                environment.pop("PYTHONPATH", None)
                log = folder.with_name(folder.name + ".log")
                _run_logged([str(folder / "bin" / "python"), "-c", migrate], log, lambda line: None, environment)
                Path(data_dir, DATABASE).replace(path)
    return path


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_logged(
    command: list[str], log: Path, on_line: Callable[[str], None], environment: Mapping[str, str] | None = None
) -> None:
    with log.open("a") as out:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.write(line)
                on_line(line)
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
    if process.returncode != 0:
        raise YolonasError(f"Label Studio {VERSION} could not be installed ({command[-1]} failed): see {log}.")


def free_port(preferred: int = 0, host: str = "127.0.0.1") -> int:
    """`preferred` where nothing listens on it, else a port that the system picks."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise YolonasError(f"No port is free on {host}.")


@dataclass(frozen=True)
class Account:
    """The one user of a local Label Studio; `token` is its legacy API token."""

    email: str
    password: str
    token: str

    @classmethod
    def of(cls, folder: Path) -> Account:
        """The account kept in `folder`/account.json (readable by its owner only), made there the first time."""
        path = folder / "account.json"
        if path.exists():
            return cls(**json.loads(path.read_text()))
        folder.mkdir(parents=True, exist_ok=True)
        account = cls("labeler@localhost.local", secrets.token_urlsafe(9), secrets.token_hex(20))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(account), file)
        return account


class Process:
    """A child process in a session of its own, which ends with this one and leaves no orphans."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        if sys.platform == "linux":
            command = [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to hand on
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._popen.poll() is None

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Poll `ready` until it is true.

        Raises:
            YolonasError: the process ended, or `seconds` went by.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running:
                tail = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])
                code = self._popen.returncode
                raise YolonasError(f"{self.name} ended while starting (exit code {code}): {tail} (log: {self.log})")
            if time.monotonic() > deadline:
                raise YolonasError(f"{self.name} did not answer within {seconds:.0f} s; its log is {self.log}.")
            time.sleep(0.25)

    def stop(self, seconds: float = 15.0) -> None:
        """Ask the process to end, wait, and kill what is left of its session."""
        if self.running:
            self._popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that talks to loopback, which a proxy of the outside world cannot reach."""
    named = f"{environment.get('no_proxy', '')},{environment.get('NO_PROXY', '')},127.0.0.1,localhost"
    hosts = list(dict.fromkeys(host.strip() for host in named.split(",") if host.strip()))
    hosts = ["*"] if "*" in hosts else hosts  # a star counts only where it stands alone
    return {**environment, "NO_PROXY": ",".join(hosts), "no_proxy": ",".join(hosts)}


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether a GET of `url` is answered with a 2xx status."""
    try:
        return httpx.get(url, timeout=seconds, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def start(data_dir: Path, port: int, account: Account, *, local_files: Path | None = None) -> Process:
    """Start Label Studio on 127.0.0.1:`port` with its data in `data_dir` and wait until it answers.

    Args:
        data_dir: SQLite database, uploads and log.
        port: must be free.
        account: created if it is not there yet.
        local_files: the folder that /data/local-files may serve.

    Raises:
        YolonasError: Label Studio could not be installed or did not start.
    """
    program = install()
    data_dir.mkdir(parents=True, exist_ok=True)
    if not (data_dir / DATABASE).exists():
        with atomic_file(data_dir / DATABASE) as stream:
            stream.write(empty_database().read_bytes())
    url = f"http://127.0.0.1:{port}"
    environment = {
        **past_proxies(os.environ),
        "LABEL_STUDIO_BASE_DATA_DIR": str(data_dir.absolute()),
        "LABEL_STUDIO_USERNAME": account.email,
        "LABEL_STUDIO_PASSWORD": account.password,
        "LABEL_STUDIO_USER_TOKEN": account.token,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_HOST": url,
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true" if local_files else "false",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(local_files.absolute() if local_files else data_dir.absolute()),
        # The backend is on loopback, which the SSRF protection of 1.23.1+ would refuse.
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        **QUIET,
    }
    environment.pop("PYTHONPATH", None)
    command = [str(program), "start", "--no-browser", "--internal-host", "127.0.0.1", "-p", str(port)]
    process = Process("Label Studio", command, environment, data_dir / "label-studio.log")
    try:
        process.wait_until(lambda: answers(f"{url}/health"), START_SECONDS)
    except BaseException:
        process.stop()
        raise
    return process
