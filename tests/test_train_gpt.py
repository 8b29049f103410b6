"""Settings, schedules, loader, model and optimizer of train_gpt.py, in process."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from eval_bpb import SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, DataError, open_data
from train_gpt import (
    FREE_SETTINGS,
    GPT,
    PRESETS,
    CheckpointError,
    Config,
    ConfigError,
    Latents,
    Optimizer,
    Ternary,
    TokenLoader,
    artifact_meta,
    format_of,
    load_checkpoint,
    micro_batch_tokens,
    model_from_stored,
    newton_schulz,
    product,
    resolve_settings,
    save_checkpoint,
    schedule,
)

TINY = Config(**PRESETS["tiny"])

# The published command of PR 367 (run_8xh100.sh), variable by variable.
PR367_COMMAND = """
RUN_ID=bitnet_v2_v1mlp ITERATIONS=20000 NUM_LAYERS=12 MODEL_DIM=768 NUM_HEADS=12 NUM_KV_HEADS=6 MLP_MULT=3
MLP_HIDDEN=2496 TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=2048 VAL_LOSS_EVERY=500 VAL_BATCH_SIZE=524288
MAX_WALLCLOCK_SECONDS=600 TRAIN_LOG_EVERY=50 LR_WARMUP_STEPS=50 MATRIX_LR=0.04 SCALAR_LR=0.04 TIED_EMBED_LR=0.04
MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_WD=0.0 ROPE_BASE=200000
EVAL_STRIDE=64 EVAL_BATCH_SEQS=32 WARMDOWN_ITERS=1200 GRAD_CLIP_NORM=0.0 XSA_LAST_N=0 TTT_ENABLED=1 TTT_LR=3e-4
TTT_EPOCHS=3 SEQ_RAMP_START=2048 BATCH_RAMP_START=524288
"""


# -- settings ----------------------------------------------------------------------------------------------------


def test_settings_resolve_in_order():
    preset, config, origin, _ = resolve_settings(
        ["--preset", "tiny", "--seed=5", "--num_layers", "6"], {"SEED": "4", "MATRIX_LR": "0.1", "MODEL_DIM": ""}
    )
    assert preset == "tiny" and config.seed == 5 and config.num_layers == 6 and config.matrix_lr == 0.1
    assert config.model_dim == PRESETS["tiny"]["model_dim"] and config.scalar_lr == Config().scalar_lr
    assert (origin["seed"], origin["matrix_lr"], origin["model_dim"]) == ("command line", "environment", "preset")
    assert config.run_id == "tiny_seed5"


def test_the_published_command_of_pr367_means_what_it_did():
    env = dict(pair.split("=") for pair in PR367_COMMAND.split())
    _, config, _, notices = resolve_settings(["--preset", "cpu"], env)
    for name in ("num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_hidden", "train_batch_tokens",
                 "train_seq_len", "warmdown_iters", "muon_momentum", "muon_momentum_warmup_steps", "rope_base"):
        assert getattr(config, name) == PRESETS["pr367"][name], name
    assert micro_batch_tokens(config, world=8) == 65536 and micro_batch_tokens(config, world=1) == 65536
    assert any("TTT_ENABLED" in n for n in notices)  # not built: said, not silently ignored
    parameters = sum(p.numel() for n, p in meta_model(config).named_parameters() if n.endswith("weight"))
    assert parameters - 1024 * 768 == 67_239_936


def meta_model(config: Config) -> GPT:
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("argv", [["--no-such-flag", "1"], ["--seed"], ["--preset", "huge"], ["--see", "1"]])
def test_unknown_flags_are_errors(argv, capsys):
    with pytest.raises(SystemExit) as e:
        resolve_settings(argv, {})
    assert e.value.code == 2 and "error" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "env", "message"), [
    (["--seed", "x"], {}, "seed='x'"),
    ([], {"COMPILE": "maybe"}, "compile='maybe'"),
    (["--matrix-lr", "nan"], {}, "matrix_lr"),
    ([], {"PRESET": "nope"}, "PRESET='nope'"),
    ([], {"XSA_LAST_N": "3"}, "XSA_LAST_N"),
    ([], {"TIE_EMBEDDINGS": "0"}, "TIE_EMBEDDINGS"),
    (["--num-heads", "3"], {}, "num_heads=3"),
    (["--num-kv-heads", "0"], {}, "num_kv_heads=0"),
    (["--num-layers", "1"], {}, "num_layers=1"),
    (["--beta2", "1"], {}, "beta2=1.0"),
    (["--scalar-lr", "-1"], {}, "scalar_lr=-1.0"),
    (["--seed", "99999999999999999999"], {}, "seed"),
    (["--compile", "2"], {}, "compile='2'"),
    (["--train-batch-tokens", "1000"], {}, "train_batch_tokens"),
    (["--eval-stride", "4096"], {}, "eval_stride"),
    (["--seq-ramp-start", "5"], {}, "seq_ramp_start"),
    (["--resume", "maybe"], {}, "resume"),
    (["--ternary-rule", "elastic", "--threshold", "0.7"], {}, "threshold=0.7"),
    (["--max-wallclock-seconds", "0", "--iterations", "0"], {}, "iterations"),
])
def test_bad_settings_are_one_clear_error(argv, env, message):
    with pytest.raises(ConfigError, match=message):
        resolve_settings(argv, {"PRESET": "cpu"} | env)


def test_every_preset_is_valid_and_free_settings_exist():
    for name, values in PRESETS.items():
        micro_batch_tokens(Config(**values), world=8 if name in ("pr367", "golf16mb") else 1)
    assert set(Config.__dataclass_fields__) >= FREE_SETTINGS


# -- schedules ---------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_holds_and_warms_down():
    c = replace(TINY, lr_warmup_steps=10, warmdown_frac=0.5, iterations=100)
    lr = [schedule(c, s, s / 100).lr_scale for s in range(100)]
    assert lr[0] == pytest.approx(0.1) and lr[9] == 1.0 and lr[50] == 1.0
    assert lr[75] == pytest.approx(0.5) and 0 < lr[99] == pytest.approx(0.02)
    assert schedule(c, 100, 1.0).lr_scale == 0.0


def test_warmdown_iters_is_pr367s_formula_on_the_clock():
    c = replace(TINY, lr_warmup_steps=0, warmdown_iters=30, max_wallclock_seconds=50.0, iterations=10_000)
    for step, elapsed in [(10, 5.0), (60, 30.0), (80, 40.0), (99, 49.9)]:
        step_ms, remaining = elapsed / step, 50.0 - elapsed
        expected = min(1.0, remaining / (30 * step_ms))  # lr_mul of train_bitnet.py
        assert schedule(c, step, elapsed / 50.0).lr_scale == pytest.approx(expected)
    assert schedule(c, 0, 0.001).lr_scale == 1.0  # the clock runs before the first step has ended


def test_momentum_and_ramps():
    c = replace(TINY, muon_momentum_warmup_start=0.8, muon_momentum=0.9, muon_momentum_warmup_steps=10,
                train_seq_len=512, train_batch_tokens=8192, seq_ramp_start=128, seq_ramp_frac=0.5,
                batch_ramp_start=4096, batch_ramp_frac=0.5, micro_batch_tokens=2048)
    assert [schedule(c, s, 0.5).momentum for s in (0, 5, 10, 99)] == pytest.approx([0.8, 0.85, 0.9, 0.9])
    plans = [schedule(c, 1, p) for p in (0.0, 0.25, 0.5, 1.0)]
    assert [p.seq_len for p in plans] == [128, 256, 512, 512]
    assert [p.batch_tokens for p in plans] == [4096, 6144, 8192, 8192]
    off = replace(c, seq_ramp_start=1024, batch_ramp_start=16384)  # as in PR 367: not below the end, so no ramp
    assert {(p.seq_len, p.batch_tokens) for p in (schedule(off, 1, 0.0), schedule(off, 1, 1.0))} == {(512, 8192)}


# -- loader ------------------------------------------------------------------------------------------------------


def write_shard(path, tokens):
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def test_loader_crosses_shards_and_epochs(tmp_path):
    shards = tuple(write_shard(tmp_path / f"x_train_{i}.bin", range(10 * i, 10 * i + 10)) for i in range(3))
    loader = TokenLoader(shards, 100)
    assert loader.read(0, 65).tolist() == (list(range(30)) * 3)[:65]
    assert loader.read(27, 6).tolist() == [27, 28, 29, 0, 1, 2]
    loader.position = 25
    ids, targets = loader.batch(2, 3, 0, 0, 1)
    assert ids.tolist() == [[25, 26, 27], [28, 29, 0]] and targets.tolist() == [[26, 27, 28], [29, 0, 1]]


def test_two_ranks_read_what_one_reads(tmp_path):
    loader = TokenLoader((write_shard(tmp_path / "x_train_0.bin", range(500)),), 500)
    one = torch.cat([loader.batch(2, 8, m, 0, 1)[0] for m in range(4)])
    two = torch.cat([loader.batch(2, 8, m, r, 2)[0] for m in range(2) for r in range(2)])
    assert torch.equal(one, two) and one.flatten().tolist() == list(range(64))


def test_loader_refuses_tokens_of_another_vocabulary(tmp_path):
    shard = write_shard(tmp_path / "x_train_0.bin", [1, 2, 700])
    with pytest.raises(DataError, match="token 700 with vocab_size=512"):
        TokenLoader((shard,), 512)


def test_loader_checks_every_shard_before_the_first_step(tmp_path):
    good, bad = write_shard(tmp_path / "x_train_0.bin", range(50)), write_shard(tmp_path / "x_train_1.bin", range(50))
    bad.write_bytes(bad.read_bytes()[:-2])
    with pytest.raises(DataError, match="x_train_1.bin.*truncated"):
        TokenLoader((good, bad), 512)


def test_a_validation_shard_is_refused_under_any_name(data_dir, tmp_path):
    for file in data_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    open_data(tmp_path)
    val = next(tmp_path.glob("*_val_*.bin"))
    (tmp_path / "innocent_train_000007.bin").write_bytes(val.read_bytes())
    with pytest.raises(DataError, match="innocent_train_000007.bin: not in the folder's manifest"):
        open_data(tmp_path)
    (tmp_path / "manifest.json").unlink()  # a folder of official shards has none
    with pytest.raises(DataError, match="innocent_train_000007.bin: .* is the validation shard"):
        open_data(tmp_path)


def test_indivisible_batches_are_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        micro_batch_tokens(TINY, world=3)
    with pytest.raises(ConfigError, match="batch_ramp_start"):
        micro_batch_tokens(replace(TINY, batch_ramp_start=512), world=1)


# -- model and latents -------------------------------------------------------------------------------------------


def test_params_are_what_is_stored_and_every_one_is_covered():
    torch.manual_seed(0)
    model = GPT(TINY)
    latents = Latents(model, TINY)
    seen = {name: (fmt, stored) for name, fmt, _, stored in latents.named()}
    assert seen.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        fmt, stored = seen[name]
        assert fmt == format_of(TINY, name, p.ndim)
        assert p.dtype == torch.bfloat16 and torch.equal(p.data, fmt.dequantize(stored))
    ternary = [n for n, (fmt, _) in seen.items() if fmt.spec()["kind"] == "ternary"]
    assert len(ternary) == 6 * TINY.num_layers


def test_blocks_start_as_the_identity_with_zero_groups():
    torch.manual_seed(0)
    model = GPT(TINY)
    Latents(model, TINY)
    ids = torch.randint(TINY.vocab_size, (2, 16))
    loss = model(ids, ids)
    loss.backward()
    assert math.isfinite(loss.item()) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (model.blocks[0].mlp.proj.weight == 0).all()


def test_the_model_is_causal_and_any_hidden_width_works():
    torch.manual_seed(0)
    config = replace(TINY, mlp_hidden=77, num_layers=3)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    Latents(model, config)
    a = torch.randint(config.vocab_size, (1, 24))
    b = a.clone()
    b[0, 12:] = torch.randint(config.vocab_size, (12,))
    ha, hb = model.hidden(a), model.hidden(b)
    assert torch.equal(ha[0, :12], hb[0, :12]) and not torch.equal(ha[0, 12:], hb[0, 12:])
    assert model.head(ha).abs().max() <= config.logit_softcap


def textbook_loss(model: GPT, latents: dict, config: Config, ids, targets):
    """BitNet's formulation: every linear sees w + (Q(w) - w).detach(), here for all formats alike."""
    def fake_quantize(name, w):
        fmt = format_of(config, name, w.ndim)
        return (w + (fmt.dequantize(fmt.quantize(w.detach())).float() - w).detach()).bfloat16()

    return functional_call(model, {n: fake_quantize(n, w) for n, w in latents.items()}, (ids, targets))


