"""The walk through a decoder's blocks; the only file with hooks.

`compress_blocks` compresses one block at a time, each seeing the outputs of those already compressed, as in Frantar and
Alistarh, SparseGPT, ICML 2023, arXiv:2301.00774, section 3. Only one block's statistics exist at a time, beside the
hidden states of the calibration tokens.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tasks.calibration.architectures import Architecture
from tasks.calibration.progress import Report, silent
from tasks.calibration.statistics import InputStatistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Statistic = TypeVar("Statistic", bound=InputStatistic)


@dataclass
class _Batch:
    """One batch of calibration tokens on its way through the blocks."""

    hidden: Tensor  # [batch, seq, hidden]: the next block's input
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # each block's other arguments; tensors are shared


def block_linears(
    model: "PreTrainedModel", family: Architecture, layers: Collection[str]
) -> list[dict[str, nn.Linear]]:
    """The linear layers of every block by their full names, only those in `layers`."""
    return [
        {
            name: model.get_submodule(name)
            for name in (f"{family.block(index)}.{linear}" for linear in family.linears)
            if name in layers
        }
        for index in range(len(model.get_submodule(family.blocks)))
    ]


@torch.no_grad()
def compress_blocks(
    model: "PreTrainedModel",
    family: Architecture,
    batches: Sequence[Tensor],
    layers: Collection[str],
    make_statistic: Callable[[int], Statistic],
    compress_: Callable[[str, Tensor, Statistic], None],
    report: Report = silent,
    *,
    step_by_step: bool = False,
    prepare_: Callable[[str, dict[str, Statistic]], None] | None = None,
) -> None:
    """Compress linear layers in place and in order.

    Args:
        model: changed in place.
        family: where it keeps its blocks.
        batches: token ids [batch, seq] int64, no padding.
        layers: full names of the layers to compress.
        make_statistic: makes an empty statistic of a layer's inputs from its in_features.
        compress_: gets a layer's name, its weight [out, in], which it changes in place, and its statistic.
        report: told after every block.
        step_by_step: within a block too, a layer sees the outputs of those already compressed (Frantar et al., GPTQ,
            2022, arXiv:2210.17323, its code's `true-sequential`); otherwise all see those of the uncompressed block.
        prepare_: gets the name of a block, and a statistic for the first layer of each step in it, before any of the
            block is compressed; may change the block in place, but not what it computes.
    """
    blocks: nn.ModuleList = model.get_submodule(family.blocks)
    states = _enter_blocks(model, blocks, batches)
    for index, linears in enumerate(block_linears(model, family, layers)):
        block = blocks[index]
        steps = [step for step in _steps(family, index, linears) if step]
        if prepare_ and steps:
            firsts = dict(next(iter(step.items())) for step in steps)
            observed = {name: make_statistic(linear.in_features) for name, linear in firsts.items()}
            _see_inputs(block, index, states, {linear: observed[name] for name, linear in firsts.items()})
            prepare_(family.block(index), observed)
        for step in steps if step_by_step else [linears]:
            if not step:
                continue
            if step_by_step:  # they read the same input, so one of them is watched for all
                shared = make_statistic(next(iter(step.values())).in_features)
                statistics = dict.fromkeys(step, shared)
                watched = {next(iter(step.values())): shared}
            else:
                statistics = {name: make_statistic(linear.in_features) for name, linear in step.items()}
                watched = {linear: statistics[name] for name, linear in step.items()}
            _see_inputs(block, index, states, watched)
            for name, linear in step.items():
                compress_(name, linear.weight, statistics[name])
        if index + 1 < len(blocks):
            for state in states:
                state.hidden = _run(block, index, state)
        report(index + 1, len(blocks), {})


def _steps(family: Architecture, index: int, linears: dict[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    names = [[f"{family.block(index)}.{linear}" for linear in step] for step in family.steps]
    return [{name: linears[name] for name in step if name in linears} for step in names]


@torch.no_grad()
def observe_inputs(
    model: "PreTrainedModel",
    batches: Sequence[Tensor],
    layers: Sequence[str],
    make_statistic: Callable[[int], Statistic],
    report: Report = silent,
) -> dict[str, Statistic]:
    """A statistic of the inputs of linear layers, in the model as it is; for statistics that are small.

    Args:
        model: not changed.
        batches: token ids [batch, seq] int64, no padding.
        layers: full names of the layers.
        make_statistic: makes an empty statistic of a layer's inputs from its in_features.
        report: told after every batch.
    """
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in layers}
    statistics = {name: make_statistic(linear.in_features) for name, linear in linears.items()}
    with _observed({linear: statistics[name] for name, linear in linears.items()}):
        for step, input_ids in enumerate(batches, start=1):
            model.base_model(input_ids=input_ids, use_cache=False)
            report(step, len(batches), {})
    return statistics


def change_inputs_(model: "PreTrainedModel", changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Let linear layers, by their full names, read what a function makes of their inputs; in place and for good."""

    def change(function: Callable[[Tensor], Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (function(args[0]), *args[1:])

    for name, function in changes.items():
        model.get_submodule(name).register_forward_pre_hook(partial(change, function))


def _enter_blocks(model: "PreTrainedModel", blocks: nn.ModuleList, batches: Sequence[Tensor]) -> list[_Batch]:
    """What the model hands to each block, without running any.

    The blocks of one model can get different arguments: those with sliding-window attention get another mask.
    """
    states = []
    for input_ids in batches:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with _passing_through(blocks, calls):
            model.base_model(input_ids=input_ids, use_cache=False)
        (hidden, *_), _ = calls[0]
        states.append(_Batch(hidden, [(args[1:], kwargs) for args, kwargs in calls]))
    return states


@contextmanager
def _passing_through(blocks: nn.ModuleList, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """Let every block return its input unchanged and note its arguments in `calls`."""
    in_tuple: bool | None = None

    def pass_through(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal in_tuple
        calls.append(((hidden, *args), kwargs))
        if in_tuple is None:  # what its own forward returns; families differ
            in_tuple = isinstance(type(blocks[0]).forward(blocks[0], hidden, *args, **kwargs), tuple)
        return (hidden,) if in_tuple else hidden

    for block in blocks:
        block.forward = pass_through
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again


def _run(block: nn.Module, index: int, state: _Batch) -> Tensor:
    args, kwargs = state.arguments[index]
    output = block(state.hidden, *args, **kwargs)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _see_inputs(block: nn.Module, index: int, states: Sequence[_Batch], statistics: dict[nn.Linear, Statistic]) -> None:
    """Update the statistics with what layers of a block read; their block is run no further than that takes."""
    with _observed(statistics, until_seen=True):
        for state in states:
            with suppress(_Seen):
                _run(block, index, state)


class _Seen(Exception):
    """Ends a block's forward pass whose output nobody needs."""


@contextmanager
def _observed(statistics: dict[nn.Linear, Statistic], *, until_seen: bool = False) -> Iterator[None]:
    """Update the statistics with the inputs of every call of their layers.

    With `until_seen`, a forward pass ends with `_Seen` as soon as each of the layers was called.
    """
    waiting = set(statistics)

    def observe(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        statistics[linear].update(args[0])
        waiting.discard(linear)
        if until_seen and not waiting:
            waiting.update(statistics)
            raise _Seen

    handles = [linear.register_forward_pre_hook(observe) for linear in statistics]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
