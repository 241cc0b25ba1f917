"""A model that is served: weights on each GPU after tensor and expert parallelism, cache, and what prompt log-probabilities take."""

from __future__ import annotations

from dataclasses import dataclass, field

from limbeck.planner.architecture import Architecture
from limbeck.planner.devices import Device, PlanError, count_text, size_text
from limbeck.planner.storage import BLOCK, bytes_each, cache_bytes

DTYPES = ("fp32", "bf16", "fp8", "int4")
USABLE = 0.9
"""Share of a GPU's memory that is planned with: the rest is context, graphs and fragments."""
LOGPROB_BYTES = 6
"""Bytes of one logit while prompt log-probabilities are taken: bfloat16 and float32 (vLLM's V1 runner)."""


@dataclass(frozen=True)
class Serving:
    """How a model is to be served."""

    model: Architecture
    dtype: str
    device: Device
    gpus: int
    tp: int
    ep: int = 1
    """GPUs over which whole experts are spread; 1 splits each expert over ``tp`` instead."""
    context: int = 0
    sequences: int = 1
    scored: int = 0
    """Tokens of one forward pass whose prompt log-probabilities are asked for; 0 for none."""
    usable: float = USABLE
    kv: float = 2.0
    """Bytes of a cached number."""


@dataclass(frozen=True)
class Served:
    """What comes of it."""

    weights: float
    """Bytes of all."""
    per_gpu: float
    """Bytes on each GPU."""
    token: float
    """Cache bytes a token adds, over all heads."""
    state: float
    """Bytes that a sequence has whatever its length."""
    spike: float
    """Bytes on each GPU while prompt log-probabilities are taken."""
    room: float
    """Bytes left for caches on all GPUs."""
    cached_tokens: float
    """Tokens that fit the caches."""
    wanted: float
    """Bytes of caches for the sequences asked for."""
    problems: tuple[str, ...] = field(default=())
    """Why it cannot be split so."""

    @property
    def fits(self) -> bool:
        """Whether it can be split so and has the room."""
        return not self.problems and self.room >= self.wanted


def serve(plan: Serving) -> Served:
    """Sizes and problems of a way to serve a model."""
    if plan.dtype not in DTYPES:
        raise PlanError(f"--dtype: no dtype {plan.dtype!r}; allowed: {', '.join(DTYPES)}")
    model = plan.model
    problems = split_problems(plan)
    weights = sum(w.count * bytes_each(w, plan.dtype) for w in model.weights)
    experts = sum(w.count * bytes_each(w, plan.dtype) for w in model.weights if w.kind == "experts")
    # Norms and routers are whole on every GPU.
    whole = sum(w.count * bytes_each(w, plan.dtype) for w in model.weights if w.kind in ("norm", "router"))
    per_gpu = experts / (plan.ep if plan.ep > 1 else plan.tp) + (weights - experts - whole) / plan.tp + whole
    context = plan.context or model.context
    token, state = cache_bytes(model, context, plan.kv)
    spike = float(plan.scored * model.vocabulary * LOGPROB_BYTES)
    each = plan.device.memory * plan.usable - per_gpu - spike
    # Heads that are fewer than GPUs are held twice.
    copies = max(1.0, plan.tp / _kv_heads(model))
    room = each * plan.gpus / copies
    wanted = plan.sequences * (token * context + state)
    tokens = max(0.0, (room - plan.sequences * state) / token) if token else float("inf") if room > 0 else 0.0
    return Served(weights, per_gpu, token, state, spike, room, tokens, wanted, tuple(problems))


def _kv_heads(model: Architecture) -> int:
    return min((layer.attention.kv_heads for layer in model.layers if layer.attention is not None), default=1)