def textbook_newton_schulz(g, steps):
    """One matrix at a time, in double precision."""
    x = g.double()
    x = x.T if g.shape[0] > g.shape[1] else x
    x = x / x.norm()
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_is_the_textbook_straight_through_step(micro_batches):
    config = replace(TINY, embed_format="ternary", tied_embed_init_std=0.3)
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for block in model.blocks:  # zero projections would hide the gradients of what feeds them
            block.attn.proj.weight.normal_(std=0.1)
            block.mlp.proj.weight.normal_(std=0.1)
    w = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    latents = Latents(model, config)
    optimizer = Optimizer(latents, config)
    batches = torch.randint(config.vocab_size, (micro_batches, 4, 33))

    losses = [textbook_loss(model, w, config, b[:, :-1], b[:, 1:]) for b in batches]
    torch.stack(losses).mean().backward()
    matrices = [n for n in w if n.startswith("blocks.") and n.endswith(".weight")]
    rest = [n for n in w if n not in matrices]
    groups = [{"params": [w[n]], "lr": config.tied_embed_lr if n == "tok_emb.weight" else config.scalar_lr}
              for n in rest]
    before = {n: x.detach().clone() for n, x in w.items()}
    torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0).step()
    for n in matrices:
        g = w[n].grad
        update = textbook_newton_schulz(g + 0.9 * g, config.muon_backend_steps)  # first momentum buffer is g
        w[n].data -= config.matrix_lr * max(1, g.shape[0] / g.shape[1]) ** 0.5 * update.float()

    for b in batches:
        loss = model(b[:, :-1], b[:, 1:])
        loss.backward()
        latents.accumulate(loss, micro_batches)
    grads = {n: g.clone() for bank in latents.banks for n, g in zip(bank.names, bank.grad, strict=True)}
    assert float(latents.flat_grad[-1]) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    optimizer.step(lr_scale=1.0, momentum=0.9)
    latents.refresh()

    for name, _, latent, _ in latents.named():
        scale = w[name].grad.norm()
        assert (grads[name] - w[name].grad).norm() <= 2**-6 * scale, f"gradient of {name}"
        if name in matrices:
            moved, expected = latent - before[name], w[name].detach() - before[name]
            assert expected.norm() > 0
            assert (moved - expected).norm() <= 0.05 * expected.norm(), f"Muon's update of {name} (bf16 iterations)"
        else:  # Adam's first step is lr * sign(g): compare where the gradient is not noise
            clear = w[name].grad.abs() > 2**-4 * w[name].grad.abs().max()
            torch.testing.assert_close(latent[clear], w[name].detach()[clear], rtol=1e-3, atol=1e-4)
    for bank in latents.banks:  # and the params are those of the new latents
        for p, latent in zip(bank.params, bank.latent, strict=True):
            assert torch.equal(p.data, bank.format.dequantize(bank.format.quantize(latent)))


