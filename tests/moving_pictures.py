"""Small videos, and web servers on this machine that serve pictures, for the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np

FPS = 10


def grey(index: int, size: tuple[int, int] = (96, 64)) -> np.ndarray:
    """Frame `index`: one grey, 5 brighter than the one before; (width, height)."""
    return np.full((size[1], size[0], 3), 20 + index * 5, dtype=np.uint8)


def index_of(image: np.ndarray) -> int:
    return round((float(image.mean()) - 18.3) / 5)  # MPEG-4 of such small pictures is up to 3.4 darker


def write_video(path: Path, frames: int = 40, frame: Callable[[int], np.ndarray] = grey, fps: float = FPS) -> Path:
    """A video of `frame(0)`, `frame(1)` ..., RGB; Motion JPEG in an .avi, VP8 in a .webm, MPEG-4 elsewhere."""
    height, width = frame(0).shape[:2]
    code = cv2.VideoWriter.fourcc(*{".avi": "MJPG", ".webm": "VP80"}.get(path.suffix, "mp4v"))
    writer = cv2.VideoWriter(str(path), code, fps, (width, height))
    assert writer.isOpened()
    for index in range(frames):
        writer.write(cv2.cvtColor(frame(index), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


@contextmanager
def web_server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server whose every GET `answer` serves."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has seen enough
                answer(self)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, kind: str, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def send_motion_jpeg(handler: BaseHTTPRequestHandler, frames: Iterator[np.ndarray]) -> None:
    """What network cameras send: JPEG pictures one after the other, without an end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=picture")
    handler.end_headers()
    for frame in frames:
        data = cv2.imencode(".jpg", frame)[1].tobytes()
        head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        handler.wfile.write(head.encode() + data + b"\r\n")
        handler.wfile.flush()
