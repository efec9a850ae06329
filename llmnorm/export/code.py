"""The modeling code that travels with an export, checked to need nothing that stays behind."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

import llmnorm.modeling
from llmnorm.modeling.configuration_llmnorm import AUTO_MAP

ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def copy_modeling_code(folder: Path) -> list[str]:
    """Copy the files that AUTO_MAP names, and those they import, into `folder`; return their names.

    transformers loads such files flat, from beside config.json, and follows only `from .name import ...`.
    Raises ImportError for an import that would not be found there.
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
    return sorted(copied)


def relative_imports(path: Path) -> list[str]:
    """Modules that `path` imports from beside it; ImportError for one that an export cannot serve."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                raise ImportError(
                    f"{path.name}:{node.lineno}: an exported model can only use `from .name import ...`"
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
        if strange and not _is_guarded(path, node.lineno):
            raise ImportError(
                f"{path.name}:{node.lineno}: imports {strange[0]}, which is absent where an export is "
                "loaded; guard it with try/except ImportError"
            )
    return found


def _is_guarded(path: Path, line: int) -> bool:
    """Whether `line` is in the body of a `try`, the one place where an import may fail."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tries = (node for node in ast.walk(tree) if isinstance(node, ast.Try))
    return any(node.body[0].lineno <= line <= (node.body[-1].end_lineno or 0) for node in tries)
