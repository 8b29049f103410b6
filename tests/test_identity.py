"""Is it the tokenizer, are these the shards, of this model? Every mixture of two of each, and tokenizers that lie."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch

import eval_bpb
import pack
import train_gpt
from conftest import VOCAB, is_one_error, prepared, small_corpus, tiny_args
from tern.audits import audit_bytes, audit_origin
from tern.checkpoints import write_checkpoint
from tern.shards import AuditError, DataError, open_data, read_shard
from tern.tokenizers import (
    ByteCounter,
    check_provable,
    check_tokenizer,
    open_tokenizer,
    protobuf_fields,
    read_tokenizer_file,
)

pytestmark = pytest.mark.fast
OTHER_WORDS = str.maketrans("etaoinshrdlu", "vkzqjxwbgpmy")  # another language of the same shape


@pytest.fixture(scope="module")
def folders(data_dir, tmp_path_factory) -> list[Path]:
    """Two data folders of other texts, with tokenizers of equal size."""
    texts = [text.translate(OTHER_WORDS) for text in small_corpus(seed=5)]
    return [data_dir, prepared(tmp_path_factory.mktemp("other"), texts)]


def untrained(path: Path, data: Path | None) -> Path:
    """The artifact of a model that was not trained, on this data (None: as older files, which name none)."""
    config = train_gpt.Config(**train_gpt.PRESETS["tiny"], vocab_size=VOCAB)
    torch.manual_seed(1)
    model = train_gpt.GPT(config)
    order = [name for name, _ in model.named_parameters()]
    meta = train_gpt.artifact_meta(config, open_data(data) if data else None)
    pack.write_artifact(path, train_gpt.Latents(model, config).pack(order),
                        meta if data else {"config": meta["config"]})
    return path


@pytest.fixture(scope="module")
def artifact(folders, tmp_path_factory) -> Path:
    """Of the first folder's tokenizer."""
    return untrained(tmp_path_factory.mktemp("artifacts") / "model.tern", folders[0])


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("artifacts") / "old.tern", None)


def mixture(folder: Path, shards: Path, tokenizer: Path, manifest: Path | None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in shards.glob("*.bin"):
        shutil.copy(path, folder)
    shutil.copy(tokenizer / "tokenizer.model", folder)
    if manifest:
        shutil.copy(manifest / "manifest.json", folder)
    return folder


def score(capsys, *argv: object) -> tuple[int, str, str]:
    status = eval_bpb.main([*map(str, argv), "--stride", "0"])
    return status, *capsys.readouterr()


def train(capsys, *argv: object) -> tuple[int, str, str]:
    status = train_gpt.main(tiny_args(*argv))
    return status, *capsys.readouterr()


def refused(status: int, out: str, err: str) -> bool:
    return is_one_error(status, err) and "val_bpb" not in out


MIXTURES = list(itertools.product((0, 1), (0, 1), (0, 1, None)))


@pytest.mark.parametrize(("shards", "tokenizer", "manifest"), MIXTURES)
def test_a_mixture_is_neither_scored_nor_trained_on(folders, artifact, tmp_path, capsys, shards, tokenizer, manifest):
    """Of the artifact's own tokenizer and shards, and others; None: a folder without a manifest."""
    data = mixture(tmp_path / "data", folders[shards], folders[tokenizer],
                   None if manifest is None else folders[manifest])
    status, out, err = score(capsys, artifact, "--data", data)
    if shards == tokenizer == 0 and manifest in (0, None):
        assert status == 0 and "val_bpb" in out and "the one that the artifact names" in out
        assert ("no manifest.json" in out) == (manifest is None)
    else:
        assert refused(status, out, err), (out, err)
    if not (shards == tokenizer and manifest in (shards, None)):
        assert refused(*train(capsys, data, tmp_path / "runs")) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "another_name.model"])
def test_a_tokenizer_from_elsewhere_must_be_that_of_the_manifest(folders, artifact, tmp_path, capsys, name):
    shutil.copy(folders[0] / "tokenizer.model", tmp_path / name)
    assert score(capsys, artifact, "--data", folders[0], "--tokenizer-path", tmp_path / name)[0] == 0
    # the identity is of contents: a copy under another name changes nothing
    assert open_data(folders[0], tmp_path / name).identity == open_data(folders[0]).identity
    shutil.copy(folders[1] / "tokenizer.model", tmp_path / name)
    result = score(capsys, artifact, "--data", folders[0], "--tokenizer-path", tmp_path / name)
    assert refused(*result) and "leave --tokenizer-path out" in result[2]
    assert refused(*train(capsys, folders[0], tmp_path / "r", "--tokenizer-path", tmp_path / name))


