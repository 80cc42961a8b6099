"""Texts end to end instead of padded: a model's matrix products see (almost) real tokens only.

Where attention is ours (attention.py) all texts of a batch lie in one row, and attention alone knows them apart. Where
it is not, a row holds several short texts of one client, with a mask that keeps each to itself. Each text has positions
from its own start. Two hooks do it, and nobody else knows: one packs what goes into the backbone, the other unpacks
what its last layer gives, before any head. `prepare` tries a model on three short texts, and a model whose results
differ, or that takes no positions, goes on with padded batches.
"""

import bisect
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from fedtri.execution import attention
from fedtri.execution.attention import TextRows
from fedtri.execution.routing import Routing


@dataclass(frozen=True)
class _Rows:
    """Texts laid into rows."""

    texts: Int[Tensor, "rows width"]
    """Which text a place holds; -1 for none."""
    positions: Int[Tensor, "rows width"]
    source: Int[Tensor, "rows width"]
    """Which token, counted text by text, a place holds; the row's first where it holds none."""
    places: Int[Tensor, "tokens"]
    """In which place, of all rows end to end, each token is."""

    def to(self, device: torch.device) -> "_Rows":
        """The same on this device."""
        return _Rows(*(value.to(device) for value in vars(self).values()))

    @property
    def empty(self) -> Bool[Tensor, "rows width"]:
        """The places that hold no token."""
        return self.texts < 0


@dataclass(frozen=True)
class _Pending:
    """What the second hook needs to undo the first."""

    real: Bool[Tensor, "batch tokens"]
    places: Int[Tensor, "real_tokens"]
    slots: Int[Tensor, "batch"]
    firsts: Int[Tensor, "batch"]
    """Where, in all rows end to end, each text begins."""


