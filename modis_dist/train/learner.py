"""One side of the game: a phase, the networks that learn in it, and their optimiser; on one rank or on several."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from modis_dist.config.run import Optim
from modis_dist.model.networks import Modis
from modis_dist.objective import Batch, Rules, Terms, Weights
from modis_dist.train.checkpoint import Tensors
from modis_dist.train.cuda_graph import Captured, Inputs, recorder_on

Phase = Callable[[Modis, Batch, Weights, Rules], Terms]


class _WithinOneForward(nn.Module):
    """A phase as a module, as DDP wants it: all that leads to a loss happens in one forward.

    DDP sees the parameters that learn and nothing else: the two sides share none, and statistics of normalisation are
    equal on all ranks by themselves. A loss that differentiates on the way (the penalty) is exact this way, which it
    would not be with ``static_graph``.
    """

    def __init__(self, phase: Phase, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.learning = nn.ParameterList(parameters)
        self._phase = phase

    def forward(self, model: Modis, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """The terms of the phase."""
        return self._phase(model, batch, weights, rules)


def _summed(_: None, bucket: GradBucket) -> Future[Tensor]:
    """Some gradients, summed over ranks, where DDP would average.

    Waited for here, where a lost rank raises: DDP's own wait on a GPU is the GPU's, and need not end.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    work.wait()
    summed: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed


class Learner:
    """Takes the optimiser steps of one side, all replicates at once.

    On a GPU, alone, a step is recorded and replayed (``train.captured``). With ``scaled`` losses (fp16) a step whose
    gradients overflow is skipped, on every rank alike, and the scale is lowered.
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
        self._phase: nn.Module = _WithinOneForward(phase, self._parameters)
        if not model.world.alone:
            self._phase = DistributedDataParallel(self._phase, gradient_as_bucket_view=True)
            self._phase.register_comm_hook(None, _summed)
        device = self._parameters[0].device
        recorder = recorder_on(device) if model.world.alone else None
        self._lr, self._share = lr, 1.0
        self._captured = Captured(recorder, inputs) if recorder else None
        self.optimiser = torch.optim.Adam(
            self._parameters,
            lr=torch.tensor(lr, device=device) if recorder else lr,
            betas=(optim.beta1, optim.beta2),
            fused=True,
            capturable=recorder is not None,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def learn(self, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """One step on the sum over replicates, whose gradients are independent; its terms hold until the next."""
        if self._captured is not None:
            return self._captured(self._take_step, batch, weights, rules)
        return self._take_step(batch, weights, rules)

    def _take_step(self, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        terms: Terms = self._phase(self._model, batch, weights, rules)
        for parameter in self._parameters:
            parameter.grad = None  # what zero_grad does, less its bookkeeping
        scaled: Tensor = self.scaler.scale(terms.loss.sum())
        scaled.backward(inputs=self._parameters)  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimiser)
        self.scaler.update()
        terms.loss = terms.loss.detach()  # or its graph lives on, and with it the gradients' own memory
        return terms

    def record_anew(self) -> None:
        """Forget a recorded step: the next ones are taken one by one before it is recorded again."""
        if self._captured is not None:
            self._captured.forget()

    def set_rate(self, share: float) -> None:
        """Learning rate of the next step, as a share of the one it began with."""
        (group,) = self.optimiser.param_groups
        if not isinstance(group["lr"], Tensor):
            group["lr"] = share * self._lr
        elif share != self._share:
            group["lr"].fill_(share * self._lr)  # where a recorded step reads it
        self._share = share

    # --- what a checkpoint holds ----------------------------------------------------------------------------

    def steps(self) -> int:
        """Optimiser steps taken, skipped ones not counted."""
        held = self.optimiser.state.get(self._parameters[0])
        return int(held["step"]) if held else 0

    def moments(self) -> dict[str, Tensor]:
        """Both moments of every parameter."""
        found = {}
        for name, parameter in self.networks.named_parameters():
            if parameter in self.optimiser.state:
                found[f"{name}.first"] = self.optimiser.state[parameter]["exp_avg"]
                found[f"{name}.second"] = self.optimiser.state[parameter]["exp_avg_sq"]
        return found

    def state(self) -> dict[str, Any]:
        """What is not a tensor with replicates: plain values."""
        return {"steps": self.steps(), "scaler": self.scaler.state_dict()}

    def let_go(self) -> None:
        """Of what the next step makes anew: gradients, and a recorded step with its memory."""
        self.record_anew()
        for parameter in self._parameters:
            parameter.grad = None

    def restore(self, moments: Tensors, state: dict[str, Any], *, copy: bool = True) -> None:
        """The inverse of ``moments`` and ``state``; without ``copy`` the moments are those given."""
        self.record_anew()
        for name, parameter in self.networks.named_parameters():
            if f"{name}.first" in moments:
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(state["steps"]), device=parameter.device),
                    "exp_avg": moments[f"{name}.first"].to(parameter, copy=copy),
                    "exp_avg_sq": moments[f"{name}.second"].to(parameter, copy=copy),
                }
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
