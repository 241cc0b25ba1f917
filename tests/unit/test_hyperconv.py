"""The hyper-convolutional decoder: its formula, that padding is never read, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.adapters.dnd import DnDTokenizer
from limbeck.adapters.spec import Adapters, AdapterSpec, Site
from limbeck.errors import AdapterError
from limbeck.students.generator.hyperconv import HyperConv, HyperConvDecoder, PlaneNorm, default_levels

TEXTS, TOKENS, WIDTH = 3, 10, 12


def tiny_spec() -> AdapterSpec:
    shapes = {"self_attn.q_proj": (12, 12), "self_attn.v_proj": (12, 6), "mlp.up_proj": (12, 24), "mlp.down_proj": (24, 12)}
    return AdapterSpec(tuple(Site(name, name, i, o, "model.layers", (0, 1)) for name, (i, o) in shapes.items()), 2, 4.0)


def a_decoder(tokenizer: DnDTokenizer, seed: int = 0) -> HyperConvDecoder:
    torch.manual_seed(seed)
    return HyperConvDecoder(TEXTS, TOKENS, WIDTH, tokenizer.num_tokens, tokenizer.token_shape, levels=None)


def conditions(count: int, texts: int = TEXTS, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """States and a mask with texts of different lengths, one of them missing."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(count, texts, tokens, WIDTH, generator=generator)
    lengths = torch.randint(1, tokens + 1, (count, texts), generator=generator)
    lengths[0, -1] = 0
    return states, torch.arange(tokens) < lengths[..., None]


def teachers(spec: AdapterSpec, count: int) -> Adapters:
    generator = torch.Generator().manual_seed(2)
    A = {s.name: 0.1 * torch.randn(count, len(s.layers), spec.rank, s.in_features, generator=generator) for s in spec.sites}
    B = {s.name: 3e-3 * torch.randn(count, len(s.layers), s.out_features, spec.rank, generator=generator) for s in spec.sites}
    return Adapters(spec, A, B)


def test_it_learns_two_teachers_by_heart() -> None:
    spec = tiny_spec()
    tokenizer = DnDTokenizer(spec)
    decoder = a_decoder(tokenizer)
    wanted = teachers(spec, 2)
    target, there = tokenizer.tokenize(wanted), tokenizer.mask
    states, mask = conditions(2)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(150):
        loss = F.mse_loss(decoder(states, mask)[:, there], target[:, there])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100
    with torch.no_grad():
        found = tokenizer.detokenize(decoder(states, mask))
    for site in spec.sites:
        dW = wanted.change(site.name)
        assert (found.change(site.name) - dW).norm() < 0.3 * dW.norm()
        assert (found.change(site.name).flip(0) - dW).norm() > dW.norm(), "each condition has its own adapter"


def test_the_gradient_of_an_adapter_reaches_every_parameter() -> None:
    tokenizer = DnDTokenizer(tiny_spec())
    decoder = a_decoder(tokenizer)
    adapters = tokenizer.detokenize(decoder(*conditions(2)))
    # Sums of squares alone have no gradient in the mean of a normalised plane.
    torch.stack([(t * torch.randn_like(t)).sum() for t in adapters.tensors()]).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_an_adapter_does_not_depend_on_the_other_conditions_of_the_batch() -> None:
    tokenizer = DnDTokenizer(tiny_spec())
    decoder = a_decoder(tokenizer)
    states, mask = conditions(5)
    together = decoder(states, mask)
    for n in range(5):
        torch.testing.assert_close(together[n : n + 1], decoder(states[n : n + 1], mask[n : n + 1]), rtol=1e-5, atol=1e-6)


def test_what_stands_in_padding_and_how_much_of_it_does_not_matter() -> None:
    tokenizer = DnDTokenizer(tiny_spec())
    decoder = a_decoder(tokenizer)
    states, mask = conditions(3, texts=2, tokens=7)
    plain = decoder(states, mask)
    garbage = torch.where(mask[..., None], states, float("nan"))
    torch.testing.assert_close(decoder(garbage, mask), plain, rtol=0, atol=0)
    padded, padded_mask = F.pad(garbage, (0, 0, 0, 3, 0, 1), value=float("nan")), F.pad(mask, (0, 3, 0, 1))
    torch.testing.assert_close(decoder(padded, padded_mask), plain, rtol=1e-6, atol=1e-7)
    assert (decoder(states, torch.ones_like(mask)) - plain).abs().max() > 1e-3, "text that is there is read"


def test_a_condition_without_text_gives_an_adapter_that_no_cell_has_a_part_in() -> None:
    decoder = a_decoder(DnDTokenizer(tiny_spec()))
    states, mask = conditions(2)
    plain = decoder(states, torch.zeros_like(mask))
    assert plain.isfinite().all()
    with torch.no_grad():
        decoder.levels[0].norm.bias.normal_()
    assert torch.equal(decoder(states, torch.zeros_like(mask)), plain)


