"""Delta embeddings: gradients, what they may not depend on, every way of reading against a plain one, and their place on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapter_cases import (
    changed_model,
    gradients,
    ragged_rows,
    random_adapters,
    runner,
    small_model,
    small_spec,
    wanting_gradients,
)
from limbeck.adapters.delta_store import DeltaCache, adapter_key, measuring_digest
from limbeck.adapters.deltas import Probes, embed, projection, relative_error
from limbeck.adapters.inject import Injector
from limbeck.adapters.peft_files import write_peft
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import PAPER, RepresentationOptions
from limbeck.errors import AdapterError, ModelError
from limbeck.models.head import head_of
from limbeck.models.hidden import hidden_states
from limbeck.stages.probing import padded, with_continuations

LENGTHS = (9, 4, 7)
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "last": {"tokens": "last"},
    "mean of tokens": {"tokens": "mean"},
    "paper": {"tokens": "last", "per_probe": False},
    "two layers": {"layers": (0, -1), "tokens": "mean"},
    "mean of two layers": {"layers": (0, -1), "tokens": "last", "join": "mean"},
    "before the final norm": {"tokens": "last", "final_norm": False},
    "projected": {"projection": 5, "layers": (0, 1)},
    "projected mean": {"projection": 5, "tokens": "mean", "per_probe": False},
}


def case(dtype: torch.dtype = torch.float64, count: int = 3, size: float = 0.2, family: str = "qwen2") -> tuple[Any, Any, Adapters, Probes]:
    """A base, a way to run it with adapters, some of those, and ragged probes."""
    model = small_model(family, dtype=dtype)
    spec = small_spec(model)
    return model, runner(model, Injector(model, spec)), random_adapters(spec, count, size=size, dtype=dtype), padded(ragged_rows(LENGTHS))


def in_fp64(model: Any) -> Any:
    """The model with norms that do not round to fp32 on the way, as transformers' do: finite differences would be of that rounding."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: m.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon))
    return model


def delta(run: Any, adapters: Adapters, probes: Probes, options: RepresentationOptions, **more: Any) -> Tensor:
    return embed(run, adapters, probes, options, **more) - embed(run, None, probes, options)


# -- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["all", "paper", "projected"])
def test_gradients_of_a_delta_are_those_of_finite_differences(way: str) -> None:
    model, run, adapters, probes = case(count=2)
    in_fp64(model)
    options = RepresentationOptions(**WAYS[way])
    with torch.no_grad():
        target = delta(run, random_adapters(adapters.spec, 2, seed=9), probes, options)

    def loss(found: Adapters) -> Tensor:
        return relative_error(delta(run, found, probes, options, together=1), target).sum()

    leaves = wanting_gradients(adapters)
    loss(leaves).backward()
    generator = torch.Generator().manual_seed(1)
    for letter in ("A", "B"):
        for site in adapters.spec.sites:
            leaf = getattr(leaves, letter)[site.name]
            step = 1e-6 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            moved = [replace(adapters, **{letter: {**getattr(adapters, letter), site.name: leaf.detach() + sign * step}}) for sign in (1, -1)]
            with torch.no_grad():
                difference = float(loss(moved[0]) - loss(moved[1])) / 2
            assert difference == pytest.approx(float((leaf.grad * step).sum()), rel=1e-5, abs=1e-13), (letter, site.name)


def test_microbatches_do_not_change_loss_or_gradient() -> None:
    _, run, adapters, probes = case(torch.float32, count=5)
    options = RepresentationOptions()
    with torch.no_grad():
        target = delta(run, random_adapters(adapters.spec, 5, seed=9, dtype=torch.float32), probes, options)
    found = []
    for together in (None, 1, 2, 5):
        leaves = wanting_gradients(adapters)
        loss = relative_error(delta(run, leaves, probes, options, together=together), target).sum()
        loss.backward()
        found.append((loss.detach(), gradients(leaves)))
    for loss, gradient in found[1:]:
        assert float((loss - found[0][0]).abs() / found[0][0]) < 1e-6
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) < 1e-6


