"""The planner: its sums, its searches, and its prediction against what a model of that shape packs to."""

from dataclasses import replace

import pytest
import torch

import pack
import plan
import train_gpt
from train_gpt import GPT, PRESETS, Config, artifact_meta, format_of, predicted_bytes, to_pack


def config_of(preset: str, **change) -> Config:
    return Config(**PRESETS[preset] | change)


def packed(config: Config) -> int:
    """Bytes of a model with normal latents in every tensor, as bench/packing.py synthetic makes it."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in GPT(config).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        fmt = format_of(config, name, len(shape))
        latent = torch.randn(shape) * 0.1 if len(shape) == 2 else 1 + torch.randn(shape) * 0.3
        tensors[name] = to_pack(fmt.quantize(latent), fmt)
    return len(pack.encode_artifact(tensors, artifact_meta(config)))


def test_parts_are_all_parameters():
    config = config_of("cpu_10min_128kb")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    parts = predicted_bytes(config)
    assert sum(n for part, (_, n, _) in parts.items() if part.endswith("codes")) == parameters
    # One per 128 inputs of each row: queries, keys, values, the output, and the MLP's two, whose second has wide rows.
    layer = 128 + 64 + 64 + 128 + config.hidden_dim + 128 * -(-config.hidden_dim // 128)
    assert parts["matrices scales"][1] == 4 * layer and parts["embedding scales"][1] == 1024


def test_prediction_of_a_ternary_model_is_within_one_percent():
    """A small sister of golf16mb: the large ones are bench/packing.py synthetic's (LOG.md)."""
    config = config_of("golf16mb", num_layers=2, model_dim=256, num_heads=4, num_kv_heads=2, mlp_hidden=768,
                       vocab_size=1024)
    assert plan.model_bytes(config) == pytest.approx(packed(config), rel=0.01)


@pytest.mark.parametrize("preset", ["cpu_10min_128kb", "golf16mb"])
def test_the_largest_fits_and_the_next_does_not(preset, capsys):
    config = config_of(preset)
    assert train_gpt.main(["--plan", "--preset", preset]) == 0
    text = capsys.readouterr().out
    code = plan.bundle_bytes() if config.cap_counts_code else 0
    for name, (what, step) in plan.LARGEST.items():
        row = next(line for line in text.splitlines() if line.startswith(f"  {what} "))
        value = int(row.removeprefix(f"  {what}").split()[0].replace(",", ""))
        size = plan.model_bytes(replace(config, **{name: value})) + code
        assert f"{size:,} bytes" in row and size <= config.cap_bytes
        assert plan.model_bytes(replace(config, **{name: value + step})) + code > config.cap_bytes


def test_pr367_says_how_many_more_parameters_fit(capsys):
    assert train_gpt.main(["--plan", "--preset", "pr367", "--scale-dtype", "log7", "--group-size", "128"]) == 0
    text = capsys.readouterr().out
    more = next(line for line in text.splitlines() if "against PR 367's 67,239,936" in line)
    assert int(more.split()[0].replace(",", "")) > 5_000_000
    assert "nothing was trained" in text and "measured on trained artifacts" in text


def test_over_the_cap_and_nothing_that_fits(capsys):
    assert train_gpt.main(["--plan", "--preset", "tiny", "--cap-bytes", "3000"]) == 0
    text = capsys.readouterr().out
    assert "OVER by" in text and "none: even" in text


def test_a_wrong_setting_is_one_error_line(capsys):
    assert train_gpt.main(["--plan", "--preset", "tiny", "--num-heads", "5"]) == 2
    assert capsys.readouterr().err.startswith("error: num_heads=5")


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 8, 9, 64, 1000])
def test_largest(limit):
    assert plan.largest(lambda value: value <= limit, 5, 1) == limit
    assert plan.largest(lambda value: value <= limit, 5, 8) == limit // 8 * 8


def test_largest_gives_up_where_everything_fits():
    assert 4000 <= plan.largest(lambda value: True, 8, 8) <= 16384
