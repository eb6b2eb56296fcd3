"""Matrix products, quantisation and small tensor operations, each for the devices that have it.

Imports nothing else of the project.
"""
