"""Settings, schedules, loader, model and optimizer of train_gpt.py, in process."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from conftest import metrics, tiny_args, tiny_trainer
from tern import kernels, machine
from tern.checkpoints import read_checkpoint, read_state
from tern.muon import newton_schulz
from tern.processes import Ranks
from tern.settings import ConfigError
from tern.shards import SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, DataError, open_data
from train_gpt import (
    GPT,
    PRESETS,
    Config,
    Latents,
    Optimizer,
    TokenLoader,
    TrainingError,
    artifact_meta,
    format_of,
    main,
    micro_batch_tokens,
    model_from_stored,
    owners,
    param_shapes,
    resolve_settings,
    schedule,
)

pytestmark = pytest.mark.fast
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


# -- settings (what all programs do with theirs: test_settings.py) -----------------------------------------------


def test_settings_resolve_and_name_the_run():
    preset, config, origin, notices = resolve_settings(
        ["--preset", "tiny", "--seed=5", "--num_layers", "6"], {"SEED": "4", "MATRIX_LR": "0.1", "MODEL_DIM": ""})
    assert preset == "tiny" and config.seed == 5 and config.num_layers == 6 and config.matrix_lr == 0.1
    assert config.model_dim == PRESETS["tiny"]["model_dim"] and config.scalar_lr == Config().scalar_lr
    assert (origin["seed"], origin["matrix_lr"], origin["model_dim"]) == ("command line", "environment", "preset")
    assert config.run_id == "tiny_seed5" and not notices


def test_the_published_command_of_pr367_means_what_it_did():
    env = dict(pair.split("=") for pair in PR367_COMMAND.split())
    _, config, _, notices = resolve_settings(["--preset", "cpu"], env)
    for name in ("num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_hidden", "train_batch_tokens",
                 "train_seq_len", "warmdown_iters", "muon_momentum", "muon_momentum_warmup_steps", "rope_base"):
        assert getattr(config, name) == PRESETS["pr367"][name], name
    assert micro_batch_tokens(config, world=8) == 65536 and micro_batch_tokens(config, world=1) == 65536
    assert any("TTT_ENABLED" in n for n in notices)  # not built: said, not silently ignored
    parameters = sum(math.prod(shape) for n, shape in param_shapes(config).items()
                     if n.startswith("blocks.") and n.endswith(".weight"))
    assert parameters == 67_239_936


@pytest.mark.parametrize(("argv", "env", "message"), [
    ([], {"XSA_LAST_N": "3"}, "XSA_LAST_N"),
    ([], {"TIE_EMBEDDINGS": "0"}, "TIE_EMBEDDINGS"),
    (["--num-heads", "3"], {}, "num_heads=3"),
    (["--num-heads", "128"], {}, "num_heads=128"),
    (["--num-kv-heads", "0"], {}, "num_kv_heads=0"),
    (["--num-layers", "1"], {}, "num_layers=1"),
    (["--beta2", "1"], {}, "beta2=1.0"),
    (["--train-batch-tokens", "1000"], {}, "train_batch_tokens"),
    (["--eval-stride", "4096"], {}, "eval_stride"),
    (["--attn-window", "0"], {}, "attn_window=0: must be from 1 to "),
    (["--eval-seq-len", "4096", "--attn-window", "4000"], {}, "attn_window=4000: must be from 1 to "),
    (["--seq-ramp-start", "5"], {}, "seq_ramp_start"),
    (["--resume", "maybe"], {}, "resume"),
    (["--matrix-format", "int9"], {}, "matrix_format='int9'"),
    (["--ternary-rule", "other"], {}, "ternary_rule='other'"),
    (["--vector-format", "int4"], {}, "vector_format='int4'"),
    (["--scale-dtype", "log9"], {}, "scale_dtype='log9'"),
    (["--max-wallclock-seconds", "0", "--iterations", "0"], {}, "iterations"),
])
def test_bad_settings_are_one_clear_error(argv, env, message):
    with pytest.raises(ConfigError, match=message):
        resolve_settings(argv, {"PRESET": "cpu"} | env)


@pytest.mark.parametrize(("argv", "said"), [([], 0), (["--eval-stride", "0"], 0), (["--eval-stride", "2048"], 1),
                                          (["--eval-seq-len", "0"], 1)])
def test_a_stride_of_a_whole_window_is_told(argv, said):
    """The preset's stride of 512 is that of its windows of 2,048; of windows of 512 no score would slide."""
    notices = resolve_settings(["--preset", "cpu", *argv], {})[3]
    assert len(notices) == said and all("no score slides" in notice for notice in notices)


