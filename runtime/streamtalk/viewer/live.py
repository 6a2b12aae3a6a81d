"""A page that shows the face as it talks: a local web server, one html file, one socket.

On the socket the server speaks and the page listens:

1. a JSON text naming the arrays that follow, in order, with dtype and shape, beside `fps` and look constants
2. those arrays, each one binary message, little-endian
3. for each frame one binary message: HEADER, then vertices [V, 3] float32
"""

from __future__ import annotations

import json
import logging
import math
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from importlib import resources
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamtalk.errors import OutputError
from streamtalk.viewer.camera import FIELD_OF_VIEW_DEG
from streamtalk.viewer.extras import require
from streamtalk.viewer.light import BACK_FACE, BACKDROP_BOTTOM, BACKDROP_TOP, light_table, to_linear
from streamtalk.viewer.mesh import Mesh

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
HEADER = struct.Struct("<4d")
"""frame index, time_s, Unix time at which it was shown, latency_ms (NaN where unknown)."""

LARGEST_REQUEST = 1024
"""Bytes a page may send on the socket. It has nothing to say."""

CLOSE_S = 2.0


class LiveView:
    """Serves a page that draws the newest frame. A slow or absent browser never delays `show`.

    template [V, 3], faces [F, 3] (None: points) and colors [V, 3] uint8 (None: clay) as for `open_renderer`.
    port 0 lets the system choose. Bound to this machine alone. Raises OutputError if the port is taken,
    ModelError for arrays that do not belong together, MissingDependencyError without websockets.
    """

    def __init__(
        self,
        faces: ArrayLike | None,
        colors: ArrayLike | None,
        template: ArrayLike,
        fps: float,
        port: int = 0,
    ) -> None:
        server_module = require("websockets.sync.server", "The live view")
        self._mesh = Mesh.check(template, faces, colors)
        self._scene = _scene(self._mesh, fps)
        self._page = resources.files("streamtalk.viewer").joinpath("page.html").read_text("utf-8")
        self._frame = bytearray(HEADER.size + self._mesh.template.nbytes)
        self._vertices = np.frombuffer(self._frame, np.float32, offset=HEADER.size).reshape(-1, 3)
        self._shown = 0
        self._closing = False
        self._changed = threading.Condition()
        try:
            listener = socket.create_server((HOST, port))
        except (OSError, OverflowError) as error:
            raise OutputError(
                f"The live view cannot listen on {HOST}:{port} ({error}). "
                "Choose another port, or 0 for any free one."
            ) from error
        self.port: int = listener.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}/"
        self._server = server_module.serve(
            self._talk,
            sock=listener,
            process_request=self._answer,
            # Pages of other sites may not look at the face; None is a client that is no browser.
            origins=[f"http://{HOST}:{self.port}", f"http://localhost:{self.port}", None],
            compression=None,
            max_size=LARGEST_REQUEST,
        )
        # A daemon, and so are the threads it starts for its clients: none of them keeps a process alive.
        self._thread = threading.Thread(target=self._server.serve_forever, name="live view", daemon=True)
        self._thread.start()

    def show(
        self, frame_index: int, time_s: float, vertices: ArrayLike, latency_ms: float | None = None
    ) -> None:
        """Make `vertices` [V, 3] the newest frame: copies them, returns. An older unsent one is dropped."""
        frame = self._mesh.frame(vertices)
        with self._changed:
            latency = math.nan if latency_ms is None else latency_ms
            HEADER.pack_into(self._frame, 0, frame_index, time_s, time.time(), latency)
            self._vertices[:] = frame
            self._shown += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop serving. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._server.shutdown()
        self._thread.join(CLOSE_S)

    def __enter__(self) -> LiveView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, connection: Any, request: Any) -> Any:
        """Serve the page over HTTP. None lets the socket's handshake go on."""
        path = request.path.partition("?")[0]
        if path == "/socket":
            return None
        if path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, "There is one page here: /\n")
        response = connection.respond(HTTPStatus.OK, self._page)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "text/html; charset=utf-8"
        response.headers["Cache-Control"] = "no-store"
        return response

    def _talk(self, connection: Any) -> None:
        """One client's thread. Its socket blocks it when the browser is slow; frames move on meanwhile."""
        gone = require("websockets.exceptions", "The live view").ConnectionClosed
        with suppress(gone, OSError):
            for message in self._scene:
                connection.send(message)
            for frame in self._newest():
                connection.send(frame)
            connection.close()

    def _newest(self) -> Iterator[bytes]:
        """The newest frame each time there is a newer one, until the view closes."""
        sent = 0
        while True:
            with self._changed:
                while self._shown == sent and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                sent = self._shown
                frame = bytes(self._frame)
            yield frame


def _scene(mesh: Mesh, fps: float) -> list[str | bytes]:
    """What a page needs once, as messages: a JSON text, then the arrays it names."""
    arrays: dict[str, NDArray[Any]] = {
        "template": mesh.template,
        "faces": mesh.faces.astype("<u4"),
        "albedo": to_linear(mesh.colors),
        # Half floats: the widest that WebGL filters without an extension.
        "light": light_table().astype("<f2"),
    }
    head = {
        "fps": fps,
        "field_of_view_deg": FIELD_OF_VIEW_DEG,
        "back_face": BACK_FACE,
        "backdrop": [BACKDROP_TOP, BACKDROP_BOTTOM],
        "arrays": [{"name": name, "shape": array.shape} for name, array in arrays.items()],
    }
    return [json.dumps(head), *(array.tobytes() for array in arrays.values())]
