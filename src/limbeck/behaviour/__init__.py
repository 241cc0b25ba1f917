"""Learning LoRA generators by behavioural matching, under the names that the method's own plan uses.

Thin doors to the rest of Limbeck: there is one implementation of deltas, losses, training and judging, and it is not here.  Recipes and the
command line do the same; ``docs/behaviour/index.md`` says which name stands for what.  Nothing else in Limbeck imports this package.
"""

from limbeck.adapters.delta_store import DeltaCache
from limbeck.adapters.functional import FunctionalLoRA
from limbeck.adapters.probe_texts import create_domain_probes, create_generic_probes
from limbeck.behaviour.config import TrainingConfig
from limbeck.behaviour.dataset import DeltaAugmentedDataset, Text2Qwen25LoRA_DeltaDataset, create_dataloader
from limbeck.behaviour.deltas import (
    compute_adapter_delta,
    compute_base_activation,
    compute_delta_differentiable,
    compute_delta_embedding,
)
from limbeck.behaviour.losses import DeltaOnlyLoss, MultiTaskLoss
from limbeck.behaviour.tokens import Qwen2515LoRA_Tokenizer2D
from limbeck.behaviour.training import evaluate, train

__all__ = [
    "DeltaAugmentedDataset",
    "DeltaCache",
    "DeltaOnlyLoss",
    "FunctionalLoRA",
    "MultiTaskLoss",
    "Qwen2515LoRA_Tokenizer2D",
    "Text2Qwen25LoRA_DeltaDataset",
    "TrainingConfig",
    "compute_adapter_delta",
    "compute_base_activation",
    "compute_delta_differentiable",
    "compute_delta_embedding",
    "create_dataloader",
    "create_domain_probes",
    "create_generic_probes",
    "evaluate",
    "train",
]
