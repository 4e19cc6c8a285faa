"""Configs: parity with transformers' class, validation, recipes, and JSON round trips."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.format import Activation, Format, Scheme
from fewbits.recipe import Recipe, Rule

DTYPES = ("float16", "bfloat16", "float32", "float64")
STORAGES = ("uint8", "int8", *DTYPES)

OPTIONS: dict[str, tuple[Any, ...]] = {
    "loads": ({}, {"load_in_4bit": True}, {"load_in_8bit": True}),
    "llm_int8_threshold": (6.0, 0.0, 3.5),
    "llm_int8_skip_modules": (None, [], ["lm_head", r"layers\.\d+\.mlp"]),
    "llm_int8_enable_fp32_cpu_offload": (False, True),
    "llm_int8_has_fp16_weight": (False, True),
    "bnb_4bit_compute_dtype": (None, "bfloat16", torch.float16),
    "bnb_4bit_quant_type": ("fp4", "nf4"),
    "bnb_4bit_use_double_quant": (False, True),
    "bnb_4bit_quant_storage": (None, torch.bfloat16, "uint8"),
}


def combinations() -> list[dict[str, Any]]:
    products = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    return [{**options.pop("loads"), **options} for options in products]


def quiet(**options: Any) -> BitsAndBytesConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return BitsAndBytesConfig(**options)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("transformers").BitsAndBytesConfig


# --- parity with transformers ---


def test_signature_is_transformers(theirs: Any) -> None:
    ours, other = (inspect.signature(cls.__init__).parameters for cls in (BitsAndBytesConfig, theirs))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in other.values()
    ]


def test_every_combination_equals_transformers(theirs: Any) -> None:
    for options in combinations():
        ours, other = quiet(**options), theirs(**options)
        assert ours.to_dict() == other.to_dict()
        assert ours.to_diff_dict() == other.to_diff_dict()
        assert ours.to_json_string() == other.to_json_string()
        assert ours.to_json_string(use_diff=False) == other.to_json_string(use_diff=False)
        assert dict(ours) == dict(other)
        assert repr(ours) == repr(other)
        assert ours.is_quantizable() == other.is_quantizable()
        assert ours.quantization_method() == other.quantization_method()
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            assert getattr(ours, name) == getattr(other, name)


@pytest.mark.filterwarnings("ignore:.*no effect with:UserWarning")
def test_dictionaries_travel_both_ways(theirs: Any) -> None:
    for options in combinations()[::7]:
        ours, other = quiet(**options), theirs(**options)
        for used in (lambda config: config.to_dict(), lambda config: json.loads(config.to_json_string())):
            assert theirs.from_dict(used(ours)).to_dict() == other.to_dict()
            assert BitsAndBytesConfig.from_dict(used(other)) == ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_dtype_equals_transformers(theirs: Any, dtype: str, storage: str) -> None:
    for spell in (str, lambda name: getattr(torch, name)):
        options = {"bnb_4bit_compute_dtype": spell(dtype), "bnb_4bit_quant_storage": spell(storage)}
        assert BitsAndBytesConfig(load_in_4bit=True, **options).to_dict() == (
            theirs(load_in_4bit=True, **options).to_dict()
        )


def test_json_file_equals_transformers(theirs: Any, tmp_path: Path) -> None:
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    BitsAndBytesConfig(**options).to_json_file(tmp_path / "ours.json")
    theirs(**options).to_json_file(tmp_path / "theirs.json")
    text = (tmp_path / "ours.json").read_text()
    assert text == (tmp_path / "theirs.json").read_text()
    assert json.loads(text)["quant_method"] == "bitsandbytes"
    assert BitsAndBytesConfig.from_dict(json.loads(text)) == BitsAndBytesConfig(**options)


def test_update_and_from_dict_keywords_equal_transformers(theirs: Any) -> None:
    changes = {
        "load_in_4bit": True,
        "llm_int8_threshold": 5.0,
        "torch_dtype": "auto",
        "quant_method": "bitsandbytes",
    }
    for cls in (BitsAndBytesConfig, theirs):
        config = cls()
        assert config.update(**changes) == {"torch_dtype": "auto"}
        assert (config.load_in_4bit, config.llm_int8_threshold) == (True, 5.0)
        other, unused = cls.from_dict({}, return_unused_kwargs=True, **changes)
        assert unused == {"torch_dtype": "auto"}
        assert other.to_dict() == config.to_dict()
        assert cls.from_dict({}, **changes).to_dict() == config.to_dict()


def test_update_leaves_methods_alone() -> None:
    assert BitsAndBytesConfig().update(to_dict=1) == {"to_dict": 1}


def test_routing_key_stays_off_the_instance() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, quant_method="bitsandbytes")
    config.update(quant_method="fewbits_bitsandbytes")
    assert config.quant_method == "fewbits_bitsandbytes"
    assert "quant_method" not in vars(config)
    assert config.to_dict()["quant_method"] == "bitsandbytes"


# --- validation ---

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "both True.*Set the other to False"),
    ({"load_in_4bit": 1}, TypeError, "load_in_4bit must be a bool, got 1. Write True or False"),
    ({"load_in_8bit": "yes"}, TypeError, "load_in_8bit must be a bool, got 'yes'. Write"),
    ({"llm_int8_enable_fp32_cpu_offload": None}, TypeError, "cpu_offload must be a bool, got None. Write"),
    ({"llm_int8_has_fp16_weight": 0}, TypeError, "fp16_weight must be a bool, got 0. Write"),
    ({"bnb_4bit_use_double_quant": 1}, TypeError, "double_quant must be a bool, got 1. Write"),
    ({"llm_int8_threshold": 6}, TypeError, r"must be a finite float.*got 6. Write 6\.0"),
    ({"llm_int8_threshold": "6"}, TypeError, r"got '6'. Write 6\.0"),
    ({"llm_int8_threshold": True}, TypeError, r"got True. Write 6\.0"),
    ({"llm_int8_threshold": -1.0}, ValueError, r"got -1.0. Write 6\.0, or 0\.0"),
    ({"llm_int8_threshold": float("nan")}, ValueError, "got nan. Write"),
    ({"llm_int8_threshold": float("inf")}, ValueError, "got inf. Write"),
    ({"llm_int8_skip_modules": "lm_head"}, TypeError, r"list of str, got 'lm_head'. Write \[\"lm_head\"\]"),
    (
        {"llm_int8_skip_modules": [1]},
        TypeError,
        "llm_int8_skip_modules must name modules by str, got 1. Write",
    ),
    (
        {"llm_int8_skip_modules": ["*.mlp"]},
        ValueError,
        r"has '\*.mlp', which is no regular expression.*Escape",
    ),
    ({"bnb_4bit_quant_type": 4}, TypeError, 'must be "nf4" or "fp4", got 4. Write'),
    ({"bnb_4bit_quant_type": "NF4"}, ValueError, "got 'NF4'. Write \"nf4\""),
    ({"bnb_4bit_quant_type": "fp8"}, ValueError, "got 'fp8'. Write \"fp4\""),
    (
        {"bnb_4bit_compute_dtype": "int8"},
        ValueError,
        "bnb_4bit_compute_dtype cannot be 'int8'. Write one of float16",
    ),
    ({"bnb_4bit_compute_dtype": torch.int64}, ValueError, "cannot be torch.int64. Write one of"),
    ({"bnb_4bit_compute_dtype": torch.float8_e4m3fn}, ValueError, "cannot be torch.float8_e4m3fn. Write"),
    ({"bnb_4bit_compute_dtype": "bf16"}, ValueError, "cannot be 'bf16'. Write"),
    ({"bnb_4bit_compute_dtype": 16}, ValueError, "cannot be 16. Write"),
    (
        {"bnb_4bit_quant_storage": "int4"},
        ValueError,
        "bnb_4bit_quant_storage cannot be 'int4'. Write one of uint8",
    ),
    ({"bnb_4bit_quant_storage": torch.int32}, ValueError, "cannot be torch.int32. Write one of"),
    ({"bnb_4bit_quant_storage": ""}, ValueError, "cannot be ''. Write one of"),
    (
        {"load_in_4bits": True},
        TypeError,
        "Unknown .* 'load_in_4bits'. Did you mean 'load_in_4bit'?.*remove it",
    ),
    ({"bnb_4bit_quant_typ": "nf4"}, TypeError, "Did you mean 'bnb_4bit_quant_type'"),
    ({"quant_method": "gptq"}, ValueError, "'gptq'; it describes 'bitsandbytes'. Use the config class"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_impossible_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BitsAndBytesConfig(**options)


@pytest.mark.parametrize(("options", "error"), [bad[:2] for bad in BAD], ids=[str(bad[0]) for bad in BAD])
def test_where_transformers_refuses_the_error_is_the_same(
    theirs: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    refusal: type[Exception] = error
    try:
        theirs(**options)
    except Exception as refused:
        refusal = type(refused)
    # An unknown dtype name is an AttributeError there.
    assert refusal in (error, AttributeError)


@pytest.mark.parametrize(("load", "other"), list(itertools.permutations(("load_in_4bit", "load_in_8bit"))))
def test_setters_are_checked(load: str, other: str) -> None:
    config = BitsAndBytesConfig(**{load: True})
    with pytest.raises(ValueError, match="both True"):
        setattr(config, other, True)
    with pytest.raises(TypeError, match=f"{other} must be a bool, got 1"):
        setattr(config, other, 1)
    setattr(config, load, False)
    setattr(config, other, True)
    assert (getattr(config, load), getattr(config, other)) == (False, True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"},
            "bnb_4bit_quant_type: no effect with load_in_8bit",
        ),
        ({"load_in_8bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, "bnb_4bit_compute_dtype"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant"),
        ({"load_in_8bit": True, "bnb_4bit_quant_storage": "int8"}, "bnb_4bit_quant_storage"),
        (
            {"load_in_4bit": True, "llm_int8_threshold": 5.0},
            "llm_int8_threshold: no effect with load_in_4bit",
        ),
        ({"load_in_4bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
)
def test_options_without_effect_warn(options: dict[str, Any], named: str) -> None:
    for build in (lambda: BitsAndBytesConfig(**options), lambda: BitsAndBytesConfig.from_dict(options)):
        with pytest.warns(UserWarning, match=named) as caught:
            build()
        assert [warning.filename for warning in caught] == [__file__]


def test_options_with_effect_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    for load in ("load_in_4bit", "load_in_8bit"):
        BitsAndBytesConfig.from_dict(BitsAndBytesConfig(**{load: True}).to_dict())
        BitsAndBytesConfig(llm_int8_skip_modules=["a"], llm_int8_enable_fp32_cpu_offload=True, **{load: True})
    assert not recwarn.list


# --- objects ---


@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(
            load_in_4bit=True, llm_int8_skip_modules=["lm_head"], bnb_4bit_quant_storage="bfloat16"
        ),
        FewbitsConfig("int4:g32", {"lm_head": "skip", "embed": "int8"}, torch.bfloat16),
    ],
)
def test_copies_and_pickles_are_equal(config: Any) -> None:
    for twin in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        type(config).from_dict(config.to_dict()),
    ):
        assert twin is not config
        assert twin == config
        assert twin != type(config)()
        assert twin.to_recipe() == config.to_recipe()
    assert config != config.to_dict()


def test_dictionaries_do_not_share_state() -> None:
    config = BitsAndBytesConfig(llm_int8_skip_modules=["a"])
    config.to_dict()["llm_int8_skip_modules"].append("b")
    assert config.llm_int8_skip_modules == ["a"]


def test_works_without_transformers() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import fewbits.config as c
config = c.BitsAndBytesConfig(load_in_4bit=True)
assert c.BitsAndBytesConfig.from_dict(config.to_dict()) == config
assert str(config.to_recipe().rules[-1].scheme) == "fp4:g64"
assert c.FewbitsConfig.from_dict(c.FewbitsConfig().to_dict()) == c.FewbitsConfig()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- recipes ---


@pytest.mark.parametrize(("quant_type", "double"), list(itertools.product(("nf4", "fp4"), (False, True))))
def test_recipe_of_4bit(quant_type: str, double: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=["lm_head", "embed"],
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage=torch.float16,
    )
    weight = Format.parse(f"{quant_type}:g64" + ":dq" * double)
    assert config.to_recipe() == Recipe(
        (
            Rule("lm_head", None, "llm_int8_skip_modules"),
            Rule("embed", None, "llm_int8_skip_modules"),
            Rule(".*", Scheme(weight, None, "bfloat16", "float16"), "load_in_4bit"),
        )
    )


@pytest.mark.parametrize("fp16_weight", [False, True])
def test_recipe_of_8bit(fp16_weight: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=5.5, llm_int8_has_fp16_weight=fp16_weight
    )
    scheme = Scheme(Format.parse("int8:row"), Activation(5.5), trainable=fp16_weight)
    recipe = config.to_recipe()
    assert recipe == Recipe((Rule(".*", scheme, "load_in_8bit"),))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_fewbits_config_refuses_weights_to_train_and_names_the_config_for_them() -> None:
    scheme = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True).to_recipe().rules[0].scheme
    for options in ({"format": scheme}, {"modules": {"mlp": scheme}}):
        with pytest.raises(ValueError, match="cannot train weights; use BitsAndBytesConfig"):
            FewbitsConfig(**options)


def test_recipe_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"load_in_4bit=False and load_in_8bit=False.*Set one of the two"):
        BitsAndBytesConfig().to_recipe()


def test_default_fewbits_config() -> None:
    config = FewbitsConfig()
    assert config.to_dict() == {
        "quant_method": "fewbits",
        "version": 1,
        "format": "nf4:g64:dq",
        "modules": {},
        "compute_dtype": None,
    }
    assert config.to_diff_dict() == {}
    assert config.quantization_method() == "nf4:g64:dq"
    assert config.to_recipe() == Recipe((Rule(".*", Scheme(Format.parse("nf4:g64:dq")), "format"),))


def test_recipe_of_fewbits_config() -> None:
    modules = {
        "lm_head": "int8",
        "embed": None,
        "mlp": Format.parse("int4:g32"),
        "attn": "int8:row@int8:t6",
        "norm": {"format": "nf4", "compute_dtype": None, "storage_dtype": "int8"},
    }
    assert FewbitsConfig(None, modules, "bfloat16").to_recipe() == Recipe(
        (
            Rule("lm_head", Scheme(Format.parse("int8"), compute_dtype="bfloat16"), 'modules["lm_head"]'),
            Rule("embed", None, 'modules["embed"]'),
            Rule("mlp", Scheme(Format.parse("int4:g32"), compute_dtype="bfloat16"), 'modules["mlp"]'),
            Rule("attn", Scheme(Format.parse("int8"), Activation(6.0)), 'modules["attn"]'),
            Rule("norm", Scheme(Format.parse("nf4"), storage_dtype="int8"), 'modules["norm"]'),
            Rule(".*", None, "format"),
        )
    )


def test_scheme_objects_name_their_own_dtype() -> None:
    config = FewbitsConfig(Scheme(Format.parse("nf4")), {"a": "nf4"}, "float16")
    dtypes = [rule.scheme.compute_dtype for rule in config.to_recipe().rules if rule.scheme]
    assert dtypes == ["float16", None]
    assert config.format == {"format": "nf4:g64", "compute_dtype": None}


def test_order_of_modules_survives_sorted_json() -> None:
    config = FewbitsConfig("skip", {"mlp.up": "int8", "mlp": "nf4"})
    stored = config.to_dict()
    assert stored["modules"] == [["mlp.up", "int8:row"], ["mlp", "nf4:g64"]]
    again = FewbitsConfig.from_dict(json.loads(json.dumps(stored, sort_keys=True)))
    assert again.to_recipe() == config.to_recipe()
    assert FewbitsConfig("skip", {"a": "int8", "b": "nf4"}).to_dict()["modules"] == {
        "a": "int8:row",
        "b": "nf4:g64",
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fromat": "nf4"}, TypeError, "Unknown FewbitsConfig option 'fromat'. Did you mean 'format'"),
        ({"version": 2}, ValueError, "version 2, but this fewbits reads versions up to 1. Upgrade fewbits"),
        ({"version": "1"}, ValueError, "version '1'"),
        ({"quant_method": "bitsandbytes"}, ValueError, "'bitsandbytes'; it describes 'fewbits'. Use"),
        ({"format": "nf5"}, ValueError, "FewbitsConfig format: unknown format 'nf5'.*did you mean 'nf4'"),
        ({"format": 4}, TypeError, "FewbitsConfig format must be a Format.*got 4. Write"),
        ({"modules": {"a": "int8:g0"}}, ValueError, r'modules\["a"\]: int8 cannot have groups'),
        ({"modules": {"a(": "int8"}}, ValueError, r"has 'a\(', which is no regular expression.*Escape"),
        ({"modules": {1: "int8"}}, TypeError, "FewbitsConfig modules must name modules by str, got 1. Write"),
        ({"modules": "nf4"}, TypeError, "must map patterns to formats, got 'nf4'. Write"),
        ({"modules": 5}, TypeError, "must map patterns to formats, got 5. Write"),
        ({"modules": [["a", "nf4"], ["a", "fp4"]]}, ValueError, "names 'a' twice. Remove one"),
        ({"modules": {"a": {"compute_dtype": None}}}, ValueError, 'needs a spelling under "format".*Write'),
        ({"modules": {"a": {"format": "skip"}}}, ValueError, 'or "skip" in place of the object'),
        ({"modules": {"a": {"format": "nf4", "storage": 1}}}, TypeError, "Did you mean 'storage_dtype'"),
        (
            {"modules": {"a": {"format": "nf4", "storage_dtype": "int4"}}},
            ValueError,
            r'modules\["a"\] storage_dtype cannot be \'int4\'. Write one of uint8',
        ),
        ({"compute_dtype": "int8"}, ValueError, "FewbitsConfig compute_dtype cannot be 'int8'. Write one of"),
    ],
)
def test_impossible_fewbits_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FewbitsConfig(**options)


def test_methods_of_fewbits_config() -> None:
    config = FewbitsConfig(None, {"lm_head": "int8"})
    assert config.is_quantizable()
    assert config.quantization_method() is None
    assert not FewbitsConfig("skip").is_quantizable()
    assert config.update(compute_dtype="float16", dtype=1) == {"dtype": 1}
    assert config.to_dict()["compute_dtype"] == "float16"
    assert config.quant_method == dict(config)["quant_method"] == "fewbits"


# --- round trips ---

SPELLINGS = (
    "nf4:g64",
    "nf4:g64:dq",
    "fp4:g128:dq",
    "nf4:g32:bf16",
    "int8:row",
    "int8:row@int8",
    "int8:row@int8:t6",
    "int8:row@int8:t3.5",
    "int4:g128:f16:zero",
    "int3:g64",
    "int2:g32:zero",
    "fp8_e4m3:b128x128",
    "fp8_e5m2:tensor",
    "mxfp4",
    "nvfp4",
)
dtypes = st.sampled_from([None, "float32", "bfloat16", "float16", "float64"])
schemes = st.builds(
    lambda text, compute, storage: Scheme(
        Scheme.parse(text).weight, Scheme.parse(text).activation, compute, storage
    ),
    st.sampled_from(SPELLINGS),
    dtypes,
    st.sampled_from(STORAGES),
)
entries = st.one_of(st.none(), st.just("skip"), st.sampled_from(SPELLINGS), schemes)
patterns = st.sampled_from(["lm_head", "mlp", r"layers\.\d+\.mlp", "embed_tokens", "model.*up_proj", "a|b"])


@given(entries, st.dictionaries(patterns, entries), dtypes)
def test_fewbits_config_round_trips(default: Any, modules: dict[str, Any], dtype: str | None) -> None:
    config = FewbitsConfig(default, modules, dtype)
    recipe = config.to_recipe()
    assert [rule.pattern for rule in recipe.rules] == [*modules, ".*"]
    for stored in (json.loads(config.to_json_string(use_diff=False)), json.loads(config.to_json_string())):
        assert FewbitsConfig.from_dict(stored) == config
        assert FewbitsConfig.from_dict(stored).to_recipe() == recipe
    assert FewbitsConfig.from_recipe(recipe).to_recipe() == recipe


@given(schemes)
def test_scheme_objects_are_kept_exactly(scheme: Scheme) -> None:
    config = FewbitsConfig(scheme, {"a": scheme}, "bfloat16")
    assert [rule.scheme for rule in config.to_recipe().rules] == [scheme, scheme]


@pytest.mark.filterwarnings("ignore:.*no effect with:UserWarning")
def test_recipes_of_bitsandbytes_survive() -> None:
    for options in combinations()[::31]:
        config = quiet(**options)
        if config.is_quantizable() and not (config.load_in_8bit and config.llm_int8_has_fp16_weight):
            recipe = config.to_recipe()
            again = FewbitsConfig.from_dict(FewbitsConfig.from_recipe(recipe).to_dict()).to_recipe()
            assert [(r.pattern, r.scheme) for r in again.rules] == [
                (r.pattern, r.scheme) for r in recipe.rules
            ]


def test_from_recipe_drops_rules_that_are_never_reached() -> None:
    nf4, int8 = Scheme(Format.parse("nf4")), Scheme(Format.parse("int8"))
    rules = (Rule("a", nf4, ""), Rule("a", int8, ""), Rule(".*", int8, ""), Rule("b", nf4, ""))
    config = FewbitsConfig.from_recipe(Recipe(rules))
    assert (config.format, config.modules) == ("int8:row", {"a": "nf4:g64"})
    assert FewbitsConfig.from_recipe(Recipe(())).format == "skip"
