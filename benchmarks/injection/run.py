"""N LoRAs in one batched forward against one adapter at a time, and against factors repeated for every token.

python -m benchmarks.injection.run [--quick] [--out FOLDER]

Each of N samples has a LoRA of its own; the loss is summed over all of them and its gradient goes to every factor.  CPU seconds are
process time, in turns, so that whatever else the machine does falls on all ways alike.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs as a file

from benchmarks.evidence import criterion, write_results

from limbeck.adapters.functional import FunctionalLoRA
from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import modules_of, resolve_spec
from limbeck.models.loading import build_model

TOKENS, RANK, VOCABULARY = 64, 8, 512
CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SPEEDUP, MEMORY, APART = 1.8, 0.25, 1e-10
OURS, LOOP, REPEATED = "injector", "functional loop", "repeated per token"
SEED = 0


class Case:
    """One model and N adapters; each way gives the loss of all samples."""

    def __init__(self, count: int, dtype: torch.dtype):
        self.model = build_model(CONFIG, seed=SEED, dtype=dtype).requires_grad_(False)
        self.spec = resolve_spec(self.model, "all", rank=RANK, alpha=2 * RANK)
        self.adapters = adapters_of(self.spec, count, dtype)
        self.leaves = self.adapters.tensors()
        generator = torch.Generator().manual_seed(SEED + 1)
        self.ids = torch.randint(0, VOCABULARY, (count, TOKENS), generator=generator)
        self.injector = Injector(self.model, self.spec)
        copy = build_model(CONFIG, seed=SEED, dtype=dtype)
        wrapped = get_peft_model(copy, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=self.spec.paths)).requires_grad_(False)
        self.functional = FunctionalLoRA(wrapped.eval())
        self.plain = build_model(CONFIG, seed=SEED, dtype=dtype).requires_grad_(False)

    def ways(self) -> dict[str, Callable[[], list[Tensor]]]:
        """Gradients of all factors, by the name of the way."""
        return {OURS: self.injected, LOOP: self.looped, REPEATED: self.repeated}

    def injected(self) -> list[Tensor]:
        """All samples in one forward."""
        with self.injector.active(self.adapters):
            loss = summed(self.model(input_ids=self.ids, use_cache=False).logits, self.ids)
        return list(torch.autograd.grad(loss, self.leaves))

    def looped(self) -> list[Tensor]:
        """One sample after the other through peft's layers, one backward at the end."""
        parts = [self.functional(self.adapters, n, input_ids=row[None], use_cache=False).logits for n, row in enumerate(self.ids)]
        loss = sum(summed(part, row[None]) for part, row in zip(parts, self.ids, strict=True))
        return list(torch.autograd.grad(loss, self.leaves))

    def repeated(self) -> list[Tensor]:
        """One forward in which A and B are repeated for every token, as Text-to-LoRA's published hook does."""
        with repeating(self.plain, self.adapters):
            loss = summed(self.plain(input_ids=self.ids, use_cache=False).logits, self.ids)
        return list(torch.autograd.grad(loss, self.leaves))


