"""Seeing the face: rendered pictures, video files and a live page.

Optional: `pip install 'streamtalk[viewer]'`. Every module imports without those packages, and says so in a
sentence when one is missing. The software renderer needs numpy alone.
"""

from streamtalk.viewer.live import LiveView
from streamtalk.viewer.render import Renderer, open_renderer
from streamtalk.viewer.video import VideoWriter, contact_sheet

__all__ = ["LiveView", "Renderer", "VideoWriter", "contact_sheet", "open_renderer"]
