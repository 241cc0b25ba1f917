"""Skipping attention at random in training, and never elsewhere."""

from __future__ import annotations

import torch

from families import tiny_model, tokens
from limbeck.students.stochastic_depth import skip_attention


def test_it_skips_whole_rows_in_training_and_nothing_in_evaluation() -> None:
    model = tiny_model("qwen3")
    ids = tokens(4, 9)
    with torch.no_grad():
        before = model.eval()(ids, use_cache=False).logits
        skip_attention(model, 0.9)
        assert torch.equal(model(ids, use_cache=False).logits, before)
        model.train()
        torch.manual_seed(0)
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(model(ids, use_cache=False).logits, first), "a resumed run draws the same"


def test_compiled_layers_skip_too() -> None:
    """Layers share compiled code, and hooks are no part of what tells them apart."""
    model = tiny_model("qwen3").train()
    skip_attention(model, 0.9)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    ids = tokens(4, 9)
    torch.manual_seed(0)
    first, second = (model(ids, use_cache=False).logits for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(ids, use_cache=False).logits, first)


def test_the_probability_grows_with_depth_from_none() -> None:
    model = tiny_model("qwen3").train()
    skip_attention(model, 0.8)
    ids, skipped, entered = tokens(64, 5), [], []
    layers = model.model.layers
    for layer in layers:
        # What attention adds to the residual stream, seen at the door of the next norm.
        layer.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda m, args: skipped.append(((args[0] - entered[-1]).abs().sum((1, 2)) == 0).float().mean())
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(8):
            model(ids, use_cache=False)
    shares = torch.stack(skipped).view(8, len(layers)).mean(0)
    wanted = 0.8 * torch.arange(len(layers)) / (len(layers) - 1)
    assert shares[0] == 0
    assert (shares - wanted).abs().max() < 0.08
