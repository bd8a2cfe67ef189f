"""
Tells Diffusers of this package, so that `DiffusionPipeline.from_pretrained` loads its pipelines.

Diffusers looks pipeline classes up by name in its own namespace, and loads components from the Hub only if its
`LOADABLE_CLASSES` lists their library. Both learn of this package here, as soon as the module that holds them has been
imported; nothing is imported for that before it is used.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


PACKAGE = __name__.partition(".")[0]
PIPELINES = ("CascadedDiffusionPipeline", "SuperResolutionPipeline")
COMPONENT_BASES = ("ModelMixin", "SchedulerMixin")


def register() -> None:
    """Registers the package with Diffusers now, where that is imported, and otherwise when it is."""
    actions = {"diffusers": _add_pipelines, "diffusers.pipelines.pipeline_loading_utils": _add_components}
    for name, action in actions.items():
        if name in sys.modules:
            action(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(actions))


def _add_pipelines(diffusers: ModuleType) -> None:
    def __getattr__(name: str) -> type:
        if name in PIPELINES:
            return getattr(importlib.import_module(PACKAGE), name)
        raise AttributeError(f"module {diffusers.__name__!r} has no attribute {name!r}")

    diffusers.__getattr__ = __getattr__  # asked before that of Diffusers' lazy module, which follows where it raises


def _add_components(pipeline_loading_utils: ModuleType) -> None:
    # Saved pipelines name this package, not the files inside it, for their components, and Diffusers finds the bases
    # listed here in it by their names.
    methods = ["save_pretrained", "from_pretrained"]
    pipeline_loading_utils.LOADABLE_CLASSES[PACKAGE] = dict.fromkeys(COMPONENT_BASES, methods)


class _AfterImport:
    """Finds modules as the other finders do, and calls an action with some of them after they have run."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]):
        self.actions = actions

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As the import system asks; for the modules with an action alone."""
        if fullname not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if module.__name__ == fullname:
                    self.actions[fullname](sys.modules.get(fullname, module))  # Diffusers puts another in its place

            spec.loader.exec_module = exec_module
        return spec
