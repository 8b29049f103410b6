"""Exports and imports: the same bits as the model's, blocks as they are published, one error for what does not fit."""

from __future__ import annotations

import ast
import base64
import errno
import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import independent_decoder
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import sentencepiece as spm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_bpb
import pack
import tern
import train_gpt
from ablations import formats
from conftest import is_one_error
from tern import exports, gguf_files, groups, safetensors_files, source
from tern.checkpoints import CheckpointError
from tern.exports import ExportError
from tern.logscale import log_values
from tern.settings import ConfigError
from train_gpt import GPT, Config, Float, Int, Latents, Ternary, param_shapes

fast = pytest.mark.fast
ABOUT = "ternary-golf"
TINY = Config(vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, mlp_hidden=72, train_seq_len=32,
              train_batch_tokens=64, eval_stride=0, group_size=32, embed_format="int5", smear=True, key_offset=True,
              copy_dim=16)
WIDE = replace(TINY, model_dim=256, mlp_hidden=256, group_size=256)  # every matrix has whole blocks of 256


@dataclass
class Made:
    """A random model and its artifact."""

    file: Path
    model: GPT
    latents: dict[str, torch.Tensor]

    def logits(self) -> torch.Tensor:
        return logits(self.model)


@torch.no_grad()
def logits(model: GPT) -> torch.Tensor:
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(5))
    return model.head(model.hidden(ids))


@functools.cache
def random_model(config: Config) -> tuple[GPT, dict[str, torch.Tensor], dict[str, pack.StoredTensor]]:
    """(model, its latents, what a file holds of them)."""
    torch.manual_seed(1)
    model = GPT(config)
    for p in model.parameters():  # some are born as zeros
        p.data = torch.randn_like(p) * 0.1 + (p.ndim == 1)
    latents = {name: p.data.clone() for name, p in model.named_parameters()}
    return model, latents, Latents(model, config).pack(list(latents))


@functools.cache
def packed(config: Config, **meta: str) -> bytes:
    return pack.encode_artifact(random_model(config)[2], {"config": config_of(config)} | meta)


def config_of(config: Config) -> dict:
    """As artifacts have it."""
    return train_gpt.artifact_meta(config)["config"]


def latents(config: Config = TINY) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in random_model(config)[1].items()}


def make(folder: Path, config: Config = TINY, **meta: str) -> Made:
    file = folder / "model.tern"
    file.write_bytes(packed(config, **meta))
    return Made(file, random_model(config)[0], latents(config))


# Two groups to a block in w, one in v.
SMALL = {
    "w": pack.StoredTensor((2, 256), {"kind": "ternary", "group_size": 128, "scale": "bf16"},
                           np.resize(np.array([1, 0, -1], np.int8), (2, 256)),
                           np.array([[0x3F80, 0x4000], [0x3F80, 0x3F80]], np.uint16)),
    "v": pack.StoredTensor((1, 256), {"kind": "ternary", "group_size": 0, "scale": "fp16"},
                           np.resize(np.array([1, -1, -1], np.int8), (1, 256)), np.array([[0x3C00]], np.uint16)),
    "gain": pack.StoredTensor((3,), {"kind": "bf16"}, np.array([0x3F80, 0x8000, 0x4049], np.uint16), None),
}


def refused(capsys, *argv: object) -> str:
    """The one line that says why a command did nothing."""
    assert is_one_error(pack.main([str(a) for a in argv]), err := capsys.readouterr().err)
    return err


# Values -------------------------------------------------------------------------------------------------------

SCALED = [Ternary(8, scale=s) for s in groups.SCALE_DTYPES]
SCALED += [Ternary(), Ternary(0), Ternary(5), formats.Binary(7), formats.Five(8, "fp16"), formats.Five(0),
           formats.Codebook(3, 0), formats.Codebook(4, 9)]
SCALED += [Int(bits, size, scale) for bits, size, scale in (
    (2, 8, "log7"), (3, 6, "log4"), (4, 0, "fp16"), (5, 128, "log7"), (6, 7, "bf16"), (7, 20, "log8"), (8, 3, "fp16"))]


