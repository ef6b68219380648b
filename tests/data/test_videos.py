from __future__ import annotations

import base64
import builtins
import json

import numpy as np
import PIL.Image
import pytest
from video_cases import all_frames, write_video

from foveate.config.data import VideoSettings
from foveate.data import videos
from foveate.data.table import open_tasks
from foveate.data.validate import ReadOptions
from foveate.data.videos import inspect_video, video_frames
from foveate.errors import DataError
from foveate.models.families.qwen_video import VideoLimits, taken_frames
from foveate.records import Video

pytest.importorskip("av", reason="needs foveate[video]")


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.webm", "libvpx"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"),
     ("a.ts", "libx264"), ("a.flv", "libx264")],
)  # fmt: skip
def test_frames_by_index_are_those_of_reading_the_whole_file(name, codec, tmp_path):
    path = write_video(tmp_path / name, 130, codec=codec)
    video, remarks = inspect_video(path)
    assert (video.width, video.height, video.frames, video.fps, remarks) == (96, 64, 130, 10.0, ())
    every = all_frames(path)
    for indices in ([0, 1, 2, 129], [5], [40, 41, 128], [100, 129], list(range(0, 130, 9))):
        got = np.stack([np.asarray(frame) for frame in video_frames(video, indices)])
        assert np.array_equal(got, every[indices]), indices


def test_a_jump_that_leads_elsewhere_is_followed_by_reading_in_order(tmp_path):
    path = write_video(tmp_path / "a.mp4", 130)
    video, _ = inspect_video(path)
    track = videos._track(path, 10**6)
    late = videos._Track(track.times, tuple(key + 1 for key in track.keys), video, ())  # a wrong index
    got = [np.asarray(frame) for frame in videos._decoded(late, [0, 60, 120])]
    assert np.array_equal(np.stack(got), all_frames(path)[[0, 60, 120]])


def test_embedded_bytes_are_read_as_files_are(tmp_path):
    path = write_video(tmp_path / "a.mp4", 8)
    video, _ = inspect_video(path.read_bytes())
    assert video.path is None
    got = np.stack([np.asarray(frame) for frame in video_frames(video, range(8))])
    assert np.array_equal(got, all_frames(path))


def test_sound_is_a_remark_by_the_name_of_its_codec(tmp_path):
    video, remarks = inspect_video(write_video(tmp_path / "a.mp4", 8, sound=True))
    assert video.frames == 8
    assert remarks == ("has sound (aac), which is not read: the model sees frames alone",)


def refusal(path, **changes):
    with pytest.raises(DataError) as caught:
        inspect_video(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_broken_is_one_clear_line(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 40).read_bytes()
    for name, data, said in (
        ("empty.mp4", b"", "is empty (0 bytes)"),
        ("text.mp4", b"no video at all" * 50, "is no video of a known container; allowed: MP4, WebM or Matroska"),
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n" * 20, "is no video of a known container"),
        ("half.mp4", whole[: len(whole) // 2], "is damaged or truncated"),
        ("header.mp4", whole[:48], "header.mp4"),
    ):
        (tmp_path / name).write_bytes(data)
        assert said in refusal(tmp_path / name), name
    with pytest.raises(DataError, match="cannot be read"):
        inspect_video(tmp_path / "gone.mp4")


def test_frames_that_cannot_be_decoded_are_an_error_of_their_row(tmp_path):
    path = write_video(tmp_path / "a.mkv", 60, gop=10)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) * 3 // 4])
    video, _ = inspect_video(path)
    assert video.frames < 60  # a stream without an index ends where its bytes do
    assert len(list(video_frames(video, range(video.frames - 1)))) == video.frames - 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"row 3, field videos: .*a.mkv has changed since the data were read"):
        list(video_frames(video, [0], "row 3"))


def test_a_variable_rate_is_refused_and_a_jitter_is_not(tmp_path):
    times = [40 * index for index in range(20)] + [800 + 200 * index for index in range(20)]
    said = refusal(write_video(tmp_path / "v.mp4", 40, times=times))
    assert "has a variable frame rate (40 to 200 ms a frame); write it anew at a constant rate, as by ffmpeg" in said
    jitter = [33 * index + index % 3 for index in range(40)]
    video, _ = inspect_video(write_video(tmp_path / "j.mkv", 40, times=jitter))
    assert video.frames == 40
    assert video.fps == pytest.approx(1000 / 33, rel=0.02)


def test_a_huge_video_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 30)
    assert "has frames of 96 x 64 pixels, at most 5000 are read" in refusal(path, max_pixels=5000)
    monkeypatch.setattr(videos, "MAX_FRAMES", 29)
    assert "has more than 29 frames" in refusal(path, max_pixels=6144)
    monkeypatch.setattr(videos, "MAX_VIDEO_BYTES", 1000)
    assert "at most 1000 are read" in refusal(path, max_pixels=6145)


