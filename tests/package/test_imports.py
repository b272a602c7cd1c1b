"""The layout: which folder may import which, no file in a circle, and what travels with `trust_remote_code`."""

import ast
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import bt_adapter_hf


ROOT = Path(bt_adapter_hf.__file__).parent
# folder -> the folders that its files may import besides their own; `import_utils` is for all but models
MAY_IMPORT = {
    "models": set(),
    "assets": set(),
    "adapters": {"models"},
    "baselines": {"models"},
    "conversion": {"models", "adapters"},
    "hub": {"models", "adapters"},
    "search": {"models", "adapters", "hub", "assets"},
    "data": {"models", "adapters", "hub"},
    "evaluation": {"models", "adapters", "hub", "search", "data"},
    "training": {"models", "adapters", "hub", "search", "data", "evaluation"},
}
MAY_IMPORT["demo"] = {"models", "adapters", "hub", "search", "data"}
MAY_IMPORT["cli"] = {*MAY_IMPORT}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports, in its functions too; "" is the package itself.

    A name that is taken from `bt_adapter_hf` itself stands for the module that it is loaded from on first use.
    """
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT.name:
            start = node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == ROOT.name:
                    found.add(".".join(alias.name.split(".")[1:]))
            continue
        else:
            continue
        start = ".".join(filter(None, start))
        for alias in node.names:
            name = f"{start}.{alias.name}".removeprefix(".")
            if name in MODULES:
                found.add(name)
            elif start:
                found.add(start)
            else:
                found.add(bt_adapter_hf._MODULE_OF.get(alias.name, ""))
    return found - {module, ""}


def folder(module: str) -> str:
    return module.partition(".")[0]


GRAPH = {module: imports(module) for module in MODULES if module}


def test_the_test_sees_imports():
    assert {"models.configuration_bt_adapter", "models.modeling_bt_adapter_branch"} <= GRAPH[
        "models.modeling_bt_adapter_vision"
    ]
    assert "training.trainer" in GRAPH["cli.pretrain"]  # inside a function
    assert GRAPH["adapters.verbs"] >= {"adapters.files", "models.configuration_bt_adapter", "adapters.lora"}


def test_arrows_point_one_way():
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if folder(other) not in MAY_IMPORT.get(folder(module), {folder(other)}) | {folder(module), "import_utils"}
        or (folder(module) == "models" and folder(other) != "models")
    ]
    assert wrong == []
    assert {folder(module) for module in GRAPH} == {*MAY_IMPORT, "import_utils"}  # each has its line above


def test_no_circle_of_files():
    done, path = set(), []

    def visit(module: str) -> None:
        if module in path:
            raise AssertionError(" -> ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        path.append(module)
        for other in sorted(GRAPH.get(module, ())):
            visit(other)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_models_reach_the_package_at_one_place():
    """By a name that is no import statement: `trust_remote_code` would look for a file."""
    users = {}
    for module, path in MODULES.items():
        if folder(module) == "models":
            count = path.read_text(encoding="utf-8").count("bt_adapter_hf.hub")
            if count:
                users[module] = count
    assert users == {"models.modeling_bt_adapter_vision": 1}


def test_the_root_holds_nothing_else():
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert files == {"__init__.py", "import_utils.py", "py.typed"}


def test_files_are_short():
    lengths = sorted((len(path.read_text(encoding="utf-8").splitlines()), name) for name, path in MODULES.items())
    assert lengths[-1][0] <= 600, lengths[-1]
    assert lengths[len(lengths) // 2][0] < 200


def test_tests_mirror_the_package():
    tests = Path(__file__).parents[1]
    at_root = {path.name for path in tests.glob("test_*.py")}
    assert at_root == set()
    folders = {path.name for path in tests.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= {*MAY_IMPORT, "package", "parity", "examples", "docs"}


@pytest.mark.parametrize(
    "start, most_files, most_lines",
    [
        (("configuration_bt_adapter", "modeling_bt_adapter", "processing_bt_adapter"), 11, 2800),
        (("configuration_bt_adapter_chat", "modeling_bt_adapter_llava", "processing_bt_adapter_chat"), 16, 4000),
    ],
)
def test_what_trust_remote_code_ships_can_be_read(start, most_files, most_lines):
    files = set()
    for name in (*start, "video_processing_bt_adapter"):
        path = MODULES[f"models.{name}"]
        files |= {path, *map(Path, get_relative_import_files(path))}
    assert len(files) <= most_files
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= most_lines
