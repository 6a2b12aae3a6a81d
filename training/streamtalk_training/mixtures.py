"""Two voices in one, written `first+second:percent`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple


class Mixture(NamedTuple):
    """`first`, with `share` (0 to 1) of `second` in its timbre and manner; a voice alone is both, with none of it."""

    first: str
    second: str
    share: float

    @classmethod
    def parse(cls, text: str, names: Collection[str], alone: Collection[str] = ()) -> Mixture:
        """The voice that `text` names: one or two of `names`, or one of those that only speak `alone`.

        Raises ValueError where it names none.
        """
        if text in names or text in alone:
            return cls(text, text, 0.0)
        found = re.fullmatch(r"(\w+)\+(\w+):(\d+)", text)
        if found is None or not {found[1], found[2]} <= set(names) or int(found[3]) > 100:
            raise ValueError(
                f"no voice {text!r}: expected {', '.join([*alone, *names])}, or two of {', '.join(names)} as a+b:40"
            )
        return cls(found[1], found[2], int(found[3]) / 100)
