"""A frozen teacher in the place of a reward or beside it: in the loss, in the advantage, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, build_sharp
from safetensors.torch import load, save_file
from test_resume import assert_equal, interrupt, stop_at
from test_rl import metrics_of
from toy import make_data, rl_settings

from foveate.algorithms.targets import Totals
from foveate.api.training import prepared
from foveate.cluster.local import LocalWorkers
from foveate.config.algorithm import AlgorithmSettings, TeacherSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.data.table import open_tasks
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError, DataError
from foveate.models.forward import hidden_states
from foveate.models.policy import load_policy
from foveate.parallel.balance import Costs
from foveate.parallel.packing import pack
from foveate.records import Answer, Group, PackedGroup, Score
from foveate.train.algorithm import build_algorithm, check_run
from foveate.train.rl import run_rl
from foveate.train.teacher import require_another
from foveate.train.update import compute_advantages
from foveate.train.worker import Worker

LENGTHS = ((6, 3), (4, 7), (2, 5))
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two teachers of other widths and depths than `tiny_folder`, with its tokenizer and its tiles."""
    sizes = replace(TINY, width=48, heads=3, kv_heads=1, layers=2), replace(TINY, width=80, heads=5, kv_heads=1)
    return [str(build_sharp(tmp_path_factory.mktemp("teacher"), size)) for size in sizes]


@pytest.fixture(scope="module")
def groups(tiny_policy, data):
    """Three groups of two answers, the last one of another data_source."""
    encoder, generator = Encoder(tiny_policy.tokenizer, tiny_policy.family, 1, 128), torch.Generator().manual_seed(0)
    found = []
    for number, lengths in enumerate(LENGTHS):
        task = open_tasks(data / "train.parquet")[number]
        ids = [tuple(torch.randint(300, (length,), generator=generator).tolist()) for length in lengths]
        answers = tuple(Answer.sampled(own, (-1.0,) * len(own), "", "stop", 0) for own in ids)
        task = replace(task, source="geometry" if number == 2 else "shapes")
        found.append(Group(task, encoder(task), answers, (Score(1.0), Score(0.0))))
    return found


def worker_of(folder, algorithm, budget=4096):
    teacher = algorithm.teacher
    worker = Worker(
        ModelSettings(path=str(folder)), OptimSettings(lr=1.0), budget, temperature=TEMPERATURE, teacher=teacher
    )
    for policy in (worker.policy, *(module.policy for module in worker.teachers._modules.values())):
        policy.model.double()
    return worker


def algorithm_of(name="distill", **teacher):
    return build_algorithm(AlgorithmSettings(name=name, teacher=TeacherSettings(**teacher)), 16)


def learned(worker, groups, algorithm):
    """The gradient of a step, and its metrics, means over tokens."""
    batch, metrics = compute_advantages(LocalWorkers(worker), groups, algorithm, 1, Costs(0.01, 2.0))
    rows = [*batch.policy_rows.values()]
    totals = Totals(sum(map(sum, LENGTHS)), 6, 3)
    parts = worker.policy_gradients(rows, algorithm.loss, totals)
    gradient = gradient_of(worker.policy)
    sums = [sum(part["loss/divergence"][i] for part in parts if "loss/divergence" in part) for i in (0, 1)]
    return gradient, {**metrics, **({"loss/divergence": sums[0] / sums[1]} if sums[1] else {})}


def gradient_of(policy):
    found = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for _, p in policy.model.named_parameters()]
    policy.model.zero_grad(set_to_none=True)
    return torch.cat(found)


def logits_of(policy, group, answer):
    """Scaled logits before each token of one answer, which stands alone behind its prompt."""
    batch = pack([PackedGroup(group.prompt, (answer,))])
    hidden = hidden_states(policy, batch)[batch.source_M]
    return hidden @ policy.part("head").weight.T / TEMPERATURE


def written_out(policy, teachers, groups, kind, beta=0.5, top_k=None):
    """The mean over all tokens of the divergence, with all logits in memory and every answer by itself."""
    total = 0.0
    for group, teacher in zip(groups, teachers, strict=True):
        for answer in group.answers:
            p = logits_of(policy, group, answer).softmax(-1)
            with torch.no_grad():
                q = logits_of(teacher, group, answer).softmax(-1)
            if top_k is not None:
                index = q.topk(top_k).indices
                p, q = (one.gather(1, index) for one in (p, q))
                p, q = (torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (p, q))
            m = beta * q + (1 - beta) * p
            pairs = {"forward_kl": [(q, p, 1)], "reverse_kl": [(p, q, 1)]}.get(kind, [(q, m, beta), (p, m, 1 - beta)])
            total = total + sum(share * (a * (a / b).log()).sum() for a, b, share in pairs)
    return total / sum(map(sum, LENGTHS))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_loss_is_the_mean_divergence_from_the_teacher_of_each_row(tiny_folder, teachers, groups, kind, top_k):
    algorithm = algorithm_of(
        path=teachers[0], sources={"geometry": teachers[1]}, divergence=kind, top_k=top_k, coefficient=0.5
    )
    worker = worker_of(tiny_folder, algorithm)
    first, second = (load_policy(path) for path in teachers)
    for policy in (first, second):
        policy.model.double()
    wanted = written_out(worker.policy, (first, first, second), groups, kind, top_k=top_k)
    (0.5 * wanted).backward()
    true_gradient = gradient_of(worker.policy)
    gradient, metrics = learned(worker, groups, algorithm)
    assert metrics["loss/divergence"] == pytest.approx(wanted.item(), rel=1e-9)
    assert (gradient - true_gradient).norm() <= 1e-6 * true_gradient.norm()
    worker.token_budget = 50  # one group a row, and its answers apart
    split, _ = learned(worker, groups, algorithm)
    assert (split - true_gradient).norm() <= 1e-6 * true_gradient.norm()