@fast
@pytest.mark.parametrize("fmt", [*SCALED, *map(Float, ("bf16", "fp16", "fp8"))], ids=str)
def test_values_are_the_params_that_the_trainer_makes_bit_for_bit(fmt):
    for shape in ((6, 20), (3, 8), (5, 1), (17,)):
        for size in (1e-4, 0.02, 30.0):
            t = train_gpt.to_pack(fmt.quantize(torch.randn(shape) * size), fmt)
            bits = exports.bf16_bits(t)
            param = fmt.dequantize(train_gpt.Stored(groups.from_patterns(t.codes, t.format["kind"]), None if t.scales is
                                   None else groups.from_patterns(t.scales, t.format.get("scale", "bf16"))))
            assert bits.shape == shape and bits.dtype == np.uint16
            assert (bits == param.view(torch.uint16).numpy()).all()
            values = independent_decoder.values(t.format, t.codes, t.scales)  # written from docs/format.md
            assert (exports.bf16_values(bits) == values).all()


@fast
def test_every_pattern_of_a_float_and_every_tie_is_rounded_as_torch_rounds_it():
    for kind, count in (("fp8", 2**8), ("fp16", 2**16), ("bf16", 2**16)):
        patterns = np.arange(count).astype(f"u{2 if count > 256 else 1}")
        param = groups.from_patterns(patterns, kind).bfloat16()
        finite = torch.isfinite(param).numpy()
        assert (exports.rounded_param(pack.StoredTensor((count,), {"kind": kind}, patterns, None))[finite] ==
                param.view(torch.uint16).numpy()[finite]).all()
    near = np.arange(0x3F7F0000, 0x3F820000, 0x1000, np.uint32)[:, None] + np.arange(-2, 3)  # 1 and its neighbours
    patterns = np.concatenate((near.ravel(), near.ravel() | 0x80000000, [0x7F7FFFFF, 1, 0x80000000])).astype(np.uint32)
    bits = exports.rounded_param(pack.StoredTensor(patterns.shape, {"kind": "fp32"}, patterns, None))
    assert (bits == torch.from_numpy(patterns.view(np.float32)).bfloat16().view(torch.uint16).numpy()).all()


@fast
def test_log_scales_are_the_trainers_and_the_pages():
    for bits in range(4, 9):
        page = independent_decoder.floats(f"log{bits}", np.arange(2**bits))
        assert groups.LOG_TABLES[f"log{bits}"].tolist() == log_values(bits) == page.tolist()


# safetensors --------------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize("more", [{}, {"matrix_format": "fp16", "embed_format": "fp8", "vector_format": "fp16"},
                                  {"group_size": 0, "scale_dtype": "bf16", "matrix_format": "int3"}], ids=str)
