"""Videos in prompts, against transformers' own processors and models, and against the official code of InternVL."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from family_cases import build_family
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata
from transformers_video import processing_of
from video_cases import all_frames, write_video

from foveate.config.data import VideoSettings
from foveate.data.table import open_tasks
from foveate.data.videos import inspect_video
from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.models.families.qwen_video import VideoLimits, fitted_frames, taken_frames
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy
from foveate.parallel.packing import pack, positions
from foveate.records import Message, PackedGroup, SamplingParams, Task, Video
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

pytest.importorskip("av", reason="needs foveate[video]")

processing_2, processing_3 = map(processing_of, ("qwen2_vl", "qwen3_vl"))
FILES = (("a.mp4", 20, 10, (112, 84)), ("b.webm", 31, 5, (112, 84)), ("c.mkv", 90, 30, (168, 84)))
"""Name, frames, frames a second, size in pixels."""
ANSWERS = ((5, 7, 30, 31), (40, 41))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name, frames, fps, size in FILES:
        codec = "libvpx" if name.endswith("webm") else "libx264"
        write_video(root / name, frames, fps=fps, size=size, codec=codec)
        large = (size[0] // 28 * 32, size[1] // 28 * 32)  # whole blocks of Qwen3-VL
        write_video(root / f"large_{name}", frames, fps=fps, size=large, codec=codec)
    return root


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}

    def policy(name):
        if name not in made:
            built = build_family(root / name, name)
            if name.startswith("qwen3_"):  # limits of their own for videos
                size = {"shortest_edge": 4096, "longest_edge": 1_000_000}
                (built / "video_preprocessor_config.json").write_text(json.dumps({"size": size, "fps": 2}))
            made[name] = load_policy(str(built))
        return made[name]

    return policy


def task_of(video, text="<video>\nWhen?"):
    return Task("a", "test", (Message("user", text),), (), "x", where="row 0", videos=(video,))


def encoder_of(policy, **options):
    return Encoder(policy.tokenizer, policy.family, policy.family.budget, 4096, video=VideoSettings(**options))


def normalised(frames, family):
    values = torch.from_numpy(frames).float() / 255
    mean, std = (torch.tensor(one) for one in (family.mean, family.std))
    return ((values - mean) / std).permute(0, 3, 1, 2)[None]


def plain_logprobs(policy, prompt, inputs, **more):
    """Log-probs of `ANSWERS` in transformers' model, each in a row of its own."""
    model = AutoModelForImageTextToText.from_pretrained(policy.folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    for answer in ANSWERS:
        ids = torch.tensor([[*prompt.token_ids, *answer]])
        kinds = 2 * (ids == policy.family.video_token_id).int()
        position = {key: value(len(prompt) + len(answer)) for key, value in more.items()}
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, mm_token_type_ids=kinds, **inputs, **position).logits
        logits = torch.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
        found.append(logits.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return model, torch.cat(found)


@pytest.mark.parametrize("file", [file[0] for file in FILES])
def test_qwen25_sees_frames_and_positions_and_writes_logprobs_as_transformers_does(file, folder, policies):
    policy = policies("qwen2_5_vl")
    path, family = folder / file, policy.family
    video, _ = inspect_video(path)
    prompt = encoder_of(policy, fps=2)(task_of(video))
    metadata = VideoMetadata(total_num_frames=video.frames, fps=video.fps)
    own = SimpleNamespace(num_frames=None, fps=2, temporal_patch_size=2, min_frames=4, max_frames=768)
    taken = processing_2.Qwen2VLVideoProcessor.sample_frames(own, metadata)
    metadata.frames_indices = taken
    frames = normalised(all_frames(path)[taken], family)
    patches, *grid = processing_2.Qwen2VLVideoProcessor.patchify(own, frames, 14, 2, 2)
    seconds = torch.tensor([2 / metadata.sampled_fps])
    inputs = {
        "pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": seconds,
    }  # fmt: skip
    [slot] = prompt.slots
    assert (len(slot.times), *(side * 2 for side in slot.grid)) == tuple(grid)
    torch.testing.assert_close(family._pieces(prompt.pixels, ((*slot.grid, 2),) * grid[0]), patches[0])
    model, wanted = plain_logprobs(policy, prompt, inputs)
    kinds = 2 * (torch.tensor([prompt.token_ids]) == family.video_token_id).int()
    ids = torch.tensor([prompt.token_ids])
    known, _ = model.model.get_rope_index(
        ids, kinds, video_grid_thw=inputs["video_grid_thw"], second_per_grid_ts=seconds
    )
    ours = positions(len(prompt), prompt.slots)
    inside = slice(0, slot.position + slot.count)
    assert torch.equal(ours[:, inside], known[:, 0, inside])
    behind = int(ours[:, inside].max()) + 1  # transformers 5 begins earlier where the time goes beyond rows and columns
    assert ours[0, inside.stop] == behind >= known[0, 0, inside.stop]
    if behind != known[0, 0, inside.stop]:

        def whole(length):
            return positions(length, prompt.slots)[:, None]

        _, wanted = plain_logprobs(policy, prompt, inputs, position_ids=whole)
    got, _ = token_logprobs(policy, pack([PackedGroup.of_tokens(prompt, ANSWERS)]))
    torch.testing.assert_close(got.detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("file", [file[0] for file in FILES])
def test_qwen3_sees_frames_times_and_positions_and_writes_logprobs_as_transformers_does(file, name, folder, policies):
    policy = policies(name)
    path, family = folder / f"large_{file}", policy.family
    video, _ = inspect_video(path)
    prompt = encoder_of(policy)(task_of(video))
    metadata = VideoMetadata(total_num_frames=video.frames, fps=video.fps)
    own = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    taken = processing_3.Qwen3VLVideoProcessor.sample_frames(own, metadata)
    frames = normalised(all_frames(path)[taken], family)
    patches, *grid = processing_3.Qwen3VLVideoProcessor.patchify(own, frames, 16, 2, 2)
    inputs = {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}
    got = family._pieces(prompt.pixels, ((*prompt.slots[0].grid, 2),) * grid[0])
    torch.testing.assert_close(got, patches[0])
    times = Qwen3VLProcessor._calculate_timestamps(own, taken, video.fps)
    assert len(prompt.slots) == len(times) == grid[0]
    text = policy.tokenizer.decode(prompt.token_ids)
    pads = "<|video_pad|>" * prompt.slots[0].count
    written = "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)
    assert f"{written}\nWhen?" in text
    model, wanted = plain_logprobs(policy, prompt, inputs)
    ids = torch.tensor([prompt.token_ids])
    kinds = 2 * (ids == family.video_token_id).int()
    known, _ = model.model.get_rope_index(ids, kinds, video_grid_thw=inputs["video_grid_thw"])
    assert torch.equal(positions(len(prompt), prompt.slots), known[:, 0])
    got, _ = token_logprobs(policy, pack([PackedGroup.of_tokens(prompt, ANSWERS)]))
    torch.testing.assert_close(got.detach(), wanted, rtol=1e-5, atol=1e-5)


def official_video(path, segments, tile):
    """Frames and text as InternVL's model cards load a video (`load_video`, max_num=1), stated anew: the middle of each
    of some equal parts, resized to one tile."""
    every = all_frames(path)
    last = len(every) - 1
    length = float(last) / segments
    taken = [int(length / 2 + np.round(length * part)) for part in range(segments)]
    frames = [PIL.Image.fromarray(every[index]).resize((tile, tile), PIL.Image.Resampling.BICUBIC) for index in taken]
    values = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2) / 255
    mean, std = ((torch.tensor(one)[:, None, None]) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    text = "".join(f"Frame{number + 1}: <image>\n" for number in range(segments))
    return (values - mean) / std, text


@pytest.mark.parametrize("file", [file[0] for file in FILES])
@pytest.mark.parametrize("segments", [8, 32])
def test_internvl_sees_a_video_as_its_official_code_does(file, segments, folder, tiny_policy):
    family = tiny_policy.family
    video, _ = inspect_video(folder / file)
    options = {} if segments == 32 else {"frames": 8}
    prompt = encoder_of(tiny_policy, **options)(task_of(video))
    pixels, text = official_video(folder / file, segments, family.tile)
    torch.testing.assert_close(prompt.pixels, pixels, rtol=0, atol=1e-6)
    shown = tiny_policy.tokenizer.decode(prompt.token_ids)
    image = f"<img>{'<IMG_CONTEXT>' * family.tokens_per_tile}</img>"
    assert text.replace("<image>", image) + "When?" in shown
    assert [slot.tiles for slot in prompt.slots] == [1] * segments


def test_frames_are_taken_as_transformers_takes_them():
    rng = np.random.default_rng(0)
    for _ in range(400):
        total, fps = int(rng.integers(2, 40_000)), float(rng.choice([5, 23.976, 25, 29.97, 30, 60]))
        video, options = Video(None, b"", 64, 64, total, fps), VideoSettings(fps=float(rng.choice([0.5, 1, 2, 4])))
        metadata = VideoMetadata(total_num_frames=total, fps=fps)
        limits = VideoLimits(1, 1)
        own = SimpleNamespace(num_frames=None, fps=options.fps, temporal_patch_size=2, min_frames=4, max_frames=768)
        wanted = processing_2.Qwen2VLVideoProcessor.sample_frames(own, metadata).tolist()
        wanted = [place for place in wanted if place < total]  # by rounding it names one behind the last at times
        assert taken_frames(video, options, limits, 2, keeps_odd=False) == wanted, (total, fps, options)
        wanted = processing_3.Qwen3VLVideoProcessor.sample_frames(own, metadata).tolist()
        assert taken_frames(video, options, limits, 2, keeps_odd=True) == wanted, (total, fps, options)


def test_frames_are_as_large_as_transformers_makes_them():
    rng = np.random.default_rng(1)
    for _ in range(400):
        width, height, frames = (int(rng.integers(low, high)) for low, high in ((20, 900), (20, 900), (2, 60)))
        within = int(rng.integers(1, 200_000)), int(rng.integers(200_000, 3_000_000))
        wanted = processing_3.smart_resize(frames, height, width, 2, 32, *within)
        got = fitted_frames(Video(None, b"", width, height, 99, 10.0), frames, 32, 2, within)
        assert got == wanted[::-1], (width, height, frames, within)


def test_the_length_of_a_prompt_follows_from_the_header_of_its_video(folder, policies, tiny_policy, monkeypatch):
    for policy in (policies("qwen2_5_vl"), policies("qwen3_vl"), policies("smolvlm"), tiny_policy):
        encoder = encoder_of(policy, frames=6)
        task = task_of(inspect_video(folder / "large_c.mkv")[0])
        length = len(encoder(task))
        with monkeypatch.context() as patched:
            patched.setattr("foveate.encoding.encode.video_frames", None)
            assert encoder.length(task) == length
        small = Encoder(policy.tokenizer, policy.family, policy.family.budget, length - 1, video=encoder.video)
        assert f"{length} tokens with its images, the limit is {length - 1}" in str(small.validation_errors(task))


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ({"max_pixels": 5}, "internvl", "data.video.max_pixels is 5, but internvl sees frames as images"),
        ({}, "qwen2", "qwen2 is a text-only model and sees no videos"),
    ],
)
def test_what_a_family_cannot_do_is_told(options, name, said, folder, policies, tiny_policy):
    policy = tiny_policy if name == "internvl" else policies(name)
    with pytest.raises(DataError, match=f"row 0, field videos: {said}"):
        encoder_of(policy, **options)(task_of(inspect_video(folder / "a.mp4")[0]))


