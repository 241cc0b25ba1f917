"""Adapters as DnD's tokens: the published layout and numbers, and round trips that lose nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limbeck.adapters.dnd import Codec, DnDTokenizer, default_width
from limbeck.adapters.dnd_names import ORDER, dnd_key, dnd_keys, from_dnd_key
from limbeck.adapters.spec import Adapters, AdapterSpec, Site
from limbeck.errors import AdapterError


def llama_like(hidden: int, kv: int, mlp: int, layers: int, rank: int) -> AdapterSpec:
    """All seven targets of a Llama-like model."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, mlp), "mlp.up_proj": (hidden, mlp), "mlp.down_proj": (mlp, hidden),
    }  # fmt: skip
    sites = tuple(Site(name, name, i, o, "model.layers", tuple(range(layers))) for name, (i, o) in shapes.items())
    return AdapterSpec(sites, rank, 2.0 * rank)


def random_adapters(spec: AdapterSpec, count: int = 2, std: float = 0.02, dtype: torch.dtype = torch.float32) -> Adapters:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) * std

    A = {site.name: draw(count, len(site.layers), spec.rank, site.in_features) for site in spec.sites}
    return Adapters(spec, A, {site.name: draw(count, len(site.layers), site.out_features, spec.rank) for site in spec.sites})


def relative_error(found: Adapters, wanted: Adapters) -> float:
    """Largest relative error of dW over adapters, sites and layers, computed in fp64."""
    errors = []
    for site in wanted.spec.sites:
        dW = wanted.to(torch.float64).change(site.name)
        errors.append(((found.to(torch.float64).change(site.name) - dW).norm(dim=(-2, -1)) / dW.norm(dim=(-2, -1))).max().item())
    return max(errors)


EVEN = llama_like(64, 32, 160, 3, 4)
UNEVEN = llama_like(40, 20, 100, 2, 3)
every_shape = pytest.mark.parametrize("spec", [EVEN, UNEVEN], ids=["even", "uneven"])


@pytest.mark.parametrize(
    ("spec", "shape", "tokens"),
    [
        (llama_like(896, 128, 4864, 24, 8), (10, 130), 4296),
        (llama_like(1536, 256, 8960, 28, 16), (18, 258), 4508),
        (llama_like(3584, 512, 18944, 28, 16), (18, 514), 4928),
        (llama_like(2048, 256, 11008, 36, 16), (18, 258), 7308),
    ],
    ids=["0.5B", "1.5B", "7B", "3B"],
)
def test_token_counts_and_shapes_are_the_published_ones(spec: AdapterSpec, shape: tuple[int, int], tokens: int) -> None:
    tokenizer = DnDTokenizer(spec, codec="legacy")
    assert (tokenizer.token_shape, tokenizer.num_tokens) == (shape, tokens)
    assert tokenizer.mask.all(), "the published shapes have no padding"