def split_problems(plan: Serving) -> list[str]:
    """What does not divide: heads, experts, and widths by the blocks of a quantised checkpoint."""
    model, tp, found = plan.model, plan.tp, []
    if tp < 1 or plan.gpus % tp:
        return [f"{plan.gpus} GPUs are no multiple of tensor parallel {tp}"]
    if plan.ep > 1 and plan.gpus % plan.ep:
        found.append(f"{plan.gpus} GPUs are no multiple of expert parallel {plan.ep}")
    seen: set[str] = set()
    for layer in model.layers:
        a, net, experts = layer.attention, layer.deltanet, layer.experts
        if a is not None and a.heads % tp:
            seen.add(f"{a.heads} attention heads do not divide by tensor parallel {tp}")
        if a is not None and a.kv_heads % tp and tp % a.kv_heads:
            seen.add(f"{a.kv_heads} key/value heads and tensor parallel {tp}: neither divides the other")
        if net is not None and (net.key_heads % tp or net.value_heads % tp):
            seen.add(f"{net.key_heads} key and {net.value_heads} value heads of DeltaNet do not divide by tensor parallel {tp}")
        if layer.mlp and layer.mlp % tp:
            seen.add(f"an MLP of {layer.mlp} does not divide by tensor parallel {tp}")
        if layer.mlp and not layer.mlp % tp and plan.dtype in ("fp8", "int4") and (layer.mlp // tp) % BLOCK and tp > 1:
            seen.add(f"an MLP of {layer.mlp} / {tp} = {layer.mlp // tp} is no multiple of the block of {BLOCK} of {plan.dtype}")
        if experts is not None:
            seen |= _expert_problems(experts.number, experts.width, plan)
    return found + sorted(seen)


def _expert_problems(number: int, width: int, plan: Serving) -> set[str]:
    if plan.ep > 1:
        return {f"{number} experts do not divide by expert parallel {plan.ep}"} if number % plan.ep else set()
    if width % plan.tp:
        return {f"an expert's width of {width} does not divide by tensor parallel {plan.tp}"}
    part = width // plan.tp
    if plan.tp > 1 and plan.dtype in ("fp8", "int4") and part % BLOCK:
        words = f"an expert's width of {width} / {plan.tp} = {part} is no multiple of the block of {BLOCK} of {plan.dtype}"
        return {f"{words}: spread whole experts (--ep {plan.tp})"}
    return set()


def usual_split(model: Architecture, dtype: str, device: Device, gpus: int) -> tuple[int, int]:
    """``(tp, ep)`` for so many GPUs: all of them split every layer, and whole experts are spread where their width does not split."""
    for ep in (1, gpus):
        if not split_problems(Serving(model, dtype, device, gpus, gpus, ep)):
            return gpus, ep
    return gpus, 1


def first_violated(plan: Serving, served: Served) -> str:
    """The first thing in the way, in words; empty when it fits."""
    if served.problems:
        return served.problems[0]
    if served.fits:
        return ""
    budget = plan.device.memory * plan.usable
    if served.per_gpu + served.spike > budget:
        spike = f" and {size_text(served.spike)} for prompt log-probabilities" if served.spike else ""
        return f"weights of {size_text(served.per_gpu)} a GPU{spike} do not fit into {plan.usable:g} x {size_text(plan.device.memory)}"
    context = plan.context or plan.model.context
    what = f"{plan.sequences} sequence{'s' if plan.sequences > 1 else ''} of {context:,} tokens"
    return f"caches of {what} take {size_text(served.wanted)}, and {size_text(served.room)} are left ({count_text(served.cached_tokens)} tokens)"


def ways_out(plan: Serving, limit: int = 64) -> list[str]:
    """Single changes that make it fit, in words of the command line, the smallest first: a way to split, more GPUs, a smaller dtype, a
    shorter context."""
    found: list[str] = []

    def tried(**changes: object) -> bool:
        return serve(Serving(**{**plan.__dict__, **changes})).fits

    if plan.gpus > 1 and tried(ep=plan.gpus) and plan.ep != plan.gpus:
        found.append(f"--ep {plan.gpus}")
    gpus = plan.gpus
    while gpus < limit:
        gpus *= 2
        tp, ep = usual_split(plan.model, plan.dtype, plan.device, gpus)
        if tried(gpus=gpus, tp=tp, ep=ep):
            found.append(f"--gpus {gpus}" + (f" --ep {ep}" if ep > 1 else ""))
            break
    for dtype in DTYPES[DTYPES.index(plan.dtype) + 1 :]:
        tp, ep = usual_split(plan.model, dtype, plan.device, plan.gpus)
        if tried(dtype=dtype, tp=tp, ep=ep):
            found.append(f"--dtype {dtype}")
            break
    context = plan.context or plan.model.context
    while context > 2048:
        context //= 2
        if tried(context=context):
            found.append(f"--context {context}")
            break
    return found
