"""Where the sites of a Hugging Face model are, found by arithmetic; and the taps that read and edit
there.

A pre-norm transformer block adds twice to the residual stream. Whatever the modules are called,

    resid_pre + attn_out = resid_mid,   resid_mid + mlp_out = resid_post        (sequential: Llama,
    GPT-2, Gemma, …)
    resid_pre + attn_out + mlp_out = resid_post                                 (parallel: Pythia,
    GPT-J, …)

1. `find_blocks` takes the list of modules that ran one after the other, each on what the one before
   gave.
2. `find_sites` runs a few tokens once, records the output of every direct child of every block, and
   picks the two children whose outputs satisfy the sum. That also picks the norm *after* the
   sublayer in Gemma 2, where it is the normed output that is added. What satisfies no sum (a scaled
   residual, say) is not offered as a site.
3. Inside, `mlp_in` is what the MLP reads, `mlp_normalized` the same before the norm's gain, and `z`
   what the attention's last projection reads: the module whose output is the attention's.
4. `Taps` keeps, per site, the edits and the recorders that are wanted now, and the forward hooks
   that serve them. At a site the edits run first, in the order they were added, and recorders see
   what the model goes on with.

An edit of `resid_mid` is made where the attention's output enters the stream, by adding the
difference to it, so that both the MLP and the skip path see it.

Cost: one forward pass of four tokens; afterwards one Python call per wanted site and pass.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featureflow.errors import UserError
from featureflow.sites import IN_LAYER, Site, SiteKind

Activation = Float[Tensor, "batch position d_model"]
Edit = Callable[[Activation], Activation]
_MOST_MISFIT = 1.0


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The attention's last projection, whose input is `z`."""

    module: nn.Module
    width: int


@dataclass(frozen=True, kw_only=True)
class BlockSites:
    """One block and the modules whose outputs it adds to the stream (None where the sums did not
    hold); `mlp_reader` is the MLP itself, `mlp_norm` the norm that only it reads."""

    block: nn.Module
    attention: nn.Module | None = None
    mlp: nn.Module | None = None
    is_sequential: bool = False
    z: Projection | None = None
    mlp_reader: nn.Module | None = None
    mlp_norm: nn.Module | None = None

    def kinds(self) -> tuple[SiteKind, ...]:
        present: dict[SiteKind, bool] = {
            "resid_pre": True,
            "z": self.z is not None,
            "attn_out": self.attention is not None,
            "resid_mid": self.is_sequential,
            "mlp_normalized": self.mlp_norm is not None,
            "mlp_in": self.mlp_reader is not None,
            "mlp_out": self.mlp is not None,
            "resid_post": True,
        }
        return tuple(kind for kind in IN_LAYER if present[kind])


