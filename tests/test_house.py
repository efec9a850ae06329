"""The house rules that a reader relies on: who imports whom, what the commands run, what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmnorm"

# Room -> the rooms of llmnorm it may import. `errors` is open to all but modeling, which ships with exports.
MAY_IMPORT = {
    "modeling": set(),
    "optim": {"errors"},
    "data": {"errors"},
    "config": {"errors"},
    "checkpoint": {"errors"},
    "evaluation": {"errors", "modeling", "data", "checkpoint", "config"},
    "export": {"errors", "modeling", "data", "checkpoint", "config", "evaluation"},
    "training": {"errors", "modeling", "optim", "data", "config", "checkpoint", "evaluation", "export"},
}
# Heavy or optional packages that must not load before they are needed.
LAZY = {"datasets", "deepspeed", "wandb", "trackio", "tensorboard", "lm_eval", "matplotlib", "triton"}


def imported_modules(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports (relative imports resolved against its package)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    package = path.relative_to(ROOT).parent.parts
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_rooms_import_only_what_the_plan_allows(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    for path in sorted((PACKAGE / room).rglob("*.py")):
        rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("llmnorm.")}
        assert rooms & (MAY_IMPORT.keys() | {"errors", "cli"}) <= allowed, (
            f"{path.name} imports {rooms - allowed}"
        )


def test_modeling_uses_relative_imports_only() -> None:
    """An exported checkpoint carries these files alone: it must load where llmnorm and Triton are absent."""
    for path in sorted((PACKAGE / "modeling").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not [n for n in names if n.split(".")[0] == "llmnorm"], f"{path.name}:{node.lineno}"


def test_optional_packages_are_imported_when_used() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        tops = {name.split(".")[0] for name in imported_modules(path, top_level_only=True)}
        assert not tops & LAZY, f"{path.relative_to(ROOT)} imports {tops & LAZY} at the top"


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, llmnorm; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_surface_resolves() -> None:
    import llmnorm

    for name in llmnorm.__all__:
        assert getattr(llmnorm, name) is not None, name


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # a source archive has no git
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".sh"}
    return [ROOT / f for f in listed.stdout.split() if Path(f).suffix in suffixes and (ROOT / f).exists()]


def test_no_file_names_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w+")
    for path in tracked_text_files():
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)} holds the path {found and found.group()}"


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("make quickstart", "make test"):
        assert re.search(rf"^{command}\b", readme, re.MULTILINE), f"README lost `{command}`"
        assert re.search(rf"^{command}$", ci, re.MULTILINE), f".ci/run lost `{command}`"
