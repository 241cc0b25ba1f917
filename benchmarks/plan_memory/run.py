"""What `limbeck plan` says a stage's memory is, against what it takes: small recipes on a CPU, one process a stage.

python -m benchmarks.plan_memory.run [--quick] [--out FOLDER] [--only CASE]

A child process imports everything, runs a tiny step so that lazily loaded libraries are there, notes its resident memory, resets the
kernel's high-water mark and runs one stage of a recipe.  What the mark has risen to, less what was noted, is compared with the plan: once
for the time before the first checkpoint, and once for the writing of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs as a file

BOUND = 0.15
HELD = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Blocks of 64 kB and more go back to the system when they are freed: what is resident is what is held.  By default glibc keeps freed blocks of
ever larger sizes, and how much of them can be used again is the order's luck."""
VOCABULARY = 4096
MODEL: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
"""21 million parameters: 84 MB, so that what Python itself takes does not count."""
TEACHER = {**MODEL, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}
EXPERTS: dict[str, Any] = {
    **{k: v for k, v in MODEL.items() if k not in ("head_dim", "model_type")}, "model_type": "qwen3_moe", "num_hidden_layers": 3, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
ADAMW = [{"lr": 1e-4}]


def stage(student: dict[str, Any], rows: int = 4, steps: int = 2, sequence: int = 256, groups: Any = None, **fields: Any) -> dict[str, Any]:
    """A train stage of ``rows`` rows a step."""
    loop = {"steps": steps, "batch_tokens": rows * sequence, "precision": "float32", "checkpoint_every": steps, "canary": False, **fields.pop("loop", {})}
    data = {"source": [{"kind": "text", "path": "text.txt"}], "tokenizer": "builtin:code-2m", "sequence": sequence, "held_out": 0}
    return {"data": data, "student": student, "optim": {"groups": groups or ADAMW}, "loop": loop, **fields}


BASE = stage({"config": TEACHER}, rows=1, steps=1)
CASES: dict[str, dict[str, Any]] = {
    "float32, AdamW, one pass": {"train": stage({"config": MODEL})},
    "float32, four passes": {"train": stage({"config": MODEL}, rows=8, loop={"microbatch": 2})},
    "float32, layers recomputed": {"train": stage({"config": MODEL}, rows=8, loop={"activation_checkpointing": True})},
    "bfloat16": {"train": stage({"config": MODEL}, loop={"precision": "bfloat16"})},
    "Muon and Lion": {
        "train": stage({"config": MODEL}, groups=[{"match": "*.layers.*_proj.weight", "kind": "muon", "lr": 0.01}, {"kind": "lion", "lr": 1e-4}]),
    },
    "experts": {"train": stage({"config": EXPERTS})},
    "KL from a teacher": {
        "base": stage({"config": MODEL}, rows=1, steps=1),
        "train": stage({"config": MODEL}, teacher={"kind": "local", "model": {"from": "base"}}, objectives=[{"kind": "kl"}]),
    },
    "mixers aligned": {
        "base": stage({"config": MODEL}, rows=1, steps=1),
        "train": stage(
            {"base": {"from": "base"}, "surgery": [{"kind": "hybridize", "calibration_rows": 0}], "train": ["mixers"]}, teacher={"kind": "self"},
            objectives=[{"kind": "attention_alignment", "calibration_batches": 1}],
        ),
    },
    "a hybrid": {
        "base": stage({"config": MODEL}, rows=1, steps=1),
        "train": stage({"base": {"from": "base"}, "surgery": [{"kind": "hybridize", "keep": [1, 4]}]}),
    },
    "ternary": {
        "base": stage({"config": MODEL}, rows=1, steps=1),
        "train": stage({"base": {"from": "base"}, "surgery": [{"kind": "ternarize"}]}, rows=8, loop={"microbatch": 4}),
    },
}  # fmt: skip
"""Recipes; the stage ``train`` is measured, the others come first, each in a process of its own."""
QUICK = ("float32, AdamW, one pass", "bfloat16", "KL from a teacher")


# -- the child ------------------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: ``VmRSS`` or ``VmHWM`` (its high-water mark)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def child(recipe_file: Path, name: str, run_dir: Path) -> None:
    """Run one stage and print what memory it took."""
    import torch

    from limbeck.config.load import load_recipe
    from limbeck.engine.checkpoint import Checkpoints
    from limbeck.engine.resources import release_memory
    from limbeck.stages.run import run_recipe

    torch.set_num_threads(1)
    recipe = load_recipe(recipe_file)
    warm_up(recipe)
    release_memory(torch.device("cpu"))
    before = resident("VmRSS")
    marks: dict[str, int] = {}
    write = Checkpoints._write

    def watched(self: Any, *words: Any, **settings: Any) -> None:
        marks.setdefault("training", resident("VmHWM"))
        reset_mark()
        write(self, *words, **settings)
        marks["saving"] = max(marks.get("saving", 0), resident("VmHWM"))

    Checkpoints._write = watched  # type: ignore[method-assign]
    reset_mark()
    run_recipe(recipe, recipe_dir=recipe_file.parent, run_dir=run_dir, stage=name, say=lambda line: None)
    print(json.dumps({moment: mark - before for moment, mark in marks.items()}))


def reset_mark() -> None:
    """Let the high-water mark begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def warm_up(recipe: Any) -> None:
    """Import what a stage imports, and take one step of a model of the same family with eight numbers a row."""
    import torch

    import limbeck.stages.train  # noqa: F401  what a run would import later
    from limbeck.models.loading import build_model, load_tokenizer, resolve_source

    load_tokenizer(resolve_source("builtin:code-2m"))
    config = next(s.student.config for s in recipe.stages.values() if s.student.config is not None)
    small = {**config, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"head_dim": 4} if "head_dim" in config else {}
    small |= {"moe_intermediate_size": 8, "num_experts": 2} if "num_experts" in config else {}
    model = build_model(small)
    for precision in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            loss = model(input_ids=torch.arange(8)[None], use_cache=False).logits.float().logsumexp(-1).sum()
        loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


# -- the parent -----------------------------------------------------------------------------------------------------------


def write_text(folder: Path) -> None:
    """Words enough for every step, the same at every run."""
    draw = random.Random(0)
    words = ["def", "return", "value", "index", "self", "for", "in", "range", "import", "class", "None", "(", ")", ":", "=", "+"]
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(4000)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")


def measure(stages: dict[str, Any], folder: Path, held: bool = True) -> dict[str, int]:
    """Bytes that the stage ``train`` took, ``training`` and ``saving``: what is held, or what the heap makes of it."""
    write_text(folder)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"name": "plan-memory", "stages": stages}), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false", **(HELD if held else {})}
    root = Path(__file__).resolve().parents[2]
    found: dict[str, int] = {}
    for name in stages:
        words = [sys.executable, "-m", "benchmarks.plan_memory.run", "--child", str(file), name, str(folder / "run")]
        done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"stage {name}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
    return found


def planned(file: Path) -> tuple[Any, dict[str, float]]:
    """The plan of the stage ``train`` in one process, and its bytes by moment."""
    from limbeck.config.load import load_recipe
    from limbeck.planner.devices import find_device
    from limbeck.planner.machine import Machine
    from limbeck.planner.memory import MOMENTS
    from limbeck.planner.plan import recipe_plan
    from limbeck.planner.sources import Models

    cpu = replace(find_device("cpu"), memory=1e12)
    part = recipe_plan(load_recipe(file), Models(file.parent), Machine(cpu), "train").parts[0]
    sums = {moment: sum(getattr(item, moment) for item in part.items) for moment in MOMENTS}
    return part, {"training": max(sums[moment] for moment in MOMENTS if moment != "save"), "saving": sums["save"]}


def main() -> None:
    """Measure, compare, print and write ``results.json``."""
    parser = argparse.ArgumentParser(description="Planned memory against measured.")
    parser.add_argument("--quick", action="store_true", help="three cases, once each")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this one, and none for --quick")
    parser.add_argument("--only", help="one case, by its name; nothing is written")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1], Path(arguments.child[2]))
        return
    names = [arguments.only] if arguments.only else list(QUICK if arguments.quick else CASES)
    repeats = 1 if arguments.quick or arguments.only else 3
    rows: list[dict[str, Any]] = []
    found: list[tuple[str, float]] = []
    for name in names:
        taken: list[dict[str, int]] = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                taken.append(measure(CASES[name], Path(folder)))
                part, said = planned(Path(folder) / "recipe.yaml")
        for moment, wanted in said.items():
            each = sorted(one[moment] for one in taken)
            middle = each[len(each) // 2]
            off = wanted / middle - 1
            print(f"{name:<28} {moment:<9} planned {wanted / 1e6:7.1f} MB  taken {middle / 1e6:7.1f} MB  {off:+.1%}", flush=True)
            facts = {"setting": name, "moment": moment}
            rows += [{**facts, "metric": metric, "value": value} for metric, value in (("planned_bytes", wanted), ("taken_bytes", middle), ("off", off))]
            rows += [{**facts, "metric": "taken_bytes_each", "value": value} for value in each]
            found.append((f"{name}, {moment}", off))
        if not (arguments.quick or arguments.only):
            with tempfile.TemporaryDirectory() as folder:
                loose = measure(CASES[name], Path(folder), held=False)
            rows += [{"setting": name, "moment": moment, "metric": "taken_bytes_default_heap", "value": value} for moment, value in loose.items()]
        if arguments.only:
            for item in part.items:
                print(f"    {item.name:<36} {item.forward / 1e6:8.1f} {item.backward / 1e6:8.1f} {item.step / 1e6:8.1f} {item.save / 1e6:8.1f}")
    from benchmarks.evidence import criterion, write_results

    lines = [criterion(f"planned over taken, {name}", f"within {BOUND:.0%}", off, abs(off) <= BOUND) for name, off in found]
    for line in lines:
        print(f"{'holds' if line['holds'] else 'FAILS'}: {line['name']}: {line['measured']:+.1%}, {line['bound']}")
    out = arguments.out or (None if arguments.quick or arguments.only else Path(__file__).parent)
    if out is not None:
        write_results(
            out,
            claim="limbeck plan says within 15% what memory a train stage takes",
            command="python -m benchmarks.plan_memory.run" + (" --quick" if arguments.quick else ""),
            seeds=[0],
            rows=rows,
            criteria=lines,
        )


if __name__ == "__main__":
    main()
