"""Variables that are not settings: misspelt ones are refused, those of an orchestrator are not ours."""

from __future__ import annotations

import pytest

from serving.settings import Settings, SettingsError


@pytest.mark.parametrize("service", ["CHATGLM", "CHATGLM_API", "CHATGLM_GPU_2"])
def test_what_kubernetes_tells_about_a_service_of_the_same_name_is_no_setting(service: str) -> None:
    injected = {
        f"{service}_SERVICE_HOST": "10.96.12.7",
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
        f"{service}_PORT": "tcp://10.96.12.7:8000",
        f"{service}_PORT_8000_TCP": "tcp://10.96.12.7:8000",
        f"{service}_PORT_8000_TCP_PROTO": "tcp",
        f"{service}_PORT_8000_TCP_PORT": "8000",
        f"{service}_PORT_8000_TCP_ADDR": "10.96.12.7",
    }
    settings = Settings.from_environment({**injected, "CHATGLM_MODEL": "mine"})
    assert settings == Settings.from_environment({"CHATGLM_MODEL": "mine"})


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("CHATGLM_MODLE", "x", "did you mean CHATGLM_MODEL?"),
        ("CHATGLM_MAX_SEQUENCE", "4", "did you mean CHATGLM_MAX_SEQUENCES?"),
        ("CHATGLM_PORT", "9000", "is not a setting; docs/settings.md"),
        ("CHATGLM_COLOUR", "red", "is not a setting; docs/settings.md"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_the_nearest_one(name: str, value: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({name: value})
    assert hint in str(caught.value)
