"""Videos from files: their frames by index, decoded by PyAV (`pip install 'foveate[video]'`).

The number and the times of the frames come from the packets of a file, without decoding; frames are decoded when a
prompt is made. A file says by its first bytes which of `VIDEO_CONTAINERS` it is, and is opened as that alone: playlists
and other formats that name further files or addresses are never tried.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL.Image

from foveate.config.data import MAX_PIXELS
from foveate.data.images import name_of_source, source_of
from foveate.errors import DataError, join_where, one_line
from foveate.records import Task, Video

MAX_VIDEO_BYTES = 2**32
"""Bytes of the largest video that is read."""
MAX_FRAMES = 2**20
"""Frames of the longest video that is read, about ten hours at 30 a second."""
MAX_SECONDS = 2**20
"""Seconds of the longest video that is read, twelve days: few frames may be said to last for years."""
VIDEO_CONTAINERS = {"mp4": "MP4", "matroska": "WebM or Matroska", "avi": "AVI", "flv": "FLV", "mpegts": "MPEG-TS"}
"""The containers that are read: FFmpeg's names and those of people."""

_JITTER = 0.5
"""Share of the time of a frame by which its time may differ from that of a constant rate."""
_LATE = 32
"""Frames that a decoder may still read in front of one instead of a jump to the nearest key frame."""


@dataclass(frozen=True, slots=True)
class _Track:
    """The frames of a video in the order in which they are shown: their times, and which of them are key frames, in
    units of the stream; and what a reader of the data should know."""

    times: tuple[int, ...]
    keys: tuple[int, ...]
    video: Video
    remarks: tuple[str, ...]


def inspect_video(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[Video, tuple[str, ...]]:
    """A video file, or an encoded video, as a record, and remarks: that its sound is not read.

    All packets are read and the first frame is decoded. Raises DataError, without a place, where PyAV is missing, for
    what is no video of a known container, for a damaged or a huge file, and for a frame rate that varies."""
    track = _track(source, max_pixels)
    return track.video, track.remarks


def video_frames(video: Video, indices: Sequence[int], where: str = "") -> Iterator[PIL.Image.Image]:
    """The frames of these indices, which rise, as upright RGB images, each decoded when it is asked for. Raises
    DataError naming the row for a file that has changed or cannot be decoded."""
    place = join_where([where, "field videos"])
    try:
        track = _track(source_of(video), video.width * video.height)
        if track.video != video:
            name = name_of_source(source_of(video))
            raise DataError(f"{name} has changed since the data were read; leave it as it is")
        yield from _decoded(track, indices)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _decoded(track: _Track, indices: Sequence[int], *, jumps: bool = True) -> Iterator[PIL.Image.Image]:
    """The frames, with jumps over what nobody wants, or without: in the order of the file, where a jump led elsewhere,
    as it may in streams without an index."""
    source, at, has_jumped = source_of(track.video), 0, False
    with _opened(source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames: Iterator[Any] = container.decode(stream)
        for number, index in enumerate(indices):
            key = track.keys[bisect_right(track.keys, track.times[index]) - 1]
            if jumps and key > track.times[at] and index - at > _LATE:
                container.seek(key, stream=stream)
                frames, has_jumped = container.decode(stream), True
            image = next((one for one in frames if one.pts is not None and one.pts >= track.times[index]), None)
            if image is None or image.pts != track.times[index]:
                if has_jumped:
                    yield from _decoded(track, indices[number:], jumps=False)
                    return
                name = name_of_source(source)
                raise DataError(f"{name} is damaged: frame {index} of {len(track.times)} cannot be decoded")
            at = index
            yield _upright(image)


def _upright(frame: Any) -> PIL.Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


def _track(source: Path | bytes, max_pixels: int) -> _Track:
    if isinstance(source, bytes):
        return _read_track(source, max_pixels)
    try:
        about = source.stat()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror})") from error
    return _track_of_file(source, about.st_mtime_ns, about.st_size, max_pixels)


@lru_cache(maxsize=2**10)
def _track_of_file(path: Path, changed_ns: int, size: int, max_pixels: int) -> _Track:  # noqa: ARG001 - a key
    """`_read_track`, once for all rows that show the same video, and again when its file has changed."""
    return _read_track(path, max_pixels)


