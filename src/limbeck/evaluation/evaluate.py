"""All measures of several models on the same rows, in one dict that a report can be made from.

{"student": "distil", "teacher": "teacher", "setting": {...},
 "summary":    {"ce", "ce_gap", "kl", "agreement", "recall", "cache_ratio", "speed_ratio", ...} of the student
 "models":     {name: {"parameters", "model_type", "layers": ["softmax", "gated_deltanet", ...]}},
 "perplexity": {name: {"ce", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes"}},
 "divergence": {name: {"kl", "agreement", "ce_gap", "tokens"}},           every model but the teacher
 "recall":     {name: [{"task", "distance", "accuracy", "ce", "count", "length"}]},
 "cache":      {name: [{"context", "bytes", "kv", "state"}]},
 "speed":      {name: [{"context", "tokens_per_second", "seconds", "count"}]},
 "samples":    [{"prompt", "continuations": {name: text}}]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.config.parts.stages import EvaluateStageOptions
from limbeck.data.dataset import TokenRows
from limbeck.data.tokenizer import ordinary_ids
from limbeck.engine.console import Counter, Counting
from limbeck.engine.parallel import World
from limbeck.errors import DataError, ModelError
from limbeck.evaluation.decode import evaluating
from limbeck.evaluation.divergence import DivergenceTally
from limbeck.evaluation.perplexity import CrossEntropyTally, label_bytes, whole_documents
from limbeck.evaluation.recall import TOKENS_A_FORWARD, recall
from limbeck.evaluation.samples import default_prompts, samples
from limbeck.evaluation.speed import attention_kinds, cache_bytes, decode_rates
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed, leak_probe
from limbeck.types import IGNORE, Batch


def evaluate_models(
    models: Mapping[str, PreTrainedModel],
    rows: TokenRows,
    options: EvaluateStageOptions,
    tokenizer: PreTrainedTokenizerBase,
    teacher_name: str | None,
    *,
    progress: Callable[[str], None] = lambda line: None,
    counting: Counting | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Measure models beside each other; what the options leave out is absent from the result.

    Of several ranks, each with the models, every one runs its share of the rows and probes; rates and samples are the first one's, and what
    the others return lacks them.

    The student is the model named ``options.from_``, else the last one.  Load bfloat16 models with ``dtype=``: one loaded in
    float32 runs under autocast, right but slow.  Models are measured from the same rows, probes, prompts and draws, and decode
    in turns; no global random state moves.  ``progress`` gets one line before each measure, and ``counting`` shows how far the long ones are (by default lines
    through ``progress``).

    Raises:
        ModelError: ``teacher_name`` is not among the models.
        DataError: no held-out rows.
    """
    if teacher_name is not None and teacher_name not in models:
        raise ModelError(f"the teacher {teacher_name!r} is not among the models to evaluate: {', '.join(models)}")
    if not len(rows):
        raise DataError("there are no held-out rows to evaluate on: set data.held_out above 0, or give the stage other data")
    device = next(iter(models.values())).device
    world = world or World(device)
    counting = counting or (lambda unit, total: Counter(progress, None, "evaluate", unit=unit, total=total))
    results: dict[str, Any] = {
        "student": options.from_ if options.from_ in models else list(models)[-1],
        "teacher": teacher_name,
        "setting": _setting(rows, options, device),
        "models": {name: describe(model) for name, model in models.items()},
    }
    for model in models.values():
        # Probed in its own dtype: under autocast the probe's tolerance would not mean what it says.
        leak_probe(model)
    with evaluating(models), _precision(models, options.precision, device):
        progress(f"  text: {results['setting']['rows']} held-out rows of {rows.sequence} tokens, {', '.join(models)}")
        with counting("rows", min(options.rows, len(rows))) as counter:
            results |= _text_measures(models, rows, options.rows, tokenizer, teacher_name, world, counter.add)
        if options.recall is not None:
            progress(f"  recall: {', '.join(options.recall.tasks)} at {', '.join(map(str, options.recall.distances))} tokens")
            ids = ordinary_ids(tokenizer)
            probes = len(models) * len(options.recall.tasks) * len(options.recall.distances) * options.recall.rows
            with counting("probes", probes) as counter:
                results["recall"] = {
                    name: recall(model, options.recall, ids, seed=options.seed, world=world, done=counter.add) for name, model in models.items()
                }
        if options.speed is not None and world.rank == 0:
            contexts = options.speed.contexts
            progress(f"  decode rate and cache: {options.speed.tokens} tokens at {', '.join(map(str, contexts))}")
            results["cache"] = {name: [cache_bytes(model, context) for context in contexts] for name, model in models.items()}
            results["speed"] = decode_rates(models, contexts, tokens=options.speed.tokens, seed=options.seed)
        if options.samples is not None and world.rank == 0:
            prompts = list(options.samples.prompts) or default_prompts(rows, tokenizer)
            progress(f"  samples: {options.samples.tokens} tokens after {len(prompts)} prompts")
            results["samples"] = samples(models, tokenizer, prompts, options.samples, seed=options.seed)
    results["summary"] = summary(results)
    return results


