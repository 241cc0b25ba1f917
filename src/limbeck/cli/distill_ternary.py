"""``limbeck distill-ternary``: a ternary student of a served teacher, by the flags that its training scripts have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from limbeck import api
from limbeck.cli.arguments import Overrides
from limbeck.errors import RunError


def distill_ternary(
    changes: Overrides = None,
    teacher_endpoint: Annotated[
        str, typer.Option(envvar="TEACHER_ENDPOINT", help="Where the teacher is served, such as http://127.0.0.1:8100.", show_default=False)
    ] = "",
    checkpoint_dir: Annotated[
        Path, typer.Option(envvar="CHECKPOINT_DIR", help="step_N/, final/, training.log and the run's records go here.")
    ] = Path("checkpoints/qwen3-hybrid"),
    keep_last_checkpoints: Annotated[int, typer.Option(help="step_N/ that are kept, 0 for all; final/ always is.")] = 3,
    total_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100_000,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of rising learning rate; 2000, or a tenth of fewer steps.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a micro-batch.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    lr: Annotated[float, typer.Option(help="Muon's rate, for ternary weights.")] = 0.02,
    mhc_lr: Annotated[float, typer.Option(help="Lion's rate, for everything else (router, norms, embeddings, residual streams).")] = 1e-4,
    kl_weight: Annotated[float, typer.Option(help="Share of the KL to the teacher; the rest is cross-entropy.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of the KL, which carries the factor T squared.")] = 2.0,
    load_balance_weight: Annotated[float, typer.Option(help="Of the experts' load balance; 0 leaves it out.")] = 0.01,
    router_aux_weight: Annotated[float, typer.Option(help="Of the routers' entropy; 0 leaves it out.")] = 0.001,
    parallel: Annotated[
        Literal["true", "false"], typer.Option(envvar="PARALLEL", help="Ask for all micro-batches of a step at once, and for the next step's while one trains.")
    ] = "true",
    micro_batches: Annotated[int, typer.Option(envvar="MICRO_BATCHES", help="Micro-batches of a step, over all ranks.")] = 8,
    save_every: Annotated[int, typer.Option("--save-every", "--checkpoint-interval", help="Steps between checkpoints.")] = 1000,
    log_interval: Annotated[int | None, typer.Option(help="Steps between lines; 100, or a tenth of fewer steps.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(envvar="DEVICE", help="Such as cuda:0; by default a GPU if there is one.", show_default=False)] = None,
    student: Annotated[
        str | None, typer.Option(help="Model to make ternary: a folder, a hub name, builtin:NAME; by default what the recipe trains first.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="stdlib, a text file or folder, or a hub data set (NAME:FIELD); several times for several.", show_default=False)
    ] = None,
    protocol: Annotated[Literal["limbeck", "vllm", "sglang", "seed"], typer.Option(help="What the endpoint speaks.")] = "limbeck",
    top_k: Annotated[int, typer.Option(help="Likeliest ids that the teacher gives at each position; what is left is one more outcome.")] = 64,
    lambda_steps: Annotated[
        int | None, typer.Option(help="Steps from the student's own weights to ternary ones; 1000, or a fifth of fewer steps.", show_default=False)
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe with a ternary train stage `distil` that the flags change.")] = "ternary",
    fresh: Annotated[bool, typer.Option("--fresh", help="Set aside what is in the folder and start anew.")] = False,
) -> None:
    """Train ternary weights under a served teacher.

    \b
    limbeck teach builtin:code-2m &
    limbeck distill-ternary --teacher-endpoint http://127.0.0.1:8100 --total-steps 100 --batch-size 2 --micro-batches 4 --seq-len 256
    limbeck export --input checkpoints/qwen3-hybrid/final --output student.gguf --verify
    limbeck serve student.gguf

    The same command goes on where it stopped.  TEACHER_API_KEY in the environment is sent as the bearer token.  Everything that no flag
    names is a setting of the recipe: distil.loop.activation_checkpointing=true, say (`limbeck explain train` lists them).
    """
    from limbeck.cli.console import say, terminal

    if not teacher_endpoint:
        raise RunError("--teacher-endpoint: say where the teacher is served, or set TEACHER_ENDPOINT (`limbeck teach MODEL` serves one)")
    from limbeck.stages.servers import device_of

    run = api.DistillTernary(
        teacher_endpoint=teacher_endpoint, checkpoint_dir=checkpoint_dir, student=student, data=tuple(data or ()), recipe=recipe, protocol=protocol,
        top_k=top_k, keep_last_checkpoints=keep_last_checkpoints, total_steps=total_steps, warmup_steps=warmup_steps, lambda_steps=lambda_steps,
        batch_size=batch_size, seq_len=seq_len, lr=lr, mhc_lr=mhc_lr, kl_weight=kl_weight, temperature=temperature,
        load_balance_weight=load_balance_weight, router_aux_weight=router_aux_weight, parallel=parallel == "true", micro_batches=micro_batches,
        save_every=save_every, log_interval=log_interval, device=device and device_of(device), changes=tuple(changes or ()),
    )  # fmt: skip
    final = run.run(fresh=fresh, say=say, console=terminal())
    say(f"student in {final / 'model'}; a file for llama.cpp: limbeck export --input {final} --output {checkpoint_dir.name}.gguf --verify")
