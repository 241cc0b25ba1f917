"""Tokens a second and memory of TQ2_0, TQ1_0, Q2_0 and BF16 files of one ternary student, through `limbeck serve`.

python -m benchmarks.ternary_decode.run [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.evidence import criterion, write_results
from benchmarks.ternary_decode.serving import MIB, Served, Taken

from limbeck.config.parts.stages import GgufOptions
from limbeck.config.parts.surgeries import TernarizeOptions
from limbeck.export.gguf.writer import manifest_path
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, load_tokenizer, resolve_source, save_model
from limbeck.stages.export import export_path

KINDS = ("tq2_0", "tq1_0", "q2_0", "bf16")
TOKENIZER = "builtin:code-2m"
BASE = {"vocab_size": 4096, "tie_word_embeddings": False, "max_position_embeddings": 512, "eos_token_id": 0, "bos_token_id": 0}
FULL = {
    "dense": {
        **BASE, "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "mixture": {
        **BASE, "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 2,
        "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
}  # fmt: skip
"""268 million weights that are ternary in a dense model, and 151 million in experts of which an eighth is used for a token."""
QUICK = {
    "dense": {**FULL["dense"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "mixture": {**FULL["mixture"], "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 256},
}
FLOOR = {**FULL["dense"], "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
"""A model of next to nothing: what its server holds beyond the file is the process's own."""
CONTEXT, PROMPT, SHORT = 256, 128, 8
"""Tokens: of the server's context, of a prompt that is timed, and of one that is answered."""
FASTER, MEMORY, SIZE = 2.0, 1.3, 0.01
BITS = {"tq2_0": 2.07, "tq1_0": 1.70}
TERNARY = {"dense": ("attention", "feed-forward"), "mixture": ("experts",)}
"""Rows of the size report that a student has ternary."""
SEED = 0


@torch.no_grad()
def student(config: dict[str, Any], folder: Path) -> Path:
    """A ternary student with random weights, saved.

    Rows of the head whose tokens are no whole ASCII characters are zeros: a greedy answer never has them, so that each token is an
    event of the stream and none ends it.
    """
    source = resolve_source(TOKENIZER)
    tokenizer = load_tokenizer(source)
    base = build_model(config, seed=SEED)
    silent = [token for token in range(len(tokenizer)) if token in tokenizer.all_special_ids or not _plain(tokenizer.decode([token]))]
    base.lm_head.weight[silent] = 0
    made = wrap_student(base, [TernarizeOptions(scale="row")], {"source": "random", "fingerprint": {}})
    save_model(made, folder, tokenizer_source=source)
    return folder


def _plain(text: str) -> bool:
    return bool(text) and text.isascii()


