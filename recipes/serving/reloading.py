"""A map that was calibrated or edited anew, taken from the run without dropping a request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from vqguard.errors import VQGuardError
from vqguard.recipes.judging.map_changes import read_map
from vqguard.recipes.serving.service import Service

log = logging.getLogger(__name__)


def reloader(service: Service, run: Path) -> Callable[[], None]:
    """What SIGHUP does: the run's map as it is on disk now, and the audit log's file anew.

    What fails is logged, and what was in force stays.
    """

    def reload() -> None:
        try:
            if service.audit is not None:
                service.audit.reopen()
            before = service.engine.safety_map.version
            service.engine.use_map(read_map(run))
            after = service.engine.safety_map.version
        except (VQGuardError, OSError) as error:
            log.error("nothing was reloaded: %s", error)
            return
        log.info("map %s in the place of %s", after[:12], before[:12])

    return reload