def test_one_call_loads_an_export_to_the_same_logits(tmp_path, capsys, more):
    made = make(tmp_path, replace(TINY, **more))
    assert pack.main(["export", str(made.file), "--to", "safetensors"]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "model.safetensors"
    assert f"written     {out}  {out.stat().st_size:,} bytes" in said and "exact       every value" in said
    loaded = eval_bpb.load_artifact(out)
    assert torch.equal(logits(loaded), made.logits())
    assert torch.equal(logits(eval_bpb.load_artifact(made.file)), made.logits())
    theirs = safetensors.torch.load_file(out)  # what another program does
    for name, x in made.model.state_dict().items():
        assert torch.equal(x, theirs[name]) and x.dtype == theirs[name].dtype, name


@fast
def test_an_export_says_what_it_is_and_is_the_same_bytes_again(tmp_path):
    made, out = make(tmp_path, note="kept"), tmp_path / "x.safetensors"
    files = set()
    for _ in range(2):
        assert pack.main(["export", str(made.file), "--to", "safetensors", "-o", str(out), "--force"]) == 0
        files.add(out.read_bytes())
    assert len(files) == 1
    with safetensors.safe_open(out, framework="np") as f:
        about = json.loads(f.metadata()[ABOUT])
    assert about == {"version": 1, "meta": pack.read_artifact(made.file)[1],
                     "artifact": hashlib.sha256(made.file.read_bytes()).hexdigest()}
    assert about["meta"]["note"] == "kept" and about["meta"]["config"]["num_layers"] == 2


def test_the_tokenizer_goes_along_if_it_is_the_models(tmp_path, capsys, data_dir):
    file, model, out = data_dir / "tokenizer.model", tmp_path / "model.tern", tmp_path / "model.safetensors"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    sp = spm.SentencePieceProcessor(model_file=str(file))
    meta = {"config": {"vocab_size": sp.vocab_size()}, "tokenizer": sha256}
    pack.write_artifact(model, SMALL, meta)
    assert pack.main(["export", str(model), "--to", "safetensors", "--tokenizer", str(data_dir)]) == 0
    assert str(file) in capsys.readouterr().out
    assert safetensors_files.read(out)[1:] == (meta, file.read_bytes())
    assert pack.main(["export", str(model), "--to", "gguf", "--tokenizer", str(file)]) == 0
    fields = fields_of(tmp_path / "model.gguf")
    pieces = range(sp.vocab_size())
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.tokens"] == [sp.id_to_piece(i) for i in pieces]
    assert fields["tokenizer.ggml.scores"] == [sp.get_score(i) for i in pieces]
    assert [fields[f"tokenizer.ggml.{what}_token_id"] for what in ("bos", "unknown")] == [sp.bos_id(), sp.unk_id()]
    kinds = fields["tokenizer.ggml.token_type"]
    assert [k == gguf.TokenType.BYTE for k in kinds] == [sp.is_byte(i) for i in pieces] and gguf.TokenType.BYTE in kinds
    assert [k == gguf.TokenType.CONTROL for k in kinds] == [sp.is_control(i) for i in pieces]
    assert [i for i in pieces if kinds[i] == gguf.TokenType.UNKNOWN] == [sp.unk_id()]

    for other, why in (({"tokenizer": "0" * 64}, "the model was trained with '0000"), ({}, "400 pieces, the model 64")):
        pack.write_artifact(model, SMALL, {"config": {"vocab_size": 400 if other else 64}} | other)
        for to in ("safetensors", "gguf"):
            out = tmp_path / f"other.{to}"
            assert why in refused(capsys, "export", model, "--to", to, "-o", out, "--tokenizer", data_dir)
            assert not out.exists()
    assert "cannot be read" in refused(capsys, "export", model, "--to", "gguf", "-o", out, "--tokenizer", "nowhere")


@fast
def test_what_is_there_is_not_overwritten_unless_asked_to(tmp_path, capsys):
    file = tmp_path / "model.tern"
    pack.write_artifact(file, SMALL, {})
    held = file.read_bytes()
    for to in ("safetensors", "gguf"):
        out = tmp_path / f"model.{to}"
        out.write_bytes(b"mine")
        assert f"{out} exists; choose another name" in refused(capsys, "export", file, "--to", to)
        assert out.read_bytes() == b"mine"
        assert pack.main(["export", str(file), "--to", to, "--force"]) == 0 and out.read_bytes() != b"mine"
        assert "exists" in refused(capsys, "export", file, "--to", to, "-o", file, "--force")
        assert "exists" in refused(capsys, "export", file, "--to", to, "-o", tmp_path, "--force")
        assert "cannot write" in refused(capsys, "export", file, "--to", to, "-o", tmp_path / "no" / "x")
    assert file.read_bytes() == held
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "model.safetensors", "model.tern"]


@fast
@pytest.mark.parametrize("way", [("--to", "gguf"), ("--to", "safetensors"), ("--from", "safetensors")])
def test_no_name_is_one_error(capsys, way):
    assert "names no file" in refused(capsys, "export", "", *way)


