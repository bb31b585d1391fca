"""Make transformers know the model: by its model type, and by its class name where a command looks that up."""

import sys

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_attention.models.transnormer.configuration import TransnormerConfig
from lightning_attention.models.transnormer.modeling import TransnormerForCausalLM, TransnormerModel


def register() -> None:
    """Tell the Auto classes and ``transformers serve``; calling it again does no harm."""
    AutoConfig.register(TransnormerConfig.model_type, TransnormerConfig, exist_ok=True)
    AutoModel.register(TransnormerConfig, TransnormerModel, exist_ok=True)
    AutoModelForCausalLM.register(TransnormerConfig, TransnormerForCausalLM, exist_ok=True)
    # `transformers serve` asks the module `transformers` for the class by name, not the Auto classes. Where the command
    # was running before this package was imported it holds an older module of that name than sys.modules does, since
    # transformers' processing_utils executes the package a second time.
    command = sys.modules.get("transformers.cli.serving.model_manager")
    for module in (sys.modules["transformers"], getattr(command, "transformers", None)):
        if module is not None:
            setattr(module, TransnormerForCausalLM.__name__, TransnormerForCausalLM)
