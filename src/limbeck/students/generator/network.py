"""The generator's network: condition states in, factors out.  It knows nothing of the base but the shapes of its Linears."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.adapters.dnd import DnDTokenizer
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.students.generator.blocks import ConditionReader, full_precision
from limbeck.students.generator.heads import Factors, QueryDecoder, Static
from limbeck.students.generator.hyperconv import HyperConvDecoder


class Generator(nn.Module):
    """``(states [N, S, C, D], mask [N, S, C]) -> (A, B)``, in fp32 whatever the base's dtype.

    ``text_shape`` is (S, C), which the hyper-convolutional decoder is made for.
    """

    def __init__(self, spec: AdapterSpec, options: LoraGeneratorOptions, state_size: int, text_shape: tuple[int, int]):
        super().__init__()
        self.spec = spec
        self.static: Static | None = None
        self.reader: ConditionReader | None = None
        self.decoder: nn.Module | None = None
        if options.decoder == "hyperconv":
            self.tokenizer = DnDTokenizer(spec)
            texts, tokens = text_shape
            # A sentence encoder's own tokenizer may cut a text finer.
            tokens *= 2 if options.condition == "sentence" else 1
            self.decoder = HyperConvDecoder(texts, tokens, state_size, self.tokenizer.num_tokens, self.tokenizer.token_shape)
            return
        self.static = Static(spec)
        if options.condition != "none":
            self.reader = ConditionReader(state_size, options.width, options.reader)
            self.decoder = QueryDecoder(spec, options)

    def begin_as(self, adapters: Adapters) -> None:
        """Every condition starts with this LoRA."""
        assert self.static is not None, "options refuse `start` for a decoder that has no static part"
        self.static.begin_as(adapters)
        if isinstance(self.decoder, QueryDecoder):
            self.decoder.add_nothing()

    def forward(self, states_NSCD: Tensor, mask_NSC: Tensor) -> Factors:
        """The factors; plain mappings, since sharding looks for tensors in them."""
        with full_precision(states_NSCD.device):
            if self.static is None:
                assert self.decoder is not None
                adapters = self.tokenizer.detokenize(self.decoder(states_NSCD.float(), mask_NSC))
                return dict(adapters.A), dict(adapters.B)
            static = self.static(len(states_NSCD))
            if self.reader is None or self.decoder is None:
                return static
            return self.decoder(self.reader(states_NSCD, mask_NSC), static)