@fast
def test_no_room_for_a_gguf_files_draft_is_one_error(tmp_path, capsys, monkeypatch):
    def full(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pack.write_artifact(tmp_path / "model.tern", SMALL, {})
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    err = refused(capsys, "export", tmp_path / "model.tern", "--to", "gguf")
    assert "draft of a GGUF file" in err and "No space left" in err and "TMPDIR" in err
    assert [p.name for p in tmp_path.iterdir()] == ["model.tern"]


@fast
def test_what_is_no_sound_artifact_is_not_exported(tmp_path, capsys):
    out = tmp_path / "x.gguf"
    file = tmp_path / "bad.tern"
    file.write_bytes(pack.encode_artifact(SMALL, {})[:-1])
    assert "damaged" in refused(capsys, "export", file, "--to", "gguf", "-o", out)
    bad = pack.StoredTensor((2,), {"kind": "bf16"}, np.array([0x3F80, 0x7FC0], np.uint16), None)
    pack.write_artifact(file, {"gain": bad}, {})
    for to in ("gguf", "safetensors"):
        assert "'gain': value [1] is not finite" in refused(capsys, "export", file, "--to", to, "-o", out)
    assert not out.exists()


@fast
def test_options_of_one_format_are_refused_with_another(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        pack.main(["export", "x.tern", "--to", "safetensors", "--reblock"])
    assert e.value.code == 2 and "are for --to gguf" in capsys.readouterr().err


# GGUF ---------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> dict[str, tuple[gguf.GGMLQuantizationType, np.ndarray]]:
    """Name -> (type, fp32 values), by the package alone."""
    return {t.name: (t.tensor_type, gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]))
            for t in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def as_gguf(folder: Path, config: Config, *options: object) -> tuple[Path, list[str]]:
    """(A GGUF file of the random model, what was said of it.)"""
    out = folder / "model.gguf"
    model = exports.Model(random_model(config)[2], {"config": config_of(config)}, "a" * 64)
    data, lines = gguf_files.encode(model, *options)
    out.write_bytes(data)
    return out, lines


def published(kind: str, codes: list[int], d: float) -> bytes:
    """A block of 256 codes, from llama.cpp's ggml-common.h and ggml-quants.c (block_tq1_0, block_tq2_0), code by code.

    TQ1_0: byte m of the first 32 has the codes m, m + 32, .., m + 128, the first of them as the highest digit in base
    3; byte m of the next 16 the codes 160 + m, 160 + m + 16, ..; the last four bytes 240 + m, .., 252 + m and a digit
    0. A number n is stored as ceil(n * 256 / 243), so that digits come out of multiplications by 3. TQ2_0: byte m of
    each half has the codes m, m + 32, m + 64, m + 96 of it, from the lowest two bits on. Then d, a little-endian fp16.
    """
    digits = [code + 1 for code in codes]
    out = bytearray()
    if kind == "TQ1_0":
        for start, step, count, terms in ((0, 32, 32, 5), (160, 16, 16, 5), (240, 4, 4, 4)):
            for m in range(count):
                number = 0
                for n in range(5):
                    number = 3 * number + (digits[start + m + n * step] if n < terms else 0)
                out.append(-(-number * 256 // 243))
    else:
        for start in (0, 128):
            for m in range(32):
                out.append(sum(digits[start + m + 32 * n] << 2 * n for n in range(4)))
    return bytes(out) + np.array(d, "<f2").tobytes()


@fast
def test_the_layout_in_numbers():
    """The rule above, in bytes that were worked out by hand."""
    assert published("TQ1_0", [0] * 256, 1.0) == b"\x80" * 48 + b"\x7f" * 4 + b"\x00\x3c"
    assert published("TQ1_0", [1] * 256, 0.5) == b"\xff" * 48 + b"\xfd" * 4 + b"\x00\x38"
    assert published("TQ1_0", [-1] * 256, 0.0) == b"\x00" * 54
    assert published("TQ2_0", [0] * 256, 1.0) == b"\x55" * 64 + b"\x00\x3c"
    assert published("TQ2_0", [1] * 128 + [-1] * 128, 2.0) == b"\xaa" * 32 + b"\x00" * 32 + b"\x00\x40"
    first = [1] + [-1] * 255  # digit 2 at the highest place: 2 * 81 * 256 / 243 = 170.7; and in the lowest two bits
    assert published("TQ1_0", first, 1.0)[:2] == b"\xab\x00" and published("TQ2_0", first, 1.0)[:2] == b"\x02\x00"


@fast
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_blocks_are_as_published_and_give_the_values_back(tmp_path, kind):
    config = replace(WIDE, attn_window=16, eval_seq_len=64)
    model, _, tensors = random_model(config)
    out, lines = as_gguf(tmp_path, config, kind, False)
    back, params = read_gguf(out), model.state_dict()
    assert list(back) == list(tensors) and lines[-1].startswith("exact       every value, bit for bit")
    for name, (type_, values) in back.items():
        t, param = tensors[name], params[name].float().numpy()
        assert (values.view(np.uint32) == param.view(np.uint32)).all()
        assert type_.name == (kind if t.format["kind"] == "ternary" else "BF16"), name
    for raw in gguf.GGUFReader(out).tensors:
        if raw.tensor_type.name == kind:
            t = tensors[raw.name]
            scales = groups.decode_scales(torch.from_numpy(t.scales), "log7").flatten().tolist()
            blocks = zip(t.codes.reshape(-1, 256).tolist(), scales, strict=True)
            assert raw.data.tobytes() == b"".join(published(kind, *block) for block in blocks), raw.name
    assert sum(type_.name == kind for type_, _ in back.values()) == 14
    bits = {name: (values.view(np.uint32) >> 16).astype(np.uint16) for name, (_, values) in back.items()}
    stored = {name: pack.StoredTensor(x.shape, {"kind": "bf16"}, x, None) for name, x in bits.items()}
    fields = fields_of(out)
    assert torch.equal(logits(train_gpt.model_from_stored(stored, json.loads(fields[f"{ABOUT}.meta"]))), logits(model))
    assert fields["general.architecture"] == ABOUT and fields[f"{ABOUT}.block_count"] == 2
    assert fields[f"{ABOUT}.attention.head_count_kv"] == 2 and fields[f"{ABOUT}.feed_forward_length"] == 256
    assert fields[f"{ABOUT}.context_length"] == 64 and fields[f"{ABOUT}.attention.sliding_window"] == 16
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    assert fields[f"{ABOUT}.artifact"] == "a" * 64
    assert {name: getattr(Config(), name) for name in exports.UNSAID} == exports.UNSAID
    assert fields[f"{ABOUT}.rope.freq_base"] == 10000
    assert fields[f"{ABOUT}.final_logit_softcapping"] == 30
    assert exports.mlp_hidden({"model_dim": 8}) == 24 and exports.mlp_hidden({"model_dim": "8"}) is None


@fast
def test_a_number_alone_keeps_its_shape_and_what_is_beyond_bf16_is_refused(tmp_path):
    def model(value: float) -> exports.Model:
        bits = np.array(value, np.float32).view(np.uint32)
        return exports.Model({"x": pack.StoredTensor((), {"kind": "fp32"}, bits, None)}, {"config": {}}, "a" * 64)

    (tmp_path / "x.safetensors").write_bytes(safetensors_files.encode(model(0.5))[0])
    assert safetensors_files.read(tmp_path / "x.safetensors")[0]["x"].shape == ()
    for encode in (safetensors_files.encode, functools.partial(gguf_files.encode, blocked="TQ1_0", inexact=False)):
        with pytest.raises(ExportError, match="beyond the range of bf16"):
            encode(model(3.4e38))


@fast
def test_matrices_stay_exact_unless_they_are_to_be_reblocked_and_the_error_is_stated(tmp_path):
    config = replace(WIDE, group_size=128)
    params = {name: p.float().numpy() for name, p in random_model(config)[0].state_dict().items()}
    out, lines = as_gguf(tmp_path, config, "TQ1_0", False)
    assert "14 ternary tensors whose blocks of 256 have no one fp16 scale" in lines[-3] and "every value" in lines[-1]
    for name, (type_, values) in read_gguf(out).items():
        assert type_.name == "BF16" and (values == params[name]).all()
    would_be = lines[-2].split("errors of ")[1].split()[0]

    out, lines = as_gguf(tmp_path, config, "TQ1_0", True)
    rows = {line.split()[0]: line.split()[-2:] for line in lines if line.startswith(train_gpt.MATRICES)}
    back = read_gguf(out)
    assert list(rows) == [name for name, (type_, _) in back.items() if type_.name == "TQ1_0"] and len(rows) == 14
    errors, weights = 0.0, 0.0
    for name, row in rows.items():
        error = back[name][1].astype(np.float64) - params[name]
        square = (params[name].astype(np.float64) ** 2).sum()
        assert row == [f"{np.sqrt((error**2).sum() / square):.6f}", f"{np.abs(error).max():.6f}"]
        errors, weights = errors + (error**2).sum(), weights + square
        assert 0 < float(row[0]) < 0.2 and (np.sign(back[name][1]) == np.sign(params[name])).all()
    total = np.sqrt(errors / weights)
    assert lines[-2].split()[:4] == ["all", "of", "these", f"{total:.6f}"] and would_be == f"{total:.4f}"
    assert "every value of the other tensors" in lines[-1]
    assert all((values == params[name]).all() for name, (_, values) in back.items() if name not in rows)


@fast
def test_the_command_stores_the_types_that_it_is_asked_for(tmp_path, capsys):
    file = tmp_path / "model.tern"
    pack.write_artifact(file, SMALL, {})
    for options, types in (([], ["BF16", "TQ1_0", "BF16"]), (["--blocks", "TQ2_0"], ["BF16", "TQ2_0", "BF16"]),
                           (["--reblock"], ["TQ1_0", "TQ1_0", "BF16"])):
        assert pack.main(["export", str(file), "--to", "gguf", "--force", *options]) == 0
        said = capsys.readouterr().out
        back = read_gguf(tmp_path / "model.gguf")
        assert [back[name][0].name for name in ("w", "v", "gain")] == types
        for name, t in SMALL.items():  # the least squares of as many ones as twos
            exact = exports.bf16_values(exports.bf16_bits(t))
            changed = name == "w" and "--reblock" in options
            error = np.abs(back[name][1] - exact)
            assert error.max() == 0 or changed and 0.4 < error[0].max() < 0.6 and error[1].max() == 0
        assert ("re-blocked" in said and "\nw " in said) == ("--reblock" in options)
        assert f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" in said


@fast
def test_rows_that_are_no_whole_blocks_stay_in_bf16(tmp_path):
    out, lines = as_gguf(tmp_path, TINY, "TQ1_0", True)
    assert "14 ternary tensors whose rows are no multiple of 256" in lines[-2]
    for name, (type_, values) in read_gguf(out).items():
        assert type_.name == "BF16" and (values == random_model(TINY)[0].state_dict()[name].float().numpy()).all()


@fast
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.sampled_from([1, 32, 100, 128, 256, 512]), st.sampled_from(["TQ1_0", "TQ2_0"]),
       st.integers(0, 2**31))
def test_the_scale_of_a_block_is_the_best_that_fp16_has(rows, group, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 512, generator=generator) * torch.rand(rows, 512, generator=generator)
    latent[0, :300] = 0
    t = train_gpt.to_pack((fmt := Ternary(group)).quantize(latent), fmt)
    param, type_ = exports.bf16_values(exports.bf16_bits(t)), gguf.GGMLQuantizationType[kind]
    blocks = gguf_files.reblock(t.codes, param, type_)
    got, codes, w = (x.reshape(-1, 256).astype(np.float64) for x in (
        gguf.quants.dequantize(blocks.data, type_), t.codes, param))
    d = np.abs(got).max(1).astype(np.float16)
    assert (got == codes * d[:, None].astype(np.float64)).all() and (d[codes.any(1)] > 0).all()
    errors = ((got - w) ** 2).sum(1)
    for other in (np.nextafter(d, np.float16(0)), np.nextafter(d, np.float16(9))):
        assert (((codes * other[:, None] - w) ** 2).sum(1) >= errors * (1 - 1e-9)).all()
    assert np.isclose(blocks.squares, errors.sum(), rtol=1e-9) and blocks.largest == np.abs(got - w).max()
    assert blocks.same_bits == (got == w).all()
    if group % 256 == 0:
        assert blocks.same_bits


@fast
def test_a_scale_beyond_fp16_stays_in_bf16():
    huge = pack.StoredTensor((1, 256), {"kind": "ternary", "group_size": 0, "scale": "bf16"},
                             np.ones((1, 256), np.int8), np.array([[0x4980]], np.uint16))  # 2^20
    assert gguf_files.reblock(huge.codes, exports.bf16_values(exports.bf16_bits(huge)), gguf.GGMLQuantizationType.TQ1_0
                              ) is None
    data, lines = gguf_files.encode(exports.Model({"w": huge}, {}, "0" * 64), "TQ1_0", True)
    assert lines[1].split()[:2] == ["BF16", "1"] and b"\x80\x49" * 256 in data


# Import -------------------------------------------------------------------------------------------------------


def write_dense(path: Path, tensors: dict[str, torch.Tensor], config: dict | None = None, **more: object) -> Path:
    about = {"version": 1, "meta": {"config": config_of(TINY) if config is None else config}}
    safetensors.torch.save_file(tensors, path, {ABOUT: json.dumps(about | more)})
    return path


def latents_of(path: Path, config: Config = TINY, tokenizer: str = "t" * 64) -> dict[str, torch.Tensor]:
    """As the trainer loads what it starts from."""
    data = SimpleNamespace(tokenizer_sha256=tokenizer, tokenizer="tokenizer.model")
    return train_gpt.load_latents(str(path), data, config)


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dense_model_becomes_what_training_starts_from_bit_for_bit(tmp_path, capsys, dtype):
    dense = {name: x.to(dtype) for name, x in latents().items()}
    write_dense(tmp_path / "mine.safetensors", dense)
    assert pack.main(["export", "--from", "safetensors", str(tmp_path / "mine.safetensors")]) == 0
    out = tmp_path / "mine.checkpoint.safetensors"
    assert f"--init-from {out}" in capsys.readouterr().out
    found = latents_of(out)
    held = Latents(GPT(TINY), TINY)
    held.load(found, "there")
    for name, _, latent, _ in held.named():
        assert torch.equal(latent, dense[name].float()), name
    longer = replace(TINY, train_seq_len=64)
    assert latents_of(out, longer).keys() == dense.keys()


@fast
def test_what_was_exported_comes_back_bit_for_bit(tmp_path):
    config, out = replace(TINY, matrix_format="bf16", embed_format="bf16"), tmp_path / "start.safetensors"
    made = make(tmp_path, config)
    assert pack.main(["export", str(made.file), "--to", "safetensors"]) == 0
    assert pack.main(["export", "--from", "safetensors", str(tmp_path / "model.safetensors"), "-o", str(out)]) == 0
    again = GPT(config)
    held = Latents(again, config)
    held.load(latents_of(out), "there")
    held.refresh()
    assert torch.equal(logits(again), made.logits())
    with pytest.raises(pack.ArtifactError, match="does not describe a model"):  # it is a checkpoint
        eval_bpb.load_artifact(out)


def test_a_trainer_starts_from_an_import(tmp_path, data_dir):
    from conftest import tiny_trainer

    first = tiny_trainer(data_dir, tmp_path / "a")
    config = config_of(first.config)
    dense = {name: torch.full_like(p.data, 0.25).float() for name, p in first.model.named_parameters()}
    write_dense(tmp_path / "mine.safetensors", dense, config)
    assert pack.main(["export", "--from", "safetensors", str(tmp_path / "mine.safetensors")]) == 0
    trainer = tiny_trainer(data_dir, tmp_path / "b", "--init-from", tmp_path / "mine.checkpoint.safetensors")
    assert all((latent == 0.25).all() for _, _, latent, _ in trainer.latents.named())
    for t in (first, trainer):
        t.folder.close()


@fast
@pytest.mark.parametrize("settings", [*train_gpt.PRESETS.values(), {}, {"mlp_mult": 2}, {"smear": True},
                                      {"num_layers": 5, "num_heads": 4, "num_kv_heads": 2}])
def test_expected_shapes_are_the_models(settings):
    c = Config(**settings)
    assert safetensors_files.expected_shapes(config_of(c)) == param_shapes(c)


@fast
def test_the_pages_example_is_what_it_says():
    page = (source.root() / "docs" / "export.md").read_text(encoding="utf-8")
    text = page.partition("\nconfig = ")[2].partition("\nabout = ")[0]
    assert ast.literal_eval(text) == config_of(Config(**train_gpt.PRESETS["cpu"]))


CASES = {
    "missing": (lambda t: t.pop("smear"), "tensor 'smear' is missing of the model"),
    "extra": (lambda t: t.update(lm_head=torch.zeros(3)), "tensor 'lm_head' is not one of the model"),
    "shape": (lambda t: t.update(smear=torch.zeros(31)), r"tensor 'smear' is (31,), by meta.config (32,)"),
    "dtype": (lambda t: t.update(smear=torch.zeros(32).double()), "tensor 'smear' is F64; save it as BF16, F16, F32"),
    "whole numbers": (lambda t: t.update(smear=torch.zeros(32).int()), "tensor 'smear' is I32"),
    "not finite": (lambda t: t["smear"].__setitem__(7, torch.inf), "tensor 'smear'[7] is not finite"),
    "not a number": (lambda t: t["smear"].__setitem__(0, torch.nan), "tensor 'smear'[0] is not finite"),
}


@fast
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_does_not_fit_is_one_error_and_nothing_is_written(tmp_path, capsys, case):
    change, message = CASES[case]
    tensors = latents()
    change(tensors)
    err = refused(capsys, "export", "--from", "safetensors", write_dense(tmp_path / "mine.safetensors", tensors))
    assert message in err and str(tmp_path) in err
    assert not (tmp_path / "mine.checkpoint.safetensors").exists()


@fast
@pytest.mark.parametrize(("config", "message"), [
    ({}, "vocab_size is 'None'"), ({"model_dim": 33}, "dim=33, heads=4"), ({"num_layers": "2"}, "num_layers is '2'"),
    ({"num_layers": 10**6}, "layers=1000000"), ({"mlp_hidden": -1}, "mlp_hidden is '-1'")], ids=str)
def test_a_configuration_that_makes_no_model_is_one_error(tmp_path, capsys, config, message):
    config = config and config_of(TINY) | config
    path = write_dense(tmp_path / "mine.safetensors", latents(), config)
    err = refused(capsys, "export", "--from", "safetensors", path)
    assert message in err and "docs/export.md" in err


@fast
def test_a_file_that_says_nothing_or_is_none_is_one_error(tmp_path, capsys):
    path = tmp_path / "mine.safetensors"
    assert "no such file" in refused(capsys, "export", "--from", "safetensors", path)
    safetensors.torch.save_file(latents(), path)
    assert "does not describe a model" in refused(capsys, "export", "--from", "safetensors", path)
    for about in ("[]", "{", '{"version": 2}', '{"version": 1, "meta": {"config": 3}}', "[" * 10**5):
        safetensors.torch.save_file({}, path, {ABOUT: about})
        assert "does not describe a model" in refused(capsys, "export", "--from", "safetensors", path)
        with pytest.raises(pack.ArtifactError, match="does not describe a model"):
            eval_bpb.load_artifact(path)
    write_dense(path, latents())
    whole = path.read_bytes()
    for data in (b"", whole[:5], whole[:-1], whole + b"x"):
        path.write_bytes(data)
        assert "not a safetensors file" in refused(capsys, "export", "--from", "safetensors", path)


@fast
def test_another_model_or_tokenizer_is_not_started_from(tmp_path, capsys):
    sha256 = hashlib.sha256(b"pieces").hexdigest()
    meta = {"config": config_of(TINY), "tokenizer": sha256}
    path, out = tmp_path / "mine.safetensors", tmp_path / "mine.checkpoint.safetensors"
    write_dense(path, latents(), meta=meta, tokenizer=base64.b64encode(b"pieces").decode())
    assert pack.main(["export", "--from", "safetensors", str(path)]) == 0
    latents_of(out, tokenizer=sha256)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        latents_of(out)
    for fits in ({"attn_window": TINY.train_seq_len}, {"eval_seq_len": 128, "attn_window": TINY.train_seq_len}):
        latents_of(out, replace(TINY, **fits), sha256)  # in training it is the same model
    for change in ({"num_heads": 2}, {"rope_base": 5e4}, {"key_offset": False}, {"logit_softcap": 20.0},
                   {"attn_window": TINY.train_seq_len - 1}):
        (name, value), = change.items()
        with pytest.raises(ConfigError, match=f"init_from=.*its model has {name}=.*this run's {value}"):
            latents_of(out, replace(TINY, **change), sha256)
    assert "exists" in refused(capsys, "export", "--from", "safetensors", path)
    others = base64.b64encode(b"others").decode()
    for other, why in ((others, "model was trained with"), ("?", "not base 64"), (3, "not base 64")):
        write_dense(path, latents(), meta=meta, tokenizer=other)
        assert why in refused(capsys, "export", "--from", "safetensors", path, "--force")
    write_dense(path, latents(), tokenizer=base64.b64encode(b"pieces").decode())
    assert pack.main(["export", "--from", "safetensors", str(path), "--force"]) == 0  # its file names it
    latents_of(out, tokenizer=sha256)


@fast
def test_a_dense_model_in_other_floats_is_no_export(tmp_path):
    path = write_dense(tmp_path / "mine.safetensors", latents())
    with pytest.raises(pack.ArtifactError, match="is F32, and models compute with bf16"):
        eval_bpb.load_artifact(path)


@fast
@pytest.mark.parametrize("tokenizer", [5, "abc", {}])
def test_a_tokenizer_that_is_no_sha256_is_refused(tokenizer, tmp_path, capsys):
    meta = {"config": config_of(TINY), "tokenizer": tokenizer}
    path = tmp_path / "mine.safetensors"
    about = {"ternary-golf": json.dumps({"version": 1, "meta": meta})}
    path.write_bytes(safetensors.numpy.save({n: x.numpy() for n, x in latents().items()}, about))
    assert "meta.tokenizer is no sha256" in refused(capsys, "export", "--from", "safetensors", path)
    assert not list(tmp_path.glob("*checkpoint*"))


# Apart from submissions ---------------------------------------------------------------------------------------


@fast
def test_exports_are_no_bytes_of_a_submission():
    files = {"tern/conversions.py", "tern/exports.py", "tern/safetensors_files.py", "tern/gguf_files.py"}
    assert not files & set(source.code_files()) and all((source.root() / name).is_file() for name in files)


@fast
def test_a_submission_says_that_it_has_no_exports(monkeypatch):
    monkeypatch.delattr(tern, "conversions")
    monkeypatch.setitem(sys.modules, "tern.conversions", None)
    with pytest.raises(pack.ArtifactError, match="tern.conversions.*a submission's one file has it not"):
        pack.find_conversions()


@fast
def test_without_the_gguf_package_the_error_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    file = tmp_path / "model.tern"
    pack.write_artifact(file, SMALL, {})
    monkeypatch.delattr(tern, "gguf_files")
    monkeypatch.delitem(sys.modules, "tern.gguf_files")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "gguf is not installed: make setup" in refused(capsys, "export", file, "--to", "gguf")
    assert pack.main(["export", str(file), "--to", "safetensors"]) == 0
    assert not (tmp_path / "model.gguf").exists()


@fast
def test_a_model_that_names_its_tokenizer_names_it_in_every_check():
    exports.check_tokenizer_sha256({}, "a", "x")
    exports.check_tokenizer_sha256({"tokenizer": "a"}, "a", "x")
    for other in ("b", "", 3, ["a"]):
        with pytest.raises(ExportError, match="x: the tokenizer's sha256 is a, and the model was trained with"):
            exports.check_tokenizer_sha256({"tokenizer": other}, "a", "x")