def test_muons_second_step_has_nesterov_momentum():
    """The first step cannot tell: there the momentum is the gradient, and Newton-Schulz ignores its length."""
    torch.manual_seed(0)
    latents = Latents(GPT(TINY), TINY)
    optimizer = Optimizer(latents, TINY)
    bank = next(b for b in latents.banks if "blocks.0.mlp.fc.weight" in b.names)
    i, m, before, grads = bank.names.index("blocks.0.mlp.fc.weight"), 0.8, [], []
    for _ in range(2):
        latents.flat_grad.normal_()
        grads.append(bank.grad[i].clone())
        before.append(bank.latent[i].clone())
        optimizer.step(1.0, m)
    buffer = m * grads[0] + grads[1]
    update = textbook_newton_schulz(grads[1] + m * buffer, TINY.muon_backend_steps).float()
    rows, cols = update.shape
    expected = -TINY.matrix_lr * max(1, rows / cols) ** 0.5 * update
    assert (bank.latent[i] - before[1] - expected).norm() < 0.05 * expected.norm()


def test_micro_batches_accumulate_in_fp32():
    torch.manual_seed(0)
    latents = Latents(GPT(TINY), TINY)
    for value in [1.0] + [2.0**-9] * 8:  # in bf16 each small addend would vanish: 1 + 2^-9 rounds to 1
        for bank in latents.banks:
            for p in bank.params:
                p.grad = torch.full_like(p, value)
        latents.accumulate(torch.tensor(value), 1)
    assert (latents.flat_grad == 1 + 8 * 2.0**-9).all()


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_newton_schulz_makes_singular_values_near_one_and_stacks_as_singles(shape):
    g = torch.randn(3, *shape)
    x = newton_schulz(g, 5)
    s = torch.linalg.svdvals(x.float())
    assert s.min() > 0.4 and s.max() < 1.5
    for i in range(3):
        assert torch.equal(newton_schulz(g[i : i + 1], 5)[0], x[i])
        reference = textbook_newton_schulz(g[i], 5)
        assert (x[i].double() - reference).norm() < 0.05 * reference.norm()