def test_sampling_asks_for_the_same_tokenizer(folders, artifact, capsys):
    """And says so in the words of scoring: it is one check."""
    said = []
    for folder in (folders[1], folders[0]):
        tokenizer = str(folder / "tokenizer.model")
        status = eval_bpb.main(["sample", str(artifact), "--tokenizer", tokenizer, "--prompt", "x"])
        said.append((status, *capsys.readouterr()))
    assert refused(*said[0]) and said[0][1] == "" and said[1][0] == 0
    assert said[0][2] == score(capsys, artifact, "--data", folders[1])[2]


def test_older_artifacts_are_scored_and_the_report_says_what_was_not_checked(folders, older, capsys):
    status, out, _ = score(capsys, older, "--data", folders[0])
    assert status == 0 and "NOT CHECKED" in out and "val_bpb" in out


def test_a_checkpoint_of_another_tokenizer_is_no_start(folders, tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint.safetensors", {}, {"tokenizer": open_data(folders[0]).tokenizer_sha256})
    result = train(capsys, folders[1], tmp_path / "runs", "--init-from", tmp_path)
    assert refused(*result) and "another tokenizer" in result[2]


def test_one_alien_shard_among_others_is_found(folders, artifact, tmp_path, capsys):
    data = mixture(tmp_path / "data", folders[0], folders[0], None)
    shutil.copy(next(folders[1].glob("*_val_*.bin")), data / "text_val_000001.bin")
    result = score(capsys, artifact, "--data", data)
    assert refused(*result) and "text_val_000001.bin" in result[2]


def test_training_shards_of_another_tokenizer_are_found(folders, tmp_path, capsys):
    data = mixture(tmp_path / "data", folders[0], folders[0], None)
    shutil.copy(next(folders[1].glob("*_train_*.bin")), next(data.glob("*_train_*.bin")))
    result = train(capsys, data, tmp_path / "runs")
    assert refused(*result) and "_train_" in result[2]


def test_the_same_validation_shard_twice_is_refused(folders, artifact, tmp_path, capsys):
    data = mixture(tmp_path / "data", folders[0], folders[0], None)
    shutil.copy(next(data.glob("*_val_*.bin")), data / "text_val_000001.bin")
    assert refused(*score(capsys, artifact, "--data", data))


def test_a_manifest_that_states_other_bytes_is_refused(folders, artifact, tmp_path, capsys):
    data = mixture(tmp_path / "data", folders[0], folders[0], folders[0])
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["val"]["bytes"] += 1
    (data / "manifest.json").write_text(json.dumps(manifest))
    result = score(capsys, artifact, "--data", data)
    assert refused(*result) and "states" in result[2]


@pytest.mark.parametrize("change", ["splits", "tokenizer", "number", "nested", "list"])
def test_a_manifest_of_odd_types_is_one_error(folders, artifact, tmp_path, capsys, change):
    data = mixture(tmp_path / "data", folders[0], folders[0], folders[0])
    manifest = json.loads((data / "manifest.json").read_text())
    if change == "splits":
        manifest["splits"] = []
    elif change == "tokenizer":
        manifest["tokenizer"] = "tokenizer.model"
    elif change == "number":
        manifest["tokenizer"]["sha256"] = 5
    else:
        manifest = [1] if change == "list" else json.loads("[" * 50 + "]" * 50)
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert refused(*score(capsys, artifact, "--data", data))


# -- tokenizers ----------------------------------------------------------------------------------------------------


def train_tokenizer(**options) -> bytes:
    model, texts = io.BytesIO(), small_corpus(60)
    defaults = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": False, "bos_id": 1, "eos_id": 2,
                "unk_id": 0, "pad_id": -1, "minloglevel": 2}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(x for t in texts for x in t.split("\t")),
                                   model_writer=model, **defaults | options)
    return model.getvalue()


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, length = len(data), b""
    while size >= 0x80:
        size, length = size >> 7, length + bytes([size & 0x7F | 0x80])
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def nfkc_rules() -> bytes:
    model = spm.SentencePieceNormalizer(rule_name="nmt_nfkc_cf").serialized_model_proto()
    return read_tokenizer_file(model, "").normalizer


def test_the_fixture_of_this_file_is_sound(tmp_path):
    (tmp_path / "a.model").write_bytes(train_tokenizer())
    sp = open_tokenizer(tmp_path / "a.model")
    assert check_tokenizer(sp, "") == []