def test_the_advantage_is_how_much_more_probable_the_teacher_finds_a_token(tiny_folder, teachers, groups):
    sources = {"geometry": teachers[1]}
    algorithm = algorithm_of(path=teachers[0], sources=sources, term="advantage", coefficient=0.5)
    worker = worker_of(tiny_folder, algorithm)
    batch, metrics = compute_advantages(LocalWorkers(worker), groups, algorithm, 1, Costs(0.01, 2.0))
    gaps = []
    for number, (group, path) in enumerate(zip(groups, (teachers[0], teachers[0], teachers[1]), strict=True)):
        teacher = load_policy(path)
        teacher.model.double()
        for policy, sign in ((worker.policy, 1), (teacher, -1)):
            found = []
            for answer in group.answers:
                logp = logits_of(policy, group, answer).log_softmax(-1)
                found.append(logp.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0].detach())
            gaps.append(sign * torch.cat(found))
        gap_M = gaps[-2] + gaps[-1]
        torch.testing.assert_close(batch.policy_rows[number].advantage.double(), -0.5 * gap_M, rtol=1e-5, atol=1e-6)
        assert batch.policy_rows[number].teacher is None
    assert metrics["reward/teacher_kl"] == pytest.approx(torch.cat(gaps).sum().item() / sum(map(sum, LENGTHS)))


@pytest.mark.parametrize("term", ["loss", "advantage"])
def test_a_teacher_stands_beside_the_rewards_of_another_algorithm(tiny_folder, teachers, groups, term):
    mixed = algorithm_of("grpo", path=teachers[0], term=term)
    alone = [algorithm_of(path=teachers[0], term=term), build_algorithm(AlgorithmSettings(name="grpo"), 16)]
    worker = worker_of(tiny_folder, mixed)
    expected = torch.zeros(())
    for one, weighting in zip(alone, ("distill", "grpo"), strict=True):
        aggregate = {"loss": {"aggregate": "token-mean"}}
        settings = AlgorithmSettings(name=weighting, teacher=one.teacher, **aggregate)
        own = worker_of(tiny_folder, mixed) if one.teacher is not None else worker_without(tiny_folder)
        expected = expected + learned(own, groups, build_algorithm(settings, 16))[0]
    settings = AlgorithmSettings(name="grpo", teacher=mixed.teacher, loss={"aggregate": "token-mean"})
    found, _ = learned(worker, groups, build_algorithm(settings, 16))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def worker_without(folder):
    worker = Worker(ModelSettings(path=str(folder)), OptimSettings(lr=1.0), 4096, temperature=TEMPERATURE)
    worker.policy.model.double()
    return worker


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(tiny_folder, groups):
    algorithm = algorithm_of(path=str(tiny_folder))
    gradient, metrics = learned(worker_of(tiny_folder, algorithm), groups, algorithm)
    assert metrics["loss/divergence"] == pytest.approx(0.0, abs=1e-9)
    assert gradient.norm() < 1e-6


# ------------------------------------------------------------------------------------------------------------ a run


def settings_of(folder, model, data, teacher, **changes):
    algorithm = {"name": "distill", "teacher": {"path": str(teacher)}}
    changes = {"train": {"steps": 4, "save_every": 2}, "eval": {"every": 0}, **changes}
    return rl_settings(folder, model, data, algorithm=algorithm, optim={"lr": 3e-3}, **changes)


def test_a_run_comes_nearer_to_its_teacher_and_resumes_where_it_was(tmp_path, tiny_folder, teachers, data):
    whole = run_rl(settings_of(tmp_path / "whole", tiny_folder, data, teachers[0]))
    found = [record["loss/divergence"] for record in metrics_of(whole)]
    assert found[-1] < 0.9 * found[0]
    assert all(record["optim/updates"] == 1 for record in metrics_of(whole))
    told = whole.warnings.read_text().splitlines() if whole.warnings.exists() else []
    assert {json.loads(line)["name"] for line in told} <= {"truncated"}  # and nothing of equal rewards
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "while it writes a checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_rl(settings_of(tmp_path / "run", tiny_folder, data, teachers[0]))
    assert_equal(run_rl(settings_of(tmp_path / "run", tiny_folder, data, teachers[0])), whole)


