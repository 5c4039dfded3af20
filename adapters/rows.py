"""Which row of the batch shows which image."""

from __future__ import annotations

from vqguard.errors import InputError


def fill_placeholders(slots: list[int], counts: list[int], kind: str) -> list[int]:
    """The row of each image: images of `counts` tokens fill the rows' `slots` in order.

    Raises `InputError` when a row's placeholders do not hold a whole number of images: the verdict
    of an image that is spread over two rows could not be acted upon.
    """
    rows: list[int] = []
    row, free = 0, slots[0] if slots else 0
    for image, count in enumerate(counts):
        while free == 0 and row + 1 < len(slots):
            row += 1
            free = slots[row]
        if count > free:
            raise InputError(
                f"{kind} {image} has {count} tokens but row {row} of the prompt has {free} "
                f"{kind} placeholders left (placeholders by row: {slots}, {kind} sizes: "
                f"{counts}); build the prompt with the model's processor"
            )
        rows.append(row)
        free -= count
    if sum(counts) != sum(slots):
        raise InputError(
            f"the prompt has {sum(slots)} {kind} placeholders (by row: {slots}) but the {kind}s "
            f"fill {sum(counts)} ({counts}); build the prompt with the model's processor"
        )
    return rows


def evenly(units: int, rows: int, kind: str) -> list[int]:
    """The row of each unit where every row has as many, in order.

    Raises `InputError` when they cannot be shared out.
    """
    if rows < 1 or units % rows:
        raise InputError(
            f"{units} {kind}s cannot belong to {rows} rows of the batch evenly; pass as many for "
            "each row, as the model's processor does"
        )
    return [unit // (units // rows) for unit in range(units)]
