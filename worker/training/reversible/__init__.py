"""Layers in two streams whose inputs are computed back from their outputs, bit for bit."""
