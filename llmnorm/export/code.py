"""The modeling code that travels with an export, checked to need nothing that stays behind."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

import llmnorm.modeling
from llmnorm.errors import UserError
from llmnorm.modeling.configuration_llmnorm import AUTO_MAP
from llmnorm.plugins import LOADED, norms_of

REGISTRY = "plugin_norms.py"
OUR_MODULE = re.compile(r"^(\s*)from llmnorm\.modeling\.(\w+) import", re.MULTILINE)
ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def copy_modeling_code(folder: Path, norm: str | list[str] = "") -> list[str]:
    """Copy the files that AUTO_MAP names, and those they import, into `folder`; return their names.

    transformers loads such files flat, from beside config.json, and follows only `from .name import ...`. The
    plugins of `norm` come along, and `plugin_norms.py` imports them there. Raises ImportError for an import
    that would not be found there, and UserError for one in a plugin.
    """
    home = Path(llmnorm.modeling.__file__).parent
    waiting = sorted({f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()})
    copied: list[str] = []
    while waiting:
        name = waiting.pop()
        if name not in copied:
            copied.append(name)
            waiting += [f"{module}.py" for module in relative_imports(home / name)]
            shutil.copyfile(home / name, folder / name)
    sources = plugin_sources(norm)
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    with (folder / REGISTRY).open("a", encoding="utf-8") as registry:
        registry.write("".join(_registration(row) for row in norms_of(norm)))
    return sorted([*copied, *sources])


def plugin_sources(norm: str | list[str]) -> dict[str, str]:
    """File name -> text, as an export has it, of the plugins of `norm` and of the plugins they import.

    `from llmnorm.modeling.norms import x` becomes `from .norms import x`, which is the same thing there.
    Raises UserError for an import that an export cannot serve.
    """
    home = {path.stem for path in Path(llmnorm.modeling.__file__).parent.glob("*.py")}
    waiting = [row.partition(":")[0] for row in norms_of(norm)]
    sources: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        if name not in LOADED:
            raise UserError(f"{name} is imported by a plugin and is no plugin; list it in plugins")
        sources[name] = OUR_MODULE.sub(r"\1from .\2 import", LOADED[name].text)
        try:
            imported = imports_in(name, sources[name])
        except ImportError as error:
            raise UserError(f"norm={norm}: {error}") from error
        waiting += [f"{module}.py" for module in imported if module not in home]
    return sources


def _registration(norm: str) -> str:
    file, _, name = norm.partition(":")
    return f'\nfrom .{Path(file).stem} import {name}  # noqa: E402\n\nCLASSES["{norm}"] = {name}\n'


def relative_imports(path: Path) -> list[str]:
    """Modules that `path` imports from beside it; ImportError for one that an export cannot serve."""
    return imports_in(path.name, path.read_text(encoding="utf-8"))


def imports_in(file: str, text: str) -> list[str]:
    """The same for the text of a file of that name."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                raise ImportError(
                    f"{file}:{node.lineno}: an exported model can only use `from .name import ...`"
                )
            found.append(node.module)
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        strange = [name for name in names if name.split(".")[0] not in ALLOWED]
        if strange and not _is_guarded(tree, node.lineno):
            raise ImportError(
                f"{file}:{node.lineno}: imports {strange[0]}, which is absent where an export is "
                "loaded; guard it with try/except ImportError"
            )
    return found


def _is_guarded(tree: ast.Module, line: int) -> bool:
    """Whether `line` is in the body of a `try`, the one place where an import may fail."""
    tries = (node for node in ast.walk(tree) if isinstance(node, ast.Try))
    return any(node.body[0].lineno <= line <= (node.body[-1].end_lineno or 0) for node in tries)