def test_one_answer_to_a_prompt_is_enough(tmp_path, tiny_folder, teachers, data):
    settings = settings_of(
        tmp_path / "run", tiny_folder, data, teachers[0], rollout={"samples": 1}, train={"steps": 1, "save_every": 0}
    )
    assert metrics_of(run_rl(settings))[0]["optim/updates"] == 1


def test_the_checkpoint_of_a_run_can_teach(tmp_path, tiny_folder, teachers, data):
    train = {"steps": 1, "save_every": 1}
    run = run_rl(settings_of(tmp_path / "run", tiny_folder, data, teachers[0], train=train))
    settings = settings_of(tmp_path / "next", tiny_folder, data, run.checkpoints / "latest")
    teacher = prepared(settings).algorithm.teacher
    assert Path(teacher.path).parent == run.path / "exports"
    assert load_policy(teacher.path).family == load_policy(str(run.final)).family


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(settings):
    with pytest.raises(ConfigError) as caught:
        check_run(build_algorithm(settings.algorithm, 8), settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(folder, source, name, change):
    """A copy of a model folder with one of its small files changed."""
    shutil.copytree(source, folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_a_teacher_with_another_tokenizer_is_refused_by_the_first_token_that_differs(tmp_path, tiny_folder, data):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]

    other = changed(tmp_path / "other", tiny_folder, "tokenizer.json", swap)
    text = refusal(settings_of(tmp_path / "run", tiny_folder, data, other))
    assert f"the tokenizer of {other} is another than the model's" in text
    assert "'!' is number 1 and 0" in text


def test_a_teacher_that_sees_images_otherwise_is_refused(tmp_path, tiny_folder, data):
    other = changed(
        tmp_path / "other", tiny_folder, "preprocessor_config.json", lambda c: c.update(image_mean=[0.5, 0.5, 0.5])
    )
    text = refusal(settings_of(tmp_path / "run", tiny_folder, data, other))
    assert f"{other} sees images otherwise than the model: mean is (0.5, 0.5, 0.5) and (0.485" in text


def test_a_teacher_of_rows_that_are_not_there_is_refused(tmp_path, tiny_folder, teachers, data):
    settings = settings_of(tmp_path / "run", tiny_folder, data, teachers[0])
    teacher = settings.algorithm.teacher.model_copy(update={"sources": {"geo3k": teachers[1]}})
    algorithm = settings.algorithm.model_copy(update={"teacher": teacher})
    with pytest.raises(
        ConfigError, match=r"algorithm.teacher.sources names 'geo3k', but no row of data.train has that"
    ):
        run_rl(settings.model_copy(update={"algorithm": algorithm}))


def test_a_model_that_would_learn_from_itself_alone_is_refused(tmp_path, tiny_folder, teachers, data):
    link = tmp_path / "link"
    link.symlink_to(tiny_folder)
    settings = settings_of(tmp_path / "run", tiny_folder, data, link)
    assert f"algorithm.teacher.path is {link}, the model itself, from which there is nothing to learn" in refusal(
        settings
    )
    teacher, model = settings.algorithm.teacher, settings.model
    require_another(teacher.model_copy(update={"sources": {"geometry": teachers[0]}}), model)
    require_another(teacher, model.model_copy(update={"quantization": "int8"}))
    require_another(teacher.model_copy(update={"dtype": "bfloat16"}), model)


@pytest.mark.parametrize("given", [{"term": "loss"}, {"term": "loss", "top_k": 4}, {"term": "advantage"}])
def test_a_teacher_whose_numbers_are_not_finite_ends_the_run(tmp_path, tiny_folder, teachers, data, given):
    damaged = shutil.copytree(teachers[0], tmp_path / "damaged")
    weights = load((damaged / "model.safetensors").read_bytes())
    for tensor in (tensor for name, tensor in weights.items() if "gate_proj" in name or "up_proj" in name):
        tensor.mul_(1e30)  # finite, and the product of what they compute is not
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    settings = settings_of(tmp_path / "run", tiny_folder, data, damaged)
    teacher = TeacherSettings(path=str(damaged), **given)
    settings = settings.model_copy(update={"algorithm": settings.algorithm.model_copy(update={"teacher": teacher})})
    with pytest.raises(DataError, match=r"algorithm.teacher: .*damaged computes numbers that are not finite"):
        run_rl(settings)


def test_distillation_without_a_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm distill learns from a teacher, and there is none: set algorithm"):
        build_algorithm(AlgorithmSettings(name="distill"), 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beta": 0.3}, "algorithm.teacher.beta is 0.3, but the divergence is reverse_kl"),
        ({"term": "advantage", "divergence": "forward_kl"}, "algorithm.teacher.divergence is forward_kl, but term="),
        ({"term": "advantage", "top_k": 8}, "algorithm.teacher.top_k is 8, but term=advantage compares sampled tokens"),
    ],
)
def test_settings_of_a_teacher_that_would_not_act_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        TeacherSettings(path="demo", **given)
