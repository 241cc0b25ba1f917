"""The short convolution: equal to a library convolution, and blind across documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.ops.convolution import short_convolution


@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_a_causal_depthwise_convolution(width: int, double: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 11, 5), torch.randn(5, width)
    expected = F.conv1d(x.mT, weight[:, None], padding=width - 1, groups=5)[..., :11].mT
    found, tail = short_convolution(x, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(tail, x[:, 11 - width + 1 :].mT)


@pytest.mark.parametrize("width", [2, 4])
def test_packed_documents_equal_separate_documents(width: int, double: None) -> None:
    torch.manual_seed(0)
    lengths = (1, 6, 2, 9)
    x = torch.randn(1, sum(lengths), 3, requires_grad=True)
    weight = torch.randn(3, width, requires_grad=True)
    tail = torch.randn(1, 3, width - 1)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    found, end = short_convolution(x, weight, documents_BT=documents, tail_BCW=tail)
    parts, last = [], tail
    for part in x.split(lengths, 1):
        y, last = short_convolution(part, weight, tail_BCW=last)
        parts.append(y)
        expected_end, last = last, None
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(end, expected_end)
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), direction), torch.autograd.grad(expected, (x, weight), direction), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pieces", [(13,), (5, 8), (1,) * 13, (2, 1, 10)])
def test_a_row_in_pieces_equals_the_row(pieces: tuple[int, ...], double: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 13, 3), torch.randn(3, 4)
    expected, expected_tail = short_convolution(x, weight)
    outputs, tail = [], None
    for part in x.split(pieces, 1):
        y, tail = short_convolution(part, weight, tail_BCW=tail)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    torch.testing.assert_close(tail, expected_tail)


@pytest.mark.parametrize("tokens", [2, 9])
def test_padding_at_either_end_changes_nothing(tokens: int, double: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, tokens, 3), torch.randn(3, 4)
    expected, expected_tail = short_convolution(x, weight)
    padded = torch.randn(1, tokens + 7, 3)
    padded[:, 5:-2] = x
    documents = torch.tensor([[-1] * 5 + [0] * tokens + [-1] * 2])
    found, tail = short_convolution(padded, weight, documents_BT=documents)
    torch.testing.assert_close(found[:, 5:-2], expected)
    torch.testing.assert_close(tail, expected_tail)
    assert not found[:, :5].any() and not found[:, -2:].any()


def test_a_row_of_padding_hands_the_tail_on(double: None) -> None:
    tail = torch.randn(1, 3, 3)
    _, found = short_convolution(torch.randn(1, 4, 3), torch.randn(3, 4), documents_BT=torch.full((1, 4), -1), tail_BCW=tail)
    torch.testing.assert_close(found, tail)


def test_the_dtype_of_the_input_stays() -> None:
    x = torch.randn(1, 5, 3, dtype=torch.bfloat16)
    for documents in (None, torch.zeros(1, 5, dtype=torch.int64)):
        found, tail = short_convolution(x, torch.randn(3, 4), documents_BT=documents)
        assert found.dtype == tail.dtype == torch.bfloat16
