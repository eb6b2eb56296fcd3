"""Settings of the whole test run, read before anything else is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # there is no GPU: Triton's kernels run by its interpreter
