"""How a teacher is made: denoising score matching in the network's own prediction space (Ho et al. 2020, Eq. 14)."""

from ..denoiser import Denoiser
from .base import Distiller, Paper, normal, sample_shape_of, uniform


class Pretraining(Distiller):
    """Train a diffusion network on real images: the "student" is the teacher of later runs.

    Args:
        student (`Denoiser`): the network to train.
        null_label (`int`, *optional*): label that replaces the true one with probability `label_dropout`, for
            guidance.
        label_dropout (`float`, *optional*, defaults to 0.1): as in Ho & Salimans 2022, Sec. 5.
    """

    paper = Paper(
        title="Denoising Diffusion Probabilistic Models",
        arxiv_id="2006.11239",
        citation="Ho, Jain, Abbeel, NeurIPS 2020",
    )
    max_grad_norm = 1.0

    def __init__(self, student: Denoiser, null_label: int | None = None, label_dropout: float = 0.1):
        self.student = student
        self.null_label = null_label
        self.label_dropout = label_dropout
        self.sample_shape = sample_shape_of(student)

    @property
    def trainable(self):
        return {"student": self.student.network}

    def updates(self, batch, generator=None):
        x0, cond = batch["x0"], dict(batch["cond"])
        batch_size, schedule = x0.shape[0], self.student.schedule
        if self.null_label is not None:
            dropped = uniform(batch_size, generator, x0.device) < self.label_dropout
            cond["class_labels"] = cond["class_labels"].masked_fill(dropped, self.null_label)
        t = schedule.grid((uniform(batch_size, generator, x0.device) * schedule.num_train_timesteps).long())
        noise = normal(x0.shape, generator, x0.device)
        pred_x0 = self.student(self.student.add_noise(x0, noise, t), t, cond)
        yield "student", (self.student.weight(t) * (pred_x0 - x0) ** 2).mean()
