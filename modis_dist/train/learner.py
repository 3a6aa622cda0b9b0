"""Learner of the VAEs or the discriminator: its phase, networks and optimiser, on one or several ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from modis_dist.config.run import Optim
from modis_dist.model.networks import Modis
from modis_dist.objective import Batch, Rules, Terms, Weights
from modis_dist.train.checkpoint import Tensors
from modis_dist.train.cuda_graph import CapturedStep, Inputs, capture_for

Phase = Callable[[Modis, Batch, Weights, Rules], Terms]


class _PhaseModule(nn.Module):
    """A phase as a module for DDP, which needs the whole computation of a loss in one ``forward``.

    DDP sees only the trained parameters: the two sides share none, and running statistics are equal on all ranks.
    """

    def __init__(self, phase: Phase, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self._phase = phase

    def forward(self, model: Modis, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """Return the terms of the phase."""
        return self._phase(model, batch, weights, rules)


def _sum_gradients(_: None, bucket: GradBucket) -> Future[Tensor]:
    """Sum gradients over ranks, where DDP would average.

    Waits here, where a lost rank raises an error; DDP itself would wait on the GPU, possibly forever.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    work.wait()
    future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


class Learner:
    """Takes the optimiser steps of one side for all slots at once.

    On a GPU with one rank, steps replay a CUDA graph (``cuda_graph``). With ``scaled`` losses (fp16), a step whose
    gradients overflow is skipped on every rank, and the scale is reduced.
    """

    def __init__(
        self,
        phase: Phase,
        model: Modis,
        networks: nn.Module,
        *,
        optim: Optim,
        lr: float,
        scaled: bool,
        inputs: Inputs,
    ) -> None:
        self._model = model
        self.networks = networks
        self._parameters = list(networks.parameters())
        self._phase: nn.Module = _PhaseModule(phase, self._parameters)
        if not model.world.alone:
            self._phase = DistributedDataParallel(self._phase, gradient_as_bucket_view=True)
            self._phase.register_comm_hook(None, _sum_gradients)
        device = self._parameters[0].device
        capture = capture_for(device) if model.world.alone else None
        self._lr, self._factor = lr, 1.0
        self._graph = CapturedStep(capture, inputs) if capture else None
        self.optimiser = torch.optim.Adam(
            self._parameters,
            lr=torch.tensor(lr, device=device) if capture else lr,
            betas=(optim.beta1, optim.beta2),
            fused=True,
            capturable=capture is not None,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def learn(self, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """Take a step on the loss summed over slots, which are independent; terms are valid until the next step."""
        if self._graph is not None:
            return self._graph(self._take_step, batch, weights, rules)
        return self._take_step(batch, weights, rules)

    def _take_step(self, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        terms: Terms = self._phase(self._model, batch, weights, rules)
        for parameter in self._parameters:
            parameter.grad = None  # as zero_grad does, without its bookkeeping
        scaled: Tensor = self.scaler.scale(terms.loss.sum())
        scaled.backward(inputs=self._parameters)  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimiser)
        self.scaler.update()
        terms.loss = terms.loss.detach()  # frees the graph
        return terms

    def invalidate_graph(self) -> None:
        """Drop the CUDA graph of the step, which is captured again after warm-up."""
        if self._graph is not None:
            self._graph.invalidate()

    def set_rate(self, factor: float) -> None:
        """Set the learning rate of the next step, as a fraction of the initial one."""
        (group,) = self.optimiser.param_groups
        if not isinstance(group["lr"], Tensor):
            group["lr"] = factor * self._lr
        elif factor != self._factor:
            group["lr"].fill_(factor * self._lr)  # in place: a CUDA graph reads it
        self._factor = factor

    # --- checkpoints ----------------------------------------------------------------------------------------

    def steps(self) -> int:
        """Return the number of optimiser steps taken, without skipped ones."""
        state = self.optimiser.state.get(self._parameters[0])
        return int(state["step"]) if state else 0

    def moments(self) -> dict[str, Tensor]:
        """Return both Adam moments of every parameter."""
        moments = {}
        for name, parameter in self.networks.named_parameters():
            if parameter in self.optimiser.state:
                moments[f"{name}.first"] = self.optimiser.state[parameter]["exp_avg"]
                moments[f"{name}.second"] = self.optimiser.state[parameter]["exp_avg_sq"]
        return moments

    def state(self) -> dict[str, Any]:
        """Return the plain values, which have no slot axis."""
        return {"steps": self.steps(), "scaler": self.scaler.state_dict()}

    def release_memory(self) -> None:
        """Free the gradients and the CUDA graph, which later steps recreate."""
        self.invalidate_graph()
        for parameter in self._parameters:
            parameter.grad = None

    def restore(self, moments: Tensors, state: dict[str, Any], *, copy: bool = True) -> None:
        """Load what ``moments`` and ``state`` returned; without ``copy`` the given tensors are used."""
        self.invalidate_graph()
        for name, parameter in self.networks.named_parameters():
            if f"{name}.first" in moments:
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(state["steps"]), device=parameter.device),
                    "exp_avg": moments[f"{name}.first"].to(parameter, copy=copy),
                    "exp_avg_sq": moments[f"{name}.second"].to(parameter, copy=copy),
                }
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
