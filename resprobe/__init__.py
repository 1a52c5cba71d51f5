"""resprobe: a research analysis toolkit for residual networks (He et al. 2015, arXiv:1512.03385).

Public names are imported when first used, so that a command's `--help` need not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "resprobe.blocks": ("BLOCKS", "Block", "register_block"),
    "resprobe.claims": ("Claim", "Comparison", "Verdict", "compare", "mean_std"),
    "resprobe.data": ("DATASETS", "Data", "FolderSet", "ImageSet", "Normalization", "load_data", "register_dataset"),
    "resprobe.errors": ("TrainingDiverged", "UsageError"),
    "resprobe.evaluation": ("Evaluation", "evaluate", "precise_batch_norm"),
    "resprobe.extensions": ("load_plugin",),
    "resprobe.initialization": ("INITIALIZATIONS", "register_initialization"),
    "resprobe.layers": ("Layers",),
    "resprobe.networks": ("NETWORKS", "Network", "NetworkSpec", "build", "register_network"),
    "resprobe.normalization": ("NORMALIZATIONS", "register_normalization"),
    "resprobe.probes": ("PROBES", "Probe", "attach", "register_probe"),
    "resprobe.recipes": ("Recipe", "learning_rate"),
    "resprobe.runs": ("Run", "RunConfig", "RunStore", "default_recipe", "train"),
    "resprobe.shortcuts": ("SHORTCUTS", "register_shortcut"),
    "resprobe.study": ("Drawing", "Options", "Planned", "Results", "Study"),
    "resprobe.weights": ("load_weights",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_MODULES = ("figures", "networks", "probes", "recipes")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"resprobe.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'resprobe' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