def test_the_size_of_a_state_does_not_matter() -> None:
    """A base's first positions may be hundreds of times larger than its others."""
    decoder = a_decoder(DnDTokenizer(tiny_spec()))
    states, mask = conditions(2)
    large = states.clone()
    large[:, :, 0] *= 300
    torch.testing.assert_close(decoder(large, mask), decoder(states, mask), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_first_adapters_are_small(seed: int) -> None:
    tokenizer = DnDTokenizer(tiny_spec())
    with torch.no_grad():
        tokens = a_decoder(tokenizer, seed)(*conditions(4))
        adapters = tokenizer.detokenize(tokens)
    assert 0.01 < tokens.std() < 0.2
    assert max(factor.abs().max().item() for factor in adapters.tensors()) < 5e-3


def test_a_level_is_the_published_formula() -> None:
    """With kernels of one the convolutions are matrix products over the axis that is their channels."""
    torch.manual_seed(0)
    level = HyperConv((2, 3, 5), (4, 6, 7), kernel=1).double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    normed = F.layer_norm(x, (3, 5))
    (w1, h1), (h2, w2) = [[conv.weight[..., 0, 0] for conv in path] for path in (level.width_first, level.height_first)]
    linear = torch.einsum("nshw,vw,gh->nsgv", normed, w1, h1)
    squashed = torch.einsum("nshw,vw,gh->nsgv", normed, w2, h2).tanh()
    y = torch.einsum("nshw,ts->nthw", (linear + squashed + level.bias) / 3, level.sequence.weight[..., 0, 0])
    torch.testing.assert_close(level(x), y + level.sequence.bias[:, None, None])
    same = HyperConv((2, 3, 5), (2, 3, 5), kernel=3).double()
    with torch.no_grad():
        same.sequence.weight.zero_(), same.sequence.bias.zero_()
    torch.testing.assert_close(same(x), x)


def test_the_masked_norm_is_the_norm_of_what_is_there() -> None:
    norm = PlaneNorm(4, 6)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(norm(x, torch.ones(2, 3, 4, dtype=torch.bool)), norm(x), rtol=1e-5, atol=1e-5)
    mask = torch.tensor([True, True, False, False]).expand(2, 3, 4)
    half = F.layer_norm(x[:, :, :2], (2, 6), norm.weight[:2], norm.bias[:2])
    torch.testing.assert_close(norm(x, mask)[:, :, :2], half, rtol=1e-5, atol=1e-5)
    assert (norm(x, mask)[:, :, 2:] == 0).all()


def test_long_texts_are_shortened_by_means_of_neighbouring_tokens() -> None:
    decoder = HyperConvDecoder(1, 10, WIDTH, 4, (4, 6), levels=[(1, 4, WIDTH), (4, 4, 6)])
    states, mask = torch.randn(1, 1, 10, WIDTH), torch.ones(1, 1, 10, dtype=torch.bool)
    mask[..., 4:] = False
    cells, there = decoder._cells(states, mask)
    normed = F.layer_norm(states, (WIDTH,))
    torch.testing.assert_close(cells[0, 0, 0], normed[0, 0, :3].mean(0))
    torch.testing.assert_close(cells[0, 0, 1], normed[0, 0, 3])
    assert there.tolist() == [[[True, True, False, False]]] and (cells[0, 0, 2:] == 0).all()


PUBLISHED = {
    "0.5B": ([(128, 384, 384), (128, 200, 300), (128, 100, 256), (256, 50, 200), (512, 50, 200), (1024, 25, 200), (1024, 10, 200),
              (2048, 10, 200), (4296, 10, 130)], 9, 1.11),
    "1.5B": ([(32, 1000, 384), (64, 500, 300), (256, 500, 300), (512, 125, 300), (1024, 64, 256), (2048, 32, 256), (4508, 18, 258)], 11, 1.78),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_ladders_can_be_built_and_have_the_published_size(model: str) -> None:
    levels, kernel, billions = PUBLISHED[model]
    (texts, tokens, width), (count, *shape) = levels[0], levels[-1]
    with torch.device("meta"):
        decoder = HyperConvDecoder(texts, tokens, width, count, (shape[0], shape[1]), levels=levels, kernel=kernel)
    assert sum(p.numel() for p in decoder.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


def test_the_default_ladder_is_small_for_a_small_base() -> None:
    levels = default_levels(4, 48, 64, 152, (10, 34))
    assert levels[0] == (4, 32, 64) and levels[-1] == (152, 10, 34) and len(levels) == 4
    decoder = HyperConvDecoder(4, 48, 64, 152, (10, 34))
    assert sum(p.numel() for p in decoder.parameters()) < 300_000


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"levels: .*must begin with \(3, at most 10, 12\).*end with \(5, 4, 6\)"):
        HyperConvDecoder(TEXTS, TOKENS, WIDTH, 5, (4, 6), levels=[(3, 8, 12), (5, 4, 8)])
    with pytest.raises(AdapterError, match="levels"):
        HyperConvDecoder(TEXTS, TOKENS, WIDTH, 5, (4, 6), levels=[(3, 11, 12), (5, 4, 6)])
    with pytest.raises(AdapterError, match=r"kernel: 4 is even.*such as 5"):
        HyperConvDecoder(TEXTS, TOKENS, WIDTH, 5, (4, 6), kernel=4)
    decoder = HyperConvDecoder(TEXTS, TOKENS, WIDTH, 5, (4, 6))
    with pytest.raises(AdapterError, match=r"4 texts of 10 tokens is more than this decoder reads \(3 of 10\)"):
        decoder(*conditions(1, texts=4))
