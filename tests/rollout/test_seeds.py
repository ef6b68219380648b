from __future__ import annotations

from foveate.rollout.seeds import seed_of


def test_a_seed_depends_on_every_part_and_on_the_purpose():
    seeds = [seed_of(purpose, a, b) for purpose in ("train", "eval") for a in range(8) for b in range(8)]
    seeds += [seed_of(purpose, a, b, 0) for purpose in ("train", "eval") for a in range(8) for b in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_everywhere():
    assert seed_of("train", 0, 1, 2) == 172699531396876328
