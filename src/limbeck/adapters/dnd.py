"""Adapters as the two-dimensional tokens of Drag-and-Drop LLMs (DnD, arXiv 2506.16406), and back.

B is transposed, so that both factors are ``[R, dim]``; each is cut along ``dim`` into pieces of one width; every piece is a token: its
weights less their mean, divided by their deviation, top left in a frame whose last two rows and columns repeat the pair (mean code,
deviation code).  What holds no number is NaN.  Order and names: :mod:`limbeck.adapters.dnd_names`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.adapters.dnd_names import dnd_blocks, dnd_keys
from limbeck.adapters.dnd_scales import ExactScales, LegacyScales, Scales
from limbeck.adapters.spec import Adapters, AdapterSpec, Site
from limbeck.errors import AdapterError

Codec = Literal["exact", "legacy"]
BORDER = 2
WIDEST = 512
"""Widest piece that is chosen unasked: DnD's for its largest model."""
NARROWEST = 16
"""Narrowest common divisor that is taken: below it a token is mostly border."""
_SCALES: dict[str, type[Scales]] = {"exact": ExactScales, "legacy": LegacyScales}


class DnDTokenizer:
    """Between the adapters of one spec and DnD's tokens ``[N, tokens, rows, cols]``; shapes and order come from the spec alone.

    Args:
        spec: the adapters' spec; its modules must be ones that DnD has an order for.
        chunk: (rows, width) of the weights in a token; None is (rank, :func:`default_width`), which is DnD's own choice for its models.
        codec: ``exact`` keeps every adapter, ``legacy`` writes and reads DnD's own numbers; see :mod:`limbeck.adapters.dnd_scales`.

    Raises:
        AdapterError: a target that DnD has no place for, a chunk too small, or an unknown codec.
    """

    def __init__(self, spec: AdapterSpec, chunk: tuple[int, int] | None = None, codec: Codec = "exact"):
        blocks = dnd_blocks(spec)
        if codec not in _SCALES:
            raise AdapterError(f"codec: '{codec}' is unknown, there are {', '.join(_SCALES)}")
        rows, width = chunk or (spec.rank, default_width(spec))
        if rows < spec.rank or width < 1:
            raise AdapterError(f"chunk: ({rows}, {width}) cannot hold pieces of rank {spec.rank}: at least ({spec.rank}, 1) is needed")
        self.spec = spec
        self.codec = codec
        self.width = width
        # The pair on the border must fit a whole number of times.
        self.token_shape = (rows + rows % 2 + BORDER, width + width % 2 + BORDER)
        self._scales = _SCALES[codec]()
        self._order, self._widths = self._layout(blocks)
        self._back = self._order.argsort()

    @property
    def num_tokens(self) -> int:
        """Tokens of one adapter."""
        return len(self._order)

    @property
    def keys(self) -> list[str]:
        """DnD's names of the tensors, in the order of their tokens."""
        return dnd_keys(self.spec)

    @property
    def mask(self) -> Tensor:
        """``[tokens, rows, cols]``, True where a token holds a number (weights or border) and False where it is NaN."""
        rows, cols = self.token_shape
        row, col = torch.arange(rows)[:, None], torch.arange(cols)
        weights = (row < self.spec.rank) & (col < self._widths[:, None, None])
        return weights | (row >= rows - BORDER) | (col >= cols - BORDER)

    @torch.no_grad()
    def tokenize(self, adapters: Adapters) -> Tensor:
        """Tokens ``[N, tokens, rows, cols]`` of N adapters, fp32 (fp64 of fp64 adapters), NaN where there is nothing; no graph.

        Raises:
            AdapterError: the adapters are of another spec, or hold NaN or infinity, which would be taken for padding.
        """
        self._check_adapters(adapters)
        parts = []
        for site in self.spec.sites:
            factors = (adapters.A[site.name], adapters.B[site.name].mT)
            parts.append(torch.cat([self._cut(factor_NLRD) for factor_NLRD in factors], dim=2).flatten(1, 2))
        weights_NTRC = torch.cat(parts, dim=1).index_select(1, self._order.to(parts[0].device))
        codes, content = self._normalise(weights_NTRC)
        rows, cols = self.token_shape
        tokens = content.new_full((len(adapters), self.num_tokens, rows, cols), math.nan)
        tokens[..., : self.spec.rank, : self.width] = content
        tokens[..., -BORDER:, :] = codes.repeat(1, 1, cols // 2)[..., None, :]
        tokens[..., -BORDER:] = codes[..., None, :]
        return tokens

    def detokenize(self, tokens: Tensor) -> Adapters:
        """The N adapters of ``tokens [N, tokens, rows, cols]``, at least fp32; gradients reach every number that means something.

        The scales are averaged over the border, so that a generator's noise in it is too.

        Raises:
            AdapterError: the tokens are not of this tokeniser's shape.
        """
        wanted = (self.num_tokens, *self.token_shape)
        if tokens.ndim != 4 or tuple(tokens.shape[1:]) != wanted:
            raise AdapterError(f"tokens are {tuple(tokens.shape)}: this adapter's are (N, {', '.join(map(str, wanted))})")
        tokens = _wide(tokens)
        shift, scale = self._scales.decode(_read_border(tokens))
        content = tokens[..., : self.spec.rank, : self.width]
        if self._scales.nan_is_constant:
            content = torch.where(content.isnan(), 0.0, content)
        weights_NTRC = content * scale[..., None, None] + shift[..., None, None]
        weights_NTRC = weights_NTRC.index_select(1, self._back.to(tokens.device))
        A, B = {}, {}
        sizes = [len(site.layers) * sum(self._pieces(site)) for site in self.spec.sites]
        for site, part in zip(self.spec.sites, weights_NTRC.split(sizes, dim=1), strict=True):
            of_A, of_B = part.unflatten(1, (len(site.layers), -1)).split(self._pieces(site), dim=2)
            A[site.name] = _join(of_A, site.in_features)
            B[site.name] = _join(of_B, site.out_features).mT
        return Adapters(self.spec, A, B)

    def _pieces(self, site: Site) -> tuple[int, int]:
        """Tokens of A and of B of one Linear."""
        return -(-site.in_features // self.width), -(-site.out_features // self.width)

    def _layout(self, blocks: list[tuple[Site, int]]) -> tuple[Tensor, Tensor]:
        """``order [tokens]``: DnD's order of tokens that stand site by site; ``widths [tokens]``: columns of weights, in DnD's order."""
        starts, start = {}, 0
        for site in self.spec.sites:
            starts[site.name] = start
            start += len(site.layers) * sum(self._pieces(site))
        order, widths = [], []
        for site, row in blocks:
            count = sum(self._pieces(site))
            order.append(torch.arange(count) + starts[site.name] + row * count)
            for pieces, size in zip(self._pieces(site), (site.in_features, site.out_features), strict=True):
                widths.append((size - torch.arange(pieces) * self.width).clamp_max(self.width))
        return torch.cat(order), torch.cat(widths)

    def _cut(self, factor_NLRD: Tensor) -> Tensor:
        """Pieces ``[N, L, pieces, R, width]``, the last one filled up with NaN."""
        missing = -factor_NLRD.shape[-1] % self.width
        padded = F.pad(_wide(factor_NLRD), (0, missing), value=math.nan)
        return padded.unflatten(-1, (-1, self.width)).transpose(2, 3)

    def _normalise(self, weights_NTRC: Tensor) -> tuple[Tensor, Tensor]:
        """Border codes ``[N, tokens, 2]`` and the weights less their mean, divided by their scale."""
        count = (self._widths * self.spec.rank).to(weights_NTRC)
        mean = weights_NTRC.nansum((-2, -1)) / count
        squares = (weights_NTRC - mean[..., None, None]).square().nansum((-2, -1))
        codes, shift, scale = self._scales.encode(mean, (squares / (count - 1).clamp_min(1)).sqrt())
        divisor = torch.where(scale == 0, 1.0, scale)
        return codes, (weights_NTRC - shift[..., None, None]) / divisor[..., None, None]

    def _check_adapters(self, adapters: Adapters) -> None:
        if adapters.spec.sites != self.spec.sites or adapters.spec.rank != self.spec.rank:
            raise AdapterError("the adapters are of another spec than the tokeniser's, other Linears or another rank: make a tokeniser of theirs")
        for site in self.spec.sites:
            for factor, values in (("A", adapters.A[site.name]), ("B", adapters.B[site.name])):
                if not values.isfinite().all():
                    raise AdapterError(f"{factor} of {site.name} holds NaN or infinity, and DnD's tokens use NaN for padding: leave this adapter out")


def default_width(spec: AdapterSpec) -> int:
    """Width of the pieces of a spec's factors.

    The largest common divisor of all their lengths up to 512: DnD's 128, 256 and 512 for Qwen2.5-0.5B, -1.5B and -7B.  Where that is so
    small that tokens would be mostly border, the width that needs the fewest numbers, the last piece of a factor being padded.
    """
    lengths = [(size, len(site.layers)) for site in spec.sites for size in (site.in_features, site.out_features)]
    sizes = [size for size, _ in lengths]
    common = math.gcd(*sizes)
    width = max(divisor for divisor in range(1, min(common, WIDEST) + 1) if common % divisor == 0)
    if width >= NARROWEST or width == min(*sizes, WIDEST):
        return width
    widths = range(2, min(max(sizes), WIDEST) + 2, 2)
    return min(widths, key=lambda width: sum(layers * -(-size // width) for size, layers in lengths) * (width + BORDER))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _join(pieces_NLPRC: Tensor, size: int) -> Tensor:
    """``[N, L, R, size]`` without the padding."""
    return pieces_NLPRC.transpose(2, 3).flatten(-2)[..., :size]


def _read_border(tokens: Tensor) -> Tensor:
    """Codes of the border's two rows, ``[N, tokens, 2, 2]``: the mean along the rows and the one along the columns, averaged.

    Sums are divided, not multiplied by a reciprocal: the mean of equal codes is then that code to the last bit.
    """
    rows, cols = tokens.shape[-2] // 2, tokens.shape[-1] // 2
    across = tokens[..., -BORDER:, :].unflatten(-1, (cols, 2)).sum(-2) / cols
    down = tokens[..., -BORDER:].unflatten(-2, (rows, 2)).sum(-3) / rows
    return (across + down) / 2