@pytest.mark.parametrize(("make", "message"), [
    (lambda: train_tokenizer().replace(b"\n\x03\xe2\x96\x81", b"\n\x03\xe2\x98\x83"), "standalone"),
    (lambda: train_tokenizer().replace(b"\n\x05\xe2\x96\x81he", b"\n\x05\xe2\x98\x83he"), "not made of other"),
    (lambda: train_tokenizer(bos_id=-1), "no BOS"),
    (lambda: train_tokenizer(normalization_rule_name="nmt_nfkc_cf"), "comes back as"),
    (lambda: train_tokenizer() + field(5, field(2, nfkc_rules())), "denormalizer"),
    (lambda: b"", "not a SentencePiece model"),
    (lambda: b"hello", "not a SentencePiece model"),
    (lambda: train_tokenizer()[:-400], "not a SentencePiece model"),
    (lambda: train_tokenizer(treat_whitespace_as_suffix=True), "bytes"),
], ids=["lone space", "another piece", "bos", "case", "denormalizer", "empty", "text", "truncated", "suffix"])
def test_unsound_tokenizers_are_refused_on_every_open(folders, older, tmp_path, capsys, make, message):
    """Whatever the shards are: with these the counter and the decoder can agree and both be wrong."""
    model = make()
    data = mixture(tmp_path / "data", folders[0], folders[0], None)
    (data / "tokenizer.model").write_bytes(model)
    with pytest.raises(DataError, match=message):
        open_tokenizer(data / "tokenizer.model")
    assert refused(*score(capsys, older, "--data", data))
    assert refused(*train(capsys, data, tmp_path / "runs"))


def test_the_space_less_tokenizer_counts_too_many_bytes(tmp_path):
    """What the refusal above is for: the audit of such a tokenizer agrees with itself, 1.26 times the text's bytes."""
    sp = spm.SentencePieceProcessor(
        model_proto=train_tokenizer().replace(b"\n\x03\xe2\x96\x81", b"\n\x03\xe2\x98\x83"))
    text = "a" + " " * 50 + "b"
    ids = np.array([1, *sp.encode(text)], dtype=np.uint16)
    counted = audit_bytes({"x": ids}, ByteCounter(sp))["x"]["bytes"]
    assert counted > 1.2 * len(text.encode())


def test_tokenizers_of_the_official_kind_are_taken_and_said_to_normalize(tmp_path):
    (tmp_path / "a.model").write_bytes(train_tokenizer(normalization_rule_name="nmt_nfkc",
                                                       remove_extra_whitespaces=True))
    notes = check_tokenizer(open_tokenizer(tmp_path / "a.model"), "")
    assert len(notes) == 1 and notes[0].startswith("normalizes")


def test_unknown_tokens_are_not_scored(tmp_path):
    """Without byte fallback text is lost behind <unk>; here it decodes to nothing, so the counts would agree."""
    (tmp_path / "a.model").write_bytes(train_tokenizer(byte_fallback=False, vocab_size=200, unk_surface=""))
    sp = open_tokenizer(tmp_path / "a.model")
    assert "no byte pieces" in check_tokenizer(sp, "")[0]
    ids = np.array([1, *sp.encode("so Привет")], dtype=np.uint16)
    with pytest.raises(AuditError, match="unknown"):
        audit_bytes({"x": ids}, ByteCounter(sp))


def test_origin_survives_what_happens_to_real_shards(data_dir):
    """Documents cut anywhere, as at the edges of shards, are still of their tokenizer."""
    counter = ByteCounter(data_dir / "tokenizer.model")
    tokens = read_shard(next(data_dir.glob("*_val_*.bin")))
    for start, end in ((0, None), (7, None), (7, -5), (300, 2000)):
        found = audit_origin(tokens[start:end], counter, "x")
        assert found["reproduced"] > 0.95
    assert audit_origin(tokens[:0], counter, "x")["reproduced"] == 1.0
    controls = np.insert(tokens, 50, 2)
    assert audit_origin(controls, counter, "x")["controls"] == 0  # EOS is ordinary
    shuffled = np.random.default_rng(0).permutation(tokens)
    with pytest.raises(AuditError, match="not of this tokenizer"):
        audit_origin(shuffled, counter, "x")
    with pytest.raises(DataError, match="not its shards"):
        audit_origin(np.array([VOCAB], dtype=np.uint16), counter, "x")


