"""The promises about the code itself: which way imports go, how large things get, what is never called."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCE = REPO / "src"
PACKAGE = "fewbits"

# Each layer may import from those above it, and a module from its own package.
LAYERS = (
    ("codebook", "machine"),
    ("format",),
    ("tensor",),
    ("packing", "columns"),
    ("reference", "moments"),
    ("backends",),
    ("ops",),
    ("nn", "algorithms", "optim"),
    ("experts",),
    ("recipe", "int8_training"),
    ("config", "report"),
    ("planner", "model", "checkpoint", "evaluate", "training"),
    ("distributed",),
    ("integrations",),
    ("cli",),
    ("__main__",),
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}

# Packages that only some parts may import; the rest must work, and load, without them.
FOREIGN = {
    "transformers": ("integrations", "cli"),
    "peft": ("integrations", "cli"),
    "accelerate": ("integrations", "cli"),
    "bitsandbytes": ("integrations", "cli"),
    "triton": ("backends.triton",),
    "typer": ("cli",),
    "rich": ("cli",),
    "matplotlib": ("cli.page",),
    "jinja2": ("cli.page",),
}
NOT_LOADED_BY_IMPORT = (
    *("transformers", "peft", "accelerate", "triton", "bitsandbytes", "matplotlib"),
    "fewbits.optim",
)

# These repeat the signatures of other packages, open ends included.
MIRRORS = ("config", "integrations")

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EVALUATORS = {"eval", "exec"}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def python_files() -> list[Path]:
    return sorted((SOURCE / PACKAGE).rglob("*.py"))


def module_name(path: Path) -> str:
    """`backends.cpu` for src/fewbits/backends/cpu.py; "" for the package itself."""
    parts = path.relative_to(SOURCE / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in python_files()}
every_module = pytest.mark.parametrize("module", FILES, ids=lambda name: name or PACKAGE)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of every import, at any depth, relative and by string too."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                yield from ((name, node.lineno) for name in _from_targets(package, source, names, level))
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name, node.lineno


def _from_targets(package: str, source: str | None, names: list[ast.alias], level: int) -> Iterator[str]:
    if level:
        parents = [PACKAGE, *filter(None, package.split("."))]
        source = ".".join([*parents[: len(parents) - level + 1], *filter(None, [source])])
    for alias in names:
        inner = f"{source}.{alias.name}"
        # `from fewbits import ops` imports the module ops, `from fewbits.ops import linear` does not.
        yield inner if inner.removeprefix(f"{PACKAGE}.") in FILES else str(source)


def own_imports(module: str) -> Iterator[tuple[str, int]]:
    for name, line in imports(module):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            yield name[len(PACKAGE) + 1 :], line


def where(module: str, line: int) -> str:
    return f"{FILES[module].relative_to(REPO)}:{line}"


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_there_is_code_to_hold_to_this():
    assert "" in FILES
    assert len(FILES) > 5


@every_module
def test_every_module_has_a_layer(module):
    assert not module or module.split(".")[0] in DEPTH, f"{module} has no place in LAYERS; choose one"


@every_module
def test_imports_go_one_way(module):
    if not module:
        pytest.skip("the package's front door may import anything")
    top = module.split(".")[0]
    wrong = []
    for target, line in own_imports(module):
        other = target.split(".")[0]
        if other == top:
            continue
        if other not in DEPTH:
            # The front door imports everything, so only the command line may come in through it.
            if DEPTH[top] < DEPTH["cli"]:
                wrong.append(f"{where(module, line)} imports {PACKAGE} itself")
        elif DEPTH[other] >= DEPTH[top]:
            wrong.append(f"{where(module, line)} imports {other}, which is not in an earlier layer")
    assert not wrong, "\n".join(wrong)


@every_module
def test_backends_never_import_each_other(module):
    parts = module.split(".")
    if parts[0] != "backends" or len(parts) == 1:
        pytest.skip("not a backend")
    others = [
        f"{where(module, line)} imports {target}"
        for target, line in own_imports(module)
        if target.startswith("backends.") and target.split(".")[1] != parts[1]
    ]
    assert not others, "\n".join(others)


@every_module
def test_foreign_packages_stay_in_their_places(module):
    wrong = [
        f"{where(module, line)} imports {name}; only {', '.join(places)} may"
        for name, line in imports(module)
        if (places := FOREIGN.get(name.split(".")[0])) and not within(module, places)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["codebook", "format"])
def test_the_first_layers_need_only_the_standard_library(module):
    allowed = {*sys.stdlib_module_names, PACKAGE}
    assert not [name for name, _ in imports(module) if name.split(".")[0] not in allowed]


def source_files() -> list[Path]:
    paths = [*SOURCE.rglob("*"), *(REPO / "csrc").rglob("*")]
    return sorted(path for path in paths if path.suffix in {".py", ".h", ".cpp"})


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(REPO).as_posix())
def test_files_stay_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines: two rooms in one, split it"


@every_module
def test_functions_stay_small(module):
    large = [
        f"{where(module, node.lineno)} {node.name}: {size} lines"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not large, "\n".join(large)


def _executes_data(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return name in EVALUATORS
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            return True
        case ast.ImportFrom(module="torch", names=names):
            return any(alias.name == "load" for alias in names)
        case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=value)):
            return bool(value)
    return False


@every_module
def test_nothing_is_unpickled_or_evaluated(module):
    found = [where(module, line) for name, line in imports(module) if name.split(".")[0] in UNPICKLERS]
    found += [where(module, node.lineno) for node in ast.walk(tree(module)) if _executes_data(node)]
    assert not found, "\n".join(found)


def _passed_on(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[int]:
    """The lines on which a function hands its own **kwargs to another."""
    own = function.args.kwarg
    if own is None or (isinstance(own.annotation, ast.Attribute) and own.annotation.attr == "kwargs"):
        return  # P.kwargs of a ParamSpec is as typed as the function it wraps
    for call in ast.walk(function):
        if isinstance(call, ast.Call):
            spread = (word.value for word in call.keywords if word.arg is None)
            if any(isinstance(value, ast.Name) and value.id == own.arg for value in spread):
                yield call.lineno


@every_module
def test_kwargs_are_not_passed_through(module):
    if within(module, MIRRORS):
        pytest.skip("there the signatures are other packages'")
    passed = [
        f"{where(module, line)} {node.name} passes its **kwargs on"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for line in _passed_on(node)
    ]
    assert not passed, "\n".join(passed)


def test_importing_fewbits_loads_no_heavy_package():
    loaded = f"sorted(set(sys.modules) & {set(NOT_LOADED_BY_IMPORT)!r})"
    script = f"import json, sys, fewbits; print(json.dumps({loaded}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
