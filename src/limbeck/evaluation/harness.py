"""lm-evaluation-harness on a model that is loaded already: one ``LM``, which is the harness's own for transformers.

Everything that makes a number comparable (how text is cut into requests, windows, stops, what a metric is) stays the harness's;
here is only what a student needs: the state that it computes in, no cache where nothing is generated, and a softmax in float32.
Imports ``lm_eval``: nothing else of this room does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor

from limbeck.errors import RunError, did_you_mean

Acting = Callable[[], AbstractContextManager]
Say = Callable[[Any], None]
YAML = (".yaml", ".yml")


class LoadedLM(HFLM):
    """The harness's model class around a loaded model.

    ``acting`` is entered for every forward pass (a generated LoRA acts in it).  Inputs are padded on the right, where a causal model
    does not look, for loglikelihoods, and on the left with a mask for generation: a student's own forward hands that to its mixers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, acting: Acting = nullcontext, batch_size: int | str = 8, max_length: int | None = None
    ):
        self._acting = acting
        with _only_errors():
            super().__init__(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length, softmax_dtype="float32"
            )
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise RunError(
                "the tokenizer has no token that begins or ends a text, and the harness needs one to score a text from its first token: "
                "name `bos_token` or `eos_token` in its tokenizer_config.json"
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise RunError("the tokenizer has no end-of-text token, which tasks that generate need: name `eos_token` in its tokenizer_config.json")
        return self.tokenizer.eos_token_id

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad(), self._acting():
            return self.model(inps, use_cache=False).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with torch.no_grad(), self._acting():
            return super()._model_generate(context, max_length, stop, **options)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        # Requests of one input share a pass.  Where they cut it at different places, the harness (0.4.13) scores the shorter ones on the
        # rows of the longest: no pass is shared then.
        lengths: dict[tuple[int, ...], int] = {}
        for _, context, continuation in requests:
            lengths.setdefault((*context, *continuation[:-1]), len(continuation))
        self.logits_cache = all(lengths[*context, *continuation[:-1]] == len(continuation) for _, context, continuation in requests)
        return super()._loglikelihood_tokens(requests, *args, **options)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Loglikelihood of each whole text, in the harness's windows; all windows together, so that they are batched by length."""
        windows, owners = [], []
        for row, request in enumerate(requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(utils.make_disjoint_window, found):
                windows.append((None, context, continuation))
                owners.append(row)
        sums = [0.0] * len(requests)
        for row, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True):
            sums[row] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums


class Tasks:
    """Tasks of the harness by name, glob or file (``*.yaml``); ``include`` are folders with more of them.

    Raises:
        RunError: a name that nothing has, or a task that cannot be built (its data are not here, say).
    """

    def __init__(self, names: Sequence[str], include: Sequence[Path] = ()):
        for folder in include:
            if not folder.is_dir():
                raise RunError(f"--include-path {folder}: no such folder: name one that has the tasks' YAML files")
        options: dict[str, Any] = {"include_path": [str(folder.resolve()) for folder in include] or None}
        files, wanted = _files(names)
        # The harness's own are some fifteen thousand files: read when ours do not do, by themselves or in what their groups name.
        for complete in (False, True):
            self.manager = TaskManager(include_defaults=complete, **options)
            matches = {name: self.manager.match_tasks([name]) for name in wanted}
            unknown = [name for name, found in matches.items() if not found]
            if unknown and complete:
                near = did_you_mean(unknown[0], self.manager.all_tasks) or "; `limbeck lm_eval ls tasks` lists them"
                raise RunError(f"--tasks {unknown[0]}: neither a task of the harness nor a *.yaml file{near}")
            self.specs = [*files, *dict.fromkeys(match for found in matches.values() for match in found)]
            if unknown:
                continue
            try:
                self.built: dict[str, Any] = self.manager.load(self.specs)["tasks"]
                return
            except Exception as error:
                # Data sets, YAML and the tasks' own code raise whatever they like.
                if complete:
                    raise self._cannot_build(error) from error

    def _cannot_build(self, error: Exception) -> RunError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return RunError(
            f"--tasks {','.join(self.specs)}: cannot be built ({type(error).__name__}: {lines[0][:300]}): a task names its data, which must be here "
            "or on the hub, and fields that they have; a group is named by its name, with --include-path for its folder"
        )

    def check(self, lm: LoadedLM) -> None:
        """Refuse what would fail after hours: answers as long as the model."""
        for name, task in self.built.items():
            if task.get_config("output_type") != "generate_until":
                continue
            wanted = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, lm.max_gen_toks)["max_gen_toks"]
            if wanted >= lm.max_length:
                raise RunError(
                    f"--tasks {name}: generates up to {wanted} tokens, and the model reads {lm.max_length} with them: "
                    "set `generation_kwargs: {max_gen_toks: N}` in the task to less"
                )


