"""Files that users bring: norms and optimizers without a fork.

A plugin file is executed as a module of `llmnorm.modeling`, so `from .norms import rms_norm` means the same
in it here and in an export, where it lies beside our modeling files; by its bare name it is importable too
(`optimizer.class_path: my_opt.MyOpt`). Its `nn.Module` classes become values of `model.norm`, as
`file.py:Class`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from llmnorm.config import RunConfig
from llmnorm.errors import UserError
from llmnorm.modeling import plugin_norms
from llmnorm.modeling.plugin_norms import is_plugin

PACKAGE = "llmnorm.modeling"
MARK = "__llmnorm_plugin__"  # attribute of the modules made here


@dataclass(frozen=True)
class Plugin:
    """One file: its name, its text and the text's hash, as recorded in checkpoints."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


# file name -> the plugin that is loaded under it.
LOADED: dict[str, Plugin] = {}


def load_run_plugins(config: RunConfig) -> list[Plugin]:
    """Load every file a run names: `plugins`, and those of `model.norm` that are paths themselves."""
    files = list(config.plugins)
    listed = {Path(file).name for file in files}
    for norm in norms_of(config.model.norm):
        path = norm.partition(":")[0]
        if Path(path).name not in listed:
            files.append(path)
            listed.add(Path(path).name)
    plugins = [load_plugin(Path(file).expanduser(), "plugins") for file in files]
    from llmnorm.export.code import plugin_sources  # which imports torch's friends

    plugin_sources(config.model.norm_names())
    return plugins


def norms_of(norm: Any) -> list[str]:
    """The values `file.py:Class` among a `norm` key's."""
    rows = norm if isinstance(norm, list | tuple) else [norm]
    return list(dict.fromkeys(row for row in rows if is_plugin(row)))


def load_saved_plugins(folder: Path, norm: Any) -> None:
    """Load the plugins of a checkpoint's or an export's `norm` from the copies that lie in its folder."""
    for file in dict.fromkeys(row.partition(":")[0] for row in norms_of(norm)):
        load_plugin(folder / file, f"norm={norm} of {folder}")


def load_plugin(path: Path, key: str) -> Plugin:
    """Execute a file and register its classes; the same text again is not executed again.

    Raises UserError for a file that is not there, fails, or has the name of a module that exists.
    """
    try:
        plugin = Plugin(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); give the path of a Python file") from error
    loaded = LOADED.get(plugin.name)
    if loaded is not None and loaded.text == plugin.text:
        return loaded
    if loaded is None:
        _require_free_name(path, key)
    module = _execute(plugin, key)
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__:
            plugin_norms.CLASSES[f"{plugin.name}:{name}"] = value
    LOADED[plugin.name] = plugin
    return plugin


def plugin_module(plugin: Plugin) -> ModuleType:
    """The module that a loaded plugin became."""
    return sys.modules[f"{PACKAGE}.{plugin.path.stem}"]


def _require_free_name(path: Path, key: str) -> None:
    stem = path.stem
    if path.suffix != ".py" or not stem.isidentifier():
        raise UserError(f"{key}: {path} must be named like a module, such as my_norm.py; rename it")
    for name in (f"{PACKAGE}.{stem}", stem):
        if hasattr(sys.modules.get(name), MARK):
            continue
        spec = None if name in sys.builtin_module_names else importlib.util.find_spec(name)
        taken = name in sys.builtin_module_names or (
            spec is not None and (spec.origin is None or Path(spec.origin).resolve() != path.resolve())
        )
        if taken:
            raise UserError(
                f"{key}: {path} has the name of the module {name}, which it would hide; rename it"
            )


def _execute(plugin: Plugin, key: str) -> ModuleType:
    name = f"{PACKAGE}.{plugin.path.stem}"
    spec = importlib.util.spec_from_file_location(name, plugin.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    replaced = {alias: sys.modules.get(alias) for alias in (name, plugin.path.stem)}
    setattr(module, MARK, True)
    sys.modules.update({name: module, plugin.path.stem: module})
    try:
        exec(compile(plugin.text, str(plugin.path), "exec"), module.__dict__)
    except Exception as error:
        for alias, before in replaced.items():
            if before is None:
                sys.modules.pop(alias)
            else:
                sys.modules[alias] = before
        raise UserError(f"{key}: {plugin.path} fails: {type(error).__name__}: {error}") from error
    return module


def changed_plugins(recorded: Mapping[str, str], now: Iterable[Plugin]) -> list[str]:
    """A line for each file whose hash is not the one that a checkpoint recorded."""
    current = {plugin.name: plugin.sha256 for plugin in now}
    return [
        f"{name} has changed since this run was saved (sha256 {recorded[name][:12]}, now {sha256[:12]}): "
        "updates from here on are made by the file as it is now; the checkpoint keeps the former one"
        for name, sha256 in current.items()
        if name in recorded and recorded[name] != sha256
    ]
