"""Small video files for tests, written with PyAV."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def scene(index, width, height):
    """A frame whose brightness says its index, with a bright bar that moves, uint8 (height, width, 3)."""
    frame = np.full((height, width, 3), 20 + index * 37 % 160, np.uint8)
    place = index * 5 % (width - 8)
    frame[height // 4 : height // 2, place : place + 8] = 235
    return frame


def write_video(
    path, frames, *, fps=10, size=(96, 64), codec="libx264", gop=12, times=None, sound=False, quality=18, frame_of=scene
):
    """A video of `scene`s; `times`: those of the frames in milliseconds, for other rates than constant ones."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = {"crf": str(quality), "threads": "1"} if codec == "libx264" else {}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            voice = container.add_stream("aac", rate=8000)
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            heard.sample_rate = 8000
            container.mux(voice.encode(heard))
            container.mux(voice.encode())
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(frame_of(index, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def all_frames(path):
    """Every frame of a file in the order in which it is shown, uint8 (frames, height, width, 3)."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
