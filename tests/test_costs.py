"""The cost model: state and what is sent against real tensors and hand counts, the time against what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import pack
from records import costs
from tern.processes import Ranks
from train_gpt import GPT, PRESETS, Config, Latents, Optimizer, format_of

pytestmark = pytest.mark.fast
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results" / "2026-11-26_h100"


def config_of(preset: str, **change) -> Config:
    return Config(**PRESETS[preset] | change)


def round_robin(config: Config, world: int) -> dict[str, int]:
    return {name: i % world for i, name in enumerate(costs.parameters(config))}


@pytest.fixture
def dealt(monkeypatch):
    """Owners that a hand count can follow."""
    monkeypatch.setattr(costs, "owners", round_robin)


# -- state, and what is sent --------------------------------------------------------------------------------------


def test_codes_scales_and_payload_are_those_of_real_tensors():
    for change in ({}, dict(group_size=0), dict(matrix_format="int4", scale_dtype="fp16"),
                   dict(embed_format="ternary", group_size=24), dict(matrix_format="bf16"),
                   dict(matrix_format="fp8", vector_format="fp8", embed_format="int8", scale_dtype="log4")):
        config = config_of("tiny", **change)
        for name, p in GPT(config).named_parameters():
            fmt, counted = format_of(config, name, p.ndim), costs.parameters(config)[name]
            stored = fmt.quantize(p.detach())
            scales = 0 if stored.scales is None else stored.scales.nbytes
            ternary = fmt.spec()["kind"] == "ternary"
            sent = len(pack.pack_base3(stored.codes.numpy())) if ternary else stored.codes.nbytes
            expected = (stored.codes.nbytes, scales, sent + scales)
            assert (counted.codes, counted.scales, counted.payload) == expected, (change, name)
            assert counted.size == p.numel()


def test_payload_by_hand():
    """80 x 32 ternary weights in groups of 32 with log7 scales; 64 tokens' bf16 embedding; 2 gains."""
    config = config_of("tiny", vocab_size=64)
    payload = costs.refresh_payload(config)
    assert payload["blocks.0.mlp.fc.weight"] == 80 * 32 // 5 + 80
    assert payload["blocks.0.attn.c_k.weight"] == -(-16 * 32 // 5) + 16
    assert payload["tok_emb.weight"] == 2 * 64 * 32 and payload["blocks.1.attn.q_gain"] == 4


def test_one_gpu_sends_nothing_and_more_send_up_to_everything():
    config = config_of("golf16mb", embed_format="ternary", rare_step=0.0, fit_cap=0.0)
    n = sum(p.size for p in costs.parameters(config).values())
    whole = [4 * n, sum(costs.refresh_payload(config).values())]
    assert list(costs.communication(config, 1).values()) == [0, 0]
    assert list(costs.communication(config, 2).values()) == [x / 2 for x in whole]
    assert list(costs.communication(config, 8).values()) == [x * 7 / 8 for x in whole]
    assert 15 < whole[0] / whole[1] < 20  # codes, not updates: 8 bits for five weights against 32 for one


def test_state_of_all_ranks_holds_each_parameter_once(dealt):
    config = config_of("tiny")
    every = costs.parameters(config)
    n, muon = sum(p.size for p in every.values()), sum(p.size for p in every.values() if p.muon)
    for world in (1, 2, 5):
        ranks = [costs.state_bytes(config, world, rank) for rank in range(world)]
        total = {part: sum(state[part] for state in ranks) for part in ranks[0]}
        assert total["latents, fp32"] == 4 * n
        assert total["momentum, fp32"] == 4 * muon and total["AdamW moments, fp32"] == 8 * (n - muon)
        assert total["codes"] == sum(p.codes for p in every.values()) >= n
        assert total["scales"] == sum(p.scales for p in every.values()) > 0
        for state in ranks:
            assert state["params, bf16"] == 2 * n
            assert state["payload"] == (sum(p.payload for p in every.values()) if world > 1 else 0)


class Mute(Ranks):
    """A rank that is alone in the room: it says what it would say to nobody."""

    def call(self, function, *args, **kwargs):
        return None


@pytest.mark.parametrize("change", [{}, dict(embed_format="int4", vector_format="fp8", scale_dtype="bf16")])
def test_state_is_that_of_the_trainers_tensors(change):
    config = config_of("tiny", **change)
    n = sum(p.size for p in costs.parameters(config).values())
    for world, rank in ((1, 0), (3, 0), (3, 1), (3, 2)):
        latents = Latents(GPT(config), config, Mute(rank, world))
        optimizer = Optimizer(latents, config)
        adam = [x for bank in latents.mine if bank.optimizer != "muon" for x in optimizer.moments(bank).values()]
        muon = [x for bank in latents.mine if bank.optimizer == "muon" for x in optimizer.moments(bank).values()]
        stored = [bank.stored for bank in latents.mine]
        real = {
            "params, bf16": [p for bank in latents.banks for p in bank.params],
            "gradient sums, fp32": [latents.flat_grad], "payload": [latents.wire],
            "latents, fp32": [bank.latent for bank in latents.mine], "momentum, fp32": muon,
            "AdamW moments, fp32": adam, "codes": [x.codes for x in stored],
            "scales": [x.scales for x in stored if x.scales is not None],
        }
        counted = costs.state_bytes(config, world, rank)
        real_bytes = {part: sum(x.nbytes for x in xs) for part, xs in real.items()}
        excess = counted.pop("payload") - real_bytes.pop("payload")  # the trainer packs banks, not single tensors
        assert 0 <= excess < len(costs.parameters(config)) and counted == real_bytes
        optimizer.step(1.0, 0.9)
        latents.refresh()
        assert latents.ranks.sent["gradients"] == 4 * n - real_bytes["latents, fp32"]
        assert latents.ranks.sent["codes"] == 2 * sum(len(b.wire) for b in latents.mine)  # made, and refreshed


def test_state_of_one_rank_by_hand(dealt):
    config = config_of("tiny")
    names = [name for name, rank in round_robin(config, 4).items() if rank == 1]
    mine = [costs.parameters(config)[name] for name in names]
    state = costs.state_bytes(config, 4, 1)
    assert 0 < sum(p.muon for p in mine) < len(mine)
    assert state["momentum, fp32"] == sum(4 * p.size for p in mine if p.muon)
    assert state["AdamW moments, fp32"] == sum(8 * p.size for p in mine if not p.muon)
    assert state["codes"] == sum(p.codes for p in mine)


# -- time ---------------------------------------------------------------------------------------------------------


def test_the_work_of_the_optimizer_is_shared_and_the_rest_is_each_gpus():
    config = config_of("golf16mb", train_batch_tokens=65_536 * 8)
    one = costs.work(replace(config, train_batch_tokens=65_536), 1)
    eight = costs.work(config, 8)
    assert one[:-1] == eight[:-1]
    assert 1 / 8 <= eight[-1].flops / one[-1].flops == costs.share_of_busiest(config, 8) < 1 / 4


def test_the_busiest_owner_counts(monkeypatch):
    config = config_of("golf16mb")
    monkeypatch.setattr(costs, "owners", lambda config, world: dict.fromkeys(costs.parameters(config), world - 1))
    assert costs.share_of_busiest(config, 8) == 1
    alone = costs.floor_seconds(config, 8)
    monkeypatch.setattr(costs, "owners", round_robin)
    assert costs.share_of_busiest(config, 8) < 1 and costs.floor_seconds(config, 8) < alone


def test_a_larger_model_costs_more(dealt):
    small = config_of("golf16mb")
    for change in (dict(num_layers=12), dict(mlp_hidden=4096), dict(vocab_size=16384), dict(train_seq_len=4096),
                   dict(num_kv_heads=8), dict(train_batch_tokens=1_048_576)):
        large = replace(small, **change)
        for gpus in (1, 8):
            assert costs.predicted_seconds(large, gpus) > costs.predicted_seconds(small, gpus), change


def test_more_gpus_are_faster_but_not_by_their_number(dealt):
    config = config_of("golf16mb")
    seconds = [costs.predicted_seconds(config, gpus) for gpus in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] < 8 * seconds[3]


def test_accumulating_smaller_batches_costs_more(dealt):
    config = config_of("golf16mb")
    halved = replace(config, micro_batch_tokens=config.micro_batch_tokens // 2)
    assert costs.floor_seconds(halved, 8) > costs.floor_seconds(config, 8)


@pytest.mark.parametrize("preset", costs.MEASURED)
def test_what_was_measured_is_in_the_results_and_is_predicted(preset):
    figures = json.loads((RESULTS / f"train_{preset}.json").read_text())["figures"][f"{preset}, 65,536"]
    seconds, peak = costs.MEASURED[preset]
    assert figures["seconds"] == pytest.approx(seconds, abs=1e-5) and figures["peak_bytes"] == peak
    config = costs.measured_config(preset)
    assert figures["floor_seconds"] == pytest.approx(costs.floor_seconds(config, 1))
    assert costs.predicted_seconds(config, 1) == pytest.approx(seconds, rel=0.01)  # two shapes, one factor
    assert costs.peak_bytes(config, 1) == pytest.approx(peak, rel=0.04)


# -- what is printed ----------------------------------------------------------------------------------------------


def test_report(dealt):
    config = config_of("golf16mb")
    lines = costs.report(config)
    text = "\n".join(lines)
    assert "Between GPUs nothing was measured." in text
    assert len(lines) <= 20 and max(map(len, lines)) <= 120
    seconds = costs.predicted_seconds(config, 8)
    row = next(line for line in lines if line.startswith("  ms per step")).split()
    assert row[-1] == f"{1000 * seconds:,.1f}"
    steps = next(line for line in lines if line.startswith("  steps in 600 s")).split()
    assert steps[-1] == f"{600 / seconds:,.0f}"


def test_report_of_a_batch_that_does_not_divide(dealt):
    config = config_of("tiny", train_batch_tokens=64 * 3)
    lines = costs.report(config)
    assert any("8 GPU(s): the batch does not divide" in line for line in lines)
    assert any(line.split()[-2:] == ["1", "GPU"] for line in lines)
    assert len(costs.report(config, gpus=(8,))) == 3


def test_memory_over_a_gpus_is_said(dealt):
    config = config_of("golf16mb", micro_batch_tokens=524_288)
    row = next(line for line in costs.report(config) if line.startswith("  GB at peak"))
    assert row.count("OVER") == 1 and not row.endswith("OVER")  # eight GPUs share the batch