def test_shapes_are_the_model_s():
    config = Config(**PRESETS["tiny"] | dict(vocab_size=40, smear=True, copy_dim=4))
    model = GPT(config)
    assert param_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    with machine.no_values():
        empty = GPT(config)
    assert all(p.is_meta for p in empty.parameters()) and not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_divides_and_every_parameter_has_one_owner(preset):
    config = Config(**PRESETS[preset])
    names = list(param_shapes(config))
    for world in (1, 8) if preset in ("pr367", "golf16mb") else (1, 2):
        assert config.train_batch_tokens % (world * micro_batch_tokens(config, world)) == 0
    for world in (1, 3, 8):
        owner = owners(config, world)
        assert list(owner) == names and set(owner.values()) == set(range(world)), world


def test_owners_by_hand():
    """The costliest first, each to the rank with the least work. Millions of flops at 5 iterations, with 100 for an
    element: fc and mlp.proj 2.222, the embedding of 400 x 32 1.280, c_q and attn.proj 1.085, c_k and c_v 0.256."""
    owner = owners(replace(TINY, vocab_size=400), 4)
    expected = {
        "blocks.0.mlp.fc": 0, "blocks.0.mlp.proj": 1, "blocks.1.mlp.fc": 2, "blocks.1.mlp.proj": 3,
        "tok_emb": 0,  # loads are now 3.502, 2.222, 2.222, 2.222
        "blocks.0.attn.c_q": 1, "blocks.0.attn.proj": 2, "blocks.1.attn.c_q": 3,  # 3.308 each
        "blocks.1.attn.proj": 1,  # 4.393
        "blocks.0.attn.c_k": 2, "blocks.0.attn.c_v": 3,  # 3.564 each
        "blocks.1.attn.c_k": 0,  # 3.758
        "blocks.1.attn.c_v": 2,  # 3.820, so that 3 is left the least, also by all vectors
    }
    assert {n.removesuffix(".weight"): r for n, r in owner.items() if n.endswith(".weight")} == expected
    assert {r for n, r in owner.items() if not n.endswith(".weight")} == {3}


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


def test_indivisible_batches_are_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        micro_batch_tokens(TINY, world=3)
    with pytest.raises(ConfigError, match="batch_ramp_start"):
        micro_batch_tokens(replace(TINY, batch_ramp_start=512), world=1)


# -- loader ------------------------------------------------------------------------------------------------------


def write_shard(path, tokens):
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def test_the_loader_crosses_shards_and_epochs(tmp_path):
    shards = tuple(write_shard(tmp_path / f"x_train_{i}.bin", range(10 * i, 10 * i + 10)) for i in range(3))
    loader, seen = TokenLoader(shards, 100), []
    for position in range(0, 60, 6):
        loader.position = position
        ids, targets = loader.batch(2, 3, 0, 0, 1)
        seen += ids.flatten().tolist()
        assert targets.flatten().tolist() == [(i + 1) % 30 for i in range(position, position + 6)]
    assert seen == list(range(30)) * 2


@pytest.mark.parametrize("window", [0, 16])
def test_two_ranks_read_what_one_reads(tmp_path, window):
    loader = TokenLoader((write_shard(tmp_path / "x_train_0.bin", range(500)),), 500, window)
    one = torch.cat([loader.batch(2, 8, m, 0, 1)[0] for m in range(4)])
    two = torch.cat([loader.batch(2, 8, m, r, 2)[0] for m in range(2) for r in range(2)])
    assert torch.equal(one, two) and (one.flatten().tolist() == list(range(64))) == (window == 0)


