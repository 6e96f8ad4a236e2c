"""DSpark Serve: lossless speculative decoding with confidence-scheduled verification.

``from dspark import LLM, SamplingParams`` needs neither Ray nor a server. Importing this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspark.sampling import AcceptanceRule, SamplingParams

if TYPE_CHECKING:
    from dspark.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AcceptanceRule", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from dspark.llm import LLM

        return LLM
    raise AttributeError(f"module 'dspark' has no attribute {name!r}")
