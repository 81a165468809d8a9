"""Data-aware LoRA initialisation (LoRA-DA, arXiv 2510.24561) from pluggable approximations."""

from lora_da_core.config import LoraDAConfig, Preset
from lora_da_core.errors import (
    AdapterError,
    ConvergenceError,
    DataError,
    LoraDAError,
    ModelError,
    OptionError,
    PluginError,
    RankError,
    StorageError,
    TargetError,
    UnknownNameError,
)
from lora_da_core.hookspecs import hookimpl, hookspec
from lora_da_core.memory import estimate_memory
from lora_da_core.one_call import (
    get_lora_da_config,
    get_lora_da_model,
    get_lora_da_state_dict,
    initialize_lora_da_weights,
)
from lora_da_core.pipeline import Pipeline, build_pipeline
from lora_da_core.preferences import preference_batches
from lora_da_core.registry import list_plugins
from lora_da_core.regularization import Penalty, penalty_of, regularize_training
from lora_da_core.trainer import init_before_training, trainer_plugin
from lora_da_core.types import LayerReport, LoraDAResult, LoraFactors, RunReport

__all__ = [
    "AdapterError",
    "ConvergenceError",
    "DataError",
    "LayerReport",
    "LoraDAConfig",
    "LoraDAError",
    "LoraDAResult",
    "LoraFactors",
    "ModelError",
    "OptionError",
    "Penalty",
    "Pipeline",
    "PluginError",
    "Preset",
    "RankError",
    "RunReport",
    "StorageError",
    "TargetError",
    "UnknownNameError",
    "build_pipeline",
    "estimate_memory",
    "get_lora_da_config",
    "get_lora_da_model",
    "get_lora_da_state_dict",
    "hookimpl",
    "hookspec",
    "init_before_training",
    "initialize_lora_da_weights",
    "list_plugins",
    "penalty_of",
    "preference_batches",
    "regularize_training",
    "trainer_plugin",
]