def test_windows_come_once_an_epoch_in_an_order_of_their_own(tmp_path):
    """Also where rows are parts of windows, as while lengths grow, and windows lie across shards."""
    shards = tuple(write_shard(tmp_path / f"x_train_{i}.bin", range(50 * i, 50 * i + 50)) for i in range(3))
    count, orders = 149 // 8, []
    for seed, length in ((1, 8), (1, 4), (2, 8)):
        loader, rows = TokenLoader(shards, 150, 8, seed), []
        for position in range(0, 3 * count * 8, length):
            loader.position = position
            ids, targets = loader.batch(1, length, 0, 0, 1)
            assert torch.equal(ids + 1, targets) and ids[0, -1] - ids[0, 0] == length - 1
            rows += ids[0].tolist()
        orders.append(rows)
        for epoch in range(3):
            seen = rows[epoch * count * 8 : (epoch + 1) * count * 8]
            assert sorted(seen) == list(range(count * 8)) and seen != sorted(seen)
    assert orders[0] == orders[1] != orders[2] and orders[0][: count * 8] != orders[0][count * 8 : 2 * count * 8]


def test_an_order_does_not_depend_on_where_a_run_was_resumed(tmp_path):
    shards, rows = (write_shard(tmp_path / "x_train_0.bin", range(100)),), []
    for positions in (range(0, 300, 10), (250,), (250, 90, 250, 180)):
        loader = TokenLoader(shards, 100, 10, 7)
        for loader.position in positions:
            row = loader.batch(1, 10, 0, 0, 1)[0]
            rows += [row] if loader.position == 250 else []
    assert len(rows) == 4 and all(torch.equal(rows[0], row) for row in rows)


def test_the_loader_refuses_bad_shards_before_the_first_step(tmp_path):
    good, bad = write_shard(tmp_path / "x_train_0.bin", range(50)), write_shard(tmp_path / "x_train_1.bin", range(50))
    bad.write_bytes(bad.read_bytes()[:-2])
    with pytest.raises(DataError, match="x_train_1.bin.*truncated"):
        TokenLoader((good, bad), 512)
    with pytest.raises(DataError, match="token 49 with vocab_size=49"):
        TokenLoader((good,), 49)
    loader = TokenLoader((good, write_shard(tmp_path / "x_train_3.bin", range(60))), 50)
    loader.position = 96
    with pytest.raises(DataError, match="x_train_3.bin: token 51 with vocab_size=50"):
        loader.batch(1, 5, 0, 0, 1)
    with pytest.raises(DataError, match="hold no text"):
        TokenLoader((write_shard(tmp_path / "x_train_2.bin", [1]),), 512)


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


# -- model and latents -------------------------------------------------------------------------------------------


def make(config: Config = TINY, seed: int = 0) -> tuple[GPT, Latents, Optimizer]:
    torch.manual_seed(seed)
    model = GPT(config)
    latents = Latents(model, config)
    return model, latents, Optimizer(latents, config)


def latents_of(latents: Latents) -> dict[str, torch.Tensor]:
    return {name: latent.clone() for name, _, latent, _ in latents.named()}


def give_gradients(model: GPT, latents: Latents, gradients: dict[str, torch.Tensor]) -> None:
    """As if a backward pass had left them."""
    for name, p in model.named_parameters():
        p.grad = gradients[name].to(p.dtype)
    latents.accumulate(torch.tensor(0.0), 1)


def check_params_are_stored(model: GPT, latents: Latents) -> None:
    """Every param is dequantize(quantize(its latent)), by the one format of its name."""
    params = dict(model.named_parameters())
    assert {name for name, *_ in latents.named()} == params.keys()
    for name, fmt, latent, stored in latents.named():
        assert fmt == format_of(model.config, name, params[name].ndim)
        again = fmt.quantize(latent)
        assert torch.equal(again.codes, stored.codes), name
        assert params[name].dtype == torch.bfloat16 and torch.equal(params[name].data, fmt.dequantize(again)), name


