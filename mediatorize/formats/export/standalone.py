"""One self-contained Python file from the project's own modules: what an export's code is made of, so that nothing is written twice."""

from __future__ import annotations

import ast
import importlib.util

PACKAGE = "mediatorize"

STAND_INS = {"timm.layers": "mediatorize.formats.export.travelling.layers"}
"""Outside modules that an export must not need, and what is written in their place."""


def standalone(entry: str, title: str) -> str:
    """The source of module `entry` and, before it, of every project module that it imports, as one module.

    Imports within the project go away; other imports move to the top. Top-level names of all modules share one namespace, so two that
    define the same name differently cannot travel together: that, and imports of the project inside functions, raise
    NotImplementedError.
    """
    outside: dict[str, set[str]] = {}
    owner: dict[str, str] = {}
    parts: list[str] = []
    written: set[str] = set()

    def define(name: str, where: str) -> None:
        if owner.setdefault(name, where) != where:
            raise NotImplementedError(f"{name} comes from {owner[name]} and from {where}: rename one.")

    def add(module: str) -> None:
        if module in written:
            return
        written.add(module)
        source = _source(module)
        tree = ast.parse(source)
        drop: set[int] = set()
        aliases: list[str] = []
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                for name in _defined(node):
                    define(name, module)
                continue
            drop.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                continue
            if not (isinstance(node, ast.ImportFrom) and _travels(node.module)):
                where = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
                for imported in node.names:
                    define(imported.asname or imported.name.partition(".")[0], where + imported.name)
                    outside.setdefault(where, set()).add(ast.unparse(imported))
                continue
            origin = STAND_INS.get(node.module or "", node.module or "")
            for imported in node.names:
                name = imported.asname or imported.name
                if _is_module(f"{origin}.{imported.name}"):
                    add(f"{origin}.{imported.name}")
                    aliases.append(f"{name} = SimpleNamespace({_members(f'{origin}.{imported.name}')})")
                    outside.setdefault("from types import ", set()).add("SimpleNamespace")
                else:
                    add(origin)
                    aliases += [f"{name} = {imported.name}"] if name != imported.name else []
        for inner in ast.walk(tree):
            if isinstance(inner, ast.Import | ast.ImportFrom) and inner not in tree.body and _travels(_module_of(inner)):
                raise NotImplementedError(f"{module}, line {inner.lineno}: a project import that is not at the top of the file.")
        kept = [line for number, line in enumerate(source.splitlines(), 1) if number not in drop]
        parts.append("\n".join([f"# --- {module} " + "-" * max(3, 120 - len(module)), *aliases, *kept]).strip())

    add(entry)
    imports = "\n".join(where + ", ".join(sorted(names)) for where, names in sorted(outside.items()) if where != "import ")
    plain = "\n".join(f"import {name}" for name in sorted(outside.get("import ", ())))
    return "\n\n".join([f'"""{title}"""', "from __future__ import annotations", plain, imports, "", "\n\n\n".join(parts)]) + "\n"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec and spec.loader else None  # type: ignore[attr-defined]
    assert source is not None, module
    return source


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _module_of(node: ast.Import | ast.ImportFrom) -> str | None:
    return node.module if isinstance(node, ast.ImportFrom) else node.names[0].name


def _travels(module: str | None) -> bool:
    return module is not None and (module in STAND_INS or module.partition(".")[0] == PACKAGE)


def _defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _members(module: str) -> str:
    """A module's functions and constants as keyword arguments."""
    names = [name for node in ast.parse(_source(module)).body for name in _defined(node)]
    return ", ".join(f"{name}={name}" for name in names)