def test_weight_decay_and_clipping_do_something():
    def step(**kw):
        config = replace(TINY, **kw)
        torch.manual_seed(0)
        latents = Latents(GPT(config), config)
        optimizer = Optimizer(latents, config)
        latents.flat_grad.fill_(1.0)
        before = {n: x.clone() for n, _, x, _ in latents.named()}
        optimizer.step(1.0, 0.9)
        return before, {n: x for n, _, x, _ in latents.named()}, optimizer

    before, plain, _ = step()
    _, decayed, _ = step(muon_wd=0.5)
    name = "blocks.0.mlp.fc.weight"
    torch.testing.assert_close(decayed[name], plain[name] - 0.04 * 0.5 * before[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(decayed["tok_emb.weight"], plain["tok_emb.weight"])
    _, _, clipped = step(grad_clip_norm=0.5)
    total = sum(m.square().sum() for m in clipped.momentum) + sum(
        (clipped.adam.state[b.latent]["exp_avg"] / 0.1).square().sum() for b in clipped.adam_banks)
    assert math.sqrt(total) == pytest.approx(0.5, rel=1e-3)


# -- int8 products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [0, 200])
def test_int8_products_are_exact_but_for_the_rounding_of_tokens(group_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 200, generator=generator)
    x[0, 0] = 0.0
    fmt = Ternary(group_size)
    w = torch.randn(48, 200, generator=generator)
    w[5] = 0.0 if group_size else w[5]  # a zero row has a zero scale
    w = fmt.dequantize(fmt.quantize(w)).float()
    x.requires_grad_(), w.requires_grad_()
    y = product(x, w, 8)
    tokens = x.detach().double()
    step = tokens.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    exact = (tokens / step).round() * step @ w.detach().double().T
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5)
    error = (y.double() - tokens @ w.detach().double().T).abs()
    assert (error <= 0.5 * step * w.detach().double().abs().sum(1) + 1e-4).all() and error.max() > 1e-3
    grad = torch.randn(y.shape, generator=generator)
    mine = torch.autograd.grad(y, (x, w), grad)
    theirs = torch.autograd.grad(product(x, w, 16), (x, w), grad)  # the rounding is passed straight through
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("matrix_format, zeros", [("ternary", True), ("codebook4", False), ("bf16", False)])
def test_zero_frac_is_of_codes_that_mean_zero(matrix_format, zeros):
    config = replace(TINY, matrix_format=matrix_format)
    zero_frac, churn = Latents(GPT(config), config).refresh(measure=True)
    assert 0.2 < zero_frac < 0.6 if zeros else math.isnan(zero_frac)
    assert math.isnan(churn) == (matrix_format == "bf16")


def test_int8_activations_are_part_of_the_model_and_need_one_scale_per_row():
    for bad in (dict(group_size=32), dict(group_size=0, matrix_format="int4"), dict(group_size=0, activation_bits=4)):
        with pytest.raises(ConfigError, match="activation_bits"):
            replace(TINY, **{"activation_bits": 8} | bad)
    config = replace(TINY, activation_bits=8, group_size=0)
    torch.manual_seed(0)
    model = GPT(config)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    latents, ids = Latents(model, config), torch.arange(40)[None]
    packed = latents.pack([n for n, _ in model.named_parameters()])
    assert artifact_meta(config)["config"]["activation_bits"] == 8
    assert "activation_bits" not in artifact_meta(TINY)["config"]
    with torch.no_grad():
        again = model_from_stored(packed, artifact_meta(config))
        assert torch.equal(again.hidden(ids), model.hidden(ids))
        other = model_from_stored(packed, artifact_meta(TINY))
        assert not torch.equal(other.hidden(ids), model.hidden(ids))  # it would be another model
    grouped = Latents(GPT(TINY), TINY).pack([n for n, _ in model.named_parameters()])
    with pytest.raises(ConfigError, match="one scale per row"):
        model_from_stored(grouped, artifact_meta(config))


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_smear_is_half_of_the_token_before_at_first():
    torch.manual_seed(0)
    model, plain = GPT(replace(TINY, smear=True)), GPT(TINY)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n != "smear"})
    ids = torch.tensor([[5, 9, 9]])
    x = plain.embed(ids)
    half = torch.stack((x[:, 0] / 2, (x[:, 0] + x[:, 1]) / 2, (x[:, 1] + x[:, 2]) / 2), dim=1)
    assert torch.allclose(model.embed(ids), half)
    assert artifact_meta(replace(TINY, smear=True))["config"]["smear"] is True
    assert "smear" not in artifact_meta(TINY)["config"]


