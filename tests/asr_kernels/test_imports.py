"""Imports of asr_kernels, read from its source: no cycle, none of resuscitate, `ops` only in the package itself."""

from __future__ import annotations

import ast
import graphlib
from importlib.util import resolve_name
from pathlib import Path

import asr_kernels

ROOT = Path(asr_kernels.__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in Path(asr_kernels.__file__).parent.rglob("*.py")
}


def imported(module: str, path: Path) -> set[str]:
    """All modules that the file imports, within functions too; `from a import b` is a.b where a.b is a module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return found


IMPORTS = {module: imported(module, path) for module, path in FILES.items()}


def test_imports_form_no_cycle():
    inside = {module: names & FILES.keys() for module, names in IMPORTS.items()}
    # backend_for imports these modules by name
    inside["asr_kernels.backends"] |= {module for module in FILES if module.startswith("asr_kernels.backends.")}
    order = list(graphlib.TopologicalSorter(inside).static_order())  # raises CycleError, which names the cycle
    assert order[-1] == "asr_kernels"


def test_resuscitate_is_not_imported():
    assert not {
        module for module, names in IMPORTS.items() if any(name.split(".")[0] == "resuscitate" for name in names)
    }


def test_only_the_package_itself_imports_ops():
    assert {module for module, names in IMPORTS.items() if "asr_kernels.ops" in names} == {"asr_kernels"}


def test_relative_imports_are_resolved():
    assert {"asr_kernels.eager", "asr_kernels.merging"} <= IMPORTS["asr_kernels.moments"]
    assert {"asr_kernels.factors", "triton"} <= IMPORTS["asr_kernels.backends.triton_factors"]
