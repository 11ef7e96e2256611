"""Data sets: from uploaded bytes to rows of a known form, and what is wrong with them.

A file passes ``reader`` (containers and formats: bytes to records), ``shapes`` (records to rows of
one form) and ``lint`` (every fault by line, place and remedy). Nothing here needs torch.
"""