def test_few_frames_that_are_said_to_last_for_years_are_refused(tmp_path):
    said = refusal(write_video(tmp_path / "a.mkv", 2, times=[0, 10**12]))
    assert "says that its 2 frames last 2e+09 seconds; at most 1048576 are read" in said


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 3)
    found = builtins.__import__

    def without(name, *more):
        if name == "av":
            raise ImportError(name)
        return found(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"PyAV, which is missing; pip install 'foveate\[video\]'"):
        inspect_video(path)


# --------------------------------------------------------------------------------------------------------------- rows


def tasks_of(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return list(open_tasks([str(tmp_path / "rows.jsonl")]))


def test_video_files_of_rows_keep_their_marks_or_stand_in_front(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, 5 + (name == "b.mp4"))
    [one, two, parts] = tasks_of(
        tmp_path,
        {"question": "When?", "video": "a.mp4", "answer": [1, 2]},
        {"question": "<video> or <video>?", "videos": ["b.mp4", {"path": "a.mp4"}], "answer": "x"},
        {"messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}],
         "videos": "a.mp4", "answer": "x"},
    )  # fmt: skip
    assert one.messages[0].content == "<video>\nWhen?"
    assert [video.frames for video in one.videos] == [5]
    assert two.messages[0].content == "<video> or <video>?"
    assert [video.frames for video in two.videos] == [6, 5]
    assert parts.messages[0].content == "<video>?"
    assert (one.images, two.images) == ((), ())


def test_a_video_is_also_known_by_its_first_bytes_and_as_base64(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5)
    (tmp_path / "plain").write_bytes(path.read_bytes())
    encoded = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    rows = [{"question": "?", "video": one, "answer": "x"} for one in ("plain", encoded, {"url": encoded})]
    assert [task.videos[0].frames for task in tasks_of(tmp_path, *rows)] == [5, 5, 5]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_an_animation_among_images_is_its_first_image_and_a_warning(suffix, tmp_path):
    stills = [PIL.Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    stills[0].save(tmp_path / f"moves.{suffix}", save_all=True, append_images=stills[1:])
    stills[0].save(tmp_path / f"still.{suffix}")
    for name, warned in ((f"moves.{suffix}", True), (f"still.{suffix}", False)):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?", "image": name, "answer": "x"}))
        table, report = ReadOptions()([str(tmp_path / "rows.jsonl")])
        assert len(table) == 1
        assert any("of which the first counts" in line for line in report.warning_lines()) == warned


def test_the_numbers_of_rows_tell_videos_apart_and_sound_is_told_once(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, 4, sound=True)
    rows = [{"question": "?", "video": name, "answer": "x"} for name in ("a.mp4", "b.mp4", "b.mp4")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    table, report = ReadOptions()([str(tmp_path / "rows.jsonl")])
    assert len(table) == 3
    assert "twice: 1 rows equal another row" in report.statistics.lines()
    assert [line for line in report.warning_lines() if "has sound (aac)" in line and "and in 2 more rows" in line]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "<video>?", "videos": ["a.mp4", "a.mp4"]}, "1 <video> marks for 2; one each is needed"),
        ({"question": "?", "video": "https://a.b/c.mp4"}, "https"),
        ({"question": "?", "video": {"path": "a.mp4", "fps": 3}}, "a video has fps, which is not read"),
        ({"question": "?", "video": "text.mp4"}, "is no video of a known container"),
        ({"question": "?", "video": "text"}, "text is no video of a known container"),
        ({"question": "?", "videos": ["a.mp4", None]}, "a video must be a path, bytes, .* not None"),
        ({"question": "?", "videos": ["a.mp4", "still.png"]}, "still.png is no video of a known container"),
        ({"question": "?", "video": 5}, "a video must be a path, bytes, .* not 5"),
        ({"question": "?", "video": "data:video/mp4;base64,!!"}, r"row 0 \(line 1\), field videos.* no valid base64"),
        ({"question": "?", "video": "moves.gif"}, "field videos.*: a frame is an animation, .* write it as a video"),
        ({"question": "?", "videos": [["still.png", "moves.gif"]]}, "a frame is an animation"),
    ],
)
def test_a_video_that_cannot_be_used_is_an_error_of_its_row(row, said, tmp_path):
    write_video(tmp_path / "a.mp4", 3)
    for name in ("text.mp4", "text"):
        (tmp_path / name).write_text("text" * 200)
    stills = [PIL.Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    stills[0].save(tmp_path / "still.png")
    stills[0].save(tmp_path / "moves.gif", save_all=True, append_images=stills[1:])
    with pytest.raises(DataError, match=said):
        tasks_of(tmp_path, row | {"answer": "x"})


@pytest.mark.parametrize(("frames", "most"), [(17, 14), (14, 12), (367, 24), (100, 48)])
def test_no_frame_behind_the_last_one_is_taken(frames, most):
    video = Video(None, b"", 64, 64, frames, 24.0)
    taken = taken_frames(video, VideoSettings(frames=most), VideoLimits(1, 10_000), 2, keeps_odd=False)
    assert max(taken) < frames
    assert len(taken) <= most
