"""The shape of a base model, read from the headers of its weights: no tensor is loaded."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.domain.estimates import BaseShape, Family, LayerShape
from worker.heads import family_of


def read_shape(directory: Path) -> BaseShape:
    """Return the linear layers of the model in `directory` and the size of the rest.

    Matrices inside a numbered block count as linear layers; embeddings, head and norms do not.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    sizes: dict[str, Sequence[int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                sizes[name] = tensors.get_slice(name).get_shape()
    family = family_of(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    return _shape_of(sizes, family)


def _shape_of(sizes: Mapping[str, Sequence[int]], family: Family) -> BaseShape:
    kinds: Counter[tuple[str, int, int]] = Counter()
    norms: Counter[int] = Counter()
    blocks = set()
    for name, size in sizes.items():
        path, _, kind = name.rpartition(".")
        block = _block(path)
        if block is None:
            continue
        blocks.add(block)
        if kind == "weight" and len(size) == 2:
            outputs, inputs = size
            if list(sizes.get(f"{path}.bias", ())) == [inputs] != [outputs]:
                outputs, inputs = inputs, outputs  # transposed, as GPT-2's are
            kinds[path.rpartition(".")[2], outputs, inputs] += 1
        elif kind == "weight" and len(size) == 1:
            norms[size[0]] += 1
    # Layers of one name and several sizes become one of their most common size.
    layers: dict[str, LayerShape] = {}
    for (name, outputs, inputs), count in kinds.most_common():
        known = layers.get(name)
        if known is None:
            layers[name] = LayerShape(outputs=outputs, inputs=inputs, count=count)
        else:
            layers[name] = known.model_copy(update={"count": known.count + count})
    n_linear = sum(layer.n_parameters for layer in layers.values())
    [(width, n_weights)] = norms.most_common(1) or [(0, 0)]
    beside_weights = sum(
        1
        for name, size in sizes.items()
        if name.endswith(".bias")
        and f"{name[:-4]}weight" in sizes
        and list(size) == [width]
        and len(sizes[f"{name[:-4]}weight"]) == 1
        and _block(name) is not None
    )
    return BaseShape(
        layers=layers,
        n_other=sum(math.prod(size) for size in sizes.values()) - n_linear,
        family=family,
        n_blocks=len(blocks),
        width=width,
        n_norms=width * (n_weights + beside_weights),
        n_biases=sum(math.prod(size) for name, size in sizes.items() if name.endswith(".bias")),
    )


def _block(path: str) -> str | None:
    """Return the path up to its first number, if it has one."""
    parts = path.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else None
