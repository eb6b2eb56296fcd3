"""Tensor operations for each kind of device: linear layers, quantisation and the fused operations between products.

Imports nothing else of the project. One file a subject. An operation consists of

1. its variants, the fastest first: native code, and the Python binding that calls it;
2. a torch fallback in the same file, which runs on every device;
3. a check that a variant exists on this device and agrees with torch, made before the variant is used;
4. a property test in tests/unit that holds all variants equal.
"""
