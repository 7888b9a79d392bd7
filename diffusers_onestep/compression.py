"""Students of other architectures than their teacher's: from a config, or as a narrower copy."""

import copy
from typing import Any

import diffusers
from diffusers import ModelMixin
from torch import nn

from . import models
from .pipelines import OneStepPipeline
from .teacher import Teacher


def network_from_config(config: dict[str, Any]) -> ModelMixin:
    """A diffusers model of random weights.

    Args:
        config (`dict`): as in a model's `config.json`; `_class_name` is a class of diffusers or of this package.

    Raises:
        ValueError: if there is no such model.
    """
    name = config.get("_class_name")
    cls = getattr(models, str(name), None) or getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"`_class_name` of the student's config must be a model of diffusers, but is {name!r}.")
    return cls.from_config(config)


def shrunk(network: nn.Module, factor: float) -> ModelMixin:
    """A network of random weights like `network` whose widths are `factor` times as large, in whole norm groups.

    Args:
        network (`ModelMixin`): a U-Net with `block_out_channels`, or a transformer with `num_attention_heads`.
        factor (`float`): 0.5 gives about a quarter of the parameters.
    """
    if not 0 < factor <= 1:
        raise ValueError(f"`shrink` must lie between 0 and 1, but is {factor}.")
    config = copy.deepcopy(dict(network.config))
    if "block_out_channels" in config:
        group = config.get("norm_num_groups") or 1
        widths = [max(1, round(factor * width / group)) * group for width in config["block_out_channels"]]
        config["block_out_channels"] = widths
    elif "num_attention_heads" in config:
        config["num_attention_heads"] = max(1, round(factor * config["num_attention_heads"]))
    else:
        raise ValueError(
            "`shrink` needs a network with `block_out_channels` or `num_attention_heads`, but "
            f"{type(network).__name__} has neither: give a `student_config`."
        )
    return network_from_config(config | {"_class_name": type(network).__name__})


def student_pipeline(teacher: Teacher, network: nn.Module) -> OneStepPipeline:
    """The repository of a multi-step student: the teacher's scheduler and labels."""
    teacher.check_distillable()
    return OneStepPipeline(network, teacher.scheduler, teacher.id2label)
