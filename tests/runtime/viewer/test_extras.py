"""The viewer without its optional packages."""

import subprocess
import sys

WITHOUT_EXTRAS = """
import sys
for name in ("av", "moderngl", "PIL", "websockets"):
    sys.modules[name] = None
import numpy as np
import streamtalk.viewer
with streamtalk.viewer.open_renderer(np.eye(3), [[0, 1, 2]], size=(32, 32)) as renderer:
    print(renderer.name, renderer.render(np.eye(3)).shape)
"""


def test_the_viewer_imports_and_draws_with_numpy_alone() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=False)
    assert done.stdout == "software (32, 32, 3)\n", done.stderr
    assert "streamtalk[viewer]" in done.stderr