class Packing:
    """The two hooks on one model."""

    def __init__(self, backbone: nn.Module, owner: nn.Module, routing: Routing, *, end_to_end: bool) -> None:
        self.routing, self.end_to_end = routing, end_to_end
        self.causal, self.first_position = False, 0
        self.multiple = 1
        """To what number of tokens texts that lie end to end are filled up, by one more text that nobody reads."""
        self._names = list(inspect.signature(backbone.forward).parameters)
        self._hooks = [
            backbone.register_forward_pre_hook(self._pack, with_kwargs=True),
            owner.register_forward_hook(self._unpack),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _pack(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not self.routing.packing or ids is None or mask is None or mask.dim() != 2:
            return None
        if given.get("position_ids") is not None or given.get("past_key_values") is not None:
            return None
        real = mask.bool()
        lengths = real.sum(1).tolist()
        if max(lengths) > _window(module):  # each layer would look further than it does in a padded batch
            return None
        if "use_cache" in self._names:
            given["use_cache"] = False
        lay = self._end_to_end if self.end_to_end else self._in_rows
        return ((), given) if lay(module, given, ids.shape, real, lengths) else None

    def _end_to_end(
        self, module: nn.Module, given: dict[str, Any], shape: torch.Size, real: Tensor, lengths: list[int]
    ) -> bool:
        """All texts in one row, in the batch's order; attention is told in which rows it is to lay them."""
        total, slots, device = sum(lengths), self.routing.slots, real.device
        assert slots is not None
        fill = -total % self.multiple
        more, whose = ([fill], slots[-1:].tolist()) if fill else ([], [])
        rows = _for_attention(lengths + more, slots.tolist() + whose).to(device)
        for name in _by_token(given, shape):
            given[name] = pad(given[name][real][None], (0, fill))
        given["position_ids"] = rows.positions.flatten()[rows.places][None] + self.first_position
        given["attention_mask"] = mask = self._mask(rows, next(module.parameters()).dtype)
        given["text_rows"] = TextRows(rows.source, rows.places, mask)
        counts = torch.tensor(lengths, device=device)
        owners = slots.repeat_interleave(counts)
        self.routing.set(torch.cat([owners, owners[-1:].expand(fill)]))
        self.routing.pending = _Pending(real, torch.arange(total, device=device), slots, counts.cumsum(0) - counts)
        return True

    def _in_rows(
        self, module: nn.Module, given: dict[str, Any], shape: torch.Size, real: Tensor, lengths: list[int]
    ) -> bool:
        """Texts in rows of one client each; not where no two would share a row."""
        slots, device = self.routing.slots, real.device
        assert slots is not None
        found = _for_layers(lengths, slots.tolist(), module.config.hidden_size)  # pyright: ignore
        if found is None:
            return False
        rows, owners = found[0].to(device), torch.tensor(found[1], device=device)
        for name in _by_token(given, shape):
            given[name] = given[name][real][rows.source].masked_fill(rows.empty, 0)
        given["position_ids"] = rows.positions + self.first_position
        given["attention_mask"] = self._mask(rows, next(module.parameters()).dtype)
        counts = torch.tensor(lengths, device=device)
        self.routing.set(owners)
        self.routing.pending = _Pending(real, rows.places, slots, rows.places[counts.cumsum(0) - counts])
        return True

    def _mask(self, rows: _Rows, dtype: torch.dtype) -> Tensor:
        """(rows, 1, width, width), 0 where a token may look and the type's least number where not."""
        apart = rows.texts[:, None, :, None] != rows.texts[:, None, None, :]
        if self.causal:
            apart = apart | (rows.positions[:, None, :, None] < rows.positions[:, None, None, :])
        return torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill(apart, torch.finfo(dtype).min)

    def _unpack(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        pending, self.routing.pending = self.routing.pending, None
        if pending is None:
            return None
        self.routing.set(pending.slots)
        if self.routing.first_only:  # trim.py has taken them out of their rows
            return None
        packed = output if isinstance(output, Tensor) else output[0]
        flat = packed.flatten(0, 1).index_select(0, pending.places)
        padded = flat.new_zeros(pending.real.numel(), flat.shape[-1])
        padded = padded.index_copy(0, torch.nonzero(pending.real.flatten())[:, 0], flat)
        hidden = padded.unflatten(0, pending.real.shape)
        if isinstance(output, Tensor):
            return hidden
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output


def prepare(model: nn.Module, routing: Routing, *, in_rows: bool = False) -> Packing | None:
    """Packing for this model, or None where a trial on three short texts says that it does not work here.

    `in_rows`: in rows of one client each, even where all texts could lie end to end.
    """
    backbone = backbone_of(model)
    if backbone is None or not {"input_ids", "attention_mask", "position_ids"} <= set(
        inspect.signature(backbone.forward).parameters
    ):
        return None
    owner = owner_of_layers(backbone)
    if owner is None or next(backbone.parameters()).is_meta:
        return None
    first_text = (getattr(getattr(model, "config", None), "pad_token_id", None) or 0) + 1
    for end_to_end in (False,) if in_rows or not attention.adopt(model) else (True, False):
        packing = Packing(backbone, owner, routing, end_to_end=end_to_end)
        for packing.causal in (False, True):
            for packing.first_position in dict.fromkeys([0, first_text]):  # RoBERTa counts from behind its padding
                if _agrees(backbone, routing):
                    return packing
        packing.remove()
        if end_to_end:
            attention.leave(model)
    return None


@torch.inference_mode()
def _agrees(backbone: nn.Module, routing: Routing) -> bool:
    """Whether three short texts come out of packed rows as out of padded ones."""
    device = next(backbone.parameters()).device
    ids, mask = short_texts(device)
    routing.set(torch.zeros(3, dtype=torch.long, device=device))
    found = []
    try:
        for routing.packing in (False, True):
            found.append(backbone(input_ids=ids, attention_mask=mask)[0][mask.bool()])
    except (TypeError, ValueError, RuntimeError, IndexError):  # whatever a model says to rows it does not expect
        return False
    finally:
        routing.packing, routing.pending = False, None
    return agree(found[1], found[0])


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The pretrained model beneath the head, where there is one."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    return backbone if isinstance(backbone, nn.Module) else None


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The only list of layers in the model's backbone and its name, where there is one."""
    backbone = backbone_of(model)
    owner = None if backbone is None else owner_of_layers(backbone)
    if owner is None:
        return None
    layers = next(child for child in owner.children() if isinstance(child, nn.ModuleList))
    return next(name for name, module in model.named_modules() if module is layers), layers


def short_texts(device: torch.device) -> tuple[Int[Tensor, "3 5"], Int[Tensor, "3 5"]]:
    """Token ids and mask of three texts to try a model on."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [7, 5, 1, 1, 1], [6, 6, 8, 1, 1]], device=device)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], device=device)
    return ids, mask


def agree(found: Tensor, plain: Tensor) -> bool:
    """Whether what a trial gave is what the model gave before, but for rounding."""
    tolerance = 0.05 if plain.dtype in (torch.bfloat16, torch.float16) else 1e-4
    difference = (found.float() - plain.float()).norm()
    return found.shape == plain.shape and bool(difference <= tolerance * plain.float().norm())


def takes_texts(module: nn.Module | None) -> bool:
    """Whether a trial on short texts says anything of this model: one of images alone has no input_ids."""
    return module is not None and "input_ids" in inspect.signature(module.forward).parameters


def owner_of_layers(backbone: nn.Module) -> nn.Module | None:
    """The module that holds the backbone's only list of layers."""
    owners = [
        module for module in backbone.modules() if any(isinstance(child, nn.ModuleList) for child in module.children())
    ]
    return owners[0] if len(owners) == 1 else None


def _by_token(given: dict[str, Any], shape: torch.Size) -> list[str]:
    """What of a model's inputs has a number for each token."""
    return [
        name for name, value in given.items()
        if isinstance(value, Tensor) and value.shape == shape and name != "attention_mask"
    ]  # fmt: skip


def _window(backbone: nn.Module) -> float:
    """How many tokens a text may have without a layer that looks at its neighbourhood alone leaving some out."""
    config = backbone.config
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((float(window) for window in found if isinstance(window, int) and window > 0), default=float("inf"))


def _laid(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> _Rows:
    """These texts in rows of this width."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    texts = torch.full((len(rows), width), -1)
    positions = torch.zeros_like(texts)
    source = torch.tensor([[starts[row[0]]] for row in rows]).repeat(1, width)
    places = torch.empty(starts[-1], dtype=torch.long)
    for index, row in enumerate(rows):
        at = 0
        for text in row:
            here, n = slice(at, at + lengths[text]), lengths[text]
            texts[index, here] = text
            positions[index, here] = torch.arange(n)
            source[index, here] = torch.arange(starts[text], starts[text] + n)
            places[starts[text] : starts[text] + n] = torch.arange(n) + index * width + at
            at += n
    return _Rows(texts, positions, source, places)


def _for_attention(lengths: Sequence[int], slots: Sequence[int]) -> _Rows:
    """Rows for attention alone, as wide as makes it cheapest, about W (W + 16) for each. Of one slot each: where a
    client's numbers are no numbers any more, a mask would not keep them from others in its row.
    """
    texts_of = _by_slot(lengths, slots)
    least = -(-max(lengths) // attention.WIDTH) * attention.WIDTH
    widths = range(least, least + 64 + 1, attention.WIDTH)
    found = {width: [row for _, row in _dealt(texts_of, lengths, width)] for width in widths}
    width = min(widths, key=lambda width: len(found[width]) * width * (width + 16))
    return _laid(found[width], lengths, width)


def _for_layers(lengths: Sequence[int], slots: Sequence[int], hidden: int) -> tuple[_Rows, list[int]] | None:
    """Rows for whole layers, of one slot each, and whose they are; None where no two texts would share one.

    As wide as makes their places cheapest: few long rows waste no place but cost attention to what lies beside a text,
    about W / (2 hidden) of all else.
    """
    texts_of, longest = _by_slot(lengths, slots), max(lengths)
    best, width, least = [(slot, [text]) for text, slot in enumerate(slots)], longest, float("inf")
    for limit in range(longest, longest + min(longest, 64) + 1):
        rows = _dealt(texts_of, lengths, limit)
        used = max(sum(lengths[text] for text in row) for _, row in rows)
        if (cost := len(rows) * used * (1 + used / (2 * hidden))) < least:
            best, width, least = rows, used, cost
    if len(best) == len(lengths):
        return None
    return _laid([row for _, row in best], lengths, width), [slot for slot, _ in best]


def _by_slot(lengths: Sequence[int], slots: Sequence[int]) -> dict[int, list[int]]:
    """Each slot's texts, longest first, in the order of the slots."""
    texts_of: dict[int, list[int]] = {slot: [] for slot in sorted(set(slots))}
    for text in sorted(range(len(slots)), key=lambda text: -lengths[text]):
        texts_of[slots[text]].append(text)
    return texts_of


def _dealt(texts_of: dict[int, list[int]], lengths: Sequence[int], width: int) -> list[tuple[int, list[int]]]:
    """(slot, texts) of each row of this width."""
    return [(slot, row) for slot, texts in texts_of.items() for row in _fill(texts, lengths, width)]


def _fill(texts: Sequence[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Texts, longest first, each put into the fullest row that has room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row, sorted
    for text in texts:
        n = lengths[text]
        fitting = bisect.bisect_left(room, (n, 0))
        if fitting == len(room):
            rows.append([])
            left, row = width, len(rows) - 1
        else:
            left, row = room.pop(fitting)
        rows[row].append(text)
        bisect.insort(room, (left - n, row))
    return rows
