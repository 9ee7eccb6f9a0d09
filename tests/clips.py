"""Small real videos for tests."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8


def moving_square(
    num_frames: int, *, size: int = 64, color: tuple[int, int, int] = (200, 40, 60)
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """A coloured square that crosses a gradient; its place tells the frame's number."""
    ramp = np.linspace(30, 220, size).astype(np.uint8)
    frames = []
    for t in range(num_frames):
        frame = np.stack([np.broadcast_to(ramp, (size, size))] * 3, axis=-1).copy()
        left = t * (size - size // 4) // max(1, num_frames - 1)
        frame[size // 4 : size // 2, left : left + size // 4] = color
        frames.append(frame)
    return frames


def write_clip(
    path: Path,
    frames: Sequence[UInt8[np.ndarray, "H W 3"]],
    fps: int = 8,
    *,
    codec: str = "libx264",
    times_ms: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Encode frames (even sides) as a clip; the suffix decides the container.

    `times_ms` gives the frames' times where they are not evenly spaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for t, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = times_ms[t] if times_ms else round(1000 * t / fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_clip(path: Path) -> tuple[list[UInt8[np.ndarray, "H W 3"]], list[float]]:
    """All frames of a clip and their times in seconds, by PyAV: an opinion besides decord's."""
    with av.open(str(path)) as container:
        found = [
            (f.to_ndarray(format="rgb24"), float(f.time or 0)) for f in container.decode(video=0)
        ]
    return [pixels for pixels, _ in found], [time for _, time in found]