def test_optimizer_state_survives_a_checkpoint(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = GPT(TINY)
        latents = Latents(model, TINY)
        return model, latents, Optimizer(latents, TINY)

    def train_step(model, latents, optimizer, seed):
        ids = torch.randint(TINY.vocab_size, (4, 33), generator=torch.Generator().manual_seed(seed))
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        latents.accumulate(loss, 1)
        optimizer.step(1.0, 0.9)
        latents.refresh()

    a = make(0)
    train_step(*a, 1)
    save_checkpoint(tmp_path / "c", a[2].state(), {"step": 1})
    tensors, state = load_checkpoint(tmp_path / "c")
    assert state == {"step": 1}
    b = make(99)
    b[2].load_state(tensors, 1)
    for seed in (2, 3):
        train_step(*a, seed)
        train_step(*b, seed)
    mine, theirs = a[2].state(), b[2].state()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True))
    with pytest.raises(ValueError, match="missing or not known"):
        b[2].load_state({k: v for k, v in tensors.items() if k != "latent/skip_weights"}, 1)


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "missing", "no state"])
def test_a_bad_checkpoint_is_one_clear_error(tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"x": torch.zeros(100)}, {})
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "no state":
        import safetensors.torch

        path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    else:
        path.write_bytes({"truncate": data[:-20], "garbage": b"\x80\x04" + data[2:], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match="no such checkpoint" if damage == "missing" else "delete it"):
        load_checkpoint(tmp_path)


def test_non_finite_tensors_are_named():
    torch.manual_seed(0)
    model = GPT(TINY)
    latents, order = Latents(model, TINY), [n for n, _ in model.named_parameters()]
    assert latents.first_non_finite(order) is None
    bank = next(b for b in latents.banks if "blocks.1.mlp.fc.weight" in b.names)
    bank.grad[bank.names.index("blocks.1.mlp.fc.weight")][0, 0] = math.inf
    assert latents.first_non_finite(order) == "the gradient of blocks.1.mlp.fc.weight"
    bank.latent[bank.names.index("blocks.1.mlp.fc.weight")][3, 3] = math.nan
    assert latents.first_non_finite(order) == "the weights of blocks.1.mlp.fc.weight"
