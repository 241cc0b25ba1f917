"""``limbeck serve``: a model behind OpenAI's API."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from limbeck import api
from limbeck.errors import LimbeckError

KEY = "LIMBECK_API_KEY"


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
    """Serve a model to OpenAI's clients.

    \b
    limbeck serve model.gguf --port 8000 --numa-aware
    limbeck serve runs/lora_generator/generate --port 0
    LIMBECK_API_KEY=secret limbeck serve Qwen/Qwen3-0.6B --host 0.0.0.0 --dtype bfloat16
    curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{"messages": [{"role": "user", "content": "Is 7 a prime?"}], "max_tokens": 500, "temperature": 0.7}'

    It answers /v1/chat/completions, /v1/completions and /v1/models.  A GGUF file is run by llama.cpp, a folder by transformers.  Of a LoRA
    generator's run the conversation's first user turn makes the LoRA.  The one line on stdout says where it listens.  SIGTERM and Ctrl-C end
    it when what runs is answered, or cut after --grace seconds, with exit code 0.
    """
    if (model is None) == (model_option is None):
        raise LimbeckError("limbeck serve: name one model, as in `limbeck serve model.gguf` (or --model model.gguf)")
    server = api.serving(
        model or model_option or "", host=host, port=port, name=name, api_key_env=api_key_env, context=context, parallel=parallel, queue=queue,
        max_tokens=max_tokens, max_body=max_body, threads=threads, numa_aware=numa_aware, chat_template=chat_template, dtype=dtype, device=device,
        revision=revision, adapters=adapters, grace=grace, log_every=log_every, say=lambda line: typer.echo(f"limbeck serve: {line}", err=True),
    )  # fmt: skip
    if not server.forever(lambda: print(f"limbeck serve: {server.url}", flush=True)):
        # What outlasts the grace time has nobody to answer any more, and Python's own end would crash or wait under it.
        os._exit(0)
