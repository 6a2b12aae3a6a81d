"""Rendering through OpenGL, off screen."""

from __future__ import annotations

import sys
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamtalk.errors import BackendError
from streamtalk.viewer.camera import Camera
from streamtalk.viewer.extras import require
from streamtalk.viewer.light import BACK_FACE, POINT_SHARE, backdrop, light_table, to_linear
from streamtalk.viewer.mesh import Mesh, SmoothNormals

SAMPLES = 4
"""Multisampling: smooth silhouettes."""

FACE_VERTEX = """
#version 330
uniform mat4 matrix;
uniform mat3 rotation;
uniform float point_size;
in vec3 position;
in vec3 normal;
in vec3 albedo;
out vec3 camera_normal;
out vec3 surface;
void main() {
    gl_Position = matrix * vec4(position, 1.0);
    gl_PointSize = point_size;
    camera_normal = rotation * normal;
    surface = albedo;
}
"""

FACE_FRAGMENT = """
#version 330
uniform sampler2D light;
uniform float back_face;
uniform float texels;
in vec3 camera_normal;
in vec3 surface;
out vec4 color;
void main() {
    bool front = gl_FrontFacing;
    vec3 n = normalize(front ? camera_normal : -camera_normal);
    // A smooth normal may lean past the silhouette: the nearest that faces the viewer lights it.
    vec2 on_disc = n.z < 0.0 ? normalize(n.xy) : n.xy;
    vec2 uv = (vec2(on_disc.x, -on_disc.y) * 0.5 * (texels - 1.0) + 0.5 * texels) / texels;
    vec3 c = clamp(surface * (front ? 1.0 : back_face) * texture(light, uv).rgb, 0.0, 1.0);
    vec3 srgb = mix(1.055 * pow(c, vec3(1.0 / 2.4)) - 0.055, c * 12.92, lessThanEqual(c, vec3(0.0031308)));
    color = vec4(srgb, 1.0);
}
"""

WALL_VERTEX = """
#version 330
in vec2 corner;
void main() { gl_Position = vec4(corner, 0.0, 1.0); }
"""

WALL_FRAGMENT = """
#version 330
uniform sampler2D wall;
out vec4 color;
void main() { color = texelFetch(wall, ivec2(gl_FragCoord.xy), 0); }
"""


class GLRenderer:
    """Draws a mesh with moderngl: EGL without a display on Linux, the system's default elsewhere.

    Raises MissingDependencyError without moderngl and BackendError without a driver.
    """

    def __init__(self, mesh: Mesh, camera: Camera) -> None:
        moderngl = require("moderngl", "Drawing with OpenGL")
        try:
            options = {"backend": "egl"} if sys.platform.startswith("linux") else {}
            context = moderngl.create_context(standalone=True, require=330, **options)
        except Exception as error:  # glcontext raises bare Exception for whatever the driver lacks
            raise BackendError(
                f"OpenGL 3.3 was asked for and no driver gave it ({error}). On Debian and Ubuntu: "
                "apt-get install libegl1 libgl1 libgl1-mesa-dri. The software renderer needs none of them."
            ) from error
        self._mesh = mesh
        self._context = context
        self.size = camera.size
        self.name = f"gl ({context.info['GL_RENDERER']})"
        self._normals = SmoothNormals(mesh)
        width, height = camera.size
        self._picture = np.empty((height, width, 3), np.uint8)

        table = light_table()
        texels = len(table)
        program = context.program(vertex_shader=FACE_VERTEX, fragment_shader=FACE_FRAGMENT)
        # Rows are read bottom first: the picture is drawn upside down, which turns every winding too.
        flip = np.diag([1, -1, 1, 1]).astype(np.float32)
        context.front_face = "cw"
        program["matrix"].write((flip @ camera.matrix).T.tobytes())
        program["rotation"].write(camera.rotation.T.tobytes())
        program["back_face"].value = BACK_FACE
        program["texels"].value = float(texels)
        if "point_size" in program:
            program["point_size"].value = max(1.0, height * POINT_SHARE)
        light = context.texture((texels, texels), 3, table.tobytes(), dtype="f4")
        light.repeat_x = light.repeat_y = False
        program["light"].value = 0
        wall_program = context.program(vertex_shader=WALL_VERTEX, fragment_shader=WALL_FRAGMENT)
        wall = context.texture(camera.size, 3, backdrop(camera.size).tobytes(), alignment=1)
        wall_program["wall"].value = 1
        self._textures = (light, wall)

        corners = context.buffer(np.array([-1, -1, 3, -1, -1, 3], np.float32).tobytes())
        self._wall = context.vertex_array(wall_program, [(corners, "2f", "corner")])
        self._position = context.buffer(reserve=mesh.template.nbytes, dynamic=True)
        self._normal = context.buffer(reserve=mesh.template.nbytes, dynamic=True)
        albedo = context.buffer(to_linear(mesh.colors).tobytes())
        layout = [
            (self._position, "3f", "position"),
            (self._normal, "3f", "normal"),
            (albedo, "3f", "albedo"),
        ]
        index = context.buffer(mesh.faces.tobytes()) if len(mesh.faces) else None
        self._face = context.vertex_array(program, layout, index)
        self._mode = moderngl.TRIANGLES if len(mesh.faces) else moderngl.POINTS
        self._depth_test = moderngl.DEPTH_TEST
        context.enable(moderngl.PROGRAM_POINT_SIZE)

        samples = min(SAMPLES, context.max_samples)
        self._canvas = context.framebuffer(
            [context.renderbuffer(camera.size, 3, samples=samples)],
            context.depth_renderbuffer(camera.size, samples=samples),
        )
        self._resolved = context.framebuffer([context.renderbuffer(camera.size, 3)])

    def render(self, vertices: ArrayLike) -> NDArray[np.uint8]:
        """Draw `vertices` [V, 3] as [height, width, 3] uint8 sRGB: a reused buffer, copy it to keep."""
        frame = self._mesh.frame(vertices)
        context = self._context
        with context:  # several renderers may live in one thread
            self._position.write(frame)
            self._normal.write(self._normals(frame))
            for unit, texture in enumerate(self._textures):
                texture.use(unit)
            self._canvas.use()
            self._canvas.clear(depth=1.0)
            context.disable(self._depth_test)
            self._wall.render()
            context.enable(self._depth_test)
            self._face.render(self._mode)
            context.copy_framebuffer(self._resolved, self._canvas)
            self._resolved.read_into(self._picture, components=3, alignment=1)
        return self._picture

    def close(self) -> None:
        """Give the context back. Safe to call twice."""
        self._context.release()

    def __enter__(self) -> GLRenderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
