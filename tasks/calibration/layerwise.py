"""The walk through a decoder's blocks; the only file with hooks.

`compress_blocks` compresses one block at a time, each seeing the outputs of those already compressed, as in Frantar and
Alistarh, SparseGPT, ICML 2023, arXiv:2301.00774, section 3. Only one block's statistics exist at a time, and where
weights and hidden states lie meanwhile is for a `Residence` to say.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tasks.calibration.architectures import Architecture
from tasks.calibration.progress import Report, silent
from tasks.calibration.statistics import InputStatistic

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Statistic = TypeVar("Statistic", bound=InputStatistic)
Arguments = dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]]
"""What each block gets beside hidden states, by the shape [batch, seq] of the batch: without padding, it is the same
for all batches of one shape."""


class Residence(Protocol):
    """Where a walk leaves what it does not need at the moment: weights, and the hidden states of the batches."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """[batch, seq, hidden], the embedding of token ids [batch, seq]."""

    def block(self, name: str) -> AbstractContextManager[None]:
        """Within the context the block's weights are there."""

    def keep(self, index: int, hidden: Iterable[Tensor]) -> None:
        """Keep what block `index` reads, batch by batch, instead of what the block before has read."""

    def hidden(self) -> Iterator[Tensor]:
        """What was kept last, [batch, seq, hidden] each."""


class InMemory:
    """A model that is in memory as a whole, and hidden states beside it."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model
        self._hidden: list[Tensor] = []

    def embed(self, input_ids: Tensor) -> Tensor:
        """What the model's embedding gives."""
        embedded: Tensor = self._model.get_input_embeddings()(input_ids)
        return embedded

    def block(self, name: str) -> AbstractContextManager[None]:
        """Nothing has to be done."""
        return nullcontext()

    def keep(self, index: int, hidden: Iterable[Tensor]) -> None:
        """Replace one batch after the other, so that no more than one is there twice."""
        for number, batch in enumerate(hidden):
            self._hidden[number : number + 1] = [batch]

    def hidden(self) -> Iterator[Tensor]:
        """The batches, in order."""
        return iter(self._hidden)


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
    residence: Residence | None = None,
    first_block: int = 0,
    keep_last: bool = False,
    finish: Callable[[int], None] | None = None,
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
        residence: where weights and hidden states lie; None: the model is in memory as a whole.
        first_block: those before it were finished by an earlier walk, and `residence` holds what this one reads.
        keep_last: keep what the last block gives too, for what comes after the blocks.
        finish: gets the index of a block when it is compressed and what the next one reads is kept.
    """
    blocks: nn.ModuleList = model.get_submodule(family.blocks)
    residence = residence or InMemory(model)
    arguments: Arguments = {}
    with residence.block(family.block(0)):  # one of them says what it returns
        if first_block == 0:
            residence.keep(0, _enter_blocks(model, blocks, batches, residence, arguments))
        else:
            one_of_each = {input_ids.shape: input_ids for input_ids in batches}
            for _ in _enter_blocks(model, blocks, list(one_of_each.values()), residence, arguments):
                pass
    linears = block_linears(model, family, layers)
    for index in range(first_block, len(blocks)):
        block = _Block(blocks[index], index, arguments, residence)
        with residence.block(family.block(index)):
            steps = [step for step in _steps(family, index, linears[index]) if step]
            if prepare_ and steps:
                _prepare_block_(block, family.block(index), steps, make_statistic, prepare_)
            if step_by_step:
                for step in steps:
                    _compress_step_(block, step, make_statistic, compress_)
            elif linears[index]:
                _compress_at_once_(block, linears[index], make_statistic, compress_)
            if keep_last or index + 1 < len(blocks):
                residence.keep(index + 1, block.outputs())
        if finish:
            finish(index)
        report(index + 1, len(blocks), {})


@torch.no_grad()
def run_blocks(
    model: "PreTrainedModel",
    family: Architecture,
    batches: Sequence[Tensor],
    residence: Residence,
    cache: "Cache | None" = None,
) -> None:
    """Run all blocks as they are; `residence` then keeps what the last one gives.

    Args:
        model: not changed.
        family: where it keeps its blocks.
        batches: token ids [batch, seq] int64, no padding.
        residence: where weights and hidden states lie.
        cache: what keys and values go through; one that keeps nothing, because every batch begins anew. None: nothing.
    """
    blocks: nn.ModuleList = model.get_submodule(family.blocks)
    arguments: Arguments = {}
    with residence.block(family.block(0)):  # one of them says what it returns
        residence.keep(0, _enter_blocks(model, blocks, batches, residence, arguments, cache))
    for index, module in enumerate(blocks):
        with residence.block(family.block(index)):
            residence.keep(index + 1, _Block(module, index, arguments, residence).outputs())


def soft_capped(logits: Tensor, model: "PreTrainedModel") -> Tensor:
    """Logits as the model gives them; Gemma's are bent."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True)
