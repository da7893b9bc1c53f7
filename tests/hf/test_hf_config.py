"""The section `config.spattention`, and the rows that stand in for a mask."""

from __future__ import annotations

import copy
import importlib
import json
import pickle

import pytest
import torch
import transformers
from tiny import FIRST, HEADS, SECOND, P, banded

import spattention as spa
from spattention.hf.config import Section, read_section, section_of
from spattention.hf.mask import add_restarts, decode, dense_mask, rows_mask

GOOD = {"version": 1, "patterns": [FIRST.to_dict()], "layers": [0, None], "sinks": False}


def test_the_section_is_what_the_design_says():
    model = banded("llama", (FIRST, None), sinks=True)
    stored = json.loads(model.config.to_json_string())
    assert stored["spattention"] == {
        "version": 1,
        "patterns": [FIRST.to_dict()],
        "layers": [0, None],
        "sinks": True,
    }
    assert stored["attn_implementation"] == "spattention"
    both = section_of([FIRST, SECOND, None, FIRST], sinks=False)
    assert both["layers"] == [0, 1, None, 0]
    assert both.layer_patterns == (FIRST, SECOND, None, FIRST)


def test_the_section_is_parsed_once():
    config = transformers.LlamaConfig(num_hidden_layers=2, spattention=dict(GOOD))
    section = read_section(config)
    assert isinstance(section, Section)
    assert read_section(config) is section
    assert section == GOOD
    assert copy.deepcopy(config).spattention is section
    again = pickle.loads(pickle.dumps(section))
    assert again == section
    assert again.layer_patterns == section.layer_patterns
    assert read_section(transformers.LlamaConfig()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"must have version 1 .* got 2"),
        ({"sinks": 1}, "must have a bool for `sinks`, got 1"),
        ({"more": 1}, r"must have the entries .* got .*'more'"),
        ({"layers": [0]}, r"one entry of `layers` per text layer, 2, got \[0\]"),
        ({"layers": [0, 1]}, r"None or an index below 1 .* got 1"),
        ({"layers": [0, True]}, "got True"),
        ({"patterns": 3}, "must have a list of `patterns`, got 3"),
        ({"patterns": [{"version": 1}]}, "the pattern lacks"),
    ],
)
def test_a_wrong_section_is_refused(change, message):
    spa.hf.register()
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        intermediate_size=16,
        vocab_size=8,
        spattention={**GOOD, **change},
    )
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="spattention")


def test_a_section_must_be_a_mapping():
    with pytest.raises(ValueError, match=r"`config\.spattention` must be a mapping, got list"):
        read_section(transformers.LlamaConfig(spattention=[1]))


def test_heads_of_a_section_must_match():
    spa.hf.register()
    wrong = section_of([P.dense(2, 8)], sinks=False)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        intermediate_size=16,
        vocab_size=8,
        spattention=dict(wrong),
    )
    with pytest.raises(ValueError, match="`pattern` has 2 heads but layer 0 of the model has 4"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="spattention")


def test_a_plain_row_needs_no_mask():
    assert rows_mask(2, 8, 8) is None
    assert rows_mask(2, 3, 8, q_offset=5) is None


def test_rows_show_that_a_mask_was_given():
    """Dropped because it was all ones, it let `position_ids` split rows on the CPU alone."""
    ones = torch.ones(2, 8, dtype=torch.bool)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    for q_offset in (0, torch.tensor(0)):
        given = rows_mask(2, 8, 8, q_offset=q_offset, attention_mask=ones)
        assert decode(given).padded
        assert add_restarts(given, positions, 2, 8) is given
        absent = rows_mask(2, 8, 8, q_offset=q_offset)
        assert not decode(absent).padded
        split = decode(add_restarts(absent, positions, 2, 8))
        assert split.key_start.tolist() == [[0, 0, 0, 0, 4, 4, 4, 4]] * 2
        assert not split.padded


def test_rows_are_never_queries_times_keys():
    ones = torch.ones(2, 4096, dtype=torch.bool)
    assert rows_mask(2, 4096, 4096, attention_mask=ones).tolist() == [[[[0]]], [[[0]]]]
    assert rows_mask(1, 6, 9, q_offset=0).tolist() == [[[[0, 0]]]]
    mask = ones.clone()
    mask[1, :7] = False
    assert rows_mask(2, 4096, 4096, attention_mask=mask).shape == (2, 2, 4096, 1)
    static = rows_mask(2, 1, 9000, q_offset=torch.tensor(4095), attention_mask=mask)
    assert static.tolist() == [[[[0, 4095, 4095]]], [[[7, 4095, 4088]]]]
    windowed = rows_mask(2, 1, 4, q_offset=8, kv_offset=5, attention_mask=mask[:, :9])
    assert windowed.tolist() == [[[[0]]], [[[2]]]]
    mask[0, 9] = False
    assert rows_mask(2, 4096, 4096, attention_mask=mask).shape == (2, 3, 4096, 1)


def test_rows_say_where_padding_lies():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    rows = decode(rows_mask(3, 2, 5, q_offset=3, attention_mask=mask))
    assert rows.key_start.tolist() == [2, 1, 5]  # once padding has moved
    assert rows.source.tolist() == [[0, 3, 1, 2, 4], [4, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert rows.valid_queries(2).tolist() == [[False, True], [True, False], [False, False]]
    assert rows.query_start is None
    static = decode(rows_mask(3, 2, 8, q_offset=torch.tensor(3), attention_mask=mask))
    assert static.source[:, 5:].tolist() == [[5, 6, 7]] * 3  # not filled yet
    assert static.source[:, :5].tolist() == rows.source.tolist()
    assert static.valid_queries(2).tolist() == rows.valid_queries(2).tolist()
    assert static.before.tolist() == [2, 3, 0]
    # Only at the ends of rows: where keys lie, they stay.
    ends = decode(rows_mask(3, 5, 5, attention_mask=mask | torch.tensor([[0, 0, 0, 1, 0]]).bool()))
    assert ends.source is None
    assert ends.key_start.tolist() == [1, 0, 3]


def test_restarts_begin_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert decode(add_restarts(None, positions, 1, 6)).key_start.tolist() == [[0, 0, 0, 3, 3, 5]]
    assert add_restarts(None, torch.arange(6)[None], 1, 6) is None
    # After four keys in the cache: the first document goes on, the others start among the new ones.
    late = decode(add_restarts(None, torch.tensor([[4, 5, 0, 1]]), 2, 8))
    assert late.key_start.tolist() == [[0, 0, 6, 6]] * 2
    static = torch.tensor([[[[3, 4]]]], dtype=torch.int32)
    rows = decode(add_restarts(static, torch.tensor([[4, 5, 0, 1]]), 1, 0))
    assert rows.key_start.tolist() == [[3, 3, 6, 6]]
    assert int(rows.query_start) == 4


def test_the_mask_of_a_layer_left_alone():
    rows = decode(torch.tensor([[[[1]]]], dtype=torch.int32))
    assert dense_mask(rows, 2, 4, 2, torch.device("cpu")).int().tolist() == [
        [[[0, 1, 1, 0], [0, 0, 1, 1]]]
    ]


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs Transformers: install `spattention\[hf\]`"):
        importlib.reload(spa.hf)
