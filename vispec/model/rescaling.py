"""What a target does to logits after its output head: some scale them, some bound them by tanh.

Greedily chosen tokens stay the same, sampled ones do not. Which of its config's numbers a class applies, and how,
differs between classes and between versions of transformers, so it is not read but seen: the model runs over one token
while known numbers stand in for what its head says.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

FACTORS = ("logits_scaling", "logit_scale", "output_multiplier")
"""Names by which configs give a factor of logits or its inverse."""
CAP = "final_logit_softcapping"
PROBE = 40.0
"""Stand-in logits reach from minus to plus this."""

Rescaling = Callable[[torch.Tensor], torch.Tensor]


def find_rescaling(model: PreTrainedModel, lm_head: nn.Module) -> Rescaling | None:
    """What follows the output head: (…, V) -> (…, V); None for nothing, as in targets whose config has no such number.

    Raises:
        ValueError: the config has such a number, and what the model makes of it is not known here.
    """
    config = model.config.get_text_config()
    factors = [float(f) for f in (getattr(config, name, None) for name in FACTORS) if f not in (None, 1.0)]
    cap = getattr(config, CAP, None)
    if not factors and not cap:
        return None
    said, logits = _probe(model, lm_head)
    scales = [None, *(partial(operation, by) for by in factors for operation in (_divided, _multiplied))]
    bounds = [None, *([partial(_capped, float(cap))] if cap else [])]
    for bound in bounds:
        for scale in scales:
            steps = [step for step in (scale, bound) if step is not None]
            if torch.allclose(_all(steps, said).float(), logits.float(), rtol=1e-2, atol=1e-3):
                return partial(_all, steps) if steps else None
    raise ValueError(f"{type(model).__name__} changes logits after its output head in a way that is not known here")


@torch.no_grad()
def _probe(model: PreTrainedModel, lm_head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, 1, V) that stand in for the head's, and what the model makes of them."""
    said = []

    def stand_in(module, args, output):
        numbers = torch.linspace(-PROBE, PROBE, output.shape[-1], device=output.device, dtype=output.dtype)
        said.append(numbers.expand_as(output).clone())
        return said[0].clone()  # some models change what the head says in place

    ids = torch.ones(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with lm_head.register_forward_hook(stand_in):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return said[0], logits.to(said[0].device)


def _all(steps: list[Rescaling], logits: torch.Tensor) -> torch.Tensor:
    for step in steps:
        logits = step(logits)
    return logits


def _divided(by: float, logits: torch.Tensor) -> torch.Tensor:
    return logits / by


def _multiplied(by: float, logits: torch.Tensor) -> torch.Tensor:
    return logits * by


def _capped(cap: float, logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / cap) * cap