def find_blocks(model: nn.Module, n_layers: int, run: Callable[[], object]) -> Sequence[nn.Module]:
    """The outermost module list with one entry per layer whose members ran once each, every one on
    the output of the one before. Raises UserError if there is none, or if what they hand on is no
    single stream."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    seen: dict[int, list[tuple[Tensor | None, Tensor | None]]] = {}

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen.setdefault(id(module), []).append((_first_input(args, kwargs), first_tensor(output)))

    members = {id(member): member for each in lists for member in each}
    handles = [member.register_forward_hook(see, with_kwargs=True) for member in members.values()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for blocks in lists:
        calls = [seen.get(id(block), []) for block in blocks]
        if all(len(each) == 1 for each in calls) and _is_chain([each[0] for each in calls]):
            _check_stream(model, calls[0][0][1])
            return blocks
    raise UserError(
        "this architecture has no list of blocks to read",
        where=type(model).__name__,
        expected=f"a module list with {n_layers} entries that run one after the other",
        fix="use a decoder-only transformer (Llama, GPT-2, Pythia, Gemma, Qwen, …)",
    )


def _is_chain(calls: Sequence[tuple[Tensor | None, Tensor | None]]) -> bool:
    """Whether each read what the one before gave."""
    return all(value is not None for call in calls for value in call) and all(
        before[1].shape == after[0].shape and torch.equal(before[1], after[0])  # type: ignore[union-attr,arg-type]
        for before, after in itertools.pairwise(calls)
    )


def _check_stream(model: nn.Module, output: Tensor | None) -> None:
    if output is not None and output.ndim != 3:
        raise UserError(
            "this model has no single residual stream",
            where=type(model).__name__,
            expected="blocks that hand on [batch, position, d_model]",
            found=f"{list(output.shape)}: {len(output)} streams (AltUp, as in Gemma 3n)",
            fix="use a model with one stream; sites of several are not read",
        )


def find_sites(blocks: Sequence[nn.Module], run: Callable[[], object]) -> tuple[BlockSites, ...]:
    """`run` makes one forward pass of a few tokens through `blocks`."""
    records = [_BlockRecord(block) for block in blocks]
    handles = [handle for record in records for handle in record.attach()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(record.solve() for record in records)


@dataclass(kw_only=True)
class _Call:
    """One call of one child of a block."""

    module: nn.Module
    input: Tensor | None
    output: Tensor


class _BlockRecord:
    """What one block and its children saw and gave in one forward pass."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.calls: list[_Call] = []
        self.inner: list[_Call] = []
        self.before: Tensor | None = None
        self.after: Tensor | None = None

    def attach(self) -> Iterator[RemovableHandle]:
        yield self.block.register_forward_hook(self._see_block, with_kwargs=True)
        for child in self.block.children():
            yield child.register_forward_hook(self._see_child, with_kwargs=True)
            for inner in child.modules():
                if inner is not child:
                    yield inner.register_forward_hook(self._see_inner, with_kwargs=True)

    def _see_block(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.before, self.after = _first_input(args, kwargs), first_tensor(output)

    def _see_child(self, child: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        value = first_tensor(output)
        if value is not None:
            self.calls.append(
                _Call(module=child, input=_first_input(args, kwargs), output=value.clone())
            )

    def _see_inner(self, inner: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        value, read = first_tensor(output), _first_input(args, kwargs)
        if value is not None and getattr(getattr(inner, "weight", None), "ndim", 0) == 2:
            self.inner.append(_Call(module=inner, input=read, output=value))

    def solve(self) -> BlockSites:
        pre, post = self.before, self.after
        if pre is None or post is None or pre.shape != post.shape:
            return BlockSites(block=self.block)
        n_calls = Counter(
            id(call.module) for call in self.calls
        )  # a module used twice has no place of its own
        calls = [
            call
            for call in self.calls
            if call.output.shape == post.shape and n_calls[id(call.module)] == 1
        ]
        pair = self._pair_that_adds_up(calls, pre, post)
        if pair is None:
            return BlockSites(block=self.block)
        attention, mlp = pair
        middle = pre + attention.output
        is_sequential = any(
            call.input is not None and torch.equal(call.input, middle) for call in self.calls
        )
        attention_reader = self._before_norm(attention, calls)
        mlp_reader = self._before_norm(mlp, calls)
        return BlockSites(
            block=self.block,
            attention=attention.module,
            mlp=mlp.module,
            is_sequential=is_sequential,
            z=self._projection(attention_reader),
            mlp_reader=None if mlp_reader.input is None else mlp_reader.module,
            mlp_norm=self._norm_read_by(mlp_reader, attention_reader, calls),
        )

    @staticmethod
    def _before_norm(added: _Call, calls: list[_Call]) -> _Call:
        """The sublayer itself, where what is added to the stream is a norm (or dropout) of it."""
        if added.input is None or any(each.ndim > 1 for each in added.module.parameters()):
            return added
        before = (call for call in calls if call.module is not added.module)
        return next((call for call in before if torch.equal(call.output, added.input)), added)

    def _projection(self, attention: _Call) -> Projection | None:
        """The module inside the attention with a matrix whose output is the attention's own."""
        for call in self.inner:
            weight = getattr(call.module, "weight", None)
            is_matrix = isinstance(weight, Tensor) and weight.ndim == 2
            if (
                is_matrix
                and call.input is not None
                and any(call.module is each for each in attention.module.modules())
                and call.output.shape == attention.output.shape
                and torch.equal(call.output, attention.output)
            ):
                return Projection(module=call.module, width=call.input.shape[-1])
        return None

    @staticmethod
    def _norm_read_by(mlp: _Call, attention: _Call, calls: list[_Call]) -> nn.Module | None:
        """The norm whose output the MLP reads and nothing else does."""
        if mlp.input is None:
            return None
        is_shared = attention.input is not None and torch.equal(attention.input, mlp.input)
        for call in calls:
            if call.module is not mlp.module and torch.equal(call.output, mlp.input):
                is_norm = "norm" in type(call.module).__name__.lower()
                return call.module if is_norm and not is_shared else None
        return None

    @staticmethod
    def _pair_that_adds_up(
        calls: list[_Call], pre: Tensor, post: Tensor
    ) -> tuple[_Call, _Call] | None:
        """The pair with the smallest misfit, which is 0 where the block adds in this order; of
        equals the latest (a dropout after the attention has the same output and is nearer to the
        stream)."""
        best, smallest = None, _MOST_MISFIT
        for second in reversed(range(len(calls))):
            for first in reversed(range(second)):
                misfit = _misfit(pre + calls[first].output + calls[second].output, pre, post)
                if misfit < smallest:
                    best, smallest = (calls[first], calls[second]), misfit
        return best


def _misfit(total: Tensor, pre: Tensor, post: Tensor) -> float:
    """The worst position's |total - post|, in units of what the block changes there plus rounding.
    Positions are compared one by one: the first one's norm may be a hundred times that of the
    others and would hide them."""
    rounding = 4 * torch.finfo(post.dtype).eps * post.abs().amax(-1).double()
    change = (post.double() - pre.double()).abs().amax(-1)
    off = (total.double() - post.double()).abs().amax(-1)
    return float((off / (1e-3 * change + rounding).clamp(min=1e-30)).max())


@dataclass
class _Tap:
    edits: list[Edit] = field(default_factory=list)
    recorders: list[dict[Site, Tensor]] = field(default_factory=list)

    def __call__(self, site: Site, value: Tensor) -> Tensor:
        for edit in self.edits:
            edited = edit(value)
            if edited.shape != value.shape:
                raise ValueError(
                    f"the edit at {site} turned shape {tuple(value.shape)} into "
                    f"{tuple(edited.shape)}"
                )
            value = edited.to(value.dtype)
        for recorder in self.recorders:
            recorder[site] = (
                value.clone()
            )  # Falcon adds the attention's output into the MLP's in place
        return value


class Taps:
    """The hooks wanted now on one model. Every change takes all hooks off and puts the wanted ones
    on in stream order, so that the result never depends on the order in which callers asked."""

    def __init__(self, blocks: tuple[BlockSites, ...]) -> None:
        self._blocks = blocks
        self._taps: dict[Site, _Tap] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def n_hooks(self) -> int:
        return len(self._handles)

    @contextmanager
    def edited(self, edits: Mapping[Site, Edit]) -> Iterator[None]:
        wanted = dict(edits)
        for site, edit in wanted.items():
            self._taps.setdefault(site, _Tap()).edits.append(edit)
        self._rehang()
        try:
            yield
        finally:
            for site, edit in wanted.items():
                _remove_last(self._taps[site].edits, edit)
            self._rehang()

    @contextmanager
    def recorded(self, sites: Sequence[Site], into: dict[Site, Tensor]) -> Iterator[None]:
        wanted = tuple(dict.fromkeys(sites))
        for site in wanted:
            self._taps.setdefault(site, _Tap()).recorders.append(into)
        self._rehang()
        try:
            yield
        finally:
            for site in wanted:
                _remove_last(self._taps[site].recorders, into)
            self._rehang()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the model runs as it is."""
        taps, self._taps = self._taps, {}
        self._rehang()
        try:
            yield
        finally:
            self._taps = taps
            self._rehang()

    def _rehang(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._taps = {site: tap for site, tap in self._taps.items() if tap.edits or tap.recorders}
        self._handles = [handle for site in sorted(self._taps) for handle in self._hang(site)]

    def _hang(self, site: Site) -> Iterator[RemovableHandle]:
        at, tap = self._blocks[site.layer], self._taps[site]
        match site.kind:
            case "resid_pre":
                yield _hook_input(at.block, lambda value: tap(site, value))
            case "z" if at.z is not None:
                yield _hook_input(at.z.module, lambda value: tap(site, value))
            case "mlp_in" if at.mlp_reader is not None:
                yield _hook_input(at.mlp_reader, lambda value: tap(site, value))
            case "mlp_normalized" if at.mlp_norm is not None:
                yield _hook_normalized(at.mlp_norm, lambda value: tap(site, value))
            case "attn_out" if at.attention is not None:
                yield _hook_output(at.attention, lambda value: tap(site, value))
            case "mlp_out" if at.mlp is not None:
                yield _hook_output(at.mlp, lambda value: tap(site, value))
            case "resid_mid" if at.attention is not None:
                yield from _hook_middle(at.block, at.attention, lambda value: tap(site, value))
            case "resid_post":
                yield _hook_output(at.block, lambda value: tap(site, value))
            case _:
                raise ValueError(f"{site} cannot be tapped")


def _hook_input(module: nn.Module, see: Edit) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (see(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": see(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_output(module: nn.Module, see: Edit) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            return type(output)((see(output[0]), *output[1:]))
        return see(output)

    return module.register_forward_hook(hook)


def _hook_middle(block: nn.Module, attention: nn.Module, see: Edit) -> Iterator[RemovableHandle]:
    before: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        before[:] = [value]
        return value

    def see_middle(attention_output: Tensor) -> Tensor:
        middle = before.pop() + attention_output
        edited = see(middle)
        return attention_output if edited is middle else attention_output + (edited - middle)

    yield _hook_input(block, keep)
    yield _hook_output(attention, see_middle)


def _hook_normalized(norm: nn.Module, see: Edit) -> RemovableHandle:
    """What the norm gives before its gain; an edit goes on through the gain."""
    plain = _without_gain(norm)

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        normalized = plain(args[0])
        edited = see(normalized)
        if edited is normalized:
            return output
        gain = norm_gain(module, args[0].shape[-1]).to(output)
        return output + (edited - normalized) * gain

    return norm.register_forward_hook(hook)


def _without_gain(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm with a gain of one and no bias, whether the weight is the gain or what is added to
    one (Gemma)."""
    plain = copy.deepcopy(norm).requires_grad_(False)
    for weight in plain.parameters():
        weight.zero_()
    gain_at_zero = norm_gain(plain, max(each.shape[-1] for each in plain.parameters()))
    for name, weight in plain.named_parameters():
        if name.endswith("weight") and gain_at_zero.abs().max() < 0.5:
            weight.fill_(1)
    return plain.forward  # not a call: the hooks were copied too


def norm_gain(norm: nn.Module, d_model: int) -> Float[Tensor, "d_model"]:
    """The gain by probing: a vector of +1 and -1 with mean 0 has norm statistics 0 and 1, so the
    odd part of the output is gain * sign, whatever the norm calls its weight (Gemma adds one to it)
    and for LayerNorm's bias too. float32, on the CPU."""
    signs = torch.ones(d_model)
    signs[1::2] = -1.0
    scale = 100.0  # drowns epsilon
    probe = copy.deepcopy(norm).float().cpu()
    with torch.no_grad():
        odd = (probe.forward(scale * signs) - probe.forward(-scale * signs)) / 2
    return odd * signs


def first_tensor(value: Any) -> Tensor | None:
    """A module's main output: the tensor itself, or the first of a tuple."""
    head = value[0] if isinstance(value, (tuple, list)) and value else value
    return head if isinstance(head, Tensor) else None


def _first_input(args: tuple, kwargs: dict) -> Tensor | None:
    return first_tensor(args) if args else first_tensor(kwargs.get("hidden_states"))


def _remove_last(items: list, item: object) -> None:
    """By identity: two recorders may be equal dictionaries."""
    index = max(i for i, candidate in enumerate(items) if candidate is item)
    del items[index]
