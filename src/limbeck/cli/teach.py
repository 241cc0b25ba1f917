"""``limbeck teach``: serve a teacher's signals over HTTP."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from limbeck import api


def teach(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="RUN/STAGE, a model folder, builtin:NAME, or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine (with a token).")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8100,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights and the forward; logits are float32 or better.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; by default a GPU if there is one.", show_default=False)] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention implementation; by default as the model says.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or branch of a hub model.", show_default=False)] = None,
    max_top_k: Annotated[int, typer.Option(min=1, help="Most ids of a position.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a request; bounds the memory of a forward.")] = 16_384,
    max_values: Annotated[int, typer.Option(min=1, help="Most numbers of an answer in JSON lists (whole logits).")] = 4_000_000,
    queue: Annotated[int, typer.Option(min=1, help="Most requests under way; one more is told to come again (429).")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.", show_default=False)] = None,
    grace: Annotated[float, typer.Option(min=1, help="Seconds for what runs when the server is told to stop.")] = 30,
    log_every: Annotated[int, typer.Option(min=0, help="One line on stderr after so many requests; 0 for none.")] = 0,
) -> None:
    """Serve a teacher's signals over HTTP.

    \b
    limbeck teach builtin:code-2m
    limbeck teach runs/hybrid/distil --port 0 --threads 2
    LIMBECK_TEACH_TOKEN=secret limbeck teach Qwen/Qwen3-8B --host 0.0.0.0 --dtype bfloat16
    curl -H 'Authorization: Bearer secret' http://HOST:8100/health
    curl http://127.0.0.1:8100/v1/topk -d '{"sequences": [[5, 6, 7]], "positions": [[0, 1]], "top_k": 4, "temperatures": [1, 2]}'
    curl http://127.0.0.1:8100/v1/completions -d '{"input_ids": [[5, 6, 7]], "return_logits": true, "top_k": 4}'

    They are top-k logits and partition sums, for `teacher: {kind: http}` in a recipe elsewhere.  The one line on stdout says where it
    listens.  With LIMBECK_TEACH_TOKEN in the environment every request but GET / must carry that bearer token.  SIGTERM and Ctrl-C end it
    when what runs is answered, with exit code 0.
    """
    server = api.teaching(
        model, host=host, port=port, dtype=dtype, device=device, attention=attention, revision=revision, max_top_k=max_top_k, max_tokens=max_tokens,
        max_values=max_values, queue=queue, threads=threads, grace=grace, log_every=log_every,
        say=lambda line: typer.echo(f"limbeck teach: {line}", err=True),
    )  # fmt: skip
    if not server.forever(lambda: print(f"limbeck teach: {server.url}", flush=True)):
        # A forward that outlasts the grace time has nobody to answer any more, and Python's own end would crash under it.
        os._exit(0)
