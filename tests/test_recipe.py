"""Which weight gets which scheme: patterns, order, skips, JSON."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from fewbits.format import Scheme
from fewbits.recipe import Recipe, Rule

WORDS = ["model", "layers", "1", "11", "mlp", "mlp_norm", "q_proj", "lm_head", "gate", "gate_proj", "experts"]
PIECES = [*WORDS, ".", ".*", r"\d+", "|", "+", "layers.1", "(1|11)", "[qk]_proj", "^model", "head$", "_proj"]
names = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)
patterns = st.one_of(
    names,
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(".".join),
)
NF4, INT8 = Scheme.parse("nf4:g64"), Scheme.parse("int8:row@int8:t6")


def compiles(pattern: str) -> bool:
    try:
        re.compile(f"(?:{pattern})")
    except re.error:
        return False
    return True


@settings(max_examples=1500, deadline=None)
@given(names, patterns.filter(compiles))
def test_a_pattern_covers_what_transformers_would_skip(name, pattern):
    assert Rule(pattern, None, "").matches(name) == (not should_convert_module(name, [pattern]))


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("model.layers.1", "model.layers.1.mlp", True),
        ("model.layers.1", "model.layers.11.mlp", False),
        ("model.layers.1", "model.layers.1", True),
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn", "model.layers.0.self_attn.q_proj", False),
        (r"model\.layers\.\d+\.mlp", "model.layers.7.mlp.up_proj", True),
        ("model.layers.*.mlp", "model.layers.7.mlp.up_proj", True),
        ("mlp.gate", "mlp.gate_proj", False),
        ("lm_head|embed", "lm_head", True),
        (".*", "anything.at.all", True),
        ("lm_head", "lm_head_norm", False),
    ],
)
def test_patterns_stop_at_module_boundaries(pattern, name, covered):
    assert Rule(pattern, NF4, "").matches(name) is covered


def test_the_first_rule_that_matches_decides():
    recipe = Recipe((Rule("a.b", None, "first"), Rule("a", NF4, "second"), Rule(".*", INT8, "third")))
    assert [recipe.match(name).reason for name in ("a.b", "a.b.c", "a", "a.c", "x")] == [
        "first", "first", "second", "second", "third",
    ]  # fmt: skip
    assert recipe.match("a.c").scheme == NF4
    assert recipe.match("a.b").scheme is None


def test_what_no_rule_covers_is_kept_and_the_reason_says_so():
    rule = Recipe((Rule("a", NF4, "named"),)).match("b")
    assert (rule.scheme, rule.reason) == (None, "not named by the recipe")
    assert Recipe(()).match("b").scheme is None


def test_only_rules_of_their_own_name_a_module():
    recipe = Recipe((Rule("a", None, "kept"), Rule("b", NF4, "named"), Rule(".*", INT8, "default")))
    assert recipe.named("a") == Rule("a", None, "kept")
    assert recipe.named("b").scheme == NF4
    assert recipe.named("c") is None
    assert Recipe((Rule("b", NF4, "named"),)).named("c") is None


def test_skips_yield_to_named_rules_but_not_to_the_default():
    recipe = Recipe((Rule(".*", NF4, "default"), Rule("head", INT8, "named"), Rule("never", None, "reached")))
    skipping = recipe.with_skips({"head": "the output", "norm": "small"})
    assert [rule.reason for rule in skipping.rules] == ["named", "reached", "the output", "small", "default"]
    assert skipping.match("head").scheme == INT8
    assert (skipping.match("norm").scheme, skipping.match("norm").reason) == (None, "small")
    assert skipping.match("other").scheme == NF4
    assert recipe.rules[0].reason == "default", "the recipe itself is unchanged"


def test_no_skips_change_only_the_place_of_the_default():
    recipe = Recipe((Rule("a", NF4, "named"), Rule(".*", INT8, "default")))
    assert recipe.with_skips({}) == recipe


schemes = st.none() | st.builds(
    lambda text, computed, storage: dataclasses.replace(
        Scheme.parse(text), compute_dtype=computed, storage_dtype=storage
    ),
    st.sampled_from(["nf4:g64:dq", "int8:row@int8:t6.5", "int8:row@int8", "int4:g128:f16:zero", "nvfp4"]),
    st.sampled_from([None, "bfloat16", "float32"]),
    st.sampled_from(["uint8", "bfloat16"]),
)
recipes = st.lists(st.builds(Rule, patterns, schemes, st.text()), max_size=5).map(lambda r: Recipe(tuple(r)))


@settings(max_examples=200, deadline=None)
@given(recipes)
def test_recipes_come_back_from_json(recipe):
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_the_json_of_a_recipe():
    recipe = Recipe((Rule("head", None, "kept"), Rule(".*", INT8, "format")))
    assert recipe.to_json() == [
        {"pattern": "head", "scheme": None, "reason": "kept"},
        {
            "pattern": ".*",
            "scheme": {"format": "int8:row@int8:t6", "compute_dtype": None, "storage_dtype": "uint8"},
            "reason": "format",
        },
    ]


def test_recipes_are_immutable_and_hashable():
    recipe = Recipe((Rule("a", NF4, "b"),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rules = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rules[0].scheme = None
    assert hash(recipe) == hash(Recipe((Rule("a", Scheme.parse("nf4"), "b"),)))