def summary(results: dict[str, Any]) -> dict[str, float]:
    """The student in a few scalars: what a grid's table shows.  Ratios are to the teacher at the longest context measured."""
    student, teacher = results["student"], results["teacher"]
    numbers = {key: value for key, value in results["perplexity"][student].items() if key not in ("tokens", "bytes")}
    numbers |= {key: value for key, value in results["divergence"].get(student, {}).items() if key != "tokens"}
    if "recall" in results:
        found = [entry["accuracy"] for entry in results["recall"][student]]
        numbers["recall"] = sum(found) / len(found)
    if "cache" in results and teacher is not None:
        for measure, key in (("cache", "bytes"), ("speed", "tokens_per_second")):
            ours, theirs = (max(results[measure][name], key=lambda entry: entry["context"])[key] for name in (student, teacher))
            numbers[f"{measure}_ratio"] = ours / theirs
    return numbers


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Size, family and what each decoder layer's attention is (see :func:`attention_kinds`)."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    base = getattr(model.config, "limbeck", None) or {}
    family = base.get("base", {}).get("model_type", model.config.model_type)
    return {"parameters": parameters, "model_type": family, "layers": attention_kinds(model)}


def held_out_batches(rows: TokenRows, count: int, ranks: int = 1) -> Iterator[Batch]:
    """``count`` rows, evenly spaced, a few at a time; so few that every rank gets some."""
    count = min(count, len(rows))
    chosen = [number * len(rows) // count for number in range(count)]
    each = max(1, min(TOKENS_A_FORWARD // rows.sequence, -(-count // ranks)))
    for start in range(0, count, each):
        yield rows.batch(chosen[start : start + each])


def text_batches(rows: TokenRows, count: int, ranks: int = 1) -> Iterator[Batch]:
    """Those rows with the labels of text alone; where no document is labelled throughout (answers of chats), with all labels."""
    has_text = any(bool((whole_documents(batch) & batch.label_mask_BT).any()) for batch in held_out_batches(rows, count))
    for batch in held_out_batches(rows, count, ranks):
        yield replace(batch, labels_BT=batch.labels_BT.where(whole_documents(batch), IGNORE)) if has_text else batch


@torch.no_grad()
def _text_measures(
    models: Mapping[str, PreTrainedModel],
    rows: TokenRows,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    teacher_name: str | None,
    world: World,
    done: Callable[[int], object],
) -> dict[str, Any]:
    """Cross-entropy and divergence from one forward pass of each model a batch, the teacher's first."""
    entropy = {name: CrossEntropyTally() for name in models}
    divergence = {name: DivergenceTally() for name in models if teacher_name is not None and name != teacher_name}
    order = sorted(models, key=lambda name: name != teacher_name)
    num_bytes = 0
    for batch in islice(text_batches(rows, count, world.size), world.rank, None, world.size):
        num_bytes += label_bytes(batch, tokenizer)
        batch = batch.to(models[order[0]].device)
        teacher = None
        for name in order:
            hidden_BTD, head = forward_packed(models[name], batch), head_of(models[name])
            entropy[name].add(hidden_BTD, head, batch.labels_BT)
            if name == teacher_name:
                teacher = hidden_BTD, head
            elif teacher is not None:
                divergence[name].add(hidden_BTD, head, *teacher, batch.label_mask_BT)
        done(len(batch.input_ids_BT) * world.size)
    num_bytes = int(world.sum(torch.tensor(num_bytes)))
    perplexities = {name: tally.over(world).result(num_bytes) for name, tally in entropy.items()}
    divergences = {
        name: tally.over(world).result() | {"ce_gap": perplexities[name]["ce"] - perplexities[str(teacher_name)]["ce"]}
        for name, tally in divergence.items()
    }
    return {"perplexity": perplexities, "divergence": divergences}


def _precision(models: Mapping[str, PreTrainedModel], precision: str, device: torch.device) -> Any:
    dtype = getattr(torch, precision)
    if dtype == torch.float32 or all(model.dtype == dtype for model in models.values()):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _setting(rows: TokenRows, options: EvaluateStageOptions, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "rows": min(options.rows, len(rows)),
        "sequence": rows.sequence,
        "precision": options.precision,
        "cache_dtype_bytes": 2,
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "seed": options.seed,
        "samples": options.samples.model_dump(mode="json") if options.samples else None,
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
