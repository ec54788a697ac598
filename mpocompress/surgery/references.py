"""What modules hold beside their registered parameters, buffers and children.

`nn.Module` registers what is assigned to an attribute directly. A parameter in a plain list, a
cached activation, or a function that closes over a layer are invisible to `named_parameters`, and
each of them goes wrong in its own way when the model is copied with other layers inside.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

# Registered state is walked by name elsewhere; hooks on saving and loading take no part in a call.
_SKIPPED = frozenset(
    {
        "_parameters",
        "_modules",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
_DEPTH = 4


def held_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the attributes of one module hold, through plain lists, tuples, sets and dicts.

    Yields:
        `(path, value)` such as `("groups[0]['params'][1]", parameter)`; buffers and call hooks are
        attributes too (`_buffers['mean']`). Objects of other classes are not looked into.
    """
    for attribute, value in vars(module).items():
        if attribute not in _SKIPPED:
            yield from _walk(attribute, value, _DEPTH)


def _walk(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    # A depth, not a set of what was seen, also ends the walk through a list that holds itself.
    if isinstance(value, dict):
        items = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        items = [(f"{path}[{position}]", item) for position, item in enumerate(value)]
    else:
        yield path, value
        return
    if depth > 0:
        for inner_path, item in items:
            yield from _walk(inner_path, item, depth - 1)
