"""The live page's server, with clients of our own."""

import json
import re
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streamtalk.errors import MissingDependencyError, ModelError, OutputError
from streamtalk.viewer.light import TABLE_SIZE, to_linear
from streamtalk.viewer.live import HEADER, LiveView
from tests.runtime.viewer.shapes import sphere

client = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")

WAIT_S = 5.0
SHOW_LIMIT_S = 0.05
"""A show is a copy: microseconds. The limit forgives a busy test machine and still catches any waiting."""

VERTICES, FACES = sphere()
COLORS = np.full(VERTICES.shape, 128, np.uint8)


@pytest.fixture
def view() -> Iterator[LiveView]:
    with LiveView(FACES, COLORS, VERTICES, fps=30) as live:
        yield live


def connect(view: LiveView, **options: Any) -> Any:
    return client.connect(f"ws://127.0.0.1:{view.port}/socket", compression=None, **options)


def scene(socket: Any) -> dict[str, Any]:
    """Read the messages that come once."""
    head: dict[str, Any] = json.loads(socket.recv(WAIT_S))
    for entry in head["arrays"]:
        entry["bytes"] = socket.recv(WAIT_S)
    return head


def frame(message: bytes) -> tuple[tuple[float, ...], NDArray[np.float32]]:
    return HEADER.unpack_from(message), np.frombuffer(message, np.float32, offset=HEADER.size).reshape(-1, 3)


def test_a_page_gets_the_scene_once_and_then_frames(view: LiveView) -> None:
    with connect(view) as page:
        head = scene(page)
        got = {entry["name"]: entry for entry in head["arrays"]}
        np.testing.assert_array_equal(np.frombuffer(got["template"]["bytes"], "<f4"), VERTICES.reshape(-1))
        np.testing.assert_array_equal(np.frombuffer(got["faces"]["bytes"], "<u4"), FACES.reshape(-1))
        np.testing.assert_array_equal(
            np.frombuffer(got["albedo"]["bytes"], "<f4"), to_linear(COLORS).reshape(-1)
        )
        assert got["light"]["shape"] == [TABLE_SIZE, TABLE_SIZE, 3]
        assert len(got["light"]["bytes"]) == TABLE_SIZE**2 * 3 * 2
        assert head["fps"] == 30
        for index in range(3):
            view.show(index, index / 30, VERTICES * (1 + index), latency_ms=4.5 if index else None)
            (number, time_s, shown_s, latency_ms), vertices = frame(page.recv(WAIT_S))
            assert (number, time_s) == (index, index / 30)
            assert latency_ms == 4.5 if index else np.isnan(latency_ms)
            assert shown_s == pytest.approx(time.time(), abs=WAIT_S)
            np.testing.assert_array_equal(vertices, VERTICES * (1 + index))


def test_a_page_that_comes_late_sees_the_newest_frame(view: LiveView) -> None:
    for index in range(5):
        view.show(index, index / 30, VERTICES)
    with connect(view) as page:
        scene(page)
        assert frame(page.recv(WAIT_S))[0][0] == 4


def test_a_page_that_does_not_read_delays_nothing_and_gets_the_newest_at_last() -> None:
    big = np.tile(VERTICES, (20, 1))  # .8 MB a frame: a socket's buffers hold a few
    with LiveView(None, None, big, fps=30) as view:
        stalled = socket.create_connection(("127.0.0.1", view.port))
        stalled.sendall(
            f"GET /socket HTTP/1.1\r\nHost: 127.0.0.1:{view.port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        threads = threading.active_count()
        took = []
        for index in range(100):
            begun = time.perf_counter()
            view.show(index, index / 30, big)
            took.append(time.perf_counter() - begun)
            time.sleep(0.002)
        assert np.median(took) < SHOW_LIMIT_S
        assert threading.active_count() <= threads + 3  # the stalled page's own, whenever they started

        stream = stalled.makefile("rb")
        while stream.readline() != b"\r\n":
            pass
        seen: list[int] = []
        while not seen or seen[-1] != 99:
            first, length = stream.read(2)
            if length == 126:
                (length,) = struct.unpack(">H", stream.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", stream.read(8))
            payload = stream.read(length)
            if first == 0x82 and length == HEADER.size + big.nbytes:
                seen.append(int(HEADER.unpack_from(payload)[0]))
        assert seen == sorted(set(seen))
        assert len(seen) < 50
        stream.close()
        stalled.close()


def test_two_pages_see_the_same(view: LiveView) -> None:
    with connect(view) as one, connect(view) as two:
        scene(one), scene(two)
        view.show(7, 0.2, VERTICES)
        assert one.recv(WAIT_S) == two.recv(WAIT_S)


def test_the_page_is_one_file_that_asks_the_network_for_nothing(view: LiveView) -> None:
    with urllib.request.urlopen(view.url, timeout=WAIT_S) as answer:
        html = answer.read().decode()
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "webgl2" in html
    assert not re.search(r"https?://|(src|href)=\"(?!data:)|import ", html)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(view.url + "secret", timeout=WAIT_S)


def test_other_sites_may_not_look(view: LiveView) -> None:
    with connect(view, origin=view.url.rstrip("/")) as page:
        scene(page)
    with pytest.raises(exceptions.InvalidStatus, match="403"):
        connect(view, origin="http://example.com")


def test_closing_lets_go_of_pages_threads_and_port() -> None:
    view = LiveView(FACES, None, VERTICES, fps=25)
    with connect(view) as page:
        scene(page)
        view.close()
        view.close()
        with pytest.raises(exceptions.ConnectionClosed):
            page.recv(WAIT_S)
    assert not any(thread.name == "live view" for thread in threading.enumerate())
    with LiveView(FACES, None, VERTICES, fps=25, port=view.port) as again:
        assert again.port == view.port


def test_what_cannot_be_is_a_sentence(view: LiveView, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=rf"{view.port}.*another port"):
        LiveView(FACES, None, VERTICES, fps=30, port=view.port)
    with pytest.raises(ModelError, match=r"\(5, 3\)"):
        view.show(0, 0.0, np.zeros((5, 3), np.float32))
    monkeypatch.setitem(sys.modules, "websockets.sync.server", None)
    with pytest.raises(MissingDependencyError, match=r"websockets.*streamtalk\[viewer\]"):
        LiveView(FACES, None, VERTICES, fps=30)
