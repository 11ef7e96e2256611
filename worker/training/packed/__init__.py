"""Training without padding, on unmodified Hugging Face models.

Rows lie one after another in ``[1, T]``; attention, adapters and the loss know where each begins.
``worker.training.forward`` says how a batch goes through a model, `rewire` swaps the forward passes
of modules for those of `lora` and `norm`, which keep less and fuse what reads the same input, and
on a CPU those of whole layers for `fused_layer`.
"""
