"""A mixer's state counts tokens, follows beams, and says what it cannot do."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from limbeck.errors import ModelError
from limbeck.models.state import MixerState, mixer_state


def _written() -> MixerState:
    state = MixerState()
    state.write(5, memory=torch.arange(6.0).view(3, 2), tail=None)
    return state


def test_a_state_counts_the_tokens_it_has_seen() -> None:
    state = _written()
    state.write(2)
    assert state.get_seq_length() == 7
    assert state.get_mask_sizes(4) == (11, 0)
    assert state.get_max_length() == -1
    assert state.read("tail") is None
    assert state.num_bytes() == 24


def test_rows_follow_beams_repeats_and_selections() -> None:
    state = _written()
    state.reorder_cache(torch.tensor([2, 0, 0]))
    assert state.read("memory").tolist() == [[4, 5], [0, 1], [0, 1]]
    state.batch_repeat_interleave(2)
    assert state.read("memory")[:, 0].tolist() == [4, 4, 0, 0, 0, 0]
    state.batch_select_indices(torch.tensor([0, 5]))
    assert state.read("memory")[:, 0].tolist() == [4, 0]


def test_a_reset_state_is_a_new_one() -> None:
    state = _written()
    state.reset()
    assert (state.seen, state.states, state.is_initialized) == (0, {}, False)


def test_what_a_state_cannot_do_is_said_in_words() -> None:
    with pytest.raises(ModelError, match="cannot be rewound"):
        _written().crop(-1)
    with pytest.raises(ModelError, match="new_cache"):
        _written().update(torch.zeros(1), torch.zeros(1))
    assert not _written().is_croppable


def test_a_plain_cache_in_front_of_a_mixer_is_an_error_and_not_a_lost_state() -> None:
    with pytest.raises(ModelError, match="new_cache"):
        mixer_state(DynamicCache(), 0)
    assert mixer_state(None, 0) is None
    cache = DynamicCache()
    cache.layers.append(MixerState())
    assert mixer_state(cache, 0) is cache.layers[0]
