"""Does a drafter fit its target? A wrong tap or anchor convention is silent: acceptance falls to nothing, without an error.

A few rounds on built-in text at load say so loudly instead.
"""

from __future__ import annotations

from typing import Any

from dspark.sampling import SamplingParams
from dspark.types import Mode, Request, Speculation
from dspark.workers.verifier.counters import EngineCounters
from dspark.workers.verifier.engine import Engine

TEXTS = (
    "The water cycle describes how water moves between the oceans, the air and the land. First,",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return",
)
MAX_TOKENS = 32
SUSPICIOUS = 1.1  # tokens a round; a drafter trained for this target is well above on plain text


def acceptance_on_builtin_text(engine: Engine, tokenizer: Any) -> float | None:
    """Tokens a round (tau) of greedy generation on built-in text with every draft verified; None if no draft came.

    Leaves the engine as it was.
    """
    assert not engine.has_work
    speculation = Speculation(Mode.STATIC, engine.drafter.block_size)
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    for i, text in enumerate(TEXTS):
        ids = tuple(tokenizer.encode(text))[: engine.options.max_model_len - MAX_TOKENS]
        engine.add(Request(f"self-check-{i}", ids, sampling, speculation=speculation))
    before, engine.counters = engine.counters, EngineCounters()
    while engine.has_work:
        engine.step()
    counters, engine.counters = engine.counters, before
    engine.pool.clear_cache()
    return 1.0 + counters.accepted / counters.drafted_rounds if counters.drafted_rounds else None