def _read_track(source: Path | bytes, max_pixels: int) -> _Track:
    name = name_of_source(source)
    with _opened(source) as container:
        if not container.streams.video:
            raise DataError(f"{name} has no video stream")
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            size = f"{stream.width} x {stream.height}"
            raise DataError(
                f"{name} has frames of {size} pixels, at most {max_pixels} are read; raise data.max_image_pixels"
            )
        packets = _packets(name, container, stream)
        times = sorted({time for time, _ in packets})
        rate = _constant_rate(name, times, stream)
        if len(times) / rate > MAX_SECONDS:
            raise DataError(
                f"{name} says that its {len(times)} frames last {len(times) / rate:.3g} seconds; at most {MAX_SECONDS} "
                "are read"
            )
        first = _first_frame(container, stream, times[0])
        if first is None:
            raise DataError(f"{name} is damaged: its first frame cannot be decoded")
        width, height = _upright(first).size
        sound = ", ".join(dict.fromkeys(one.codec_context.name for one in container.streams.audio))
    path, data = (None, source) if isinstance(source, bytes) else (source, None)
    video = Video(path, data, width, height, len(times), rate)
    keys = tuple(sorted({time for time, is_key in packets if is_key and time >= times[0]} | {times[0]}))
    remarks = (f"has sound ({sound}), which is not read: the model sees frames alone",) if sound else ()
    return _Track(tuple(times), keys, video, remarks)


def _first_frame(container: Any, stream: Any, time: int) -> Any:
    container.seek(time, stream=stream)
    return next((frame for frame in container.decode(stream) if frame.pts is not None), None)


def _packets(name: str, container: Any, stream: Any) -> list[tuple[int, bool]]:
    """The time of each frame, and whether it is a key frame, in the order of the file."""
    found: list[tuple[int, bool]] = []
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:  # the end of the stream, or cut away by an edit
            continue
        if packet.pts is None:
            raise DataError(f"{name} does not say when its frames are shown; {_again()}")
        found.append((packet.pts, packet.is_keyframe))
        if len(found) > MAX_FRAMES:
            raise DataError(f"{name} has more than {MAX_FRAMES} frames; cut it into shorter videos")
    if not found:
        raise DataError(f"{name} has no frames")
    return found


def _constant_rate(name: str, times: Sequence[int], stream: Any) -> float:
    """Frames a second. Raises DataError for frames that do not come at a constant rate."""
    unit = float(stream.time_base)
    said = float(stream.average_rate or stream.guessed_rate or 0)
    if len(times) < 2:
        return said or 1.0
    step = (times[-1] - times[0]) / (len(times) - 1)
    worst = max(abs(time - times[0] - number * step) for number, time in enumerate(times))
    if worst > max(_JITTER * step, 1):
        gaps = [(after - before) * unit * 1000 for before, after in pairwise(times)]
        raise DataError(f"{name} has a variable frame rate ({min(gaps):.0f} to {max(gaps):.0f} ms a frame); {_again()}")
    rate = 1 / (step * unit)
    return said if said and abs(said - rate) < 0.01 * rate else rate


def _again() -> str:
    return "write it anew at a constant rate, as by ffmpeg -i IN -fps_mode cfr OUT.mp4"


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Any]:
    """A container of PyAV. Every refusal of FFmpeg is a DataError."""
    try:
        import av
        import av.error
    except ImportError as error:
        raise DataError("videos are decoded by PyAV, which is missing; pip install 'foveate[video]'") from error
    name = name_of_source(source)
    try:
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if not 0 < size <= MAX_VIDEO_BYTES:
                what = "is empty (0 bytes)" if size == 0 else f"has {size} bytes; at most {MAX_VIDEO_BYTES} are read"
                raise DataError(f"{name} {what}")
            kind = container_of(file.read(400))
            if kind is None:
                raise DataError(
                    f"{name} is no video of a known container; allowed: {', '.join(VIDEO_CONTAINERS.values())}"
                )
            file.seek(0)
            with av.open(file, format=kind, options={"protocol_whitelist": "none"}) as container:
                yield container
    except DataError:
        raise
    except (OSError, av.error.FFmpegError, ValueError) as error:
        raise DataError(f"{name} is damaged or truncated ({one_line(error)[:200]})") from error


NO_VIDEO_FILES = "takes no video files; give the frames as images (videos: [[FRAME, ...]])"


def refuse_videos(task: Task, who: str) -> None:
    """Raise DataError for a task with video files where they cannot be shown."""
    if task.videos:
        raise DataError(f"{task.where or task.id}, field videos: {who} {NO_VIDEO_FILES}")


def container_of(head: bytes) -> str | None:
    """The container of a file with these first bytes, by FFmpeg's name; None for one that is not known."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return "mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:3] == b"FLV":
        return "flv"
    return "mpegts" if head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G" else None
