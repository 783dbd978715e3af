"""`compile_step`: forward, loss, backward and update of an MLP as one operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .. import _C, functional, nn
from ..data.loader import BatchLoader, Opened
from ..functions import check
from ..functions.gate import any_autocast, is_traced
from ..functions.products import arguments
from ..functions.softmax_ce import check_classes
from ..functions.table import HAS_CUDA
from ..nn.mlp import _Plan
from .on_gpu import IGNORE, Network, Runner, is_gpu
from .optimizers import SGD, AdamW, adamw_row, sgd_row

__all__ = ["CompiledStep", "compile_step"]

# Nothing here is for autograd to record.
_library = torch.library.Library("torchbp_trainer", "IMPL")
for _name in ("open", "steps", "again", "fits", "begin_step", "update", "logits", "close"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _under_autocast(*_: Any) -> Tensor:
    raise RuntimeError("compile_step wants no autocast")  # `_build` says it better


# The dispatcher sees autocast for nothing; to ask for it takes a hundredth of a small step.
_library.impl("again", _under_autocast, "AutocastCPU")

_open_trainer = torch.ops.torchbp_trainer.open.default._op
_run_steps = torch.ops.torchbp_trainer.steps.default._op
_run_again = torch.ops.torchbp_trainer.again.default._op
_run_epoch = torch.ops.torchbp_trainer.epoch.default._op
_logits_of = torch.ops.torchbp_trainer.logits.default._op
_close_trainer = torch.ops.torchbp_trainer.close.default._op
_increment_version = torch._C._increment_version
_unchanged = _C.unchanged
_requires_grad = torch._C.TensorBase.requires_grad  # its descriptor

_OP = "compile_step"
_HINT = "or train through autograd"
_NEVER: tuple[tuple[object, object, object], ...] = (([], None, 1),)  # conditions that do not hold

#: Numbers that the batches of an epoch hold which are made at a time on a GPU: 64 MiB.
_CHUNK = 1 << 24

#: The optimizers whose rules the operation knows, by its name for them.
_RULES: dict[type[Optimizer], str] = {
    torch.optim.SGD: "sgd", SGD: "sgd", torch.optim.AdamW: "adamw", AdamW: "adamw"
}  # fmt: skip
_ROWS = {"sgd": sgd_row, "adamw": adamw_row}
_STATE = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq", "step")}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    module_hooks._global_forward_hooks,
    module_hooks._global_forward_pre_hooks,
    module_hooks._global_backward_hooks,
    module_hooks._global_backward_pre_hooks,
]


def compile_step(
    model: torch.nn.Module, optimizer: Optimizer, label_smoothing: float = 0.0
) -> CompiledStep:
    """A function that does one training step of an MLP: `step(x, target) -> loss`.

    It does what these lines do, to rounding, in one operation without an autograd graph:

        loss = torch.nn.functional.cross_entropy(model(x), target, label_smoothing=label_smoothing)
        optimizer.zero_grad(); loss.backward(); optimizer.step()

    The parameters and the state of the optimizer are updated in place, in the very tensors of
    `model` and `optimizer`: steps of this function and steps through autograd can be mixed in any
    order, and checkpoints hold. Learning rates and the other hyperparameters are read from
    `optimizer.param_groups` in each step. The gradients `p.grad` stay as they are. A step for which
    the optimizer has no state yet, which is the first, runs through autograd and
    `optimizer.step()`.

    On a GPU nothing waits for the step. A network that fits into the memory of one block of
    threads, with its batch (some 50,000 numbers in all on an H100: widths of 100, batches of 32),
    runs there, all steps of a `scan` or `epoch` in one kernel. Any other runs as a CUDA graph: the
    first step with as many rows runs operation by operation, the second one records them, and the
    next ones replay what was recorded. Learning rates may change all the same. A class index out of
    range raises IndexError where the indices are looked at: in the first steps, `scan` and the
    epochs of a `BatchLoader`. Elsewhere the loss is nan, and the row has no gradient. All this has
    run on an emulator so far, and on no GPU.

    Args:
        model: a `torchbp.nn.MLP`, a `torch.nn.Sequential` of Linear and one kind of activation that
            `MLP.from_sequential` takes, or one Linear; float32, on the CPU or a CUDA device. What
            has `requires_grad=False` is not trained.
        optimizer: `torch.optim.SGD` or `AdamW`, or those of torchbp.optim, with any options but
            `amsgrad`, `capturable` and `differentiable`; it holds every parameter that is trained.
        label_smoothing: of the cross-entropy, 0 to 1.

    Raises:
        TypeError, ValueError: something that would not give the same results: another kind of model
            or optimizer, active dropout, hooks (of a module, a parameter or the optimizer), tied
            weights, autocast. The step raises them too, when that comes about later; hooks of
            parameters are looked for here alone.

    Example:
        >>> model = nn.MLP([2, 8, 2], activation="tanh")
        >>> optimizer = SGD(model.parameters(), lr=0.5)
        >>> step = compile_step(model, optimizer)
        >>> x, target = torch.eye(2), torch.tensor([0, 1])
        >>> losses = [step(x, target).item() for _ in range(50)]
        >>> losses[-1] < 0.5 * losses[0]
        True
    """
    return CompiledStep(model, optimizer, label_smoothing)


class CompiledStep:
    """What `compile_step` returns.

    Attributes:
        model, optimizer, label_smoothing: as they were given.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: Optimizer, label_smoothing: float = 0.0
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{_OP}: model wants a torch.nn.Module, got {type(model).__name__}")
        if type(optimizer) not in _RULES:
            raise TypeError(
                f"{_OP}: optimizer wants SGD or AdamW of torch.optim or torchbp.optim, "
                f"got {type(optimizer).__name__}"
            )
        self.label_smoothing = check.number(_OP, "label_smoothing", label_smoothing)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{_OP}: label_smoothing wants 0 to 1, got {label_smoothing}")
        self.model, self.optimizer = model, optimizer
        self._rule = _RULES[type(optimizer)]
        self._row = _ROWS[self._rule]
        self._trainer: int | None = None
        self._known: list[float] | None = None  # the hyperparameters of the trainer's last step
        self._runner: Runner | None = None  # on a GPU
        self._close: Callable[[], Any] | None = None
        self._logits: Tensor | None = None  # of the last step, if that was through autograd
        self._build()

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Train on one batch.

        Args:
            x: float32 [B, D], on the device of the model.
            target: class indices, int64 [B]; rows with -100 do not count.

        Returns:
            the loss before the update, float32, without a graph.

        Raises:
            TypeError, ValueError: of another dtype, device or shape.
            IndexError: a class index out of range. Nothing has changed then. On a GPU the loss may
                be nan instead (see `compile_step`).
        """
        if is_traced():
            return _outside_of_the_graph(self, x, target)
        hyper, plain = self._look(), not getattr(x, "requires_grad", True)
        if plain and hyper is self._known:
            return self._train(_run_again, (self._trainer, x, target), (x, target))
        self._refuse_autocast()
        if self._state is None or not plain:
            self._check_batch(x, target)
            return self._through_autograd(x, target)
        if x.dim() != 2:
            self._check_batch(x, target)
        return self._run(x, target, hyper)

    def logits(self) -> Tensor:
        """What the model said to the last batch, before its update: float32 [B, C].

        Raises:
            RuntimeError: there was no step yet, or model or optimizer were changed after it.
        """
        if self._logits is not None:
            return self._logits
        if self._trainer is None:
            raise RuntimeError(f"{_OP}: there are no logits before the first step")
        if self._runner is not None:
            return self._runner.logits()
        return _logits_of(self._trainer, self._weights[0])  # type: ignore[no-any-return]

    def scan(self, xs: Tensor, targets: Tensor, scheduler: LRScheduler | None = None) -> Tensor:
        """Train on a row of batches in one call, as jax.lax.scan would.

        Args:
            xs: float32 [steps, B, D].
            targets: int64 [steps, B].
            scheduler: stepped once after each step.

        Returns:
            the losses, float32 [steps].

        Raises:
            TypeError, ValueError, IndexError: as for one step; nothing has changed then.
        """
        self._check_batch(xs, targets, many=True)
        self._check_scheduler(scheduler)
        return self._scan(xs, targets, scheduler)

    def _scan(self, xs: Tensor, targets: Tensor, scheduler: LRScheduler | None) -> Tensor:
        """`scan` of what was checked."""
        self._prepare()
        losses = []
        if len(xs) and self._state is None:
            losses.append(self(xs[0], targets[0]).reshape(1))
            if scheduler is not None:
                scheduler.step()
            xs, targets = xs[1:], targets[1:]
            self._prepare()
        if len(xs):
            hyper = self._hyper_of(len(xs), scheduler)
            losses.append(self._run(xs, targets, hyper))
        return torch.cat(losses) if losses else xs.new_empty(0)

    def epoch(
        self,
        loader: BatchLoader | Iterable[tuple[Tensor, Tensor]],
        scheduler: LRScheduler | None = None,
    ) -> Tensor:
        """Train on every batch of a loader once.

        Args:
            loader: of (x, target), each as for one step.
            scheduler: stepped once after each step.

        Returns:
            the losses, float32 [steps].

        Raises:
            TypeError, ValueError, IndexError: as for one step.
        """
        self._check_scheduler(scheduler)
        if isinstance(loader, BatchLoader) and loader.dtype == torch.float32 and loader.flatten:
            if is_gpu(self._device):
                if loader._is_on(self._device):
                    return self._epoch_on_gpu(loader, scheduler)
            elif loader._is_on_cpu():
                return self._epoch_of_images(loader, scheduler)
        return self._epoch(loader, scheduler)

    def _epoch_on_gpu(self, loader: BatchLoader, scheduler: LRScheduler | None) -> Tensor:
        """An epoch whose batches are made there, many at a time."""
        self._prepare()
        plan = loader._plan(loader.epoch)
        check_classes(plan.target, self._weights[-1].shape[0], IGNORE)
        read = loader._reader_on_gpu(plan)
        loader.epoch += 1
        size, images = loader.batch_size, len(plan.order)
        whole = images // size * size
        chunk = max(1, _CHUNK // (size * self._weights[0].shape[1])) * size
        parts = [(begin, min(chunk, whole - begin), size) for begin in range(0, whole, chunk)]
        if whole < images and not loader.drop_last:
            parts.append((whole, images - whole, images - whole))
        losses = []
        for begin, count, rows in parts:
            x, target = read(begin, count)
            batches = x.view(-1, rows, x.shape[1]), target.view(-1, rows)
            losses.append(self._scan(*batches, scheduler))
        return torch.cat(losses) if losses else torch.empty(0, device=self._device)

    def _epoch_of_images(self, loader: BatchLoader, scheduler: LRScheduler | None) -> Tensor:
        """An epoch in one call, its batches made on the way."""
        self._prepare()
        begin, count = 0, len(loader)
        plan = loader._plan(loader.epoch)
        images = Opened(loader, plan)
        loader.epoch += 1
        losses = []
        if count and self._state is None:  # the first batch makes it
            losses.append(self(*images(0)).reshape(1))
            begin = loader.batch_size
            if scheduler is not None:
                scheduler.step()
            count -= 1
            self._prepare()
        if count:
            check_classes(plan.target, self._weights[-1].shape[0], IGNORE)
            hyper = self._hyper_of(count, scheduler)
            self._known = None
            arguments = (self._trainer, images.number, begin, loader.drop_last, hyper)
            losses.append(self._train(_run_epoch, arguments, lambda: images(begin)))
        return torch.cat(losses) if losses else torch.empty(0)

    def _epoch(
        self, loader: Iterable[tuple[Tensor, Tensor]], scheduler: LRScheduler | None
    ) -> Tensor:
        losses = []
        for x, target in loader:
            losses.append(self(x, target))
            if scheduler is not None:
                scheduler.step()
        return torch.stack(losses) if losses else torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.optimizer, self.label_smoothing)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model}, {self.optimizer}, {self.label_smoothing})"

    # ---- the step

    def _prepare(self) -> list[float]:
        """The hyperparameters of a step, after a look at whether it can be done."""
        self._refuse_autocast()
        return self._look()

    def _refuse_autocast(self) -> None:
        if any_autocast():
            self._build()  # which says it

    def _look(self) -> list[float]:
        """The hyperparameters of a step, after a look at whether all is as `_build` saw it."""
        if not _unchanged(self._conditions):
            self._build()
        if not _unchanged(self._options):
            self._read_options()
        return self._row_of_step

    def _read_options(self) -> None:
        """Keep the hyperparameters, and the options that they were read from as conditions: to read
        them anew takes several times as long as to see that nobody has changed them."""
        self._options = _NEVER
        hyper = self._hyper()
        if [hyper[i] != 0 for i in self._momenta] != self._has_momentum:
            self._find_state(hyper)
        groups = [self.optimizer.param_groups[i] for i in self._used]
        options = [
            (group, *item) for group in groups for item in group.items() if item[0] != "params"
        ]
        self._row_of_step = hyper
        if all(_is_fixed(value) for _, _, value in options):
            self._options = tuple(options)

    def _run(self, x: Tensor, target: Tensor, hyper: list[float]) -> Tensor:
        if self._runner is not None:
            return self._train(self._runner.steps, (x, target, hyper), (x, target))
        self._known = None  # if this raises
        losses = self._train(_run_steps, (self._trainer, x, target, hyper), (x, target))
        self._known = hyper
        return losses

    def _train(
        self,
        operation: Callable[..., Tensor],
        arguments: tuple[Any, ...],
        batch: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Run an operation of the trainer; `batch`, or what gives it, is to blame if it fails."""
        try:
            losses = operation(*arguments)
        except (RuntimeError, TypeError):
            self._build()  # each says it better, if it is the model or the batch that is bad
            x, target = batch() if callable(batch) else batch
            self._check_batch(
                x,
                target,
                many=operation is not _run_again and isinstance(x, Tensor) and x.dim() == 3,
            )
            raise
        self._logits = None
        # A graph that holds a parameter has to see that it was changed, and a scheduler that there
        # was a step.
        _increment_version(self._trained)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return losses

    def _hyper(self) -> list[float]:
        """The hyperparameters of the groups in use, one row after the other."""
        groups, row = self.optimizer.param_groups, self._row
        return [value for i in self._used for value in row(groups[i])]

    def _hyper_of(self, steps: int, scheduler: LRScheduler | None) -> list[float]:
        """The hyperparameters of some steps to come; the scheduler is stepped for each."""
        if scheduler is None:
            return self._hyper()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        hyper = []
        for _ in range(steps):
            hyper += self._hyper()
            scheduler.step()
        return hyper

    def _through_autograd(self, x: Tensor, target: Tensor) -> Tensor:
        """The step in ordinary operations, which makes the optimizer's state."""
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in everything]
        try:
            with torch.enable_grad():
                logits = functional.mlp(x.detach(), self._weights, self._biases, self._name)
                loss = functional.cross_entropy(
                    logits, target, label_smoothing=self.label_smoothing
                )
                fresh = torch.autograd.grad(loss, self._trained) if self._trained else ()
            for p in everything:
                p.grad = None
            for p, grad in zip(self._trained, fresh, strict=True):
                p.grad = grad
            self.optimizer.step()
            self._logits = logits.detach()
        finally:
            for p, before in zip(everything, grads, strict=True):
                p.grad = before
        return loss.detach()

    # ---- what it rests on

    def _build(self) -> None:
        """Look at model and optimizer, raise what stands in the way, and keep what a step needs.

        The conditions, of which `_C.unchanged` knows the form, are what all this rests on.
        """
        self._conditions = self._options = _NEVER  # the next step looks again if this raises
        self._seen: list[tuple[object, object, object]] = []
        layers = self._check_layers()
        plan = _Plan(layers)
        self._weights, self._biases, self._name = plan.weights, plan.biases, plan.activation
        self._check_parameters()
        if torch.is_autocast_enabled(self._device.type):
            raise ValueError(f"{_OP}: wants no autocast: call the step outside of it, {_HINT}")
        self._check_groups()
        self._layers = arguments(self._name)
        self._find_state(self._hyper())

    def _find_state(self, hyper: list[float]) -> None:
        """Keep the optimizer's state of what is trained, in order; None if some is missing."""
        state, result = self.optimizer.state, []
        seen: list[tuple[object, object, object]] = [(self.optimizer, "state", state)]
        self._has_momentum = [hyper[i] != 0 for i in self._momenta]
        self._state: list[Tensor] | None = None
        self._conditions = _NEVER
        for p, group in zip(self._trained, self._groups_of_trained, strict=True):
            if self._rule == "sgd" and not self._has_momentum[group]:
                continue
            slot = state.get(p, {})
            for key in _STATE[self._rule]:
                value = slot.get(key)
                if value is None:
                    return
                if key != "step":
                    self._check_state(f"the optimizer's {key} of {self._names[id(p)]}", value, p)
                seen.append((slot, key, value))
                result.append(value)
            seen.append((state, p, slot))
        self._state = result
        self._open(result)
        self._conditions = (*self._seen, *seen)

    def _open(self, state: list[Tensor]) -> None:
        """Hand parameters and state to a trainer, which keeps them while this object lives."""
        slots = [0 if group < 0 else len(_STATE[self._rule]) for group in self._groups]
        if self._rule == "sgd":
            slots = [int(group >= 0 and self._has_momentum[group]) for group in self._groups]
        trainer = _open_trainer(
            self._weights, self._biases, state, *self._layers, self.label_smoothing, self._rule,
            self._groups, slots,
        )  # fmt: skip
        if self._close is not None:
            self._close()
        like = self._weights[0].new_empty(0)
        self._known = None
        self._trainer, self._close = trainer, weakref.finalize(self, _close_trainer, trainer, like)
        self._runner = None
        if is_gpu(self._device):
            width = len(self._row(self.optimizer.param_groups[0])) * len(self._used)
            network = Network(
                self._weights, self._biases, self._layers, self.label_smoothing,
                [group >= 0 for group in self._groups], self._groups_of_trained, state, self._rule,
                width,
            )  # fmt: skip
            self._runner = Runner(trainer, network)

    def _check_layers(self) -> list[torch.nn.Module]:
        """The layers of the model."""
        model, optimizer = self.model, self.optimizer
        if isinstance(model, torch.nn.Linear):
            layers: list[torch.nn.Module] = [model]
            misfit = _Plan(layers).misfit
            if misfit or type(model) not in (torch.nn.Linear, nn.Linear):
                raise ValueError(f"{_OP}: model wants a Linear without an activation, got {model}")
        else:
            if not isinstance(model, torch.nn.Sequential) or type(model).forward not in (
                torch.nn.Sequential.forward, nn.MLP.forward,
            ):  # fmt: skip
                raise TypeError(
                    f"{_OP}: model wants an MLP, a Sequential or a Linear, "
                    f"got {type(model).__name__}: {_HINT[3:]}"
                )
            try:
                nn.MLP.from_sequential(model)
            except ValueError as error:
                raise ValueError(f"{_OP}: {error}: {_HINT[3:]}") from None
            layers = list(model)
            self._seen.append((model._modules, None, len(layers)))
            self._seen += [(model._modules, *item) for item in model._modules.items()]
        hooks: list[Any] = [*_GLOBAL_HOOKS]
        for module in (model, *layers):
            hooks += [vars(module)[name] for name in _HOOKS]
            if "forward" in vars(module):
                raise ValueError(
                    f"{_OP}: {type(module).__name__} has a forward of its own: {_HINT[3:]}"
                )
            if isinstance(module, torch.nn.Linear):
                self._seen += [(module._parameters, *item) for item in module._parameters.items()]
            if isinstance(module, torch.nn.Dropout) and module.p:
                if module.training:
                    raise ValueError(
                        f"{_OP}: model wants no active dropout: call model.eval(), {_HINT}"
                    )
                self._seen.append((module, "training", False))
        if any(hooks):
            raise ValueError(f"{_OP}: modules want no hooks: remove them, {_HINT}")
        of_optimizer = [
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks,
            optimizer_hooks._global_optimizer_pre_hooks,
            optimizer_hooks._global_optimizer_post_hooks,
        ]  # fmt: skip
        if any(of_optimizer):
            raise ValueError(f"{_OP}: optimizer wants no step hooks: remove them, {_HINT}")
        self._seen += [(hook, None, 0) for hook in (*hooks, *of_optimizer)]
        return layers

    def _check_parameters(self) -> None:
        model = self.model
        self._names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self._parameters = [*self._weights, *self._biases]
        seen: set[int] = set()
        for p in self._parameters:
            name = self._names.get(id(p), "a weight that is no parameter")
            if id(p) in seen:
                raise ValueError(f"{_OP}: {name} is used twice: tied weights want autograd")
            seen.add(id(p))
            if id(p) not in self._names:
                raise ValueError(f"{_OP}: model has {name}: {_HINT[3:]}")
            if p.dtype != torch.float32:
                raise TypeError(f"{_OP}: {name} wants float32, got {p.dtype}: call model.float()")
            if p.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"{_OP}: {name} wants the CPU or a CUDA device, got {p.device}: "
                    "call model.cpu() or model.cuda()"
                )
            if p.device.type == "cuda" and not HAS_CUDA:
                raise ValueError(f"{_OP}: {name} wants torchbp's CUDA library, which was not built")
            if p.device != self._weights[0].device:
                raise ValueError(
                    f"{_OP}: {name} wants the device of the first weight, "
                    f"{self._weights[0].device}, got {p.device}"
                )
            if not p.is_contiguous():
                raise ValueError(f"{_OP}: {name} wants contiguous memory, got stride {p.stride()}")
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                raise ValueError(f"{_OP}: {name} wants no hooks: remove them, {_HINT}")
            self._seen.append((p, _requires_grad, p.requires_grad))
        self._trained = [p for p in self._parameters if p.requires_grad]
        self._device = self._weights[0].device

    def _check_groups(self) -> None:
        """Where the hyperparameters of each parameter are."""
        groups = self.optimizer.param_groups
        of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        for p in self._trained:
            if id(p) not in of:
                raise ValueError(
                    f"{_OP}: {self._names[id(p)]} is not in the optimizer: "
                    "add it, or set requires_grad=False"
                )
        self._used = sorted({of[id(p)] for p in self._trained})
        self._groups_of_trained = [self._used.index(of[id(p)]) for p in self._trained]
        row = iter(self._groups_of_trained)
        self._groups = [next(row) if p.requires_grad else -1 for p in self._parameters]
        self._seen += [(self.optimizer, "param_groups", groups), (groups, None, len(groups))]
        options = ["amsgrad", "capturable", "differentiable"]
        if self._device.type == "cuda" and self._rule == "adamw":
            options.append("fused")  # which counts the steps on the GPU
        for i in self._used:
            group = groups[i]
            self._seen += [(groups, i, group), (group, "params", group["params"])]
            self._seen.append((group["params"], None, len(group["params"])))
            self._seen += [(group["params"], k, p) for k, p in enumerate(group["params"])]
            for option in options:
                if group.get(option):
                    raise ValueError(
                        f"{_OP}: optimizer wants {option}=False in all groups: "
                        f"make it without, {_HINT}"
                    )
                if option in group:
                    self._seen.append((group, option, group[option]))
        width = len(self._row(groups[0]))
        self._momenta = [width * k + 1 for k in range(len(self._used)) if self._rule == "sgd"]

    def _check_state(self, what: str, value: Tensor, p: Tensor) -> None:
        check.like(_OP, what, value, "its parameter", p)
        check.shape(_OP, what, value, tuple(p.shape))
        if not value.is_contiguous():
            raise ValueError(f"{_OP}: {what} wants contiguous memory, got stride {value.stride()}")

    def _check_batch(self, x: Any, target: Any, many: bool = False) -> None:
        """Raise what is wrong with a batch, or with a row of batches."""
        names = ("xs", "targets") if many else ("x", "target")
        check.tensor(_OP, names[0], x)
        check.tensor(_OP, names[1], target)
        for name, value, dtype in ((names[0], x, "float32"), (names[1], target, "int64")):
            if value.dtype != getattr(torch, dtype):
                got = str(value.dtype).removeprefix("torch.")
                raise TypeError(f"{_OP}: {name} wants {dtype}, got {got}")
            if value.device != self._device:
                where = "the CPU" if self._device.type == "cpu" else f"{self._device}, as the model"
                raise ValueError(f"{_OP}: {name} wants {where}, got {value.device}")
        if x.requires_grad:
            raise ValueError(f"{_OP}: {names[0]} wants no gradient: pass {names[0]}.detach()")
        steps: tuple[str, ...] = ("steps",) if many else ()
        check.shape(_OP, names[0], x, (*steps, "B", self._weights[0].shape[1]))
        check.shape(_OP, names[1], target, tuple(x.shape[:-1]))
        if not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            check_classes(target.flatten(), self._weights[-1].shape[0], IGNORE)

    def _check_scheduler(self, scheduler: Any) -> None:
        if scheduler is None:
            return
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"{_OP}: scheduler wants one that steps without a metric, "
                f"got {type(scheduler).__name__}: call the step and the scheduler in turn"
            )
        if scheduler.optimizer is not self.optimizer:
            raise ValueError(f"{_OP}: scheduler wants that of the step's optimizer, got another")


def _is_fixed(value: Any) -> bool:
    """Whether it stays what it is as long as it is the same object: not a tensor or a list."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, (bool, int, float, str))


# As torch.compiler.disable, which would import the compiler, a second's work, here and now.
@_disable_dynamo
def _outside_of_the_graph(step: CompiledStep, x: Tensor, target: Tensor) -> Tensor:
    """The step where torch.compile traces the call: it is compiled already."""
    return step(x, target)
