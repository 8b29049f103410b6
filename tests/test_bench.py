"""The textbook of bench/ is the same model, training step and score as ours; otherwise speed.py compares nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt
from bench import speed, textbook
from conftest import ROOT
from tern.metric import Score

# Widths that the group size does not divide, more query than key heads, a layer more in the second half than in the
# first: the corners where two implementations would come apart.
TINY = ["--num-layers", "3", "--model-dim", "48", "--num-heads", "4", "--num-kv-heads", "2", "--mlp-hidden", "80",
        "--vocab-size", "128", "--group-size", "32", "--train-seq-len", "64", "--train-batch-tokens", "512"]


@pytest.fixture
def pair() -> tuple[speed.Ours, speed.Textbook]:
    torch.manual_seed(0)
    config = speed.settings(TINY)
    ours = speed.Ours(config, compiled=False)
    return ours, speed.Textbook(config, ours.state(), compiled=False)


def batch(rows: int = 8, seq_len: int = 64, vocab: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocab, (rows, seq_len + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def relative(a: float, b: float) -> float:
    return abs(a / b - 1)


def test_quantized_weights_are_equal(pair):
    ours, other = pair
    params = dict(ours.model.named_parameters())
    layers = {n: m for n, m in other.model.named_modules() if isinstance(m, textbook.BitLinear)}
    assert len(layers) == 3 * 6
    for name, layer in layers.items():
        straight_through = layer.weight + (layer.quantize() - layer.weight).detach()
        assert torch.equal(straight_through.bfloat16(), params[f"{name}.weight"]), name
    for name, _, _, stored in ours.latents.named():  # codes * scale, from what the file would hold
        if name.removesuffix(".weight") in layers:
            scales = stored.scales.float().repeat_interleave(32, dim=-1)[:, : stored.codes.shape[1]]
            assert torch.equal(layers[name.removesuffix(".weight")].quantize(), stored.codes * scales), name


def test_losses_and_gradients_agree(pair):
    """Both round activations to 8 bits of mantissa, in places that differ (three products or one for q, k and v)."""
    ours, other = pair
    losses = [side.model(*batch()) for side in pair]
    assert relative(*(float(loss.detach()) for loss in losses)) < 1e-3
    for loss in losses:
        loss.backward()
    theirs = dict(other.model.named_parameters())
    for name, p in ours.model.named_parameters():
        a, b = p.grad.double().flatten(), theirs[name].grad.double().flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.99, name
        assert 0.97 < a.norm() / b.norm() < 1.03, name


def test_optimizers_agree(pair):
    """Given the same gradients, the same path: only the order of bf16 sums in Newton-Schulz differs."""
    ours, other = pair
    theirs, start = dict(other.model.named_parameters()), ours.state()
    generator = torch.Generator().manual_seed(2)
    for lr_scale, momentum in ((1.0, 0.3), (0.5, 0.6), (0.7, 0.9)):
        for name, p in ours.model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            theirs[name].grad = p.grad.float()
        ours.latents.accumulate(torch.zeros(()), 1)
        ours.optimizer.step(lr_scale, momentum)
        other.optimizer.step(lr_scale, momentum)
        assert all(p.grad is None for p in theirs.values())
    for name, latent in ours.state().items():
        moved = latent - start[name]
        assert (theirs[name].detach() - start[name] - moved).norm() < 0.05 * moved.norm(), name  # theirs rounds more


def test_training_agrees(pair):
    """Rounding differences in the gradient flip single codes near their threshold, so the losses drift apart slowly."""
    ours, other = pair
    ids, targets = batch()
    first = float(ours.model(ids, targets).detach())
    for _ in range(5):
        a, b = (side.forward_backward(ids, targets) for side in pair)
        for side in pair:
            side.optimize()
            side.refresh()
    assert relative(a, b) < 1e-2
    assert a < first - 0.1, "nothing was learned, so nothing was compared"
    theirs = dict(other.model.named_parameters())
    assert ours.state().keys() == theirs.keys()
    for name, latent in ours.state().items():
        assert torch.cosine_similarity(latent.flatten(), theirs[name].detach().flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("num_tokens", [40, 64, 500])
def test_sliding_scores_agree(pair, num_tokens):
    tokens = np.random.default_rng(0).integers(0, 128, num_tokens + 1).astype(np.uint16)
    ours, other = (side.score(tokens, 64, 16, 4) for side in pair)
    assert (ours.tokens, ours.bytes) == (other.tokens, other.bytes) == (num_tokens, num_tokens)
    assert relative(ours.val_loss, other.val_loss) < 1e-3 and relative(ours.val_bpb, other.val_bpb) < 1e-3
    assert abs(ours.val_loss - np.log(128)) > 1e-2, "a model that knows nothing hides differences"
    assert isinstance(other, Score)


def test_unsupported_settings_are_refused():
    config = train_gpt.resolve_settings(["--preset", "tiny", "--scale-dtype", "log7"], {})[1]
    with pytest.raises(ValueError, match="scale_dtype='log7'"):
        textbook.TextbookGPT(config)


def test_kernel_classes():
    """The names that this version of torch gives to what a step runs."""
    names = {
        "graph_1_cpp_fused__to_copy_add_mul_3": "elementwise",
        "graph_0_cpp_fused__log_softmax__to_copy__unsafe_view_div_mul_nll_loss_forward_tanh_view_9": "loss",
        "graph_2_cpp_fused__scaled_dot_product_flash_attention_for_cpu_mul_1": "elementwise",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "tern::causal_attention_backward": "attention",
        "aten::mm": "products",
        "mkldnn::_linear_pointwise": "products",
        "aten::copy_": "elementwise",
        "## Call CompiledFxGraph abc ##": None,
    }
    assert {name: speed.kernel_class(name) for name in names} == names


PROGRAMS = sorted(p.name for p in (ROOT / "bench").glob("*.py") if "\ndef main(" in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_tells_how_it_is_used(name, tmp_path):
    """Wherever it is started: all that it imports is there, and nothing is run or written."""
    done = subprocess.run([sys.executable, "-B", str(ROOT / "bench" / name), "--help"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
    assert list(tmp_path.iterdir()) == []
