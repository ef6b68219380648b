from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from foveate.errors import EngineError
from foveate.records import SamplingParams
from foveate.rollout.native import sampling as module
from foveate.rollout.native.sampling import draw, uniforms

NOTHING = torch.tensor([], dtype=torch.int64)
PROBS = torch.tensor([0.30, 0.05, 0.25, 0.20, 0.12, 0.08])


def draws(count, sampling, logits=None, banned=NOTHING):
    """`count` tokens drawn at evenly spaced uniforms, which makes frequencies exact to 1 / count."""
    logits = PROBS.log() if logits is None else logits
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token, logp = draw(logits.expand(count, -1), uniform, sampling, banned)
    return token, logp


def shares(token):
    return torch.bincount(token, minlength=6) / len(token)


def test_uniforms_depend_on_seed_answer_and_place_alone():
    assert uniforms(3, 1, 50)[:20].equal(uniforms(3, 1, 20))
    assert not uniforms(3, 1, 20).equal(uniforms(3, 2, 20))
    assert not uniforms(3, 1, 20).equal(uniforms(4, 1, 20))
    assert not uniforms(1 << 40, 1, 20).equal(uniforms(0, 1, 20))


def test_uniforms_are_uniform():
    values = torch.cat([uniforms(seed, answer, 100) for seed in range(20) for answer in range(5)])
    counts = torch.histc(values.float(), bins=20, min=0, max=1)
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_tokens_are_drawn_in_proportion_to_their_probability():
    token, _ = draws(10_000, SamplingParams())
    torch.testing.assert_close(shares(token), PROBS, atol=2e-4, rtol=0)


def test_seeded_draws_follow_the_distribution():
    uniform = torch.cat([uniforms(seed, 0, 50) for seed in range(200)])
    token, _ = draw(PROBS.log().expand(len(uniform), -1), uniform, SamplingParams(), NOTHING)
    expected = PROBS * len(uniform)
    assert ((torch.bincount(token, minlength=6) - expected) ** 2 / expected).sum() < 20.5  # 5 degrees, p = 0.001


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits_and_the_log_prob_is_of_that_distribution(temperature):
    token, logp = draws(10_000, SamplingParams(temperature=temperature))
    expected = (PROBS.log() / temperature).log_softmax(-1)
    torch.testing.assert_close(shares(token), expected.exp(), atol=2e-4, rtol=0)
    torch.testing.assert_close(logp, expected[token])


def test_top_k_keeps_the_k_most_probable():
    token, _ = draws(10_000, SamplingParams(top_k=3))
    kept = torch.tensor([0.30, 0, 0.25, 0.20, 0, 0])
    torch.testing.assert_close(shares(token), kept / kept.sum(), atol=2e-4, rtol=0)


def test_top_k_of_one_is_greedy():
    logits = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    uniform = uniforms(0, 0, 64)
    one, _ = draw(logits, uniform, SamplingParams(top_k=1), NOTHING)
    greedy, _ = draw(logits, uniform, SamplingParams(temperature=0), NOTHING)
    assert one.equal(greedy)
    assert greedy.equal(logits.argmax(-1))


def test_top_p_keeps_the_smallest_set_that_holds_the_share():
    for top_p, kept in (
        (0.5, [0.30, 0, 0.25, 0, 0, 0]),
        (0.6, [0.30, 0, 0.25, 0.20, 0, 0]),
        (0.0, [1.0, 0, 0, 0, 0, 0]),
    ):
        token, _ = draws(10_000, SamplingParams(top_p=top_p))
        kept = torch.tensor(kept)
        torch.testing.assert_close(shares(token), kept / kept.sum(), atol=2e-4, rtol=0)


def test_top_p_is_a_share_of_what_top_k_left():
    token, _ = draws(10_000, SamplingParams(top_k=3, top_p=0.7))
    assert set(token.tolist()) == {0, 2}  # of 0.30, 0.25, 0.20 the first two hold 0.73


def test_top_p_over_a_wide_vocabulary_equals_a_full_sort():
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(1))
    logits[0] *= 8  # a row whose nucleus is small beside rows whose nucleus is most of the vocabulary
    uniform = uniforms(0, 0, 8)
    token, _ = draw(logits, uniform, SamplingParams(top_p=0.9), NOTHING)
    alone = [draw(logits[i : i + 1], uniform[i : i + 1], SamplingParams(top_p=0.9), NOTHING)[0] for i in range(8)]
    assert token.equal(torch.cat(alone))
    for row, chosen in zip(logits.double().softmax(-1), token, strict=True):
        assert row[row > row[chosen]].sum() < 0.9


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=4, top_p=0.9)]
)
def test_banned_tokens_are_never_drawn_however_probable(sampling):
    banned = torch.tensor([0, 5])
    logits = PROBS.log().index_add(0, banned, torch.tensor([1e4, 1e4]))
    token, logp = draws(2000, sampling, logits, banned)
    assert not set(token.tolist()) & {0, 5}
    assert logp.isfinite().all()
    assert (logp < -1000).all()  # the log-prob is of the distribution that the trainer sees, without bans


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.0), SamplingParams(top_k=9, top_p=0.8)])
@pytest.mark.parametrize("extra", [0.0, 40.0])
@pytest.mark.parametrize("few", [0, 4096])
def test_what_stands_behind_the_known_tokens_is_banned(sampling, extra, few, monkeypatch):
    monkeypatch.setattr(module, "_FEW", few)
    logits = torch.randn(500, 700, generator=torch.Generator().manual_seed(0))
    logits[:, 600:] += extra
    uniform, banned = uniforms(1, 0, 500), torch.tensor([3, 599])
    found = draw(logits, uniform, sampling, banned, 600)
    expected = draw(logits, uniform, sampling, torch.cat([banned, torch.arange(600, 700)]))
    torch.testing.assert_close(found, expected)