def files(folder: Path, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """One file a type, and what its manifest says."""
    found = {}
    for kind in kinds:
        path = export_path(str(folder), output=folder.parent / f"{folder.name}-{kind}.gguf", gguf=GgufOptions(type=kind), say=lambda line: None)
        found[kind] = {**json.loads(manifest_path(path).read_text()), "path": path}
    return found


def measure(servers: dict[str, Served], rounds: int, tokens: int) -> dict[str, dict[str, list[Taken]]]:
    """What each server took to read prompts and to write; in turns, so that a change of the machine's pace hits all alike."""
    rng = random.Random(SEED)
    taken: dict[str, dict[str, list[Taken]]] = {kind: {"read": [], "write": []} for kind in servers}
    for number in range(rounds + 1):
        short, prompt = ([rng.randrange(1, BASE["vocab_size"]) for _ in range(length)] for length in (SHORT, PROMPT))
        for kind, server in servers.items():
            # The first round maps the file and fills the caches.
            wrote, read = server.write(short, tokens if number else 4), server.read(prompt)
            if number:
                taken[kind]["write"].append(wrote)
                taken[kind]["read"].append(read)
    return taken


def cache_mib(config: dict[str, Any]) -> float:
    """Keys and values of the whole context, in fp16: what a context costs, and not a file."""
    width = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    return 2 * 2 * width * config["num_hidden_layers"] * CONTEXT / MIB


def rows_of(
    name: str, made: dict[str, dict[str, Any]], taken: Any, memory: dict[str, dict[str, float]], floor: float, cache: float
) -> list[dict[str, Any]]:
    """A row a type."""
    found = []
    for kind, about in made.items():
        size = about["path"].stat().st_size
        bits, weights = _ternary_bits(about["sizes"], name)
        wrote, read, beside = taken[kind]["write"], taken[kind]["read"], taken["bf16"]["write"]
        cpu = [one.tokens / one.cpu for one in wrote]
        against = [theirs.cpu / ours.cpu for ours, theirs in zip(wrote, beside, strict=True)]
        against_wall = [theirs.wall / ours.wall for ours, theirs in zip(wrote, beside, strict=True)]
        found.append({
            "setting": f"{name}, {kind}", "metric": "tokens written a second of CPU time, median", "value": _short(median(cpu)),
            "slowest": _short(min(cpu)), "fastest": _short(max(cpu)), "rounds": len(cpu),
            "wall": _short(median(one.tokens / one.wall for one in wrote)),
            "times_bf16": _short(median(against)), "times_bf16_least": _short(min(against)), "times_bf16_most": _short(max(against)),
            "times_bf16_wall": _short(median(against_wall)),
            "read_cpu": _short(median(one.tokens / one.cpu for one in read)),
            "read_wall": _short(median(one.tokens / one.wall for one in read)),
            "file_mib": _short(size / MIB), "predicted": round(about["predicted_bytes"] / size, 5), "bits": bits, "weights": weights,
            **{f"{word}_mib": _short(amount) for word, amount in memory[kind].items()},
            "floor_mib": _short(floor), "cache_mib": _short(cache), "times_file": _short((memory[kind]["resident"] - floor) / (size / MIB)),
            "times_file_without_cache": _short((memory[kind]["resident"] - floor - cache) / (size / MIB)),
        })  # fmt: skip
    return found


def _ternary_bits(sizes: list[dict[str, Any]], name: str) -> tuple[float, int]:
    """Bits a weight of those that the student has ternary, and how many they are."""
    rows = [row for row in sizes if row["kind"] in TERNARY[name]]
    weights = sum(row["parameters"] for row in rows)
    return round(8 * sum(row["bytes"] for row in rows) / weights, 4), weights


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bounds of the spec."""
    at = {row["setting"]: row for row in rows}
    found = []

    def bound(name: str, measured: float, most: float) -> None:
        found.append(criterion(name, f"<= {most}", measured, measured <= most))

    if "dense, tq2_0" in at:
        ratio = at["dense, tq2_0"]["times_bf16"]
        found.append(criterion("tokens written a second of CPU time, tq2_0 over bf16, dense", f">= {FASTER}", ratio, ratio >= FASTER))
    for setting, row in at.items():
        kind = setting.rpartition(" ")[2]
        if kind in BITS:
            bound(f"bits a ternary weight: {setting}", row["bits"], BITS[kind])
        bound(f"resident memory beyond the floor over the file's size: {setting}", row["times_file"], MEMORY)
        bound(f"file's size off the plan's: {setting}", round(abs(row["predicted"] - 1), 5), SIZE)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, two tables: speed and memory."""
    speed = [
        "| model, type | written, tokens a CPU second (slowest to fastest) | times bf16 (least to most) | written, tokens a second | times bf16 "
        "| 128 read, tokens a CPU second | tokens a second |",
        "|---|---|---|---|---|---|---|",
    ]
    memory = [
        "| model, type | bits a ternary weight | file, MiB | of the plan's | resident, MiB | of files | own | peak | beyond the floor, times the file "
        "| without the cache |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed.append(
            "| {setting} | {value:.1f} ({slowest:.1f} to {fastest:.1f}) | {times_bf16:.2f} ({times_bf16_least:.2f} to {times_bf16_most:.2f}) "
            "| {wall:.1f} | {times_bf16_wall:.2f} | {read_cpu:.1f} | {read_wall:.1f} |".format(**row)
        )
        memory.append(
            "| {setting} | {bits:.3f} | {file_mib:.1f} | {predicted:.4f} | {resident_mib:.0f} | {of_files_mib:.0f} | {own_mib:.0f} | {peak_mib:.0f} "
            "| {times_file:.2f} | {times_file_without_cache:.2f} |".format(**row)
        )
    caches = ", ".join(f"{row['setting'].partition(',')[0]} {row['cache_mib']:.0f}" for row in rows if row["setting"].endswith(KINDS[0]))
    return "\n".join([*speed, "", *memory, "", f"Floor: {rows[0]['floor_mib']:.0f} MiB.  Keys and values of the context, MiB: {caches}."])


def shared_cache() -> float:
    """MiB of the largest cache, 0 where Linux does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) / 1024 for size in sizes if size.endswith("K")), default=0.0)


def compare(students: dict[str, dict[str, Any]], rounds: int, tokens: int, where: Path) -> list[dict[str, Any]]:
    """Rows of all students; those of one are served side by side."""
    rows = []
    small = files(student(FLOOR, where / "floor"), ("tq2_0",))["tq2_0"]["path"]
    with Served(small, CONTEXT) as server:
        measure({"tq2_0": server}, 1, tokens)
        floor = server.memory()["resident"] - small.stat().st_size / MIB
    for name, config in students.items():
        made = files(student(config, where / name), KINDS)
        with ExitStack() as stack:
            servers = {kind: stack.enter_context(Served(about["path"], CONTEXT)) for kind, about in made.items()}
            taken = measure(servers, rounds, tokens)
            memory = {kind: server.memory() for kind, server in servers.items()}
        rows += rows_of(name, made, taken, memory, floor, cache_mib(config))
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    parser.add_argument("--rounds", type=int, help="how often each file is asked; by default 7 (--quick: 2)")
    parser.add_argument("--only", nargs="+", choices=list(FULL), help="these models alone; writes only with --out")
    options = parser.parse_args(arguments)
    students = {name: config for name, config in (QUICK if options.quick else FULL).items() if name in (options.only or FULL)}
    rounds = options.rounds or (2 if options.quick else 7)
    with tempfile.TemporaryDirectory(prefix="ternary-decode-") as where:
        rows = compare(students, rounds, 16 if options.quick else 64, Path(where))
    criteria = judge(rows)
    print(table(rows), "\n\n| criterion | bound | measured | holds |\n|---|---|---|---|")
    for line in criteria:
        print("| {name} | {bound} | {measured} | {holds} |".format(**line).replace("True |", "true |").replace("False |", "false |"))
    folder = options.out or (None if options.quick or options.only else Path(__file__).parent)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        command = "python -m benchmarks.ternary_decode.run" + (" --quick" if options.quick else "")
        claim = "A ternary student served from TQ2_0 writes at least twice as fast as from BF16 in the same llama.cpp, in the memory of its file"
        largest = {"setting": "machine", "metric": "largest cache, MiB", "value": shared_cache(), "xllamacpp": version("xllamacpp")}
        write_results(folder, claim, command, [SEED], [*rows, largest], criteria)
    return criteria


if __name__ == "__main__":
    main()
