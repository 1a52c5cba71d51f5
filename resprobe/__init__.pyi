"""The public names of resprobe. `__init__.py` reads this list, and imports a name when it is first used."""

from . import figures as figures, networks as networks, probes as probes, recipes as recipes
from .blocks import BLOCKS as BLOCKS, Block as Block, register_block as register_block
from .claims import (
    Claim as Claim,
    Comparison as Comparison,
    Verdict as Verdict,
    all_of as all_of,
    band as band,
    compare as compare,
    from_paper as from_paper,
    if_learned as if_learned,
    mean_std as mean_std,
)
from .data import (
    DATASETS as DATASETS,
    Data as Data,
    FolderSet as FolderSet,
    ImageSet as ImageSet,
    Normalization as Normalization,
    load_data as load_data,
    register_dataset as register_dataset,
)
from .devices import cpu_threads as cpu_threads, deterministic as deterministic
from .errors import (
    StorageError as StorageError,
    TrainingDiverged as TrainingDiverged,
    UsageError as UsageError,
    check_whole as check_whole,
    not_accepted as not_accepted,
)
from .evaluation import (
    Evaluation as Evaluation,
    evaluate as evaluate,
    normalization_of as normalization_of,
    precise_batch_norm as precise_batch_norm,
    scores as scores,
    tally as tally,
)
from .extensions import load_plugin as load_plugin
from .initialization import INITIALIZATIONS as INITIALIZATIONS, register_initialization as register_initialization
from .layers import Layers as Layers
from .networks import (
    NETWORKS as NETWORKS,
    Network as Network,
    NetworkSpec as NetworkSpec,
    build as build,
    register_network as register_network,
)
from .normalization import NORMALIZATIONS as NORMALIZATIONS, register_normalization as register_normalization
from .options import Options as Options, cifar_presets as cifar_presets, lacks_depths as lacks_depths
from .probes import PROBES as PROBES, Probe as Probe, attach as attach, register_probe as register_probe
from .randomness import keeping_random_state as keeping_random_state, seeded as seeded
from .recipes import Recipe as Recipe, learning_rate as learning_rate
from .runs import (
    Run as Run,
    RunConfig as RunConfig,
    RunStore as RunStore,
    default_recipe as default_recipe,
    train as train,
)
from .shortcuts import SHORTCUTS as SHORTCUTS, register_shortcut as register_shortcut
from .study import (
    Drawing as Drawing,
    Planned as Planned,
    Results as Results,
    Study as Study,
)
from .weights import load_network as load_network, load_weights as load_weights

__version__: str
