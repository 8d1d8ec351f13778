"""Adapters of many tasks on one backbone, for batches in which the tasks mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from petl_kernels.nn._check import check_number
from petl_kernels.nn.bottleneck_adapter import BottleneckAdapter
from petl_kernels.ops._validate import version
from petl_kernels.ops.adapter_bank import adapter_bank
from petl_kernels.ops.adapter_bank.validation import check_range

Tasks = Tensor | Sequence[str] | Sequence[int] | str
_Route = tuple[tuple[int, ...], Tensor]  # the tasks of a batch, and each sample's place among them

# task -> (its version, device of x, number of tasks) and the route, so that all layers of a model read a batch once.
_routes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class AdapterBank(nn.Module):
    """A `BottleneckAdapter` per task, all of one shape, and one call for a batch of any mixture of tasks.

    >>> bank = AdapterBank(768, 64, tasks=["qqp", "mnli"])
    >>> optimizer = torch.optim.AdamW(bank.parameters())
    >>> task = torch.tensor([1, 0, 0, 1])  # or ["mnli", "qqp", "qqp", "mnli"]
    >>> bank(torch.randn(4, 128, 768), task).sum().backward()
    >>> optimizer.step()
    >>> optimizer.add_param_group({"params": list(bank.add_task("sst2").parameters())})
    >>> bank(torch.randn(4, 128, 768), "sst2").sum().backward()  # one task for the whole batch
    >>> optimizer.zero_grad()  # to None; of the first two tasks not a bit changes from here on
    >>> sst2 = bank.remove_task("sst2")  # an nn.BottleneckAdapter

    Houlsby et al. 2019 (arXiv:1902.00751): one frozen backbone, a small set of parameters per task. The parameters of a
    task are tensors of their own (`adapters.<name>.w_down` and so on). A task without a sample in the batch gets no
    gradient: None, not zero, so that an optimizer with momentum or weight decay leaves it alone, as it does a task that
    is added later. `bank.adapters[name]` is a task's adapter, which works by itself; its own hooks do not run in the
    bank. Under DistributedDataParallel, where absent tasks are unused parameters, set `find_unused_parameters`. FSDP2
    has no such setting: give it banks with `every_task`, unless the batches of all processes have the same tasks.

    Args:
        d_model, bottleneck, activation, form, init, bias, impl, device, dtype: as of `BottleneckAdapter`.
        tasks: names, in the order of their indices.
        scale: a float.
        every_task: whether absent tasks get a gradient as well, of zeros, which `drop_absent_grads` takes away again;
            to be told the tasks of all processes' batches.

    Shapes: x [B, ..., d] -> [B, ..., d].

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        d_model: int,
        bottleneck: int,
        tasks: Sequence[str] = (),
        *,
        activation: str = "gelu",
        scale: float = 1.0,
        form: str = "sequential",
        init: str = "houlsby",
        bias: bool = True,
        every_task: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_number("AdapterBank", "scale", scale)
        if isinstance(tasks, str):
            raise ValueError(f"AdapterBank: tasks must be a list of names, got {tasks!r}")
        self.impl, self.every_task = impl, bool(every_task)
        self._options: dict[str, Any] = dict(
            d_model=d_model, bottleneck=bottleneck, activation=activation, scale=scale, form=form, init=init, bias=bias
        )
        self._placed: dict[str, Any] = dict(device=device, dtype=dtype)  # a first task's parameters
        BottleneckAdapter(**self._options, impl=impl, device="meta")  # which checks them
        self.adapters = nn.ModuleDict()
        for name in tasks:
            self.add_task(name)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names, each at its index."""
        return tuple(self.adapters)

    def add_task(self, name: str, adapter: BottleneckAdapter | None = None) -> BottleneckAdapter:
        """Add a task behind the others, which are not touched.

        Args:
            name: a new name, without dots.
            adapter: its adapter, of the bank's shape and options; a freshly initialised one by default, beside the
                others' (device, dtype).

        Returns:
            The adapter, whose parameters an optimizer still has to be given.

        Raises:
            ValueError: a name that is taken or cannot be one, or an adapter that differs from the bank's.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"AdapterBank: name must be a string without dots, got {name!r}")
        if name in self.adapters or hasattr(self.adapters, name):
            raise ValueError(f"AdapterBank: name must be a new one and no attribute of nn.ModuleDict, got {name!r}")
        if adapter is None:
            like = next(self.parameters(), None)
            placed = self._placed if like is None else dict(device=like.device, dtype=like.dtype)
            adapter = BottleneckAdapter(**self._options, **placed)
        else:
            self._check_adapter(adapter)
        self.adapters[name] = adapter
        return adapter

    def _check_adapter(self, adapter: Any) -> None:
        if type(adapter) is not BottleneckAdapter:
            raise ValueError(f"AdapterBank: adapter must be a BottleneckAdapter, got {type(adapter).__name__}")
        for option, wanted in self._options.items():
            got = adapter.b_down is not None if option == "bias" else getattr(adapter, option)
            if option != "init" and (isinstance(got, Tensor) or got != wanted):
                raise ValueError(f"AdapterBank: adapter must have the bank's {option} = {wanted!r}, got {got!r}")
        if adapter.dropout:
            raise ValueError(f"AdapterBank: adapter must have no dropout, got {adapter.dropout}")

    def remove_task(self, name: str) -> BottleneckAdapter:
        """Take a task out and return its adapter; the tasks behind it move one index forward.

        Raises:
            ValueError: no such task.
        """
        self._index(name)
        return self.adapters.pop(name)  # type: ignore[return-value]

    def index(self, names: Sequence[str]) -> Tensor:
        """The indices of tasks, int64 [B] on the CPU: made once for a batch, they serve every layer.

        Raises:
            ValueError: no such task.
        """
        return torch.tensor([self._index(name) for name in names], dtype=torch.int64, device="cpu")

    def _index(self, name: str) -> int:
        if name not in self.adapters:
            raise ValueError(f"AdapterBank: task must be one of {self.tasks}, got {name!r}")
        return self.tasks.index(name)

    def forward(self, x: Tensor, task: Tasks, residual: Tensor | None = None) -> Tensor:
        """Adapt x [B, ..., d], each sample by its own task.

        Args:
            x: the input.
            task: the task of each sample, as indices (int64 [B], or a list) or names; or one name for the whole batch.
                A tensor may have the shape of more of x's first dimensions: [B, S] is a task per token. With x on a GPU
                it may stay on the CPU, and then nobody waits for anything. On the GPU it is read once for all
                layers, the only wait, since training needs to know the tasks; where nothing trains it is not read, and
                an index that no task has makes NaN (`impl="triton"`) or PyTorch's own indexing error.
            residual: as of `BottleneckAdapter.forward`.

        `torch.compile` sees no values of a tensor: every task is given a gradient then, absent ones zero; call
        `drop_absent_grads` before the optimizer. With a list it compiles once for each list.

        Raises:
            ValueError: a task that the bank does not have, no tasks at all, a residual for a sequential bank, and what
                `petl_kernels.adapter_bank` raises.
        """
        if self._options["form"] == "sequential":
            if residual is not None:
                raise ValueError("AdapterBank: residual must be None in the sequential form, which adds x itself")
            residual = x
        if not self.adapters:
            raise ValueError("AdapterBank: there is no task yet, add_task makes one")
        present, task = self._route(task, x)
        every: list[Any] = list(self.adapters.values())
        chosen = [every[i] for i in present]
        lists = [[getattr(a, name) for a in chosen or every] for name in ("w_down", "b_down", "w_up", "b_up")]
        if not chosen:  # an empty batch trains nothing
            lists = [[p if p is None else p.detach() for p in each] for each in lists]
        w_down, b_down, w_up, b_up = lists
        bias = self._options["bias"]
        return adapter_bank(
            x,
            task,
            w_down,
            b_down if bias else None,
            w_up,
            b_up if bias else None,
            residual=residual,
            activation=self._options["activation"],
            scale=self._options["scale"],
            impl=self.impl,
        )

    def _route(self, task: Tasks, x: Tensor) -> _Route:
        """The tasks of a batch and, on the device of x, each sample's place among them."""
        count = len(self.adapters)
        if not isinstance(task, Tensor):
            names = [task] if isinstance(task, str) else task
            values = [self._index(name) if isinstance(name, str) else name for name in names]
            check_range("AdapterBank", values, count)
            present = tuple(range(count) if self.every_task else sorted(set(values)))
            places = torch.tensor([present.index(value) for value in values], dtype=torch.int64, device="cpu")
            places = places.reshape(()) if isinstance(task, str) else places
            return present, places.to(x.device, non_blocking=True)
        unread = task.device.type != "cpu" and not (torch.is_grad_enabled() and self._trains())
        if self.every_task or unread or torch.compiler.is_compiling():
            return tuple(range(count)), task.to(x.device, non_blocking=True)
        if task.dtype != torch.int64 or type(task) is not Tensor:  # which the op refuses
            return tuple(range(count)), task.to(x.device, non_blocking=True)
        mark = (version(task), x.device, count)
        if mark[0] is not None and task in _routes and _routes[task][0] == mark:
            return _routes[task][1]
        distinct, places = task.unique(return_inverse=True)
        present = tuple(distinct.tolist())
        check_range("AdapterBank", present, count)
        route = present, places.to(x.device, non_blocking=True)
        _routes[task] = mark, route
        return route

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    def drop_absent_grads(self, task: Tensor | Sequence[str] | Sequence[int]) -> None:
        """Set to None the gradients of every task that `task` (one batch's, or all accumulated ones') does not name."""
        values = task.flatten().tolist() if isinstance(task, Tensor) else task
        present = {self._index(value) if isinstance(value, str) else value for value in values}
        for i, adapter in enumerate(self.adapters.values()):
            if i not in present:
                adapter.zero_grad(set_to_none=True)

    def extra_repr(self) -> str:
        text = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        text += ", every_task=True" if self.every_task else ""
        return text if self.impl is None else f"{text}, impl={self.impl!r}"
