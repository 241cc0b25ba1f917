"""LoRA generators for coding agents, under the names that the method's own plan uses.

Thin doors to the rest of Limbeck: there is one implementation of the generator, of injection, of the loss and of reading trajectories, and
it is not here.  The recipe ``agentic_lora`` and the command line do the same, sharded, stored and resumable; ``docs/agentic.md`` says which
name stands for what.  Nothing else in Limbeck imports this package.
"""

from limbeck.agentic.cluster import STUDENT_CONFIG, TEACHER_CONFIG, teacher_options
from limbeck.agentic.data import load_trajectories
from limbeck.agentic.hypernetwork import AgenticHyperNetwork
from limbeck.agentic.injection import student_forward_with_lora, student_with_lora
from limbeck.agentic.losses import top_k_kl_divergence
from limbeck.agentic.training import train_step

__all__ = [
    "STUDENT_CONFIG",
    "TEACHER_CONFIG",
    "AgenticHyperNetwork",
    "load_trajectories",
    "student_forward_with_lora",
    "student_with_lora",
    "teacher_options",
    "top_k_kl_divergence",
    "train_step",
]
