from .scheduling_one_step import OneStepScheduler, OneStepSchedulerOutput, student_scheduler

__all__ = ["OneStepScheduler", "OneStepSchedulerOutput", "student_scheduler"]