class _Block:
    """A block, what it reads, and how to run it."""

    module: nn.Module
    index: int
    arguments: Arguments
    residence: Residence

    def run(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What it gives; with other `weights`, by their names in the block, as if they were its own."""
        args, kwargs = self.arguments[hidden.shape[:2]][self.index]
        if weights:
            output = functional_call(self.module, dict(weights), (hidden, *args), kwargs)
        else:
            output = self.module(hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def outputs(self) -> Iterator[Tensor]:
        """What the next block reads, batch by batch."""
        return (self.run(hidden) for hidden in self.residence.hidden())

    def show_inputs(self, statistics: dict[nn.Linear, Statistic]) -> None:
        """Update the statistics with what layers read; the block is run no further than that takes."""
        with _observed(statistics, until_seen=True) as expect:
            for hidden in self.residence.hidden():
                expect(len(hidden))
                with suppress(_Seen):
                    self.run(hidden)


def _prepare_block_(
    block: _Block,
    name: str,
    steps: Sequence[dict[str, nn.Linear]],
    make_statistic: Callable[[int], Statistic],
    prepare_: Callable[[str, dict[str, Statistic]], None],
) -> None:
    firsts = dict(next(iter(step.items())) for step in steps)
    observed = {layer: make_statistic(linear.in_features) for layer, linear in firsts.items()}
    block.show_inputs({linear: observed[layer] for layer, linear in firsts.items()})
    prepare_(name, observed)


def _compress_step_(
    block: _Block,
    step: dict[str, nn.Linear],
    make_statistic: Callable[[int], Statistic],
    compress_: Callable[[str, Tensor, Statistic], None],
) -> None:
    """Compress layers that read the same input, so one of them is watched for all."""
    first = next(iter(step.values()))
    shared = make_statistic(first.in_features)
    block.show_inputs({first: shared})
    for name, linear in step.items():
        compress_(name, linear.weight, shared)


def _compress_at_once_(
    block: _Block,
    linears: dict[str, nn.Linear],
    make_statistic: Callable[[int], Statistic],
    compress_: Callable[[str, Tensor, Statistic], None],
) -> None:
    """Compress layers of one block, each with a statistic of its own from before any of them changes."""
    statistics = {name: make_statistic(linear.in_features) for name, linear in linears.items()}
    block.show_inputs({linear: statistics[name] for name, linear in linears.items()})
    for name, linear in linears.items():
        compress_(name, linear.weight, statistics[name])


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
    with _observed({linear: statistics[name] for name, linear in linears.items()}) as expect:
        for step, input_ids in enumerate(batches, start=1):
            expect(len(input_ids))
            model.base_model(input_ids=input_ids, use_cache=False)
            report(step, len(batches), {})
    return statistics


@dataclass(frozen=True)
class BlockErrors:
    """How far a block with other weights is from the original, as parts of the norm of what it adds.

    Each reads what the original's block reads, so that an error is that block's own: ||y' - y|| / ||y - x|| for a
    block x -> y.
    """

    name: str
    whole: float
    attention: float  # with the other weights in its attention and the norm before it only
    feed_forward: float  # with those of the rest of the block only
    accumulated: float  # ||x' - x|| / ||x|| of what the block gives when all blocks before it have the other weights


@torch.no_grad()
def compare_blocks(
    model: "PreTrainedModel",
    family: Architecture,
    input_ids: Tensor,
    others: Callable[[str], Mapping[str, Tensor]],
    report: Report = silent,
) -> list[BlockErrors]:
    """What other weights change in every block, and on the way through all of them.

    Args:
        model: the original, not changed.
        family: where it keeps its blocks.
        input_ids: [batch, seq] int64, no padding.
        others: gives the other weights below a module's name, by their names below it; float32, of any width.
        report: told after every block.
    """
    blocks: nn.ModuleList = model.get_submodule(family.blocks)
    arguments: Arguments = {}
    residence = InMemory(model)
    (hidden,) = _enter_blocks(model, blocks, [input_ids], residence, arguments)
    drifted = hidden
    halves = (family.attention_module + ".", family.attention_norm + ".")
    found = []
    for index, module in enumerate(blocks):
        block, weights = _Block(module, index, arguments, residence), others(family.block(index))
        attention = {name: value for name, value in weights.items() if name.startswith(halves)}
        feed_forward = {name: value for name, value in weights.items() if name not in attention}
        output, drifted = block.run(hidden), block.run(drifted, weights)
        added = (output - hidden).norm()
        whole, half, rest = (
            float((block.run(hidden, part) - output).norm() / added) for part in (weights, attention, feed_forward)
        )
        accumulated = float((drifted - output).norm() / output.norm())
        found.append(BlockErrors(family.block(index), whole, half, rest, accumulated))
        hidden = output
        report(index + 1, len(blocks), {})
    return found


def change_inputs_(model: "PreTrainedModel", changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Let linear layers, by their full names, read what a function makes of their inputs; in place and for good."""

    def change(function: Callable[[Tensor], Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (function(args[0]), *args[1:])

    for name, function in changes.items():
        model.get_submodule(name).register_forward_pre_hook(partial(change, function))


def _enter_blocks(
    model: "PreTrainedModel",
    blocks: nn.ModuleList,
    batches: Sequence[Tensor],
    residence: Residence,
    arguments: Arguments,
    cache: "Cache | None" = None,
) -> Iterator[Tensor]:
    """What the model hands to its first block, batch by batch, without running any block.

    What it hands to each beside hidden states goes into `arguments`. The blocks of one model can get different ones:
    those with sliding-window attention get another mask.
    """
    for input_ids in batches:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        embedded = residence.embed(input_ids)
        with _passing_through(blocks, calls), suppress(_Seen):
            model.base_model(inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None)
        (hidden, *_), _ = calls[0]
        arguments.setdefault(input_ids.shape, [(args[1:], kwargs) for args, kwargs in calls])
        yield hidden


@contextmanager
def _passing_through(blocks: nn.ModuleList, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """Let every block return its input unchanged and note its arguments in `calls`; the last raises `_Seen`."""
    in_tuple: bool | None = None

    def pass_through(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal in_tuple
        calls.append(((hidden, *args), kwargs))
        if len(calls) == len(blocks):
            raise _Seen
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


class _Seen(Exception):
    """Ends a forward pass whose output nobody needs."""


@contextmanager
def _observed(statistics: dict[nn.Linear, Statistic], *, until_seen: bool = False) -> Iterator[Callable[[int], None]]:
    """Update the statistics with the inputs of every call of their layers, [batch, seq, in_features].

    What it gives has to be told the batch size before every forward pass: OPT's feed-forward networks read batch and
    sequence as one dimension. With `until_seen`, a pass ends with `_Seen` as soon as each of the layers was called.
    """
    waiting = set(statistics)
    batch_size = 1

    def expect(size: int) -> None:
        nonlocal batch_size
        batch_size = size

    def observe(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        inputs = args[0] if args[0].dim() > 2 else args[0].reshape(batch_size, -1, linear.in_features)
        statistics[linear].update(inputs)
        waiting.discard(linear)
        if until_seen and not waiting:
            waiting.update(statistics)
            raise _Seen

    handles = [linear.register_forward_pre_hook(observe) for linear in statistics]
    try:
        yield expect
    finally:
        for handle in handles:
            handle.remove()


class RestOfModel:
    """What a model makes of tokens from one block on; what lies before it is computed once."""

    def __init__(self, model: "PreTrainedModel", family: Architecture, input_ids: Tensor) -> None:
        """Stand before the first block with `input_ids` [batch, seq] int64, no padding."""
        blocks: nn.ModuleList = model.get_submodule(family.blocks)
        arguments: Arguments = {}
        residence = InMemory(model)
        with torch.no_grad():
            (self._hidden,) = _enter_blocks(model, blocks, [input_ids], residence, arguments)
        self._ahead = [_Block(block, index, arguments, residence) for index, block in enumerate(blocks)]
        self._norm = model.get_submodule(family.final_norm)
        self._head = model.get_submodule(family.lm_head)
        self._model = model

    def advance(self) -> None:
        """Go past the next block, as it is now."""
        with torch.no_grad():
            self._hidden = self._ahead.pop(0).run(self._hidden)

    def log_probabilities(self, every: int = 1) -> Tensor:
        """[batch, positions, vocab] float32 of the next token, at each `every`th position up to the last."""
        hidden = self._hidden
        with torch.no_grad():
            for block in self._ahead:
                hidden = block.run(hidden)
            logits: Tensor = self._head(self._norm(hidden[:, every - 1 :: every]))
            return soft_capped(logits, self._model).float().log_softmax(dim=-1)
