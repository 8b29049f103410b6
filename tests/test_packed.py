"""tern/packed.py: the very same weights in fewer bytes, and products that are those of bf16 weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_attention import error, small_model, tokens

from eval_bpb import Cached, for_sampling
from tern.packed import Packed, pack_matrices, packed
from train_gpt import Latents, Ternary

pytestmark = pytest.mark.fast


def ternary(rows: int, inputs: int, group: int, seed: int = 0) -> torch.Tensor:
    """A bf16 matrix as it is read from a file, with a row of zeros and a group of them."""
    latent = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    latent[3], latent[5, :32] = 0, 0
    fmt = Ternary(group_size=group, scale="log7")
    return fmt.dequantize(fmt.quantize(latent))


@pytest.mark.parametrize(("rows", "inputs", "group"), [
    (16, 32, 32), (48, 96, 32), (80, 128, 128), (64, 192, 64), (32, 192, 128),  # a last group that is not whole
    (32, 256, 0), (16, 64, 256)])
@torch.inference_mode()
def test_the_weights_are_the_same_bits_and_products_those_of_a_dense_matrix(rows, inputs, group):
    matrix = ternary(rows, inputs, group)
    held = packed(matrix)
    assert held.shape == matrix.shape and held.nbytes < 0.36 * matrix.nbytes
    assert torch.equal(F.linear(torch.eye(inputs).bfloat16(), held), matrix.mT)
    for shape in ((inputs,), (1, 1, inputs), (2, 37, inputs)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        product = F.linear(x, held)
        assert product.shape == (*shape[:-1], rows) and product.dtype == torch.bfloat16
        assert error(product, x.double() @ matrix.double().mT) < 3e-3  # of rounding to bf16: 2^-9 at most, each


def test_other_matrices_stay_as_they_are():
    matrix = ternary(32, 64, 64)
    almost = matrix.clone()
    almost[7, 9] = almost[7].abs().amax() * 1.01
    two_values = torch.cat((matrix[:, :16], 2 * matrix[:, 16:]), 1)
    for other in (almost, two_values, matrix.float(), matrix[:31], matrix[:, :48], torch.randn(32, 64).bfloat16()):
        assert packed(other) is None
    assert packed(matrix) is not None


@torch.inference_mode()
def test_matrices_below_each_other_are_one_and_nothing_else_is_done_with_them():
    parts = [ternary(rows, 64, 64, rows) for rows in (16, 48, 32)]
    x = torch.randn(5, 64).bfloat16()
    joined = torch.cat([packed(part) for part in parts])
    assert joined.shape == (96, 64) and error(F.linear(x, joined), x.double() @ torch.cat(parts).double().mT) < 3e-3
    for wrong in (lambda: torch.cat((joined, parts[0])), lambda: torch.add(joined, 1), lambda: torch.relu(joined),
                  lambda: F.linear(joined, parts[0]), lambda: torch.cat((joined, joined), 1),
                  lambda: torch.cat((joined, joined), dim=1)):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize("smear", [False, True])
@torch.inference_mode()
def test_a_model_of_packed_matrices_says_what_it_said(smear):
    """But for rounding: a bf16 product rounds a logit of 16 to 32 to a multiple of 1/8."""
    model = small_model(model_dim=64, mlp_hidden=80, smear=smear, key_offset=True, copy_dim=32)
    Latents(model, model.config)
    ids = tokens(40)[None]
    sampler, dense = for_sampling(model, 40), Cached(model, 40)
    kinds = {name: type(module.weight) for name, module in sampler.named_modules() if hasattr(module, "weight")}
    assert kinds["blocks.0.attn.c_q"] is kinds["blocks.2.mlp.fc"] is kinds["copying.c_q"] is Packed
    assert kinds["blocks.0.mlp.proj"] is torch.nn.Parameter  # 80 inputs are no whole groups
    for last in (40, 39, 1):
        for length in (1, 17, 40):
            a, b = (m.head(m.hidden_last(ids[:, :length], min(last, length))) for m in (sampler, dense))
            assert (a - b).abs().max() <= 0.25 and a.abs().max() > 8
    assert isinstance(model.blocks[0].attn.c_q.weight, torch.nn.Parameter), "the caller's model was changed"


@torch.inference_mode()
def test_matrices_that_are_joined_are_all_packed_or_none():
    """Keys of one head of 8 are no multiple of 16 rows, queries are."""
    model = small_model(model_dim=32, num_heads=4, num_kv_heads=1, mlp_hidden=64)
    Latents(model, model.config)
    sampler, ids = for_sampling(model, 20), tokens(20)[None]
    assert type(sampler.blocks[0].attn.c_q.weight) is torch.nn.Parameter
    assert type(sampler.blocks[0].mlp.fc.weight) is Packed
    assert (sampler.head(sampler.hidden(ids)) - model.head(model.hidden(ids))).abs().max() <= 0.25


def test_an_fp32_model_is_left_alone():
    model = small_model()
    before = [name for name, _ in model.named_parameters()]
    pack_matrices(model)
    assert before == [name for name, _ in model.named_parameters()]
