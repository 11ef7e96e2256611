"""Filters of lists by metadata, as the SDK writes them into the query."""

from fastapi import Request

from models.errors import InvalidRequestError


def metadata_filter(request: Request) -> tuple[dict[str, str], bool]:
    """Return the pairs of ``metadata[key]=value``, and whether ``metadata=null`` was asked for."""
    pairs: dict[str, str] = {}
    without_metadata = False
    for name, value in request.query_params.multi_items():
        if name == "metadata" and value == "null":
            without_metadata = True
        elif name == "metadata":
            raise InvalidRequestError("Use 'metadata[key]=value' or 'metadata=null'.", param=name)
        elif name.startswith("metadata[") and name.endswith("]"):
            pairs[name.removeprefix("metadata[").removesuffix("]")] = value
    return pairs, without_metadata
