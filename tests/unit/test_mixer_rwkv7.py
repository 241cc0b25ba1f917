"""RWKV-7 in a whole model: the values of its first layer reach the later ones, however the model is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model, tokens
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.engine.recompute import recompute
from limbeck.models.across import AcrossLayers
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import load_model, save_model
from limbeck.models.packed import forward_packed
from limbeck.models.structure import decoder_layers
from limbeck.types import Batch
from mixer_cases import Bench, options_of

pytestmark = pytest.mark.usefixtures("double")
every_keep = pytest.mark.parametrize("keep", [(), (0,), (1, 3)], ids=["none", "first", "some"])


def make_student(keep: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    base = tiny_model("qwen3", dtype=torch.float64)
    student: Any = wrap_student(base, [HybridizeOptions(mixer={"kind": "rwkv7"}, keep=keep)], {"source": "tiny", "fingerprint": {}})
    with torch.no_grad():
        for mixer in student.mixers().values():
            for parameter in mixer.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            if hasattr(mixer, "v_up"):
                mixer.v_up.bias.zero_()
    return student.eval()


def carriers(student: Any, call: Any) -> list[AcrossLayers]:
    """What each mixer is handed while ``call`` runs."""
    seen: list[AcrossLayers] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["across_layers"])

    handles = [mixer.register_forward_pre_hook(note, with_kwargs=True) for mixer in student.mixers().values()]
    call()
    for handle in handles:
        handle.remove()
    return seen


@every_keep
@torch.no_grad()
def test_every_layer_reads_the_values_of_the_first_one(keep: tuple[int, ...]) -> None:
    student = make_student(keep)
    first = min(student.mixers())
    made: list[torch.Tensor] = []
    handle = student.mixers()[first].v_proj.register_forward_hook(lambda module, args, output: made.append(output))
    seen = carriers(student, lambda: student(tokens(2, 9), use_cache=False))
    again = carriers(student, lambda: student(tokens(2, 9), use_cache=False))
    handle.remove()
    assert len(set(map(id, seen))) == 1 and seen[0] is not again[0]
    values = seen[0].first("values", torch.zeros(()))
    assert torch.equal(values.flatten(2), made[0])
    # And they count: without them the output is another.
    alone = student.model(tokens(2, 9), use_cache=False, across_layers=None).last_hidden_state
    together = student.model(tokens(2, 9), use_cache=False).last_hidden_state
    assert (alone - together).abs().max() > 1e-4


@every_keep
@torch.no_grad()
def test_packing_and_cache_change_nothing(keep: tuple[int, ...]) -> None:
    student = make_student(keep)
    ids = tokens(1, 30)
    whole = student(ids, use_cache=False).logits
    cache, parts = student.new_cache(), []
    for start, end in ((0, 11), (11, 12), (12, 13), (13, 30)):
        parts.append(student(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    positions, documents = torch.cat([torch.arange(13), torch.arange(17)])[None], torch.tensor([[0] * 13 + [1] * 17])
    packed = student.lm_head(forward_packed(student, Batch(ids, ids, positions, documents)))
    separate = torch.cat([student(ids[:, span], use_cache=False).logits for span in (slice(0, 13), slice(13, 30))], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)
    padded, mask = torch.cat([torch.zeros(1, 5, dtype=ids.dtype), ids], 1), torch.tensor([[0] * 5 + [1] * 30])
    left = student(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False).logits
    torch.testing.assert_close(left[:, 5:], whole, rtol=1e-9, atol=1e-9)


@every_keep
def test_recomputed_layers_have_the_same_gradients(keep: tuple[int, ...]) -> None:
    student = make_student(keep)
    ids, parameters = tokens(1, 20), [p for m in student.mixers().values() for p in m.parameters()]

    def gradients() -> list[torch.Tensor]:
        loss = student(ids, use_cache=False).logits.square().mean()
        return list(torch.autograd.grad(loss, parameters))

    plain = gradients()
    for layer in decoder_layers(student):
        recompute(layer)
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    mixed = [m for i, m in student.mixers().items() if i > min(student.mixers())]
    names = {id(p): g for p, g in zip(parameters, plain, strict=True)}
    assert all(names[id(m.v_down.weight)].abs().max() > 0 for m in mixed)


@torch.no_grad()
def test_a_loaded_student_carries_values_too(tmp_path: Path) -> None:
    student = make_student((1,))
    save_model(student, tmp_path / "student")
    again = load_model(str(tmp_path / "student"), dtype=torch.float64)
    assert torch.equal(student(tokens(2, 12)).logits, again(tokens(2, 12)).logits)


@torch.no_grad()
def test_a_layer_called_alone_is_its_own_first() -> None:
    """As in alignment: the mix does nothing, whatever its gate."""
    bench = Bench(options_of("rwkv7"), layer=1)
    x = bench.inputs(2, 15)
    alone = bench(x)
    bench.mixer.v_up.bias.fill_(3.0)
    assert torch.equal(bench(x), alone)
    carrier = AcrossLayers()
    carrier.first("values", torch.ones(2, 15, 4, 12))
    assert (bench(x, across_layers=carrier) - alone).abs().max() > 1e-3
