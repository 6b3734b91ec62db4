"""One self-contained Python file from the project's own modules: what an export's code is made of, so that nothing is written twice."""

from __future__ import annotations

import ast
import importlib.util

PACKAGE = "mediatorize"

STAND_INS = {"timm.layers": "mediatorize.export.travelling.layers"}
"""Outside modules that an export must not need, and what is written in their place."""


def standalone(entry: str, title: str) -> str:
    """The source of module `entry` and of every project module that it imports, as one module.

    Top-level names of all modules share one namespace. So a project import goes away: at the top of a module, where the imported module is
    written first; inside a function or `if TYPE_CHECKING:`, where `pass` takes its place and the imported module is written last. Nothing
    at the top of a module may therefore call a function that has such an import. Other imports move to the top, or stay where they are
    inside functions.

    Raises:
        NotImplementedError: two modules define the same name differently, or an import of the project is of a form that one namespace
            does not have: `import mediatorize.x`, or one inside a function that renames what it imports or imports a module.
    """
    return _File().text(entry, title)


class _File:
    """The file under way."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.written: set[str] = set()
        self.later: list[str] = []
        """Modules that functions import."""
        self.outside: dict[str, set[str]] = {}
        """Names that come from outside the project, by the beginning of the statement that imports them."""
        self.owner: dict[str, str] = {}
        """Where each name comes from."""

    def text(self, entry: str, title: str) -> str:
        self.add(entry)
        while self.later:
            self.add(self.later.pop(0))
        imports = "\n".join(where + ", ".join(sorted(names)) for where, names in sorted(self.outside.items()) if where != "import ")
        plain = "\n".join(f"import {name}" for name in sorted(self.outside.get("import ", ())))
        parts = "\n\n\n".join(self.parts)
        return "\n\n".join([f'"""{title}"""', "from __future__ import annotations", plain, imports, "", parts]) + "\n"

    def add(self, module: str) -> None:
        """Writes a module, after those that it imports at its top."""
        if module in self.written:
            return
        self.written.add(module)
        source = _source(module)
        tree = ast.parse(source)
        lines: list[str | None] = list(source.splitlines())
        aliases: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in tree.body and _travels(node):
                self.later.append(_imported_inside(module, node))
                _replace(lines, node, "pass")
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                aliases += self.imported(module, node)
                _replace(lines, node, "")
            else:
                for name in _defined(node):
                    self.define(name, module)
        kept = [line for line in lines if line is not None]
        self.parts.append("\n".join([f"# --- {module} " + "-" * max(3, 120 - len(module)), *aliases, *kept]).strip())

    def imported(self, module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
        """Does what an import at the top of `module` asks for; gives the statements that stand for it."""
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return []
        if not _travels(node):
            where = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
            for imported in node.names:
                self.define(imported.asname or imported.name.partition(".")[0], where + imported.name)
                self.outside.setdefault(where, set()).add(ast.unparse(imported))
            return []
        origin, aliases = _origin(module, node), []
        for imported in node.names:
            name, inner = imported.asname or imported.name, f"{origin}.{imported.name}"
            if _is_module(inner):
                self.add(inner)
                self.define(name, inner)
                self.outside.setdefault("from types import ", set()).add("SimpleNamespace")
                aliases.append(f"{name} = SimpleNamespace({_members(inner)})")
            else:
                self.add(origin)
                if name != imported.name:
                    self.define(name, inner)
                    aliases.append(f"{name} = {imported.name}")
        return aliases

    def define(self, name: str, where: str) -> None:
        if self.owner.setdefault(name, where) != where:
            raise NotImplementedError(f"{name} comes from {self.owner[name]} and from {where}: rename one.")


def _imported_inside(module: str, node: ast.Import | ast.ImportFrom) -> str:
    """The module that an import which is not at the top of `module` needs."""
    origin = _origin(module, node)
    if any(imported.asname is not None or _is_module(f"{origin}.{imported.name}") for imported in node.names):
        raise NotImplementedError(f"{module}, line {node.lineno}: inside a function, import names as they are defined.")
    return origin


def _origin(module: str, node: ast.Import | ast.ImportFrom) -> str:
    """The project module that an import names."""
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        raise NotImplementedError(f"{module}, line {node.lineno}: write `from {node.names[0].name} import ...`.")
    return STAND_INS.get(node.module, node.module)


def _replace(lines: list[str | None], node: ast.stmt, text: str) -> None:
    """Puts `text` in place of a statement that has its lines to itself; nothing at all drops the lines."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before = (lines[first] or "")[: node.col_offset]
    lines[first : last + 1] = [before + text if text else None, *[None] * (last - first)]


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


def _travels(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import is one of the project's modules, or of one that has a stand-in."""
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [imported.name for imported in node.names]
    return any(module in STAND_INS or module.partition(".")[0] == PACKAGE for module in modules)


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
