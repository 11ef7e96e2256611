"""Training without padding, on unmodified Hugging Face models.

Rows lie one after another in ``[1, T]``; attention, adapters and the loss know where each begins.
`forward` says how a batch goes through a model, `rewire` swaps the forward passes of modules for
those of `lora`, `norm` and `gated_mlp`, which store less and fuse what reads the same input.
"""
