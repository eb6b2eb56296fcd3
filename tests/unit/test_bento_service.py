"""What is taken out of BentoML's server."""

from __future__ import annotations

import bentoml
from starlette.applications import Starlette

from serving.worker.bentoml_adapter import BentoMLService


def test_no_request_leaves_a_timer_behind() -> None:
    """BentoML's time limit keeps a timer of each request until it runs out: a day's worth, with `timeout=86400`."""

    @bentoml.service(name="untimed", service_class=BentoMLService, traffic={"timeout": 86400})
    class Untimed:
        pass

    app = Untimed.to_asgi()
    assert isinstance(app, Starlette)
    names = [getattr(middleware.cls, "__name__", "") for middleware in app.user_middleware]
    assert names
    assert "TimeoutMiddleware" not in names