def test_params_are_what_is_stored_and_every_one_is_covered():
    model, latents, _ = make()
    check_params_are_stored(model, latents)
    ternary = [n for n, fmt, *_ in latents.named() if fmt.spec()["kind"] == "ternary"]
    assert len(ternary) == 6 * TINY.num_layers


def test_blocks_start_as_the_identity_with_zero_groups():
    model, _, _ = make()
    ids = torch.randint(TINY.vocab_size, (2, 16))
    loss = model(ids, ids)
    loss.backward()
    assert math.isfinite(loss.item()) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (model.blocks[0].mlp.proj.weight == 0).all()


def test_the_model_is_causal_and_any_hidden_width_works():
    torch.manual_seed(0)
    config = replace(TINY, mlp_hidden=77, num_layers=3, key_offset=True)
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


def test_smear_is_half_of_the_token_before_at_first():
    torch.manual_seed(0)
    model, plain = GPT(replace(TINY, smear=True)), GPT(TINY)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n != "smear"})
    x = plain.embed(torch.tensor([[5, 9, 9]]))
    half = torch.stack((x[:, 0] / 2, (x[:, 0] + x[:, 1]) / 2, (x[:, 1] + x[:, 2]) / 2), dim=1)
    assert torch.allclose(model.embed(torch.tensor([[5, 9, 9]])), half)
    assert artifact_meta(replace(TINY, smear=True))["config"]["smear"] is True
    assert "smear" not in artifact_meta(TINY)["config"]


def test_half_of_a_key_is_of_the_token_before():
    """A query that is large in the slow dimensions finds the token after the one that is like it."""
    attention = GPT(replace(TINY, num_heads=4, key_offset=True)).blocks[0].attn
    attention.proj, k, v = torch.nn.Identity(), torch.zeros(1, 1, 5, 8), torch.eye(5, 8)[None, None]

    def finds(key: int, query: int) -> int:
        """The token that the last one attends to where token 1 is large in a dimension of its key."""
        k.zero_()[0, 0, 1, key] = 1
        q = torch.zeros(1, 1, 5, 8)
        q[..., query] = 100
        return int(attention.mix(q, k, v)[0, 4].argmax())

    assert finds(2, 2) == finds(7, 7) == 2  # slow: 2, 3, 6, 7
    assert finds(0, 0) == finds(5, 5) == 1  # fast: as ever
    assert artifact_meta(replace(TINY, key_offset=True))["config"]["key_offset"] is True
    assert "key_offset" not in artifact_meta(TINY)["config"]


def test_an_artifact_that_says_more_or_less_than_this_trainer_knows_is_refused():
    model, latents, _ = make()
    packed, meta = latents.pack([n for n, _ in model.named_parameters()]), artifact_meta(TINY)
    ids = torch.arange(40)[None]
    older = meta["config"] | {"rope_base": 10000.0, "mlp_mult": 3}  # named in any case, once
    with torch.no_grad():
        for config in (meta["config"], older):
            assert torch.equal(model_from_stored(packed, meta | {"config": config}).hidden(ids), model.hidden(ids))
    less = {name: value for name, value in older.items() if name != "num_heads"}
    for config in (older | {"activation_bits": 8}, less, [], None):  # activations of 8 bits are another model
        with pytest.raises(ConfigError, match="configuration is not one of this trainer"):
            model_from_stored(packed, meta | {"config": config})


# -- the step ----------------------------------------------------------------------------------------------------


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
    assert latents.loss_word()[0] == pytest.approx(float(torch.stack(losses).detach().mean()), abs=1e-4)
    optimizer.step(lr_scale=1.0, momentum=0.9)
    latents.refresh()

    state = optimizer.state()  # after the first step it tells the gradients
    for name, latent in latents_of(latents).items():
        grad = state[f"momentum/{name}"] if name in matrices else state[f"exp_avg/{name}"] / (1 - config.beta1)
        scale = w[name].grad.norm()
        assert scale > 0 and (grad - w[name].grad).norm() <= 2**-6 * scale, f"gradient of {name}"
        if name in matrices:
            moved, expected = latent - before[name], w[name].detach() - before[name]
            assert expected.norm() > 0
            assert (moved - expected).norm() <= 0.05 * expected.norm(), f"Muon's update of {name} (bf16 iterations)"
        else:  # Adam's first step is lr * sign(g): compare where the gradient is not noise
            clear = w[name].grad.abs() > 2**-4 * w[name].grad.abs().max()
            torch.testing.assert_close(latent[clear], w[name].detach()[clear], rtol=1e-3, atol=1e-4)
    check_params_are_stored(model, latents)  # and the params are those of the new latents


