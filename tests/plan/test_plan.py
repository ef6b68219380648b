"""Plans: what is counted is what the code does, and what is advised fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from slow_cases import slow_but
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.config.cluster import ClusterSettings
from foveate.config.model import LoraSettings
from foveate.config.recipe import SHIPPED, read_recipe
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError
from foveate.models.forward import token_logprobs
from foveate.models.lora import add_adapters
from foveate.models.policy import freeze_except, load_policy
from foveate.models.sizes import PUBLISHED_SIZES, published_config
from foveate.plan import advice, memory, trace
from foveate.plan.advice import built_share, plan
from foveate.plan.hardware import GPUS, parse_machines
from foveate.plan.memory import activation_memory, key_value_bytes, memory_of, shallow, sizes_of
from foveate.plan.report import plan_text
from foveate.plan.time import active_parameters, language_flops, seconds_of, vision_flops
from foveate.plan.trace import RowShape, StepMemory, StorageCounter, _meta_batch, piece_of, step_memory, traced_policy
from foveate.plan.workload import Workload, workload_of
from foveate.rollout.native.cache import BatchCache
from foveate.train.muon import MUON
from foveate.train.optim import OPTIMIZERS

ONE_GPU = sorted(path.stem for path in SHIPPED.glob("geo3k_*.yaml"))
FLASH = ("internvl3_5_1b_vico", "internvl3_5_1b_vir")  # on one rank
LARGE = sorted(path.stem for path in SHIPPED.glob("*internvl3_5*.yaml") if path.stem not in (*ONE_GPU, *FLASH))
LARGE += ["openmmreasoner_7b", "vero_qwen3vl_8b"]
ALL = ("vision", "projector", "language")
QWEN = "geo3k_qwen2_5_vl_3b_lora"


ON_CPU = ClusterSettings(device="cpu")


def work_of(config, **changes) -> Workload:
    values = {
        "config": config, "trainable": ALL, "dtype": torch.float32, "checkpointing": False, "cluster": ON_CPU,
        "optim": OptimSettings(lr=1e-3),
        "budget": 512, "steps": 10, "groups": 8, "answers": 4, "updates": 1, "prompt": 200, "answer": 70, "tiles": 3,
        "longest": 100, "generates": True, "forwards": 0, "reference": False,
    }  # fmt: skip
    return Workload(**values | changes)


@pytest.fixture(scope="module")
def config(tiny_policy):
    return tiny_policy.model.config


# ------------------------------------------------------------------------------------------------------ the counts


def test_storages_are_counted_while_they_live_and_those_from_outside_never():
    outside = torch.empty(1000, device="meta")
    with StorageCounter([outside]) as counter:
        twice = outside * 2
        half = twice[:500]
        view = outside.view(10, 100)
        assert (counter.live, counter.peak) == (4000, 4000)
        more = twice + 1
        del twice
        assert (counter.live, counter.peak) == (8000, 8000)  # a view holds it
        del half
        assert (counter.live, counter.peak) == (4000, 8000)
    assert view.shape == (10, 100)
    assert more.shape == (1000,)


@pytest.mark.parametrize("train", [ALL, ("projector", "language")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_small_depths_carry_on_to_the_full_one(config, train, checkpointing):
    deep = shallow(config, 9, vision=5)
    work = work_of(deep, trainable=train, checkpointing=checkpointing)
    whole = step_memory(deep, work.row, dtype=torch.float32, train=train, checkpointing=checkpointing)
    assert activation_memory(work).total == pytest.approx(whole.total, rel=0.01)


@pytest.mark.slow
def test_a_gpu_takes_larger_chunks_of_logits_and_nothing_else():
    config = published_config("1B")
    cpu, gpu = (
        activation_memory(work_of(config, dtype=torch.bfloat16, groups=64, answer=4000, budget=40_000, cluster=cluster))
        for cluster in (ON_CPU, ClusterSettings(gpus_per_node=8))
    )
    assert (cpu.activations, cpu.features) == (gpu.activations, gpu.features)
    assert 1.5 * (256 - 2) < (gpu.chunk - cpu.chunk) / 2**20 < 4 * (256 - 2)  # buffers of 256 MB in the place of 2


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("tokens", [3, 21, 500])
def test_the_memory_of_many_log_probs_follows_from_that_of_four_chunks(monkeypatch, tokens, trains):
    def plan():
        head = torch.empty(700, 16, device="meta", requires_grad=trains)
        if trains:
            head.register_post_accumulate_grad_hook(trace._drop)
        return trace._chunk_memory(head, torch.empty(tokens, dtype=torch.int64, device="meta"), 5 * 700)

    all_of_them, traced = trace._traced_chunks, []
    monkeypatch.setattr(trace, "_traced_chunks", lambda *them: traced.append(len(them[1])) or all_of_them(*them))
    found = plan()
    assert max(traced) <= 4 * 5
    monkeypatch.setattr(trace, "_chunk_memory", all_of_them)
    assert found == plan()


def test_no_scores_of_pictures_are_counted_which_no_kernel_keeps():
    """A tile of 1,025 tokens would have 16 x 1,025 of them for each, in every block."""
    config, row = published_config("1B"), RowShape(1024, 64, 4)
    one, two = (
        step_memory(
            shallow(config, 2, vision=blocks), row, dtype=torch.float32, train=ALL, checkpointing=False
        ).activations
        for blocks in (1, 2)
    )
    per_token = (two - one) / (4 * 1025) / 4
    assert 12 * 1024 < per_token < 24 * 1024  # numbers; the block is 1,024 wide


@pytest.mark.slow
def test_one_rank_that_computes_in_bfloat16_keeps_copies_of_its_weights(config):
    def memory(dtype="bfloat16", **changes):
        return memory_of(work_of(config, cluster=ClusterSettings(dtype=dtype), **changes))

    sizes = sizes_of(config, ALL)
    plain, halved = memory(None), memory()
    assert (plain.gathered, halved.gathered) == (0.0, 2.0 * sizes.total)
    assert plain.weights == halved.weights
    assert memory(trainable=("projector",)).gathered == 2.0 * sizes_of(config, ("projector",)).trained
    assert memory(checkpointing=True).gathered < halved.gathered


def test_an_engine_with_weights_of_its_own_keeps_them_while_its_rank_trains(config):
    def memory(cluster, **changes):
        return memory_of(work_of(config, cluster=cluster, **changes))

    weights = 2.0 * sizes_of(config, ALL).total
    shared, own = memory(ON_CPU), memory(ClusterSettings(dtype="bfloat16"))
    assert (shared.engine, own.engine) == (0.0, weights)
    ranks = memory(ClusterSettings(gpus_per_node=2))
    assert ranks.engine == weights
    assert ranks.training == ranks.state + weights + ranks.gathered + ranks.activations + ranks.features + ranks.chunk
    apart = memory(ClusterSettings(gpus_per_node=2, engines=1))
    assert apart.training == pytest.approx(ranks.training - weights)
    assert memory(ON_CPU, overlaps=True).engine > 0


def test_an_optimizer_takes_the_memory_of_its_state(config):
    def memory(name, **changes):
        return memory_of(work_of(config, optim=OptimSettings(lr=1e-3, name=name), **changes))

    trained = 4 * sizes_of(config, ALL).trained
    adamw, muon = memory("adamw"), memory("muon")
    assert adamw.optimizer == 2 * trained
    assert trained < muon.optimizer < 2 * trained
    assert memory("muon", trainable=("projector",)).optimizer == memory("adamw", trainable=("projector",)).optimizer
    offloaded = ClusterSettings(gpus_per_node=2, offload=True)
    saved = memory("adamw", cluster=offloaded).host - memory("muon", cluster=offloaded).host
    assert saved == pytest.approx((adamw.optimizer - muon.optimizer) / 2)
    work = work_of(config, optim=OptimSettings(lr=1e-3, name="muon"))
    machines = parse_machines("H100-80")
    assert seconds_of(work, machines, muon).update < seconds_of(work_of(config), machines, adamw).update


def test_a_plan_refuses_an_optimizer_on_ranks_that_it_cannot_be_sharded_over(config, monkeypatch):
    alone = replace(MUON, sharded=False)
    monkeypatch.setitem(OPTIMIZERS, "alone", alone)
    work = work_of(config, optim=OptimSettings(lr=1e-3, name="alone"), cluster=ClusterSettings())
    with pytest.raises(ConfigError, match=r"optim.name=alone cannot train weights that are sharded over 8 ranks"):
        plan(work, parse_machines("8xH100-80"))


def test_memory_grows_with_the_row_and_shrinks_with_checkpointing(config):
    def total(tokens, checkpointing):
        row = RowShape(tokens // 2, tokens // 2, 2)
        return step_memory(config, row, dtype=torch.float32, train=ALL, checkpointing=checkpointing).total

    assert total(1024, False) > 1.5 * total(512, False)
    assert total(1024, True) < 0.7 * total(1024, False)


def test_offloading_leaves_the_inputs_of_all_blocks_but_the_one_in_work_to_the_host(config):
    """float32 (T, D) for each block of the language model, and of the tower with its class token and its own width."""
    row, depth = RowShape(512, 512, 2), config.text_config.num_hidden_layers
    kept, moved = (
        step_memory(config, row, dtype=torch.float32, train=ALL, checkpointing=True, offloads=offloads)
        for offloads in (False, True)
    )
    inputs = 4 * 1024 * config.text_config.hidden_size * depth
    assert kept.activations - moved.activations == pytest.approx(inputs, rel=0.5)


@pytest.mark.parametrize("saving", [{"checkpointing": False}, {"checkpointing": True, "offloads": True}])
def test_a_token_of_a_long_row_takes_about_as_much_as_one_of_a_short_row(config, saving):
    def of_a_token(tokens):
        row = RowShape(tokens // 2, tokens // 2, 2)
        return step_memory(config, row, dtype=torch.float32, train=ALL, **saving).activations / tokens

    assert of_a_token(2**16) < 1.5 * of_a_token(2**12)


def test_published_sizes_have_the_papers_parameters():
    billions = {size: sizes_of(published_config(size), ALL).total / 1e9 for size in PUBLISHED_SIZES}
    paper = {"1B": 1.1, "2B": 2.3, "4B": 4.7, "8B": 8.5, "14B": 15.1, "38B": 38.4, "20B-A4B": 21.2, "30B-A3B": 30.8}
    paper["241B-A28B"] = 240.7
    assert {size: round(count, 1) for size, count in billions.items()} == pytest.approx(paper, abs=0.11)


def test_qwen2_5_vl_is_planned_with_its_own_parameters_and_pieces():
    config = workload_of(read_recipe(QWEN, []), None, None, None).config
    assert sizes_of(config, ALL).total == 3_754_622_976  # counted by hand from its published shapes
    larger = workload_of(read_recipe("openmmreasoner_7b", []), None, None, None).config
    assert sizes_of(larger, ALL).total == 8_292_166_656  # as its checkpoint says
    piece = piece_of(config)
    assert (piece.tokens, piece.pixels, piece.grid) == (256, (1024, 3, 14, 14), (16, 16))
    assert key_value_bytes(config, 2) == 2 * 36 * 2 * 128 * 2
    cut = shallow(config, 2, vision=2)
    policy = traced_policy(cut, torch.float32, "sdpa")
    batch = _meta_batch(RowShape(1024, 64, 3), piece)
    with FlopCounterMode(display=False) as counted, StorageCounter([]), torch.no_grad():
        policy.family.features(policy.model, batch.pixels, batch.grids)
    expected = 3 * piece_of(cut).flops
    assert counted.get_total_flops() <= 1.03 * expected <= 1.2 * counted.get_total_flops()


@pytest.mark.parametrize(("size", "billions"), [("30B-A3B", 3.3), ("241B-A28B", 22.2)])
def test_a_token_meets_the_chosen_experts_alone(size, billions):
    config = published_config(size)
    embeddings = 2 * config.text_config.vocab_size * config.text_config.hidden_size
    assert (active_parameters(config) + embeddings) / 1e9 == pytest.approx(billions, rel=0.03)


def test_arithmetic_is_what_the_model_does(config):
    """torch counts products of matrices; attention of the forest is an operator it does not know."""
    policy = traced_policy(config, torch.float32, "sdpa")
    batch = _meta_batch(RowShape(256, 64, 3), piece_of(config))
    with FlopCounterMode(display=False) as counted, StorageCounter([]), torch.no_grad():
        token_logprobs(policy, batch)
    answers = len(batch.forest.length) - 1
    answer = len(batch.target_M) // answers
    expected = language_flops(config, 256, answer, answers) + vision_flops(config, 3)
    text, vision = config.text_config, config.vision_config
    pairs = 256**2 / 2 + answers * (answer * 256 + answer**2 / 2)
    expected -= 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * pairs
    tokens = (vision.image_size[0] // vision.patch_size[0]) ** 2 + 1
    attention = 3 * vision.num_hidden_layers * 4 * vision.hidden_size * tokens**2
    found = counted.get_total_flops()
    assert expected - attention <= 1.03 * found
    assert found <= 1.03 * expected


def test_keys_and_values_are_those_of_the_engines_cache(config):
    text = config.text_config
    from foveate.records import Forest

    cache = BatchCache(torch.device("cpu"))
    cache.announce(Forest((0,), (10,), (-1,)), (10,), [[4, 4]])
    for layer in range(text.num_hidden_layers):
        row = torch.zeros(text.num_key_value_heads, 10, text.head_dim)
        cache.attend(layer, torch.zeros(text.num_attention_heads, 10, text.head_dim), row, row, 1.0)
    cache.join()
    [prompts] = cache.rows.prompts.values()
    held = sum(tensor.nbytes for state in cache.states.values() for tensor in state.shelves[prompts])
    assert held == 10 * key_value_bytes(config, 4)


# ------------------------------------------------------------------------------------------------------- the plan


@pytest.fixture
def cheap(monkeypatch):
    """Activations by a formula, where a test is about everything else."""

    def formula(work):
        tokens = work.row.prompt + work.row.answer
        depth = work.config.text_config.num_hidden_layers * (1 if work.checkpointing else 17)
        return StepMemory(2 * tokens * work.config.text_config.hidden_size * (depth + 20), 2**20, 4 * 2**30)

    monkeypatch.setattr(memory, "activation_memory", formula)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", slow_but(LARGE[::3], LARGE))
def test_every_recipe_of_a_published_size_is_planned_and_fits_where_it_says(name, monkeypatch):
    monkeypatch.setattr(advice, "built_share", lambda _: 1.0)
    settings = read_recipe(name, [])
    cluster = settings.cluster
    assert cluster.gpus % 8 == 0
    machines = parse_machines(f"{cluster.gpus // 8}x8xH100-80")
    made = plan(workload_of(settings, None, None, None), machines)
    assert made.memory.fits(made.machines), plan_text(made)
    assert made.work.cluster == cluster
    assert made.gpu_hours > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_GPU)
def test_a_recipe_for_one_gpu_fits_on_the_one_that_it_names(name):
    kind = {"24": "RTX4090-24", "48": "L40S-48", "80": "H100-80"}[
        re.search(r"GPU of (\d+) GB", (SHIPPED / f"{name}.yaml").read_text())[1]
    ]
    made = plan(workload_of(read_recipe(name, []), None, None, None), parse_machines(f"1x1x{kind}"))
    assert made.memory.fits(made.machines), plan_text(made)


def test_adapters_are_planned_as_they_are_trained(tiny_folder, config):
    settings = LoraSettings(rank=4, targets=("q_proj", "v_proj"))
    policy = load_policy(str(tiny_folder))
    freeze_except(policy, ALL)
    add_adapters(policy, settings, ALL)
    trained = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
    whole, adapted = (memory_of(work_of(config, lora=lora)) for lora in (None, settings))
    assert sizes_of(config, ALL, settings).trained == trained
    assert adapted.gradients == 4 * trained
    assert adapted.optimizer == pytest.approx(8 * trained, rel=0.01)
    assert adapted.weights == whole.weights


@pytest.mark.parametrize("name", ["shapes_gspo", "shapes_coldstart"])
def test_small_recipes_are_planned_from_their_folder(name):
    made = plan(workload_of(read_recipe(name, ["model.path=demo"]), None, None, None), parse_machines("RTX4090-24"))
    assert made.memory.fits(made.machines)
    assert "fits; the largest micro-batch is about" in plan_text(made)


@pytest.mark.usefixtures("cheap")
def test_what_does_not_fit_is_told_with_the_fastest_settings_that_do(monkeypatch):
    monkeypatch.setattr(advice, "built_share", lambda _: 1.0)
    row = {"budget": 16384, "prompt": 2000, "answer": 500, "generates": False}
    work = work_of(published_config("38B"), cluster=ClusterSettings(dtype="bfloat16"), **row)
    made = plan(work, parse_machines("8xH100-80"))
    assert not made.memory.fits(made.machines)
    assert made.better is not None
    assert memory_of(made.better).fits(made.machines)
    assert made.better.cluster.offload
    text = plan_text(made)
    assert "does not fit" in text
    assert "cluster.offload=true" in text
    answering = plan(replace(work, generates=True), parse_machines("8xH100-80"))
    assert answering.better is None  # each rank holds the whole of a native engine
    larger = replace(work, config=published_config("241B-A28B"))
    assert "use more or larger ones" in plan_text(plan(larger, parse_machines("8xRTX4090-24")))


def test_the_largest_micro_batch_fits_and_a_tenth_more_does_not(config):
    machines = parse_machines("H100-80")
    machines = replace(machines, gpu=replace(machines.gpu, memory=0.05))
    work = work_of(config)
    largest = plan(work, machines).largest
    assert memory_of(replace(work, budget=int(0.95 * largest))).fits(machines)
    assert not memory_of(replace(work, budget=int(1.1 * largest))).fits(machines)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("shard_over", ["full", "hybrid", "none"])
def test_weights_and_moments_are_cut_over_the_shards(shard_over):
    config = published_config("1B")
    whole = memory_of(work_of(config))
    cut = memory_of(work_of(config, cluster=ClusterSettings(nodes=2, gpus_per_node=8, shard=shard_over)))
    shards = {"full": 16, "hybrid": 8, "none": 1}[shard_over]
    assert whole.state == pytest.approx(16 * sizes_of(config, ALL).total)
    assert cut.state == pytest.approx(whole.state / shards)
    offloaded = memory_of(work_of(config, cluster=ClusterSettings(gpus_per_node=8, offload=True)))
    assert offloaded.state == 0
    assert offloaded.host > whole.state / 8


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_engines_apart_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr(advice, "built_share", lambda _: 1.0)
    config, machines = published_config("8B"), parse_machines("2x8xH100-80")
    both = plan(work_of(config, cluster=ClusterSettings(nodes=2, gpus_per_node=8, dtype="bfloat16")), machines)
    split = ClusterSettings(nodes=2, gpus_per_node=4, engines=4, engine_tensor_parallel=2, dtype="bfloat16")
    apart = plan(work_of(config, cluster=split, budget=16384), machines)
    assert (apart.work.cluster, apart.trainers.count, apart.machines.count) == (split, 8, 16)
    assert apart.memory.engine == both.memory.engine / 2
    assert apart.memory.generating == apart.memory.engine + apart.memory.keys_values
    assert apart.memory.state == 2 * both.memory.state
    assert "16 x H100-80, 8 that train and 8 that generate in 4 engines" in plan_text(apart)
    ahead = replace(apart.seconds, overlaps=True)
    assert ahead.step == max(ahead.generate, ahead.forward + ahead.update) + ahead.publish < apart.seconds.step
    spread = advice.on_machines(split, parse_machines("4x8xH100-80"))
    assert (spread.nodes, spread.gpus_per_node, spread.engines) == (4, 6, 4)
    with pytest.raises(ConfigError, match=r"leaves -7 GPUs to train on"):
        advice.on_machines(split, parse_machines("H100-80"))


def test_sharding_over_256_ranks_builds_and_is_even():
    config = shallow(published_config("241B-A28B"), 2, 1)
    cluster = ClusterSettings(nodes=32, gpus_per_node=8, dtype="bfloat16")
    # the learned positions of the vision tower stand whole on the first rank; cut by experts it would be near 2
    assert 1 <= built_share(work_of(config, cluster=cluster)) < 1.2
    assert not torch.distributed.is_initialized()


# ---------------------------------------------------------------------------------------------------- the hardware


@pytest.mark.parametrize(
    ("text", "nodes", "per_node"), [("H100-80", 1, 1), ("8xH100-80", 1, 8), ("32x8xMI300X-192", 32, 8)]
)
def test_machines_are_read(text, nodes, per_node):
    machines = parse_machines(text)
    assert (machines.nodes, machines.per_node, machines.count) == (nodes, per_node, nodes * per_node)
    assert machines.gpu == GPUS[machines.name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xH100", "unknown GPU 'H100'; did you mean 'H100-80'?"),
        ("8xXYZ", "known are A100-40, A100-80, H20-96, H100-80"),
        ("0xH100-80", "must be GPU, 8xGPU or 2x8xGPU"),
        ("2x2x8xH100-80", "must be GPU, 8xGPU or 2x8xGPU"),
    ],
)
def test_unknown_machines_are_refused_with_what_is_known(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_machines(text)
    assert said in str(caught.value)


def test_a_model_that_is_neither_a_folder_nor_a_published_size_is_refused():
    settings = read_recipe("internvl3_5_1b_gspo", ["model.path=somewhere/else"])
    with pytest.raises(ConfigError, match="no such folder, and the name is not that of a published size"):
        workload_of(settings, None, None, None)


def test_the_command_prints_a_plan():
    result = CliRunner().invoke(app, ["plan", "shapes_gspo", "--gpus", "RTX4090-24", "--answer-tokens", "12"])
    assert result.exit_code == 0, result.output
