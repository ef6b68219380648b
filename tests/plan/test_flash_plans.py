"""Plans of Flash models count the image tokens that are seen in the mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.config.recipe import read_recipe
from foveate.encoding.encode import Encoder
from foveate.encoding.routes import routed
from foveate.errors import ConfigError
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.flash import most_compressed, route_by
from foveate.models.policy import load_policy
from foveate.models.sizes import meta_model, published_config
from foveate.parallel.packing import pack
from foveate.plan.hardware import parse_machines
from foveate.plan.memory import memory_of, sizes_of
from foveate.plan.time import seconds_of
from foveate.plan.trace import RowShape, _meta_batch, family_of, piece_of, step_memory
from foveate.plan.workload import workload_of
from foveate.records import PackedGroup

ALL = ("vision", "projector", "language")
FLASH = ["model.path=InternVL3_5-1B-Flash"]
H100 = parse_machines("H100-80")


@pytest.fixture(scope="module")
def policy(tiny_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("planned") / "flash"
    write_flash(str(tiny_folder), target)
    return load_policy(str(target))


@pytest.fixture
def planned(policy, monkeypatch):
    """The workload of a shipped recipe for a small Flash model, whose tiles have 4 tokens or 1."""
    monkeypatch.setattr("foveate.plan.workload._config_of", lambda _: policy.model.config)
    return lambda recipe, tiles=7, share=None: workload_of(read_recipe(recipe, FLASH), None, 1000, tiles, share)


def test_a_flash_model_is_planned_with_its_second_projector_and_its_router():
    config = published_config("1B", flash=True)
    counted = sum(one.numel() for one in meta_model(config).parameters())
    assert sizes_of(config, ALL).total == counted
    plain, trained = (sizes_of(one, ALL) for one in (published_config("1B"), config))
    assert plain.trained < trained.trained < trained.total  # the second projector, and not the router
    assert workload_of(read_recipe("internvl3_5_1b_vico", []), None, None, None).config.flash_mode is True


@pytest.mark.parametrize("relative", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_no_router_compresses_more_tiles_than_the_plan_lets_it(relative):
    for tiles in range(1, 14):
        found = torch.linspace(0.6, 0.9, tiles)[torch.randperm(tiles)]
        assert sum(route_by(found, (relative, 0.5))) == most_compressed(tiles, relative)
    assert most_compressed(0, relative) == 0


def test_rl_counts_half_of_the_tiles_as_compressed_or_the_share_that_is_asked_for(planned):
    whole, half, most = (planned("internvl3_5_1b_gspo", share=share) for share in (0.0, None, 6 / 7))
    assert [work.prompt for work in (whole, half, most)] == [7 * 4 + 100, 18 + 100, 6 + 4 + 100]
    assert [work.compressed for work in (whole, half, most)] == [0, 0.5, 6 / 7]
    assert [planned("internvl3_5_1b_gspo", tiles=tiles).compressed for tiles in (0, 1)] == [0, 0]
    slow, medium, fast = (seconds_of(work, H100, memory_of(work)) for work in (whole, half, most))
    assert slow.generate > medium.generate > fast.generate
    assert slow.update > medium.update > fast.update


def test_a_threshold_that_every_tile_passes_compresses_all_that_may_be(monkeypatch):
    config = published_config("1B", flash=True)
    config.update({"flash_absolute_threshold": 0.0})
    monkeypatch.setattr("foveate.plan.workload._config_of", lambda _: config)
    work = workload_of(read_recipe("internvl3_5_1b_gspo", FLASH), None, None, 7)
    assert work.compressed == pytest.approx(6 / 7)
    assert work.prompt == 6 * 64 + 256 + 100


def test_vico_sees_half_of_the_tiles_and_its_reference_all_and_mpo_sees_all(planned):
    vico, mpo = planned("internvl3_5_1b_vico"), planned("internvl3_5_1b_mpo")
    assert (vico.compressed, vico.prompt, vico.whole_prompt) == (0.5, 118, 128)
    assert (mpo.compressed, mpo.prompt, mpo.whole_prompt) == (0, 128, None)
    same = replace(vico, whole_prompt=vico.prompt)
    longer, shorter = (seconds_of(work, H100, memory_of(work)).forward for work in (vico, same))
    assert longer > shorter


def test_a_traced_row_has_the_features_of_a_real_one(policy, make_task, make_image):
    config, sides = policy.model.config, policy.family.sides
    prompt = Encoder(policy.tokenizer, policy.family, 6, 1024)(make_task("<image>?", make_image(130, 70, 1)))
    real = pack([PackedGroup.of_tokens(routed(prompt, [[True, False, True]], sides), [(5, 6)])])
    assert family_of(config).sides == sides
    traced = _meta_batch(RowShape(len(real.token_ids_T), 2, 3, compressed=2), piece_of(config), sides)
    assert len(traced.slot_index) == len(real.slot_index) == 1 + 4 + 1
    assert sorted(traced.grids) == sorted(real.grids)
    assert traced.pixels.shape == real.pixels.shape


def test_compressed_tiles_take_less_memory_for_their_features(policy):
    def memory(compressed):
        row = RowShape(400, 100, 20, compressed)
        return step_memory(policy.model.config, row, dtype=torch.float32, train=ALL, checkpointing=False)

    none, some, every = map(memory, (0, 10, 20))
    width = policy.model.config.text_config.hidden_size
    assert none.features - some.features == some.features - every.features == 10 * 3 * width * 4


@pytest.mark.parametrize(
    ("recipe", "model", "share", "said"),
    [
        (
            "internvl3_5_1b_gspo",
            "InternVL3_5-1B",
            "0.5",
            "--compressed 0.5: internvl compresses no tiles; leave it out",
        ),
        ("internvl3_5_1b_gspo", "InternVL3_5-1B-Flash", "0.9", "at most 6 of 7 tiles can be, by flash_relative_thresh"),
        ("internvl3_5_1b_vico", "InternVL3_5-1B-Flash", "0.2", "vico draws them, half of the tiles in the mean"),
        ("internvl3_5_1b_mpo", "InternVL3_5-1B-Flash", "0.2", "this stage compresses none"),
    ],
)
def test_a_share_that_cannot_be_is_refused(recipe, model, share, said):
    asked = ["plan", recipe, f"model.path={model}", "--gpus", "16xH100-80", "--tiles", "7", "--compressed", share]
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