def adapters_of(spec: AdapterSpec, count: int, dtype: torch.dtype) -> Adapters:
    """Random factors that want gradients."""
    generator = torch.Generator().manual_seed(SEED + 2)

    def draw(*shape: int) -> Tensor:
        return (0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    A = {s.name: draw(count, len(s.layers), RANK, s.in_features) for s in spec.sites}
    return Adapters(spec, A, {s.name: draw(count, len(s.layers), s.out_features, RANK) for s in spec.sites})


def summed(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token cross-entropy, summed."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@contextmanager
def repeating(model: nn.Module, adapters: Adapters) -> Iterator[None]:
    """Hooks that multiply every token by a copy of its sample's factors."""

    def hook(A_NRI: Tensor, B_NOR: Tensor, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].flatten(0, 1)
        A, B = (factor.repeat_interleave(len(x) // len(factor), 0) for factor in (A_NRI, B_NOR))
        inner = torch.einsum("mi,mri->mr", x, A)
        return output + adapters.spec.scale * torch.einsum("mr,mor->mo", inner, B).view_as(output)

    handles = [
        module.register_forward_hook(partial(hook, adapters.A[name][:, row], adapters.B[name][:, row]))
        for name, modules in modules_of(model, adapters.spec).items()
        for row, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def saved_bytes(run: Callable[[], Any], kept: set[int]) -> int:
    """Bytes that autograd keeps for the backward pass: storages counted once, those of ``kept`` (weights and factors) not at all."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in kept:
            # Holding the tensor keeps its address from being given to another.
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def measure_memory(case: Case) -> dict[str, int]:
    """Bytes saved by each way, and by the base alone with gradients of its input embeddings."""
    modules = (case.model, case.functional.model, case.plain)
    kept = {p.untyped_storage().data_ptr() for m in modules for p in (*m.parameters(), *m.buffers())}
    kept |= {t.untyped_storage().data_ptr() for t in case.leaves}
    found = {name: saved_bytes(way, kept) for name, way in case.ways().items()}
    embedded = case.model.get_input_embeddings()(case.ids).detach().requires_grad_()
    found["base"] = saved_bytes(lambda: summed(case.model(inputs_embeds=embedded, use_cache=False).logits, case.ids), kept)
    return found


def measure_time(case: Case, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every repeat of every way, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in case.ways()}
    gc.disable()
    try:
        for repeat in range(repeats + 2):
            for name, way in case.ways().items():
                start = time.process_time()
                way()
                # Two rounds to warm up the allocator and the matrix library.
                if repeat >= 2:
                    taken[name].append(time.process_time() - start)
    finally:
        gc.enable()
    return taken


def measure_agreement(count: int) -> float:
    """Largest difference of a gradient in fp64, of the injector and of the repeating hook, from the functional reference."""
    case = Case(count, torch.float64)
    wanted = case.looped()
    return max(float((a - b).abs().max()) for way in (case.injected, case.repeated) for a, b in zip(way(), wanted, strict=True))


def measure(count: int, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and criteria of one number of adapters."""
    case = Case(count, torch.float32)
    setting = f"{count} samples of {TOKENS} tokens"
    memory, taken, apart = measure_memory(case), measure_time(case, repeats), measure_agreement(count)
    rows = [{"setting": f"{setting}, {name}", "metric": "saved for backward, MiB", "value": round(size / 2**20, 2)} for name, size in memory.items()]
    for name, times in taken.items():
        seconds = statistics.median(times)
        facts = {"setting": f"{setting}, {name}", "metric": "CPU seconds, forward and backward"}
        rows.append({**facts, "value": round(seconds, 4), "fastest": round(min(times), 4)})
    rows.append({"setting": setting, "metric": "largest difference of gradients in fp64", "value": apart})
    # The smaller of two: medians suffer from other work on the machine, and not always evenly.
    speedup = min(statistics.median(taken[LOOP]) / statistics.median(taken[OURS]), min(taken[LOOP]) / min(taken[OURS]))
    share = memory[OURS] / memory[REPEATED]
    over_base = memory[OURS] / memory["base"]
    rows.append({"setting": setting, "metric": "saved by the injector over saved by the base", "value": round(over_base, 3)})
    criteria = [
        criterion(f"CPU time of the functional loop over the injector's, {setting}", f">= {SPEEDUP}", round(speedup, 2), speedup >= SPEEDUP),
        criterion(f"saved bytes over those of repeated factors, {setting}", f"<= {MEMORY}", round(share, 3), share <= MEMORY),
        criterion(f"largest difference of gradients in fp64, {setting}", f"<= {APART}", apart, apart <= APART),
    ]
    for row in rows:
        print(f"{row['setting']}: {row['metric']} {row['value']:.4g}", flush=True)
    return rows, criteria


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 samples and few repeats; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    # Threads that wait for each other on a shared machine would measure the machine.
    torch.set_num_threads(1)
    rows, criteria = [], []
    try:
        for count in (6,) if options.quick else (6, 16):
            found = measure(count, 3 if options.quick else 11)
            rows += found[0]
            criteria += found[1]
        for line in criteria:
            print(f"{'holds' if line['holds'] else 'FAILS'}: {line['name']}: {line['measured']:.4g} {line['bound']}")
        folder = options.out or (None if options.quick else Path(__file__).parent)
        if folder:
            command = "python -m benchmarks.injection.run" + (" --quick" if options.quick else "")
            claim = "N LoRAs in one batched forward cost 1.8 times less CPU time than one at a time, and a quarter of the memory of factors repeated per token"
            write_results(folder, claim, command, [SEED], rows, criteria)
    finally:
        torch.set_num_threads(before)
    return criteria


if __name__ == "__main__":
    main()
