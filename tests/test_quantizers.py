"""Every storage format and quantization schedule in training: what is trained is what is stored, through kills too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_patches import SMALL, restored

import pack
import train_gpt
from ablations import formats, patches
from conftest import NAME, ROOT, metrics, run, tiny_args, tiny_trainer
from tern.checkpoints import CheckpointError
from tern.settings import ConfigError
from train_gpt import GPT, Config, Latents, Optimizer, schedule


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with restored():
        formats.register()
        yield


def trained(config: Config, steps: int, seed: int = 0) -> tuple[GPT, Latents, Optimizer]:
    torch.manual_seed(seed)
    model = GPT(config)
    latents = Latents(model, config)
    optimizer = Optimizer(latents, config)
    more_steps(model, latents, optimizer, range(steps))
    return model, latents, optimizer


def more_steps(model: GPT, latents: Latents, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(step))
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        latents.accumulate(loss, 1)
        optimizer.step(1.0, 0.95)
        latents.refresh()


def same_params(a: GPT, b: GPT) -> bool:
    return all(torch.equal(p.data, q.data) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("settings", [
    {"matrix_format": "ternary"}, {"ternary_rule": "lsq", "threshold": 0.7}, {"ternary_rule": "rms"},
    {"matrix_format": "binary"}, {"matrix_format": "five"}, {"matrix_format": "elastic"}, {"matrix_format": "int2"},
    {"matrix_format": "int8", "embed_format": "five"}, {"matrix_format": "codebook3"},
    {"embed_format": "codebook4", "group_size": 0}, {"matrix_format": "fp8", "embed_format": "elastic"}], ids=str)
def test_each_format_trains_packs_and_resumes(settings, tmp_path):
    config = replace(SMALL, **settings)
    model, latents, optimizer = trained(config, 4)
    order = [name for name, _ in model.named_parameters()]
    pack.write_artifact(tmp_path / "model.tern", latents.pack(order), train_gpt.artifact_meta(config))
    tensors, meta = pack.read_artifact(tmp_path / "model.tern")
    loaded = train_gpt.model_from_stored(tensors, meta)
    assert same_params(model, loaded)
    ids = torch.randint(64, (2, 32))
    with torch.no_grad():
        assert torch.equal(model.head(model.hidden(ids)), loaded.head(loaded.hidden(ids)))
    for name in ("blocks.0.mlp.fc.weight", "tok_emb.weight"):
        assert tensors[name].format == train_gpt.format_of(config, name, 2).spec()
    state = {name: x.clone() for name, x in optimizer.state().items()}
    more_steps(model, latents, optimizer, range(4, 6))
    again, other_latents, other_optimizer = trained(config, 0, seed=1)
    other_optimizer.load_state(state, 4)
    more_steps(again, other_latents, other_optimizer, range(4, 6))
    assert same_params(model, again)


# Formats that learn ---------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(("name", "what"), [("elastic", "theta"), ("codebook4", "codebook")])
def test_what_a_format_learns_belongs_to_a_run(name, what):
    """It moves with each step, is in the checkpoint and counted, and starts anew with new latents."""
    model, latents, optimizer = trained(replace(SMALL, matrix_format=name), 3)
    key = f"{what}/blocks.0.mlp.fc.weight"
    state = {name: x.clone() for name, x in optimizer.state().items()}
    more_steps(model, latents, optimizer, range(3, 4))
    now = optimizer.state()[key]
    assert not torch.equal(now, state[key]) and torch.isfinite(now).all()
    assert optimizer.bytes_held() > trained(SMALL, 3)[2].bytes_held()
    fresh = trained(replace(SMALL, matrix_format=name), 0)[2].state()
    latents.load({name.removeprefix("latent/"): x for name, x in fresh.items() if name.startswith("latent/")}, "there")
    assert torch.equal(optimizer.state()[key], fresh[key])
    for wrong in ({key: state[key][:1]}, {}):
        with pytest.raises(ValueError, match=key):
            optimizer.load_state({n: x for n, x in state.items() if n != key} | wrong, 3)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["elastic", "codebook4"])
def test_formats_that_learn_leave_full_precision_alone(name):
    patches.codebook(0.99, 0.5)
    _, latents, optimizer = trained(replace(SMALL, matrix_format=name), 0)
    plain = trained(SMALL, 0)
    for it in (latents, plain[1]):
        it.flat_grad.copy_(torch.randn(len(it.flat_grad), generator=torch.Generator().manual_seed(1)))
        for bank in it.mine:
            bank.latent.copy_(torch.randn(bank.latent.shape, generator=torch.Generator().manual_seed(2)))
        it.refresh(0.0)
    optimizer.step(1.0, 0.95)
    plain[2].step(1.0, 0.95)
    for mine, other in zip(latents.mine, plain[1].mine, strict=True):
        assert torch.equal(mine.latent, other.latent), mine.names


@pytest.mark.fast
def test_the_settings_of_codebooks_are_a_patch():
    patches.apply(["codebook=0.9,0.01"])
    _, latents, _ = trained(replace(SMALL, matrix_format="codebook3"), 0)
    bank = next(b for b in latents.banks if b.optimizer == "muon")
    assert bank.format.spec() == {"kind": "codebook", "entries": 3, "group_size": 32, "decay": 0.9, "commitment": 0.01}


@pytest.mark.fast
def test_an_index_of_zero_is_no_zero():
    _, latents, _ = trained(replace(SMALL, matrix_format="codebook4"), 1)
    zero_frac, churn = latents.refresh(measure=True)
    assert math.isnan(zero_frac) and churn == 0
    assert trained(SMALL, 1)[1].refresh(measure=True)[0] > 0.1


@pytest.mark.fast
def test_elastic_has_no_threshold():
    with pytest.raises(ConfigError, match="threshold=0.7"):
        replace(SMALL, matrix_format="elastic", threshold=0.7)


def test_learning_needs_one_process(data_dir, tmp_path):
    options = tiny_args(data_dir, tmp_path, "--matrix-format", "elastic")
    done = run("train", *options, program="ablations/program.py", ranks=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "elastic learns beside the latents, which works in one process, not in 2" in errors[0]


# Schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_when_params_are_quantized():
    late, annealed = replace(SMALL, quantize_start=0.3), replace(SMALL, quantize_start=0.2, quantize_ramp=0.5)
    at = [0.0, 0.1, 0.3, 0.45, 0.7, 1.0]
    assert [schedule(SMALL, 0, p).quantized for p in at] == [1.0] * 6
    assert [schedule(late, 0, p).quantized for p in at] == [0, 0, 1, 1, 1, 1]
    assert [schedule(annealed, 0, p).quantized for p in at] == pytest.approx([0, 0, 0.2, 0.5, 1, 1])
    assert schedule(replace(SMALL, quantize_start=1.0), 0, 0.999).quantized == 0


@pytest.mark.fast
def test_params_between_latent_and_stored():
    model, latents, _ = trained(SMALL, 2)
    name = "blocks.0.mlp.fc.weight"
    weight = model.get_parameter(name)
    whole = weight.data.clone()
    latent = next(latent for n, _, latent, _ in latents.named() if n == name)
    latents.refresh(0.0)
    assert torch.equal(weight.data, latent.bfloat16())
    latents.refresh(0.25)
    assert torch.equal(weight.data, (0.75 * latent + 0.25 * whole.float()).bfloat16())
    latents.refresh()
    assert torch.equal(weight.data, whole)


LATE = ("--quantize-start", 0.4, "--quantize-ramp", 0.4, "--iterations", 10)


def test_late_quantization_on_two_ranks_packs_what_it_scored(data_dir, tmp_path):
    done = run(*tiny_args(data_dir, tmp_path, *LATE, "--checkpoint-every", 5), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    final = metrics(tmp_path / NAME, "final")[0]
    assert final["roundtrip_gap"] == 0 and final["logits_identical"]
    assert final["score"]["model"]["not_ternary_matrices"] == []


def test_late_quantization_resumes_in_the_middle(data_dir, tmp_path):
    whole = tiny_trainer(data_dir, tmp_path / "whole", *LATE)
    whole.train()
    cut = tiny_trainer(data_dir, tmp_path / "cut", *LATE, "--checkpoint-every", 6)
    save = cut.save

    def save_and_stop() -> None:
        save()
        raise KeyboardInterrupt

    cut.save = save_and_stop
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.folder.close()
    assert cut.step == 6 and 0 < cut.quantized < 1
    on = tiny_trainer(data_dir, tmp_path / "cut", *LATE, "--checkpoint-every", 6, "--resume", "auto")
    assert on.step == 6 and on.quantized == cut.quantized
    on.train()
    assert same_params(whole.model, on.model)
    for trainer in (whole, on):
        trainer.folder.close()


def test_after_training_only_is_rounding_a_full_precision_run(data_dir, tmp_path):
    trainers = [tiny_trainer(data_dir, tmp_path / name, "--iterations", 4, *more) for name, more in (
        ("bf16", ("--matrix-format", "bf16")), ("after", ("--quantize-start", 1)))]
    for trainer in trainers:
        trainer.train()
    exact, rounded = ({n: (x, s) for n, _, x, s in t.latents.named()} for t in trainers)
    for name, (latent, _) in exact.items():
        assert torch.equal(latent, rounded[name][0]), "quantization has not touched training"
    name = "blocks.0.mlp.fc.weight"
    fmt = train_gpt.format_of(trainers[1].config, name, 2)
    assert torch.equal(rounded[name][1].codes, fmt.quantize(exact[name][0]).codes)
    assert torch.equal(trainers[1].model.get_parameter(name).data, fmt.dequantize(rounded[name][1]))
    for trainer in trainers:
        trainer.folder.close()


# Starting from other latents ------------------------------------------------------------------------------------


def test_training_starts_from_a_checkpoints_latents(data_dir, tmp_path, tiny_run):
    trainer = tiny_trainer(data_dir, tmp_path, "--init-from", tiny_run[0], "--matrix-format", "int4")
    theirs, _ = train_gpt.load_checkpoint(tiny_run[0])
    for name, _, latent, _ in trainer.latents.named():
        assert torch.equal(latent, theirs[f"latent/{name}"]), name
    assert trainer.step == 0
    trainer.folder.close()


def test_a_start_that_does_not_fit_is_one_error(data_dir, tmp_path, tiny_run):
    for i, (more, message) in enumerate(((("--mlp-hidden", 96), "mlp.fc.weight is missing there, or of another shape"),
                                         (("--num-layers", 3), "is missing there"))):
        with pytest.raises(CheckpointError, match=message):
            tiny_trainer(data_dir, tmp_path / str(i), "--init-from", tiny_run[0], *more)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        tiny_trainer(data_dir, tmp_path / "none", "--init-from", tmp_path / "nothing")


@pytest.mark.fast
def test_latents_of_another_model_are_refused():
    latents = trained(SMALL, 0)[1]
    own = {name: latent.clone() for name, _, latent, _ in latents.named()}
    latents.load(own, "there")
    with pytest.raises(CheckpointError, match="there: blocks.9.mlp.fc.weight .* this model has none"):
        latents.load(own | {"blocks.9.mlp.fc.weight": torch.zeros(2, 2)}, "there")


# What the packer expects of a format, and what a page says of it -------------------------------------------------

# Rows of docs/quantizers.md: name -> settings.
PAGE_FORMATS = {
    "ternary": {}, "ternary, lsq": {"ternary_rule": "lsq", "threshold": 0.7}, "ternary, rms": {"ternary_rule": "rms"},
    "ternary, elastic": {"matrix_format": "elastic"}, "binary": {"matrix_format": "binary"},
    "five": {"matrix_format": "five"}, "codebook2": {"matrix_format": "codebook2"},
    "codebook4": {"matrix_format": "codebook4"}, "codebook16": {"matrix_format": "codebook16"},
    "int2": {"matrix_format": "int2"}, "int4": {"matrix_format": "int4"}, "int6": {"matrix_format": "int6"},
    "int8": {"matrix_format": "int8"}, "bf16": {"matrix_format": "bf16"},
}


def true_bits(settings: dict) -> float:
    """Bits per weight in a file that holds a normal matrix [128, 512] in groups of 128."""
    fmt = train_gpt.make_format(Config(**settings), "matrix_format")
    latent = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    data = pack.encode_artifact({"w": train_gpt.to_pack(fmt.quantize(latent), fmt)}, {})
    return 8 * sum(stream.bytes for stream in pack.parse_header(data).streams) / latent.numel()


def test_true_bits_are_those_of_the_page():
    lines = [line for line in (ROOT / "docs/quantizers.md").read_text().splitlines() if line.startswith("| `")]
    said = {line.split("`")[1]: float(line.split("|")[4]) for line in lines}
    assert {name: true_bits(settings) for name, settings in PAGE_FORMATS.items()} == pytest.approx(said, rel=0.01)


@pytest.mark.parametrize("settings", [
    {"threshold": 0.0}, {"threshold": 1.2}, {"ternary_rule": "lsq", "threshold": 0.7}, {"ternary_rule": "rms"}],
    ids=str)
def test_a_plan_knows_what_a_threshold_does_to_the_codes(settings):
    expected = pack.expected_bits(train_gpt.make_format(Config(**settings), "matrix_format").spec())
    scales = 2.2 / 128  # of an untrained matrix: less than a trained one's
    assert true_bits(settings) - scales == pytest.approx(expected["codes"], rel=0.012)


@pytest.mark.fast
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 512])
def test_a_plan_knows_what_ints_of_a_matrix_take(bits, group):
    fmt = train_gpt.make_format(Config(matrix_format=f"int{bits}", group_size=group), "matrix_format")
    codes = fmt.quantize(torch.randn(512, 512, generator=torch.Generator().manual_seed(0))).codes
    shares = codes.flatten().int().add(128).bincount().double() / codes.numel()
    order0 = float(torch.special.entr(shares).sum() / math.log(2))
    assert pack.expected_bits(fmt.spec(), shape=(512, 512))["codes"] == pytest.approx(order0, rel=0.03)
