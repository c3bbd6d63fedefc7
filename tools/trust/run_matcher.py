#!/usr/bin/env python3
"""Runs LiveSfM with a matcher from outside the product.

    run_matcher.py recorded:FILE.npz run images --out RUN
    run_matcher.py second:FILE.npz run images --out RUN
    run_matcher.py deceived:RATIO:SEED:yes run 'synthetic:town?path=orbit' --config oracle --out RUN

MATCHER is ``recorded:FILE``, matches read from a file; ``second:FILE``, those for what SIFT hardly
matches; or ``deceived:RATIO:SEED:ADMITTED``, an
oracle that matches some pairs which share nothing, and says so (``yes``) or not (``no``), for
``synthetic:town?path=orbit``, which is flown looking outward (`flights.outward_flight`). What
follows is a command line of ``livesfm``. Started by the Python of the LiveSfM that is to run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import cli, launch
from trust import flights
from trust.matchers import (
    DeceivedOracle,
    DeceivedPlaces,
    Deception,
    Opener,
    RecordedMatcher,
    RecordedPlaces,
    RecordedSecond,
)

if TYPE_CHECKING:
    from engine.config import Config
    from engine.ports import PairMatcher, PlaceIndex


def main(given: Sequence[str]) -> None:
    """Runs the command line that follows the matcher."""
    if not given:
        sys.exit(__doc__)
    kind, _, value = given[0].partition(":")
    if kind == "second":
        launch._second_matcher = lambda config: RecordedSecond(RecordedMatcher(Path(value)))
    else:
        launch._matching = opener(given[0])
    sys.argv = ["livesfm", *given[1:]]
    with flights.outward_flight():
        cli.main()


def opener(matcher: str) -> Opener:
    """What opens a matcher and its places in place of the configured ones."""
    kind, _, value = matcher.partition(":")
    match kind:
        case "recorded":
            return lambda config, sources: _recorded(Path(value))
        case "deceived":
            ratio, seed, admitted = value.split(":")
            deception = Deception(ratio=float(ratio), seed=int(seed), is_admitted=admitted == "yes")
            return lambda config, sources: _deceived(config, sources, deception)
    sys.exit(f"run_matcher: no such matcher: {matcher}")


def _recorded(path: Path) -> tuple[PairMatcher, PlaceIndex]:
    matcher = RecordedMatcher(path)
    return matcher, RecordedPlaces(matcher)


def _deceived(
    config: Config, sources: Sequence[Any], deception: Deception
) -> tuple[PairMatcher, PlaceIndex]:
    oracle, places = launch._oracle(config, sources)
    town = sources[0]
    matcher = DeceivedOracle(
        oracle,
        deception,
        intrinsics=town.intrinsics,
        size=(town.options.width, town.options.height),
    )
    return matcher, DeceivedPlaces(places, deception)


if __name__ == "__main__":
    main(sys.argv[1:])
