"""The surgery that gives a model several residual streams (mHC, arXiv 2512.24880; mHC-lite, arXiv 2601.05732).

With S streams ``X [S, D]`` at a token, every sublayer ``f`` (attention or MLP, its own norms included) becomes

    X' = H_res X + h_post (outer) f(h_pre X)        H_res doubly stochastic, h_pre = sigmoid(.), h_post = 2 sigmoid(.)

Streams begin as copies of the embedding and are averaged after the last layer.  Rows of H_res and each h_pre sum to 1 and h_post is 1
at the start, so that all streams are what the one stream of the base was; but each h_pre leans to another stream, so that the streams'
gradients differ, and after a step the streams do.

How it gets into a family's layer without a line of the family's own code: the layer's forward pass is given :class:`Streams` instead of
a tensor.  Where it norms them they hand ``h_pre X`` to the norm; where it adds a sublayer's output to them they become ``X'``.  Nothing
is kept between the two but in that object, which lives as long as the call.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from limbeck.config.parts.surgeries import HyperConnectionsOptions
from limbeck.errors import ModelError
from limbeck.models.head import backbone
from limbeck.models.structure import layer_list
from limbeck.ops.hyper_connections import mix, permutation_mixture, sinkhorn
from limbeck.students.hybridize import REST_ROLE
from limbeck.students.mixers.base import Report

MHC_ROLE = "mhc"
PRE_NORMS = ({"input_layernorm", "post_attention_layernorm"}, ("input_layernorm", "post_attention_layernorm"))
SANDWICH_NORMS = (
    {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"},
    ("input_layernorm", "pre_feedforward_layernorm"),
)
"""All norms that a layer has, and the two of them that read the residual stream.  Gemma 2 and 3 norm what a sublayer gives too."""
MIXED_IN = -6.0
"""Logit of a matrix entry beside the diagonal, relative to the diagonal, at the start: 0.25% of each other stream."""
_EPS = 1e-6
_PROBE = 7
_ONE_STREAM = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative difference from the model with one stream that rounding explains; several percent in bf16."""

_ADDITIONS = (operator.add, torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)

if TYPE_CHECKING:
    # What the mixins take for granted beside them.
    from torch.nn import Module as _Module
else:
    _Module = object


