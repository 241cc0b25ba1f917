"""``limbeck serve``: a model behind OpenAI's API."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from limbeck.errors import LimbeckError

KEY = "LIMBECK_API_KEY"
CLOSING = 10.0
"""Seconds beyond the grace time for cut answers to say so."""


def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="FILE.gguf, RUN/STAGE, a model folder, builtin:NAME, or a hub name.", show_default=False)
    ] = None,
    model_option: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.", show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine (with a token).")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What the model is called in requests; by default as its file.", show_default=False)] = None,
    api_key_env: Annotated[str, typer.Option(metavar="NAME", help="Environment variable with the key that requests must carry.")] = KEY,
    context: Annotated[
        int | None, typer.Option(min=16, help="Tokens of a prompt and its answer; by default the model's (GGUF: at most 4096).", show_default=False)
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 4,
    queue: Annotated[int, typer.Option(min=1, help="Most requests under way; one more is told to come again (429).")] = 64,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer; by default the context.", show_default=False)] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")] = 2**20,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads of the model.", show_default=False)] = None,
    numa_aware: Annotated[bool, typer.Option("--numa-aware", help="Spread a GGUF model over the machine's NUMA nodes.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or `plain` (one paragraph a turn), instead of the model's own; base models have none.", show_default=False)
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of a folder's weights.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Of a folder's model; by default a GPU if there is one.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or branch of a hub model.", show_default=False)] = None,
    adapters: Annotated[int, typer.Option(min=1, help="Conversations whose LoRA a generator's run keeps.")] = 16,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for what runs when the server is told to stop.")] = 30,
    log_every: Annotated[int, typer.Option(min=0, help="One line on stderr after so many requests; 0 for none.")] = 0,
) -> None:
    """Serve a model to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models.

    \b
    limbeck serve model.gguf --port 8000 --numa-aware
    limbeck serve runs/lora-generator/generate --port 0
    LIMBECK_API_KEY=secret limbeck serve Qwen/Qwen3-0.6B --host 0.0.0.0 --dtype bfloat16
    curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{"messages": [{"role": "user", "content": "Is 7 a prime?"}], "max_tokens": 500, "temperature": 0.7}'

    A GGUF file is run by llama.cpp, a folder by transformers.  Of a LoRA generator's run the conversation's first user turn makes the
    LoRA.  The one line on stdout says where it listens.  SIGTERM and Ctrl-C end it when what runs is answered, or cut after --grace
    seconds, with exit code 0.
    """
    absent = [package for package in ("starlette", "uvicorn", "zstandard") if find_spec(package) is None]
    if absent:
        raise LimbeckError(f"`limbeck serve` needs {', '.join(absent)}: pip install 'limbeck[serve]'")
    if (model is None) == (model_option is None):
        raise LimbeckError("limbeck serve: name one model, as in `limbeck serve model.gguf` (or --model model.gguf)")
    source = model or model_option
    assert source is not None
    from limbeck.serve.gate import check_token
    from limbeck.serve.process import bind, refuse_strangers, run, url_of

    token = check_token(os.environ.get(api_key_env), api_key_env)
    if token is None and api_key_env != KEY:
        raise LimbeckError(f"--api-key-env {api_key_env}: is not set: put the key there, or leave the option out to serve without one")
    template = None
    if chat_template is not None:
        from limbeck.serve.openai.templates import read_template

        template = read_template(chat_template)
    sock = bind(host, port)
    refuse_strangers(sock, token, api_key_env)
    if source.endswith(".gguf") or Path(source).is_file():
        _refuse(dtype=dtype != "float32", device=device is not None, revision=revision is not None)
        backend = _gguf(Path(source), name=name, context=context, parallel=parallel, threads=threads, numa=numa_aware, template=template)
    else:
        if numa_aware:
            raise LimbeckError(f"--numa-aware: is for GGUF files, and {source} is none: leave it out, or export the model with --to gguf")
        backend = _folder(source, name, context=context, threads=threads, dtype=dtype, device=device, revision=revision, adapters=adapters, template=template)
    from limbeck.serve.openai.app import OpenAiService

    service = OpenAiService(
        backend, vocabulary=backend.vocabulary, parallel=parallel, queue=queue, max_tokens=max_tokens, max_body=max_body, grace=grace, token=token,
        log_every=log_every, say=lambda line: typer.echo(f"limbeck serve: {line}", err=True),
    )  # fmt: skip
    typer.echo(f"limbeck serve: {backend.name}, context {backend.context}, {parallel} answers at once, {queue} requests at most", err=True)

    def announce() -> None:
        print(f"limbeck serve: {url_of(sock)}", flush=True)

    run(service.app, sock, announce=announce, stopping=service.stop, grace=grace + CLOSING)
    if not backend.close(1):
        # What outlasts the grace time has nobody to answer any more, and Python's own end would crash or wait under it.
        os._exit(0)


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

    from limbeck.cli.teach import device_of
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
