"""``limbeck init --slurm``: the script that runs a recipe under Slurm, or by plain bash."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from limbeck.config.load import SHIPPED, find_recipe, shipped_tree
from limbeck.errors import LimbeckError, did_you_mean

TEMPLATE = SHIPPED / "launch" / "job.slurm"
VERBS = ("run", "prepare", "capture", "report")
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})")
_CPUS_A_GPU = 8
_WARNING = 300
"""Seconds before the end at which Slurm warns: a large checkpoint must be written in them."""


@dataclass(frozen=True)
class Job:
    """What a script asks Slurm for.  Numbers are per node; None is what suits the verb."""

    verb: str = "run"
    """`capture` is every capture stage of the recipe; it, `prepare` and `report` need no GPU."""
    stage: str | None = None
    nodes: int = 1
    gpus: int | None = None
    cpus: int | None = None
    time: str = "24:00:00"


def slurm_script(recipe: str, job: Job) -> str:
    """The text of the script.

    ``limbeck.slurm_script("my.yaml", limbeck.Job(nodes=2, time="12:00:00"))``

    Raises:
        LimbeckError: a recipe that is not there, or something asked for that does not go together.
    """
    tree = shipped_tree(find_recipe(recipe)).plain()
    name, known = str(tree.get("name", "")), tree.get("stages")
    stages = _stages(recipe, job, known if isinstance(known, dict) else {})
    gpus = _gpus(job)
    cpus = job.cpus if job.cpus is not None else _CPUS_A_GPU * max(1, gpus)
    for flag, number, least in (("--nodes", job.nodes, 1), ("--gpus", gpus, 0), ("--cpus", cpus, 1)):
        if number < least:
            raise LimbeckError(f"{flag} {number}: must be {least} or more")
    if job.nodes > 1 and job.verb in ("prepare", "report"):
        raise LimbeckError(f"--nodes {job.nodes}: {job.verb} is one process on one node; leave --nodes out")
    if not _TIME.fullmatch(job.time):
        raise LimbeckError(f"--time {job.time!r}: is HH:MM:SS, D-HH:MM:SS or minutes, as Slurm has it")
    resources = [f"nodes={job.nodes}", "ntasks-per-node=1", f"cpus-per-task={cpus}", f"time={job.time}"]
    if gpus:
        resources.insert(2, f"gpus-per-node={gpus}")
    lines = ["job-name=" + (re.sub(r"[^\w.-]+", "-", f"{name}-{job.verb}" if job.verb != "run" else name) or "limbeck"), *resources]
    lines += ["requeue", "open-mode=append", f"signal=B:USR1@{_WARNING}", "output=%x-%j.log"]
    # Each of many processes of a capture reads what the teacher's server answers.
    values = {
        "SBATCH": "\n".join(f"#SBATCH --{line}" for line in lines),
        "RECIPE": shlex.quote(recipe),
        "RUN_DIR": shlex.quote(f"runs/{name}"),
        "VERB": job.verb,
        "STAGES": " ".join(map(shlex.quote, stages)),
        "GPUS": str(gpus),
        "PROCESSES": str(gpus or (cpus if job.verb == "capture" else 1)),
    }
    return re.sub(r"@@([A-Z_]+)@@", lambda found: values[found[1]], TEMPLATE.read_text(encoding="utf-8"))


def _gpus(job: Job) -> int:
    if job.verb == "run":
        return 8 if job.gpus is None else job.gpus
    if job.gpus:
        raise LimbeckError(f"--gpus {job.gpus}: {job.verb} needs none; leave --gpus out, or take --verb run")
    return 0


def _stages(recipe: str, job: Job, stages: dict[str, Any]) -> list[str]:
    """The stages that are run by name; none of them is all of them."""
    if job.verb not in VERBS:
        raise LimbeckError(f"--verb {job.verb}: no such form{did_you_mean(job.verb, VERBS) or ';'} forms: {', '.join(VERBS)}")
    if job.stage is not None:
        if job.verb not in ("run", "capture"):
            raise LimbeckError(f"--stage {job.stage}: {job.verb} takes no stage; leave --stage out")
        if job.stage not in stages:
            raise LimbeckError(f"--stage {job.stage}: {recipe} has no such stage{did_you_mean(job.stage, stages) or ';'} stages: {', '.join(map(str, stages))}")
        return [job.stage]
    if job.verb != "capture":
        return []
    found = [name for name, stage in stages.items() if isinstance(stage, dict) and stage.get("kind") == "capture"]
    if not found:
        raise LimbeckError(f"--verb capture: {recipe} has no capture stage; its stages: {', '.join(map(str, stages))}")
    return found