class Connection(nn.Module):
    """How one sublayer reads from the streams, writes to them, and mixes them.

    ``bias`` holds the logits of h_pre ``[S]``, h_post ``[S]`` and H_res (``[S * S]``, or ``[S!]`` of permutations).  What depends on the
    token is ``alpha * weight rms_norm(mean of streams)`` with an ``alpha`` for each of the three, 0 at the start.
    """

    def __init__(self, options: HyperConnectionsOptions, width: int, place: int):
        """``place`` numbers the sublayers of the model: h_pre leans to stream ``place mod S``.  Works on meta."""
        super().__init__()
        self.streams, self.mixing, self.iterations = options.streams, options.mixing, options.iterations
        self.dynamic = options.dynamic
        many = self.streams**2 if self.mixing == "sinkhorn" else math.factorial(self.streams)
        self.sizes = [self.streams, self.streams, many]
        self.bias = nn.Parameter(torch.cat([self._read_start(place), torch.zeros(self.streams), self._mix_start()]))
        if self.dynamic:
            self.alpha = nn.Parameter(torch.zeros(3))
            self.weight = nn.Parameter(torch.randn(sum(self.sizes), width) * width**-0.5)

    def _read_start(self, place: int) -> Tensor:
        """Logits of numbers that sum to 1, one of them well above the others."""
        leaning = (1 + 1 / self.streams) / 2
        others = (1 - leaning) / (self.streams - 1)
        shares = [leaning if s == place % self.streams else others for s in range(self.streams)]
        return torch.tensor([math.log(share / (1 - share)) for share in shares])

    def _mix_start(self) -> Tensor:
        """Logits of nearly the identity."""
        if self.mixing == "sinkhorn":
            return (MIXED_IN * (1 - torch.eye(self.streams))).flatten()
        # Each entry beside the diagonal is in (S - 1)! permutations.
        logits = torch.full((math.factorial(self.streams),), MIXED_IN - math.log(math.factorial(self.streams - 1)))
        return torch.cat([torch.zeros(1), logits[1:]])

    def forward(self, x_BTSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h_pre ``[..., S]``, h_post ``[..., S]`` and H_res ``[..., S, S]`` of streams ``[B, T, S, D]``, in at least fp32."""
        dtype = torch.promote_types(x_BTSD.dtype, torch.float32)
        pre, post, res = self.bias.to(dtype).split(self.sizes)
        if self.dynamic:
            mean_BTD = F.rms_norm(x_BTSD.to(dtype).mean(-2), x_BTSD.shape[-1:], eps=_EPS)
            parts = F.linear(mean_BTD.to(self.weight.dtype), self.weight).to(dtype).split(self.sizes, -1)
            pre, post, res = (
                start + alpha * part for start, alpha, part in zip((pre, post, res), self.alpha.to(dtype).unbind(), parts, strict=True)
            )
        return pre.sigmoid(), 2 * post.sigmoid(), self._doubly_stochastic(res)

    def _doubly_stochastic(self, logits: Tensor) -> Tensor:
        if self.mixing == "sinkhorn":
            return sinkhorn(logits.unflatten(-1, (self.streams, self.streams)), self.iterations)
        return permutation_mixture(logits, self.streams)


class Streams:
    """The residual streams ``[B, T, S, D]`` inside one call of a decoder layer, in the place of its residual stream ``[B, T, D]``."""

    def __init__(self, x_BTSD: Tensor, sublayers: int = 0):
        self.x_BTSD = x_BTSD
        self.sublayers = sublayers
        """Sublayers that have written."""
        self._write: tuple[Tensor, Tensor] | None = None

    def read(self, connection: Connection) -> Tensor:
        """What a sublayer sees, ``[B, T, D]``."""
        if self._write is not None:
            raise ModelError(
                "surgery.hyper_connections: two norms read the residual stream before anything is added to it: take the surgery out, "
                "or another base"
            )
        pre, post, res = connection(self.x_BTSD)
        self._write = post, res
        return mix(pre[..., None, :], self.x_BTSD).squeeze(-2).to(self.x_BTSD.dtype)

    def __add__(self, y_BTD: Tensor) -> Streams:
        """The streams after a sublayer that gave ``y``."""
        if self._write is None:
            raise ModelError(
                "surgery.hyper_connections: something is added to the residual stream that no norm has read: take the surgery out, or "
                "another base"
            )
        post, res = self._write
        written = mix(res, self.x_BTSD) + post[..., None] * y_BTD[..., None, :]
        return Streams(written.to(self.x_BTSD.dtype), self.sublayers + 1)

    __radd__ = __add__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """What torch asks before an operator with a tensor on either side: so a compiled layer traces the addition through."""
        if func not in _ADDITIONS or kwargs:
            raise TypeError(f"{getattr(func, '__name__', func)} of several residual streams")
        one, other = args
        return one.__add__(other) if isinstance(one, Streams) else other.__add__(one)


class StreamNorm(_Module):
    """First base of a norm that reads the residual stream."""

    connection: Connection

    def forward(self, hidden_states: Any) -> Tensor:
        """``[B, T, D]`` of one stream or of several."""
        return super().forward(hidden_states.read(self.connection) if isinstance(hidden_states, Streams) else hidden_states)


class StreamLayer(_Module):
    """First base of a decoder layer: the first one makes the streams, the last one their mean."""

    streams: int
    last: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``hidden_states [B, T, D]`` or ``[B, T, S, D]`` to ``[B, T, S, D]``; from the last layer ``[B, T, D]``."""
        if hidden_states.ndim == 3:
            hidden_states = hidden_states.unsqueeze(-2).expand(-1, -1, self.streams, -1)
        found = super().forward(Streams(hidden_states), *args, **kwargs)
        if not isinstance(found, Streams) or found.sublayers != 2:
            raise ModelError(
                f"surgery.hyper_connections: {type(self).__name__} is no layer of two sublayers that each add to one residual stream: "
                "take the surgery out, or another base"
            )
        return found.x_BTSD.mean(-2) if self.last else found.x_BTSD


@functools.cache
def _with(first: Any, base: Any) -> Any:
    return type(f"{first.__name__.removesuffix('Norm').removesuffix('Layer')}{base.__name__}", (first, base), {"__module__": base.__module__})


class HyperConnections:
    """Re-classes decoder layers and the norms in front of their sublayers, each norm with a :class:`Connection` in it."""

    def __init__(self, options: HyperConnectionsOptions):
        self.options = options

    def resolve(self, model: PreTrainedModel) -> HyperConnectionsOptions:
        """The options as they are; a family whose layers are not built for it is refused by name."""
        for index, layer in enumerate(layer_list(model)):
            reading_norms(layer, index)
        return self.options

    def apply(self, model: PreTrainedModel) -> None:
        """Let every layer carry several streams; as one stream until something trains.  Works on meta."""
        layers: Any = layer_list(model)
        if any(isinstance(layer, StreamLayer) for layer in layers):
            raise ModelError("surgery.hyper_connections: the model has several residual streams already: name the surgery once")
        width = model.config.get_text_config(decoder=True).hidden_size
        for index, layer in enumerate(layers):
            for number, name in enumerate(reading_norms(layer, index)):
                norm: Any = getattr(layer, name)
                norm.__class__ = _with(StreamNorm, norm.__class__)
                norm.connection = Connection(self.options, width, 2 * index + number)
            layer.__class__ = _with(StreamLayer, layer.__class__)
            layer.streams, layer.last = self.options.streams, index == len(layers) - 1
            # Sharded training must not gather these numbers rounded: sums that are 1 would be so to three digits.
            layer.keeps_precision = True
        backbone(model).register_forward_pre_hook(_refuse_inner_states, with_kwargs=True)

    def initialise(self, model: PreTrainedModel, base: PreTrainedModel) -> list[Report]:
        """Nothing more: connections start at what makes several streams one."""
        return [Report(copied=[], fresh=[name for name, role in self.roles(model).items() if role == MHC_ROLE])]

    def roles(self, model: PreTrainedModel) -> dict[str, str]:
        """``mhc`` for every parameter of a connection, ``rest`` for all others."""
        ours = {id(p) for module in model.modules() if isinstance(module, Connection) for p in module.parameters()}
        return {name: MHC_ROLE if id(p) in ours else REST_ROLE for name, p in model.named_parameters()}

    def replaced(self, model: PreTrainedModel) -> list[int]:
        """No layer: attention stays where it is."""
        return []

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Run a few tokens with several streams and with one: :class:`ModelError` unless they come to the same."""
        embedding = model.get_input_embeddings()
        if embedding.weight.is_meta:
            return
        ids = torch.arange(_PROBE, device=embedding.weight.device)[None] * 5 % embedding.num_embeddings
        training = model.training
        model.eval()
        try:
            found = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state.double()
            with _one_stream(model):
                wanted = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state.double()
        except (AttributeError, TypeError) as error:
            # What a layer does to its residual stream beside norming it and adding to it.
            raise ModelError(f"{_strange(model)} ({error})") from error
        finally:
            model.train(training)
        if not (found - wanted).norm() <= _ONE_STREAM.get(model.dtype, 0.1) * wanted.norm():
            raise ModelError(f"{_strange(model)}: with several streams it is not the model that it is with one")


def reading_norms(layer: nn.Module, index: int) -> tuple[str, str]:
    """Names of the two norms of a decoder layer that read its residual stream, attention's first."""
    norms = {name for name, _ in layer.named_children() if "norm" in name}
    for all_norms, reading in (PRE_NORMS, SANDWICH_NORMS):
        if norms == all_norms:
            return reading
    raise ModelError(
        f"surgery.hyper_connections: layer {index}: {type(layer).__name__} has the norms {', '.join(sorted(norms)) or 'none'}, and what is needed "
        f"is one in front of attention and one in front of the MLP (as Llama, Qwen and Gemma have them: {', '.join(PRE_NORMS[1])}): take the "
        "surgery out, or another base"
    )


@contextmanager
def _one_stream(model: PreTrainedModel) -> Iterator[None]:
    """The family's own layers and norms for a while."""
    ours: list[Any] = [module for module in model.modules() if isinstance(module, (StreamLayer, StreamNorm))]
    classes = [type(module) for module in ours]
    try:
        for module in ours:
            module.__class__ = type(module).__bases__[1]
        yield
    finally:
        for module, kind in zip(ours, classes, strict=True):
            module.__class__ = kind


def _strange(model: PreTrainedModel) -> str:
    return f"surgery.hyper_connections: layers of {type(model).__name__} do something else to their residual stream than norm it and add to it"


def _refuse_inner_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_hidden_states", getattr(getattr(module, "config", None), "output_hidden_states", False)):
        raise ModelError(
            "output_hidden_states: inner layers of this student carry several residual streams (hyper_connections); "
            "limbeck.models.hidden.hidden_states gives their mean"
        )