def test_muons_second_step_has_nesterov_momentum():
    """The first step cannot tell: there the momentum is the gradient, and Newton-Schulz ignores its length."""
    model, latents, optimizer = make()
    name, m, before, grads = "blocks.0.mlp.fc.weight", 0.8, [], []
    for _ in range(2):
        gradients = {n: torch.randn(p.shape).bfloat16() for n, p in model.named_parameters()}
        give_gradients(model, latents, gradients)
        grads.append(gradients[name].float())
        before.append(latents_of(latents)[name])
        optimizer.step(1.0, m)
    buffer = m * grads[0] + grads[1]
    update = textbook_newton_schulz(grads[1] + m * buffer, TINY.muon_backend_steps).float()
    rows, cols = update.shape
    expected = -TINY.matrix_lr * max(1, rows / cols) ** 0.5 * update
    assert (latents_of(latents)[name] - before[1] - expected).norm() < 0.05 * expected.norm()


def test_micro_batches_accumulate_in_fp32():
    model, latents, optimizer = make()
    for value in [1.0] + [2.0**-9] * 8:  # in bf16 each small addend would vanish: 1 + 2^-9 rounds to 1
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        latents.accumulate(torch.tensor(value), 1)
    assert latents.loss_word()[0] == 1 + 8 * 2.0**-9
    optimizer.step(1.0, 0.9)
    momenta = {name: x for name, x in optimizer.state().items() if name.startswith("momentum/")}
    assert len(momenta) == 6 * TINY.num_layers and all((x == 1 + 8 * 2.0**-9).all() for x in momenta.values())


