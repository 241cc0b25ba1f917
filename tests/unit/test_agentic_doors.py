"""The agentic method under its own names: each door does what it says, and what it says is what the rest of Limbeck does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import limbeck.agentic as agentic
from adapter_bases import QWEN3_NEXT, qwen3_next
from families import VOCABULARY, tokens
from limbeck.adapters.spec import Adapters
from limbeck.agentic import (
    AgenticHyperNetwork,
    student_forward_with_lora,
    student_with_lora,
    teacher_options,
    top_k_kl_divergence,
    train_step,
)
from limbeck.agentic.losses import signal_of
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.engine.recompute import recompute
from limbeck.errors import AdapterError, DataError, LimbeckError, RecipeError, RunError, TeacherError
from limbeck.models.loading import build_model
from limbeck.models.structure import layer_list
from limbeck.ops.topk_divergence import linear_topk_divergence
from limbeck.students.generator.network import Generator
from limbeck.types import IGNORE, Head, TopKSignal

K = 5


def hyper(student: Any, **changes: Any) -> AgenticHyperNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AgenticHyperNetwork(student, **{"rank": 2, "alpha": 4, "width": 32, "reader": {"blocks": 1, "latents": 4}, "tokens": 6, **changes})
    return made.to(next(student.parameters()).dtype)


def perturbed(module: AgenticHyperNetwork) -> AgenticHyperNetwork:
    """One whose LoRAs do something, and something else for every prompt."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in module.generator.decoder.to_B.values():  # type: ignore[union-attr]
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return module


