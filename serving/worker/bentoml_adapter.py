"""Every use of a name that BentoML does not publish."""

from __future__ import annotations

from typing import Any, cast

import attr
from _bentoml_sdk import Service
from bentoml._internal.service.openapi.specification import OpenAPISpecification, PathItem
from starlette.types import ASGIApp

from serving.openai.openapi import DESCRIPTION, PREFIX, VERSION, document


class BentoMLService(Service[Any]):
    """BentoML's service, whose document also has the mounted routes (`bentoml build` writes it into the Bento, too).
    Its requests leave no timers behind."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """Without BentoML's time limit, which keeps a timer and what it holds of every request until it runs out: the
        limit is ours (`CHATGLM_REQUEST_TIMEOUT`)."""
        from _bentoml_impl.server.app import ServiceAppFactory  # only a worker needs it

        self.inject_config()
        factory = ServiceAppFactory(self, is_main=is_main)
        factory.timeout = None
        return cast("ASGIApp", factory())

    @property
    def openapi_spec(self) -> OpenAPISpecification:
        spec = super().openapi_spec
        own = document((PREFIX, ""))
        merged = cast("dict[str, dict[str, Any]]", spec.components)
        for kind, entries in own["components"].items():
            merged.setdefault(kind, {}).update(entries)
        items = {path: PathItem(**item) for path, item in own["paths"].items()}
        changed = attr.evolve(
            spec,
            openapi=VERSION,
            # BentoML's own text shows pictures from elsewhere
            info=attr.evolve(spec.info, description=DESCRIPTION),
            paths={**items, **spec.paths},
            components=cast("Any", merged),
        )
        return cast("OpenAPISpecification", changed)
