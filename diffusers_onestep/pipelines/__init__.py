from .pipeline_one_step import OneStepPipeline

__all__ = ["OneStepPipeline"]
