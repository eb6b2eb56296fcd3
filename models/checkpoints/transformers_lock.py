"""One thread at a time makes or loads a transformers model.

While it does, transformers replaces functions of itself and of torch (how weights are tied and initialised, the default
type) and puts back what it found. Two threads at once put back each other's replacements, for good: from then on models
with tied embeddings have an output layer of uninitialised memory.
"""

from __future__ import annotations

import threading

TRANSFORMERS_LOCK = threading.RLock()
