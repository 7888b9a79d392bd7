"""Class labels as people give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Labels = int | str | Sequence[int | str] | np.ndarray | torch.Tensor


def named_labels(id2label: Mapping | None, network: Any) -> dict[int, str] | None:
    """Names of the labels by id: those given (JSON has strings for ids), else those in the network's config."""
    names = id2label or getattr(getattr(network, "config", None), "id2label", None)
    return {int(number): name for number, name in names.items()} if names else None


def label_ids(labels: Labels, num_labels: int, id2label: dict[int, str] | None) -> torch.Tensor:
    """Labels by id or name, `(B,)` int64.

    Args:
        labels (`int`, `str`, list of them or `torch.Tensor`): what was asked for; names are compared without case.
        num_labels (`int`): allowed ids are 0..num_labels-1.
        id2label (`dict`, *optional*): names of the ids.

    Raises:
        ValueError: on an unknown label, with the labels that there are.
    """
    if isinstance(labels, (torch.Tensor, np.ndarray, np.generic)):
        labels = labels.reshape(-1).tolist()
    elif isinstance(labels, (int, str)):
        labels = [labels]
    names = {name.casefold(): number for number, name in (id2label or {}).items()}
    ids = []
    for label in labels:
        number = names.get(label.casefold()) if isinstance(label, str) else label
        if number is None or number != int(number) or not 0 <= number < num_labels:
            known = list((id2label or {}).values())
            allowed = f"0..{num_labels - 1}" + (f" or one of {known}" if known else "")
            raise ValueError(f"`class_labels` must be {allowed}, but is {label!r}.")
        ids.append(int(number))
    return torch.tensor(ids, dtype=torch.long)


def label_embeddings(network: Any) -> int | None:
    """How many labels `network`, or one of this config, embeds, a null label included where it is one of them; None if
    it takes none."""
    config = getattr(network, "config", network)
    return config.get("num_class_embeds", config.get("num_embeds_ada_norm"))
