"""The servers of `limbeck serve` and `limbeck teach`: a model, loaded, behind an address that is bound before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import LimbeckError, RunError
from limbeck.packages import need

if TYPE_CHECKING:
    from limbeck.serve.process import Served

SERVE_KEY, TEACH_TOKEN = "LIMBECK_API_KEY", "LIMBECK_TEACH_TOKEN"
_CUT = 10.0
"""Seconds beyond the grace time for cut answers to say so."""


def serving(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    name: str | None = None,
    api_key_env: str = SERVE_KEY,
    context: int | None = None,
    parallel: int = 4,
    queue: int = 64,
    max_tokens: int | None = None,
    max_body: int = 2**20,
    threads: int | None = None,
    numa_aware: bool = False,
    chat_template: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    adapters: int = 16,
    grace: float = 30,
    log_every: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Served:
    """A model behind OpenAI's API, loaded and ready to listen.  The options are those of ``limbeck serve``.

    ``model`` is a GGUF file, a stage (``RUN/STAGE``), a model folder, ``builtin:NAME`` or a hub name; ``port`` 0 takes a free one.
    ``with limbeck.serving("model.gguf") as server: ...`` serves in a thread at ``server.url``; ``forever()`` serves until Ctrl-C.

    Raises:
        LimbeckError: a package, the address, the key, the model or an option that cannot be used.
    """
    need("`limbeck serve`", "serve", "starlette", "uvicorn", "zstandard")
    from limbeck.serve.gate import check_token
    from limbeck.serve.process import Served, bind, refuse_strangers

    token = check_token(os.environ.get(api_key_env), api_key_env)
    if token is None and api_key_env != SERVE_KEY:
        raise LimbeckError(
            f"--api-key-env {api_key_env}: is not set: put the key there, or leave the option out to serve without one"
        )
    template = None
    if chat_template is not None:
        from limbeck.serve.openai.templates import read_template

        template = read_template(chat_template)
    sock = bind(host, port)
    refuse_strangers(sock, token, api_key_env)
    try:
        if model.endswith(".gguf") or Path(model).is_file():
            _refuse(dtype=dtype != "float32", device=device is not None, revision=revision is not None)
            backend = _gguf(
                Path(model), name=name, context=context, parallel=parallel, threads=threads, numa=numa_aware, template=template
            )
        else:
            if numa_aware:
                raise LimbeckError(
                    f"--numa-aware: is for GGUF files, and {model} is none: leave it out, or export the model with --to gguf"
                )
            backend = _folder(
                model,
                name,
                context=context,
                threads=threads,
                dtype=dtype,
                device=device,
                revision=revision,
                adapters=adapters,
                template=template,
            )
        from limbeck.serve.openai.app import OpenAiService

        service = OpenAiService(
            backend, vocabulary=backend.vocabulary, parallel=parallel, queue=queue, max_tokens=max_tokens, max_body=max_body, grace=grace, token=token,
            log_every=log_every, say=say,
        )  # fmt: skip
    except BaseException:
        sock.close()
        raise
    say(f"{backend.name}, context {backend.context}, {parallel} answers at once, {queue} requests at most")
    return Served(service.app, sock, name=backend.name, stopping=service.stop, release=backend.close, grace=grace + _CUT)


def teaching(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    dtype: str = "float32",
    device: str | None = None,
    attention: str | None = None,
    revision: str | None = None,
    max_top_k: int = 1024,
    max_tokens: int = 16_384,
    max_values: int = 4_000_000,
    queue: int = 64,
    threads: int | None = None,
    grace: float = 30,
    log_every: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Served:
    """A model whose top-k logits and partition sums others may ask for, loaded and ready to listen.  The options are those of ``limbeck teach``.

    ``with limbeck.teaching("builtin:code-2m") as server:`` serves in a thread; a recipe's ``teacher: {kind: http, url: ...}`` takes ``server.url``.

    Raises:
        LimbeckError: a package, the address, the token, the model or an option that cannot be used.
    """
    need("`limbeck teach`", "serve", "starlette", "uvicorn", "zstandard")
    from limbeck.serve.gate import check_token
    from limbeck.serve.process import Served, bind, refuse_strangers

    token = check_token(os.environ.get(TEACH_TOKEN), TEACH_TOKEN)
    sock = bind(host, port)
    refuse_strangers(sock, token, TEACH_TOKEN)
    try:
        import torch

        from limbeck.models.loading import resolve_source
        from limbeck.serve.teacher import TeacherService, model_name
        from limbeck.stages.folder import model_of
        from limbeck.teachers.scoring import Scorer

        if threads is not None:
            torch.set_num_threads(threads)
        folder = model_of(Path(model))
        source = resolve_source(model if folder == Path(model) else str(folder))
        scorer = Scorer(source, dtype=dtype, attention=attention, revision=revision)
        scorer.load(device_of(device))
        name = model if model.startswith("builtin:") else model_name(source)
        service = TeacherService(
            scorer,
            name,
            max_top_k=max_top_k,
            max_tokens=max_tokens,
            max_values=max_values,
            queue=queue,
            token=token,
            log_every=log_every,
            say=say,
        )
    except BaseException:
        sock.close()
        raise
    say(f"{name} in {dtype} on {scorer.model.device}, vocabulary {service.vocabulary}, digest {service.digest}")
    return Served(service.app, sock, name=name, stopping=service.worker.close, release=service.worker.join, grace=grace)


def device_of(name: str | None) -> str:
    """A device that can be used here: a GPU by default if there is one.  Raises :class:`~limbeck.errors.RunError`."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name)
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"--device {name}: cannot be used here ({str(error).splitlines()[0]}): take cpu, or a GPU that `limbeck doctor` lists"
        ) from error
    return str(kind)


def _refuse(**given: bool) -> None:
    for option, there in given.items():
        if there:
            raise LimbeckError(f"--{option}: is for model folders, and a GGUF file has it in itself: leave it out")


def _gguf(path: Path, **options: Any) -> Any:
    from limbeck.serve.openai.llama import LlamaBackend

    return LlamaBackend(path, **options)


def _folder(
    source: str, name: str | None, *, context: int | None, threads: int | None, dtype: str, device: str | None, revision: str | None, adapters: int,
    template: str | None,
) -> Any:  # fmt: skip
    import torch

    from limbeck.serve.openai.transformers import TransformersBackend
    from limbeck.serve.teacher import model_name
    from limbeck.stages.serving import open_speaker

    if revision is not None and (source.startswith("builtin:") or Path(source).exists()):
        raise LimbeckError(f"--revision: is for hub models, and {source} is a folder here: leave it out")
    if threads is not None:
        torch.set_num_threads(threads)
    speaker = open_speaker(source, dtype=dtype, device=device_of(device), revision=revision)
    if template is not None:
        speaker.tokenizer.chat_template = template
    folder = Path(source) / "model"
    served = source if source.startswith("builtin:") else model_name(str(folder) if folder.is_dir() else source)
    return TransformersBackend(speaker, name or served, context=context, adapters=adapters)
