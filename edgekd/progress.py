"""What a run says about itself as it goes, the same from Python and from the command line: lines on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekd.stages import Event


def print_event(event: Event) -> None:
    """Print a stage's event as a line on standard error; a training's bar, if one is shown, stays below it."""
    took = f" ({event.seconds:.1f} s)" if event.kind == "finished" else ""
    text = f"{event.stage}: {event.text}" if event.kind == "note" else f"{event.stage}: {event.kind}{took}: {event.text}"
    print(text, file=sys.stderr, flush=True)