def _files(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Task files as absolute paths, and the other names."""
    files: list[str] = []
    for name in names:
        if not name.endswith(YAML):
            continue
        found = sorted(glob(str(Path(name).expanduser().absolute())))
        if not found:
            raise RunError(f"--tasks {name}: no such file")
        files += found
    return list(dict.fromkeys(files)), [name for name in names if not name.endswith(YAML)]


def run_tasks(
    lm: LoadedLM, tasks: Tasks, *, fewshot: int | None = None, limit: int | float | None = None, chat: bool = False
) -> dict[str, dict[str, Any]]:
    """Measure one model; by task ``{"version", "fewshot", "documents", "group", "metrics": {"acc,none": {"value", "stderr", "better"}}}``.

    ``limit`` is a number of documents, or a share below 1.  ``chat`` puts requests into the tokenizer's chat template.
    """
    if chat and getattr(lm.tokenizer, "chat_template", None) is None:
        raise RunError("--apply-chat-template: the tokenizer has no chat template: leave it out, or put chat_template.jinja into the model's folder")
    tasks.check(lm)
    try:
        # The harness prints a line or two of its own.
        with redirect_stdout(sys.stderr):
            found: Any = simple_evaluate(
                model=lm, tasks=tasks.specs, task_manager=tasks.manager, num_fewshot=fewshot, limit=limit, batch_size=lm.batch_size,
                apply_chat_template=chat, fewshot_as_multiturn=chat, log_samples=False,
            )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise RunError(f"--batch-size {lm.batch_size}: is more than memory holds: give less, or `auto`") from error
    except ModuleNotFoundError as error:
        raise RunError(f"--tasks: one of them needs the package {error.name}, which is not installed: pip install {error.name}") from error
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise RunError(
            f"--tasks: {error}: such a task runs what a model writes; `limbeck lm_eval --confirm_run_unsafe_code` does, on a machine you can lose"
        ) from error
    return {name: _entry(found, name) for name in {**found["results"], **found.get("groups", {})}}


def harness_version() -> str:
    """Of the package."""
    return version("lm_eval")


def _entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    values, better = {**found["results"].get(name, {}), **found.get("groups", {}).get(name, {})}, found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in values.items():
        metric, _, way = key.partition(",")
        if not way or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{way}")
        metrics[key] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None, "better": _sign(better.get(metric))}
    documents = found.get("n-samples", {}).get(name, {}).get("effective")
    return {
        "version": found["versions"].get(name), "fewshot": found["n-shot"].get(name), "documents": documents, "group": name in found.get("groups", {}),
        "metrics": metrics,
    }  # fmt: skip


def _sign(higher_is_better: bool | None) -> int:
    return 0 if higher_is_better is None else 1 if higher_is_better else -1


@contextmanager
def _only_errors() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def spoken(say: Say) -> Iterator[None]:
    """Within: each kind of warning of the harness once (it repeats one for every request)."""
    logger, seen = logging.getLogger("lm_eval"), set()

    class Once(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            place = (record.pathname, record.lineno)
            # What a task leaves to the harness's defaults is meant so.
            if place not in seen and "using default" not in record.getMessage():
                seen.add(place)
                say(f"  lm_eval: {record.getMessage()}")

    handler, before = Once(logging.WARNING), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