@pytest.mark.parametrize("fp32_products", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_newton_schulz_makes_singular_values_near_one_and_stacks_as_singles(shape, fp32_products, monkeypatch):
    monkeypatch.setattr(kernels, "FP32_PRODUCTS", fp32_products)
    g = torch.randn(3, *shape)
    x = newton_schulz(g, 5)
    s = torch.linalg.svdvals(x.float())
    assert s.min() > 0.4 and s.max() < 1.5
    for i in range(3):
        assert torch.equal(newton_schulz(g[i : i + 1], 5)[0], x[i])
        reference = textbook_newton_schulz(g[i], 5)
        assert (x[i].double() - reference).norm() < 0.05 * reference.norm()


def test_weight_decay_and_clipping_do_something():
    def step(**changes):
        model, latents, optimizer = make(replace(TINY, **changes))
        before = latents_of(latents)
        give_gradients(model, latents, {n: torch.ones(p.shape) for n, p in model.named_parameters()})
        optimizer.step(1.0, 0.9)
        return before, latents_of(latents), optimizer.state()

    before, plain, _ = step()
    _, decayed, _ = step(muon_wd=0.5)
    name = "blocks.0.mlp.fc.weight"
    torch.testing.assert_close(decayed[name], plain[name] - 0.04 * 0.5 * before[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(decayed["tok_emb.weight"], plain["tok_emb.weight"])
    _, _, clipped = step(grad_clip_norm=0.5)
    total = sum((x if name.startswith("momentum/") else x / 0.1).square().sum() for name, x in clipped.items()
                if name.startswith(("momentum/", "exp_avg/")))
    assert math.sqrt(total) == pytest.approx(0.5, rel=1e-3)


def test_zero_frac_and_churn_are_of_codes():
    zero_frac, churn = make()[1].refresh(measure=True)
    assert 0.2 < zero_frac < 0.6 and churn == 0.0  # nothing has moved since
    assert all(map(math.isnan, make(replace(TINY, matrix_format="bf16"))[1].refresh(measure=True)))
    assert all(map(math.isnan, make()[1].refresh()))  # not asked for


def test_each_rank_keeps_the_latents_that_it_owns():
    class Mute(Ranks):
        """A rank whose words nobody hears."""

        def call(self, function, *args, **kwargs):
            return None

    for world in (2, 3, 8):
        owner, kept = owners(TINY, world), {}
        for rank in range(world):
            torch.manual_seed(0)
            latents = Latents(GPT(TINY), TINY, Mute(rank, world))
            assert [name for name, *_ in latents.named()] == list(dict.fromkeys(name for name, *_ in latents.named()))
            kept |= {name: rank for name, _, latent, _ in latents.named() if latent is not None}
        assert kept == owner


# -- state -------------------------------------------------------------------------------------------------------


def train_step(model: GPT, latents: Latents, optimizer: Optimizer, seed: int) -> None:
    ids = torch.randint(TINY.vocab_size, (4, 33), generator=torch.Generator().manual_seed(seed))
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    latents.accumulate(loss, 1)
    optimizer.step(1.0, 0.9)
    latents.refresh()


def test_the_optimizers_state_is_all_that_the_next_steps_depend_on():
    a, b = make(), make(seed=99)
    train_step(*a, 1)
    saved = {name: x.clone() for name, x in a[2].state().items()}
    b[2].load_state(saved, 1)
    for seed in (2, 3):
        train_step(*a, seed)
        train_step(*b, seed)
    mine, theirs = a[2].state(), b[2].state()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True))
    with pytest.raises(ValueError, match="missing or not known"):
        b[2].load_state({k: v for k, v in saved.items() if k != "latent/skip_weights"}, 1)


# -- the loop, in process ----------------------------------------------------------------------------------------


class Clock:
    """time.perf_counter, which goes on only when the model computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


@pytest.mark.parametrize(("lengths", "val_loss_every"), [([0.7], 0), ([0.7], 3), ([0.5, 0.5, 2.0], 0)])
def test_no_step_begins_that_would_end_after_the_cap(data_dir, tmp_path, monkeypatch, lengths, val_loss_every):
    """A step is taken to last as long as the one before. Validations are inside the clock, and in what is saved."""
    clock, cap, begun, saved = Clock(monkeypatch), 10.0, [], []
    trainer = tiny_trainer(data_dir, tmp_path, "--iterations", 10**6, "--max-wallclock-seconds", cap,
                           "--val-loss-every", val_loss_every, "--train-log-every", 1, "--checkpoint-every", 3)

    def compute(*_) -> None:
        if torch.is_grad_enabled():
            begun.append(clock.now - 1000)
            if len(begun) == 4:
                saved.append(read_state(trainer.folder.path)["elapsed"])
            clock.now += lengths[len(begun) % len(lengths)]
        else:
            clock.now += 0.01  # a batch of a validation

    trainer.model.blocks[0].register_forward_pre_hook(compute)
    trainer.train()
    trainer.folder.close()
    folder = trainer.folder.path
    steps, validations = metrics(folder, "train"), metrics(folder, "val")
    took = [step["step_seconds"] for step in steps]
    assert took == pytest.approx([lengths[(i + 1) % len(lengths)] for i in range(len(begun))])
    assert saved == [begun[3]]
    for start, before in zip(begun[1:], took, strict=False):
        assert start + before <= cap + 1e-6
    end = metrics(folder, "phase")[-1]["seconds"]  # of the training
    assert end <= cap + max(took) - min(took) + 1e-6 and end + took[-1] > cap, "a step too many or too few"
    assert len(validations) == (len(steps) // val_loss_every if val_loss_every else 0)
    assert sum(took) + sum(v["seconds"] for v in validations) == pytest.approx(end)
    assert "stopping_early: wallclock_cap" in (folder / "log.txt").read_text()
    for i, (step, start) in enumerate(zip(steps, begun, strict=True)):  # the warmdown follows the clock
        assert step["lr_scale"] == pytest.approx(schedule(trainer.config, i, start / cap).lr_scale)


def test_ramps_run(data_dir, tmp_path):
    trainer = tiny_trainer(data_dir, tmp_path, "--seq-ramp-start", 16, "--batch-ramp-start", 512,
                           "--micro-batch-tokens", 256, "--iterations", 12, "--train-log-every", 1)
    trainer.train()
    trainer.folder.close()
    steps = metrics(trainer.folder.path, "train")
    assert [steps[i]["seq_len"] for i in (0, -1)] == [16, 64] and [steps[i]["tokens"] for i in (0, -1)] == [512, 1024]
    assert steps[-1]["tokens_seen"] == sum(step["tokens"] for step in steps)


def test_a_host_that_is_ahead_trains_the_same(data_dir, tmp_path):
    """As on a GPU, where a loss is read when the next step was asked for, unless it is logged."""
    found, known = [], []
    for ahead in (0, 1):
        trainer = tiny_trainer(data_dir, tmp_path, "--run-id", str(ahead), "--iterations", 13, "--train-log-every", 12)
        trainer.ahead = ahead
        trainer.after_step = lambda plan, trainer=trainer: known.append((trainer.step, len(trainer.asked)))
        trainer.train()
        found.append((latents_of(trainer.latents), metrics(trainer.folder.path, "train"), trainer.loss))
        trainer.folder.close()
    assert all(torch.equal(x, found[1][0][name]) for name, x in found[0][0].items())
    assert [step["loss"] for step in found[0][1]] == [step["loss"] for step in found[1][1]]
    assert [step["step"] for step in found[0][1]] == [*range(1, 11), 12] and found[0][2] == found[1][2]
    assert [asked for _, asked in known] == [0] * 13 + [0] * 10 + [1, 0, 1]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_loss_that_is_not_finite_is_that_of_its_step(data_dir, tmp_path, ahead):
    trainer = tiny_trainer(data_dir, tmp_path, "--iterations", 20)
    trainer.ahead, accumulate = ahead, trainer.latents.accumulate

    def poisoned(loss, *args, **kwargs):
        accumulate(torch.tensor(math.inf) if trainer.step == 12 else loss, *args, **kwargs)

    trainer.latents.accumulate = poisoned
    with pytest.raises(TrainingError, match=r"step 13: .* is not finite \(loss inf\)"):
        trainer.train()
    assert trainer.step == 13 + ahead
    trainer.folder.close()


@pytest.mark.parametrize("what", ["an activation", "a latent"])
def test_what_is_not_finite_is_named(data_dir, tmp_path, what):
    trainer = tiny_trainer(data_dir, tmp_path, "--iterations", 3, "--checkpoint-every", 1)
    name = "blocks.1.mlp.fc.weight"
    if what == "an activation":
        trainer.model.get_parameter(name).data[0, 0] = torch.inf
        said = "step 1: the output of blocks.1.mlp.fc is not finite"
    else:
        trainer.after_step = lambda plan: trainer.latents.load(
            latents_of(trainer.latents) | {name: torch.full((80, 32), torch.nan)}, "a test")
        said = f"step 1: the weights of {name} is not finite; no checkpoint was written yet"
    with pytest.raises(TrainingError, match=said):
        trainer.train()
    trainer.folder.close()
    assert not trainer.folder.checkpoint.exists()


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(data_dir, tmp_path, capsys, checkpoint_every):
    diverge = ["--tied-embed-lr", "3e37", "--lr-warmup-steps", 0, "--checkpoint-every", checkpoint_every]
    assert main(tiny_args(data_dir, tmp_path, *diverge)) == 1
    err, folder = capsys.readouterr().err, tmp_path / "tiny_seed1337"
    assert err.startswith("error: step 2: the gradient of skip_weights is not finite") and err.count("\n") == 1, err
    assert not (folder / "model.tern").exists() and err.strip() in (folder / "log.txt").read_text()
    assert (folder / "checkpoint.safetensors").exists() == bool(checkpoint_every)
    if checkpoint_every:
        arrays, state = read_checkpoint(folder)
        assert state["step"] == 1 and str(folder / "checkpoint.safetensors") in err
        assert all(np.isfinite(x).all() for x in arrays.values() if x.dtype == np.float32)
