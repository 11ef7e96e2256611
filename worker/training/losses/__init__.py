"""Losses over what a forward pass gives: plain functions of tensors."""
