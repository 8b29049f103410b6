"""A file that is made to take the bytes that it may: rare tokens' steps, the moments of training, the last bytes."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pack
from conftest import metrics, run, tiny_args, tiny_trainer
from tern.processes import Ranks
from tern.rate import DOUBLINGS, MOMENTS, NEAR, RateControl, rarity
from tern.settings import ConfigError
from train_gpt import Int, main

ROWS, DIM, LIMIT = 200, 16, 15
BITS = ROWS * DIM / 8  # bytes of a bit for each weight
COUNTS = np.arange(ROWS) ** 2


class Packer:
    """A file whose size follows the law: BITS bytes less for each doubling of all steps."""

    def __init__(self, cap: int, bytes_at_one: int, share: float = 0.99, step: float = 2.0, rare: float = 0.0):
        self.bytes_at_one, self.asked = bytes_at_one, []
        config = SimpleNamespace(fit_cap=share, int_step=step, rare_step=rare)
        self.rate = RateControl(config, cap, LIMIT, COUNTS, ROWS * DIM, Ranks(), dict, self.size, torch.device("cpu"))

    def size(self, model: dict) -> int:
        bits = float(self.rate.steps.log2().mean())
        self.asked.append(round(self.bytes_at_one - BITS * bits))
        return self.asked[-1]


@pytest.mark.fast
def test_steps_of_rare_tokens_are_larger_and_their_mean_stays():
    assert (rarity(COUNTS, 0.0) == 1).all()
    factors = rarity(COUNTS, 0.25)
    assert (np.diff(factors) < 0).all() and np.log(factors).mean() == pytest.approx(0, abs=1e-12)
    assert factors[0] / factors[10] == pytest.approx(101**0.25)
    rate = Packer(10**6, 1000, rare=0.5).rate
    assert rate.steps.min() == 1 and rate.steps.max() <= LIMIT and rate.steps.shape == (ROWS, 1)


@pytest.mark.fast
def test_integers_take_each_row_s_own_step():
    latent = torch.randn(2, 3, 64)
    alike, own = (Int(5, 32, "bf16", 2.0, steps).quantize(latent) for steps in (None, torch.tensor([[2.0], [2], [4]])))
    assert torch.equal(alike.codes[:, :2], own.codes[:, :2]) and torch.equal(alike.scales[:, :2], own.scales[:, :2])
    assert torch.equal(2 * alike.scales[:, 2], own.scales[:, 2])
    assert Int(5, steps=torch.ones(3, 1)).spec() == Int(5).spec(), "the file does not tell"


@pytest.mark.fast
@pytest.mark.parametrize("off", [0.97, 0.985, 1.03, 1.07])
def test_the_size_that_packing_finds_moves_the_step_a_while_later(off):
    cap = 10_000
    packer = Packer(cap, round(off * 0.99 * cap) + round(BITS))  # at step 2 so far off the aim
    rate, said = packer.rate, {}
    for percent in range(100):
        before = rate.step
        lines = rate.follow(percent / 100, 0.5)
        if lines:
            said[percent] = lines[0]
        assert bool(lines) or rate.step == before, "no change that is not said"
    assert list(said) == [52, 77, 92] and len(MOMENTS) == 3, "packed at 50, 75 and 90%, beside training until 2% later"
    assert 0.985 * 0.99 * cap <= packer.size({}) <= 1.002 * 0.99 * cap
    assert rate.step == pytest.approx(2 * 2 ** ((off - 1) * 0.99 * cap / BITS), rel=0.01)
    assert f"margin {cap - packer.asked[0]:,}" in said[52]


@pytest.mark.fast
def test_small_misses_are_left_alone_and_what_cannot_be_reached_ends_at_the_edge():
    for at_two, step in ((9_900, 2.0), (9_915, 2.0), (5_000, 1.0), (30_000, LIMIT)):
        rate = Packer(10_000, at_two + round(BITS)).rate
        for percent in range(55):
            rate.follow(percent / 100, 0.5)
        assert rate.step == step


@pytest.mark.fast
def test_a_size_that_is_on_its_way_survives_a_checkpoint():
    packer, again = Packer(10_000, 11_000), Packer(10_000, 11_000)
    packer.rate.follow(0.5, 0.5)
    again.rate.restore(json.loads(json.dumps(packer.rate.state())))
    for rate in (packer.rate, again.rate):
        assert rate.follow(0.51, 0.5) == [] and len(rate.follow(0.52, 0.5)) == 1
    assert again.asked == [] and again.rate.step == packer.rate.step != 2.0
    for state in ({}, {"step": 0.0, "done": 1, "waiting": True, "found": 3}, {"step": 2, "done": 9, "waiting": 0,
                                                                             "found": 3}):
        with pytest.raises((KeyError, ValueError)):
            again.rate.restore(state)


@pytest.mark.fast
@pytest.mark.parametrize("over", [1, 20, 80, 300, 900, 5_000])
def test_only_what_must_is_rounded_anew_after_training_rare_tokens_first(over):
    packer = Packer(20_000, 20_000 + over + round(BITS))
    before, refreshed = packer.rate.steps.clone(), []
    said = packer.rate.trim(torch.full((ROWS,), 0.1), lambda: refreshed.append(packer.rate.steps.clone()))
    doublings = (packer.rate.steps / before).log2()[:, 0]
    assert torch.equal(refreshed[-1], packer.rate.steps) and len(refreshed) < 20
    if over < 2 * BITS:
        assert NEAR * 20_000 <= packer.asked[-1] <= 20_000 and f"{over:,} over" in said[0]
        assert (doublings[1:] <= doublings[:-1]).all(), "of two rows the rarer one"
        assert f"{int((doublings > 0).sum()):,} rare" in said[0]
    else:  # nothing helps: as small as it gets
        assert (doublings == int(math.log2(LIMIT / 2))).all() and DOUBLINGS >= 2


@pytest.mark.fast
def test_nothing_is_rounded_anew_where_the_file_fits_or_may_not_be_touched():
    for packer in (Packer(20_000, 20_000), Packer(20_000, 30_000, share=0.0)):
        before = packer.rate.steps.clone()
        assert packer.rate.trim(torch.ones(ROWS), lambda: None) == [] and torch.equal(packer.rate.steps, before)


@pytest.mark.fast
def test_what_is_as_coarse_as_it_may_be_stays_over_and_says_so():
    packer = Packer(20_000, 30_000, step=float(LIMIT))
    said = packer.rate.trim(torch.ones(ROWS), lambda: None)
    assert "0 rare tokens" in said[0] and (packer.rate.steps == LIMIT).all()


@pytest.fixture(scope="module")
def free(data_dir, tmp_path_factory) -> tuple[list, int]:
    """(settings of a run, what it packs to by itself)."""
    own = ["--embed-format", "int5", "--int-step", 2.0, "--rare-step", 0.2, "--iterations", 40, "--eval-stride", 0]
    folder = tmp_path_factory.mktemp("free")
    assert main(tiny_args(data_dir, folder, "--run-id", "free", *own)) == 0
    return own, (folder / "free/model.tern").stat().st_size


@pytest.mark.parametrize("ratio", [0.93, 1.01])
def test_a_run_is_never_over_and_fills_its_cap(free, data_dir, tmp_path, ratio):
    """The cap is so many times what the run packs to by itself."""
    own, size = free
    cap = round(ratio * size)
    assert main(tiny_args(data_dir, tmp_path, "--run-id", "fitted", *own, "--cap-bytes", cap, "--fit-cap", 0.99)) == 0
    final, size = metrics(tmp_path / "fitted", "final")[-1], (tmp_path / "fitted/model.tern").stat().st_size
    assert final["fits"] and 0.97 * cap <= size <= cap and final["bytes_model"] == size
    assert final["roundtrip_gap"] == 0 and final["logits_identical"]
    assert "at moment 3 of 3" in (tmp_path / "fitted/log.txt").read_text()


def test_waiting_for_the_packer_is_no_step_s_time(data_dir, tmp_path, monkeypatch):
    """A run ends when its next step, as long as the last, would pass its seconds: a wait would end it early."""
    trainer = tiny_trainer(data_dir, tmp_path, "--embed-format", "int5", "--iterations", 3)
    monkeypatch.setattr(trainer.rate, "follow", lambda *a: time.sleep(1.5) or [])
    trainer.train()
    assert trainer.step == 3 and trainer.elapsed > 3 and trainer.step_seconds < 1.5
    trainer.folder.close()


def test_a_file_that_is_over_after_training_is_trimmed_the_same_every_time(data_dir, tmp_path):
    """A cap 2% below what the run would pack to, and an aim far above it: only the end can mend that."""
    own = ["--embed-format", "int5", "--int-step", 2.0, "--iterations", 12, "--eval-stride", 0]
    assert main(tiny_args(data_dir, tmp_path, "--run-id", "free", *own)) == 0
    cap = round(0.98 * (tmp_path / "free/model.tern").stat().st_size)
    wanted = [*own, "--cap-bytes", cap, "--fit-cap", 1.0, "--warmdown-frac", 0.01]
    assert main(tiny_args(data_dir, tmp_path, "--run-id", "fitted", *wanted)) == 0
    final, size = metrics(tmp_path / "fitted", "final")[-1], (tmp_path / "fitted/model.tern").stat().st_size
    assert final["fits"] and 0.97 * cap <= size <= cap and final["roundtrip_gap"] == 0
    assert "rounded more coarsely" in (tmp_path / "fitted/log.txt").read_text()
    (tmp_path / "fitted/model.tern").rename(tmp_path / "first.tern")
    assert main(tiny_args(data_dir, tmp_path, "--run-id", "fitted", *wanted, "--resume", "auto")) == 0
    assert (tmp_path / "fitted/model.tern").read_bytes() == (tmp_path / "first.tern").read_bytes()
    assert pack.main(["verify", str(tmp_path / "first.tern"), "--against", str(tmp_path / "fitted")]) == 0
    assert json.loads((tmp_path / "fitted/score.json").read_text())["artifact"]["bytes"] == size


def test_ranks_take_the_same_steps(data_dir, tmp_path):
    own = ["--embed-format", "int5", "--int-step", 2.0, "--iterations", 40, "--cap-bytes", 7_600, "--fit-cap", 0.98,
           "--eval-stride", 0]
    done = run(*tiny_args(data_dir, tmp_path, *own), ranks=2)
    assert done.returncode == 0, done.stderr
    final = metrics(tmp_path / "tiny_seed1337", "final")[-1]
    assert final["fits"] and final["roundtrip_gap"] == 0 and 0.95 * 7_600 < final["bytes_model"] <= 7_600


@pytest.mark.fast
@pytest.mark.parametrize("step", [0.0, 0.99, 1e9, math.nan, math.inf])
def test_a_step_that_no_integers_have_is_refused(step):
    with pytest.raises(ConfigError, match="a step of 1 to 127"):
        Int(5, step=step)