def test_one_lot_at_a_time_keeps_the_graph_of_no_lot() -> None:
    _, run, adapters, probes = case(torch.float32, count=6)
    kept: list[int] = []

    def held(together: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embed(run, wanting_gradients(adapters), probes, RepresentationOptions(), together=together)
        return sum(storages.values())

    assert held(1) < 0.25 * held(6)
    assert kept, "nothing was saved at all: the check would pass for any memory"


# -- what a delta may not depend on ----------------------------------------------------------------------------------------


def test_an_adapters_delta_does_not_depend_on_the_others_in_its_batch() -> None:
    _, run, adapters, probes = case(torch.float32, count=5)
    options = RepresentationOptions()
    together = delta(run, adapters, probes, options)
    for i in range(5):
        alone = delta(run, adapters.pick([i]), probes, options)[0]
        assert float((together[i] - alone).norm() / alone.norm()) < 1e-5
    other_way = delta(run, adapters.pick([4, 2, 0, 1, 3]), probes, options, together=2)
    assert float((other_way[2] - together[0]).norm() / together[0].norm()) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_right_padding_changes_nothing(way: str) -> None:
    _, run, adapters, probes = case()
    options = RepresentationOptions(**WAYS[way])
    more = 5
    # What stands on padding must not be read either.
    ids = torch.cat([torch.where(probes.mask_KT, probes.ids_KT, 17), torch.full((len(probes), more), 23)], 1)
    wider = Probes(ids, torch.cat([probes.mask_KT, torch.zeros(len(probes), more, dtype=torch.bool)], 1))
    plain, found = delta(run, adapters, probes, options), delta(run, adapters, wider, options)
    if options.tokens == "all":
        states = found.unflatten(1, (len(probes), max(LENGTHS) + more, -1))
        assert not states[:, :, max(LENGTHS) :].any()
        found = states[:, :, : max(LENGTHS)].flatten(1)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


# -- against a plain reading -----------------------------------------------------------------------------------------------


def plain_reading(model: Any, rows: Sequence[Sequence[int]], options: RepresentationOptions) -> Tensor:
    """One forward pass a probe without padding, transformers' own hidden states."""
    longest = max(map(len, rows))
    parts = []
    for row in rows:
        states = []
        for layer in options.layers:
            own: list[Tensor] = []
            hook = model.model.layers[layer].register_forward_hook(lambda m, i, out, own=own: own.append(out[0] if isinstance(out, tuple) else out))
            with torch.no_grad():
                last = model(torch.tensor([list(row)]), output_hidden_states=True).hidden_states[-1]
            hook.remove()
            is_last = layer in (-1, len(model.model.layers) - 1)
            states.append(last[0] if is_last and options.final_norm else own[0][0])
        x_TD = torch.cat(states, -1) if options.join == "concat" else sum(states) / len(states)
        if options.projection is not None:
            x_TD = x_TD @ projection(x_TD.shape[-1], options.projection).to(x_TD.dtype)
        if options.tokens == "last":
            parts.append(x_TD[-1])
        elif options.tokens == "mean":
            parts.append(x_TD.mean(0))
        else:
            parts.append(torch.cat([x_TD, x_TD.new_zeros(longest - len(row), x_TD.shape[1])]).flatten())
    return torch.cat(parts) if options.per_probe else torch.stack(parts).mean(0)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_equals_one_forward_a_probe(way: str) -> None:
    model, run, adapters, probes = case()
    options = RepresentationOptions(**WAYS[way])
    rows = ragged_rows(LENGTHS)
    base = plain_reading(model, rows, options)
    wanted = torch.stack([plain_reading(changed_model(model, adapters, i), rows, options) - base for i in range(len(adapters))])
    torch.testing.assert_close(delta(run, adapters, probes, options), wanted, rtol=0, atol=1e-10)
    assert float(wanted.abs().max()) > 1e-3


def test_states_are_taken_where_the_options_say() -> None:
    model, _, _, probes = case()
    own: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda m, i, out: own.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        theirs = model(probes.ids_KT, output_hidden_states=True).hidden_states
        hook.remove()
        after, first = hidden_states(model, probes.ids_KT, [-1, 0])
        (before,) = hidden_states(model, probes.ids_KT, [1], final_norm=False)
    assert torch.equal(after, theirs[-1]) and torch.equal(first, theirs[1])
    assert torch.equal(before, own[0]) and not torch.allclose(before, after)
    with pytest.raises(ModelError, match="layer 2: the model has 2 layers, 0 to 1"):
        hidden_states(model, probes.ids_KT, [2])


def test_the_published_delta_is_that_of_peft_by_its_definition(tmp_path: Path) -> None:
    model, run, adapters, probes = case(torch.float32)
    found = delta(run, adapters, probes, PAPER)

    def mean_of_last(any_model: Any) -> Tensor:
        with torch.no_grad():
            found = [any_model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1] for row in ragged_rows(LENGTHS)]
        return torch.stack([states[0, -1].float() for states in found]).mean(0)

    base = mean_of_last(model)
    for i in range(len(adapters)):
        write_peft(adapters, i, tmp_path / str(i), base="tiny", provenance={})
        wrapped = PeftModel.from_pretrained(small_model(dtype=torch.float32), str(tmp_path / str(i)))
        wanted = mean_of_last(wrapped.eval()) - base
        assert float((found[i] - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_likelihoods_are_those_of_the_continuations_alone(family: str) -> None:
    model, run, adapters, probes = case(family=family)
    options = RepresentationOptions(what="likelihoods", continuations=2, continuation_tokens=3)
    longer = with_continuations(model, probes, options, seed=5)
    assert len(longer) == 2 * len(probes) and longer.scored_KT is not None
    assert longer.scored_KT.sum(1).tolist() == [3] * len(longer)
    head = head_of(model)
    with torch.no_grad():
        found = embed(run, adapters, longer, options, head=head, together=2)
    rows = [row for row in ragged_rows(LENGTHS) for _ in range(2)]
    for i in range(len(adapters)):
        changed = changed_model(model, adapters, i)
        for k, row in enumerate(rows):
            ids = longer.ids_KT[k][longer.mask_KT[k]]
            assert ids[: len(row)].tolist() == row
            with torch.no_grad():
                logs = changed(ids[None]).logits[0].double().log_softmax(-1)
            wanted = sum(float(logs[t - 1, ids[t]]) for t in range(len(row), len(ids)))
            assert float(found[i, k]) == pytest.approx(wanted, rel=2e-5)


def test_the_base_samples_the_same_continuations_again_and_others_for_another_seed() -> None:
    model, _, _, probes = case(torch.float32)
    options = RepresentationOptions(what="likelihoods", continuations=2, continuation_tokens=4)
    first, again, other = (with_continuations(model, probes, options, seed=seed).ids_KT for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_error_against_a_delta_of_zero_is_finite() -> None:
    found = relative_error(torch.zeros(1, 4), torch.zeros(1, 4))
    assert found.tolist() == [0.0]


# -- on disk ---------------------------------------------------------------------------------------------------------------


def test_the_key_holds_everything_that_a_delta_depends_on() -> None:
    _, _, adapters, probes = case()
    base = {"source": "somewhere", "fingerprint": {"weights": "1"}}
    options = RepresentationOptions()
    other_ids = probes.ids_KT.clone()
    other_ids[1, 2] += 1
    shorter = probes.mask_KT.clone()
    shorter[0, -1] = False
    measuring = measuring_digest(base, probes, options, "float32")
    others = [
        measuring_digest({**base, "fingerprint": {"weights": "2"}}, probes, options, "float32"),
        measuring_digest(base, replace(probes, ids_KT=other_ids), options, "float32"),
        measuring_digest(base, replace(probes, mask_KT=shorter), options, "float32"),
        measuring_digest(base, replace(probes, scored_KT=probes.mask_KT), options, "float32"),
        measuring_digest(base, probes, options, "bfloat16"),
        *(measuring_digest(base, probes, RepresentationOptions(**changed), "float32") for changed in WAYS.values() if changed),
    ]
    assert len({measuring, *others}) == 1 + len(others)
    assert measuring == measuring_digest({**base, "source": "elsewhere"}, probes, options, "float32")

    key = adapter_key(adapters, 0, measuring)
    assert key == adapter_key(adapters.pick([1, 0]), 1, measuring), "it depends on the adapter's place"
    name = adapters.spec.sites[0].name
    for letter in ("A", "B"):
        moved = getattr(adapters, letter)[name].clone()
        moved[0, 0, 0, 0] = torch.nextafter(moved[0, 0, 0, 0], torch.tensor(9.0, dtype=moved.dtype))
        assert adapter_key(replace(adapters, **{letter: {**getattr(adapters, letter), name: moved}}), 0, measuring) != key
    assert adapter_key(replace(adapters, spec=replace(adapters.spec, alpha=8.0)), 0, measuring) != key
    assert adapter_key(adapters, 1, measuring) != key
    assert adapter_key(adapters, 0, others[0]) != key


def test_the_cache_gives_back_what_it_got_and_names_a_damaged_file(tmp_path: Path) -> None:
    cache = DeltaCache(tmp_path / "cache")
    numbers = np.arange(6, dtype=np.float32)
    assert cache.get("k") is None and "k" not in cache
    cache.put("k", numbers)
    held = cache.get("k")
    assert held is not None and np.array_equal(held, numbers) and "k" in cache
    cache.write_manifest({"some/adapter": {"key": "k"}})
    assert DeltaCache(tmp_path / "cache").manifest["some/adapter"]["key"] == "k"
    assert sorted(p.name for p in cache.folder.iterdir()) == ["k.npy", "manifest.json"]
    cache.path("k").write_bytes(cache.path("k").read_bytes()[:-4])
    with pytest.raises(AdapterError, match=r"k\.npy: is damaged .* remove it"):
        cache.get("k")
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(AdapterError, match=r"manifest\.json: is damaged"):
        _ = cache.manifest
