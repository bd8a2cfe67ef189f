"""The sampling code of this package as one Python file, which a repository of the Hub can carry."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path


PACKAGE = __name__.partition(".")[0]
ROOT = f"{PACKAGE}.pipelines.pipeline_cascaded_diffusion"
COMPONENTS = ("CascadedUNet2DModel", "CascadedDDPMScheduler", "ContinuousDDPMScheduler")
HEAD = '''"""
Cascaded Diffusion Models (Ho et al., 2021): the sampling code of cdm_diffusers in one file, licensed under Apache 2.0.

Written by `cdm export hub --self_contained`. What it saves is a pipeline of the package, which loads where that is
installed.
"""
'''


def sampling_code() -> tuple[str, str]:
    """
    Name and source of a module with both pipelines and all that they need of this package. The name has a digest of
    the source, so that the code of two releases can be loaded in one process.

    Raises:
        ValueError: two modules define the same name.
    """
    order: list[str] = []
    _visit(ROOT, order)
    defined: dict[str, str] = {}
    parts = []
    for module in order:
        source = _source_of(module).read_text(encoding="utf-8")
        for name in _definitions(source):
            if defined.setdefault(name, module) != module:
                raise ValueError(
                    f"`{name}` is defined by {defined[name]} and by {module}; one file can hold only one."
                )
        parts.append(f"# {'-' * 117}\n# {module}\n\n{_without_own_imports(source)}")
    # Whoever saves a pipeline that was loaded so leaves an ordinary folder of the package.
    tail = f"for _kind in ({', '.join(COMPONENTS)}):\n    _kind.__module__ = {PACKAGE!r}\n"
    code = "\n\n".join([HEAD.rstrip(), *(part.strip() for part in parts), tail])
    return f"cascaded_diffusion_{hashlib.sha256(code.encode()).hexdigest()[:8]}", code


def _visit(module: str, order: list[str]) -> None:
    """Appends `module` after all that it imports of this package."""
    source = _source_of(module).read_text(encoding="utf-8")
    for node in _own_imports(ast.parse(source)):
        if not _is_for_types(source, node):
            for imported in _modules_of(module, node):
                if imported not in order:
                    _visit(imported, order)
    if module not in order and _source_of(module).name != "__init__.py":
        order.append(module)


def _modules_of(module: str, node: ast.ImportFrom) -> Iterator[str]:
    """The modules that a relative import needs: the ones that define what packages only pass on."""
    package = module.split(".")[: -node.level]
    target = ".".join([*package, node.module or ""]).rstrip(".")
    if _source_of(target).name == "__init__.py":
        for inner in _own_imports(ast.parse(_source_of(target).read_text(encoding="utf-8"))):
            if {alias.name for alias in inner.names} & {alias.name for alias in node.names}:
                yield f"{target}.{inner.module}"
    else:
        yield target


def _source_of(module: str) -> Path:
    return Path(importlib.util.find_spec(module).origin)


def _own_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)


def _type_blocks(tree: ast.Module) -> list[ast.If]:
    return [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", None) == "TYPE_CHECKING"]


def _is_for_types(source: str, node: ast.ImportFrom) -> bool:
    return any(block.lineno <= node.lineno <= block.end_lineno for block in _type_blocks(ast.parse(source)))


def _without_own_imports(source: str) -> str:
    """`source` without its imports of this package."""
    tree, lines = ast.parse(source), source.splitlines()
    nodes = [*_own_imports(tree), *_type_blocks(tree)]
    dropped = {number for node in nodes for number in range(node.lineno, node.end_lineno + 1)}
    # Examples in docstrings import the package too, and Diffusers takes them for code that needs it.
    dropped |= {number for number, line in enumerate(lines, start=1) if line.strip().startswith(f"from {PACKAGE} ")}
    return "\n".join(line for number, line in enumerate(lines, start=1) if number not in dropped)


def _definitions(source: str) -> Iterator[str]:
    """Names that a module defines at its top, `__all__` and `logger` left out."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (t.id for t in targets if isinstance(t, ast.Name) and t.id not in ("__all__", "logger"))
