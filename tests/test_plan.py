"""The planner: its sums, its searches, and its prediction against what a model of that shape packs to."""

import math
from dataclasses import replace

import pytest
import torch

import pack
from conftest import run
from records import plan
from tern import source
from train_gpt import GPT, PRESETS, Config, Latents, artifact_meta, param_shapes, predicted_bytes


def config_of(preset: str, **change) -> Config:
    return Config(**PRESETS[preset] | change)


def packed(config: Config) -> int:
    """Bytes of a model with normal latents in every tensor, as bench/packing.py synthetic makes it."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.1 if p.ndim == 2 else 1 + torch.randn(p.shape) * 0.3)
    order = [name for name, _ in model.named_parameters()]
    return len(pack.encode_artifact(Latents(model, config).pack(order), artifact_meta(config)))


@pytest.mark.fast
def test_parts_are_all_parameters():
    config = config_of("cpu_10min_128kb")
    parameters = sum(map(math.prod, param_shapes(config).values()))
    parts = predicted_bytes(config)
    assert sum(n for part, (_, n, _) in parts.items() if part.endswith("codes")) == parameters
    # One per 128 inputs of each row: queries, keys, values, the output, and the MLP's two, whose second has wide rows.
    layer = 128 + 64 + 64 + 128 + config.hidden_dim + 128 * -(-config.hidden_dim // 128)
    assert parts["matrices scales"][1] == config.num_layers * layer + 2 * config.copy_dim
    assert parts["embedding scales"][1] == 1024


def test_prediction_of_a_ternary_model_is_within_one_percent():
    """A small sister of golf16mb: the large ones are bench/packing.py synthetic's (LOG.md)."""
    config = config_of("golf16mb", num_layers=2, model_dim=256, num_heads=4, num_kv_heads=2, mlp_hidden=768,
                       vocab_size=1024, embed_format="ternary", rare_step=0.0, fit_cap=0.0)
    assert plan.model_bytes(config) == pytest.approx(packed(config), rel=0.01)


@pytest.mark.parametrize("preset", ["cpu_10min_128kb", "golf16mb"])
def test_the_largest_fits_and_the_next_does_not(preset, capsys):
    config = config_of(preset)
    assert plan.main(["--preset", preset]) == 0
    text = capsys.readouterr().out
    code = source.code_bytes() if config.cap_counts_code else 0
    for name, (what, step) in plan.LARGEST.items():
        row = next(line for line in text.splitlines() if line.startswith(f"  {what} "))
        value = int(row.removeprefix(f"  {what}").split()[0].replace(",", ""))
        size = plan.model_bytes(replace(config, **{name: value})) + code
        assert f"{size:,} bytes" in row and size <= config.cap_bytes
        assert plan.model_bytes(replace(config, **{name: value + step})) + code > config.cap_bytes


def test_what_the_command_says():
    """pr367: how many more parameters fit; tiny under 3,000 bytes: that nothing does; a wrong setting: one line."""
    done = run("--preset", "pr367", "--scale-dtype", "log7", "--group-size", 128, program="records/plan.py")
    assert done.returncode == 0 and "nothing was trained" in done.stdout, done.stderr
    assert "measured on trained artifacts" in done.stdout and f"{source.code_bytes():,}\n" in done.stdout
    more = next(line for line in done.stdout.splitlines() if "against PR 367's 67,239,936" in line)
    assert int(more.split()[0].replace(",", "")) > 5_000_000
    wrong = run("--preset", "tiny", "--num-heads", 5, program="records/plan.py")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.startswith("error: num_heads=5")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.fast
def test_over_the_cap_and_nothing_that_fits():
    text = plan.report("tiny", config_of("tiny", cap_bytes=3000))
    assert "OVER by" in text and "none: even" in text


@pytest.mark.fast
def test_largest():
    for limit in (0, 1, 2, 7, 8, 9, 64, 1000):
        assert plan.largest(lambda value, limit=limit: value <= limit, 5, 1) == limit
        assert plan.largest(lambda value, limit=limit: value <= limit, 5, 8) == limit // 8 * 8
    assert 4000 <= plan.largest(lambda value: True, 8, 8) <= 16384, "it gives up where everything fits"
