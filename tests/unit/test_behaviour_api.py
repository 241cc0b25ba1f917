"""The method's published names: each is there, does what the parts behind it do, and refuses what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import limbeck.behaviour as behaviour
from behaviour_case import write_workspace
from limbeck.adapters.peft_files import read_peft
from limbeck.adapters.spec import Adapters
from limbeck.adapters.targets import resolve_spec
from limbeck.behaviour import (
    DeltaAugmentedDataset,
    DeltaCache,
    DeltaOnlyLoss,
    FunctionalLoRA,
    MultiTaskLoss,
    Qwen2515LoRA_Tokenizer2D,
    Text2Qwen25LoRA_DeltaDataset,
    TrainingConfig,
    compute_adapter_delta,
    compute_base_activation,
    compute_delta_differentiable,
    compute_delta_embedding,
    create_dataloader,
    create_domain_probes,
    create_generic_probes,
    evaluate,
    train,
)
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.errors import AdapterError, DataError, ModelError, RecipeError, RunError
from limbeck.models.loading import load_model, load_tokenizer

WIDTH = 32
EVERY_TOKEN = RepresentationOptions()


def config_of(**changes: Any) -> TrainingConfig:
    sources = [
        {"name": name, "source": {"kind": "text", "path": f"data/{name}.jsonl", "documents": "row"}, "prompt": "question", "answer": "answer"}
        for name in ("colours", "sums", "echo")
    ]
    given: dict[str, Any] = {
        "base": "base", "rank": 2, "alpha": 4.0, "sources": sources, "examples": 30, "test_examples": 8, "min_examples": 8,
        "sequence": 32, "condition_texts": 2, "condition_tokens": 12, "teacher_steps": 6, "teacher_lr": 5e-3, "teacher_init": "independent",
        "paper": True, "width": 16, "steps": 4, "batch_size": 4, "ramp_steps": 3, "log_every": 1, "precision": "float32", "test_rows": 2,
    }  # fmt: skip
    return TrainingConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("behaviour"))


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def run(workspace: Path, said: list[str]) -> Path:
    return train(config_of(), workspace, say=lambda line: said.append(str(line)))


@pytest.fixture(scope="module")
def base(workspace: Path) -> Any:
    return load_model(str(workspace / "base")).requires_grad_(False)


@pytest.fixture(scope="module")
def words(workspace: Path) -> Any:
    return load_tokenizer(str(workspace / "base"))


def teachers_of(run: Path) -> list[Path]:
    return sorted(path for path in (run / "pool" / "adapters").iterdir() if path.is_dir())


def drawn(base: Any, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Adapters:
    """Leaves that want gradients."""
    spec = resolve_spec(base, "all", rank=2, alpha=4)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_()

    A = {s.name: draw(count, len(s.layers), spec.rank, s.in_features) for s in spec.sites}
    return Adapters(spec, A, {s.name: draw(count, len(s.layers), s.out_features, spec.rank) for s in spec.sites})


# -- probes and deltas -----------------------------------------------------------------------------------------------------


def test_nothing_else_in_limbeck_imports_the_doors() -> None:
    package = Path(behaviour.__file__).parent
    others = [path for path in package.parent.rglob("*.py") if package not in path.parents]
    assert len(others) > 100
    assert [path for path in others if "limbeck.behaviour" in path.read_text(encoding="utf-8")] == []
    assert all(hasattr(behaviour, name) for name in behaviour.__all__)


def test_probes_have_the_published_numbers() -> None:
    assert len(create_generic_probes()) == 5
    assert {len(create_domain_probes(domain)) for domain in ("math", "code", "commonsense")} == {5}
    with pytest.raises(AdapterError, match="did you mean 'math'"):
        create_domain_probes("maths")


def test_the_base_activation_is_the_mean_last_token_state_of_the_last_layer(base: Any, words: Any, workspace: Path) -> None:
    probes = create_generic_probes()
    with torch.no_grad():
        states = [base(**words(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0, -1] for text in probes]
    wanted = torch.stack(states).mean(0).numpy()
    found = compute_base_activation(base, words, probes)
    assert found.dtype == np.float32 and found.shape == (WIDTH,)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(compute_base_activation(workspace / "base", workspace / "base", probes), found)


def test_an_adapters_delta_is_what_peft_moves(base: Any, words: Any, run: Path, workspace: Path) -> None:
    from peft import PeftModel

    folder, probes = teachers_of(run)[0], create_domain_probes("math")
    found = compute_adapter_delta(base, words, probes, folder)
    model = PeftModel.from_pretrained(load_model(str(workspace / "base")), folder)
    wanted = compute_base_activation(model.merge_and_unload().eval(), words, probes) - compute_base_activation(base, words, probes)
    assert found.shape == (WIDTH,) and np.linalg.norm(wanted) > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_a_delta_does_not_depend_on_who_is_measured_with_it(base: Any, words: Any, run: Path) -> None:
    folders, probes = teachers_of(run), create_generic_probes()
    start = compute_base_activation(base, words, probes)
    together = compute_adapter_delta(base, words, probes, folders, base_activation=start)
    assert together.shape == (len(folders), WIDTH)
    for row, folder in zip(together, folders, strict=True):
        np.testing.assert_allclose(row, compute_adapter_delta(base, words, probes, folder), rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match="base_activation is"):
        compute_adapter_delta(base, words, probes, folders, base_activation=start[:, None])


def test_the_cache_keeps_deltas_by_content_and_maps_folders_to_keys(workspace: Path, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folders, probes, cache = teachers_of(run), create_generic_probes(), DeltaCache(tmp_path / "deltas")
    where = workspace / "base"
    first = compute_adapter_delta(where, where, probes, folders, cache=cache)
    files = {path.name: path.read_bytes() for path in cache.folder.iterdir()}
    assert len(files) == len(folders) + 2, "a delta for each adapter, v(base), and the manifest"
    assert set(cache.manifest) == set(map(str, folders))
    np.testing.assert_array_equal(np.load(cache.folder / cache.manifest[str(folders[1])]["file"]), first[1])
    with monkeypatch.context() as patched:
        patched.setattr("limbeck.behaviour.deltas.embed", lambda *_, **__: pytest.fail("measured again"))
        np.testing.assert_array_equal(compute_adapter_delta(where, where, probes, folders, cache=cache), first)
    assert {path.name: path.read_bytes() for path in cache.folder.iterdir()} == files
    changed = compute_adapter_delta(where, where, [*probes[:4], probes[4] + "!"], folders[0], cache=cache)
    assert not np.array_equal(changed, first[0]) and len(list(cache.folder.glob("*.npy"))) == len(folders) + 3
    with pytest.raises(AdapterError, match="name another folder"):
        compute_adapter_delta(where, where, probes, folders, cache=DeltaCache(run / "deltas" / "deltas"))


# -- differentiable deltas -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("represent", [None, EVERY_TOKEN], ids=["paper", "every token"])
def test_the_batched_delta_and_functional_call_agree_in_value_and_gradient(
    base: Any, words: Any, workspace: Path, represent: RepresentationOptions | None
) -> None:
    adapters, probes = drawn(base), create_domain_probes("code")[:3]
    options = {} if represent is None else {"represent": represent}
    peft = get_peft_model(
        load_model(str(workspace / "base")), LoraConfig(r=2, lora_alpha=4, target_modules=adapters.spec.paths, lora_dropout=0.0)
    ).eval()
    functional = FunctionalLoRA(peft)
    assert len(functional.apply_lora_weights(adapters, 1)) == 2 * len(adapters.spec.paths)
    found = compute_delta_embedding(base, adapters, probes, tokenizer=words, **options)
    wanted = compute_delta_differentiable(functional, adapters, probes, tokenizer=words, **options)
    assert found.dtype == torch.float32 and len(found) == 2
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(compute_delta_differentiable(base, adapters, probes, tokenizer=words, **options), found)
    ours, theirs = (torch.autograd.grad(delta.square().sum(), adapters.tensors()) for delta in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_a_peft_model_of_another_scale_is_refused(base: Any, words: Any, workspace: Path) -> None:
    adapters = drawn(base)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=adapters.spec.paths)
    functional = FunctionalLoRA(get_peft_model(load_model(str(workspace / "base")), config).eval())
    with pytest.raises(AdapterError, match="scales its LoRA by 4, and these adapters are scaled by 2"):
        compute_delta_differentiable(functional, adapters, create_generic_probes(), tokenizer=words)


def test_bad_bases_and_probes_are_named(base: Any, words: Any, workspace: Path) -> None:
    adapters = drawn(base)
    with pytest.raises(ModelError, match="training mode"):
        compute_base_activation(load_model(str(workspace / "base")).train(), words, create_generic_probes())
    with pytest.raises(ModelError, match="this is a dict"):
        compute_base_activation({}, words, create_generic_probes())
    with pytest.raises(DataError, match="need the base's tokenizer"):
        compute_delta_embedding(base, adapters, create_generic_probes())
    with pytest.raises(DataError, match="one text"):
        compute_base_activation(base, words, "What follows?")


# -- losses ----------------------------------------------------------------------------------------------------------------


def test_multi_task_loss_is_the_weighted_sum_and_ramps(base: Any, words: Any, run: Path) -> None:
    teacher = read_peft(teachers_of(run)[0], base)
    teacher = Adapters(teacher.spec, {n: t.expand(2, -1, -1, -1) for n, t in teacher.A.items()}, {n: t.expand(2, -1, -1, -1) for n, t in teacher.B.items()})
    generated, probes = drawn(base), create_generic_probes()
    target = compute_delta_embedding(base, teacher, probes, tokenizer=words).detach()
    loss = MultiTaskLoss(base, probes, tokenizer=words, lambda_weight=2.0, lambda_delta=0.5, ramp_steps=10)
    found = compute_delta_embedding(base, generated, probes, tokenizer=words)
    mse = (found - target).square().mean()
    pairs = [(a, b) for a, b in zip(generated.tensors(), teacher.tensors(), strict=True)]
    weights = sum((a - b).square().sum() for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    for step, factor in ((0, 0.0), (5, 0.25), (99, 0.5)):
        value, numbers = loss(generated, teacher, target, step=step)
        torch.testing.assert_close(value, 2.0 * weights + factor * mse, rtol=1e-4, atol=1e-6)
        assert numbers["lambda_delta"] == factor
    assert {"loss", "L_weight", "L_delta", "delta_cosine", "delta_norm", "delta_teacher_norm", "delta_ratio", "lora_ratio"} <= set(numbers)
    assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(value, generated.tensors()))
    exact, numbers = loss(teacher, teacher, target, step=99)
    assert float(exact.detach()) < 1e-8 and numbers["delta_cosine"] > 0.9999 and numbers["lora_ratio"] == pytest.approx(1)
    with pytest.raises(AdapterError, match="one for each is needed"):
        loss(generated, teacher.pick([0]), target)
    with pytest.raises(AdapterError, match=r"wanted float32 \[2, F\]"):
        loss(generated, teacher, target.double())


def test_delta_only_loss_adds_its_regularisers_and_can_be_trained_on(base: Any, words: Any, run: Path) -> None:
    probes = create_generic_probes()
    target = compute_delta_embedding(base, read_peft(teachers_of(run)[0], base), probes, tokenizer=words).detach()
    generated = drawn(base, 1)
    loss = DeltaOnlyLoss(base, probes, tokenizer=words, norm_penalty=0.1, tether=0.5)
    value, numbers = loss(generated, target)
    assert float(value.detach()) == pytest.approx(numbers["L_delta"] + 0.1 * numbers["L_norm"] + 0.5 * numbers["L_tether"], rel=1e-5)
    assert numbers["L_tether"] > 0 and numbers["L_norm"] > 0
    optimizer = torch.optim.Adam(generated.tensors(), lr=5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        later, _ = loss(generated, target)
        later.backward()
        optimizer.step()
    assert float(later.detach()) < 0.5 * float(value.detach())


# -- dataset ---------------------------------------------------------------------------------------------------------------


def test_a_batch_is_tokens_condition_and_delta_in_fp32(run: Path, base: Any, words: Any) -> None:
    dataset = DeltaAugmentedDataset(run / "conditions" / "conditions", run / "pool" / "adapters", run / "deltas" / "deltas", draws=2)
    assert len(dataset) == 6 and dataset.form == "prompts"
    batch = next(iter(create_dataloader(dataset, 4)))
    assert dataset.tokenizer is not None
    rows = (dataset.tokenizer.num_tokens, *dataset.tokenizer.token_shape)
    shapes = {name: (batch[name].dtype, tuple(batch[name].shape)) for name in ("tokens_teacher", "condition", "delta_teacher")}
    assert shapes == {
        "tokens_teacher": (torch.float32, (4, *rows)), "condition": (torch.int64, (4, 2, 12)), "delta_teacher": (torch.float32, (4, WIDTH)),
    }  # fmt: skip
    teachers = dataset.adapters(batch["entry"].tolist())
    for found, wanted in zip(dataset.tokenizer.detokenize(batch["tokens_teacher"]).tensors(), teachers.tensors(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    measured = compute_adapter_delta(base, words, create_generic_probes(), teachers)
    np.testing.assert_allclose(batch["delta_teacher"].numpy(), measured, rtol=0, atol=1e-5)
    first, again = dataset[0], dataset[3]
    assert first["entry"] == again["entry"] and not torch.equal(first["condition"], again["condition"])
    factors = DeltaAugmentedDataset(dataset.conditions, dataset.pool, dataset.deltas, tokens="factors")
    assert factors[0]["tokens_teacher"].shape == (dataset.adapters([0]).spec.num_parameters,)
    assert [b["entry"].tolist() for b in create_dataloader(dataset, 4, seed=3)] == [b["entry"].tolist() for b in create_dataloader(dataset, 4, seed=3)]


def test_both_forms_of_conditions_are_read_and_not_confused(workspace: Path, run: Path, words: Any) -> None:
    answers = train(config_of(name="answers", conditioning="prompt_answer", controls=False, teacher_steps=2, steps=1), workspace, say=lambda _: None)
    for form, folder in (("prompts", run), ("prompt_answer", answers)):
        dataset = Text2Qwen25LoRA_DeltaDataset(folder, form=form)
        assert isinstance(dataset.tokenizer, Qwen2515LoRA_Tokenizer2D) and dataset.form == form
        at = [dataset.conditions.conditions[item["condition_id"]].source for item in (dataset[i] for i in range(3))].index("sums")
        texts = [words.decode([i for i in row if i >= 0]) for row in dataset[at]["condition"].tolist()]
        assert all(text.startswith("Add") and ("That" in text) == (form == "prompt_answer") for text in texts), texts
    with pytest.raises(DataError, match="are read as 'prompts', and 'prompt_answer' is asked for"):
        Text2Qwen25LoRA_DeltaDataset(run, form="prompt_answer")
    with pytest.raises(RunError, match=r"no recipe\.json"):
        Text2Qwen25LoRA_DeltaDataset(workspace)
    with pytest.raises(DataError, match="run that stage first"):
        (run / "deltas" / "deltas").rename(run / "deltas" / "away")
        try:
            Text2Qwen25LoRA_DeltaDataset(run)
        finally:
            (run / "deltas" / "away").rename(run / "deltas" / "deltas")


# -- tokens ----------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_has_the_published_shape_and_loses_nothing(run: Path) -> None:
    published = Qwen2515LoRA_Tokenizer2D()
    assert (published.num_tokens, published.token_shape, published.spec.num_parameters) == (4508, (18, 258), 18_464_768)
    for codec in ("exact", "legacy"):
        tokenizer = Qwen2515LoRA_Tokenizer2D(teachers_of(run)[0], codec=codec)
        assert tokenizer.tokenize(teachers_of(run)[0]).shape == (1, tokenizer.num_tokens, *tokenizer.token_shape)
        assert tokenizer.roundtrip_error(teachers_of(run)[0]) < 1e-3


# -- configuration, training, judging --------------------------------------------------------------------------------------


def test_use_small_model_sets_the_two_published_sizes() -> None:
    small, large = TrainingConfig(), TrainingConfig(use_small_model=False)
    assert (small.num_layers, small.hidden_size, small.intermediate_size, small.lora_rank, small.lora_alpha) == (24, 896, 4864, 8, 16)
    assert (large.num_layers, large.hidden_size, large.intermediate_size, large.lora_rank, large.lora_alpha) == (28, 1536, 8960, 16, 32)
    for config, base, numbers in ((small, "Qwen/Qwen2.5-0.5B", 4_399_104), (large, "Qwen/Qwen2.5-1.5B", 18_464_768)):
        spec = config.adapter_spec()
        assert spec.num_parameters == numbers and len(spec.sites) == 7 and spec.scale == 2
        recipe = replace(config, sources=config_of().sources).to_recipe()
        assert recipe.stages["generate"].student.base == recipe.stages["pool"].base == base
        assert recipe.stages["generate"].student.surgery[0].rank == config.lora_rank


def test_a_configuration_is_the_recipe_of_its_mode() -> None:
    def losses(**changes: Any) -> list[tuple[str, Any]]:
        return [(o.kind, o.weight_at(10**6)) for o in config_of(**changes).to_recipe().stages["generate"].objectives]

    assert losses(mode="weights") == [("weights", 1.0)]
    assert losses(lambda_delta=0.3) == [("weights", 1.0), ("delta", 0.3)]
    assert losses(mode="delta_only", norm_penalty=0.2, tether=0.5) == [("delta", 1.0), ("norm_penalty", 0.2), ("tether", 0.5)]
    recipe = config_of(lambda_delta=0.3, ramp_steps=7).to_recipe()
    ramp = recipe.stages["generate"].objectives[1]
    assert [ramp.weight_at(step) for step in (0, 7, 8)] == [0.0, 0.3, 0.3]
    assert recipe.stages["deltas"].paper and "deltas" not in config_of(mode="weights").to_recipe().stages
    with pytest.raises(RecipeError, match=r"sources"):
        TrainingConfig().to_recipe()
    with pytest.raises(RecipeError, match="weight"):
        config_of(lambda_weight=-1.0).to_recipe()
    with pytest.raises(RecipeError, match="when it is loaded"):
        config_of().adapter_spec()


def test_train_runs_the_recipe_and_goes_on_where_it_stopped(run: Path, said: list[str], workspace: Path) -> None:
    assert run == workspace / "runs" / "behaviour" and (workspace / "behaviour.yaml").is_file()
    assert (run / "generate" / "model" / "generator.safetensors").is_file()
    assert sum("(train" in line or "(prepare" in line or "(measure" in line or "(evaluate" in line for line in said) == 6
    again: list[str] = []
    assert train(config_of(), workspace, say=lambda line: again.append(str(line))) == run
    assert sum("done before, skipped" in line for line in again) == 6


def test_evaluate_reads_what_the_stage_found(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    table = evaluate(run, say=lambda line: said.append(str(line)))
    seen = table["splits"]["seen"]
    assert {"base", "mean adapter", "nearest adapter", "teacher", "generate", "generate, shuffled", "static"} <= set(seen["nll"])
    assert seen["share"]["teacher"] == pytest.approx(1) and len(table["conditions"]) == 3 and "skipped" in said[0]
    for where, stage, message in ((tmp_path, None, r"no recipe\.json"), (run, "judge", "no evaluate_adapters stage named 'judge'; there are evaluate")):
        with pytest.raises(RunError, match=message):
            evaluate(where, stage)
