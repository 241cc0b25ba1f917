"""The hybrid surgery: which layers are replaced, what is copied, and how a student comes back from its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, LAYERS, family_config, tiny_model, tokens
from limbeck.config.base import From
from limbeck.config.parts.stages import StudentOptions
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.errors import ModelError
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import save_model
from limbeck.models.structure import attention_view
from limbeck.students.hybridize import Hybridize, resolve_layers
from limbeck.students.mixers.base import Mixer
from limbeck.students.student import Student, build_student
from mixer_cases import Bench, options_of

BASE: dict[str, Any] = {"source": "tiny", "fingerprint": {}}


def _kinds(model: Any) -> list[bool]:
    return [isinstance(layer.self_attn, Mixer) for layer in model.model.layers]


@pytest.mark.parametrize(
    ("keep", "expected"), [((), ()), ((2, 0), (0, 2)), ((-1, 3), (3,)), ((-4,), (0,)), ("all", (0, 1, 2, 3))]
)
def test_kept_layers_are_resolved_to_numbers_from_zero(keep: Any, expected: tuple[int, ...]) -> None:
    assert resolve_layers(keep, 4) == expected


@pytest.mark.parametrize("keep", [(4,), (-5,), (1, 7)])
def test_a_layer_that_does_not_exist_is_refused_with_the_range(keep: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"no layer (4|-5|7): the model has 4 layers, 0 to 3"):
        wrap_student(tiny_model("llama3"), [HybridizeOptions(keep=keep)], BASE)


def test_only_the_attention_of_layers_not_kept_is_replaced() -> None:
    base = tiny_model("qwen3")
    student = wrap_student(base, [HybridizeOptions(keep=(1, -1))], BASE)
    assert _kinds(student) == [True, False, True, False]
    assert student.config.limbeck["surgery"][0]["keep"] == [1, 3]
    assert _kinds(base) == [False] * LAYERS
    rest = {name: p for name, p in student.named_parameters() if ".self_attn." not in name}
    for name, parameter in base.named_parameters():
        if ".self_attn." not in name:
            assert torch.equal(parameter, rest[name])


def test_parameters_of_mixers_have_their_own_role() -> None:
    options = HybridizeOptions(keep=(1,))
    student = wrap_student(tiny_model("qwen2"), [options], BASE)
    roles = Hybridize(options).roles(student)
    assert roles.keys() == dict(student.named_parameters()).keys()
    mixers = {name for name, role in roles.items() if role == "mixers"}
    assert mixers == {name for name in roles if ".self_attn." in name and not name.startswith("model.layers.1.")}


def test_two_mixers_share_a_model_when_each_keeps_the_layers_of_the_other() -> None:
    first = HybridizeOptions(mixer={"kind": "gated_deltanet"}, keep=(0, 1))
    second = HybridizeOptions(mixer={"kind": "swa", "window": 4}, keep=(2, 3))
    student = wrap_student(tiny_model("qwen3"), [first, second], BASE)
    kinds = [layer.self_attn.options.kind for layer in student.model.layers]
    assert kinds == ["swa", "swa", "gated_deltanet", "gated_deltanet"]
    with pytest.raises(ModelError, match="layer 2 holds a mixer already"):
        wrap_student(tiny_model("qwen3"), [first, HybridizeOptions(mixer={"kind": "swa"}, keep=(0, 1))], BASE)


def _numerator(q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHV: torch.Tensor) -> torch.Tensor:
    """Linear attention without normaliser: ``sum_{j <= i} (q_i . k_j) v_j``."""
    scores = torch.einsum("bihd,bjhd->bhij", q_BTHK, k_BTHK).tril()
    return torch.einsum("bhij,bjhv->bihv", scores, v_BTHV)


@pytest.mark.parametrize("gqa", ["heads", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("double")
def test_expanded_weights_give_what_repeated_activations_give(family: str, gqa: Any) -> None:
    """The reference repository repeats rows instead of heads; that control must not pass for the real thing."""
    bench = Bench(options_of("gated_deltanet"), family, stirred=False)
    bench.mixer.init_from(bench.view, gqa)
    view, facts, x = bench.view, bench.view.facts, bench.inputs(2, 9)

    def theirs(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias).unflatten(-1, (-1, facts.head_dim))

    with torch.no_grad():
        q = theirs(view.q_weight_QD, view.q_bias)
        k, v = theirs(view.k_weight_KD, view.k_bias), theirs(view.v_weight_KD, view.v_bias)
        if facts.norm_type is not None:
            q, k = facts.normalise(view.q_norm, q), facts.normalise(view.k_norm, k)
        k, v = (a.repeat_interleave(facts.num_groups, dim=2) for a in (k, v))
        expected = torch.nn.functional.linear(_numerator(q, k, v).flatten(-2), view.o_weight_DQ, view.o_bias)
        q, k, v = (p(x).unflatten(-1, (-1, facts.head_dim)) for p in (bench.mixer.q_proj, bench.mixer.k_proj, bench.mixer.v_proj))
        if bench.mixer.keeps_norms:
            q, k = facts.normalise(bench.mixer.q_norm, q), facts.normalise(bench.mixer.k_norm, k)
        found = bench.mixer.o_proj(_numerator(q, k, v).flatten(-2))
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-6 if gqa == "heads" else error > 0.3


def test_the_scrambled_control_needs_a_mixer_with_expanded_heads() -> None:
    with pytest.raises(ModelError, match="swa keeps them grouped"):
        wrap_student(tiny_model("qwen3"), [HybridizeOptions(mixer={"kind": "swa"}, gqa="rows")], BASE)


# Students of recipes.


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(tiny_model("qwen3"), folder)
    return folder


class Place:
    """Stages as folders: what ``locate`` is to a student."""

    def __init__(self, **folders: Path):
        self.folders = folders

    def __call__(self, source: Any) -> str:
        return str(self.folders[source.from_]) if isinstance(source, From) else str(source)


def _build(place: Place, **options: Any) -> Student:
    return build_student(StudentOptions.model_validate(options), place, seed=0, dtype=torch.float32)


def _aligned(base_folder: Path, folder: Path) -> Student:
    student = _build(Place(), base=str(base_folder), surgery=[{"kind": "hybridize"}])
    with torch.no_grad():
        for mixer in student.mixers().values():
            for parameter in mixer.parameters():
                parameter.add_(0.1)
    student.save(folder)
    return student


def test_a_student_of_a_base_remembers_it(base_folder: Path) -> None:
    student = _build(Place(), base=str(base_folder), surgery=[{"kind": "hybridize", "keep": [0]}])
    assert student.base_source == str(base_folder)
    assert sorted(student.mixers()) == [1, 2, 3]
    assert len(student.units()) == 3 + LAYERS
    assert set(student.roles.values()) == {"mixers", "rest"}


def test_building_a_student_does_not_touch_the_global_generator(base_folder: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    options = {"base": str(base_folder), "surgery": [{"kind": "hybridize", "mixer": {"kind": "gated_deltanet", "preset": "native"}}]}
    first, second = _build(Place(), **options), _build(Place(), **options)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_student_of_another_stage_goes_on_where_it_was(base_folder: Path, tmp_path: Path) -> None:
    aligned = _aligned(base_folder, tmp_path / "align")
    again = _build(Place(align=tmp_path / "align"), **{"from": "align"})
    ids = tokens(2, 11)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, aligned.model(ids).logits)
    assert again.base_source == str(base_folder)


def test_kept_layers_get_the_attention_of_the_base_back(base_folder: Path, tmp_path: Path) -> None:
    aligned = _aligned(base_folder, tmp_path / "align")
    student = _build(Place(align=tmp_path / "align"), **{"from": "align", "keep": [1, -1]})
    assert _kinds(student.model) == [True, False, True, False]
    assert student.model.config.limbeck["surgery"][0]["keep"] == [1, 3]
    base = tiny_model("qwen3")
    for layer in (1, 3):
        theirs, ours = attention_view(base, layer), attention_view(student.model, layer)
        assert torch.equal(theirs.q_weight_QD, ours.q_weight_QD) and torch.equal(theirs.k_norm.weight, ours.k_norm.weight)
    for layer in (0, 2):
        for a, b in zip(aligned.mixers()[layer].parameters(), student.mixers()[layer].parameters(), strict=True):
            assert torch.equal(a, b)
    student.save(tmp_path / "distil")
    again = _build(Place(distil=tmp_path / "distil"), **{"from": "distil", "keep": "all"})
    assert not again.mixers() and set(again.roles.values()) == {"rest"}
    ids, hidden = tokens(2, 11), tiny_model("qwen3")(tokens(2, 11)).logits
    assert torch.equal(again.model(ids).logits, hidden)


def test_a_base_that_is_gone_or_changed_is_an_error(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(tiny_model("qwen3"), base)
    _aligned(base, tmp_path / "align")
    place = Place(align=tmp_path / "align")
    save_model(tiny_model("qwen3", seed=1), base)
    with pytest.raises(ModelError, match=r"has changed since \(weights: "):
        _build(place, **{"from": "align", "keep": [0]})
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="put the folder back"):
        _build(place, **{"from": "align", "keep": [0]})
    with pytest.raises(ModelError, match="put the folder back"):
        _ = _build(place, **{"from": "align"}).base_source


def test_what_makes_no_student_is_refused(base_folder: Path, tmp_path: Path) -> None:
    scratch = family_config("qwen3")
    with pytest.raises(ModelError, match="no weights to operate on"):
        _build(Place(), config=scratch, surgery=[{"kind": "hybridize"}])
    plain = _build(Place(), config=scratch)
    assert plain.base_source is None and not plain.mixers() and set(plain.roles.values()) == {"rest"}
    place = Place(plain=base_folder, align=tmp_path / "align")
    with pytest.raises(ModelError, match="nothing to restore"):
        _build(place, **{"from": "plain", "keep": [0]})
    _aligned(base_folder, tmp_path / "align")
    with pytest.raises(ModelError, match="operated on already"):
        _build(place, **{"from": "align", "surgery": [{"kind": "hybridize"}]})
    with pytest.raises(ModelError, match=r"student.keep: no layer 9: the model has 4 layers"):
        _build(place, **{"from": "align", "keep": [9]})
    with pytest.raises(ModelError, match="ranking"):
        _build(place, **{"from": "align", "keep": {"from": "plain"}})


def test_a_stage_that_trained_a_plain_model_can_be_operated_on(base_folder: Path) -> None:
    student = _build(Place(pretrain=base_folder), **{"from": "pretrain", "surgery": [{"kind": "hybridize", "keep": [0]}]})
    assert sorted(student.mixers()) == [1, 2, 3] and student.base_source == str(base_folder)
