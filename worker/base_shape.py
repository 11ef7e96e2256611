"""The shape of a base model, read from the headers of its weights: no tensor is loaded."""

from collections import Counter
from pathlib import Path

from models.domain.estimates import BaseShape, LayerShape
from worker.heads import family_of


def read_shape(directory: Path) -> BaseShape:
    """Return the linear layers of the model in `directory` and the size of the rest.

    Matrices inside a numbered block count as linear layers; embeddings, head and norms do not.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    kinds: Counter[tuple[str, int, int]] = Counter()
    n_all = 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                size = tensors.get_slice(name).get_shape()
                n_elements = 1
                for dimension in size:
                    n_elements *= dimension
                n_all += n_elements
                path, _, kind = name.rpartition(".")
                in_block = any(part.isdigit() for part in path.split("."))
                if kind == "weight" and len(size) == 2 and in_block:
                    kinds[path.rpartition(".")[2], size[0], size[1]] += 1
    # Layers of one name and several sizes become one of their most common size.
    layers: dict[str, LayerShape] = {}
    for (name, outputs, inputs), count in kinds.most_common():
        known = layers.get(name)
        if known is None:
            layers[name] = LayerShape(outputs=outputs, inputs=inputs, count=count)
        else:
            layers[name] = known.model_copy(update={"count": known.count + count})
    n_linear = sum(outputs * inputs * count for (_, outputs, inputs), count in kinds.items())
    family = family_of(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    return BaseShape(layers=layers, n_other=n_all - n_linear, family=family)