def state_of(model: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def batch_of(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Rows of unequal length; the first half of each is the prompt's, the rest the assistant's."""
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[:, : length // 2] = IGNORE
    ids[1, length - 3 :], labels[1, length - 3 :] = -1, IGNORE
    condition = tokens(rows, 6, seed=5)
    condition[2, 4:] = -1
    return {"input_ids": ids, "labels": labels, "condition_ids": condition}


# -- the loss --------------------------------------------------------------------------------------------------------------


def naive(student: Tensor, teacher: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """KL over k ids and the rest, spelt out in fp64."""
    p, t = (logits.double() / temperature for logits in (student, teacher))
    p, t = p.log_softmax(-1), t.log_softmax(-1)
    ids = teacher.topk(k).indices
    kept_t, kept_p = t.gather(-1, ids), p.gather(-1, ids)
    rest_t, rest_p = (x.scatter(-1, ids, -torch.inf).logsumexp(-1) for x in (t, p))
    each = (kept_t.exp() * (kept_t - kept_p)).sum(-1)
    if k < t.shape[-1]:
        each = each + rest_t.exp() * (rest_t - rest_p)
    return temperature**2 * each.mean()


def logits_of(rows: int, *, seed: int, dtype: torch.dtype = torch.float64, size: int = 203) -> Tensor:
    return (3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("k", [1, 8, 203])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_the_one_spelt_out_with_its_gradient(k: int, temperature: float) -> None:
    # More than one chunk, and one that is not full.
    student, teacher = logits_of(150, seed=0).view(3, 50, -1).requires_grad_(), logits_of(150, seed=1).view(3, 50, -1)
    found = top_k_kl_divergence(student, teacher, k, temperature=temperature)
    wanted = naive(student, teacher, k, temperature)
    assert found.shape == () and abs(float((found - wanted).detach())) <= 1e-12 * float(wanted.detach())
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12 * gradients[1].abs().max()


def test_the_divergence_is_the_fused_operators() -> None:
    hidden, weight = torch.randn(70, 24), torch.randn(203, 24)
    teacher = logits_of(70, seed=1, dtype=torch.float32)
    signal = signal_of(teacher, 16)
    loss, metrics = linear_topk_divergence(hidden, Head(weight), signal, k=16)
    logits = hidden @ weight.T
    wanted = float(loss / metrics.count)
    for told in (teacher, signal):
        assert abs(float(top_k_kl_divergence(logits, told, 16)) - wanted) <= 1e-6 * wanted


def test_it_is_never_renormalised_and_never_above_the_full_divergence() -> None:
    student, teacher = logits_of(40, seed=0), logits_of(40, seed=1)
    full = float(top_k_kl_divergence(student, teacher, 203))
    values = [float(top_k_kl_divergence(student, teacher, k)) for k in (2, 8, 32, 128)]
    assert values == sorted(values) and 0 < values[0] < values[-1] <= full
    # A student that is right among the kept ids and puts far too little on them: a renormalised loss would be 0.
    ids = teacher.topk(8).indices
    low = teacher.scatter(-1, ids, teacher.gather(-1, ids) - 4)
    assert float(top_k_kl_divergence(low, teacher, 8)) > 0.5
    assert abs(float(top_k_kl_divergence(teacher, teacher, 8))) <= 1e-12


def test_masked_positions_do_not_count() -> None:
    student, teacher = logits_of(30, seed=0).requires_grad_(), logits_of(30, seed=1)
    mask = torch.arange(30) % 3 == 0
    found = top_k_kl_divergence(student, teacher, K, mask=mask)
    assert abs(float((found - naive(student[mask], teacher[mask], K)).detach())) <= 1e-12
    (gradient,) = torch.autograd.grad(found, student)
    assert not gradient[~mask].any() and gradient[mask].abs().sum(-1).min() > 0


def test_ids_that_a_student_does_not_have_are_no_nan() -> None:
    student, teacher = logits_of(9, seed=0), logits_of(9, seed=1)
    student[:, 190:], teacher[:, 190:] = -torch.inf, -torch.inf
    found = top_k_kl_divergence(student.requires_grad_(), teacher, K)
    assert abs(float(found.detach()) - float(naive(student.detach()[:, :190], teacher[:, :190], K))) <= 1e-12
    assert torch.autograd.grad(found, student)[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, t: top_k_kl_divergence(s, t[:4]), r"student_logits are \[6, 203\] and teacher_logits \[4, 203\]"),
        (lambda s, t: top_k_kl_divergence(s, t, mask=torch.zeros(6, dtype=torch.bool)), "no position counts"),
        (lambda s, t: top_k_kl_divergence(s, t, mask=torch.ones(5, dtype=torch.bool)), r"mask is \[5\]"),
        (lambda s, t: top_k_kl_divergence(s, signal_of(t, 4), mask=torch.ones(6, dtype=torch.bool)), "give one of the two"),
        (lambda s, t: top_k_kl_divergence(s, signal_of(t, 4), temperature=2.0), "temperature 2"),
        (lambda s, t: top_k_kl_divergence(s[:, :9], t), "not among the 9"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Tensor, Tensor], Tensor], words: str) -> None:
    with pytest.raises(DataError, match=words):
        call(logits_of(6, seed=0), logits_of(6, seed=1))


# -- the hypernetwork ------------------------------------------------------------------------------------------------------


def test_it_reads_prompts_and_writes_loras_for_both_kinds_of_layer() -> None:
    student = qwen3_next(torch.float32)
    network = hyper(student)
    lora = network(*network.embed(tokens(3, 6)))
    assert isinstance(lora, Adapters) and len(lora) == 3
    wanted = {*AgenticHyperNetwork.ATTENTION_TARGETS, *AgenticHyperNetwork.DELTANET_TARGETS}
    assert {site.module.rsplit(".", 1)[-1] for site in lora.spec.sites} == wanted
    assert {site.layers for site in lora.spec.sites} == {(0, 1, 2), (3,)}
    assert all(not tensor.any() for tensor in lora.B.values()) and all(tensor.any() for tensor in lora.A.values())
    # The student is read, and is no part of it.
    assert not any(parameter is other for parameter in network.parameters() for other in student.parameters())


def test_it_is_the_generator_of_the_recipes() -> None:
    student = qwen3_next(torch.float32)
    network = perturbed(hyper(student))
    options = LoraGeneratorOptions.model_validate(network.options.model_dump())
    generator = Generator(network.spec, options, 32, (1, 6))
    generator.load_state_dict(network.generator.state_dict(), strict=True)
    ids = tokens(2, 6)
    embedded = student.get_input_embeddings()(ids)
    A, B = generator(embedded.unsqueeze(1), torch.ones(2, 1, 6, dtype=torch.bool))
    lora = network(embedded)
    assert all(torch.equal(lora.A[name], A[name]) and torch.equal(lora.B[name], B[name]) for name in A)


def test_padding_of_a_prompt_says_nothing() -> None:
    student = qwen3_next(torch.float64)
    network = perturbed(hyper(student))
    ids = tokens(2, 6)
    longer = torch.cat([ids[:, :4], torch.full((2, 2), -1)], 1)
    short, padded = network(*network.embed(ids[:, :4])), network(*network.embed(longer))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(short.tensors(), padded.tensors(), strict=True))
    other = network(*network.embed(ids))
    assert not torch.allclose(short.B["linear_attn.out_proj"], other.B["linear_attn.out_proj"], atol=1e-4)


def test_it_can_read_a_layers_states() -> None:
    student = qwen3_next(torch.float32)
    network = hyper(student, layer=2)
    states, mask = network.embed(tokens(2, 5))
    assert states.shape == (2, 5, 32) and mask.all()
    assert not torch.allclose(states, student.get_input_embeddings()(tokens(2, 5)))
    # Contextual: the last state changes with the first token.
    changed = tokens(2, 5)
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    assert not torch.allclose(network.embed(changed)[0][:, -1], states[:, -1])


def test_the_plans_transformer_encoder_is_a_choice() -> None:
    network = hyper(qwen3_next(torch.float32), reader={"kind": "transformer", "blocks": 4, "heads": 8})
    assert len(network.generator.reader.read.blocks) == 4  # type: ignore[union-attr]
    assert len(network(*network.embed(tokens(2, 6)))) == 2


def test_targets_that_do_not_exist_are_refused_with_the_fused_one() -> None:
    with pytest.raises(AdapterError, match=r"'linear_q': this family keeps it in the fused `in_proj_qkvz`"):
        hyper(qwen3_next(torch.float32), targets=["q_proj", "linear_q", "linear_k", "linear_v"])


@pytest.mark.parametrize("changes", [{"rank": 0}, {"reader": {"depth": 4}}, {"width": 30, "reader": {"heads": 8}}])
def test_settings_that_a_recipe_refuses_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"AgenticHyperNetwork"):
        hyper(qwen3_next(torch.float32), **changes)


@pytest.mark.parametrize("shape", [(2, 6), (2, 7, 32), (2, 6, 31)])
def test_prompts_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match=r"wanted \[prompts, at most 6 tokens, 32\]"):
        hyper(qwen3_next(torch.float32))(torch.zeros(shape))


# -- injection -------------------------------------------------------------------------------------------------------------


def test_an_untrained_lora_is_the_student_to_the_bit_and_leaves_nothing_behind() -> None:
    student = qwen3_next(torch.float32)
    ids, network = tokens(2, 9), hyper(student)
    before, state = student(input_ids=ids, use_cache=False).logits, state_of(student)
    lora = network(student.get_input_embeddings()(ids[:, :6]))
    assert torch.equal(student_forward_with_lora(student, ids, lora), before)
    forward = student_with_lora(student)
    lora = perturbed(network)(student.get_input_embeddings()(ids[:, :6]))
    assert (forward(ids, lora) - before).abs().max() > 1e-3
    assert torch.equal(student(input_ids=ids, use_cache=False).logits, before) and state_of(student) == state


def test_every_row_has_its_own_lora_and_padding_is_not_seen() -> None:
    student = qwen3_next(torch.float64)
    network = perturbed(hyper(student))
    ids = tokens(3, 9)
    lora = network(*network.embed(tokens(3, 6, seed=3)))
    padded = ids.clone()
    padded[1, 6:] = -1
    found = student_forward_with_lora(student, padded, lora)
    for row, length in enumerate((9, 6, 9)):
        alone = student_forward_with_lora(student, ids[row : row + 1, :length], lora.pick([row]))
        assert (found[row : row + 1, :length] - alone).abs().max() <= 1e-9
    with pytest.raises(AdapterError, match="4 rows cannot be shared out evenly to 3"):
        student_forward_with_lora(student, tokens(4, 9), lora)


def test_one_student_takes_loras_of_several_shapes_one_after_the_other() -> None:
    student = qwen3_next(torch.float32)
    ids = tokens(2, 9)
    first, second = perturbed(hyper(student)), perturbed(hyper(student, targets=["q_proj"]))
    wanted = [student_forward_with_lora(qwen3_next(torch.float32), ids, network(*network.embed(ids[:, :6]))) for network in (first, second)]
    for network, logits in ((first, wanted[0]), (second, wanted[1]), (first, wanted[0])):
        assert torch.equal(student_forward_with_lora(student, ids, network(*network.embed(ids[:, :6]))), logits)
    # What an earlier shape needed is gone.
    assert {len(module._forward_hooks) for module in student.modules() if isinstance(module, torch.nn.Linear)} == {0, 1}


# -- the step --------------------------------------------------------------------------------------------------------------


def written_out(batch: dict[str, Tensor], network: AgenticHyperNetwork, student: Any, teacher: Any, k: int) -> Tensor:
    """The step as the plan writes it, with all logits."""
    lora = network(*network.embed(batch["condition_ids"]))
    student_logits = student_forward_with_lora(student, batch["input_ids"], lora)
    with torch.no_grad():
        teacher_logits = teacher(input_ids=batch["input_ids"].clamp_min(0)).logits
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != IGNORE
    return top_k_kl_divergence(student_logits, teacher_logits, k, mask=mask)


def test_a_step_is_the_written_out_one_and_moves_the_hypernetwork_alone() -> None:
    student, teacher = qwen3_next(torch.float64), build_model({**QWEN3_NEXT, "initializer_range": 0.4}, dtype=torch.float64)
    teacher.set_experts_implementation("eager")
    batch, network = batch_of(), perturbed(hyper(student))
    loss = written_out(batch, network, student, teacher, K)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    states = [state_of(model) for model in (student, teacher)]
    before = [parameter.detach().clone() for parameter in network.parameters()]
    found = train_step(batch, network, student, teacher, torch.optim.SGD(network.parameters(), lr=0.1), k=K, clip=None)
    assert set(found) == {"loss", "agreement", "mass", "tail_gap", "grad_norm", "tokens"}
    assert abs(found["loss"] - float(loss.detach())) <= 1e-9 * found["loss"] and found["tokens"] == int((batch["labels"][:, 1:] != IGNORE).sum())
    for parameter, old, gradient in zip(network.parameters(), before, gradients, strict=True):
        assert torch.allclose(parameter.detach(), old - 0.1 * gradient, rtol=1e-7, atol=1e-12)
    assert [state_of(model) for model in (student, teacher)] == states
    # The student was not even asked to be frozen.
    assert all(parameter.requires_grad and parameter.grad is None for model in (student, teacher) for parameter in model.parameters())


def test_steps_bring_the_divergence_down() -> None:
    student, teacher = qwen3_next(torch.float32), build_model({**QWEN3_NEXT, "initializer_range": 0.4})
    batch, network = batch_of(), hyper(student)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = [train_step(batch, network, student, teacher, optimizer, k=16)["loss"] for _ in range(25)]
    assert losses[0] > 0 and sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_recomputed_layers_have_the_same_step() -> None:
    results = []
    for again in (False, True):
        student, teacher = qwen3_next(torch.float32).train(), build_model(QWEN3_NEXT)
        if again:
            for layer in layer_list(student):
                recompute(layer)
        network = perturbed(hyper(student))
        train_step(batch_of(), network, student, teacher, torch.optim.SGD(network.parameters(), lr=0.1), k=K)
        results.append([parameter.detach() for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_teacher_may_be_a_signal() -> None:
    student, teacher = qwen3_next(torch.float32), build_model(QWEN3_NEXT)
    batch, losses = batch_of(), []

    def stored(ids: Tensor) -> TopKSignal:
        mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
        mask[:, :-1] = batch["labels"][:, 1:] != IGNORE
        return signal_of(teacher(input_ids=ids).logits, 16, mask)

    for one in (teacher, lambda ids: teacher(input_ids=ids).logits, stored):
        network = perturbed(hyper(student))
        losses.append(train_step(batch, network, student, one, torch.optim.SGD(network.parameters(), lr=0.1), k=K)["loss"])
    assert losses[0] == losses[1] == losses[2]
    network = hyper(student)
    with pytest.raises(DataError, match="teacher: 33 rows in its signal"):
        train_step(batch, network, student, lambda ids: signal_of(teacher(input_ids=ids).logits[:, 1:], K), torch.optim.SGD(network.parameters(), lr=1))


def test_without_conditions_the_first_tokens_are_read_and_equal_ones_are_warned_of() -> None:
    student = qwen3_next(torch.float32)
    network = perturbed(hyper(student))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    batch = batch_of()
    plain = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    told = {**plain, "condition_ids": batch["input_ids"][:, :6]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = [train_step(one, network, student, student, optimizer, k=K)["loss"] for one in (plain, told)]
    assert losses[0] == losses[1]
    same = {"input_ids": torch.cat([tokens(1, 6).expand(3, -1), tokens(3, 6, seed=1)], 1)}
    with pytest.warns(UserWarning, match=r"the first 6 tokens are the same in all 3 rows .*batch\['condition_ids'\]"):
        train_step(same, network, student, student, optimizer, k=K)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda b: {"ids": b["input_ids"]}, DataError, "no `input_ids`; found ids"),
        (lambda b: {**b, "labels": torch.full_like(b["labels"], IGNORE)}, DataError, "no token is a target"),
        (lambda b: {**b, "labels": b["labels"].roll(-1, 1)}, DataError, "labels are not shifted"),
        (lambda b: {**b, "labels": b["labels"][:, 1:]}, DataError, r"input_ids are \[3, 12\] and labels \[3, 11\]"),
        (lambda b: {"input_ids": b["input_ids"].flip(1)}, DataError, "tokens behind -1"),
        (lambda b: {**b, "condition_ids": b["condition_ids"][:2]}, DataError, r"\[2, 6\] for 3 rows"),
    ],
)
def test_a_batch_that_means_something_else_is_refused(change: Any, error: type[LimbeckError], words: str) -> None:
    student = qwen3_next(torch.float32)
    network = hyper(student)
    with pytest.raises(error, match=words):
        train_step(change(batch_of()), network, student, student, torch.optim.SGD(network.parameters(), lr=0.1), k=K)


def test_an_optimiser_of_the_student_and_a_gradient_that_is_not_finite_are_refused() -> None:
    student = qwen3_next(torch.float32)
    network = perturbed(hyper(student))
    with pytest.raises(RunError, match="the student is frozen"):
        train_step(batch_of(), network, student, student, torch.optim.SGD(student.parameters(), lr=0.1), k=K)
    before = state_of(network)
    with torch.no_grad():
        student.get_input_embeddings().weight[int(batch_of()["input_ids"][0, 0])] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        train_step(batch_of(), network, student, qwen3_next(torch.float32), torch.optim.SGD(network.parameters(), lr=0.1), k=K)
    assert state_of(network) == before


# -- configurations and data -----------------------------------------------------------------------------------------------


def test_the_teachers_configuration_is_the_launch_options() -> None:
    options = teacher_options()
    assert options.launch is not None
    assert (options.launch.tensor_parallel, options.launch.expert_parallel, options.launch.quantisation) == (8, True, "fp8")
    assert (options.launch.gpu_memory, options.launch.max_logprobs, options.launch.devices) == (0.9, 128, tuple(range(8)))
    seed = {"model", "quantization", "tensor_parallel_size", "gpu_memory_utilization", "devices"}
    assert seed <= set(agentic.TEACHER_CONFIG) and set(agentic.STUDENT_CONFIG) == {"model", "dtype", "devices", "fsdp"}
    # What the sizes demand: 482 GB in FP8; heads and experts that eight GPUs can share out, and an expert's width that they cannot.
    assert 0.9 * 141 * len(agentic.TEACHER_CONFIG["devices"]) > 482 and (2560 // 8) % 128 != 0 and 160 % 8 == 96 % 8 == 0
    with pytest.raises(TeacherError, match="tensor_parallel: there is no such key, did you mean 'tensor_parallel_size'"):
        teacher_options({**agentic.TEACHER_CONFIG, "tensor_parallel": 4})
    with pytest.raises(TeacherError, match="there is none"):
        teacher_options({"devices": [0]})
    with pytest.raises(RecipeError, match=r"TEACHER_CONFIG\.gpu_memory"):
        teacher_options({**agentic.TEACHER_CONFIG, "gpu_memory_utilization": 1.5})


def test_every_public_name_is_there_and_the_command_line_does_not_load_the_package() -> None:
    assert all(hasattr(agentic, name) for name in agentic.__all__)
    code = "import sys, limbeck.cli.app; sys.exit(any(m.startswith(('limbeck.agentic', 'torch')) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def a_row(number: int, **changes: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "run", "arguments": json.dumps({"command": f"ls {number}"})}}
    messages = [
        {"role": "system", "content": "You mend code."},
        {"role": "user", "content": f"Function number {number} returns {number + 1}."},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "a.py", "name": "run", "tool_call_id": "1"},
        {"role": "assistant", "content": f"Done with {number}."},
    ]
    names = {"instance_id": f"own__repo{number % 3}-{number}", "repo": f"own/repo{number % 3}", "trajectory_id": str(number)}
    return {**names, "trajectory": messages, "tools": [], "resolved": 1, "exit_status": "submit", "model_patch": "diff", **changes}


def test_trajectories_become_batches_of_a_step(tmp_path: Path) -> None:
    from datasets import Dataset

    from limbeck.config.parts.stages import TrainTokenizer
    from limbeck.data.tokenizer import train_tokenizer

    rows = [*(a_row(n) for n in range(6)), a_row(6, resolved=0), a_row(7, exit_status="max_turns")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    text = [m["content"] for row in rows for m in row["trajectory"]]
    train_tokenizer(text, TrainTokenizer(vocabulary=300, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")), tmp_path / "tokenizer")
    made = agentic.load_trajectories(
        tmp_path / "windows", tmp_path / "rows.jsonl", tokenizer=tmp_path / "tokenizer", template=str(tmp_path / "template.jinja"), sequence=256
    )
    assert len(made) == 6 and json.loads((tmp_path / "windows" / "report.json").read_text())["dropped"] == {"not resolved": 1, "exit status": 1}
    windows = Dataset.from_file(str(tmp_path / "windows" / "windows.arrow"))
    student = build_model({**QWEN3_NEXT, "vocab_size": 300})
    network = hyper(student, tokens=64)

    def padded(name: str, fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in windows[:3][name]], batch_first=True, padding_value=fill)

    batch = {"input_ids": padded("input_ids", -1), "labels": padded("labels", IGNORE), "condition_ids": padded("condition_ids", -1)}
    found = train_step(batch, network, student, build_model({**QWEN3_NEXT, "vocab_size": 300}), torch.optim.SGD(network.parameters(), lr=0.1), k=16)
    assert found["tokens"] == int((batch["labels"] != IGNORE).sum())
    with pytest.raises(RecipeError, match=r"polcy"):
        agentic.load_trajectories(tmp_path / "no", tmp_path / "rows.jsonl", tokenizer=tmp_path / "tokenizer", polcy="head")
    assert not (tmp_path / "no").exists()