def test_a_token_without_probability_is_not_drawn_at_the_edges():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf"), float("-inf")]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-50], dtype=torch.float64)
    token, _ = draw(logits, uniform, SamplingParams(), NOTHING)
    assert token.tolist() == [1, 3, 3]


@pytest.mark.parametrize("banned", [NOTHING, torch.tensor([1, 2])])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("few", [4, 4096])
def test_logits_that_are_not_finite_are_an_error_of_the_model(few, value, banned, monkeypatch):
    monkeypatch.setattr(module, "_FEW", few)
    logits = torch.randn(3, 9)
    logits[1, 4] = value
    for sampling in (SamplingParams(1, 1), SamplingParams(1, 1, top_k=3), SamplingParams(1, 1, top_p=0.5)):
        with pytest.raises(EngineError, match=r"probabilities that are not finite \(NaN\)"):
            draw(logits, torch.full((3,), 0.5, dtype=torch.float64), sampling, banned)


def test_filters_leave_the_log_prob_that_of_the_whole_distribution():
    token, logp = draws(100, SamplingParams(top_k=2, top_p=0.6))
    torch.testing.assert_close(logp, PROBS.log()[token])
    token, logp = draws(10, SamplingParams(temperature=0))
    torch.testing.assert_close(logp, PROBS.log()[token])


def inverted(logits, uniform, banned):
    """The slow reference: the whole cumulative sum."""
    probs = logits.double().index_fill(1, banned, float("-inf")).softmax(-1)
    cumulative = probs.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


@pytest.mark.parametrize("width", [5, 256, 1000, 1024])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_sums_of_blocks_find_the_token_that_the_whole_cumulative_sum_finds(width, scale, monkeypatch):
    monkeypatch.setattr(module, "_FEW", 0)
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(2000, width, generator=generator) * scale
    banned = torch.tensor([1, width - 1])
    token, logp = draw(logits, uniforms(0, 0, 2000), SamplingParams(), banned)
    assert (token != inverted(logits, uniforms(0, 0, 2000), banned)).sum() <= 1  # a draw at the edge of two tokens
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, token[:, None])[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("few", [0, 4096])
def test_draws_at_the_end_of_a_block_and_of_all_find_tokens_with_probability(few, monkeypatch):
    monkeypatch.setattr(module, "_FEW", few)
    logits = torch.full((3, 600), float("-inf"))
    logits[:, [3, 255, 256, 511]] = 0.0
    for uniform, found in ((1 - 2.0**-50, 511), (0.75 - 2.0**-50, 256), (0.5, 256), (0.5 - 2.0**-50, 255), (0.0, 3)):
        token, _ = draw(logits, torch.full((3,), uniform, dtype=torch.float64), SamplingParams(), NOTHING)
        assert token.tolist() == [found] * 3


@pytest.mark.parametrize(("held", "cached"), [(1 << 24, 1 << 20), (7000, 3000), (1, 1)])
def test_rows_that_are_drawn_in_pieces_have_the_logits_of_all(monkeypatch, held, cached):
    monkeypatch.setattr(module, "_HELD", held)
    monkeypatch.setattr(module, "_CACHED", cached)
    kept = module.Logits()
    for rows in (5, 2, 9):
        hidden, weight = torch.randn(rows, 8), torch.randn(2500, 8)
        with torch.no_grad():
            found = torch.cat([piece.clone() for piece in kept.of(hidden, weight)])
        torch.testing.assert_close(found, hidden @ weight.T)


@torch.no_grad()
def test_logits_of_one_thread_stay_while_another_thread_computes_its_own():
    kept, (hidden, other) = module.Logits(), torch.randn(2, 3, 8)
    weight = torch.randn(2500, 8)
    own = next(kept.of(hidden, weight))
    with ThreadPoolExecutor(1) as threads:
        threads.submit(lambda: next(torch.no_grad()(kept.of)(other, weight))).result()
    torch.testing.assert_close(own, hidden @ weight.T)
