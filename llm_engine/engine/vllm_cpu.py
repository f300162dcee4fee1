"""Adapters on CPUs, several times faster than vLLM computes them there; the results are the same.

vLLM's kernels for CPUs copy an adapter's weights for every token of a step. Here the adapters in
all slots are applied to all tokens as two plain products, and what belongs to another adapter is
struck out in between: more arithmetic, and hardly any memory to move. Nothing depends on it but
speed.
"""

import logging
from typing import Any

logger = logging.getLogger("vllm.llm_engine")


def install() -> None:
    """In the processes that compute, before the model is loaded."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    try:
        theirs = PunicaWrapperCPU.add_lora_linear, PunicaWrapperCPU.update_metadata
    except AttributeError:
        logger.warning("vLLM's CPU kernels for LoRA have changed: adapters are slower than before")
        return
    PunicaWrapperCPU.add_lora_linear, PunicaWrapperCPU.update_metadata = _faster(*theirs)


def _faster(add_lora_linear: Any, update_metadata: Any) -> tuple[Any, Any]:
    def update(self: Any, *args: Any, **kwargs: Any) -> None:
        update_metadata(self, *args, **kwargs)
        self._own = None

    def add(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float,
        output_slices: tuple[int, ...], **kwargs: Any,
    ) -> None:  # fmt: skip
        if self.no_lora:
            return
        indices = self.token_lora_indices
        if scale != 1.0 or x.dim() != 2 or y.dim() != 2 or len(indices) != len(x):
            add_lora_linear(
                self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs
            )
            return
        if self._own is None:  # the same for all layers of a step
            slots, _, rank, _ = lora_a_stacked[0].shape
            self._own = own(indices, slots, rank, x.dtype)
        start = 0
        for a, b, length in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, start : start + length] += product(x, a, b, self._own)
            start += length

    return add, update


def own(indices: Any, slots: int, rank: int, dtype: Any) -> Any:
    """(tokens, slots * rank): 1 where a token's adapter is; nowhere for -1, which is none."""
    import torch

    chosen = indices.unsqueeze(1) == torch.arange(slots, device=indices.device)
    return chosen.to(dtype).repeat_interleave(rank, dim=1)


def product(x: Any, a: Any, b: Any, own: Any) -> Any:
    """x: (tokens, in); a: (slots, 1, rank, in); b: (slots, 1, out, rank)."""
    import torch

    slots, _, rank, width = a.shape
    shrunk = torch.nn.functional.linear(x, a.reshape(slots * rank, width)) * own
    joined = b.squeeze(1).transpose(0, 1).reshape(b.shape[2], slots * rank)
    return torch.nn.functional.linear(shrunk, joined)