def published_tokens(adapters: Adapters, index: int, width: int, rank: int) -> Tensor:
    """DnD's layout and numbers of one adapter, piece by piece as the paper's pipeline goes; lengths must be multiples of ``width``."""
    tensors = {}
    for site in adapters.spec.sites:
        for row, layer in enumerate(site.layers):
            place = layer + ORDER[site.module] / 10
            tensors[place, "A"] = adapters.A[site.name][index, row]
            tensors[place, "B"] = adapters.B[site.name][index, row].T
    tokens = []
    for key in sorted(tensors):
        for piece in tensors[key].split(width, dim=1):
            token = torch.empty(rank + 2, width + 2)
            token[:rank, :width] = (piece - piece.mean()) / piece.std()
            pair = torch.stack([8 * piece.mean(), torch.log(0.9 * piece.std() + 0.1) + 1.6])
            token[-2:] = pair.repeat(2, (width + 2) // 2)
            token[:, -2:] = pair
            tokens.append(token)
    return torch.stack(tokens)


def test_legacy_tokens_are_the_published_numbers_in_the_published_order() -> None:
    adapters = random_adapters(EVEN)
    tokenizer = DnDTokenizer(EVEN, codec="legacy")
    wanted = torch.stack([published_tokens(adapters, n, tokenizer.width, EVEN.rank) for n in range(2)])
    torch.testing.assert_close(tokenizer.tokenize(adapters), wanted, rtol=1e-5, atol=1e-5)


def test_layers_that_lack_a_target_keep_the_order() -> None:
    """Sites of other layers, two shapes of one module, and sites in another order than DnD's."""
    sites = (
        Site("mlp.gate_proj", "mlp.gate_proj", 16, 32, "model.layers", (0, 2)),
        Site("self_attn.q_proj@16x16", "self_attn.q_proj", 16, 16, "model.layers", (1,)),
        Site("mlp.up_proj", "mlp.up_proj", 16, 32, "model.layers", (2,)),
        Site("self_attn.q_proj@32x16", "self_attn.q_proj", 16, 32, "model.layers", (0, 3)),
    )
    spec = AdapterSpec(sites, 4, 8.0)
    modules = ["0.self_attn.q_proj", "0.mlp.gate_proj", "1.self_attn.q_proj", "2.mlp.up_proj", "2.mlp.gate_proj", "3.self_attn.q_proj"]
    assert dnd_keys(spec) == [f"model.layers.{module}.lora_{factor}.weight" for module in modules for factor in "AB"]
    adapters = random_adapters(spec)
    tokenizer = DnDTokenizer(spec, codec="legacy")
    wanted = published_tokens(adapters, 1, tokenizer.width, spec.rank)
    torch.testing.assert_close(tokenizer.tokenize(adapters)[1], wanted, rtol=1e-5, atol=1e-5)
    assert relative_error(DnDTokenizer(spec).detokenize(DnDTokenizer(spec).tokenize(adapters)), adapters) <= 1e-6


@every_shape
@pytest.mark.parametrize("codec", ["exact", "legacy"])
def test_round_trip_error_of_ordinary_weights_is_below_a_thousandth(spec: AdapterSpec, codec: Codec) -> None:
    adapters = random_adapters(spec)
    tokenizer = DnDTokenizer(spec, codec=codec)
    tokens = tokenizer.tokenize(adapters)
    back = tokenizer.detokenize(tokens)
    errors = torch.cat([(a - b).abs().flatten() for a, b in zip(back.tensors(), adapters.tensors(), strict=True)])
    again = (tokenizer.tokenize(back) - tokens)[:, tokenizer.mask].abs()
    assert errors.mean() < 1e-3 and errors.max() < 1e-3
    assert again.mean() < 1e-3


@every_shape
@pytest.mark.parametrize("mean", [0.0, 0.5, 1000.0], ids="mean={}".format)
@pytest.mark.parametrize("std", [1e-6, 1e-4, 5e-3, 0.02, 1.0], ids="std={}".format)
def test_exact_tokens_keep_weights_of_every_size(spec: AdapterSpec, std: float, mean: float) -> None:
    adapters = random_adapters(spec, std=std).map(lambda t: t + mean * std)
    tokenizer = DnDTokenizer(spec)
    tokens = tokenizer.tokenize(adapters)
    assert relative_error(tokenizer.detokenize(tokens), adapters) <= 1e-6
    assert relative_error(tokenizer.detokenize(tokens.bfloat16()), adapters) <= 5e-3
    assert tokens[:, tokenizer.mask].abs().max() < 9, "numbers that a generator can be asked for"


def test_exact_tokens_keep_adapters_whose_factors_differ_a_lot_in_size() -> None:
    adapters = random_adapters(EVEN)
    sizes = torch.logspace(-6, 0, len(EVEN.sites) * 3).view(len(EVEN.sites), 1, 3, 1, 1)
    B = {site.name: adapters.B[site.name] * size for site, size in zip(EVEN.sites, sizes, strict=True)}
    adapters = replace(adapters, B=B)
    tokenizer = DnDTokenizer(EVEN)
    assert relative_error(tokenizer.detokenize(tokenizer.tokenize(adapters).bfloat16()), adapters) <= 5e-3


@pytest.mark.parametrize("codec", ["exact", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_has_a_zero_b_and_no_nan(codec: Codec, dtype: torch.dtype) -> None:
    adapters = random_adapters(UNEVEN)
    adapters = replace(adapters, B={name: torch.zeros_like(B) for name, B in adapters.B.items()})
    tokenizer = DnDTokenizer(UNEVEN, codec=codec)
    tokens = tokenizer.tokenize(adapters)
    assert torch.equal(tokens.isnan(), ~tokenizer.mask.expand_as(tokens))
    B = tokenizer.detokenize(tokens.to(dtype)).B
    assert all((values == 0).all() for values in B.values())


def test_a_zero_b_that_dnd_wrote_as_nan_reads_as_zero() -> None:
    adapters = random_adapters(EVEN)
    adapters = replace(adapters, B={name: torch.zeros_like(B) for name, B in adapters.B.items()})
    tokenizer = DnDTokenizer(EVEN, codec="legacy")
    tokens = tokenizer.tokenize(adapters)
    weights = tokens[..., : EVEN.rank, : tokenizer.width]
    weights[(weights == 0).all(-1).all(-1)] = math.nan
    assert weights.isnan().any()
    back = tokenizer.detokenize(tokens)
    for name, A in adapters.A.items():
        torch.testing.assert_close(back.A[name], A, rtol=0, atol=1e-6)
        assert (back.B[name] == 0).all()


def test_a_constant_piece_survives() -> None:
    adapters = random_adapters(EVEN).map(lambda t: torch.full_like(t, 0.03))
    tokenizer = DnDTokenizer(EVEN)
    tokens = tokenizer.tokenize(adapters)
    assert tokens.isfinite().all()
    assert relative_error(tokenizer.detokenize(tokens), adapters) <= 1e-6
    assert relative_error(tokenizer.detokenize(tokens.bfloat16()), adapters) <= 5e-3


@pytest.mark.parametrize("std", [1e-6, 1e-3, 1.0])
def test_exact_weights_are_normalised_and_an_error_in_the_code_is_a_small_one_at_every_size(std: float) -> None:
    spec = llama_like(128, 128, 128, 1, 8)
    adapters = random_adapters(spec, std=std)
    tokenizer = DnDTokenizer(spec)
    tokens = tokenizer.tokenize(adapters)
    weights = tokens[..., : spec.rank, : tokenizer.width]
    assert (weights.std((-2, -1)) - 1).abs().max() < 0.025 and weights.mean((-2, -1)).abs().max() < 0.01
    tokens[..., -2:, :] += 0.01
    tokens[..., :-2, -2:] += 0.01
    assert relative_error(tokenizer.detokenize(tokens), adapters) < 0.07, "2.8 % a factor"


def test_noise_in_the_border_is_averaged() -> None:
    adapters = random_adapters(EVEN)
    tokenizer = DnDTokenizer(EVEN)
    tokens = tokenizer.tokenize(adapters)
    one_cell = tokens.clone()
    one_cell[..., -1, 1] += 0.1
    one_cell_error = relative_error(tokenizer.detokenize(one_cell), adapters)
    # 0.1 in one of 17 cells of one of two strips and of one of two rows is a code off by 0.1 / 68, of four octaves a unit.
    assert 0 < one_cell_error < 2.1 * (2 ** (4 * 0.1 / 68) - 1)


def test_gradients_reach_everything_that_means_something_and_nothing_else() -> None:
    spec = llama_like(5, 5, 5, 1, 3)
    tokenizer = DnDTokenizer(spec, chunk=(3, 3))
    tokens = tokenizer.tokenize(random_adapters(spec, count=1, std=0.3, dtype=torch.float64)).nan_to_num(0.0).requires_grad_()

    def factors(values: Tensor) -> tuple[Tensor, ...]:
        return tuple(tokenizer.detokenize(values).tensors())

    assert torch.autograd.gradcheck(factors, (tokens,), fast_mode=True)
    torch.cat([(t * torch.randn_like(t)).flatten() for t in factors(tokens)]).sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad[0] != 0, tokenizer.mask)


def test_nan_padding_gives_no_nan_gradient() -> None:
    tokenizer = DnDTokenizer(UNEVEN)
    tokens = tokenizer.tokenize(random_adapters(UNEVEN)).requires_grad_()
    torch.cat([t.square().flatten() for t in tokenizer.detokenize(tokens).tensors()]).sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()


def test_statistics_of_bf16_adapters_are_fp32() -> None:
    adapters = random_adapters(EVEN).to(torch.bfloat16)
    tokenizer = DnDTokenizer(EVEN)
    tokens = tokenizer.tokenize(adapters)
    assert tokens.dtype == torch.float32
    assert relative_error(tokenizer.detokenize(tokens), adapters) <= 1e-6


def test_an_adapter_does_not_depend_on_its_neighbours() -> None:
    adapters = random_adapters(UNEVEN, count=3)
    tokenizer = DnDTokenizer(UNEVEN)
    alone = tokenizer.tokenize(adapters.pick([1]))
    torch.testing.assert_close(tokenizer.tokenize(adapters)[1:2], alone, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("codec", ["exact", "legacy"])
def test_larger_chunks_than_needed_are_padded_and_read_back(codec: Codec) -> None:
    tokenizer = DnDTokenizer(UNEVEN, chunk=(6, 13), codec=codec)
    adapters = random_adapters(UNEVEN)
    tokens = tokenizer.tokenize(adapters)
    assert tokenizer.token_shape == (8, 16)
    assert torch.equal(tokens.isnan(), ~tokenizer.mask.expand_as(tokens)) and not tokenizer.mask.all()
    assert relative_error(tokenizer.detokenize(tokens), adapters) <= 1e-4


def test_default_width_is_no_wider_than_dnds_and_never_mostly_border() -> None:
    assert default_width(llama_like(4096, 4096, 8192, 1, 8)) == 512
    odd = llama_like(64, 32, 172, 5, 8)
    tokenizer = DnDTokenizer(odd)
    numbers = tokenizer.num_tokens * math.prod(tokenizer.token_shape)
    assert numbers < 1.6 * odd.num_parameters, "with the common divisor, 4, it would be 1.9 times as many"


def test_names_go_both_ways() -> None:
    path = "model.layers.3.mlp.down_proj"
    for factor in "AB":
        assert from_dnd_key(dnd_key(path, factor)) == (path, factor)
        assert from_dnd_key("base_model.model." + dnd_key(path, factor)) == (path, factor)
    with pytest.raises(AdapterError, match=r"lm_head\.weight"):
        from_dnd_key("lm_head.weight")
    keys = dnd_keys(llama_like(8, 8, 8, 11, 2))
    assert len(keys) == len(set(keys)) == 2 * 7 * 11
    assert keys.index("model.layers.2.mlp.down_proj.lora_B.weight") < keys.index("model.layers.10.self_attn.q_proj.lora_A.weight")


def test_what_dnd_has_no_place_for_is_refused_by_name() -> None:
    gate = Site("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkvz", 16, 64, "model.layers", (0,))
    with pytest.raises(AdapterError, match=r"no place for linear_attn\.in_proj_qkvz.*mlp\.down_proj"):
        DnDTokenizer(AdapterSpec((*EVEN.sites, gate), 4, 8.0))
    tower = Site("vision.layers.self_attn.q_proj", "self_attn.q_proj", 16, 16, "vision.layers", (0,))
    with pytest.raises(AdapterError, match=r"several lists of layers \(model\.layers, vision\.layers\)"):
        DnDTokenizer(AdapterSpec((*EVEN.sites, tower), 4, 8.0))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"chunk: .*rank 4"):
        DnDTokenizer(EVEN, chunk=(2, 32))
    with pytest.raises(AdapterError, match=r"codec: 'fp8' is unknown.*legacy"):
        DnDTokenizer(EVEN, codec="fp8")  # type: ignore[arg-type]
    tokenizer = DnDTokenizer(EVEN)
    with pytest.raises(AdapterError, match="another rank"):
        tokenizer.tokenize(random_adapters(replace(EVEN, rank=2)))
    with pytest.raises(AdapterError, match=r"tokens are \(1, 3, 6, 34\)"):
        tokenizer.detokenize(torch.zeros(1, 3, 6, 34))
    broken = random_adapters(EVEN)
    broken.B["mlp.up_proj"][0, 1, 2, 3] = math.nan
    with pytest.raises(AdapterError, match=r"B of mlp\.up_proj holds NaN"):
        tokenizer.tokenize(broken)
