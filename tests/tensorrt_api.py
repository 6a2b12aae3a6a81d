"""TensorRT's Python interface, version by version, for tests without the library.

`Api` wraps a stand-in: a member that this version lacks is missing, and a call takes the bindings' arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RECORDED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "tensorrt_api.json").read_text()
)
"""By library and version, see `tests/data/tensorrt_api.py`."""
CLASSIC = [key for key in RECORDED if key.startswith("tensorrt ")]
RTX = [key for key in RECORDED if key.startswith("tensorrt_rtx ")]
ALIASES = {"IParserError": "ParserError"}


class Api:
    """One recorded version; `key` is one of `RECORDED`."""

    def __init__(self, key: str) -> None:
        self.name, self.version = key.split()
        self.recorded = RECORDED[key]

    def speak(self, kind: str, stand_in: Any) -> Any:
        """Wrap a stand-in as an object of class `kind`.

        Raises AttributeError for a member that this version lacks, and TypeError for a call that no overload takes.
        """
        return _Spoken(self, ALIASES.get(kind, kind), stand_in)

    def enumeration(self, kind: str) -> Any:
        """Return an enumeration's names as attributes, numbered in alphabetical order."""
        return SimpleNamespace(**{name: number for number, name in enumerate(self.recorded[kind].split())})


class _Spoken:
    def __init__(self, api: Api, kind: str, stand_in: Any) -> None:
        self._api, self._kind, self._stand_in = api, kind, stand_in

    def __getattr__(self, name: str) -> Any:
        members = self._api.recorded[self._kind]
        if name not in members:
            raise AttributeError(f"{self._kind} of {self._api.name} {self._api.version} has no {name}")
        overloads = members[name]
        found = getattr(self._stand_in, name)
        return found if overloads is None else self._call(name, overloads, found)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
            return
        if self._api.recorded[self._kind].get(name, "missing") is not None:
            raise AttributeError(
                f"{self._kind} of {self._api.name} {self._api.version} has no property {name}"
            )
        setattr(self._stand_in, name, value)

    def __str__(self) -> str:
        return str(self._stand_in)

    def _call(self, name: str, overloads: str, called: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            for overload in overloads.split(" | "):
                takes, _, gives = overload.rpartition(" -> ")
                parameters = [part for part in takes[1:-1].split(", ") if part]
                if _binds(parameters, arguments, named):
                    result = called(*map(plain, arguments), **{k: plain(v) for k, v in named.items()})
                    is_object = isinstance(self._api.recorded.get(ALIASES.get(gives, gives)), dict)
                    return self._api.speak(gives, result) if is_object and result is not None else result
            raise TypeError(f"{self._kind}.{name} takes {overloads}, not {arguments} {named}")

        return call


def plain(spoken: Any) -> Any:
    """Return the stand-in behind an object of `Api.speak`; anything else unchanged."""
    return spoken._stand_in if isinstance(spoken, _Spoken) else spoken


def _binds(parameters: list[str], arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    names = [parameter.removesuffix("=...") for parameter in parameters]
    if len(arguments) > len(names) or set(named) - set(names[len(arguments) :]):
        return False
    left = parameters[len(arguments) :]
    return all(p.endswith("=...") or p in named for p in left)
