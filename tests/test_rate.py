"""A file that is made to take the bytes that it may: the law, where it does not hold, and whole runs."""

from __future__ import annotations

import json
import math

import pytest

import pack
from conftest import metrics, run, tiny_args
from tern.rate import fit
from tern.settings import ConfigError
from train_gpt import Int, main

WEIGHTS = 80_000  # so that twice the step is 10,000 bytes


def law(step: float) -> int:
    return round(100_000 - 10_000 * math.log2(step))


@pytest.mark.fast
@pytest.mark.parametrize(("step", "cap"), [(2.0, 85_000), (2.0, 99_000), (2.0, 90_100), (1.0, 91_000), (15.0, 99_500)])
def test_a_step_is_found_in_one_where_the_law_holds(step, cap):
    asked = []

    def size_of(step):
        asked.append(step)
        return law(step)

    tried = fit(size_of, step, 15.0, WEIGHTS, int(0.994 * cap), int(0.997 * cap), cap)
    assert 0.994 * cap - 1 <= tried[-1][1] <= cap and len(tried) <= 2
    assert asked == [step for step, _ in tried] and tried[0][0] == step


@pytest.mark.fast
def test_what_cannot_be_reached_ends_at_the_last_step():
    assert fit(law, 2.0, 15.0, WEIGHTS, 120_000, 121_000, 122_000)[-1] == (1.0, 100_000)
    assert fit(law, 2.0, 15.0, WEIGHTS, 40_000, 41_000, 42_000)[-1] == (15.0, law(15.0))


@pytest.mark.fast
def test_the_file_fits_where_a_step_saves_less_than_the_law_says():
    for slope in (200, 1000, 3000, 30_000):
        tried = fit(lambda step, slope=slope: round(100_000 - slope * math.log2(step)), 2.0, 15.0, WEIGHTS,
                    99_000, 99_200, 99_500)
        assert tried[-1][1] <= 99_500, slope


@pytest.mark.fast
@pytest.mark.parametrize("height", [100, 1300, 3000])
def test_sizes_that_go_by_stairs(height):
    """As where scales are rounded to steps of 9%: the best stair under the cap, and it is what was made last."""
    asked = []

    def size_of(step):
        asked.append(step)
        return 140_000 - height * math.floor(math.log2(step) * 10_000 / height)

    step, size = fit(size_of, 2.143, 15.0, WEIGHTS, 127_232, 127_616, 128_000)[-1]
    assert asked[-1] == step and size_of(step) == size
    assert min(127_232, 128_000 - height) <= size <= 128_000


@pytest.mark.parametrize("ratio", [0.98, 0.93, 1.05])
def test_a_run_is_never_over(data_dir, tmp_path, capsys, ratio):
    """The cap is so many times what the run packs to by itself."""
    own = ["--embed-format", "int5", "--int-step", 2.0, "--iterations", 12]
    assert main(tiny_args(data_dir, tmp_path, "--run-id", "free", *own)) == 0
    cap = round(ratio * (tmp_path / "free/model.tern").stat().st_size)
    wanted = [*own, "--cap-bytes", cap, "--fit-cap", 0.98]
    assert main(tiny_args(data_dir, tmp_path, "--run-id", "fitted", *wanted)) == 0
    final, size = metrics(tmp_path / "fitted", "final")[-1], (tmp_path / "fitted/model.tern").stat().st_size
    assert final["fits"] and size <= cap and final["bytes_model"] == size
    if ratio > 1:  # it fits as it is, and stays so: another step would cost more than bytes bring
        assert (tmp_path / "fitted/model.tern").read_bytes() == (tmp_path / "free/model.tern").read_bytes()
    else:
        assert size >= 0.95 * cap
    assert final["roundtrip_gap"] == 0 and final["logits_identical"]
    assert "fit         step of the embedding" in (tmp_path / "fitted/log.txt").read_text()
    (tmp_path / "fitted/model.tern").rename(tmp_path / "first.tern")
    assert main(tiny_args(data_dir, tmp_path, "--run-id", "fitted", *wanted, "--resume", "auto")) == 0
    assert (tmp_path / "fitted/model.tern").read_bytes() == (tmp_path / "first.tern").read_bytes()
    assert pack.main(["verify", str(tmp_path / "first.tern"), "--against", str(tmp_path / "fitted")]) == 0
    assert json.loads((tmp_path / "fitted/score.json").read_text())["artifact"]["bytes"] == size


def test_ranks_take_the_same_step(data_dir, tmp_path):
    own = ["--embed-format", "int5", "--int-step", 2.0, "--iterations", 6, "--cap-bytes", 7_600, "--fit-cap", 0.98]
    done = run(*tiny_args(data_dir, tmp_path, *own), ranks=2)
    assert done.returncode == 0, done.stderr
    final = metrics(tmp_path / "tiny_seed1337", "final")[-1]
    assert final["fits"] and final["roundtrip_gap"] == 0 and 0.95 * 7_600 < final["bytes_model"] <= 7_600


@pytest.mark.fast
@pytest.mark.parametrize("step", [0.0, 0.99, 1e9, math.nan, math.inf])
def test_a_step_that_no_integers_have_is_refused(step):
    with pytest.raises(ConfigError, match="a step of 1 to 127"):
        Int(5, step=step)
