"""Latents -> the factors of a LoRA: one query for every layer, Linear and rank; heads shared by layers and ranks.

``A = A0 + g_A (z W_A)`` and ``B = B0 + g_B (z W_B)`` with W_B = 0 and g_B = 1 at the start: the first step is the base (or the LoRA
that ``start`` names) exactly, and its gradient reaches W_B.  With both at zero it would reach nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from limbeck.adapters.spec import Adapters, AdapterSpec, Site, check_same_spec
from limbeck.adapters.start import bound_of_A
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.errors import AdapterError
from limbeck.students.generator.blocks import MLP, Attention

Factors = tuple[dict[str, Tensor], dict[str, Tensor]]
"""A and B by the name of the site, ``[N, L, R, I]`` and ``[N, L, O, R]``."""


def key_of(site: Site) -> str:
    """A site's name as parameter containers take it."""
    return site.name.replace(".", "-")


class Static(nn.Module):
    """A0 and B0: the LoRA that is there whatever the condition says."""

    def __init__(self, spec: AdapterSpec):
        super().__init__()
        self.spec = spec
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        for site in spec.sites:
            bound = bound_of_A(site)
            self.A[key_of(site)] = nn.Parameter(torch.empty(len(site.layers), spec.rank, site.in_features).uniform_(-bound, bound))
            self.B[key_of(site)] = nn.Parameter(torch.zeros(len(site.layers), site.out_features, spec.rank))

    @torch.no_grad()
    def begin_as(self, adapters: Adapters) -> None:
        """Take over one adapter of the same sites and rank (:class:`AdapterError` otherwise); another scale goes into B."""
        check_same_spec([self.spec, adapters.spec], sites_only=True)
        if adapters.spec.rank != self.spec.rank:
            raise AdapterError(f"`start` is a LoRA of rank {adapters.spec.rank}, and this generator makes rank {self.spec.rank}: give them the same")
        for site in self.spec.sites:
            self.A[key_of(site)].copy_(adapters.A[site.name][0])
            self.B[key_of(site)].copy_(adapters.B[site.name][0] * (adapters.spec.scale / self.spec.scale))

    def forward(self, count: int) -> Factors:
        """The same for all of ``count`` conditions, without copies."""
        return (
            {site.name: self.A[key_of(site)].expand(count, -1, -1, -1) for site in self.spec.sites},
            {site.name: self.B[key_of(site)].expand(count, -1, -1, -1) for site in self.spec.sites},
        )


class QueryDecoder(nn.Module):
    """What a condition adds to :class:`Static`."""

    def __init__(self, spec: AdapterSpec, options: LoraGeneratorOptions):
        super().__init__()
        self.spec = spec
        width = options.width
        layers = sorted({layer for site in spec.sites for layer in site.layers})
        number = {layer: i for i, layer in enumerate(layers)}
        self.layer = nn.Embedding(len(layers), width)
        self.site = nn.Embedding(len(spec.sites), width)
        self.rank = nn.Embedding(spec.rank, width)
        places = [(number[layer], i) for i, site in enumerate(spec.sites) for layer in site.layers]
        self.register_buffer("places_Q2", torch.tensor(places), persistent=False)
        self.ask = Attention(width, options.reader.heads)
        self.trunk = nn.ModuleList(MLP(width) for _ in range(options.trunk))
        self.to_A, self.to_B = nn.ParameterDict(), nn.ParameterDict()
        self.gain_A, self.gain_B = nn.ParameterDict(), nn.ParameterDict()
        for site in spec.sites:
            # z has unit variance: what is added to A begins at a tenth of what A0 holds.
            bound = 0.1 / math.sqrt(site.in_features * width)
            self.to_A[key_of(site)] = nn.Parameter(torch.empty(width, site.in_features).uniform_(-bound, bound))
            self.to_B[key_of(site)] = nn.Parameter(torch.zeros(width, site.out_features))
            self.gain_A[key_of(site)] = nn.Parameter(torch.ones(len(site.layers), 1, 1))
            self.gain_B[key_of(site)] = nn.Parameter(torch.ones(len(site.layers), 1, 1))

    def forward(self, latents_NMD: Tensor, static: Factors) -> Factors:
        """The factors for N conditions, of M latents each.

        Args:
            static: the factors of no condition: ``A[site.name] [L, R, I]`` and ``B[site.name] [L, O, R]``.
        """
        queries_QD = self.layer(self.places_Q2[:, 0]) + self.site(self.places_Q2[:, 1])
        queries = (queries_QD[:, None] + self.rank.weight).flatten(0, 1).expand(len(latents_NMD), -1, -1)
        z = queries + self.ask(queries, latents_NMD)
        for block in self.trunk:
            z = z + block(z)
        z_NQRD = layer_norm(z, z.shape[-1:]).unflatten(1, (-1, self.spec.rank))
        A, B = static
        out_A, out_B = {}, {}
        parts = z_NQRD.split([len(site.layers) for site in self.spec.sites], 1)
        for site, z_NLRD in zip(self.spec.sites, parts, strict=True):
            key = key_of(site)
            out_A[site.name] = A[site.name] + self.gain_A[key] * (z_NLRD @ self.to_A[key])
            out_B[site.name] = B[site.name] + self.gain_B[key] * (z_NLRD @ self.to_B[key]).mT
        return out_A, out_B

    @torch.no_grad()
    def add_nothing(self) -> None:
        """Begin as the static LoRA exactly, where it is not 0: its B carries the gradient to W_A."""
        for weight in self.to_A.values():
            weight.zero_()