def test_settings_choose_how_many_frames_there_are_and_how_large(folder, policies, tiny_policy):
    video, _ = inspect_video(folder / "c.mkv")  # 3 seconds
    for options, frames in (({"fps": 4}, 12), ({"fps": 4, "frames": 5}, 5)):
        assert len(tiny_policy.family.clips(video, VideoSettings(**options))) == frames
    family = policies("qwen2_5_vl").family
    [few] = family.clips(video, VideoSettings(frames=4))
    [small] = family.clips(video, VideoSettings(frames=4, max_pixels=4 * 5000))
    assert len(few.frames) == len(small.frames) == 4
    assert small.size[0] * small.size[1] <= 5000 < few.size[0] * few.size[1]


def test_a_video_beside_images_is_sampled_as_it_is_trained(folder, policies, make_image, tmp_path):
    """The prompt of a row with two images around a video: the engine's log-probs are those of training."""
    for name in ("qwen2_5_vl", "qwen3_vl"):
        policy = policies(name)
        for index, image in enumerate((make_image(90, 60, 1), make_image(60, 130, 2))):
            (tmp_path / f"{index}.png").write_bytes(image.data or image.path.read_bytes())
        row = {
            "question": "<image> then <video> then <image>: when?", "images": ["0.png", "1.png"],
            "video": str(folder / "large_a.mp4"), "answer": "x",
        }  # fmt: skip
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        [task] = open_tasks([str(tmp_path / "rows.jsonl")])
        prompt = encoder_of(policy)(task)
        assert len({slot.times == () for slot in prompt.slots}) == 2
        engine = NativeEngine(policy, encoder_of(policy).decode)
        [[answer, _]] = engine.generate([Request(prompt, 1)], SamplingParams(samples=2, max_tokens=6))
        got, _ = token_logprobs(policy, pack([PackedGroup(prompt, (answer,))]))
        torch.testing.assert_close(got.detach(), torch.from_numpy(answer.logprobs), rtol=1e-4, atol=1e-4)