# -- what an adversary tries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, {}, "", "A" * 64])
def test_an_artifact_that_names_something_else_is_no_older_one(folders, artifact, tmp_path, capsys, named):
    tensors, meta = pack.read_artifact(artifact)
    pack.write_artifact(tmp_path / "a.tern", {"skip_weights": tensors["skip_weights"]}, meta | {"tokenizer": named})
    result = score(capsys, tmp_path / "a.tern", "--data", folders[0])
    assert refused(*result) and "meta.tokenizer" in result[2]


def with_longer_pieces(model: bytes, kind: int) -> bytes:
    """The model with ten of its pieces longer, and of this kind: the same shards then seem to have more bytes."""
    out, changed = b"", 0
    for number, message in protobuf_fields(model):
        if number == 1:
            piece = dict(protobuf_fields(message))
            text = piece[1].decode()
            if 3 not in piece and len(text) > 2 and changed < 10:
                changed += 1
                # the score, a float, is left out: 0
                message = field(1, (text + "xxxxxx").encode()) + bytes([3 << 3, kind])
            out += field(1, message)
        elif isinstance(message, bytes):
            out += field(number, message)
    return out


@pytest.mark.parametrize(("make", "said"), [
    (lambda: with_longer_pieces(train_tokenizer(), 4), "user-defined"),
    (lambda: train_tokenizer(model_type="unigram"), "no BPE model"),
], ids=["user-defined", "unigram"])
def test_pieces_that_nothing_vouches_for_are_not_counted(folders, older, tmp_path, capsys, make, said):
    data = mixture(tmp_path / "data", folders[0], folders[0], None)
    (data / "tokenizer.model").write_bytes(make())
    assert open_tokenizer(data / "tokenizer.model")  # sound in itself
    result = score(capsys, older, "--data", data)
    assert refused(*result) and (said in result[2] or "not of this tokenizer" in result[2])
    with pytest.raises(AuditError, match=said):
        check_provable(open_data(data))
    assert refused(*train(capsys, data, tmp_path / "runs"))


@pytest.mark.parametrize("tail", [b"\x0b", b"\x0a\x80", b"\x08\x05", field(1, field(1, b"\xff"))],
                         ids=["group", "cut", "number", "not UTF-8"])
def test_a_tokenizer_file_with_odd_fields_is_one_error(tail):
    with pytest.raises(DataError, match="not a file that sentencepiece wrote"):
        read_tokenizer_file(train_tokenizer() + tail, "x.model")


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 2]])
def test_validation_without_text_is_refused_before_training(folders, artifact, tmp_path, capsys, tokens):
    from data import prepare

    data = mixture(tmp_path / "data", folders[0], folders[0], None)
    ids = np.array(tokens, dtype="<u2")
    next(data.glob("*_val_*.bin")).write_bytes(prepare.header(len(ids)) + ids.tobytes())
    result = score(capsys, artifact, "--data", data)
    assert refused(*result) and "nothing to score" in result[2]
    assert refused(*train(capsys, data, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_manifest_that_leads_nowhere_is_not_no_manifest(folders, artifact, tmp_path, capsys):
    data = mixture(tmp_path / "data", folders[0], folders[0], None)
    (data / "manifest.json").symlink_to(tmp_path / "gone.json")
    assert refused(*score(capsys, artifact, "--data", data))


def test_json_overwrites_nothing_but_a_score(folders, artifact, tmp_path, capsys):
    artifact = Path(shutil.copy(artifact, tmp_path))
    whole = artifact.read_bytes()
    (tmp_path / "notes.json").write_text("{}")
    for target in (artifact, tmp_path / "notes.json", tmp_path):
        status, _, err = score(capsys, artifact, "--data", folders[0], "--json", target)
        assert status == 1 and str(target) in err and err.count("\n") == 1
    assert artifact.read_bytes() == whole and (tmp_path / "notes.json").read_text() == "{}"
    (tmp_path / "link.json").symlink_to(tmp_path / "score.json")
    for _ in range(2):
        assert score(capsys, artifact, "--data", folders[0], "--json", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "score.json").read_text())["chunked"]


def test_errors_are_one_line_whatever_the_names(folders, artifact, tmp_path, capsys):
    odd = tmp_path / "two\nlines"
    assert refused(*score(capsys, artifact, "--data", odd))
    assert refused(*score(capsys, odd, "--data", folders[0]))
    for call in (lambda: eval_bpb.main([]), lambda: train_gpt.main(["--prest", "tiny"]),
                 lambda: pack.main(["inspect"])):
        with pytest.raises(SystemExit):
            call()
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
