"""The cost model: counts against hand counts and torch's own counter, the calibration against brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode

import pack
from records import costs
from records.costs import RUNS, Shape
from tern.muon import newton_schulz
from tern.processes import Ranks
from train_gpt import GPT, PRESETS, Config, Latents, Optimizer, format_of

pytestmark = pytest.mark.fast
TINY = Shape(layers=2, dim=4, kv_dim=2, hidden=8, vocab=16, seq_len=3, batch_tokens=12, ns_steps=1)
ROOFLINE_MS = {run.pr: 1000 * costs.run_cost(run).roofline for run in RUNS}


def config_of(preset: str, **change) -> Config:
    return Config(**PRESETS[preset] | change)


def round_robin(config: Config, world: int) -> dict[str, int]:
    return {name: i % world for i, name in enumerate(costs.parameters(config))}


@pytest.fixture
def dealt(monkeypatch):
    """Owners that a hand count can follow."""
    monkeypatch.setattr(costs, "owners", round_robin)


# -- flops --------------------------------------------------------------------------------------------------------


def test_flops_of_a_tiny_shape_by_hand():
    weights = 4 * 4 + 2 * (2 * 4) + 4 * 4 + 2 * (4 * 8)  # q; k and v; output; fc and proj
    assert costs.block_flops(TINY) == 2 * 6 * weights == 1344
    assert costs.head_flops(TINY) == 6 * 16 * 4
    assert costs.head_flops(replace(TINY, embed_dim=3)) == 6 * (16 * 3 + 2 * 4 * 3)
    keys = (1 + 2 + 3) / 3
    assert costs.attention_flops(TINY) == 2 * (2 + 5) * (2 * 4 * keys) == 224  # layers, products, each
    assert costs.newton_schulz_flops(2, 3, 5) == costs.newton_schulz_flops(3, 2, 5)
    assert costs.newton_schulz_flops(2, 3, 5) == 5 * 2 * (2 * 3 * 2 + 2 * 2 * 2 + 2 * 2 * 3)


def test_flops_are_those_that_torch_counts():
    config = config_of("tiny")
    model, s = GPT(config), costs.shape_of(config)
    ids = torch.zeros(2, s.seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted == ids.numel() * (costs.block_flops(s) + costs.head_flops(s))
    for rows, cols in {(32, 32), (16, 32), (80, 32)}:
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(1, rows, cols), 3)
        assert counter.get_total_flops() == costs.newton_schulz_flops(rows, cols, 3)


def test_matrices_are_the_models():
    config = config_of("golf16mb")
    mine = [p.shape for p in costs.parameters(config).values() if p.muon]
    assert sorted(mine) == sorted(costs.layer_matrices(costs.shape_of(config)) * config.num_layers)


# -- bytes --------------------------------------------------------------------------------------------------------


def test_a_products_backward_moves_twice_its_forward():
    """Two products, each of which reads the output's gradient and reads or writes the input's size."""
    for name in ("q, k, v", "output", "fc", "proj"):
        forward, backward = costs.BLOCK_TRAFFIC[name]
        assert backward == tuple(2 * x for x in forward)


def test_traffic_of_a_tiny_shape_by_hand():
    forward = 21 * 4 + 6 * 2 + 4 * 8
    backward = 36 * 4 + 11 * 2 + 7 * 8
    assert costs.activation_traffic(TINY) == 2 * 2 * (forward + backward)
    assert costs.logits_traffic(TINY) == 2 * 7 * 16


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
    config = config_of("golf16mb")
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


def test_every_parameter_has_an_owner_and_eight_share_the_work():
    config = config_of("golf16mb")
    for world in (1, 8):
        owner = costs.owners(config, world)
        assert owner.keys() == costs.parameters(config).keys() and set(owner.values()) == set(range(world))
    one, eight = costs.step_cost(config, 1), costs.step_cost(config, 8)
    assert one.flops["Newton-Schulz"] / 8 <= eight.flops["Newton-Schulz"] < one.flops["Newton-Schulz"] / 4


def test_the_busiest_owner_counts(monkeypatch):
    config = config_of("golf16mb")
    monkeypatch.setattr(costs, "owners", lambda config, world: dict.fromkeys(costs.parameters(config), world - 1))
    alone = costs.step_cost(config, 8)
    monkeypatch.setattr(costs, "owners", round_robin)
    shared = costs.step_cost(config, 8)
    total = sum(costs.newton_schulz_flops(*p.shape, 5) for p in costs.parameters(config).values() if p.muon)
    assert alone.flops["Newton-Schulz"] == total > 4 * shared.flops["Newton-Schulz"]
    assert alone.hbm["optimizer"] > 4 * shared.hbm["optimizer"] and alone.roofline > shared.roofline


def test_a_larger_model_costs_more(dealt):
    small = config_of("golf16mb")
    for change in (dict(num_layers=12), dict(mlp_hidden=4096), dict(vocab_size=16384), dict(train_seq_len=2048),
                   dict(num_kv_heads=8), dict(train_batch_tokens=1_048_576)):
        large = replace(small, **change)
        for gpus in (1, 8):
            assert costs.step_cost(large, gpus).roofline > costs.step_cost(small, gpus).roofline, change


def test_more_gpus_are_faster_but_not_by_their_number(dealt):
    config = config_of("golf16mb")
    seconds = [costs.step_cost(config, gpus).roofline for gpus in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] < 8 * seconds[3]


def test_accumulating_smaller_batches_moves_the_weights_more_often(dealt):
    config = config_of("golf16mb")
    halved = replace(config, micro_batch_tokens=config.micro_batch_tokens // 2)
    n = sum(p.size for p in costs.parameters(config).values())
    more = costs.step_cost(halved, 8).hbm["weights, gradients"] - costs.step_cost(config, 8).hbm["weights, gradients"]
    assert more == n * costs.MICRO_BATCH_BYTES


# -- calibration --------------------------------------------------------------------------------------------------


def test_the_runs_are_those_of_the_field():
    """Weights of the blocks, in millions, against the ternary parameters that the submissions report."""
    reported = {139: 63.7, 367: 67.2, 666: 63.7, 640: 64.9, 920: 64.9, 2086: 36.5}
    counted = {r.pr: sum(a * b for a, b in costs.layer_matrices(r.shape)) * r.shape.layers / 1e6 for r in RUNS}
    assert counted == pytest.approx(reported, abs=0.06)
    steps = {139: 4713, 367: 4591, 666: 5026, 640: 6527, 920: 6533, 2086: 7800}
    assert {r.pr: 600e3 / r.ms for r in RUNS} == pytest.approx(steps, rel=0.003)


def test_fit_finds_efficiencies_that_were_put_in():
    truth = {costs.SDPA: 0.5, costs.FA3: 0.8}
    made = [replace(run, ms=ROOFLINE_MS[run.pr] / truth[run.stack]) for run in RUNS]
    assert costs.fit(made) == pytest.approx(truth)
    assert max(map(abs, costs.leave_one_out(made).values())) < 1e-9
    across = {run.pr: 0.5 / 0.8 - 1 if run.stack == costs.SDPA else 0.8 / 0.5 - 1 for run in RUNS}
    assert costs.leave_stack_out(made) == pytest.approx(across)


def test_errors_by_brute_force():
    """One coefficient c per stack: sum (c x - 1)^2 is smallest at sum x / sum x^2."""
    left_out, across, fitted = costs.leave_one_out(), costs.leave_stack_out(), costs.fit()
    for run in RUNS:
        x = {other.pr: ROOFLINE_MS[other.pr] / other.ms for other in RUNS if other.stack == run.stack}
        assert 1 / fitted[run.stack] == pytest.approx(sum(x.values()) / sum(v * v for v in x.values()))
        mine = x.pop(run.pr)
        c = sum(x.values()) / sum(v * v for v in x.values())
        assert left_out[run.pr] == pytest.approx(c * mine - 1)
        x = [ROOFLINE_MS[other.pr] / other.ms for other in RUNS if other.stack != run.stack]
        assert across[run.pr] == pytest.approx(sum(x) / sum(v * v for v in x) * mine - 1)


def test_fitted_efficiencies_are_possible_and_the_formulas_carry():
    """The SDPA runs differ in sequence length and MLP, and one efficiency explains them."""
    assert all(0.3 < e < 0.9 for e in costs.fit().values())
    errors = costs.leave_one_out()
    assert max(abs(errors[pr]) for pr in (139, 367, 666)) < 0.02
    assert max(map(abs, errors.values())) < 0.15


def test_dropped_terms_cannot_be_identified():
    """With a column more, the best fit has the hardware exceed its peaks: a coefficient below 1."""
    cost = {run.pr: costs.run_cost(run) for run in RUNS}
    flops = {pr: 1000 * sum(c.flops.values()) / costs.PEAK_FLOPS for pr, c in cost.items()}
    older = {run.pr: ROOFLINE_MS[run.pr] * (run.stack == costs.SDPA) for run in RUNS}

    def coefficients(*columns: dict[int, float]) -> np.ndarray:
        a = np.array([[column[run.pr] / run.ms for column in columns] for run in RUNS])
        return nnls(a, np.ones(len(RUNS)))[0]

    bytes_ = {pr: ROOFLINE_MS[pr] - flops[pr] for pr in flops}
    assert coefficients(flops, bytes_, older)[0] < 1
    attention = {pr: 1000 * c.flops["attention"] / costs.PEAK_FLOPS for pr, c in cost.items()}
    assert coefficients({pr: flops[pr] - attention[pr] for pr in flops}, attention, bytes_)[0] < 1
    assert coefficients(ROOFLINE_MS, older, dict.fromkeys(flops, 1.0))[0] < 1
    assert coefficients(ROOFLINE_MS, older, {run.pr: float(run.shape.layers) for run in RUNS})[0] < 1


def test_activations_are_most_of_the_memory_that_runs_logged():
    logged = [run for run in RUNS if run.peak_mib]
    assert len(logged) == 3
    for run in logged:
        share = costs.activation_bytes(run.shape, 524_288 // 8) / 2**20 / run.peak_mib
        assert 0.9 < share < 1, run.pr


# -- what is printed ----------------------------------------------------------------------------------------------


def test_report(dealt):
    config = config_of("golf16mb")
    lines = costs.report(config)
    text = "\n".join(lines)
    assert "Nothing was run on a GPU here: times are predictions from other people's logs." in text
    assert len(lines) <= 20 and max(map(len, lines)) <= 120
    assert all(f"PR {run.pr} " in text for run in RUNS)
    row = next(line for line in lines if line.startswith("  ms per step")).split()
    fast, slow = sorted(costs.predicted_seconds(config, 8).values())
    assert row[-3:] == [f"{1000 * fast:,.1f}", "to", f"{1000 * slow:,.1f}"] and fast < slow
    steps = next(line for line in lines if line.startswith("  steps in 600 s")).split()
    assert steps[-3:] == [f"{600 / slow:,.0f}", "to", f"{600 / fast:,.0f}"]


def test_report_predicts_no_time_for_what_is_too_small(dealt):
    text = "\n".join(costs.report(config_of("tiny")))
    assert text.count("too small") == 3 * 2 + 1 and "launches of kernels" in text


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
