"""The shape of the code: imports run one way, and what may stand where."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lindep_onnx"
#: Low to high: a module imports from its own layer and from those before it. Names in one string share a layer.
LAYERS = (
    "_version errors", "log files", "options", "linalg", "model", "data", "runtime", "structure", "verify", "proofs",
    "calibration", "refit moves", "planning", "distill", "report", "pipeline", "inspection comparison sweeping",
    "api", "integrations", "arguments", "commands", "cli",
)  # fmt: skip
#: Modules that alone may import these packages.
HOMES = {"onnxruntime": ("runtime/backend.py", "runtime/timed_process.py"), "onnx_graphsurgeon": ("model/edit.py",)}
MAX_MODULE, MAX_FUNCTION, MAX_PARAMETERS = 500, 60, 6


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def layer(name: str) -> int:
    return next(place for place, names in enumerate(LAYERS) if name in names.split())


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of this package, those inside functions among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lindep_onnx":
            for entry in node.names:
                yield node.module or "", entry.name


def upward(path: str, tree: ast.AST) -> list[str]:
    """Imports from a higher layer than the module's own."""
    own = path.removesuffix(".py").split("/")[0]
    if own in ("__init__", "__main__"):
        return []
    found = []
    for module, name in imports(tree):
        target = module.split(".")[1] if "." in module else name
        if layer(target) > layer(own):
            found.append(f"{path} imports {module}.{name}")
    return found


@pytest.mark.parametrize(("path", "tree"), [pytest.param(*found, id=found[0]) for found in modules()])
def test_imports_run_one_way(path: str, tree: ast.Module) -> None:
    assert not upward(path, tree)


def test_an_upward_import_is_seen() -> None:
    tree = ast.parse("def f():\n    from lindep_onnx.planning.path import Path\n")
    assert upward("linalg/fold.py", tree) and not upward("report/build.py", tree)


def test_no_module_is_part_of_a_circle() -> None:
    known = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path, _ in modules()}
    arrows: dict[str, set[str]] = {}
    for path, tree in modules():
        own = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for module, name in imports(tree):
            inner = module.removeprefix("lindep_onnx").removeprefix(".")
            target = f"{inner}.{name}".strip(".") if f"{inner}.{name}".strip(".") in known else inner
            if target and target != own:
                arrows.setdefault(own, set()).add(target)
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for target in sorted(arrows.get(name, ())):
                visit(target, (*above, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def test_each_library_has_one_home() -> None:
    for path, tree in modules():
        for node in ast.walk(tree):
            names = [entry.name for entry in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert path in HOMES.get(name.split(".")[0], (path,)), f"{path} imports {name}"


def test_no_private_name_crosses_a_module() -> None:
    for path, tree in modules():
        for module, name in imports(tree):
            assert not name.startswith("_") or name == "__version__" or module == "lindep_onnx", (
                f"{path}: {module}.{name}"
            )
    for path in Path(__file__).parent.rglob("*.py"):
        for module, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            assert not name.startswith("_") or name == "__version__", f"{path}: {module}.{name}"


def test_modules_functions_and_argument_lists_are_short() -> None:
    for path, tree in modules():
        assert len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) <= MAX_MODULE, path
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(entry.arg not in ("self", "cls") for entry in given)
                assert length <= MAX_FUNCTION, f"{path}: {node.name} has {length} lines"
                assert count <= MAX_PARAMETERS, f"{path}: {node.name} takes {count} parameters"


def test_public_names_are_listed_where_packages_begin() -> None:
    for path, tree in modules():
        assigned = [n.id for a in tree.body if isinstance(a, ast.Assign) for n in a.targets if isinstance(n, ast.Name)]
        assert "__all__" not in assigned or path.endswith("__init__.py"), path
