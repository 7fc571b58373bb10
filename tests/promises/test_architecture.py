"""The folders are levels: an import only goes down, nothing is imported in a circle, and functions stay short."""

import ast
import inspect
from collections import defaultdict
from pathlib import Path

import pytest

import resuscitate

PACKAGE = Path(resuscitate.__file__).parent
# from the lowest on; what is in one line may not import one another either
LEVELS = [
    ["errors", "version"],
    ["utils"],
    ["runtime", "reports"],
    ["network"],
    ["statistics", "data", "deploy"],
    ["engine"],
    ["methods"],
    ["pruning"],
    ["training"],
    ["workflows"],
    ["__init__"],
    ["models"],
    ["demo", "doctor"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for path, module in FILES.items()}
MODULES = set(FILES.values())


def imports(module):
    """The modules of the package that a module imports, at its top or within a function."""
    package = module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                yield next(
                    name
                    for name in (inner, f"{inner}.__init__", target, f"{target}.__init__".strip("."))
                    if name in MODULES
                )


def folder(module):
    return module.split(".")[0]


IMPORTS = {module: set(imports(module)) - {module} for module in MODULES}


def test_every_folder_has_a_level():
    assert {folder(module) for module in MODULES} == set(LEVEL)


def test_an_import_goes_down_or_stays_in_its_folder():
    upward = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if folder(target) != folder(module) and LEVEL[folder(target)] >= LEVEL[folder(module)]
    ]
    assert not sorted(upward)


def test_no_modules_import_one_another_in_a_circle():
    state, circles = {}, []

    def visit(module, path):
        state[module] = "open"
        for target in IMPORTS[module]:
            if state.get(target) == "open":
                circles.append([*path[path.index(target) :], target] if target in path else [module, target])
            elif target not in state:
                visit(target, [*path, target])
        state[module] = "done"

    for module in sorted(MODULES):
        if module not in state:
            visit(module, [module])
    assert not circles


def test_no_module_is_hidden_by_a_name_in_its_package():
    hidden = []
    for module, tree in TREES.items():
        if not module.endswith("__init__"):
            continue
        prefix = module.removesuffix("__init__")
        inside = {other.removeprefix(prefix).split(".")[0] for other in MODULES if other.startswith(prefix)}
        names = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if node.module is not None
        }
        hidden += [f"{prefix}{name}" for name in names & inside]
    assert not hidden


def functions():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                yield f"{module}.{node.name}", lines


def test_no_function_has_more_than_80_lines():
    assert not [(name, lines) for name, lines in functions() if lines > 80]


@pytest.mark.parametrize("name", ["method", "recalibrate", "rule"])
def test_no_name_of_a_method_is_compared_outside_the_registry(name):
    found = []
    for module, tree in TREES.items():
        if module in ("methods.base", "methods.batchnorm") or folder(module) == "pruning":  # an allocation's method
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                left = getattr(node.left, "id", getattr(node.left, "attr", None))
                literals = [
                    each for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
                ]
                if left == name and literals and not {each.value for each in literals} <= {"none"}:
                    found.append(f"{module}: {ast.unparse(node)}")
    assert not found


def test_a_session_alone_prepares_networks_for_measuring():
    """Device, eval mode, random state, memory and snapshot: nothing else that measures sets them up."""
    used = defaultdict(set)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                used[node.func.id].add(module)
    # what compares a model's outputs on an example, and measures nothing
    comparing = {"pruning.coupling", "pruning.structured", "deploy.fold", "deploy.semistructured"}
    assert used["evaluation_mode"] - comparing == {"engine.session"}
    assert used["Store"] | used["moved_to"] - {"cli.compare", "cli.inputs"} == {"engine.session"}


def test_every_function_that_measures_takes_the_run_time_options():
    from resuscitate.runtime.options import DEFAULTS

    measuring = [
        resuscitate.repair,
        resuscitate.recalibrate_batchnorm,
        resuscitate.compress,
        resuscitate.regrow,
        resuscitate.recoverability,
        resuscitate.damage,
        resuscitate.allocate,
        resuscitate.sparsify,
        resuscitate.DenseStatistics.measure,
        resuscitate.Repairability.measure,
    ]
    for function in measuring:
        parameters = inspect.signature(function).parameters
        assert parameters["options"].annotation == "Unpack[RunOptions]", function
        assert not DEFAULTS.keys() & parameters.keys(), function
