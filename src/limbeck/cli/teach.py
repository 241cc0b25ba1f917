"""``limbeck teach``: serve a teacher's signals over HTTP."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from limbeck.errors import LimbeckError, RunError

TOKEN = "LIMBECK_TEACH_TOKEN"


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
    """Serve a model's top-k logits and partition sums, for `teacher: {kind: http}` in a recipe elsewhere.

    \b
    limbeck teach builtin:code-2m
    limbeck teach runs/hybrid/distil --port 0 --threads 2
    LIMBECK_TEACH_TOKEN=secret limbeck teach Qwen/Qwen3-8B --host 0.0.0.0 --dtype bfloat16
    curl -H 'Authorization: Bearer secret' http://HOST:8100/health
    curl http://127.0.0.1:8100/v1/topk -d '{"sequences": [[5, 6, 7]], "positions": [[0, 1]], "top_k": 4, "temperatures": [1, 2]}'
    curl http://127.0.0.1:8100/v1/completions -d '{"input_ids": [[5, 6, 7]], "return_logits": true, "top_k": 4}'

    The one line on stdout says where it listens.  With LIMBECK_TEACH_TOKEN in the environment every request but GET / must carry
    that bearer token.  SIGTERM and Ctrl-C end it when what runs is answered, with exit code 0.
    """
    absent = [name for name in ("starlette", "uvicorn", "zstandard") if find_spec(name) is None]
    if absent:
        raise LimbeckError(f"`limbeck teach` needs {', '.join(absent)}: pip install 'limbeck[serve]'")
    from limbeck.serve.gate import check_token
    from limbeck.serve.process import bind, refuse_strangers, run, url_of

    token = check_token(os.environ.get(TOKEN), TOKEN)
    sock = bind(host, port)
    refuse_strangers(sock, token, TOKEN)

    import torch

    from limbeck.models.loading import resolve_source
    from limbeck.serve.teacher import TeacherService, model_name
    from limbeck.teachers.scoring import Scorer

    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(model) / "model"
    source = resolve_source(str(folder) if folder.is_dir() else model)
    scorer = Scorer(source, dtype=dtype, attention=attention, revision=revision)
    scorer.load(device_of(device))
    name = model if model.startswith("builtin:") else model_name(source)
    service = TeacherService(
        scorer, name, max_top_k=max_top_k, max_tokens=max_tokens, max_values=max_values, queue=queue, token=token,
        log_every=log_every, say=lambda line: typer.echo(f"limbeck teach: {line}", err=True),
    )  # fmt: skip
    typer.echo(
        f"limbeck teach: {name} in {dtype} on {scorer.model.device}, vocabulary {service.vocabulary}, digest {service.digest}", err=True
    )

    def announce() -> None:
        print(f"limbeck teach: {url_of(sock)}", flush=True)

    run(service.app, sock, announce=announce, stopping=service.worker.close, grace=grace)
    if not service.worker.join(1):
        # A forward that outlasts the grace time has nobody to answer any more, and Python's own end would crash under it.
        os._exit(0)


def device_of(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name)
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from error
    return str(kind)
