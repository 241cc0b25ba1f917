"""The same from Python: a ternary student of a served teacher, then a file for llama.cpp.

    limbeck teach builtin:code-2m &
    python examples/distill_qwen3.py --teacher-endpoint http://127.0.0.1:8100 --total-steps 100

The student is the small one of the recipe ``ternary``; ``--recipe ternary_qwen3_coder_next`` is the large one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from limbeck.config.parts.stages import GgufOptions
from limbeck.stages.export import export_path
from limbeck.ternary import DistillTernary


def main() -> None:
    """Distil, then export."""
    parser = argparse.ArgumentParser(description="A ternary student of a served teacher.")
    parser.add_argument("--teacher-endpoint", required=True)
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints/qwen3-hybrid"))
    parser.add_argument("--recipe", default="ternary")
    parser.add_argument("--total-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("changes", nargs="*", help="any other setting of the recipe, such as base.loop.tokens=100k")
    options = parser.parse_args()
    run = DistillTernary(
        teacher_endpoint=options.teacher_endpoint,
        checkpoint_dir=options.checkpoint_dir,
        recipe=options.recipe,
        total_steps=options.total_steps,
        batch_size=options.batch_size,
        micro_batches=options.micro_batches,
        seq_len=options.seq_len,
        changes=tuple(options.changes),
    )
    final = run.run(console=Console(soft_wrap=True))
    print(export_path(str(final), output=options.checkpoint_dir / "student.gguf", gguf=GgufOptions(type="auto")))


if __name__ == "__main__":
    main()
